"""The device interface on wgpu-py, which drives Vulkan, Metal or D3D12."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

import numpy as np
import wgpu
from numpy.typing import NDArray
from wgpu.backends.wgpu_native import ffi, lib
from wgpu.backends.wgpu_native._api import libf

from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu.device import (
    Adapter,
    AdapterInfo,
    Buffer,
    Constants,
    Device,
    Dispatch,
    Limits,
    Program,
)

T = TypeVar("T")

_STORAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
_READBACK = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
# WebGPU's name of a feature: wgpu-native's name of it.
_FEATURES = {"shader-f16": "shader-f16", "subgroups": "subgroup", "timestamp-query": "timestamp-query"}
_BACKENDS = ("Vulkan", "Metal", "D3D12")  # OpenGL lacks much of what the kernels need
_NO_ADAPTER = (
    "no GPU adapter found. Install a Vulkan driver (Debian, Ubuntu: apt-get install mesa-vulkan-drivers), "
    "or update the graphics driver of this machine."
)


@contextmanager
def _as_device_error(doing: str) -> Iterator[None]:
    try:
        yield
    except (wgpu.GPUError, RuntimeError, ValueError, OverflowError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DeviceError(f"{doing}: {' '.join(line.strip() for line in lines)}") from error


class _Interrupts:
    """Makes Ctrl-C wait for `check`, or for the end of a `with` block.

    Python raises it wherever the main thread is. Inside one of wgpu-py's callbacks it would be swallowed, and what
    the callback was to announce would be waited for in vain.
    """

    def __init__(self) -> None:
        self._came = False
        self._ours = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if it came."""
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self._came = True


class _NativeProgram(Program):
    """Keeps the Python objects alive, and the raw handles that the replay loop passes to wgpu-native."""

    def __init__(self, device: NativeDevice, dispatches: Sequence[Dispatch], groups: list[Any]) -> None:
        self.dispatches = tuple(dispatches)
        self._device = device
        self.groups = groups
        self._buffers = {buffer for dispatch in dispatches for buffer in dispatch.bindings}
        self._freed = device.freed
        self.calls = [
            (d.pipeline.handle._internal, group._internal, *d.workgroups)
            for d, group in zip(dispatches, groups, strict=True)
        ]

    def check(self) -> None:
        """Raise DeviceError where a buffer was freed: wgpu-native would end the process."""
        if self._freed != self._device.freed:
            for buffer in self._buffers:
                _ = buffer.handle
            self._freed = self._device.freed


