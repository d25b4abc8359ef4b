"""join_scales.wgsl: the channels of a fine image and those of a coarse one, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import UNTOUCHED, Bench, same


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, int]
    sides: tuple[int, int]
    half: bool


CASES = tuple(
    Case(sizes, sides, half)
    for half in (False, True)
    for sizes, sides in (((640, 1280), (4, 2)), ((32, 96), (6, 3)), ((96, 32), (6, 2)), ((32, 32), (1, 1)))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(sum(case.sizes))
    (fine_side, coarse_side), size = case.sides, sum(case.sizes)
    with Bench(device, half=case.half) as bench:
        fine, coarse = (
            rng.standard_normal((side, side, channels)).astype(bench.half)
            for side, channels in zip(case.sides, case.sizes, strict=True)
        )
        out = bench.blank(fine_side**2 + 1, size, dtype=bench.half)
        buffers = bench.put(fine, bench.half), bench.put(coarse, bench.half)
        bench.run(bench.kernels.join_scales(*buffers, out, sizes=case.sizes, sides=case.sides))
        actual = await bench.get(out, fine_side**2 + 1, size, dtype=bench.half)

    enlarged = np.kron(coarse, np.ones((fine_side // coarse_side, fine_side // coarse_side, 1), bench.half))
    same("out", actual[:-1], np.concatenate((fine, enlarged), axis=2).reshape(-1, size))
    same("rows outside", actual[-1], UNTOUCHED)
