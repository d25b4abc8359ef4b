"""Weights to the GPU: the one place where `weights` meets a device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.weights.checkpoint import Source

_ROWS = 64  # parts and transfers are of whole multiples of this, so that their scales begin at a word
_TRANSFER = 16 << 20  # bytes

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """Rows `first_row` to `first_row + rows` of a matrix, in one layout and inside the binding limit."""

    layout: Layout
    first_row: int
    rows: int
    cols: int
    quants: Buffer
    scales: Buffer


@dataclass(frozen=True)
class Matrix:
    """A weight matrix on the GPU, in one part wherever the layouts of its rows and the binding limit allow."""

    rows: int
    cols: int
    parts: tuple[Part, ...]


async def upload(device: Device, tensors: Sequence[Source], label: str, advance: Advance) -> Matrix:
    """The matrix of `tensors` stacked row upon row. `advance` is told the bytes of each transfer.

    Raises DeviceError when the GPU's memory is exhausted, ModelError when the tensors cannot be read.
    """
    parts: list[Part] = []
    rows, cols = 0, tensors[0].shape[1]
    for run in _runs(tensors):
        layout, run_rows = run[0].layout, sum(tensor.shape[0] for tensor in run)
        per_part = _rows_per_part(device, layout, cols)
        for start in range(0, run_rows, per_part):
            count = min(per_part, run_rows - start)
            part = Part(
                layout,
                rows + start,
                count,
                cols,
                device.buffer(4 * layout.quant_words(count, cols), f"{label}.quants"),
                device.buffer(4 * layout.scale_words(count, cols), f"{label}.scales"),
            )
            await _fill(device, part, run, start, advance)
            parts.append(part)
        rows += run_rows
    return Matrix(rows, cols, tuple(parts))


def _runs(tensors: Sequence[Source]) -> Iterator[list[Source]]:
    """Neighbours that can share their arrays: of one layout, and beginning at whole words."""
    for _, group in groupby(tensors, lambda tensor: tensor.layout):
        run: list[Source] = []
        for tensor in group:
            if run and run[-1].shape[0] * (tensor.shape[1] // BLOCK) % 2:
                yield run
                run = []
            run.append(tensor)
        yield run


def _rows_per_part(device: Device, layout: Layout, cols: int) -> int:
    limit = min(device.limits.max_storage_buffer_binding_size, device.limits.max_buffer_size)
    bytes_of_rows = 4 * max(layout.quant_words(_ROWS, cols), layout.scale_words(_ROWS, cols))
    return max(limit // bytes_of_rows, 1) * _ROWS


async def _fill(device: Device, part: Part, run: Sequence[Source], start: int, advance: Advance) -> None:
    """Rows [start, start + part.rows) of the tensors of `run` into the buffers of `part`."""
    layout, cols = part.layout, part.cols
    per_transfer = max(_TRANSFER // (4 * layout.quant_words(_ROWS, cols)), 1) * _ROWS
    tensor_start = 0
    for tensor in run:
        begin, end = max(start, tensor_start), min(start + part.rows, tensor_start + tensor.shape[0])
        for row in range(begin, end, per_transfer):
            last = min(row + per_transfer, end)
            async for first, quants, scales in tensor.words(row - tensor_start, last - tensor_start):
                row_of_part = tensor_start + first - start
                device.put(part.quants, quants, 4 * layout.quant_words(row_of_part, cols))
                device.put(part.scales, scales, 4 * layout.scale_words(row_of_part, cols))
                advance(quants.nbytes + scales.nbytes)
            await device.read(part.quants, 0, 4)  # until it has arrived: transfers under way take up memory twice
        tensor_start += tensor.shape[0]
