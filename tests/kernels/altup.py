"""The references of the kernels of AltUp: its router, and vectors of the magnitudes that they may meet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.kernels.bench import F32, F32_SUM, Floats

EPS = 1e-6

# The mean square of a projection counts as this at least, where it is made as long as another vector.
FLOOR = 1e-5

# WGSL's tanh is off by this at most, or by what its sinh / cosh is, which is less where the router clamps.
_TANH = 1e-5


def vectors(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Vectors [tokens, ..., K] of many lengths. Token 0 has short ones, of which eps decides, and token 1 zeros."""
    lengths = 10.0 ** rng.integers(-2, 4, (*shape[:-1], 1))
    lengths[0] = 1e-3
    lengths[1:2] = 0
    outliers = np.where(rng.random(shape) < 0.02, 100, 1)
    outliers[0] = 1
    return (rng.standard_normal(shape) * lengths * outliers).astype(np.float32)


def router(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A router [5, K]: the norm's weight, and rows for products that are small, of the order of 1, and enormous."""
    rows = rng.standard_normal((4, size)) * np.array([[0.2], [1], [3], [1000]]) * size**0.5
    return np.concatenate((rng.uniform(-2, 2, (1, size)), rows)).astype(np.float32)


def routed(v: Floats, v_error: Floats | float, router: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """The router's tanh(M (weight v / rms(v)) / K) for v [tokens, K], and its error in float32: [tokens, 4] both."""
    size = v.shape[1]
    matrix = (router[0] * router[1:].astype(np.float64)).T
    length = np.sqrt(np.mean(v**2, axis=1, keepdims=True) + EPS)
    z = v @ matrix / (length * size)
    error = (F32_SUM * np.abs(v) + v_error) @ np.abs(matrix) / (length * size)
    # If v is wrong by an e, rms(v) is by rms(e) at most.
    error += np.abs(z) * (F32 + np.sqrt(np.mean((v_error + 0 * v) ** 2, axis=1, keepdims=True)) / length)
    # tanh rises by 1 - tanh^2, which is the largest where |z| is the smallest.
    steepest = 1 - np.tanh(np.maximum(np.abs(z) - error, 0)) ** 2
    return np.tanh(z), error * steepest + _TANH
