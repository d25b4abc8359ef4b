"""gather_patches.wgsl: what a convolution sees of each pixel, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import UNTOUCHED, Bench, same
from tests.kernels.windows import windows


@dataclass(frozen=True)
class Case:
    channels: int
    side: int
    kernel: int
    stride: int
    rows: tuple[int, int]  # of what is made: the first of the band, and the one behind its last
    half: bool


CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(64, 8, 3, 2, (0, 4), half),
        Case(32, 7, 3, 2, (1, 3), half),  # an odd side: the padding is the same on both
        Case(32, 9, 3, 1, (0, 9), half),
        Case(96, 6, 5, 2, (1, 3), half),
        Case(32, 5, 1, 1, (2, 4), half),
        Case(20, 3, 3, 1, (0, 3), half),  # columns that do not fill blocks
        Case(32, 1, 3, 1, (0, 1), half),
        Case(32, 1, 5, 2, (0, 1), half),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.channels + case.side)
    side, columns = -(-case.side // case.stride), case.kernel**2 * case.channels
    padded = -(-columns // 32) * 32
    first, last = case.rows[0] * side, case.rows[1] * side
    count = last - first
    with Bench(device, half=case.half) as bench:
        x = rng.standard_normal((case.side, case.side, case.channels)).astype(bench.half)
        out = bench.blank(count + 1, padded, dtype=bench.half)
        bench.run(
            bench.kernels.gather_patches(
                bench.state(first, count),
                bench.put(x, bench.half),
                out,
                channels=case.channels,
                side=case.side,
                kernel=case.kernel,
                stride=case.stride,
                max_count=count,
            )
        )
        actual = await bench.get(out, count + 1, padded, dtype=bench.half)

    expected = windows(x, case.kernel, case.stride).reshape(side * side, -1)[first:last]
    same("out", actual[:-1, :columns], expected)
    same("columns beyond", actual[:-1, columns:], 0)
    same("rows outside", actual[-1], UNTOUCHED)
