"""This is the seam: what the model asks of a GPU, natively and in the browser alike.

Everything above this file is the same code on every platform. A backend subclasses `Device`; see `native.py`.
Reading from the GPU is asynchronous at the bottom, since a browser has no other way; `Device.wait` is the
synchronous face, for platforms that can block.
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import html
from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu.shader import load_shader

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterInfo:
    """Who the GPU is. The strings are the driver's; one that it does not give is empty."""

    vendor: str
    architecture: str
    device: str
    driver: str
    backend: str  # "Vulkan", "Metal", "D3D12", "WebGPU"
    type: str  # "DiscreteGPU", "IntegratedGPU", "CPU", "Unknown"

    def __str__(self) -> str:
        details = ", ".join(part for part in (self.backend, self.driver) if part)
        return f"{self.device or self.architecture or self.vendor or 'unnamed GPU'} ({details})"


@dataclass(frozen=True)
class Limits:
    """The limits that the kernels must respect (WebGPU, section 3.6.2), in bytes and counts."""

    max_buffer_size: int
    max_storage_buffer_binding_size: int
    max_storage_buffers_per_shader_stage: int
    max_compute_workgroup_storage_size: int
    max_compute_invocations_per_workgroup: int
    max_compute_workgroups_per_dimension: int


@dataclass(frozen=True)
class Adapter:
    """A GPU as it presents itself, before it is opened."""

    info: AdapterInfo
    limits: Limits
    features: frozenset[str]  # in WebGPU's names: "shader-f16", "subgroups", "timestamp-query"


class Buffer:
    """A span of GPU memory, which can be storage, copied from and copied to. `Device.buffer` makes one.

    `size` is in bytes. The platform's own object is for the backends alone.
    """

    def __init__(self, device: Device, platform: Any, size: int, label: str) -> None:
        self.size, self.label = size, label
        self._device = device
        self._platform = platform

    @property
    def handle(self) -> Any:
        """Return the platform's buffer. Raises DeviceError once it was freed."""
        if self._platform is None:
            raise DeviceError(f"buffer '{self.label}' was freed")
        return self._platform

    def destroy(self) -> None:
        """Give the memory back at once. Idempotent."""
        if self._platform is not None:
            self._platform.destroy()
            self._platform = None
            self._device.allocated -= self.size
            self._device.freed += 1


class Pipeline:
    """A compiled shader with its constants; `handle` is the platform's."""

    def __init__(self, handle: Any, label: str) -> None:
        self.handle, self.label = handle, label


class Program(abc.ABC):
    """Dispatches that were resolved once. `Device.submit` replays them."""

    dispatches: Sequence[Dispatch]


@dataclass(frozen=True)
class Dispatch:
    """One kernel launch. `bindings[i]` is bound whole at `@binding(i)` of group 0."""

    pipeline: Pipeline
    bindings: tuple[Buffer, ...]
    workgroups: tuple[int, int, int]


Constants = Mapping[str, int | float | bool]
MOST_PROFILED = 2048  # dispatches: WebGPU has 4096 queries in a set, one before and one after each


class Held(abc.ABC):
    """Bytes that the platform holds outside of Python, since there is no room for a large model's in it."""

    nbytes: int

    @abc.abstractmethod
    def slice(self, offset: int, nbytes: int) -> Held:
        """Return some of them, in the same memory."""

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """Return a copy in Python."""

    @abc.abstractmethod
    def free(self) -> None:
        """Give the memory back at once, and with it that of all slices."""


Data = NDArray[Any] | Held


