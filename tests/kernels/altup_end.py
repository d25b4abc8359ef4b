"""altup_end.wgsl: the mean of the four streams after the last layer."""

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
    ys = rng.standard_normal((3, case.max_count, case.size)) * 10.0 ** rng.integers(-2, 5, (3, case.max_count, 1))
    ys[:, 0] *= [[0], [1e-12], [1]]  # zeros, and a length under the floor
    ys[0, 1:2] = 0
    ys[1, -1] = FLOOR**0.5 * np.where(rng.random(case.size) < 0.5, -0.9, 0.9)  # just under it
    ys = ys.astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.max_count, case.size)
        bench.run(
            bench.kernels.altup_end(
                bench.state(3, case.count),
                bench.put(x),
                [bench.put(y) for y in ys],
                out,
                size=case.size,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out, case.max_count, case.size)

    first, others = x[: case.count].astype(np.float64), ys[:, : case.count].astype(np.float64)
    squares = np.mean(others**2, axis=2, keepdims=True)
    others *= np.sqrt(np.mean(first**2, axis=1, keepdims=True) / np.maximum(squares, FLOOR))
    expected = (first + others.sum(axis=0)) / 4
    # There are two lengths in each of the others.
    close("out", actual[: case.count], expected, 2 * F32 * (np.abs(first) + np.abs(others).sum(axis=0)) / 4)
    same("rows outside", actual[case.count :], UNTOUCHED)
