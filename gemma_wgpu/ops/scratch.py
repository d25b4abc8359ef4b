"""Memory for what a step computes on its way."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.launch import Launch, Value


class Scratch:
    """Buffers that all steps of a model share, since only one of them runs at a time.

    A value has a buffer from the launch that first uses it to the one that uses it last.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[Buffer] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(buffer.size for buffer in self._buffers)

    def close(self) -> None:
        """Free all buffers. Idempotent."""
        for buffer in self._buffers:
            buffer.destroy()
        self._buffers.clear()

    def place(self, launches: Sequence[Launch], kept: Collection[Value] = ()) -> dict[Value, Buffer]:
        """Return a buffer for each value of some launches that run in this order; the `kept` ones last to the end.

        Raises DeviceError if the GPU's memory is exhausted.
        """
        last = {value: index for index, launch in enumerate(launches) for value in launch.values}
        free = list(self._buffers)
        placed: dict[Value, Buffer] = {}
        for index, launch in enumerate(launches):
            for value in launch.values:
                if value not in placed:
                    placed[value] = self._take(value, free)
            for value in launch.values:
                if last[value] == index and value not in kept:
                    free.append(placed[value])
        return placed

    def _take(self, value: Value, free: list[Buffer]) -> Buffer:
        """Return the smallest free buffer that is large enough, or a new one."""
        fitting = [buffer for buffer in free if buffer.size >= value.nbytes]
        if not fitting:
            self._buffers.append(self._device.buffer(value.nbytes, value.label))
            return self._buffers[-1]
        smallest = min(fitting, key=lambda buffer: buffer.size)
        free.remove(smallest)
        return smallest
