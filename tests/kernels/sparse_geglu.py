"""sparse_geglu.wgsl: GELU of the gates that are far above the others, times up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, F32_SUM, UNTOUCHED, Bench, close, gelu, gelu_error, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    cut: float
    scale: float
    half: bool


CASES = tuple(
    Case(size, count, max_count, cut, scale, half)
    for half in (False, True)
    for size, count, max_count, cut, scale in (
        (8192, 4, 5, 1.6448536, 2.0**-6),
        (2048, 1, 1, 1.6448536, 1.0),
        (2048, 6, 6, 0.0, 1.0),
        (192, 6, 6, 1.6448536, 0.25),  # fewer vectors than threads
        (36, 6, 7, 1.0, 2.0**-6),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    gate_up = rng.standard_normal((case.max_count, 2, case.size)) * 3
    gates = gate_up[:, 0]
    gates[1:2] = 2.7  # all are equal: none is above their mean
    gates[2:3] += 300  # a mean that is far above what varies around it
    gates[3:4] *= 1e-4
    gates[4:5] = 0
    gates[4:5, case.size // 2] = 500  # one alone
    gates[5:6] -= 50  # all are below zero, yet some are let through
    gate_up = gate_up.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out_buffer = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.sparse_geglu(
                bench.state(2, case.count),
                bench.put(gate_up),
                out_buffer,
                size=case.size,
                cut=case.cut,
                scale=case.scale,
                max_count=case.max_count,
                half=case.half,
            )
        )
        actual = await bench.get(out_buffer, case.max_count, case.size, dtype=bench.half)

    gate, up = gate_up[: case.count].astype(np.float64).transpose(1, 0, 2)
    mean, deviation = gate.mean(axis=1, keepdims=True), gate.std(axis=1, keepdims=True)
    cut = mean + case.cut * deviation
    sparse = np.maximum(gate - cut, 0)
    expected = gelu(sparse) * up * case.scale
    # The sum of the gates, and each gate less their mean, are rounded where they stand. Where these differences are
    # wrong by an e, their deviation is by rms(e) at most.
    mean_error = F32_SUM * np.abs(gate).mean(axis=1, keepdims=True)
    centred_error = mean_error + F32 * (np.abs(gate) + np.abs(mean))
    deviation_error = np.sqrt(np.mean(centred_error**2, axis=1, keepdims=True)) + F32 * deviation
    cut_error = mean_error + case.cut * deviation_error + F32 * (np.abs(mean) + case.cut * deviation)
    error = cut_error + F32 * (np.abs(gate) + np.abs(cut))
    # GELU rises by 1.13 at most.
    tolerance = (1.13 * error + gelu_error(sparse)) * np.abs(up) * case.scale + 2.0**-22 * np.abs(expected)
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, tolerance + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
