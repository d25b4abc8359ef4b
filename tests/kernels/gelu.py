"""gelu.wgsl: GELU, filled up with zeros."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, gelu, gelu_error, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    scale: float
    half: bool


CASES = tuple(
    Case(size, count, max_count, scale, half)
    for half in (False, True)
    for size, count, max_count, scale in ((4304, 2, 3, 1.0), (1072, 5, 5, 0.0625), (36, 1, 2, 0.25), (64, 3, 3, 1.0))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    x = rng.standard_normal((case.max_count, case.size)) * 3
    extremes = [0, 1e-4, -1e-4, 5, -5, 10.6, -10.6, 11, -11, 20, -20, 300, -300, 2e4, -2e4, -1e20]
    x[0, : len(extremes)] = extremes
    x = x.astype(np.float32)
    stride = -(-case.size // 32) * 32
    with Bench(device, half=case.half) as bench:
        out_buffer = bench.blank(case.max_count, stride, dtype=bench.half)
        bench.run(
            bench.kernels.gelu(
                bench.state(2, case.count),
                bench.put(x),
                out_buffer,
                size=case.size,
                scale=case.scale,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out_buffer, case.max_count, stride, dtype=bench.half)

    values = x[: case.count].astype(np.float64)
    expected = gelu(values) * case.scale
    tolerance = gelu_error(values) * case.scale + 2.0**-22 * np.abs(expected) + 1e-30
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count, : case.size], expected, tolerance + stored)
    same("what fills up", actual[: case.count, case.size :], 0)
    same("rows outside", actual[case.count :], UNTOUCHED)
