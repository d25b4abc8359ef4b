"""Kernel launches as a step writes them down: nothing is compiled yet, and what is computed has no place yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_wgpu.gpu.device import Buffer, Constants, Device, Dispatch, Program


class Value:
    """What a step computes on its way: `rows` vectors of `size` numbers, each of `itemsize` bytes.

    The numbers are `scale` times those that are meant, a power of two that keeps them inside float16.
    """

    def __init__(self, label: str, rows: int, size: int, itemsize: int = 4, scale: float = 1.0) -> None:
        self.label = label
        self.rows = rows
        self.size = size
        self.itemsize = itemsize
        self.nbytes = rows * size * itemsize
        self.scale = scale


Operand = Buffer | Value


@dataclass(frozen=True)
class Launch:
    """A kernel with its constants, the operands that it is bound to in their order, and its grid of workgroups."""

    shader: str
    constants: Constants
    operands: tuple[Operand, ...]
    workgroups: tuple[int, int, int]
    half: bool
    cpu: bool

    @property
    def values(self) -> tuple[Value, ...]:
        """Return the operands that have no buffer of their own."""
        return tuple(dict.fromkeys(operand for operand in self.operands if isinstance(operand, Value)))


def record(device: Device, launches: Sequence[Launch], placed: Mapping[Value, Buffer] | None = None) -> Program:
    """Compile and bind launches, whose values have the buffers of `placed`. Raises DeviceError as `Device` does."""
    buffers = placed or {}
    return device.record(
        [
            Dispatch(
                device.pipeline(launch.shader, launch.constants, half=launch.half, cpu=launch.cpu),
                tuple(buffers[operand] if isinstance(operand, Value) else operand for operand in launch.operands),
                launch.workgroups,
            )
            for launch in launches
        ]
    )
