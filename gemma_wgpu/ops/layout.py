"""How a weight matrix lies in GPU memory: two arrays of 32-bit words, which any binding can hold.

A matrix has `rows` x `cols` weights, row-major; `cols` is a multiple of 32. Thirty-two neighbours along a row
are a block, eight blocks a super-block. `quants` holds the numbers and `scales` what turns them into weights,
both in order of (row, block). The layouts keep the arithmetic of the formats that they come from (GGUF's
block types), so nothing is rounded on the way.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError

BLOCK = 32
SUPER_BLOCK = 256


class Layout(IntEnum):
    """What the words mean. The values are the shaders' LAYOUT constants.

    - F32: a weight a word. F16, BF16: two a word, the even column in the low half. No scales.
    - INT8: four signed q a word, lowest byte first. Scales: a float16 d per block, two a word (the even one
      in the low half, zero after an odd last). w = d * q.
    - INT8_SUPER (Q6_K): quants as INT8. Scales: five words per super-block: float16 d in the low half of the
      first, then 16 signed bytes sc, each for 16 weights. w = (d * sc) * q.
    - INT4: four words a block; byte i holds column i in its low nibble and column i + 16 in its high one.
      Scales as INT8. w = d * (q - 8).
    - INT4_OFFSET (Q4_1): nibbles as INT4. Scales: a word per block, float16 d low and m high. w = d * q + m.
    - INT4_SUPER (Q4_K): nibbles as INT4. Scales: five words per super-block: float16 d low and dmin high;
      then for each block b the unsigned bytes 2b, sc, and 2b + 1, m. w = (d * sc) * q - (dmin * m).
    """

    F32 = 0
    F16 = 1
    BF16 = 2
    INT8 = 3
    INT8_SUPER = 4
    INT4 = 5
    INT4_OFFSET = 6
    INT4_SUPER = 7

    @property
    def bits(self) -> int:
        """Bits a weight in `quants`."""
        return _BITS[self]

    @property
    def is_integer(self) -> bool:
        """Whether `quants` holds integers, rather than floats."""
        return self.bits <= 8

    @property
    def group(self) -> int:
        """Columns must be a multiple of this: 256 for the layouts with super-blocks, else 32."""
        return SUPER_BLOCK if self in (Layout.INT8_SUPER, Layout.INT4_SUPER) else BLOCK

    def quant_words(self, rows: int, cols: int) -> int:
        """Words in `quants` of a rows x cols matrix. Raises ModelError unless `group` divides cols."""
        return rows * self._groups(cols) * self.group * self.bits // 32

    def scale_words(self, rows: int, cols: int) -> int:
        """Words in `scales` of a rows x cols matrix. Raises ModelError unless `group` divides cols."""
        groups = rows * self._groups(cols)
        match self:
            case Layout.F32 | Layout.F16 | Layout.BF16:
                return 0
            case Layout.INT8 | Layout.INT4:
                return (groups + 1) // 2
            case Layout.INT4_OFFSET:
                return groups
            case Layout.INT8_SUPER | Layout.INT4_SUPER:
                return groups * 5

    def _groups(self, cols: int) -> int:
        if cols % self.group:
            raise ModelError(f"rows of {cols} weights do not divide into the {self.group} that {self.name} needs")
        return cols // self.group


_BITS = {
    Layout.F32: 32,
    Layout.F16: 16,
    Layout.BF16: 16,
    Layout.INT8: 8,
    Layout.INT8_SUPER: 8,
    Layout.INT4: 4,
    Layout.INT4_OFFSET: 4,
    Layout.INT4_SUPER: 4,
}


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of a matrix as the GPU reads them. The arrays are flat; they may be read-only views of a file.

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
        """Bytes in both arrays."""
        return self.quants.nbytes + self.scales.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, float32 (rows, cols), each computed in float32 in the order that `Layout` writes."""
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
    """The flat float32 values of bytes that hold floats in `layout` F32, F16 or BF16."""
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
    """Flatten `values`, two a word, the even index in the low half, a zero after an odd last."""
    flat = values.ravel()
    words = np.zeros((flat.size + 1) // 2, np.uint32)
    words.view(np.float16)[: flat.size] = flat
    return words


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Flatten blocks (..., 32) of numbers in [0, 15] into four words each, in the order of `Layout.INT4`."""
    pairs = values[..., :16] | values[..., 16:] << np.uint8(4)
    return pairs.reshape(-1).view(np.uint32)


def unpack_nibbles(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The blocks (n, 32) that `pack_nibbles` packed."""
    pairs = words.view(np.uint8).reshape(-1, 16)
    return np.concatenate((pairs & 15, pairs >> 4), axis=1)
