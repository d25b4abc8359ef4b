"""The references of the attention kernels: norm and rotation of heads, and attention itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.ops.kernels import AttentionShape
from tests.kernels.bench import F32_SUM, Floats

EPS = 1e-6

# What lies where nothing may be read from: far larger than any key or value, and exact in float16.
POISON = 256.0


def shape_of(
    heads: int, kv_heads: int, head_dim: int, window: int, *, value_norm: bool = False, shared: bool = False
) -> AttentionShape:
    scale = head_dim**-0.5
    return AttentionShape(heads, kv_heads, head_dim, scale, EPS, window, ring=0, value_norm=value_norm, shared=shared)


def _angles(positions: NDArray[np.int64], head_dim: int, theta: float) -> Floats:
    return positions[:, None] * theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)


def rope_table(head_dim: int, theta: float, length: int) -> Floats:
    """(cos, sin) for the positions below `length`."""
    angles = _angles(np.arange(length), head_dim, theta)
    return np.stack((np.cos(angles), np.sin(angles)), axis=-1)


def rotate(x: Floats, positions: NDArray[np.int64], theta: float) -> Floats:
    """x [tokens, heads, head_dim]: element i and i + head_dim / 2 are turned by position theta^(-2 i / head_dim)."""
    turns = np.exp(1j * _angles(positions, x.shape[-1], theta))[:, None]
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * turns
    return np.concatenate((turned.real, turned.imag), axis=-1)


def reach(x: Floats) -> Floats:
    """The length of the pair that each element was rotated in: what its error is relative to."""
    real, imaginary = np.split(x, 2, axis=-1)
    return np.tile(np.hypot(real, imaginary), 2)


def attend(
    q: Floats, k: Floats, v: Floats, visible: NDArray[np.bool_], k_error: Floats | float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """Softmax(q k^T) v and its error in float32, [tokens, heads, head_dim], and the softmax [tokens, heads, keys].

    q is [tokens, heads, head_dim], k and v [keys, kv_heads, head_dim], visible [tokens, keys]; k_error says by how
    much the kernel's keys may differ.
    """
    group = q.shape[1] // k.shape[1]
    k, v, k_error = (np.repeat(np.broadcast_to(a, k.shape), group, axis=1) for a in (k, v, k_error))
    scores = np.einsum("thd,nhd->thn", q, k, optimize=True)
    scores = np.where(visible[:, None], scores, -np.inf)
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("thn,nhd->thd", weights, v, optimize=True)

    # A score that is e too high weighs its value e too heavily, to first order. exp is good to 5 + 2 |x| units.
    error = np.einsum("thd,nhd->thn", np.abs(q), F32_SUM * np.abs(k) + k_error, optimize=True)
    weighted = weights * (error + 2.0**-24 * (5 - 2 * np.maximum(scores, -1e3)))
    spread = np.einsum("thn,nhd->thd", weighted, np.abs(v), optimize=True)
    spread += weighted.sum(axis=-1, keepdims=True) * np.abs(out)
    tolerance = 2 * spread + F32_SUM * np.einsum("thn,nhd->thd", weights, np.abs(v), optimize=True)
    return out, tolerance, weights
