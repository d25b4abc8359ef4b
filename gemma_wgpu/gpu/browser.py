"""The device interface on the browser's WebGPU, from Pyodide, in a page or in a worker.

What WebGPU does is written in `browser.js`, which each method enters once. Errors come late: see `browser.js`.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, TypeVar, cast

import numpy as np
from js import BroadcastChannel
from numpy.typing import NDArray
from pyodide.code import run_js
from pyodide.ffi import JsException, can_run_sync, create_proxy, run_sync, to_js

from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu.device import (
    Adapter,
    AdapterInfo,
    Buffer,
    Constants,
    Device,
    Dispatch,
    Held,
    Limits,
    Program,
)

T = TypeVar("T")

_FEATURES = ("shader-f16", "subgroups", "timestamp-query")
_LIMITS = {
    "max_buffer_size": "maxBufferSize",
    "max_storage_buffer_binding_size": "maxStorageBufferBindingSize",
    "max_storage_buffers_per_shader_stage": "maxStorageBuffersPerShaderStage",
    "max_compute_workgroup_storage_size": "maxComputeWorkgroupStorageSize",
    "max_compute_invocations_per_workgroup": "maxComputeInvocationsPerWorkgroup",
    "max_compute_workgroups_per_dimension": "maxComputeWorkgroupsPerDimension",
}
_REQUESTED = (
    *_LIMITS.values(),
    "maxComputeWorkgroupSizeX",
    "maxComputeWorkgroupSizeY",
    "maxComputeWorkgroupSizeZ",
)
_NO_ADAPTER = (
    "no WebGPU here. Use Chrome or Edge 113, Safari 26, Firefox 141 or later, over https or from localhost; "
    "on Linux, Chrome may need --enable-unsafe-webgpu --enable-features=Vulkan."
)
_CANNOT_BLOCK = (
    "this browser cannot block Python while the GPU works (it lacks JSPI, or Python was entered without it); use "
    "`await load_async(...)`, `async for piece in gemma.generate(...)` and the other async methods"
)


class _BrowserProgram(Program):
    def __init__(self, handle: Any, dispatches: Sequence[Dispatch]) -> None:
        self.handle, self.dispatches = handle, tuple(dispatches)


class _Interrupts:
    """Counts the interrupts of this kernel. JupyterLite has none; the page of our site announces them on a channel.

    They are heard while Python waits, which is when it reads from the GPU.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._channel = BroadcastChannel.new("gemma_wgpu.interrupt")
        self._channel.onmessage = create_proxy(self._hear)

    def _hear(self, event: Any) -> None:
        if event.data == _session():
            self.heard += 1


def _session() -> str | None:
    """Return the Jupyter session that the running cell belongs to; None outside of Jupyter."""
    shell = getattr(builtins, "get_ipython", lambda: None)()
    return shell and shell.kernel.get_parent()["header"]["session"]


interrupts = _Interrupts()


class _Reading:
    """A readback under way. If one of those who await it is cancelled, the others are not."""

    def __init__(self, device: BrowserDevice, promise: Awaitable[Any]) -> None:
        self._device, self._promise = device, promise
        self._future: asyncio.Future[Any] | None = None

    def __await__(self) -> Generator[Any, None, NDArray[np.uint8]]:
        heard = interrupts.heard
        if self._future is None:
            self._future = asyncio.ensure_future(self._promise)
        with self._device.as_device_error("running on the GPU"):
            data = yield from asyncio.shield(self._future).__await__()
        if interrupts.heard != heard:
            raise KeyboardInterrupt
        return np.frombuffer(data.to_bytes(), np.uint8)


