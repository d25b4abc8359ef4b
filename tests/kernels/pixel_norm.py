"""pixel_norm.wgsl: RMSNorm of pixels, and GELU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, gelu, gelu_error, normalize, same

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    size: int
    first: int  # where the band begins
    count: int
    max_count: int
    gelu: bool
    half: bool
    scale: float = 1.0
    lanes: int | None = None


_CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(64, 0, 75, 75, gelu=True, half=half, scale=2.0**-6),
        Case(768, 5, 3, 4, gelu=True, half=half),
        Case(32, 3, 1, 1, gelu=False, half=half, scale=2.0**-6),  # one pixel, with fewer vectors than threads
        Case(3840, 0, 2, 2, gelu=False, half=half),
    )
)
CASES = tuple(replace(case, lanes=lanes) for case in _CASES for lanes in (None, 16))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    shape, pixels = (case.max_count, case.size), case.first + case.max_count + 2
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 4, (case.max_count, 1))).astype(np.float32)
    x[0] = 1e-4 * rng.standard_normal(case.size)  # eps decides
    weight = rng.uniform(-2, 2, case.size).astype(np.float32)
    with Bench(device, half=case.half, lanes=case.lanes) as bench:
        out = bench.blank(pixels, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.pixel_norm(
                bench.state(case.first, case.count),
                bench.put(x),
                bench.put(np.stack((weight, np.zeros_like(weight)))),
                out,
                size=case.size,
                eps=EPS,
                gelu=case.gelu,
                scale=case.scale,
                max_count=case.max_count,
                half=case.half,
            )
        )
        actual = await bench.get(out, pixels, case.size, dtype=bench.half)

    expected = normalize(x[: case.count].astype(np.float64), weight, EPS)
    error = F32 * np.abs(expected)
    if case.gelu:
        error, expected = 1.2 * error + gelu_error(expected), gelu(expected)  # GELU is nowhere steeper than 1.13
    expected, error = expected * case.scale, error * case.scale
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    band = slice(case.first, case.first + case.count)
    close("out", actual[band], expected, error + stored)
    same("pixels outside", np.delete(actual, band, axis=0), UNTOUCHED)
