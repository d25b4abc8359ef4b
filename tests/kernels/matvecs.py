"""matvecs.wgsl: a matrix times a few vectors."""

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
    count: int
    first_row: int = 0
    half: bool = False
    cpu: bool = False  # the variants for CPU adapters, if this is one


CASES = (
    *(Case(layout, 75, 768, (1, 8, 16)[layout % 3], 3, half=layout % 2 == 0) for layout in Layout),
    Case(Layout.INT4, 131, 640, 64, 8),
    Case(Layout.INT8, 7, 96, 16, 1),  # fewer blocks than lanes; scales that begin in the middle of a word
    Case(Layout.INT4, 65, 1152, 16, 13, first_row=128),
    Case(Layout.INT8_SUPER, 33, 6912, 16, 9),
    Case(Layout.INT4_SUPER, 33, 1280, 1, 5, half=True, cpu=True),
    Case(Layout.INT8, 262146, 32, 16, 2, first_row=6),  # more workgroups than a dimension of the grid may have
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows)
    period, packed = repeated_packed(rng, case.layout, case.rows, case.cols)
    most, end = case.count + 2, case.first_row + case.rows
    x = rng.standard_normal((most, case.cols), np.float32)
    with Bench(device, half=case.half, lanes=case.lanes, cpu=case.cpu) as bench:
        y = bench.blank(most, end + 5)
        part, state = bench.part(packed, case.first_row), bench.state(0, case.count)
        bench.run(bench.kernels.matvecs(part, state, bench.put(x), y, stride=end + 5, max_count=most))
        actual = await bench.get(y, most, end + 5)

    exact, magnitude = product(period, x[: case.count].astype(np.float64))
    repeat = np.arange(case.rows) % period.rows
    inside = actual[: case.count]
    close("y", inside[:, case.first_row : end], exact[:, repeat], F32_SUM * magnitude[:, repeat])
    same("vectors outside", actual[case.count :], UNTOUCHED)
    same("rows outside", inside[:, : case.first_row], UNTOUCHED)
    same("rows outside", inside[:, end:], UNTOUCHED)
