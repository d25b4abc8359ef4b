"""Rows of a weight matrix on the host, as the GPU reads them, and the conversions from and to float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.ops.layout import BLOCK, Layout


@dataclass(frozen=True, eq=False)
class Packed:
    """These are rows of a matrix as the GPU reads them. The arrays are flat; they may be read-only views of a file.

    Parts split at even rows join into the whole; an odd row may start in the middle of a word of scales.
    Raises ModelError when an array's length does not fit rows x cols.
    """

    layout: Layout
    rows: int
    cols: int
    quants: NDArray[np.uint32]
    scales: NDArray[np.uint32]

    def __post_init__(self) -> None:
        expected = (
            (self.layout.quant_words(self.rows, self.cols),),
            (self.layout.scale_words(self.rows, self.cols),),
        )
        if (self.quants.shape, self.scales.shape) != expected:
            raise ModelError(
                f"{self.rows} x {self.cols} {self.layout.name} takes {expected[0][0]} words of quants and "
                f"{expected[1][0]} of scales, not {self.quants.shape} and {self.scales.shape}"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes in both arrays."""
        return self.quants.nbytes + self.scales.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights, float32 (rows, cols), each computed in float32 in the order that `Layout` writes."""
        match self.layout:
            case Layout.F32 | Layout.F16 | Layout.BF16:
                weights = widen(self.quants.view(np.uint8), self.layout)
            case Layout.INT8:
                weights = self._block_scales() * self._bytes(BLOCK)
            case Layout.INT4:
                weights = self._block_scales() * (self._nibbles() - 8)
            case Layout.INT4_OFFSET:
                halves = self.scales.view(np.float16).astype(np.float32).reshape(-1, 2, 1)
                weights = halves[:, 0] * self._nibbles() + halves[:, 1]
            case Layout.INT8_SUPER:
                words = self.scales.reshape(-1, 5)
                d = words[:, :1].astype(np.uint16).view(np.float16).astype(np.float32)
                scale = d * words[:, 1:].copy().view(np.int8)
                weights = scale[:, :, None] * self._bytes(16).reshape(-1, 16, 16)
            case Layout.INT4_SUPER:
                words = self.scales.reshape(-1, 5)
                d = words[:, :1].copy().view(np.float16).astype(np.float32)
                pairs = words[:, 1:].copy().view(np.uint8).reshape(-1, 8, 2)
                factors = d[:, None] * pairs  # (super-block, block, [d * sc, dmin * m])
                weights = factors[..., :1] * self._nibbles().reshape(-1, 8, BLOCK) - factors[..., 1:]
        return weights.reshape(self.rows, self.cols)

    def _block_scales(self) -> NDArray[np.float32]:
        blocks = self.rows * self.cols // BLOCK
        return self.scales.view(np.float16)[:blocks, None].astype(np.float32)

    def _nibbles(self) -> NDArray[np.float32]:
        return unpack_nibbles(self.quants).astype(np.float32)

    def _bytes(self, width: int) -> NDArray[np.float32]:
        return self.quants.view(np.int8).astype(np.float32).reshape(-1, width)


def widen(data: NDArray[np.uint8], layout: Layout) -> NDArray[np.float32]:
    """Return the flat float32 values of bytes that hold floats in `layout` F32, F16 or BF16."""
    match layout:
        case Layout.F32:
            return data.view(np.float32).copy()
        case Layout.F16:
            return data.view(np.float16).astype(np.float32)
        case Layout.BF16:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            raise ValueError(f"{layout.name} does not hold plain floats")


def pack_halves(values: NDArray[np.float16]) -> NDArray[np.uint32]:
    """Flatten `values`, two in a word, the even index in the low half, with a zero after an odd last one."""
    flat = values.ravel()
    words = np.zeros((flat.size + 1) // 2, np.uint32)
    words.view(np.float16)[: flat.size] = flat
    return words


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Flatten blocks (..., 32) of numbers in [0, 15] into four words each, in the order of `Layout.INT4`."""
    pairs = values[..., :16] | values[..., 16:] << np.uint8(4)
    return pairs.reshape(-1).view(np.uint32)


def unpack_nibbles(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the blocks (n, 32) that `pack_nibbles` packed."""
    pairs = words.view(np.uint8).reshape(-1, 16)
    return np.concatenate((pairs & 15, pairs >> 4), axis=1)


def padded(data: NDArray[np.uint8], rows: int, row_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of `rows` rows, each of them made `row_bytes` long with zeros."""
    wide = np.zeros((rows, row_bytes), np.uint8)
    wide[:, : data.size // rows] = data.reshape(rows, -1)
    return wide.reshape(-1)
