import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.packed import Packed, pack_halves, pack_nibbles, unpack_nibbles
from gemma_wgpu.weights.quantize import quantize
from tests.checkpoints import same_bits

SEARCHED = [Layout.INT4, Layout.INT8, Layout.INT4_OFFSET]
Floats = NDArray[np.float32]


def gaussian(rows: int = 256, cols: int = 1152) -> Floats:
    return np.random.default_rng(5).standard_normal((rows, cols), np.float32)


def bf16(weights: Floats) -> Floats:
    """Round to the nearest bfloat16, ties to even."""
    bits = weights.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view(np.float32)


def error(weights: Floats, restored: Floats, layout: Layout) -> NDArray[np.float64]:
    """Return the error of each block: squared, and without an offset times w^2 plus the mean of the squares."""
    blocks = weights.astype(np.float64).reshape(-1, 32)
    worth = 1.0 if layout == Layout.INT4_OFFSET else blocks**2 + (blocks**2).mean(1, keepdims=True)
    errors: NDArray[np.float64] = (worth * (restored.astype(np.float64).reshape(-1, 32) - blocks) ** 2).sum(1)
    return errors


def by_gguf(weights: Floats, kind: GGMLQuantizationType) -> Floats:
    restored: Floats = quants.dequantize(quants.quantize(weights, kind), kind)
    return restored


def absmax(weights: Floats, most: int) -> Floats:
    """Round to the nearest, with the largest weight of a block at `most` and the scale rounded to float16."""
    blocks = weights.reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    rounded: Floats = (np.clip(np.rint(blocks / np.where(d == 0, 1, d)), -most, most) * d).reshape(weights.shape)
    return rounded


@pytest.mark.parametrize(
    ("layout", "kind", "ratio"),
    [
        (Layout.INT4, GGMLQuantizationType.Q4_0, 0.86),
        (Layout.INT4_OFFSET, GGMLQuantizationType.Q4_1, 0.784),
        (Layout.INT8, GGMLQuantizationType.Q8_0, 0.72),
    ],
)
def test_less_error_than_gguf(layout: Layout, kind: GGMLQuantizationType, ratio: float) -> None:
    weights = gaussian()
    theirs = error(weights, by_gguf(weights, kind), layout).sum()
    assert error(weights, quantize(weights, layout).dequantize(), layout).sum() < ratio * theirs


@pytest.mark.parametrize(("layout", "most", "ratio"), [(Layout.INT4, 7, 0.70), (Layout.INT8, 127, 0.72)])
def test_less_error_than_round_to_nearest(layout: Layout, most: int, ratio: float) -> None:
    weights = gaussian()
    plain = error(weights, absmax(weights, most), layout).sum()
    assert error(weights, quantize(weights, layout).dequantize(), layout).sum() < ratio * plain


