"""cumulative_norm.wgsl: frames normed by their running moments, and the ReLU after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    bands: int
    channels: int
    count: int
    half: bool


CASES = tuple(
    Case(bands, channels, count, half)
    for half in (False, True)
    for bands, channels, count in ((64, 128, 3), (32, 32, 13), (1, 4, 1), (5, 12, 25))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.channels)
    x = rng.standard_normal((case.count + 1, case.bands, case.channels), np.float32)
    running = np.stack((rng.standard_normal(case.count + 1), rng.uniform(0.1, 30, case.count + 1)), 1)
    running = running.astype(np.float32)
    weight = rng.uniform(-2, 2, case.channels).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(*x.shape, dtype=bench.half)
        bench.run(
            bench.kernels.cumulative_norm(
                bench.state(1, case.count),
                bench.put(x),
                bench.put(running),
                bench.put(weight),
                out,
                bands=case.bands,
                channels=case.channels,
                max_count=case.count + 1,
            )
        )
        actual = await bench.get(out, *x.shape, dtype=bench.half)

    mean, scale = (running[: case.count, which, None, None].astype(np.float64) for which in (0, 1))
    values = x[: case.count].astype(np.float64)
    expected = np.maximum((values - mean) * scale * weight, 0)
    error = F32 * (np.abs(values) + np.abs(mean)) * scale * np.abs(weight)
    close("out", actual[:-1], expected, error + (F16 * expected + F16_SMALLEST if case.half else 0))
    same("rows outside", actual[-1], UNTOUCHED)
