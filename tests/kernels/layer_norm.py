"""layer_norm.wgsl: LayerNorm of a residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    add: bool
    half: bool
    offset: float = 0.0  # of all values: a mean that is far above what varies around it


CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(1152, 3, 5, add=True, half=half),
        Case(1152, 1, 1, add=False, half=half),
        Case(288, 4, 4, add=True, half=half),
        Case(32, 7, 8, add=True, half=half),  # fewer vectors than threads
        Case(288, 2, 2, add=False, half=half, offset=300.0),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    eps, shape = 1e-6, (case.max_count, case.size)
    residual = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 100, 1) + case.offset
    residual[0] = 1e-4 * rng.standard_normal(case.size)  # eps decides
    y = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2, (case.max_count, 1))
    y[0] *= 1e-4
    norm = rng.uniform(-2, 2, (2, case.size))
    residual, y, norm = residual.astype(np.float32), y.astype(np.float32), norm.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        residual_buffer = bench.put(residual)
        out_buffer = bench.blank(*shape, dtype=bench.half)
        bench.run(
            bench.kernels.layer_norm(
                bench.state(11, case.count),
                residual_buffer,
                bench.put(y),
                bench.put(norm),
                out_buffer,
                size=case.size,
                eps=eps,
                add=case.add,
                max_count=case.max_count,
            )
        )
        actual_residual = await bench.get(residual_buffer, *shape)
        actual = await bench.get(out_buffer, *shape, dtype=bench.half)

    expected = residual.astype(np.float64)
    if case.add:
        expected[: case.count] += y[: case.count]
    close("residual", actual_residual, expected, 2.0**-23 * np.abs(expected))

    x = expected[: case.count]
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + eps)
    out = centred * scale * norm[0] + norm[1]
    # The mean and each value are rounded where they stand, however little varies around them.
    error = F32 * np.abs(out) + F32 * (np.abs(x) + np.abs(x).mean(axis=1, keepdims=True)) * scale * np.abs(norm[0])
    error += F32 * np.abs(norm[1])
    stored = F16 * np.abs(out) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], out, error + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
