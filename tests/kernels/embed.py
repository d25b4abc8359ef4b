"""embed.wgsl: rows of the matrix by token, scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, random_packed


@dataclass(frozen=True)
class Case:
    layout: Layout
    rows: int
    cols: int
    tokens: tuple[int, ...]
    first_row: int = 0
    scale: float = 25.298221281347036
    half: bool = False
    together: bool = False  # a token each of as many sequences
    vocabulary: int = 0  # if not the rows of this part and those before it


CASES = (
    *(Case(layout, 37, 768, (0, 36, 5, 17, 5), half=layout % 2 == 0) for layout in Layout),
    Case(Layout.INT8, 7, 96, (6, 0, 3)),  # three blocks a row: its scales begin in the middle of a word
    Case(Layout.INT4, 64, 640, (127, 64, 63, 0, 128, 100), first_row=64),
    Case(Layout.INT4_OFFSET, 100, 1152, (99, 1), scale=33.941125496954285),
    Case(Layout.INT4_SUPER, 3, 6912, (2, 0)),
    Case(Layout.INT8, 37, 640, (30, 2, 17, 2), together=True),
    # Tokens that there are none of: the part with row 0 has them, and the others leave them alone.
    Case(Layout.INT8, 37, 768, (36, 37, 2**32 - 1, 0, 38)),
    Case(Layout.F16, 64, 192, (63, 64, 100, 128, 129, 2**31), half=True, vocabulary=128),
    Case(Layout.INT4, 64, 2048, (63, 64, 127, 128, 191, 2**32 - 1, 0), first_row=64),
    Case(Layout.BF16, 37, 96, (29, 30, 36, 37), vocabulary=30),
    Case(Layout.INT8, 37, 640, (36, 37, 99, 1), together=True),
    Case(Layout.INT8, 262144, 32, (262143, 0, 65536, 131071)),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows)
    packed = random_packed(rng, case.layout, case.rows, case.cols)
    position, count = 3, len(case.tokens)
    vocabulary = case.vocabulary or case.first_row + case.rows
    with Bench(device, half=case.half) as bench:
        residual = bench.blank(count + 2, case.cols)
        part = bench.part(packed, case.first_row)
        if case.together:
            slots, positions = rng.permutation(count + 1)[:count], rng.integers(0, 9, count)
            last = np.full(count + 1, case.rows)
            last[slots] = case.tokens
            state, tokens = bench.states(positions, slots), bench.put(last, np.uint32)
            several: dict[str, Any] = {"sequences": count, "by_slot": True}
        else:
            state = bench.state(position, count)
            tokens = bench.put([*case.tokens, 0], np.uint32)
            several = {"max_count": count + 2}
        bench.run(
            bench.kernels.embed(part, state, tokens, residual, scale=case.scale, vocabulary=vocabulary, **several)
        )
        actual = await bench.get(residual, count + 2, case.cols)

    weights = packed.dequantize().astype(np.float64)
    expected = np.full(actual.shape, UNTOUCHED)
    for i, chosen in enumerate(case.tokens):
        token = chosen if chosen < vocabulary else 0
        if case.first_row <= token < case.first_row + case.rows:
            expected[i] = weights[token - case.first_row] * case.scale
    # An offset as large as the product may cancel it, so errors are relative to a row's largest weight.
    tolerance = np.where(expected == UNTOUCHED, 0, F32 * np.abs(expected).max(axis=1, keepdims=True))
    close("residual", actual, expected, tolerance)