class _Mapped:
    """A readback under way. Any number of threads and coroutines may await it.

    A thread inside of `Device.wait` blocks, a coroutine of an event loop is woken. `submission` is wgpu-native's
    index of the submission that fills the staging buffer.
    """

    def __init__(self, device: NativeDevice, staging: Any, size: int, submission: int) -> None:
        self._device, self._staging, self._size = device, staging, size
        self._submission = ffi.new("WGPUSubmissionIndex *", submission)
        self._data: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        # What wgpu-py would submit besides is for buffers that were written to just now.
        self._promise = staging.map_async("READ_NOSYNC", 0, size)
        # wgpu-py's own await serves one event loop only, and only the one that runs now.
        self._promise._call_soon_threadsafe = self._announce
        if self._promise._thread_event.is_set():  # it came before we could listen
            self._announce()

    def __await__(self) -> Generator[Any, None, NDArray[np.uint8]]:
        with _as_device_error("reading from the GPU"):
            if self._data is None:
                if self._device.blocking:
                    self._block()
                else:
                    yield from self._arrival().__await__()
                self._take()
        assert self._data is not None
        return self._data

    def _announce(self, *_: object) -> None:
        """Wake the coroutines that wait. wgpu-py calls this on its own thread when the read has come."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with suppress(RuntimeError):  # that event loop was closed
                loop.call_soon_threadsafe(_wake, future)

    async def _arrival(self) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            came = self._promise._thread_event.is_set()
            if not came:
                self._waiting.append((loop, future))
        if came:
            await asyncio.sleep(0)  # other tasks have their turn even if the GPU is never waited for
        else:
            await future

    def _block(self) -> None:
        # wgpu-py waits for all that was submitted, also what came after the read.
        self._device.poll(self._submission)
        # Nor does it ever stop waiting once the device is destroyed.
        while not self._promise._thread_event.wait(timeout=0.5):
            self._device.interrupts.check()
            if self._device.is_destroyed:
                raise DeviceError(f"{self._device.info} was lost while it was read from; load the model again")
        self._device.interrupts.check()

    def _take(self) -> None:
        """Copy the bytes out of the staging buffer, once."""
        with self._lock:
            if self._data is None:
                self._promise.sync_wait()
                self._data = np.frombuffer(self._staging.read_mapped(0, self._size), np.uint8)
                self._staging.unmap()
                self._device.recycle(self._staging)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class NativeDevice(Device):
    """A GPU through wgpu-py."""

    def __init__(self, adapter: Any) -> None:
        super().__init__(_described(adapter))
        self.lock = threading.RLock()
        self.interrupts = _Interrupts()
        self._waiting = threading.local()
        with _as_device_error(f"cannot open {self.info}"):
            self._device: Any = adapter.request_device_sync(
                label="gemma_wgpu",
                required_features=[_FEATURES[name] for name in self.features],
                required_limits={
                    name: value for name, value in adapter.limits.items() if name in _REQUESTED and value
                },
            )
        self._staging: list[Any] = []

    @property
    def is_destroyed(self) -> bool:
        """Say whether wgpu-py has let go of the device, so that nothing pending will come."""
        return self._device._poller is None

    @property
    def blocking(self) -> bool:
        """Say whether this thread is inside of `wait`."""
        return getattr(self._waiting, "depth", 0) > 0

    def _create_buffer(self, size: int, label: str) -> Any:
        with _as_device_error(f"no GPU memory for buffer '{label}' of {size:,} bytes"):
            return self._device.create_buffer(size=size, usage=_STORAGE, label=label)

    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        with _as_device_error(f"shader '{label}' does not compile on {self.info}"):
            module = self._device.create_shader_module(label=label, code=source)
            return self._device.create_compute_pipeline(
                label=label,
                layout="auto",
                compute={"module": module, "entry_point": "main", "constants": dict(constants)},
            )

    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        """Copy `data` into `buffer`; wgpu-native keeps a copy of it until the GPU has taken it."""
        if data.size == 0:  # which wgpu-py refuses
            return
        with _as_device_error(f"writing buffer '{buffer.label}'"):
            self._device.queue.write_buffer(buffer.handle, offset, np.ascontiguousarray(data))

    def copy(self, source: Buffer, target: Buffer, size: int, source_offset: int = 0, target_offset: int = 0) -> None:
        """Copy bytes between buffers, in a submission of their own."""
        with _as_device_error(f"copying buffer '{source.label}'"):
            self._run((), source.handle._internal, source_offset, target.handle._internal, target_offset, size)

    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        """Make the bind groups of `dispatches`, and collect the raw handles that a replay passes on."""
        groups = []
        for dispatch in dispatches:
            with _as_device_error(f"binding the buffers of '{dispatch.pipeline.label}'"):
                entries = [
                    {"binding": i, "resource": {"buffer": b.handle, "offset": 0, "size": b.size}}
                    for i, b in enumerate(dispatch.bindings)
                ]
                layout = dispatch.pipeline.handle.get_bind_group_layout(0)
                groups.append(self._device.create_bind_group(layout=layout, entries=entries))
        return _NativeProgram(self, dispatches, groups)

    def submit(self, programs: Sequence[Program]) -> None:
        """Run the programs in one submission."""
        with _as_device_error("running on the GPU"):
            self._run(programs)

    def read(
        self, buffer: Buffer, offset: int = 0, size: int | None = None, *, after: Sequence[Program] = ()
    ) -> _Mapped:
        """Read bytes of `buffer` through a staging buffer, in one submission with the programs of `after`."""
        size = buffer.size - offset if size is None else size
        with _as_device_error(f"reading buffer '{buffer.label}'"):
            source, staging = buffer.handle, self._stage(size)
            submission = self._run(after, source._internal, offset, staging._internal, 0, size)
            return _Mapped(self, staging, size, submission)

    async def _timestamps(self, programs: Sequence[Program], count: int) -> NDArray[np.float64]:
        with _as_device_error("timing kernels"):
            queries = self._device.create_query_set(type="timestamp", count=2 * count)
            # Not one of `buffer`, whose usage does not go with this one everywhere.
            usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
            resolved = self._device.create_buffer(size=16 * count, usage=usage, label="timestamps")
            encoder = self._device.create_command_encoder()
            at = 0
            for program in programs:
                program.check()  # type: ignore[attr-defined]
                for dispatch, group in zip(program.dispatches, program.groups, strict=True):  # type: ignore[attr-defined]
                    compute = encoder.begin_compute_pass(
                        timestamp_writes={
                            "query_set": queries,
                            "beginning_of_pass_write_index": at,
                            "end_of_pass_write_index": at + 1,
                        }
                    )
                    compute.set_pipeline(dispatch.pipeline.handle)
                    compute.set_bind_group(0, group)
                    compute.dispatch_workgroups(*dispatch.workgroups)
                    compute.end()
                    at += 2
            encoder.resolve_query_set(queries, 0, 2 * count, resolved, 0)
            self._device.queue.submit([encoder.finish()])
            # wgpu-native gives what the GPU counts, not nanoseconds.
            period = lib.wgpuQueueGetTimestampPeriod(self._device.queue._internal)
        ticks = (await self.read(Buffer(self, resolved, 16 * count, "timestamps"))).view(np.uint64)
        resolved.destroy()
        queries.destroy()
        nanoseconds: NDArray[np.float64] = (ticks - ticks.min()).astype(np.float64) * period
        return nanoseconds

    def _run(self, programs: Sequence[Program], *copy: Any) -> int:
        """Submit programs, and a copy after them if there is one; return wgpu-native's index of the submission.

        This makes raw wgpu-native calls: wgpu-py's own, with their checks, cost 6 to 15 microseconds a dispatch. An
        error in one of them comes out of the two that are checked, those of libf.
        """
        for program in programs:
            program.check()  # type: ignore[attr-defined]
        null = ffi.NULL
        encoder = lib.wgpuDeviceCreateCommandEncoder(self._device._internal, null)
        try:
            if programs:
                _encode(encoder, programs)
            if copy:
                lib.wgpuCommandEncoderCopyBufferToBuffer(encoder, *copy)
            commands = libf.wgpuCommandEncoderFinish(encoder, null)
        finally:
            lib.wgpuCommandEncoderRelease(encoder)
        try:
            batch = ffi.new("WGPUCommandBuffer[]", [commands])
            return int(libf.wgpuQueueSubmitForIndex(self._device.queue._internal, 1, batch))
        finally:
            lib.wgpuCommandBufferRelease(commands)

    def poll(self, submission: Any) -> None:
        """Wait until the GPU is done with a submission."""
        if not self.is_destroyed:
            lib.wgpuDevicePoll(self._device._internal, True, submission)

    def _stage(self, size: int) -> Any:
        for i, staging in enumerate(self._staging):
            if staging.size >= size:
                return self._staging.pop(i)
        return self._device.create_buffer(size=size, usage=_READBACK, label="readback")

    def recycle(self, staging: Any) -> None:
        """Keep a small staging buffer for the next read: decoding reads a few bytes every step."""
        if staging.size <= 4096:
            self._staging.append(staging)
        else:
            staging.destroy()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end while this thread holds `lock`. Each await of a read blocks the thread."""
        with self.lock:  # one thread at a time
            self._waiting.depth = getattr(self._waiting, "depth", 0) + 1
            try:
                with self.interrupts:
                    coroutine.send(None)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                self._waiting.depth -= 1
        coroutine.close()
        raise DeviceError("this coroutine awaits something other than the GPU; run it in an event loop")

    def close(self) -> None:
        """Wait for what the GPU is doing, then free all that the device holds."""
        if not self.is_destroyed:
            with _Interrupts():
                self._device._poll_wait()  # so that no read is left waiting for what will never come
        self.free()
        self._staging.clear()
        if not self.is_destroyed:
            self._device.destroy()
        self.allocated = 0


