"""softcap.wgsl: logits inside of a cap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import UNTOUCHED, Bench, close, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    cap: float
    half: bool  # it makes no difference


CASES = (
    Case(262144, 1, 1, 30.0, half=False),
    Case(1000, 3, 5, 30.0, half=True),
    Case(64, 4, 4, 50.0, half=False),
    Case(37, 2, 3, 1.0, half=True),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    logits = rng.standard_normal((case.max_count, case.size)) * 10.0 ** rng.integers(
        -3, 4, (case.max_count, case.size)
    )
    extremes = [0, 1e-6, 1e-30, 1, 29.9, 30, 600, 601, 1e4, 3e38, np.inf]
    logits[0, : 2 * len(extremes)] = [*extremes, *(-x for x in extremes)]
    logits = logits.astype(np.float32)
    logits[case.count :] = UNTOUCHED
    with Bench(device, half=case.half) as bench:
        buffer = bench.put(logits)
        bench.run(
            bench.kernels.softcap(
                bench.state(2, case.count), buffer, size=case.size, cap=case.cap, max_count=case.max_count
            )
        )
        actual = await bench.get(buffer, case.max_count, case.size)

    z = logits[: case.count].astype(np.float64) / case.cap
    capped = np.tanh(z)
    # With e = exp(-2 |z|) it is (1 - e) / (1 + e), which changes by 2 / (1 + e)^2 with e. The exp is good to
    # 3 + 4 |z| units of 2^-23 at most, and e moves by twice the 2.5 units that z is good to. 1 - e is rounded
    # absolutely.
    size = np.minimum(np.abs(z), 20)
    e = np.exp(-2 * size)
    tolerance = 2 * e / (1 + e) ** 2 * (6 + 18 * size) + 1 + 8 * np.abs(capped)
    close("logits", actual[: case.count], case.cap * capped, case.cap * 2.0**-24 * tolerance)
    same("rows outside", actual[case.count :], UNTOUCHED)
