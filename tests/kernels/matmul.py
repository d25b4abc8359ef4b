"""matmul.wgsl: a matrix times the vectors of a prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from tests.kernels.bench import F16, F32, F32_SUM, UNTOUCHED, Bench, close, product, random_packed, same


@dataclass(frozen=True)
class Case:
    layout: Layout
    rows: int
    cols: int
    counts: tuple[int, ...]
    max_count: int
    half: bool
    first_row: int = 0
    scale: float = 1.0
    bias: bool = False
    cpu: bool = True  # the variants for CPU adapters, if this is one


_CASES = (
    *(Case(layout, 75, 256, (1, 33), 40, half) for half in (False, True) for layout in Layout),
    Case(Layout.INT8, 75, 256, (1,), 1, half=False, bias=True),
    Case(Layout.INT4, 75, 256, (1, 2), 2, half=False),
    Case(Layout.INT8, 7, 96, (3,), 3, half=False),  # scales that begin in the middle of a word
    Case(Layout.INT4, 130, 640, (32, 64, 65), 70, half=True, first_row=64, bias=True),
    Case(Layout.INT4_OFFSET, 64, 1152, (31,), 32, half=False, scale=4.0, bias=True),
    Case(Layout.INT8_SUPER, 66, 6912, (5,), 33, half=True, first_row=2, scale=16.0),
)
CASES = tuple(replace(case, cpu=cpu) for case in _CASES for cpu in (True, False))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows + case.cols)
    packed = random_packed(rng, case.layout, case.rows, case.cols)
    stride = case.first_row + case.rows + 3
    columns = slice(case.first_row, case.first_row + case.rows)
    with Bench(device, half=case.half, cpu=case.cpu) as bench:
        x = rng.standard_normal((case.max_count, case.cols)).astype(bench.half)
        x_buffer, part = bench.put(x, bench.half), bench.part(packed, case.first_row)
        bias = (100 * rng.standard_normal(stride)).astype(np.float32)
        bias_buffer = bench.put(bias) if case.bias else None
        results = []
        for count in case.counts:
            y = bench.blank(case.max_count, stride)
            state = bench.state(4, count)
            bench.run(
                bench.kernels.matmul(
                    part,
                    state,
                    x_buffer,
                    y,
                    stride=stride,
                    scale=case.scale,
                    bias=bias_buffer,
                    max_count=case.max_count,
                )
            )
            results.append(await bench.get(y, case.max_count, stride))

    exact, magnitude = product(packed, x.astype(np.float64))
    tolerance = F32_SUM * magnitude
    if case.half:
        # The weights of a tile are rounded to float16, each on its own: the errors add up as squares do.
        squares = x.astype(np.float64) ** 2 @ packed.dequantize().T.astype(np.float64) ** 2
        tolerance += 4 * F16 * np.sqrt(squares)
    for count, actual in zip(case.counts, results, strict=True):
        expected, error = exact[:count] * case.scale, tolerance[:count] * case.scale
        if case.bias:
            expected, error = expected + bias[columns], error + F32 * np.abs(bias[columns])
        close("y", actual[:count, columns], expected, error)
        same("rows outside", actual[count:], UNTOUCHED)
        outside = np.delete(actual, np.arange(stride)[columns], axis=1)
        same("columns outside", outside, UNTOUCHED)
