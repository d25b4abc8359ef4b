"""block_end.wgsl: what a block made is normed or scaled, and added to what came in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, normalize, same

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    size: int
    first: int  # where the band begins
    count: int
    max_count: int
    normed: bool
    add: bool
    copy: bool
    half: bool
    scale: float = 1.0
    lanes: int | None = None


_CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(128, 0, 70, 70, normed=True, add=True, copy=True, half=half, scale=2.0**-6),
        Case(96, 4, 5, 7, normed=True, add=False, copy=True, half=half),
        Case(640, 1, 2, 2, normed=False, add=True, copy=True, half=half, scale=2.0**-6),
        Case(32, 0, 1, 1, normed=True, add=True, copy=False, half=half),
        Case(1280, 2, 3, 3, normed=False, add=False, copy=True, half=half),
    )
)
CASES = tuple(replace(case, lanes=lanes) for case in _CASES for lanes in (None, 16))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    pixels = case.first + case.max_count + 2
    y = (rng.standard_normal((case.max_count, case.size)) * 10.0).astype(np.float32)
    y[0] *= 1e-5  # eps decides
    weight = rng.uniform(-2, 2, case.size).astype(np.float32)
    residual = (100 * rng.standard_normal((pixels, case.size))).astype(np.float32)
    with Bench(device, half=case.half, lanes=case.lanes) as bench:
        out, copy = bench.blank(pixels, case.size), bench.blank(pixels, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.block_end(
                bench.state(case.first, case.count),
                bench.put(y),
                bench.put(np.stack((weight, np.zeros_like(weight)))),
                bench.put(residual) if case.add else None,
                out,
                copy if case.copy else None,
                size=case.size,
                eps=EPS if case.normed else None,
                scale=case.scale,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out, pixels, case.size)
        actual_copy = await bench.get(copy, pixels, case.size, dtype=bench.half)

    band = slice(case.first, case.first + case.count)
    made = y[: case.count].astype(np.float64)
    made = normalize(made, weight, EPS) if case.normed else made * weight
    expected = made + (residual[band] if case.add else 0)
    error = F32 * np.abs(made) + 2.0**-23 * np.abs(expected)
    close("out", actual[band], expected, error)
    stored = F16 * np.abs(expected) * case.scale + F16_SMALLEST if case.half else 0
    if case.copy:
        close("copy", actual_copy[band], expected * case.scale, error * case.scale + stored)
    same("pixels outside", np.delete(actual, band, axis=0), UNTOUCHED)
    same("copies outside", np.delete(actual_copy, band, axis=0) if case.copy else actual_copy, UNTOUCHED)
