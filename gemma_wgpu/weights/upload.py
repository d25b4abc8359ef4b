"""Bringing weights to the GPU."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.gpu.device import Data, Device
from gemma_wgpu.models.spec import Loader
from gemma_wgpu.ops.encoder import LayerNorm
from gemma_wgpu.ops.launch import Operand
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.ops.linear import HostTable, Linear, Part
from gemma_wgpu.ops.step import Norm
from gemma_wgpu.weights.checkpoint import LocalTensor, Tensor, Weights
from gemma_wgpu.weights.encodings import DENSE, Encoding
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.staging import Staging

_ROWS = 64  # parts and transfers begin at multiples of this, so that their scales begin at a word
_TRANSFER = 16 << 20  # bytes

Advance = Callable[[int], None]


class Upload(Loader):
    """Brings the weights of a model to a device. `advance` is told the bytes of each transfer.

    If `empty` is true, the buffers are made but not filled, which shows what memory they take. If `keep_table` is
    true, a table of which only rows are read stays where it is, as `host_table`, and the weights must stay open.

    What files store becomes the words of a layout on the GPU. If `repack` is false, the host makes them of what is in
    Python's memory: they are the same to the bit, and it is no faster even with a CPU adapter. `rounded` has the
    layouts, INT8 or INT4, to which the GPU rounds matrices of plain floats, by their names in the table.

    Every method raises DeviceError if the GPU's memory is exhausted, and ModelError if a tensor cannot be read.
    """

    def __init__(
        self,
        device: Device,
        weights: Weights,
        advance: Advance,
        *,
        empty: bool = False,
        keep_table: bool = False,
        repack: bool = True,
        rounded: Mapping[str, Layout] | None = None,
    ) -> None:
        self._device, self._weights, self._advance, self._empty = device, weights, advance, empty
        self._keep_table = keep_table
        self._repack, self._rounded = repack, rounded or {}
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

    async def derived(self, make: Callable[..., NDArray[np.float32]], *names: str) -> Operand:
        """Load what `make` makes of tensors, by their names in the table: it is called once, with each as float32."""
        values = [await self._values(name) for name in names]
        self._weights.release()
        return self._device.upload(np.ascontiguousarray(make(*values), np.float32), names[0])

    async def depthwise(self, name: str) -> Operand:
        """Load a convolution of each channel by itself, by its name: float32 (height * width, channels)."""
        weight = await self._vector(name)
        return self._device.upload(np.ascontiguousarray(weight.reshape(len(weight), -1).T), name)

    async def _values(self, name: str) -> NDArray[np.float32]:
        """Return a tensor on the host: in its own shape, or (rows, whole blocks of columns) if it is a matrix."""
        if not self._weights.table[name].kind.is_matrix:
            return await self._vector(name)
        tensor = self._weights.tensor(name)
        rows, cols = tensor.shape
        if self._empty:
            return np.zeros((rows, cols), np.float32)
        runs = [(_host(quants), _host(scales)) async for _, quants, scales in tensor.words(0, rows)]
        self._advance(tensor.layout.nbytes(rows, cols))
        return Packed(tensor.layout, rows, cols, *map(np.concatenate, zip(*runs, strict=True))).dequantize()

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
        staging = Staging(device, max(self._staged_bytes(tensor) for tensor in tensors))
        try:
            for run in _runs(tensors, self._layout):
                layout, run_rows = self._layout(run[0]), sum(tensor.shape[0] for tensor in run)
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
                        await self._fill(part, run, start, staging)
                    parts.append(part)
                rows += run_rows
        finally:
            staging.close()
        self._weights.release()
        bias = None
        if biases:
            bias = device.upload(np.concatenate([await self._vector(name) for name in biases]), f"{label}.bias")
        return Linear(rows, cols, tuple(parts), bias)

    async def _fill(self, part: Part, run: Sequence[Tensor], start: int, staging: Staging) -> None:
        """Write rows [start, start + part.rows) of the tensors of `run` into the buffers of `part`."""
        tensor_start = 0
        for tensor in run:
            begin, end = max(start, tensor_start), min(start + part.rows, tensor_start + tensor.shape[0])
            source = self._source(tensor)
            per_transfer = _rows_per_transfer(source.nbytes(part.cols) if source else _quant_bytes(tensor))
            for row in range(begin, end, per_transfer):
                rows = row - tensor_start, min(row + per_transfer, end) - tensor_start
                # A transfer takes up memory twice, so each is waited for.
                if source:
                    async for first, data in _stored(tensor, *rows):
                        count = data.nbytes // source.nbytes(part.cols)
                        staging.fill(part, tensor_start + first - start, count, data, source)
                        self._advance(part.layout.nbytes(count, part.cols))
                    if not await staging.arrive(part):
                        raise ModelError(
                            f"{self._weights.place}: tensor {tensor.name!r} has weights that are not finite, or too "
                            "large for float16"
                        )
                else:
                    async for first, quants, scales in tensor.words(*rows):
                        self._put(part, tensor_start + first - start, quants, scales)
                    await self._device.read(part.quants, 0, 4)
            tensor_start += tensor.shape[0]

    def _put(self, part: Part, row: int, quants: Data, scales: Data) -> None:
        """Write words of a part from row `row` on."""
        self._device.put(part.quants, quants, 4 * part.layout.quant_words(row, part.cols))
        self._device.put(part.scales, scales, 4 * part.layout.scale_words(row, part.cols))
        self._advance(quants.nbytes + scales.nbytes)

    def _layout(self, tensor: Tensor) -> Layout:
        """Return the layout that a tensor gets on the GPU. Raises ModelError if it cannot be rounded to that."""
        layout = self._rounded.get(tensor.name, tensor.layout)
        if layout != tensor.layout and tensor.layout not in DENSE:
            raise ModelError(
                f"{self._weights.place}: tensor {tensor.name!r} is {tensor.layout.name} and cannot be rounded to "
                f"{layout.name}; load the model as it is, or one of plain floats"
            )
        return layout

    def _source(self, tensor: Tensor) -> Encoding | None:
        """Return how a tensor is stored if the GPU makes its words of that; None if they are there to be copied."""
        if self._layout(tensor) != tensor.layout:
            return DENSE[tensor.layout]
        if isinstance(tensor, LocalTensor) and (not self._repack or tensor.layout in DENSE):
            return None
        return tensor.encoding

    def _staged_bytes(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor that are on the way at once."""
        source = self._source(tensor)
        if source is None:
            return 0
        row_bytes = source.nbytes(tensor.shape[1])
        return min(_rows_per_transfer(row_bytes), tensor.shape[0]) * row_bytes


