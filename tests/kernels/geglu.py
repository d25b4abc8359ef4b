"""geglu.wgsl: GELU of the gate times up."""

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
    for size, count, max_count, scale in ((2048, 3, 4, 1.0), (6912, 1, 2, 0.0625), (36, 5, 5, 0.25))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    gate_up = rng.standard_normal((case.max_count, 2, case.size)) * 3
    gates = [0, 1e-4, -1e-4, 5, -5, 10.6, -10.6, 11, -11, 20, -20, 300, -300, 2e4, -2e4]
    gate_up[0, 0, : len(gates)] = gates
    # A larger float32 than any model's, for which the cube overflows: it must not give NaN.
    gate_up[0, :, len(gates)] = -1e20, 1
    gate_up = gate_up.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out_buffer = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.geglu(
                bench.state(2, case.count),
                bench.put(gate_up),
                out_buffer,
                size=case.size,
                scale=case.scale,
                max_count=case.max_count,
                half=case.half,
            )
        )
        actual = await bench.get(out_buffer, case.max_count, case.size, dtype=bench.half)

    gate, up = gate_up[: case.count].astype(np.float64).transpose(1, 0, 2)
    expected = gelu(gate) * up * case.scale
    if case.half:  # what float16 cannot hold is infinite, or the largest number, as the driver rounds
        within = np.abs(expected) < 65504
        assert np.all(np.abs(actual[: case.count][~within].astype(np.float64)) >= 65504), "overflow"
        expected, actual[: case.count][~within] = np.where(within, expected, 0), 0
    tolerance = gelu_error(gate) * np.abs(up) * case.scale + 2.0**-22 * np.abs(expected) + 1e-30
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, tolerance + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
