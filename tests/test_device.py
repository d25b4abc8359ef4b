import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu import device as seam
from gemma_wgpu.gpu.device import Buffer, Device, Dispatch
from gemma_wgpu.gpu.native import NativeDevice, native_adapters, open_native

ADD = """
override AMOUNT: u32;
@group(0) @binding(0) var<storage, read_write> numbers: array<u32>;
@compute @workgroup_size(1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) { numbers[id.x] += AMOUNT; }
"""
SLOW = ADD.replace("numbers[id.x] += AMOUNT", "for (var i = 0u; i < AMOUNT; i++) { numbers[0] += i; }")
SOURCES = {"add": ADD, "slow": SLOW, "broken": "fn main( {", "wrong": ADD.replace("+= AMOUNT", "= 1.5")}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeDevice]:
    monkeypatch.setattr(seam, "load_shader", lambda name, **_: SOURCES[name])
    device = open_native()
    yield device
    device.close()


def words(device: Device, buffer: Buffer, offset: int = 0, size: int | None = None) -> list[int]:
    async def read() -> NDArray[np.uint8]:
        return await device.read(buffer, offset, size)

    return [int(word) for word in device.wait(read()).view(np.uint32)]


def adding(device: Device, buffer: Buffer, amount: int, workgroups: int = 1) -> Dispatch:
    return Dispatch(device.pipeline("add", {"AMOUNT": amount}), (buffer,), (workgroups, 1, 1))


def numbers(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


def test_adapters_begin_with_the_one_that_is_opened(device: NativeDevice) -> None:
    assert native_adapters()[0].info == device.info
    assert device.info.device and str(device.info)


def test_buffers_are_zeroed_and_rounded_up(device: NativeDevice) -> None:
    buffer = device.buffer(17, "small")
    assert buffer.size == 32
    assert buffer.label == "small"
    assert words(device, buffer) == [0] * 8


def test_an_empty_array_can_be_uploaded(device: NativeDevice) -> None:
    assert words(device, device.upload(numbers(), "nothing")) == [0] * 4


def test_writes_and_reads_at_offsets(device: NativeDevice) -> None:
    buffer = device.upload(np.arange(8, dtype=np.uint32), "row")
    device.write(buffer, numbers(70, 80), offset=12)
    assert words(device, buffer) == [0, 1, 2, 70, 80, 5, 6, 7]
    assert words(device, buffer, 8) == [2, 70, 80, 5, 6, 7]
    assert words(device, buffer, 16, 8) == [80, 5]


def test_writes_what_is_not_contiguous_or_not_bytes(device: NativeDevice) -> None:
    buffer = device.upload(np.arange(8, dtype=np.uint32)[::2], "every other")
    assert words(device, buffer) == [0, 2, 4, 6]
    buffer = device.upload(np.array([[1.0, 2.0], [-1.0, 0.0]], np.float16), "halves")
    assert words(device, buffer, 0, 8) == [0x40003C00, 0x0000BC00]


def test_a_write_past_the_end_is_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "short")
    with pytest.raises(DeviceError, match="short"):
        device.write(buffer, np.zeros(5, np.uint32))
    with pytest.raises(DeviceError, match="short"):
        device.write(buffer, np.zeros(2, np.uint32), offset=12)
    assert words(device, buffer) == [0] * 4


def test_a_read_past_the_end_is_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "short")
    with pytest.raises(DeviceError, match="short"):
        words(device, buffer, 0, 20)
    with pytest.raises(DeviceError, match="short"):
        words(device, buffer, 20)


def test_a_buffer_over_the_limit_is_refused_by_name(device: NativeDevice) -> None:
    limit = device.limits.max_storage_buffer_binding_size
    with pytest.raises(DeviceError, match=f"'key cache' needs {limit + 16:,} bytes.*{limit:,}"):
        device.buffer(limit + 1, "key cache")
    assert device.allocated == 0


def test_dispatches_and_programs_run_in_order(device: NativeDevice) -> None:
    buffer = device.upload(numbers(1, 1, 1, 1), "row")
    one = device.record([adding(device, buffer, 1, 4), adding(device, buffer, 10, 2)])
    two = device.record([adding(device, buffer, 100)])
    device.submit([one, two, one])
    assert words(device, buffer) == [123, 23, 3, 3]
    assert [d.workgroups for d in one.dispatches] == [(4, 1, 1), (2, 1, 1)]


def test_reads_and_writes_are_ordered_with_submits(device: NativeDevice) -> None:
    buffer = device.upload(numbers(1), "row")
    program = device.record([adding(device, buffer, 1)])

    async def interleave() -> list[int]:
        reads = [device.read(buffer, 0, 4)]
        device.submit([program])
        reads.append(device.read(buffer, 0, 4))
        device.write(buffer, numbers(50))
        device.submit([program])
        reads.append(device.read(buffer, 0, 4))
        device.write(buffer, numbers(0))
        return [int((await read).view(np.uint32)[0]) for read in reads]

    assert device.wait(interleave()) == [1, 2, 51]


