"""depthwise.wgsl: a convolution of each channel by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, close, same
from tests.kernels.windows import windows


@dataclass(frozen=True)
class Case:
    channels: int
    side: int
    kernel: int
    stride: int
    rows: tuple[int, int]  # of what is made: the first of the band, and the one behind its last
    half: bool
    scale: float = 1.0


CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(128, 8, 3, 1, (0, 8), half),
        Case(96, 8, 5, 2, (0, 4), half, scale=64.0),
        Case(32, 8, 3, 2, (1, 4), half, scale=64.0),
        Case(32, 7, 5, 2, (0, 4), half),  # an odd side: the padding is the same on both
        Case(288, 6, 5, 1, (2, 5), half),  # more vectors than a workgroup has threads
        Case(32, 1, 3, 2, (0, 1), half),
        Case(32, 1, 5, 1, (0, 1), half),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.channels + case.side)
    side = -(-case.side // case.stride)
    first, last = case.rows[0] * side, case.rows[1] * side
    count = last - first
    weight = rng.standard_normal((case.channels, case.kernel, case.kernel)).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        x = rng.standard_normal((case.side, case.side, case.channels)).astype(bench.half)
        out = bench.blank(count + 1, case.channels)
        bench.run(
            bench.kernels.depthwise(
                bench.state(first, count),
                bench.put(x, bench.half),
                bench.put(weight.reshape(case.channels, -1).T),
                out,
                channels=case.channels,
                side=case.side,
                kernel=case.kernel,
                stride=case.stride,
                scale=case.scale,
                max_count=count,
                half=case.half,
            )
        )
        actual = await bench.get(out, count + 1, case.channels)

    seen = windows(x.astype(np.float64), case.kernel, case.stride)[first:last]
    expected = (seen * weight).sum(axis=(2, 3)) * case.scale
    magnitude = np.abs(seen * weight).sum(axis=(2, 3)) * case.scale
    close("out", actual[:-1], expected, F32_SUM * magnitude)
    same("rows outside", actual[-1], UNTOUCHED)
