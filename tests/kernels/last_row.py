"""last_row.wgsl: the vector of a chunk's last token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import Bench, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    half: bool  # it makes no difference


CASES = (
    Case(2048, 3, 4, half=False),
    Case(4 * 2048, 1, 1, half=True),
    Case(36, 5, 5, half=False),
    Case(4, 1, 7, half=True),
)


async def check(device: Device, case: Case) -> None:
    x = np.random.default_rng(case.size).standard_normal((case.max_count, case.size)).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.size)
        bench.run(bench.kernels.last_row(bench.state(7, case.count), bench.put(x), out, size=case.size))
        same("out", await bench.get(out, case.size), x[case.count - 1])