class Device(abc.ABC):
    """A GPU that was opened.

    Who writes, submits or reads holds `lock` for so long, but not while it awaits a read. `wait` holds it.
    """

    info: AdapterInfo
    limits: Limits
    features: frozenset[str]
    allocated: int  # bytes in buffers that live
    freed: int  # how many buffers were freed so far
    lock: AbstractContextManager[Any]

    def __init__(self, adapter: Adapter) -> None:
        self.lock = nullcontext()
        self.info, self.limits, self.features = adapter.info, adapter.limits, adapter.features
        self.allocated = self.freed = 0
        self._buffers: WeakSet[Buffer] = WeakSet()
        self._pipelines: dict[tuple[object, ...], Pipeline] = {}

    def _repr_html_(self) -> str:
        limits = self.limits
        return html.table(
            str(self.info),
            {
                "type": self.info.type,
                "features": ", ".join(sorted(self.features)) or "none that matter here",
                "largest binding": f"{limits.max_storage_buffer_binding_size / 1e6:,.0f} MB",
                "workgroup": f"{limits.max_compute_invocations_per_workgroup} threads, "
                f"{limits.max_compute_workgroup_storage_size:,} bytes of shared memory",
                "in use": f"{self.allocated / 1e6:,.0f} MB",
            },
        )

    def buffer(self, size: int, label: str) -> Buffer:
        """Return a new buffer of `size` bytes, rounded up to a multiple of 16, all of them zero.

        Raises DeviceError if `size` exceeds a limit of the adapter or the memory is exhausted.
        """
        size = max(16, -(-size // 16) * 16)
        limit = min(self.limits.max_buffer_size, self.limits.max_storage_buffer_binding_size)
        if size > limit:
            raise DeviceError(
                f"buffer '{label}' needs {size:,} bytes; {self.info.device or 'this adapter'} binds at most "
                f"{limit:,}. Ask for a shorter context_length or a smaller model."
            )
        buffer = Buffer(self, self._create_buffer(size, label), size, label)
        self.allocated += size
        self._buffers.add(buffer)
        return buffer

    def upload(self, data: NDArray[Any], label: str) -> Buffer:
        """Return a new buffer that holds `data`."""
        buffer = self.buffer(data.nbytes, label)
        self.write(buffer, data)
        return buffer

    def pipeline(self, shader: str, constants: Constants, *, half: bool = False, cpu: bool = False) -> Pipeline:
        """Return `shaders/<shader>.wgsl` compiled with its `override` constants. The same request gives the same one.

        `half` makes the type `half` of the shaders f16 instead of f32, `cpu` takes the variants for CPU adapters.
        """
        key = (shader, half, cpu, *sorted(constants.items()))
        if key not in self._pipelines:
            source = load_shader(shader, half=half, cpu=cpu)
            self._pipelines[key] = self.compile(shader, source, constants)
        return self._pipelines[key]

    def compile(self, label: str, source: str, constants: Constants | None = None) -> Pipeline:
        """Compile WGSL of one's own, whose compute entry point is `main`, with its `override` constants.

        Raises DeviceError if it does not compile; in a browser, only the next `read` does.
        """
        return Pipeline(self._create_pipeline(label, source, constants or {}), label)

    def free(self) -> None:
        """Let go of the pipelines, and of the memory of all buffers. The device can be used on."""
        self._pipelines.clear()
        for buffer in list(self._buffers):
            buffer.destroy()

    @abc.abstractmethod
    def _create_buffer(self, size: int, label: str) -> Any:
        """Return the platform's buffer, which has a `destroy`."""

    @abc.abstractmethod
    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        """Return the platform's pipeline."""

    @abc.abstractmethod
    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        """Copy `data` into `buffer` from byte `offset` on, before anything submitted later."""

    def put(self, buffer: Buffer, data: Data, offset: int = 0) -> None:
        """Do what `write` does, also for what the platform holds."""
        if isinstance(data, Held):
            self._write_held(buffer, data, offset)
        else:
            self.write(buffer, data, offset)

    def _write_held(self, buffer: Buffer, data: Held, offset: int) -> None:
        raise NotImplementedError  # by platforms that hold nothing

    @abc.abstractmethod
    def copy(self, source: Buffer, target: Buffer, size: int, source_offset: int = 0, target_offset: int = 0) -> None:
        """Copy `size` bytes from one buffer to another one, after everything that was submitted before.

        The offsets are in bytes. They and `size` are multiples of 4.
        """

    @abc.abstractmethod
    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        """Resolve `dispatches` for replay."""

    @abc.abstractmethod
    def submit(self, programs: Sequence[Program]) -> None:
        """Run the programs one after the other; each dispatch sees what the ones before it wrote.

        Raises DeviceError for what is invalid. A browser tells only later: there the next `read` raises it, and also
        names a shader that does not compile.
        """

    @abc.abstractmethod
    def read(
        self, buffer: Buffer, offset: int = 0, size: int | None = None, *, after: Sequence[Program] = ()
    ) -> Awaitable[NDArray[np.uint8]]:
        """Read bytes `offset` to `offset + size` of `buffer`, as they are after everything that was submitted before
        this call, and after the programs of `after`, which are submitted with it.

        The call itself puts them and the copy on the queue, not the await. The result may be awaited more than once.
        `offset` and `size` are multiples of 4. Raises DeviceError if the device was lost, and as `submit` does.
        """

    async def profile(self, programs: Sequence[Program]) -> NDArray[np.float64]:
        """Run the programs as `submit` does, but with a pass of its own around each dispatch.

        Returns the seconds that each dispatch of all programs took on the GPU, in their order. A browser may round
        them to 0.1 milliseconds. Raises DeviceError if the adapter lacks "timestamp-query", and for more than 2048
        dispatches.
        """
        count = sum(len(program.dispatches) for program in programs)
        if "timestamp-query" not in self.features:
            raise DeviceError(f"{self.info} has no timestamp-query, so kernels cannot be timed on it")
        if not 0 < count <= MOST_PROFILED:
            raise DeviceError(f"{count:,} dispatches cannot be timed at once; 1 to {MOST_PROFILED:,} can")
        nanoseconds = await self._timestamps(programs, count)
        # WebGPU allows an end that is before its beginning.
        return np.maximum(nanoseconds[1::2] - nanoseconds[::2], 0) * 1e-9

    @abc.abstractmethod
    def _timestamps(self, programs: Sequence[Program], count: int) -> Awaitable[NDArray[np.float64]]:
        """Run the programs; return nanoseconds before and after each of their `count` dispatches."""

    @abc.abstractmethod
    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that awaits this device's reads to its end, blocking.

        Raises DeviceError if one can't block.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free all that the device holds. Idempotent."""
