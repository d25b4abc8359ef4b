"""matvec.wgsl: a matrix times a vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, close, product, repeated_packed, same


@dataclass(frozen=True)
class Case:
    layout: Layout
    rows: int
    cols: int
    lanes: int
    first_row: int = 0
    half: bool = False
    cpu: bool = True  # the variants for CPU adapters, if this is one


CASES = (
    *(Case(layout, 75, 768, (1, 8, 16)[layout % 3], half=layout % 2 == 0) for layout in Layout),
    Case(Layout.INT4, 131, 640, 8),
    Case(Layout.INT8, 7, 96, 16),  # fewer blocks than lanes; scales that begin in the middle of a word
    Case(Layout.INT4, 65, 1152, 16, first_row=128),
    Case(Layout.INT4_SUPER, 129, 6912, 1, first_row=2),
    Case(Layout.INT8_SUPER, 33, 6912, 16),
    Case(Layout.INT8_SUPER, 34, 1280, 1, cpu=False),
    Case(Layout.INT4, 262144, 640, 1),
    Case(Layout.INT8, 262146, 32, 16, first_row=6),  # more workgroups than a dimension of the grid may have
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows)
    period, packed = repeated_packed(rng, case.layout, case.rows, case.cols)
    x = rng.standard_normal(case.cols, np.float32)
    end = case.first_row + case.rows
    with Bench(device, half=case.half, lanes=case.lanes, cpu=case.cpu) as bench:
        y = bench.blank(end + 5)
        bench.run(bench.kernels.matvec(bench.part(packed, case.first_row), bench.put(x), y))
        actual = await bench.get(y, end + 5)

    exact, magnitude = (np.resize(a, case.rows) for a in product(period, x[None].astype(np.float64)))
    close("y", actual[case.first_row : end], exact, F32_SUM * magnitude)
    same("rows outside", actual[: case.first_row], UNTOUCHED)
    same("rows outside", actual[end:], UNTOUCHED)