def _encode(encoder: Any, programs: Sequence[Program]) -> None:
    set_pipeline = lib.wgpuComputePassEncoderSetPipeline
    set_bind_group = lib.wgpuComputePassEncoderSetBindGroup
    dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
    null = ffi.NULL
    compute = lib.wgpuCommandEncoderBeginComputePass(encoder, null)
    for program in programs:
        for pipeline, group, x, y, z in program.calls:  # type: ignore[attr-defined]
            set_pipeline(compute, pipeline)
            set_bind_group(compute, 0, group, 0, null)
            dispatch(compute, x, y, z)
    lib.wgpuComputePassEncoderEnd(compute)
    lib.wgpuComputePassEncoderRelease(compute)


_REQUESTED = {
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-storage-buffers-per-shader-stage",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
    "max-compute-workgroup-size-z",
    "max-compute-workgroups-per-dimension",
}


def _described(adapter: Any) -> Adapter:
    info, limits = adapter.info, adapter.limits
    return Adapter(
        AdapterInfo(
            vendor=info["vendor"],
            architecture=info["architecture"],
            device=info["device"],
            driver=info["description"],
            backend=info["backend_type"],
            type=info["adapter_type"],
        ),
        Limits(**{name: limits[name.replace("_", "-")] for name in Limits.__dataclass_fields__}),
        frozenset(name for name, native in _FEATURES.items() if native in adapter.features),
    )


def native_adapters() -> list[Adapter]:
    """Return the adapters of this machine; `open_native` takes the first one.

    Raises DeviceError if there is none.
    """
    with _Interrupts():
        first = _described(_request())
        others = [_described(adapter) for adapter in wgpu.gpu.enumerate_adapters_sync()]
    usable = [other for other in others if other.info != first.info and other.info.backend in _BACKENDS]
    return [first, *usable]


def open_native() -> NativeDevice:
    """Open the most powerful adapter of this machine with all that it offers.

    Raises DeviceError if there is none.
    """
    with _Interrupts():
        return NativeDevice(_request())


def _request() -> Any:
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except RuntimeError as error:
        raise DeviceError(_NO_ADAPTER) from error
    if adapter is None or adapter.info["backend_type"] not in _BACKENDS:
        raise DeviceError(_NO_ADAPTER)
    return adapter
