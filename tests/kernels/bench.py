"""What the checks of the kernels share: a bench to lay buffers on, random matrices, and comparisons.

A check needs numpy and a `Device`, nothing else, so that it runs wherever there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.kv_cache import Ring, ring_words
from gemma_wgpu.ops.launch import Launch, record
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.ops.tuning import Tuning, usual_tuning
from gemma_wgpu.weights.packed import Packed, pack_halves

Floats = NDArray[np.float64]

ANYWHERE = Ring(0, 1 << 20)  # for kernels that look into no cache

# Fills what a kernel is to write, and so stays where it is to write nothing. Float16 holds it exactly.
UNTOUCHED = -12344.0

# Sums of products in float32 are this far off at most, relative to the sum of the magnitudes: in a random walk of
# roundings of 2^-24 each, even 6912 terms come to 5e-6.
F32_SUM = 1e-5
# A chain of a dozen float32 operations, among them an inverseSqrt of 2 units in the last place.
F32 = 2e-6
# A rounding to float16 or from float32 to it: WGSL leaves the direction to the driver, so a whole unit.
F16 = 2.0**-10
F16_SMALLEST = 2.0**-24


class Bench:
    """Buffers of one check, freed at its end, and the kernels that run on them."""

    def __init__(self, device: Device, *, half: bool, lanes: int | None = None, cpu: bool = True) -> None:
        usual = usual_tuning(device.info, device.features)
        lanes = lanes or usual.lanes
        tuning = Tuning(lanes, cpu=usual.cpu and cpu and lanes == 1)
        self.kernels = Kernels(device, half=half, tuning=tuning)
        self.half = np.float16 if half else np.float32
        self._device = device
        self._buffers: list[Buffer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kernels.close()
        for buffer in self._buffers:
            buffer.destroy()

    def put(self, data: ArrayLike, dtype: DTypeLike = np.float32) -> Buffer:
        """A buffer that holds `data` as `dtype`."""
        array = np.ascontiguousarray(data, dtype)
        buffer = self._device.buffer(array.nbytes, "check")
        self._buffers.append(buffer)
        if array.size:
            self.write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, data: NDArray[Any]) -> None:
        padded = np.zeros(-(-data.nbytes // 4) * 4, np.uint8)
        padded[: data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._device.write(buffer, padded)

    def blank(self, *shape: int, dtype: DTypeLike = np.float32) -> Buffer:
        """A buffer for results, UNTOUCHED so far."""
        return self.put(np.full(shape, UNTOUCHED), dtype)

    def state(self, position: int, count: int = 1, ring: Ring = ANYWHERE) -> Buffer:
        """The struct State of state.wgsl."""
        return self.states([position], [0], count, [ring])

    def states(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        slots: Sequence[int] | NDArray[np.int64],
        count: int = 1,
        rings: Sequence[Ring] | None = None,
    ) -> Buffer:
        """The struct State of state.wgsl, of several sequences; `rings` are those with a window, rings[0]."""
        words = [
            [position, count, slot, 0, *ring_words((ring, ANYWHERE))]
            for position, slot, ring in zip(positions, slots, rings or [ANYWHERE] * len(positions), strict=True)
        ]
        return self.put(words, np.uint32)

    def part(self, packed: Packed, first_row: int = 0) -> Part:
        quants, scales = self.put(packed.quants, np.uint32), self.put(packed.scales, np.uint32)
        return Part(packed.layout, first_row, packed.rows, packed.cols, quants, scales)

    def run(self, *launches: Launch) -> None:
        self._device.submit([record(self._device, launches)])

    async def get(self, buffer: Buffer, *shape: int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The first elements of a buffer."""
        data = await self._device.read(buffer)
        count = int(np.prod(shape))
        return data.view(dtype)[:count].reshape(shape)


