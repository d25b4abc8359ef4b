"""altup_predict.wgsl: what the streams are expected to be after a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.altup import EPS, routed, router, vectors
from tests.kernels.bench import F32, UNTOUCHED, Bench, close, normalize, same


@dataclass(frozen=True)
class Case:
    size: int
    count: int
    max_count: int
    add: bool
    half: bool  # it makes no difference


CASES = tuple(
    Case(size, count, max_count, add, half)
    for add in (False, True)
    for size, count, max_count, half in (
        (2048, 3, 4, False),
        (2048, 1, 1, True),
        (192, 5, 5, True),  # fewer vectors than threads
        (36, 4, 7, False),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    streams, y = vectors(rng, case.max_count, 4, case.size), vectors(rng, case.max_count, case.size)
    if not case.add:
        y[:] = np.nan  # it is not read
    post_weight = rng.uniform(-2, 2, case.size).astype(np.float32)
    weights = router(rng, case.size)
    coefficients = rng.standard_normal((16, 4), np.float32)
    with Bench(device, half=case.half) as bench:
        predicted, active = bench.blank(case.max_count, 4, case.size), bench.blank(case.max_count, case.size)
        bench.run(
            bench.kernels.altup_predict(
                bench.state(3, case.count),
                bench.put(streams),
                bench.put(y),
                bench.put(post_weight),
                bench.put(weights),
                bench.put(coefficients),
                predicted,
                active,
                size=case.size,
                eps=EPS,
                add=case.add,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(predicted, case.max_count, 4, case.size)
        actual_active = await bench.get(active, case.max_count, case.size)

    h = streams[: case.count].astype(np.float64)
    h_error = np.zeros_like(h)
    if case.add:
        added = normalize(y[: case.count].astype(np.float64), post_weight, EPS)[:, None]
        h_error[:, 1:] = F32 * (np.abs(h[:, 1:]) + np.abs(added))
        h[:, 1:] += added
    m, m_error = routed(h[:, 0], 0.0, weights)
    factors, factors_error = (
        np.einsum("asj,tj->tas", matrix.reshape(4, 4, 4), by)
        for matrix, by in (
            (coefficients.astype(np.float64), m),
            (np.abs(coefficients).astype(np.float64), m_error + F32 * np.abs(m)),
        )
    )
    expected = h + np.einsum("tas,tsk->tak", factors, h)
    error = F32 * np.abs(h) + h_error
    error += np.einsum("tas,tsk->tak", np.abs(factors), h_error + F32 * np.abs(h))
    error += np.einsum("tas,tsk->tak", factors_error, np.abs(h))
    close("predicted", actual[: case.count], expected, error)
    same("rows outside", actual[case.count :], UNTOUCHED)
    same("active", actual_active, actual[:, 0])
