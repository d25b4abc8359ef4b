"""Rounding float32 weights to a Layout, block by block, for the least squared error.

Round-to-nearest on a block's largest weight wastes levels: a scale that clips that weight, or one that lets the
others fall nearer to the grid, often has less error. So each block tries a range of scales. Given the numbers q
that a scale leads to, the best scale is a least-squares fit, in closed form, rounded to float16. The best scale is
then refined: the numbers for the scale and the scale for the numbers take turns.

Without an offset, an error counts w^2 + mean(w^2) times, with the mean over its block, since a large weight moves the
output more. In int4, on a real 270M, that leaves 0.30 nats a token of divergence, and plain least squares 0.35; with
an offset it is the other way round, 0.17 and 0.15 (benchmarks/quantization.py).

Weights that lie on a grid of their own (w = d * q, as quantisation-aware training makes them) find it again, since
the levels that a grid's outermost weight can have are among the tries.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.weights.packed import Packed, pack_halves, pack_nibbles

_PIECE = 1 << 14  # blocks at a time, which the processor's cache holds, and for which threads seldom wait
_ROUNDS = 3
_LEAST = np.float32(1e-30)  # a block without a weight above this is zero, whatever float16 its scale is
_MOST = np.float32(1 << 24)  # above what any float16 scale reaches; sums of squares still fit float32

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Grid:
    """The numbers in [low, high], with an offset beside the scale or without.

    A try (k, o) maps the normalised values of a block to k * value + o. Values are normalised by the outermost
    weight, which becomes -1; if there is an offset, so that they span [0, 1].
    """

    low: int
    high: int
    offset: bool
    tries: tuple[tuple[float, float], ...]


# The whole numbers are the levels at which a grid's outermost weight may lie; beyond 8 or 128 it is clipped. The
# steps are fine enough: on Gaussian and on real weights, a search that is ten times as dense gains less than 0.5 %.
_GRIDS = {
    Layout.INT4: _Grid(-8, 7, False, tuple((k / 4, 0.0) for k in range(16, 37))),
    Layout.INT8: _Grid(-128, 127, False, tuple((k / 2, 0.0) for k in range(224, 258))),
    Layout.INT4_OFFSET: _Grid(
        0, 15, True, tuple((k / 2, (15 - k / 2) * share) for k in range(28, 39) for share in (0.0, 0.5, 1.0))
    ),
}


def quantize(weights: Floats, layout: Layout, pool: Executor | None = None) -> Packed:
    """Return `weights` (rows, cols) in `layout`: F16 by rounding; INT8, INT4 and INT4_OFFSET by search.

    The work is spread over the threads of `pool`; the result is the same with and without. Beside it, about twice the
    bytes of `weights` are in use for a moment: give large matrices in parts, split at even rows. Raises ModelError if
    a weight is not finite or is beyond what float16 scales reach, and unless 32 divides cols; ValueError for another
    layout.
    """
    rows, cols = weights.shape
    if layout == Layout.F16:
        return _rounded(weights)
    if layout not in _GRIDS:
        raise ValueError(f"{layout.name} cannot be quantised to")
    grid = _GRIDS[layout]
    layout.quant_words(rows, cols)  # raises ModelError if cols do not divide into blocks
    blocks = np.ascontiguousarray(weights).reshape(-1, BLOCK)
    numbers = np.empty(blocks.shape, np.uint8 if grid.low == 0 else np.int8)
    scales = np.empty((len(blocks), 2 if grid.offset else 1), np.float16)
    work = partial(_quantize_piece, grid, blocks, numbers, scales)
    starts = range(0, len(blocks), _PIECE)
    for _ in pool.map(work, starts) if pool else map(work, starts):
        pass
    if layout == Layout.INT8:
        quants = numbers.reshape(-1).view(np.uint32)
    else:
        quants = pack_nibbles(numbers.view(np.uint8) - np.uint8(grid.low & 0xFF))
    return Packed(layout, rows, cols, quants, pack_halves(scales))


def _rounded(weights: Floats) -> Packed:
    halves = _halves(weights)
    rows, cols = weights.shape
    return Packed(Layout.F16, rows, cols, pack_halves(halves), np.empty(0, np.uint32))


def _halves(values: NDArray[np.floating]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise _unreachable()
    return halves


def _unreachable() -> ModelError:
    return ModelError("there are weights that are not finite, or too large for float16")


def _quantize_piece(
    grid: _Grid,
    blocks: Floats,
    numbers: NDArray[np.integer],
    scales: NDArray[np.float16],
    start: int,
) -> None:
    """Fill `numbers` (n, 32) and `scales` (n, 1 or 2) for the blocks from `start` on."""
    stop = start + _PIECE
    values = np.ascontiguousarray(blocks[start:stop].T)  # (32, n): a block is a column, which is fast in numpy
    search = _Search(grid, values)
    d, m = search.run()
    scales[start:stop, 0] = d
    if grid.offset:
        scales[start:stop, 1] = m
    numbers[start:stop] = search.nearest(d, m).T


class _Search:
    """The least-squares search over blocks, which are the columns of `values` (32, n).

    Raises ModelError if a value is not finite or is beyond what float16 scales reach.
    """

    def __init__(self, grid: _Grid, values: Floats) -> None:
        self._grid = grid
        self._values = values
        self._low, self._high = values.min(axis=0), values.max(axis=0)
        if not max(-self._low.min(), self._high.max()) < _MOST:  # a NaN is not less either
            raise _unreachable()
        if grid.offset:
            self._mean = values.mean(axis=0)
            self._weighted = values - self._mean
            self._worth = np.ones_like(values)  # what an error counts
        else:
            outermost = np.maximum(self._high, -self._low)
            squares = (values / np.where(outermost > _LEAST, outermost, np.inf)) ** 2
            self._worth = squares + squares.mean(axis=0)
            self._weighted = self._worth * values
        self._scratch = np.empty_like(values)
        self._numbers = np.empty_like(values)

    def run(self) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Return the scale and the offset of every block."""
        self._best = np.zeros((2, self._values.shape[1]), np.float16)
        self._least = np.full(self._values.shape[1], np.inf)
        for numbers in self._tries():
            self._consider(*self._fit(numbers), numbers)
        for _ in range(_ROUNDS):
            d, m = self._fit(self.nearest(*self._best))
            self._consider(d, m, self.nearest(d, m))
        d, m = self._best
        return d, m

    def _consider(self, d: NDArray[np.float16], m: NDArray[np.float16], numbers: Floats) -> None:
        """Keep the scales and offsets that have less error than the best ones so far."""
        error = self._error(numbers, d, m)
        better = error < self._least
        self._least[better] = error[better]
        self._best[:, better] = d[better], m[better]

    def nearest(self, d: NDArray[np.float16], m: NDArray[np.float16]) -> Floats:
        """Return the numbers (32, n) that `d` and `m` bring nearest to the weights. The next call overwrites them."""
        divisor = np.where(d == 0, np.float32(np.inf), d.astype(np.float32))
        values = self._values
        if self._grid.offset:
            values = np.subtract(values, m.astype(np.float32), out=self._scratch)
        return self._whole(np.divide(values, divisor, out=self._numbers))

    def _tries(self) -> Iterator[Floats]:
        """Yield the numbers (32, n) of every try. The next try overwrites them."""
        low, high = self._low, self._high
        if self._grid.offset:
            span = high - low
            unit = (self._values - low) / np.where(span > _LEAST, span, np.inf)
        else:
            outermost = np.where(high > -low, high, low)
            unit = self._values / np.where(np.abs(outermost) > _LEAST, -outermost, np.inf)
        for k, o in self._grid.tries:
            numbers = np.multiply(unit, np.float32(k), out=self._numbers)
            if self._grid.offset:
                numbers += np.float32(o)
            yield self._whole(numbers)

    def _whole(self, numbers: Floats) -> Floats:
        return np.rint(np.clip(numbers, self._grid.low, self._grid.high, out=numbers), out=numbers)

    def _fit(self, numbers: Floats) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Return the scale and the offset with the least squared error for `numbers`."""
        covariance = _sum(np.multiply(self._weighted, numbers, out=self._scratch))
        np.multiply(self._worth, numbers, out=self._scratch)
        variance = _sum(np.multiply(self._scratch, numbers, out=self._scratch))
        if not self._grid.offset:
            d = _halves(covariance / np.maximum(variance, _LEAST))
            return d, np.zeros_like(d)
        mean = _sum(numbers) / BLOCK
        d = _halves(covariance / np.maximum(variance - BLOCK * mean**2, _LEAST))
        return d, _halves(self._mean - d * mean)  # the offset that is best for the scale as rounded

    def _error(self, numbers: Floats, d: NDArray[np.float16], m: NDArray[np.float16]) -> NDArray[np.float64]:
        weights = np.multiply(numbers, d.astype(np.float32), out=self._scratch)
        if self._grid.offset:
            weights += m.astype(np.float32)
        weights -= self._values
        np.multiply(weights, weights, out=weights)
        return _sum(np.multiply(self._worth, weights, out=weights))


def _sum(array: Floats) -> NDArray[np.float64]:
    sums: Floats = array.sum(axis=0)
    return sums.astype(np.float64)
