"""laurel.wgsl: an attention beside its learned augmented residual."""

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
    half: bool


CASES = tuple(
    Case(size, count, max_count, half)
    for half in (False, True)
    for size, count, max_count in ((2048, 3, 4), (2048, 1, 1), (192, 5, 5), (36, 4, 7))
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    shape = case.max_count, case.size
    residual, y, low = (vectors(rng, *shape) for _ in range(3))
    y[2:3] = 0  # one of the two alone
    norms = rng.uniform(-2, 2, (2, case.size)).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        normed = (rng.standard_normal(shape) * 10).astype(bench.half)
        out = bench.blank(*shape)
        bench.run(
            bench.kernels.laurel(
                bench.state(3, case.count),
                bench.put(residual),
                bench.put(y),
                bench.put(normed, bench.half),
                bench.put(low),
                bench.put(norms),
                out,
                size=case.size,
                eps=EPS,
                max_count=case.max_count,
                half=case.half,
            )
        )
        actual = await bench.get(out, *shape)

    terms = [
        residual[: case.count].astype(np.float64),
        normalize(y[: case.count].astype(np.float64), norms[0], EPS),
        normed[: case.count].astype(np.float64),
        normalize(low[: case.count].astype(np.float64), norms[1], EPS),
    ]
    error = F32 * np.sum(np.abs(terms), axis=0) / np.sqrt(2)
    close("out", actual[: case.count], np.sum(terms, axis=0) / np.sqrt(2), error)
    same("rows outside", actual[case.count :], UNTOUCHED)
