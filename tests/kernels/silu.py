"""silu.wgsl: the SiLU of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, Floats, close, same


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
    for size, count, max_count, scale in ((6144, 2, 3, 2.0**-6), (512, 13, 13, 1.0), (36, 1, 2, 0.25))
)


def sigmoid(x: Floats) -> Floats:
    """The logistic function."""
    return np.exp(-np.logaddexp(0, -x))


def sigmoid_error(x: Floats) -> Floats:
    """How far a sigmoid in float32 is off at most, relative to it: exp is good to 5 + 2 |x| last places."""
    return (8 + 2 * np.minimum(np.abs(x), 80)) * 2.0**-23


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    x = rng.standard_normal((case.max_count, case.size)) * 3
    extremes = [0, 1e-4, -1e-4, 5, -5, 20, -20, 79, -79, 81, -81, 300, -300, 6e4, -6e4, -1e20]
    x[0, : len(extremes)] = extremes
    x = x.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.silu(
                bench.state(2, case.count),
                bench.put(x),
                out,
                size=case.size,
                scale=case.scale,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out, case.max_count, case.size, dtype=bench.half)

    values = x[: case.count].astype(np.float64)
    expected = values * sigmoid(values) * case.scale
    tolerance = sigmoid_error(values) * np.abs(expected) + 1e-14  # below -80, the sigmoid stays at 2e-35
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, tolerance + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
