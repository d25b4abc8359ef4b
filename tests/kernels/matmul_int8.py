"""matmul_int8.wgsl: a matrix times the vectors of a prompt's tokens, in products of 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, close, product, random_packed, same

INTEGERS = (Layout.INT8, Layout.INT8_SUPER, Layout.INT4, Layout.INT4_OFFSET, Layout.INT4_SUPER)


@dataclass(frozen=True)
class Case:
    layout: Layout
    rows: int
    cols: int
    counts: tuple[int, ...]
    max_count: int
    half: bool = False
    first_row: int = 0
    scale: float = 1.0
    cpu: bool = True  # the variants for CPU adapters, if this is one


_CASES = (
    *(Case(layout, 75, 256, (1, 33), 40) for layout in INTEGERS),
    Case(Layout.INT8, 7, 96, (3,), 3),  # scales that begin in the middle of a word
    Case(Layout.INT4, 130, 640, (32, 64, 65), 70, half=True, first_row=64),
    Case(Layout.INT4_OFFSET, 64, 1152, (31,), 32, scale=4.0),
    Case(Layout.INT8_SUPER, 66, 6912, (5,), 33, first_row=2, scale=16.0),
)
CASES = tuple(replace(case, cpu=cpu) for case in _CASES for cpu in (True, False))


async def check(device: Device, case: Case) -> None:
    """Against the product with what the integers stand for: how far that is from x is a matter of quantize.wgsl."""
    rng = np.random.default_rng(case.rows + case.cols)
    packed = random_packed(rng, case.layout, case.rows, case.cols)
    stride = case.first_row + case.rows + 3
    columns = slice(case.first_row, case.first_row + case.rows)
    blocks = case.max_count, case.cols // 32
    q = rng.integers(-127, 128, (*blocks, 32), np.int8)
    d = rng.uniform(0.001, 0.1, blocks).astype(np.float32)
    factors = np.stack((d, d * q.sum(axis=2, dtype=np.int64).astype(np.float32)), axis=2)
    with Bench(device, half=case.half, cpu=case.cpu) as bench:
        q_buffer, factors_buffer, part = bench.put(q, np.int8), bench.put(factors), bench.part(packed, case.first_row)
        results = []
        for count in case.counts:
            y = bench.blank(case.max_count, stride)
            bench.run(
                bench.kernels.matmul_int8(
                    part,
                    bench.state(4, count),
                    q_buffer,
                    factors_buffer,
                    y,
                    stride=stride,
                    scale=case.scale,
                    max_count=case.max_count,
                )
            )
            results.append(await bench.get(y, case.max_count, stride))

    x = (q * d[..., None].astype(np.float64)).reshape(case.max_count, case.cols)
    exact, magnitude = product(packed, x)
    for count, actual in zip(case.counts, results, strict=True):
        tolerance = F32_SUM * magnitude[:count] * case.scale
        close("y", actual[:count, columns], exact[:count] * case.scale, tolerance)
        same("rows outside", actual[count:], UNTOUCHED)
        outside = np.delete(actual, np.arange(stride)[columns], axis=1)
        same("columns outside", outside, UNTOUCHED)
