"""Bringing weights to the GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.spec import Loader
from gemma_wgpu.ops.encoder import LayerNorm
from gemma_wgpu.ops.launch import Operand
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.ops.linear import HostTable, Linear, Part
from gemma_wgpu.ops.step import Norm
from gemma_wgpu.weights.checkpoint import Tensor, Weights

_ROWS = 64  # parts and transfers begin at multiples of this, so that their scales begin at a word
_TRANSFER = 16 << 20  # bytes

Advance = Callable[[int], None]


class Upload(Loader):
    """Brings the weights of a model to a device. `advance` is told the bytes of each transfer.

    If `empty` is true, the buffers are made but not filled, which shows what memory they take. If `keep_table` is
    true, a table of which only rows are read stays where it is, as `host_table`, and the weights must stay open.
    Every method raises DeviceError if the GPU's memory is exhausted, and ModelError if a tensor cannot be read.
    """

    def __init__(
        self, device: Device, weights: Weights, advance: Advance, *, empty: bool = False, keep_table: bool = False
    ) -> None:
        self._device, self._weights, self._advance, self._empty = device, weights, advance, empty
        self._keep_table = keep_table
        self.host_table: HostTable | None = None
        self._identity = hashlib.sha256(f"{weights.config} {weights.quantization}".encode())

    @property
    def fingerprint(self) -> str:
        """Return a hash of the shape, the quantisation and the norms, which no two trainings make the same."""
        return self._identity.hexdigest()

    async def table(self, name: str) -> Linear | HostTable:
        """Load a table of which only some rows are read, or leave it where it is, by its name in the table."""
        if not self._keep_table:
            return await self.linear(name)
        self.host_table = tensor = self._weights.tensor(name)
        if not self._empty:
            await tensor.stay()
            self._advance(tensor.layout.nbytes(*tensor.shape))
            self._weights.release()
        return tensor

    async def norm(self, name: str, eps: float) -> Norm:
        """Load a norm by its name in the table."""
        return Norm(await self._vector(name), eps)

    async def layer_norm(self, weight: str, bias: str, eps: float) -> LayerNorm:
        """Load a LayerNorm by the names of its weight and its bias in the table."""
        norm = np.stack([await self._vector(weight), await self._vector(bias)])
        return LayerNorm(self._device.upload(norm, weight), norm.shape[1], eps)

    async def vectors(self, *names: str) -> Operand:
        """Load what is no matrix, float32 and one after the other, by their names in the table."""
        return self._device.upload(np.concatenate([(await self._vector(name)).ravel() for name in names]), names[0])

    async def _vector(self, name: str) -> NDArray[np.float32]:
        vector = await self._weights.vector(name)
        self._identity.update(vector.tobytes())
        return vector

    async def linear(self, *names: str, biases: Sequence[str] = ()) -> Linear:
        """Load matrices, stacked row upon row, by their names in the table; each has a bias, or none has one."""
        tensors = [self._weights.tensor(name) for name in names]
        device, label = self._device, names[0].removesuffix(".weight")
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
                if not self._empty:
                    await self._fill(part, run, start)
                parts.append(part)
            rows += run_rows
        self._weights.release()
        bias = None
        if biases:
            bias = device.upload(np.concatenate([await self._vector(name) for name in biases]), f"{label}.bias")
        return Linear(rows, cols, tuple(parts), bias)

    async def _fill(self, part: Part, run: Sequence[Tensor], start: int) -> None:
        """Write rows [start, start + part.rows) of the tensors of `run` into the buffers of `part`."""
        device, layout, cols = self._device, part.layout, part.cols
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
                    self._advance(quants.nbytes + scales.nbytes)
                await device.read(part.quants, 0, 4)  # waits until it has arrived: a transfer takes up memory twice
            tensor_start += tensor.shape[0]


def _runs(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours that can share their arrays, since they have one layout and begin at whole words."""
    for _, group in groupby(tensors, lambda tensor: tensor.layout):
        run: list[Tensor] = []
        for tensor in group:
            if run and run[-1].shape[0] * (tensor.shape[1] // BLOCK) % 2:
                yield run
                run = []
            run.append(tensor)
        yield run


def _rows_per_part(device: Device, layout: Layout, cols: int) -> int:
    """Return the rows that a buffer and a binding of the device can hold."""
    limit = min(device.limits.max_storage_buffer_binding_size, device.limits.max_buffer_size)
    bytes_of_rows = 4 * max(layout.quant_words(_ROWS, cols), layout.scale_words(_ROWS, cols))
    return max(limit // bytes_of_rows, 1) * _ROWS