async def _stored(tensor: Tensor, start: int, stop: int) -> AsyncIterator[tuple[int, Data]]:
    """Yield rows as `Tensor.raw` does, and plain floats also if they have only words, since these are the same."""
    if tensor.encoding is not None:
        async for first, data in tensor.raw(start, stop):
            yield first, data
    else:
        async for first, quants, _ in tensor.words(start, stop):
            yield first, quants


def _host(data: Data) -> NDArray[np.uint32]:
    return data.view(np.uint32) if isinstance(data, np.ndarray) else np.frombuffer(data.to_bytes(), np.uint32)


def _runs(tensors: Sequence[Tensor], layout: Callable[[Tensor], Layout]) -> Iterator[list[Tensor]]:
    """Yield neighbours that can share their arrays, since they have one layout and begin at whole words."""
    for _, group in groupby(tensors, layout):
        run: list[Tensor] = []
        for tensor in group:
            if run and run[-1].shape[0] * (tensor.shape[1] // BLOCK) % 2:
                yield run
                run = []
            run.append(tensor)
        yield run


def _quant_bytes(tensor: Tensor) -> int:
    """Return the bytes of a row's `quants`."""
    return 4 * tensor.layout.quant_words(1, tensor.shape[1])


def _rows_per_transfer(row_bytes: int) -> int:
    return max(_TRANSFER // (_ROWS * row_bytes), 1) * _ROWS


def _rows_per_part(device: Device, layout: Layout, cols: int) -> int:
    """Return the rows that a buffer and a binding of the device can hold."""
    limit = min(device.limits.max_storage_buffer_binding_size, device.limits.max_buffer_size)
    bytes_of_rows = 4 * max(layout.quant_words(_ROWS, cols), layout.scale_words(_ROWS, cols))
    return max(limit // bytes_of_rows, 1) * _ROWS
