"""attention_combine.wgsl: one softmax out of several shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, close, same
from tests.kernels.heads import shape_of


@dataclass(frozen=True)
class Case:
    heads: int
    head_dim: int
    splits: int
    half: bool = False
    sequences: int = 1


CASES = (Case(4, 256, 16), Case(4, 256, 4, half=True), Case(1, 32, 2), Case(8, 64, 1), Case(4, 64, 3, sequences=5))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.splits)
    shape = shape_of(case.heads, 1, case.head_dim, 512)
    n = case.sequences
    shares = rng.standard_normal((n, case.splits, case.heads, case.head_dim)).astype(np.float32)
    stats = np.empty((n, case.splits, case.heads, 2), np.float32)
    stats[..., 0] = rng.standard_normal((n, case.splits, case.heads)) * rng.choice((1, 50), case.heads)
    stats[..., 1] = rng.uniform(1, 100, (n, case.splits, case.heads))
    if case.splits > 1:  # a share of no positions, as attention_decode.wgsl leaves it
        shares[:, -1], stats[:, -1] = 0, (-1e30, 0)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(n * case.heads + 1, case.head_dim)
        bench.run(
            bench.kernels.attention_combine(
                shape, bench.put(shares), bench.put(stats), out, splits=case.splits, sequences=n
            )
        )
        actual = await bench.get(out, n * case.heads + 1, case.head_dim)

    highest, total = np.moveaxis(stats.astype(np.float64), -1, 0)
    share = np.exp(highest - highest.max(axis=1, keepdims=True))
    total = np.einsum("nsh,nsh->nh", share, total)[..., None]
    exact = np.einsum("nsh,nshd->nhd", share, shares) / total
    # exp is good to 5 + 2 |x| units in the last place; past 100 the share is too small to see.
    magnitude = np.einsum("nsh,nshd->nhd", share, np.abs(shares)) / total
    tolerance = 2 * F32_SUM * (magnitude + np.abs(exact))
    close("out", actual[:-1], exact.reshape(-1, case.head_dim), tolerance.reshape(-1, case.head_dim))
    same("rows outside", actual[-1], UNTOUCHED)