def test_reads_under_an_event_loop_let_other_tasks_run(device: NativeDevice) -> None:
    buffer = device.upload(np.arange(1 << 16, dtype=np.uint32), "large")
    program = device.record([adding(device, buffer, 1, 1 << 15)])

    async def read_both() -> tuple[NDArray[np.uint8], NDArray[np.uint8], None]:
        before = device.read(buffer)
        device.submit([program])
        return await asyncio.gather(arrival(before), arrival(device.read(buffer)), asyncio.sleep(0))

    async def arrival(reading: Awaitable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return await reading

    before, after, _ = asyncio.run(read_both())
    expected = np.arange(1 << 16, dtype=np.uint32)
    assert np.array_equal(before.view(np.uint32), expected)
    expected[: 1 << 15] += 1
    assert np.array_equal(after.view(np.uint32), expected)


def test_what_was_read_stays_when_the_staging_memory_is_used_again(device: NativeDevice) -> None:
    buffer = device.upload(numbers(1, 2, 3, 4), "row")

    async def twice() -> list[list[int]]:
        first = await device.read(buffer)
        device.write(buffer, numbers(5, 6, 7, 8))
        second = await device.read(buffer)
        return [first.view(np.uint32).tolist(), second.view(np.uint32).tolist()]

    assert device.wait(twice()) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_copy_is_ordered_with_submits_and_writes(device: NativeDevice) -> None:
    source, target = device.upload(numbers(1, 2, 3, 4), "source"), device.upload(numbers(9, 9, 9, 9), "target")
    program = device.record([adding(device, source, 10, 4)])
    device.submit([program])
    device.copy(source, target, 8, source_offset=4, target_offset=8)
    device.write(source, numbers(0, 0, 0, 0))
    device.submit([device.record([adding(device, target, 100)])])
    assert words(device, target) == [109, 9, 12, 13]


def test_a_copy_past_the_end_is_an_error(device: NativeDevice) -> None:
    source, target = device.buffer(32, "source"), device.upload(numbers(1, 2, 3, 4), "target")
    for offsets in ((0, 4), (28, 0)):
        with pytest.raises(DeviceError, match="copying buffer 'source'"):
            device.copy(source, target, 16, *offsets)
    target.destroy()
    with pytest.raises(DeviceError, match="'target' was freed"):
        device.copy(source, target, 16)


def test_a_read_may_be_awaited_by_many(device: NativeDevice) -> None:
    """They are two coroutines of one event loop, this thread, and another thread with an event loop of its own."""

    async def get(reading: Awaitable[NDArray[np.uint8]]) -> list[int]:
        return [int(word) for word in (await reading).view(np.uint32)]

    async def both(reading: Awaitable[NDArray[np.uint8]]) -> list[int]:
        cancelled = asyncio.ensure_future(get(reading))
        await asyncio.sleep(0)
        cancelled.cancel()
        first, second = await asyncio.gather(get(reading), get(reading))
        return first + second

    buffer = device.upload(numbers(1, 2, 3, 4), "row")
    slow = device.record(
        [Dispatch(device.pipeline("slow", {"AMOUNT": 1_000_000}), (device.buffer(16, "n"),), (1, 1, 1))]
    )
    device.submit([slow])
    reading = device.read(buffer)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(lambda: asyncio.run(both(reading)))
        blocking = threads.submit(lambda: device.wait(get(reading)))
        assert asyncio.run(both(reading)) == [1, 2, 3, 4, 1, 2, 3, 4]
        assert other.result(timeout=60) == [1, 2, 3, 4, 1, 2, 3, 4]
        assert blocking.result(timeout=60) == [1, 2, 3, 4]


def test_wait_returns_what_the_coroutine_does(device: NativeDevice) -> None:
    async def value() -> str:
        return "done"

    assert device.wait(value()) == "done"


def test_wait_passes_on_what_the_coroutine_raises(device: NativeDevice) -> None:
    async def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        device.wait(fail())


def test_wait_on_anything_but_the_gpu_is_an_error(device: NativeDevice) -> None:
    async def sleep() -> None:
        await asyncio.sleep(0)

    with pytest.raises(DeviceError, match="event loop"):
        device.wait(sleep())
    assert words(device, device.upload(numbers(7, 0, 0, 0), "row")) == [7, 0, 0, 0]


@pytest.mark.parametrize("shader", ["broken", "wrong"])
def test_a_shader_that_does_not_compile_is_named(device: NativeDevice, shader: str) -> None:
    with pytest.raises(DeviceError, match=f"'{shader}'"):
        device.pipeline(shader, {"AMOUNT": 1})


def test_a_missing_constant_is_an_error(device: NativeDevice) -> None:
    with pytest.raises(DeviceError, match="'add'"):
        device.pipeline("add", {})


def test_a_pipeline_is_compiled_once_for_each_request(device: NativeDevice) -> None:
    first = device.pipeline("add", {"AMOUNT": 1})
    assert device.pipeline("add", {"AMOUNT": 1}) is first
    assert device.pipeline("add", {"AMOUNT": 2}) is not first
    assert device.pipeline("add", {"AMOUNT": 1}, half=True) is not first


def test_too_few_buffers_are_an_error(device: NativeDevice) -> None:
    with pytest.raises(DeviceError, match="'add'"):
        device.record([Dispatch(device.pipeline("add", {"AMOUNT": 1}), (), (1, 1, 1))])


def test_too_many_workgroups_are_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "row")
    over = device.limits.max_compute_workgroups_per_dimension + 1
    with pytest.raises(DeviceError):
        device.submit([device.record([adding(device, buffer, 1, over)])])
    assert words(device, buffer) == [0] * 4


