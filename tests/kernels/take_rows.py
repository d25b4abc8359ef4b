"""take_rows.wgsl: every so many rows, and one that fills up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import UNTOUCHED, Bench, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    rows: int
    stride: int
    half: bool  # it makes no difference


CASES = (
    Case(1536, 7, 7, 4, half=False),
    Case(36, 1, 1, 4, half=True),
    Case(2048, 7, 188, 1, half=False),
    Case(192, 12, 12, 1, half=False),
    Case(64, 1, 3, 2, half=True),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    x = rng.standard_normal((case.stride * (case.count - 1) + 1, case.size), np.float32)
    filler = rng.standard_normal((5, case.size), np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.rows + 1, case.size)
        bench.run(
            bench.kernels.take_rows(
                bench.state(3, case.count),
                bench.put(x),
                bench.put(filler),
                out,
                size=case.size,
                stride=case.stride,
                row=3,
                rows=case.rows,
            )
        )
        actual = await bench.get(out, case.rows + 1, case.size)

    same("rows that are taken", actual[: case.count], x[:: case.stride])
    same("rows that are filled", actual[case.count : case.rows], filler[3])
    same("rows outside", actual[case.rows], UNTOUCHED)
