"""Memory for what a step computes on its way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
        spans: dict[Value, tuple[int, int]] = {}  # the launches that use a value first and last
        for index, launch in enumerate(launches):
            for value in launch.values:
                spans[value] = spans.get(value, (index, 0))[0], len(launches) if value in kept else index
        placed: dict[Value, Buffer] = {}
        taken: dict[Buffer, list[tuple[int, int]]] = {}
        # Small values find room in the buffers of large ones, so the large ones come first. Which buffer a value gets
        # depends on the others' spans alone, so that smaller chunks fit where the largest one did.
        for value in sorted(spans, key=lambda value: -value.nbytes):
            buffer = self._free(value.nbytes, spans[value], taken)
            if buffer is None:
                buffer = self._device.buffer(value.nbytes, value.label)
                self._buffers.append(buffer)
            placed[value] = buffer
            taken.setdefault(buffer, []).append(spans[value])
        return placed

    def _free(
        self, nbytes: int, span: tuple[int, int], taken: Mapping[Buffer, Sequence[tuple[int, int]]]
    ) -> Buffer | None:
        """Return the first buffer that is large enough, and free for a span of launches."""
        for buffer in self._buffers:
            spans = taken.get(buffer, ())
            if buffer.size >= nbytes and all(last < span[0] or span[1] < first for first, last in spans):
                return buffer
        return None
