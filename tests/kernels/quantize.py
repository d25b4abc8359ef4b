"""quantize.wgsl: the vectors of a prompt's tokens as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    cols: int
    count: int
    max_count: int
    half: bool


CASES = tuple(
    case
    for half in (False, True)
    for case in (Case(640, 3, 5, half), Case(1152, 1, 1, half), Case(6912, 2, 2, half), Case(32, 4, 8, half))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.cols)
    shape = case.max_count, case.cols // 32
    with Bench(device, half=case.half) as bench:
        x = rng.standard_normal((*shape, 32)) * 10.0 ** rng.integers(-3, 3, (*shape, 1))
        x[:, 0] = 0
        x = x.astype(bench.half)
        q_buffer, factors_buffer = bench.put(np.full(x.size, 99), np.int8), bench.blank(*shape, 2)
        state = bench.state(4, case.count)
        bench.run(
            bench.kernels.quantize(
                state, bench.put(x, bench.half), q_buffer, factors_buffer, size=case.cols, max_count=case.max_count
            )
        )
        q = await bench.get(q_buffer, *x.shape, dtype=np.int8)
        factors = await bench.get(factors_buffer, *shape, 2)

    counted = slice(case.count)
    highest = np.abs(x).max(axis=2).astype(np.float64)[counted]
    d = factors[counted, :, 0].astype(np.float64)
    close("d", factors[counted, :, 0], highest / 127, F32 * highest)
    # Half a step of rounding, and a unit in the last place of x / d.
    close("q", d[..., None] * q[counted], x[counted], d[..., None] * 0.5001)
    close("d sum q", factors[counted, :, 1], d * q[counted].sum(axis=2, dtype=np.int64), F32 * d * 32 * 127)
    same("q of rows outside", q[case.count :], 99)
    same("factors of rows outside", factors[case.count :], UNTOUCHED)
