"""rms_norm.wgsl: the residual stream's norms of a prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, normalize, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    add: bool
    half: bool
    last: bool = False
    scaled: bool = False
    plain: bool = False


CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(640, 3, 5, add=True, half=half),
        Case(1152, 1, 1, add=False, half=half),
        Case(1152, 4, 4, add=True, half=half),
        Case(640, 5, 1, add=True, half=half, last=True),
        Case(32, 7, 8, add=True, half=half),  # fewer vectors than threads
        Case(2048, 3, 4, add=True, half=half, scaled=True),
        Case(192, 5, 5, add=True, half=half, scaled=True),
        Case(36, 4, 1, add=True, half=half, last=True, scaled=True),
        Case(1536, 3, 4, add=True, half=half, plain=True),
        Case(36, 2, 2, add=True, half=half, scaled=True, plain=True),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    eps, factor, rows = 1e-6, 0.37, max(case.count, case.max_count)
    shape = rows, case.size
    residual = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 1e5, 1)
    residual[0] = 0 if not case.add else 1e-5  # eps decides
    y = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, (rows, 1))
    norms = rng.uniform(-2, 2, 2 * case.size)
    if case.scaled:
        norms = np.append(norms, factor)
    residual, y, norms = residual.astype(np.float32), y.astype(np.float32), norms.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        residual_buffer = bench.put(residual)
        out_buffer = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.rms_norm(
                bench.state(11, case.count),
                residual_buffer,
                bench.put(y),
                bench.put(norms),
                out_buffer,
                size=case.size,
                eps=eps,
                add=case.add,
                scaled=case.scaled,
                plain=case.plain,
                max_count=case.max_count,
                last=case.last,
            )
        )
        actual_residual = await bench.get(residual_buffer, *shape)
        actual = await bench.get(out_buffer, case.max_count, case.size, dtype=bench.half)

    post_weight, weight = norms[: case.size], norms[case.size : 2 * case.size]
    expected, error = residual.astype(np.float64), np.zeros(shape)
    tokens = slice(case.count - 1 if case.last else 0, case.count)
    count = tokens.stop - tokens.start
    if case.add:
        added = y[tokens].astype(np.float64)
        if not case.plain:
            added = normalize(added, post_weight, eps)
        if case.scaled:
            expected[tokens] *= norms[-1]
        error[tokens] = F32 * (np.abs(expected[tokens]) + np.abs(added))
        expected[tokens] += added
    close("residual", actual_residual, expected, error)

    out = normalize(expected[tokens], weight, eps)
    scale = np.abs(weight) / np.sqrt(np.mean(expected[tokens] ** 2, 1, keepdims=True) + eps)
    stored = F16 * np.abs(out) + F16_SMALLEST if case.half else 0
    close("out", actual[:count], out, F32 * np.abs(out) + error[tokens] * scale + stored)
    same("rows outside", actual[count:], UNTOUCHED)
