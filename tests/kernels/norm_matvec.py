"""norm_matvec.wgsl: a matrix times the norm of the residual, with what comes before and after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from tests.kernels.bench import F32, F32_SUM, UNTOUCHED, Bench, close, gelu, normalize, product, random_packed, same


@dataclass(frozen=True)
class Case:
    """`rows` are those of the result: GEGLU takes twice as many."""

    layout: Layout
    rows: int
    cols: int
    lanes: int
    add: bool
    geglu: bool = False
    scaled: bool = False
    normed: bool = True
    first_row: int = 0
    half: bool = False
    cpu: bool = True  # the variants for CPU adapters, if this is one


CASES = (
    *(
        Case(layout, 70, 768, (16, 1, 8)[layout % 3], add=layout % 2 == 0, geglu=layout % 4 < 2, half=layout > 3)
        for layout in Layout
    ),
    Case(Layout.INT8, 130, 640, 1, add=True),
    Case(Layout.INT4, 64, 1152, 16, add=True, geglu=True),
    Case(Layout.INT8, 70, 640, 1, add=True, geglu=True, cpu=False),
    Case(Layout.INT4, 67, 1152, 8, add=False, first_row=64),
    Case(Layout.INT8, 70, 2048, 1, add=True, scaled=True),
    Case(Layout.INT4, 65, 192, 16, add=True, scaled=True, geglu=True, half=True),
    Case(Layout.INT4, 70, 1536, 1, add=True, normed=False),
    Case(Layout.BF16, 33, 192, 8, add=True, scaled=True, normed=False, first_row=7),
    Case(Layout.INT8, 256, 640, 1, add=False, normed=False, half=True, cpu=False),
    Case(Layout.INT8, 262147, 32, 16, add=True),  # more workgroups than a dimension of the grid may have
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows)
    matrix_rows = 2 * case.rows if case.geglu else case.rows
    packed = random_packed(rng, case.layout, matrix_rows, case.cols)
    eps = 1e-6
    # Float16 does not hold the residual of a Gemma 3: it reaches 1e5.
    residual = rng.standard_normal(case.cols) * np.where(rng.random(case.cols) < 0.02, 1e5, 1)
    previous = rng.standard_normal(case.cols) * 1e-3  # small: eps shows
    norms = rng.uniform(-2, 2, 2 * case.cols)
    if case.scaled:
        norms = np.append(norms, 0.37)
    residual, previous, norms = residual.astype(np.float32), previous.astype(np.float32), norms.astype(np.float32)
    end = case.first_row + case.rows
    with Bench(device, half=case.half, lanes=case.lanes, cpu=case.cpu) as bench:
        new_residual, y = bench.blank(2, case.cols), bench.blank(end + 5)
        bench.run(
            bench.kernels.norm_matvec(
                bench.part(packed, case.first_row),
                bench.put(residual),
                bench.put(previous),
                bench.put(norms),
                new_residual,
                y,
                eps=eps,
                add=case.add,
                scaled=case.scaled,
                normed=case.normed,
                geglu=case.geglu,
            )
        )
        actual_residual = await bench.get(new_residual, 2, case.cols)
        actual = await bench.get(y, end + 5)

    post_weight, weight = norms[: case.cols], norms[case.cols : 2 * case.cols]
    last, before = residual.astype(np.float64), previous.astype(np.float64)
    added = normalize(before, post_weight, eps)
    if case.add:
        if case.scaled:
            last = last * norms[-1]
        close("new_residual", actual_residual[0], last + added, F32 * (np.abs(last) + np.abs(added)))
        last = last + added
    else:
        same("new_residual", actual_residual[0], UNTOUCHED)
    same("new_residual's other rows", actual_residual[1:], UNTOUCHED)

    x = normalize(last, weight, eps) if case.normed else last
    sums, magnitude = (a[0] for a in product(packed, x[None]))
    tolerance = (F32_SUM + F32) * magnitude
    if case.geglu:
        gate, up = sums[: case.rows], sums[case.rows :]
        sums = gelu(gate) * up
        # |gelu'| is at most 1.13; exp is good to 5 + 2 |x| units in the last place.
        gelu_error = 1.13 * tolerance[: case.rows] + (20 + 4 * np.abs(gate) ** 3) * 2.0**-24 * np.abs(gelu(gate))
        tolerance = gelu_error * np.abs(up) + tolerance[case.rows :] * (np.abs(gelu(gate)) + gelu_error)
    close("y", actual[case.first_row : end], sums, tolerance)
    same("rows outside", actual[: case.first_row], UNTOUCHED)
    same("rows outside", actual[end:], UNTOUCHED)
