"""relative_attention.wgsl: attention to neighbours, by their places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32_SUM, UNTOUCHED, Bench, Floats, close, same


@dataclass(frozen=True)
class Case:
    heads: int
    head_dim: int
    count: int
    half: bool
    past: int = 12
    future: int = 0
    cap: float = 50.0
    gain: float = 1.0  # of the queries: large ones reach the cap


CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(8, 192, 25, half),
        *(Case(2, 32, count, half) for count in (1, 12, 13, 24, 25)),
        Case(4, 32, 37, half, gain=40.0),
        Case(2, 36, 20, half, gain=1e4, cap=30.0),
        Case(1, 4, 9, half, past=3, future=2),
        Case(3, 8, 2, half, past=0, future=4),
    )
)


def scores(q: Floats, k: Floats, position: Floats, past: int) -> tuple[Floats, Floats]:
    """Scores before the cap (count, heads, span), -inf outside, and the magnitudes of their terms."""
    count, span = len(q), len(position)
    made, magnitude = np.full((count, q.shape[1], span), -np.inf), np.zeros((count, q.shape[1], span))
    for query in range(count):
        for place in range(span):
            key = query - past + place
            if 0 <= key < count:
                made[query, :, place] = (q[query] * (k[key] + position[place])).sum(axis=-1)
                terms = np.abs(q[query]) * (np.abs(k[key]) + np.abs(position[place]))
                magnitude[query, :, place] = terms.sum(axis=-1)
    return made, magnitude


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.count)
    span = case.past + 1 + case.future
    qkv = rng.standard_normal((case.count + 2, 3, case.heads, case.head_dim), np.float32)
    scale = (rng.uniform(0.2, 2, case.head_dim) * case.gain / case.head_dim**0.5).astype(np.float32)
    position = rng.standard_normal((span, case.heads, case.head_dim), np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.count + 2, case.heads, case.head_dim, dtype=bench.half)
        bench.run(
            bench.kernels.relative_attention(
                bench.state(7, case.count),
                bench.put(qkv),
                bench.put(scale),
                bench.put(position),
                out,
                heads=case.heads,
                head_dim=case.head_dim,
                past=case.past,
                future=case.future,
                cap=case.cap,
                max_count=case.count + 2,
            )
        )
        actual = await bench.get(out, case.count + 2, case.heads, case.head_dim, dtype=bench.half)

    q, k, v = np.moveaxis(qkv[: case.count].astype(np.float64), 1, 0)
    made, magnitude = scores(q * scale, k, position.astype(np.float64), case.past)
    capped = np.where(np.isinf(made), made, case.cap * np.tanh(made / case.cap))
    # The cap flattens what rounding does to a score; exp and the cap themselves are good to some units of the cap.
    error = F32_SUM * magnitude / np.cosh(np.minimum(np.abs(made), 1e3) / case.cap) ** 2 + 32 * 2.0**-24 * case.cap
    weights = np.exp(capped - capped.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    places = np.arange(case.count)[:, None] - case.past + np.arange(span)
    seen = v[np.clip(places, 0, case.count - 1)]  # (count, span, heads, head_dim)
    expected = np.einsum("qhs,qshd->qhd", weights, seen)
    tolerance = 2 * np.einsum("qhs,qshd->qhd", weights * error, np.abs(seen))
    tolerance += 2 * (weights * error).sum(axis=-1)[..., None] * np.abs(expected)
    tolerance += F32_SUM * np.einsum("qhs,qshd->qhd", weights, np.abs(seen))
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, tolerance + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