class BrowserDevice(Device):
    """A GPU through `navigator.gpu`."""

    def __init__(self, gpu: Any) -> None:
        super().__init__(_described(gpu.adapter))
        self._gpu = gpu
        self._closed = False

    @contextmanager
    def as_device_error(self, doing: str) -> Iterator[None]:
        """Raise what WebGPU throws as a DeviceError that says what was being done, or that the device is gone."""
        if self._closed:
            raise DeviceError(f"{self.info} was closed; load the model again")
        try:
            yield
        except JsException as error:
            if self._closed or self._gpu.isLost():
                raise DeviceError(f"{self.info} was lost; load the model again") from error
            raise DeviceError(f"{doing}: {' '.join(error.message.split())}") from error

    def _create_buffer(self, size: int, label: str) -> Any:
        with self.as_device_error(f"no GPU memory for buffer '{label}' of {size:,} bytes"):
            return self._gpu.createBuffer(size, label)

    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        with self.as_device_error(f"shader '{label}' does not compile on {self.info}"):
            return self._gpu.createPipeline(label, source, to_js(list(constants.items())))

    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        """Copy `data` into `buffer` through the queue."""
        if data.size == 0:
            return
        with self.as_device_error(f"writing buffer '{buffer.label}'"):
            self._gpu.write(_within(buffer, offset, data.nbytes), offset, np.ascontiguousarray(data))

    def _write_held(self, buffer: Buffer, data: Held, offset: int) -> None:
        with self.as_device_error(f"writing buffer '{buffer.label}'"):
            self._gpu.writeHeld(_within(buffer, offset, data.nbytes), offset, data.view)  # type: ignore[attr-defined]

    def copy(self, source: Buffer, target: Buffer, size: int, source_offset: int = 0, target_offset: int = 0) -> None:
        """Copy bytes between buffers, in a submission of their own."""
        with self.as_device_error(f"copying buffer '{source.label}'"):
            handles = _within(source, source_offset, size), _within(target, target_offset, size)
            self._gpu.copy(handles[0], source_offset, handles[1], target_offset, size)

    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        """Make the bind groups of `dispatches` in JavaScript, which replays them."""
        calls = [(d.pipeline.handle, [buffer.handle for buffer in d.bindings], d.workgroups) for d in dispatches]
        with self.as_device_error("binding the buffers of a program"):
            return _BrowserProgram(self._gpu.record(to_js(calls)), dispatches)

    def submit(self, programs: Sequence[Program]) -> None:
        """Run the programs in one submission."""
        with self.as_device_error("running on the GPU"):
            self._gpu.submit(*_handles(programs))

    def read(
        self, buffer: Buffer, offset: int = 0, size: int | None = None, *, after: Sequence[Program] = ()
    ) -> _Reading:
        """Read bytes of `buffer` through a staging buffer, in one submission with the programs of `after`."""
        size = buffer.size - offset if size is None else size
        with self.as_device_error(f"reading buffer '{buffer.label}'"):
            promise = self._gpu.read(_within(buffer, offset, size), offset, size, *_handles(after))
        return _Reading(self, promise)

    async def _timestamps(self, programs: Sequence[Program], count: int) -> NDArray[np.float64]:
        with self.as_device_error("timing kernels"):
            data = await self._gpu.profile(count, *_handles(programs))
        ticks = np.frombuffer(data.to_bytes(), np.uint64)
        nanoseconds: NDArray[np.float64] = (ticks - ticks.min()).astype(np.float64)
        return nanoseconds

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end; JSPI suspends Python meanwhile."""
        return block_on(coroutine)

    def close(self) -> None:
        """Destroy the device, and all buffers with it."""
        self._closed = True
        self.free()
        self._gpu.device.destroy()


def _handles(programs: Sequence[Program]) -> list[Any]:
    return [program.handle for program in programs]  # type: ignore[attr-defined]


def _within(buffer: Buffer, offset: int, size: int) -> Any:
    """Return the GPUBuffer. Raises DeviceError unless it has the bytes from `offset` to `offset + size`."""
    handle = buffer.handle
    if min(offset, size) < 0 or offset + size > buffer.size:
        raise DeviceError(
            f"bytes {offset:,} to {offset + size:,} of buffer '{buffer.label}' do not exist; it has {buffer.size:,}"
        )
    return handle


def _described(adapter: Any) -> Adapter:
    info = adapter.info
    return Adapter(
        AdapterInfo(
            vendor=info.vendor,
            architecture=info.architecture,
            device=info.device,
            driver=info.description,
            backend="WebGPU",
            type="CPU" if info.architecture == "swiftshader" or info.isFallbackAdapter else "Unknown",
        ),
        Limits(**{ours: getattr(adapter.limits, name) for ours, name in _LIMITS.items()}),
        frozenset(name for name in _FEATURES if adapter.features.has(name)),
    )


async def open_browser() -> BrowserDevice:
    """Open the most powerful adapter of this browser with all that it offers.

    Raises DeviceError if there is none.
    """
    connect = run_js((files("gemma_wgpu.gpu") / "browser.js").read_text(encoding="utf-8"))
    try:
        gpu = await connect(to_js(_REQUESTED), to_js(_FEATURES))
    except JsException as error:
        raise DeviceError(f"cannot open the browser's GPU: {error.message}") from error
    if gpu is None:
        raise DeviceError(_NO_ADAPTER)
    return BrowserDevice(gpu)


def block_on(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, blocking, which takes JSPI. Raises DeviceError without it."""
    if not can_run_sync():
        coroutine.close()
        raise DeviceError(_CANNOT_BLOCK)
    result, error = run_sync(_outcome(coroutine))
    if error is not None:
        raise error
    return cast(T, result)


async def _outcome(coroutine: Coroutine[Any, Any, T]) -> tuple[T, None] | tuple[None, BaseException]:
    """Return what comes of a coroutine. Nothing in Python awaits this task, so Pyodide would show an exception."""
    try:
        return await coroutine, None
    except BaseException as error:
        return None, error
