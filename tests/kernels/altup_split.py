"""altup_split.wgsl: the streams by themselves after the last layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.altup import EPS, vectors
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, normalize, same


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
    streams, y = vectors(rng, case.max_count, 4, case.size), vectors(rng, case.max_count, case.size)
    weight = rng.uniform(-2, 2, case.size).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        outs = [bench.blank(case.max_count, case.size) for _ in range(4)]
        bench.run(
            bench.kernels.altup_split(
                bench.state(3, case.count),
                bench.put(streams),
                bench.put(y),
                bench.put(weight),
                outs,
                size=case.size,
                eps=EPS,
                max_count=case.max_count,
            )
        )
        actual = np.stack([await bench.get(out, case.max_count, case.size) for out in outs], axis=1)

    before = streams[: case.count].astype(np.float64)
    same("stream 0", actual[: case.count, 0], before[:, 0])
    added = normalize(y[: case.count].astype(np.float64), weight, EPS)[:, None]
    error = F32 * (np.abs(before[:, 1:]) + np.abs(added))
    close("other streams", actual[: case.count, 1:], before[:, 1:] + added, error)
    same("rows outside", actual[case.count :], UNTOUCHED)
