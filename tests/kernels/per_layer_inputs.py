"""per_layer_inputs.wgsl: what each layer is told of each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, normalize, same


@dataclass(frozen=True)
class Case:
    layers: int
    size: int
    count: int
    max_count: int
    half: bool  # it makes no difference
    eps: float = 1e-6
    scale: float = 16.0


CASES = (
    Case(35, 256, 3, 4, half=False),
    Case(30, 256, 1, 1, half=True, eps=1e-6 * 1536),  # of a context that is not scaled
    Case(1, 2048, 2, 3, half=True, scale=1.0),
    Case(5, 192, 5, 5, half=False),  # fewer vectors than threads
    Case(3, 36, 2, 2, half=True, scale=6.0),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    shape = case.max_count, case.layers, case.size
    context = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 5, (*shape[:2], 1))
    context[0, 0] = case.eps**0.5 * rng.standard_normal(case.size)  # eps decides
    context[case.count - 1, -1] = 0 if case.layers > 1 else context[case.count - 1, -1]
    rows = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 2, (*shape[:2], 1))
    context, rows = context.astype(np.float32), rows.astype(np.float32)
    weight = rng.uniform(-2, 2, case.size).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(*shape)
        bench.run(
            bench.kernels.per_layer_inputs(
                bench.state(3, case.count),
                bench.put(context),
                bench.put(rows),
                bench.put(weight),
                out,
                layers=case.layers,
                size=case.size,
                scale=case.scale,
                eps=case.eps,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out, *shape)

    normed = normalize(context[: case.count].astype(np.float64), weight, case.eps)
    told = case.scale * rows[: case.count].astype(np.float64)
    error = F32 * (np.abs(normed) + np.abs(told)) / np.sqrt(2)
    close("out", actual[: case.count], (normed + told) / np.sqrt(2), error)
    same("rows outside", actual[case.count :], UNTOUCHED)
