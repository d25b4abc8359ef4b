"""altup_begin.wgsl: the four streams at the first layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.altup import FLOOR, vectors
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    half: bool  # it makes no difference


CASES = (
    Case(2048, 3, 4, half=False),
    Case(2048, 1, 1, half=True),
    Case(192, 5, 5, half=True),  # fewer vectors than threads
    Case(36, 4, 7, half=False),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    x = vectors(rng, case.max_count, case.size)  # token 1 is zero
    y = rng.standard_normal((case.max_count, 3, case.size)) * 10.0 ** rng.integers(-2, 5, (case.max_count, 3, 1))
    y[0] *= [[0], [1e-12], [1]]  # zeros, and a length under the floor
    y[1:2, 0] = 0
    y[-1, 1] = FLOOR**0.5 * np.where(rng.random(case.size) < 0.5, -0.9, 0.9)  # just under it
    y = y.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        streams = bench.blank(case.max_count, 4, case.size)
        bench.run(
            bench.kernels.altup_begin(
                bench.state(3, case.count),
                bench.put(x),
                bench.put(y),
                streams,
                size=case.size,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(streams, case.max_count, 4, case.size)

    same("stream 0", actual[: case.count, 0], x[: case.count])
    first, others = x[: case.count, None].astype(np.float64), y[: case.count].astype(np.float64)
    squares = np.mean(others**2, axis=2, keepdims=True)
    expected = others * np.sqrt(np.mean(first**2, axis=2, keepdims=True) / np.maximum(squares, FLOOR))
    # There are two lengths.
    close("other streams", actual[: case.count, 1:], expected, 2 * F32 * np.abs(expected))
    same("rows outside", actual[case.count :], UNTOUCHED)
