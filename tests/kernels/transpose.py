"""transpose.wgsl: rows of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    half: bool


CASES = tuple(
    Case(size, count, half) for half in (False, True) for size, count in ((64, 576), (96, 9), (32, 1), (7, 33))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    x = rng.standard_normal((case.count, case.size)).astype(np.float32)
    stride = -(-case.count // 32) * 32
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.size + 1, stride, dtype=bench.half)
        bench.run(
            bench.kernels.transpose(bench.state(3, case.count), bench.put(x), out, size=case.size, count=case.count)
        )
        actual = await bench.get(out, case.size + 1, stride, dtype=bench.half)

    stored = F16 * np.abs(x.T) + F16_SMALLEST if case.half else 0
    close("out", actual[:-1, : case.count], x.T, stored)
    same("columns beyond", actual[:-1, case.count :], 0)
    same("rows outside", actual[-1], UNTOUCHED)
