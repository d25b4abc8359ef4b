"""split_heads.wgsl: queries, keys and values apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    half: bool


CASES = tuple(
    Case(size, count, max_count, half)
    for half in (False, True)
    for size, count, max_count in ((1152, 3, 4), (288, 5, 5), (36, 1, 2))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    scale = 72.0**-0.5
    qkv = rng.standard_normal((case.max_count, 3, case.size), np.float32)
    with Bench(device, half=case.half) as bench:
        outs = [bench.blank(case.max_count, case.size, dtype=bench.half) for _ in range(3)]
        bench.run(
            bench.kernels.split_heads(
                bench.state(0, case.count),
                bench.put(qkv),
                *outs,
                size=case.size,
                scale=scale,
                max_count=case.max_count,
            )
        )
        actual = np.stack([await bench.get(out, case.max_count, case.size, dtype=bench.half) for out in outs], axis=1)

    expected = qkv[: case.count].astype(np.float64)
    expected[:, 0] *= scale
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, 2.0**-22 * np.abs(expected) + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
