"""softmax.wgsl: the softmax of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    half: bool
    gain: float = 1.0  # of the scores: large ones make the softmax sharp
    lanes: int | None = None


_CASES = tuple(
    case
    for half in (False, True)
    for case in (
        Case(576, 70, 72, half),
        Case(9, 5, 5, half, gain=10.0),
        Case(1, 1, 1, half),
        Case(100, 3, 4, half, gain=1000.0),  # exponentials without the highest score would not be finite
    )
)
CASES = tuple(replace(case, lanes=lanes) for case in _CASES for lanes in (None, 16))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    x = (case.gain * rng.standard_normal((case.max_count, case.size))).astype(np.float32)
    stride = -(-case.size // 32) * 32
    with Bench(device, half=case.half, lanes=case.lanes) as bench:
        out = bench.blank(case.max_count, stride, dtype=bench.half)
        bench.run(
            bench.kernels.softmax(
                bench.state(3, case.count), bench.put(x), out, size=case.size, max_count=case.max_count
            )
        )
        actual = await bench.get(out, case.max_count, stride, dtype=bench.half)

    scores = x[: case.count].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    expected = np.exp(scores)
    expected /= expected.sum(axis=1, keepdims=True)
    # WGSL's exp is good to 3 + 2 |x| units in the last place; below 1e-37 it may give 0.
    error = (8 + 4 * np.minimum(np.abs(scores), 90)) * 2.0**-23 * expected + 1e-37
    stored = F16 * expected + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count, : case.size], expected, error + stored)
    same("columns beyond", actual[: case.count, case.size :], 0)
    same("rows outside", actual[case.count :], UNTOUCHED)
