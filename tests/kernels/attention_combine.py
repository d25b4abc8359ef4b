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


CASES = (Case(4, 256, 16), Case(4, 256, 4, half=True), Case(1, 32, 2), Case(8, 64, 1))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.splits)
    shape = shape_of(case.heads, 1, case.head_dim, 512, 512)
    shares = rng.standard_normal((case.splits, case.heads, case.head_dim)).astype(np.float32)
    stats = np.empty((case.splits, case.heads, 2), np.float32)
    stats[..., 0] = rng.standard_normal((case.splits, case.heads)) * rng.choice((1, 50), case.heads)
    stats[..., 1] = rng.uniform(1, 100, (case.splits, case.heads))
    if case.splits > 1:  # a share of no positions, as attention_decode.wgsl leaves it
        shares[-1], stats[-1] = 0, (-1e30, 0)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.heads + 1, case.head_dim)
        bench.run(
            bench.kernels.attention_combine(shape, bench.put(shares), bench.put(stats), out, splits=case.splits)
        )
        actual = await bench.get(out, case.heads + 1, case.head_dim)

    highest, total = np.moveaxis(stats.astype(np.float64), -1, 0)
    share = np.exp(highest - highest.max(axis=0))
    total = np.einsum("sh,sh->h", share, total)[:, None]
    exact = np.einsum("sh,shd->hd", share, shares) / total
    # exp is good to 5 + 2 |x| units in the last place; past 100 the share is too small to see.
    magnitude = np.einsum("sh,shd->hd", share, np.abs(shares)) / total
    close("out", actual[:-1], exact, 2 * F32_SUM * (magnitude + np.abs(exact)))
    same("rows outside", actual[-1], UNTOUCHED)
