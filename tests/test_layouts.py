import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.packed import Packed, pack_halves, pack_nibbles, unpack_nibbles, widen
from tests.checkpoints import same_bits

WIDTHS = {layout: (256, 768) if layout.group == 256 else (32, 96, 640) for layout in Layout}


def random_packed(rng: np.random.Generator, layout: Layout, rows: int, cols: int) -> Packed:
    """Return words of any value, except that every float is finite and every 6-bit integer is one."""
    quants = rng.integers(0, 1 << 32, layout.quant_words(rows, cols), np.uint32)
    scales = rng.integers(0, 1 << 32, layout.scale_words(rows, cols), np.uint32)
    finite = np.uint32(0xBFFFBFFF)
    match layout:
        case Layout.F32:
            quants &= np.uint32(0xBFFFFFFF)
        case Layout.F16 | Layout.BF16:
            quants &= finite
        case Layout.INT8 | Layout.INT4 | Layout.INT4_OFFSET:
            scales &= finite
        case Layout.INT8_SUPER | Layout.INT4_SUPER:
            scales[::5] &= finite
            if layout == Layout.INT4_SUPER:
                scales.reshape(-1, 5)[:, 1:] &= np.uint32(0x3F3F3F3F)
    return Packed(layout, rows, cols, quants, scales)


