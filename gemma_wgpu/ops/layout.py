"""The layouts of a weight matrix in GPU memory: two arrays of 32-bit words, which any binding can hold.

A matrix has `rows` x `cols` weights, row-major; `cols` is a multiple of 32. Thirty-two neighbours along a row
are a block, eight blocks are a super-block. `quants` holds the numbers and `scales` holds what turns them into
weights, both in order of (row, block). The layouts keep the arithmetic of the formats that they come from (GGUF's
block types), so nothing is rounded on the way.
"""

from enum import IntEnum

from gemma_wgpu.errors import ModelError

BLOCK = 32
SUPER_BLOCK = 256


class Layout(IntEnum):
    """This says what the words mean. The values are the shaders' LAYOUT constants.

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
        """Return the bits that a weight has in `quants`."""
        return _BITS[self]

    @property
    def is_integer(self) -> bool:
        """Say whether `quants` holds integers, rather than floats."""
        return self.bits <= 8

    @property
    def group(self) -> int:
        """Return what columns must be a multiple of: 256 for the layouts with super-blocks, else 32."""
        return SUPER_BLOCK if self in (Layout.INT8_SUPER, Layout.INT4_SUPER) else BLOCK

    def quant_words(self, rows: int, cols: int) -> int:
        """Return the words in `quants` of a rows x cols matrix. Raises ModelError unless `group` divides cols."""
        return rows * self._groups(cols) * self.group * self.bits // 32

    def scale_words(self, rows: int, cols: int) -> int:
        """Return the words in `scales` of a rows x cols matrix. Raises ModelError unless `group` divides cols."""
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

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of a rows x cols matrix. Raises ModelError unless `group` divides cols."""
        return 4 * (self.quant_words(rows, cols) + self.scale_words(rows, cols))

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