def test_allocated_counts_buffers_that_live(device: NativeDevice) -> None:
    first, second = device.buffer(100, "first"), device.upload(numbers(1), "second")
    assert device.allocated == 112 + 16
    first.destroy()
    first.destroy()
    assert device.allocated == 16
    second.destroy()
    assert device.allocated == 0


def test_a_freed_buffer_is_an_error_by_name(device: NativeDevice) -> None:
    buffer = device.buffer(16, "gone")
    dispatch = adding(device, buffer, 1)
    program = device.record([dispatch])
    buffer.destroy()
    for use in (
        lambda: device.write(buffer, numbers(1)),
        lambda: device.read(buffer),
        lambda: device.record([dispatch]),
    ):
        with pytest.raises(DeviceError, match="'gone'"):
            use()
    with pytest.raises(DeviceError, match="gone"):
        device.submit([program])


def test_profiling_runs_the_programs_and_times_each_dispatch(device: NativeDevice) -> None:
    buffer = device.upload(numbers(1, 1, 1, 1), "row")
    slow = Dispatch(device.pipeline("slow", {"AMOUNT": 20_000_000}), (device.buffer(16, "scratch"),), (1, 1, 1))
    one = device.record([adding(device, buffer, 1, 4), slow, adding(device, buffer, 10, 2)])
    two = device.record([adding(device, buffer, 100)])
    before = device.allocated
    started = time.perf_counter()
    seconds = device.wait(device.profile([one, two]))
    elapsed = time.perf_counter() - started
    assert words(device, buffer) == [112, 12, 2, 2]
    assert device.allocated == before
    assert seconds.shape == (4,)
    assert (seconds >= 0).all()
    assert int(seconds.argmax()) == 1
    assert 0 < seconds.sum() < elapsed


def test_profiling_what_was_freed_or_is_too_much_is_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "gone")
    program = device.record([adding(device, buffer, 1)] * 1025)
    with pytest.raises(DeviceError, match="2,050 dispatches.* 2,048 can"):
        device.wait(device.profile([program, program]))
    with pytest.raises(DeviceError, match="0 dispatches"):
        device.wait(device.profile([]))
    buffer.destroy()
    with pytest.raises(DeviceError, match="'gone'"):
        device.wait(device.profile([program]))
    device.features -= {"timestamp-query"}
    with pytest.raises(DeviceError, match="no timestamp-query"):
        device.wait(device.profile([program]))


def test_close_twice_and_destroy_after_close() -> None:
    device = open_native()
    buffer = device.buffer(16, "row")
    device.close()
    assert device.allocated == 0
    device.close()
    buffer.destroy()
    assert device.allocated == 0


def test_use_after_close_is_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "row")
    program = device.record([adding(device, buffer, 1)])
    device.close()
    for use in (
        lambda: device.buffer(16, "new"),
        lambda: device.write(buffer, numbers(1)),
        lambda: words(device, buffer),
        lambda: device.pipeline("add", {"AMOUNT": 3}),
        lambda: device.submit([program]),
    ):
        with pytest.raises(DeviceError):
            use()


def test_a_lost_device_is_an_error(device: NativeDevice) -> None:
    buffer = device.buffer(16, "row")
    program = device.record([adding(device, buffer, 1)])
    device._device.destroy()  # as a driver that is reset does
    for use in (
        lambda: device.submit([program]),
        lambda: words(device, buffer),
        lambda: device.buffer(16, "new"),
    ):
        with pytest.raises(DeviceError):
            use()


def test_a_device_lost_during_a_read_is_an_error(device: NativeDevice) -> None:
    async def lose() -> None:
        read = device.read(device.buffer(16, "row"))
        device._device.destroy()
        await read

    with pytest.raises(DeviceError):
        device.wait(lose())


def test_closing_ends_a_read_that_is_awaited(device: NativeDevice) -> None:
    async def close() -> None:
        read = device.read(device.buffer(16, "row"))
        device.close()
        async with asyncio.timeout(30):
            await read

    with contextlib.suppress(DeviceError):  # the read may have been quicker
        asyncio.run(close())