def random_packed(rng: np.random.Generator, layout: Layout, rows: int, cols: int) -> Packed:
    """Weights of the order of 1, of either sign, every bit pattern of an integer among them."""
    size, blocks = rows * cols, rows * cols // 32
    quants = rng.integers(0, 1 << 32, layout.quant_words(rows, cols), np.uint32)
    scales = np.zeros(layout.scale_words(rows, cols), np.uint32)

    def halves(count: int, low: float, high: float) -> NDArray[np.float16]:
        return (rng.choice((-1, 1), count) * rng.uniform(low, high, count)).astype(np.float16)

    match layout:
        case Layout.F32:
            quants = rng.standard_normal(size, np.float32).view(np.uint32)
        case Layout.F16:
            quants = pack_halves(rng.standard_normal(size, np.float32).astype(np.float16))
        case Layout.BF16:
            tops = rng.standard_normal(size, np.float32).view(np.uint16)[1::2]
            quants = np.ascontiguousarray(tops).view(np.uint32)
        case Layout.INT8:
            scales = pack_halves(halves(blocks, 0.002, 0.02))
        case Layout.INT4:
            scales = pack_halves(halves(blocks, 0.05, 0.3))
        case Layout.INT4_OFFSET:
            scales = pack_halves(np.stack((halves(blocks, 0.05, 0.3), halves(blocks, 0.1, 2)), 1))
        case Layout.INT8_SUPER:
            quants = rng.integers(-32, 32, size, np.int8).view(np.uint32)
            scales = rng.integers(0, 1 << 32, scales.size, np.uint32)
            scales[::5] = halves(size // 256, 0.0002, 0.002).view(np.uint16)
        case Layout.INT4_SUPER:
            scales = rng.integers(0, 1 << 32, scales.size, np.uint32) & np.uint32(0x3F3F3F3F)
            scales[::5] = pack_halves(
                np.stack((halves(size // 256, 0.001, 0.01), halves(size // 256, 0.01, 0.05)), 1)
            )
    return Packed(layout, rows, cols, quants, scales)


def repeated_packed(rng: np.random.Generator, layout: Layout, rows: int, cols: int) -> tuple[Packed, Packed]:
    """(period, matrix): a matrix that, where it is large, repeats the rows of its period."""
    period = random_packed(rng, layout, min(rows, 8190), cols)
    quants = np.resize(period.quants, layout.quant_words(rows, cols))
    scales = np.resize(period.scales, layout.scale_words(rows, cols))
    return period, Packed(layout, rows, cols, quants, scales)


def product(packed: Packed, x: Floats) -> tuple[Floats, Floats]:
    """x [tokens, K] times the transposed matrix, and the same of the magnitudes: what errors are relative to."""
    weights = packed.dequantize().T
    return x @ weights.astype(np.float64), np.abs(x) @ np.abs(weights).astype(np.float64)


def normalize(x: Floats, weight: NDArray[np.floating] | float, eps: float) -> Floats:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def gelu(x: Floats) -> Floats:
    """GELU in its tanh form (arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_error(x: Floats) -> Floats:
    """How far GELU in float32 is off at most.

    exp is good to 5 + 2 |z| units in the last place, z being 2 sqrt(2 / pi) (x + 0.044715 x^3); past |z| = 80 the
    result is x or too small to see. The 1 + tanh of the reference is good to 2^-53, absolutely.
    """
    exponent = np.minimum(np.abs(1.6 * (x + 0.044715 * x**3)), 80)
    return (16 + 4 * exponent) * 2.0**-24 * np.abs(gelu(x)) + 2.0**-52 * np.abs(x) + 1e-30


def close(what: str, actual: NDArray[Any], expected: ArrayLike, tolerance: ArrayLike) -> None:
    """Raise AssertionError unless they differ by at most the tolerance everywhere. NaN differs from everything."""
    expected = np.broadcast_to(np.asarray(expected, np.float64), actual.shape)
    tolerance = np.broadcast_to(np.asarray(tolerance, np.float64), actual.shape)
    with np.errstate(invalid="ignore"):
        excess = np.abs(actual.astype(np.float64) - expected) - tolerance
    wrong = ~(excess <= 0)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), actual.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} are wrong; at {[int(i) for i in worst]} {actual[worst]} "
            f"instead of {expected[worst]} within {tolerance[worst]}"
        )


def same(what: str, actual: NDArray[Any], expected: ArrayLike) -> None:
    """Raise AssertionError unless they are equal everywhere."""
    close(what, actual, expected, 0.0)