def weight(packed: Packed, row: int, col: int) -> np.float32:
    """Return one weight, found byte by byte as `Layout` describes it, in numpy's float32 arithmetic."""
    quants, scales = packed.quants.tobytes(), packed.scales.tobytes()
    at = row * packed.cols + col
    block, group = at // 32, at // 256

    def half(offset: int) -> np.float32:
        return np.float32(struct.unpack_from("<e", scales, offset)[0])

    def signed() -> np.float32:
        return np.float32(struct.unpack_from("<b", quants, at)[0])

    def nibble() -> np.float32:
        byte = quants[16 * block + col % 16]
        return np.float32(byte >> 4 if col % 32 >= 16 else byte & 15)

    match packed.layout:
        case Layout.F32:
            return np.float32(struct.unpack_from("<f", quants, 4 * at)[0])
        case Layout.F16:
            return np.float32(struct.unpack_from("<e", quants, 2 * at)[0])
        case Layout.BF16:
            return np.float32(struct.unpack("<f", b"\0\0" + quants[2 * at : 2 * at + 2])[0])
        case Layout.INT8:
            return half(2 * block) * signed()
        case Layout.INT8_SUPER:
            scale = struct.unpack_from("<b", scales, 20 * group + 4 + at % 256 // 16)[0]
            return half(20 * group) * np.float32(scale) * signed()
        case Layout.INT4:
            return half(2 * block) * (nibble() - np.float32(8))
        case Layout.INT4_OFFSET:
            return half(4 * block) * nibble() + half(4 * block + 2)
        case Layout.INT4_SUPER:
            pair = 20 * group + 4 + 2 * (block % 8)
            scale, least = np.float32(scales[pair]), np.float32(scales[pair + 1])
            return half(20 * group) * scale * nibble() - half(20 * group + 2) * least


def naive(packed: Packed) -> NDArray[np.float32]:
    return np.array(
        [[weight(packed, row, col) for col in range(packed.cols)] for row in range(packed.rows)], np.float32
    )


def test_values_are_the_shader_constants() -> None:
    names = ("F32", "F16", "BF16", "INT8", "INT8_SUPER", "INT4", "INT4_OFFSET", "INT4_SUPER")
    assert [(layout.name, int(layout)) for layout in Layout] == list(zip(names, range(8), strict=True))


@pytest.mark.parametrize(
    ("layout", "quants", "scales"),
    [  # for 3 rows of 768 weights: 72 blocks, 9 super-blocks
        (Layout.F32, 2304, 0),
        (Layout.F16, 1152, 0),
        (Layout.BF16, 1152, 0),
        (Layout.INT8, 576, 36),
        (Layout.INT8_SUPER, 576, 45),
        (Layout.INT4, 288, 36),
        (Layout.INT4_OFFSET, 288, 72),
        (Layout.INT4_SUPER, 288, 45),
    ],
)
def test_word_counts(layout: Layout, quants: int, scales: int) -> None:
    assert layout.quant_words(3, 768) == quants
    assert layout.scale_words(3, 768) == scales


def test_odd_number_of_block_scales_takes_a_whole_word() -> None:
    assert Layout.INT8.scale_words(1, 96) == 2
    assert Layout.INT4.scale_words(3, 32) == 2


@pytest.mark.parametrize("layout", Layout)
def test_dequantize_is_the_written_arithmetic(layout: Layout) -> None:
    rng = np.random.default_rng(layout)
    for cols in WIDTHS[layout]:
        packed = random_packed(rng, layout, 3, cols)
        assert same_bits(packed.dequantize(), naive(packed))


@pytest.mark.parametrize("layout", Layout)
def test_dequantize_leaves_the_words_alone(layout: Layout) -> None:
    packed = random_packed(np.random.default_rng(1), layout, 2, 256)
    before = packed.quants.copy(), packed.scales.copy()
    packed.dequantize()[:] = 0
    assert np.array_equal(packed.quants, before[0])
    assert np.array_equal(packed.scales, before[1])


@pytest.mark.parametrize("layout", Layout)
def test_parts_split_at_even_rows_are_ranges_of_words(layout: Layout) -> None:
    # 96 columns are three blocks: an odd row's scales would start in the middle of a word.
    rows, cols, split = 5, 768 if layout.group == 256 else 96, 2
    whole = random_packed(np.random.default_rng(2), layout, rows, cols)
    quants, scales = layout.quant_words(split, cols), layout.scale_words(split, cols)
    first = Packed(layout, split, cols, whole.quants[:quants], whole.scales[:scales])
    last = Packed(layout, rows - split, cols, whole.quants[quants:], whole.scales[scales:])
    assert same_bits(np.concatenate((first.dequantize(), last.dequantize())), whole.dequantize())


def test_nbytes_counts_both_arrays() -> None:
    assert random_packed(np.random.default_rng(3), Layout.INT4, 2, 32).nbytes == 2 * 16 + 4


@pytest.mark.parametrize("layout", Layout)
def test_columns_must_divide_into_groups(layout: Layout) -> None:
    cols = layout.group + 16
    with pytest.raises(ModelError, match=f"{cols} .*{layout.group} .*{layout.name}"):
        layout.quant_words(1, cols)
    with pytest.raises(ModelError, match=f"{cols} .*{layout.group} .*{layout.name}"):
        layout.scale_words(1, cols)


def test_arrays_of_another_length_are_refused() -> None:
    words = np.zeros(8, np.uint32)
    with pytest.raises(ModelError, match="1 x 32 INT8 takes 8 words"):
        Packed(Layout.INT8, 1, 32, words[:7], words[:1])
    with pytest.raises(ModelError, match="1 x 32 INT8 takes 8 words"):
        Packed(Layout.INT8, 1, 32, words, words[:2])


def test_pack_halves_puts_the_even_one_low_and_pads_with_zero() -> None:
    assert pack_halves(np.array([1, 2, -0.0], np.float16)).tolist() == [0x40003C00, 0x8000]
    assert pack_halves(np.array([[1, 2], [2, 1]], np.float16)[:, ::-1]).tolist() == [0x3C004000, 0x40003C00]


def test_pack_nibbles_pairs_a_column_with_the_one_sixteen_on() -> None:
    block = np.arange(32, dtype=np.uint8) % 16
    block[16:] = 15 - block[16:]
    assert pack_nibbles(block[None]).tobytes() == bytes((15 - i) << 4 | i for i in range(16))


def test_unpack_nibbles_undoes_pack_nibbles() -> None:
    numbers = np.random.default_rng(4).integers(0, 16, (3, 5, 32), np.uint8)
    assert np.array_equal(unpack_nibbles(pack_nibbles(numbers)), numbers.reshape(15, 32))


def test_widen_refuses_what_is_not_floats() -> None:
    with pytest.raises(ValueError, match="INT4"):
        widen(np.zeros(16, np.uint8), Layout.INT4)