@pytest.mark.parametrize(
    ("layout", "low", "high", "over"), [(Layout.INT4, -8, 7, 0.005), (Layout.INT8, -128, 127, 0.01)]
)
def test_near_the_best_there_is(layout: Layout, low: int, high: int, over: float) -> None:
    """No float16 scale of a plausible size, tried one by one, is better by much."""
    weights = gaussian(2, 320)
    scales = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    scales = scales[(scales > 0.2 / high) & (scales < 8 / high)]
    scales = np.concatenate((scales, -scales))
    least = [
        min(error(block, np.clip(np.rint(block / scale), low, high) * scale, layout).item() for scale in scales)
        for block in weights.reshape(-1, 32)
    ]
    assert error(weights, quantize(weights, layout).dequantize(), layout).sum() < (1 + over) * sum(least)


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32), size=st.integers(1, 8), exponent=st.integers(-12, 4))
def test_a_q4_0_grid_comes_back_exactly(seed: int, size: int, exponent: int) -> None:
    """Weights that are numbers of any spread, on scales of either sign, are the same to the bit."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(8 - size, 8 + min(size, 7), (64, 32), np.uint8, endpoint=True)
    d = (rng.uniform(1, 2, 64) * 2.0**exponent * rng.choice([-1, 1], 64)).astype(np.float16)
    grid = Packed(Layout.INT4, 16, 128, pack_nibbles(numbers), pack_halves(d)).dequantize()
    assert np.array_equal(quantize(grid, Layout.INT4).dequantize(), grid)


def q4_0(weights: Floats) -> Packed:
    """The `gguf` package quantises so: the outermost weight of every block is number 0."""
    data = quants.quantize(weights, GGMLQuantizationType.Q4_0).reshape(-1)
    rows, cols = weights.shape
    return Packed(Layout.INT4, rows, cols, *encodings.Q4_0.split(data))


def test_what_gguf_made_q4_0_keeps_its_bits() -> None:
    original = q4_0(gaussian())
    again = quantize(original.dequantize(), Layout.INT4)
    assert np.array_equal(again.quants, original.quants)
    assert np.array_equal(again.scales, original.scales)


def test_a_q4_0_grid_is_found_through_bf16() -> None:
    """Checkpoints of quantisation-aware training are bf16, which hides the grid they lie on.

    The numbers are the same; a scale moves by no more than bf16 rounds a weight, and float16 the scale.
    """
    original = q4_0(gaussian())
    again = quantize(bf16(original.dequantize()), Layout.INT4)
    assert np.array_equal(again.quants, original.quants)
    theirs, ours = (packed.scales.view(np.float16).astype(np.float32) for packed in (original, again))
    assert (np.abs(ours - theirs) <= (2.0**-8 + 2.0**-11) * np.abs(theirs)).all()


def test_a_q8_0_grid_comes_back_exactly() -> None:
    grid = by_gguf(gaussian(), GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantize(grid, Layout.INT8).dequantize(), grid)


def test_a_q4_1_grid_comes_back_closely() -> None:
    """They are found exactly, but for weights that float32 rounds: d * q + m can take more than its 24 bits."""
    grid = by_gguf(gaussian(), GGMLQuantizationType.Q4_1)
    assert np.abs(quantize(grid, Layout.INT4_OFFSET).dequantize() - grid).max() < 1e-6


@pytest.mark.parametrize("layout", SEARCHED)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    exponent=st.integers(-140, 15),
    power=st.sampled_from([0, 1, 5]),
    constant=st.booleans(),
)
def test_any_weights(layout: Layout, seed: int, exponent: int, power: int, constant: bool) -> None:
    """Whatever the weights are, nothing warns, and zeros and plain rounding have no less error."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((3, 96)) ** power * rng.choice([0, 1], (3, 96), p=[0.2, 0.8])
    weights = np.ldexp(1.0 if constant else weights / np.abs(weights).max(), exponent) * np.ones((3, 96))
    weights = weights.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = error(weights, quantize(weights, layout).dequantize(), layout)
    nothing = error(weights, np.zeros_like(weights), layout)
    assert (ours <= nothing * (1 + 1e-6)).all()
    if exponent > -10:  # below, float16 scales have fewer bits, and which rounds better is chance
        plain = error(weights, absmax(weights, 127 if layout == Layout.INT8 else 7), layout)
        assert ours.sum() <= plain.sum() * 1.01 + 1e-12 * nothing.sum()


@pytest.mark.parametrize("layout", [Layout.F16, *SEARCHED])
def test_zeros(layout: Layout) -> None:
    packed = quantize(np.zeros((3, 32), np.float32), layout)
    assert not packed.dequantize().any()
    assert not packed.scales.any()


def test_f16_rounds() -> None:
    weights = gaussian(3, 32)
    packed = quantize(weights, Layout.F16)
    assert packed.layout == Layout.F16
    assert same_bits(packed.dequantize(), weights.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("layout", [Layout.F16, *SEARCHED])
def test_threads_and_parts_change_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gaussian(66, 96)
    whole = quantize(weights, layout)
    monkeypatch.setattr("gemma_wgpu.weights.quantize._PIECE", 7)
    with ThreadPoolExecutor(3) as pool:
        threaded = quantize(weights, layout, pool)
    parts = [quantize(weights[start:stop], layout) for start, stop in ((0, 2), (2, 40), (40, 66))]
    for packed in (threaded, *parts):
        assert packed.layout == layout
    assert np.array_equal(threaded.quants, whole.quants)
    assert np.array_equal(threaded.scales, whole.scales)
    assert np.array_equal(np.concatenate([part.quants for part in parts]), whole.quants)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)


def test_all_the_numbers_are_used() -> None:
    weights = gaussian()
    assert set(np.unique(unpack_nibbles(quantize(weights, Layout.INT4).quants))) == set(range(16))
    assert set(np.unique(unpack_nibbles(quantize(weights, Layout.INT4_OFFSET).quants))) == set(range(16))
    numbers = quantize(weights, Layout.INT8).quants.view(np.int8)
    assert numbers.min() == -128
    assert numbers.max() == 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e7])
@pytest.mark.parametrize("layout", [Layout.F16, *SEARCHED])
def test_weights_out_of_reach(layout: Layout, bad: float) -> None:
    weights = gaussian(4, 64)
    weights[2, 40] = bad
    with warnings.catch_warnings(), pytest.raises(ModelError, match="not finite, or too large for float16"):
        warnings.simplefilter("error")
        quantize(weights, layout)


@pytest.mark.parametrize("layout", SEARCHED)
def test_columns_must_divide(layout: Layout) -> None:
    with pytest.raises(ModelError, match="rows of 48 weights do not divide into the 32"):
        quantize(np.zeros((2, 48), np.float32), layout)


@pytest.mark.parametrize("layout", [Layout.F32, Layout.BF16, Layout.INT8_SUPER, Layout.INT4_SUPER])
def test_other_layouts(layout: Layout) -> None:
    with pytest.raises(ValueError, match=f"{layout.name} cannot be quantised to"):
        quantize(np.zeros((2, 256), np.float32), layout)
