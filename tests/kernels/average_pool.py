"""average_pool.wgsl: averages over the squares of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    side: int
    window: int
    half: bool  # it makes no difference


CASES = (
    Case(1152, 64, 4, half=False),
    Case(288, 8, 4, half=True),
    Case(36, 6, 2, half=False),
    Case(32, 5, 5, half=False),
    Case(32, 3, 1, half=True),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.side)
    x = rng.standard_normal((case.side, case.side, case.size), np.float32)
    side = case.side // case.window
    with Bench(device, half=case.half) as bench:
        out = bench.blank(side * side + 1, case.size)
        bench.run(bench.kernels.average_pool(bench.put(x), out, size=case.size, side=case.side, window=case.window))
        actual = await bench.get(out, side * side + 1, case.size)

    squares = x.astype(np.float64).reshape(side, case.window, side, case.window, case.size)
    magnitude = np.abs(squares).mean(axis=(1, 3)).reshape(side * side, -1)
    close("out", actual[:-1], squares.mean(axis=(1, 3)).reshape(side * side, -1), F32 * magnitude)
    same("rows outside", actual[-1], UNTOUCHED)
