"""gated_input.wgsl: what a layer takes of its own input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, gelu, gelu_error, same


@dataclass(frozen=True)
class Case:
    size: int
    layer: int
    layers: int
    count: int
    max_count: int
    scale: float
    half: bool


CASES = tuple(
    Case(size, layer, layers, count, max_count, scale, half)
    for half in (False, True)
    for size, layer, layers, count, max_count, scale in (
        (256, 0, 35, 3, 4, 2.0**-6),
        (256, 29, 30, 1, 1, 1.0),
        (2048, 1, 3, 2, 2, 0.25),
        (192, 4, 5, 5, 5, 2.0**-6),
        (36, 0, 1, 1, 2, 1.0),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.layer)
    gate = rng.standard_normal((case.max_count, case.size)) * 3
    inputs = rng.standard_normal((case.max_count, case.layers, case.size)) * 3
    gates = [0, 1e-4, -1e-4, 5, -5, 10.6, -10.6, 11, -11, 20, -20, 300, -300, 2e3, -2e3, -1e20]
    gate[0, : len(gates)] = gates
    inputs[0, case.layer, len(gates) - 1] = 1
    gate, inputs = gate.astype(np.float32), inputs.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.gated_input(
                bench.state(2, case.count),
                bench.put(gate),
                bench.put(inputs),
                bench.kernels.number(case.layer),
                out,
                layers=case.layers,
                size=case.size,
                scale=case.scale,
                max_count=case.max_count,
                half=case.half,
            )
        )
        actual = await bench.get(out, case.max_count, case.size, dtype=bench.half)

    x = gate[: case.count].astype(np.float64)
    told = inputs[: case.count, case.layer].astype(np.float64)
    expected = gelu(x) * told * case.scale
    tolerance = gelu_error(x) * np.abs(told) * case.scale + 2.0**-22 * np.abs(expected) + 1e-30
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, tolerance + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
