"""What test_device.py checks, inside the browser: each function with a device of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import gemma_wgpu
from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu import open_device
from gemma_wgpu.gpu.device import Buffer, Device, Dispatch

ADD = """
override AMOUNT: u32;
@group(0) @binding(0) var<storage, read_write> numbers: array<u32>;
@compute @workgroup_size(1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) { numbers[id.x] += AMOUNT; }
"""
SOURCES = {
    "add": ADD,
    "append": ADD.replace("+= AMOUNT", "= numbers[id.x] * 10 + AMOUNT"),  # a digit
    "slow": ADD.replace("numbers[id.x] += AMOUNT", "for (var i = 0u; i < AMOUNT; i++) { numbers[0] += i; }"),
    "broken": "fn main( {",
    "wrong": ADD.replace("+= AMOUNT", "= 1.5"),
}


@contextmanager
def raises(pattern: str) -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        assert re.search(pattern, str(error)), f"{str(error)!r} is not about {pattern!r}"
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"no error about {pattern!r}")


async def words(device: Device, buffer: Buffer, offset: int = 0, size: int | None = None) -> list[int]:
    return [int(word) for word in (await device.read(buffer, offset, size)).view(np.uint32)]


def adding(device: Device, buffer: Buffer, amount: int, workgroups: int = 1) -> Dispatch:
    return Dispatch(device.pipeline("add", {"AMOUNT": amount}), (buffer,), (workgroups, 1, 1))


def numbers(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


async def software_adapter(device: Device) -> None:
    assert device.info.type == "CPU"
    assert device.info.backend == "WebGPU"
    assert str(device.info) == "swiftshader (WebGPU)"
    assert "subgroups" in device.features
    assert device.limits.max_storage_buffer_binding_size >= 300 << 20
    large = device.buffer(300 << 20, "large")  # more than a device has that was not asked for it
    device.submit([device.record([adding(device, large, 7)])])
    assert await words(device, large, 0, 8) == [7, 0]


async def writes_and_reads_at_offsets(device: Device) -> None:
    buffer = device.upload(np.arange(8, dtype=np.uint32), "row")
    device.write(buffer, numbers(70, 80), offset=12)
    assert await words(device, buffer) == [0, 1, 2, 70, 80, 5, 6, 7]
    assert await words(device, buffer, 16, 8) == [80, 5]
    large = device.upload(np.arange(1 << 20, dtype=np.uint32), "large")
    assert await words(device, large, 1 << 21, 16) == [1 << 19, (1 << 19) + 1, (1 << 19) + 2, (1 << 19) + 3]
    assert np.array_equal((await device.read(large)).view(np.uint32), np.arange(1 << 20))


async def writes_what_is_not_contiguous_or_not_bytes(device: Device) -> None:
    buffer = device.upload(np.arange(8, dtype=np.uint32)[::2], "every other")
    assert await words(device, buffer) == [0, 2, 4, 6]
    buffer = device.upload(np.array([[1.0, 2.0], [-1.0, 0.0]], np.float16), "halves")
    assert await words(device, buffer, 0, 8) == [0x40003C00, 0x0000BC00]
    assert await words(device, device.upload(numbers(), "nothing")) == [0] * 4


async def bytes_past_the_end_are_an_error(device: Device) -> None:
    buffer = device.buffer(16, "short")
    with raises("'short'"):
        device.write(buffer, np.zeros(5, np.uint32))
    with raises("'short'"):
        device.write(buffer, np.zeros(2, np.uint32), offset=12)
    with raises("'short'"):
        device.read(buffer, 0, 20)
    with raises("'short'"):
        device.read(buffer, 20)


async def dispatches_and_programs_run_in_order(device: Device) -> None:
    def append(digit: int, workgroups: int) -> Dispatch:
        return Dispatch(device.pipeline("append", {"AMOUNT": digit}), (buffer,), (workgroups, 1, 1))

    buffer = device.buffer(16, "row")
    one = device.record([append(1, 4), append(2, 2)])
    two = device.record([append(3, 1)])
    device.submit([one, one, two])
    assert await words(device, buffer) == [12123, 1212, 11, 11]


async def reads_and_writes_are_ordered_with_submits(device: Device) -> None:
    buffer = device.upload(numbers(1, 2, 3, 4), "row")
    program = device.record([adding(device, buffer, 10, 4)])
    first = device.read(buffer)
    device.submit([program])
    second = device.read(buffer)
    device.write(buffer, numbers(5, 6, 7, 8))
    device.submit([program])
    third = device.read(buffer)
    seen = [(await reading).view(np.uint32).tolist() for reading in (third, second, first)]
    assert seen == [[15, 16, 17, 18], [11, 12, 13, 14], [1, 2, 3, 4]]


async def a_copy_is_ordered_with_submits_and_writes(device: Device) -> None:
    source, target = device.upload(numbers(1, 2, 3, 4), "source"), device.upload(numbers(9, 9, 9, 9), "target")
    device.submit([device.record([adding(device, source, 10, 4)])])
    device.copy(source, target, 8, source_offset=4, target_offset=8)
    device.write(source, numbers(0, 0, 0, 0))
    device.submit([device.record([adding(device, target, 100)])])
    assert await words(device, target) == [109, 9, 12, 13]
    for offsets in ((4, 0), (0, 4)):
        with raises("'(source|target)'"):
            device.copy(source, target, 16, *offsets)


async def a_read_may_be_awaited_by_many(device: Device) -> None:
    async def get() -> list[int]:
        return [int(word) for word in (await reading).view(np.uint32)]

    reading = device.read(device.upload(numbers(1, 2, 3, 4), "row"))
    cancelled = asyncio.ensure_future(get())
    await asyncio.sleep(0)
    cancelled.cancel()
    first, second = await asyncio.gather(get(), get())
    assert first == second == [1, 2, 3, 4]
    assert cancelled.cancelled()
    assert await get() == [1, 2, 3, 4]


async def a_shader_that_does_not_compile_is_named(device: Device) -> None:
    buffer = device.upload(numbers(1, 2, 3, 4), "row")
    for shader, about in (("broken", "line 1: "), ("wrong", "line 5: .*abstract-float")):
        device.pipeline(shader, {"AMOUNT": 1})
        with raises(f"'{shader}' does not compile: {about}"):
            await words(device, buffer)
    device.pipeline("add", {})
    with raises("'add' does not compile: .*AMOUNT"):
        await words(device, buffer)
    assert await words(device, buffer) == [1, 2, 3, 4]


async def an_invalid_dispatch_is_an_error_of_the_next_read(device: Device) -> None:
    buffer = device.buffer(16, "row")
    device.record([Dispatch(device.pipeline("add", {"AMOUNT": 1}), (), (1, 1, 1))])
    with raises("add"):
        await words(device, buffer)
    over = device.limits.max_compute_workgroups_per_dimension + 1
    device.submit([device.record([adding(device, buffer, 1, over)])])
    with raises("65536"):
        await words(device, buffer)
    assert await words(device, buffer) == [0] * 4


async def a_failure_that_nobody_awaits_does_no_harm(device: Device) -> None:
    buffer = device.buffer(16, "row")
    device.pipeline("broken", {})
    device.read(buffer)
    assert await words(device, buffer) == [0] * 4


async def a_freed_buffer_is_an_error_by_name(device: Device) -> None:
    buffer, other = device.buffer(16, "gone"), device.buffer(16, "other")
    dispatch = adding(device, buffer, 1)
    program = device.record([dispatch])
    assert device.allocated == 32
    buffer.destroy()
    buffer.destroy()
    assert device.allocated == 16
    for use in (
        lambda: device.write(buffer, numbers(1)),
        lambda: device.read(buffer),
        lambda: device.record([dispatch]),
    ):
        with raises("'gone'"):
            use()
    device.submit([program])
    with raises("gone"):
        await words(device, other)


async def a_buffer_over_the_limit_is_refused_by_name(device: Device) -> None:
    limit = device.limits.max_storage_buffer_binding_size
    with raises(f"'key cache' needs {limit + 16:,} bytes.*{limit:,}"):
        device.buffer(limit + 1, "key cache")
    assert device.allocated == 0


async def profiling_runs_the_programs_and_times_each_dispatch(device: Device) -> None:
    buffer = device.buffer(16, "row")
    slow = Dispatch(device.pipeline("slow", {"AMOUNT": 5_000_000}), (device.buffer(16, "scratch"),), (1, 1, 1))
    one = device.record([adding(device, buffer, 1, 4), slow])
    two = device.record([adding(device, buffer, 10)])
    seconds = await device.profile([one, two])
    assert await words(device, buffer) == [11, 1, 1, 1]
    assert seconds.shape == (3,)
    assert seconds[1] > max(seconds[0], seconds[2], 0.001), seconds
    assert seconds[1] < 60, seconds


async def use_after_close_is_an_error(device: Device) -> None:
    buffer = device.buffer(16, "row")
    program = device.record([adding(device, buffer, 1)])
    pending = device.read(buffer)
    device.close()
    device.close()
    assert device.allocated == 0
    for use in (
        lambda: device.buffer(16, "new"),
        lambda: device.pipeline("add", {"AMOUNT": 3}),
        lambda: device.submit([program]),
    ):
        with raises("closed"):
            use()
    with raises("closed"):
        await pending


async def a_lost_device_is_an_error(device: Device) -> None:
    buffer = device.buffer(16, "row")
    program = device.record([adding(device, buffer, 1)])
    device.submit([program])
    pending = device.read(buffer)
    device._gpu.device.destroy()  # type: ignore[attr-defined]  # as a driver that is reset does
    with raises("was lost; load the model again"):
        await pending
    for use in (
        lambda: device.submit([program]),
        lambda: device.write(buffer, numbers(1)),
        lambda: device.read(buffer),
        lambda: device.buffer(16, "new"),
        lambda: device.record([adding(device, buffer, 1)]),
    ):
        with raises("was lost; load the model again"):
            use()
    again = await open_device()
    assert await words(again, again.upload(numbers(1, 2, 3, 4), "row")) == [1, 2, 3, 4]
    again.close()


async def a_device_lost_before_a_read_is_an_error(device: Device) -> None:
    buffer = device.buffer(16, "row")
    device._gpu.device.destroy()  # type: ignore[attr-defined]
    with raises("was lost; load the model again"):
        await device.read(buffer)


async def wait_blocks_where_jspi_is(device: Device) -> None:
    buffer = device.upload(numbers(1, 2, 3, 4), "row")
    assert device.wait(words(device, buffer)) == [1, 2, 3, 4]
    device.pipeline("broken", {})
    with raises("'broken'"):
        device.wait(words(device, buffer))

    async def rows() -> AsyncIterator[list[int]]:
        yield await words(device, buffer, 0, 4)

    async def following() -> list[int]:
        return await anext(iterator)

    iterator = rows()
    assert device.wait(following()) == [1]
    try:
        device.wait(following())
    except StopAsyncIteration:
        return
    raise AssertionError("no StopAsyncIteration")


CHECKS = [
    software_adapter,
    writes_and_reads_at_offsets,
    writes_what_is_not_contiguous_or_not_bytes,
    bytes_past_the_end_are_an_error,
    dispatches_and_programs_run_in_order,
    reads_and_writes_are_ordered_with_submits,
    a_copy_is_ordered_with_submits_and_writes,
    a_read_may_be_awaited_by_many,
    a_shader_that_does_not_compile_is_named,
    an_invalid_dispatch_is_an_error_of_the_next_read,
    a_failure_that_nobody_awaits_does_no_harm,
    a_freed_buffer_is_an_error_by_name,
    a_buffer_over_the_limit_is_refused_by_name,
    profiling_runs_the_programs_and_times_each_dispatch,
    use_after_close_is_an_error,
    a_lost_device_is_an_error,
    a_device_lost_before_a_read_is_an_error,
    wait_blocks_where_jspi_is,
]


async def run(name: str) -> None:
    """One of CHECKS, with the shaders of SOURCES."""
    device = await open_device()
    try:
        with patch("gemma_wgpu.gpu.device.load_shader", lambda name, **_: SOURCES[name]):
            await next(check for check in CHECKS if check.__name__ == name)(device)
    finally:
        device.close()


def cannot_block() -> None:
    """The blocking interface, where Python was entered in a way that nothing can suspend."""
    with raises("async"):
        gemma_wgpu.load("model")


async def no_webgpu() -> None:
    """Where the browser has none, it is said which have."""
    with raises("Chrome.*Safari.*Firefox"):
        await gemma_wgpu.load_async("model")
