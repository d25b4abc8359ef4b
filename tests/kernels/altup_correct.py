"""altup_correct.wgsl: the streams after a layer, from what was expected and what it computed."""

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
    half: bool  # it makes no difference


CASES = (
    Case(2048, 3, 4, half=False),
    Case(2048, 1, 1, half=True),
    Case(192, 5, 5, half=True),  # fewer vectors than threads
    Case(36, 4, 7, half=False),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size + case.count)
    predicted = vectors(rng, case.max_count, 4, case.size)
    residual, y = vectors(rng, case.max_count, case.size), vectors(rng, case.max_count, case.size)
    y[0] *= 1e-3  # so that eps decides of their sum, too
    weights = rng.uniform(-2, 2, (2, case.size)).astype(np.float32)
    router_weights = router(rng, case.size)
    coefficients = rng.standard_normal((4, 4), np.float32)
    with Bench(device, half=case.half) as bench:
        streams, first = bench.put(predicted), bench.blank(case.max_count, case.size)
        bench.run(
            bench.kernels.altup_correct(
                bench.state(3, case.count),
                bench.put(residual),
                bench.put(y),
                bench.put(weights),
                bench.put(router_weights),
                bench.put(coefficients),
                streams,
                first,
                size=case.size,
                eps=EPS,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(streams, case.max_count, 4, case.size)
        actual_first = await bench.get(first, case.max_count, case.size)

    before, x = predicted[: case.count].astype(np.float64), residual[: case.count].astype(np.float64)
    added = normalize(y[: case.count].astype(np.float64), weights[0], EPS)
    x_error = F32 * (np.abs(x) + np.abs(added))
    x = x + added
    m, m_error = routed(x, x_error, router_weights)
    factors = m @ coefficients.T.astype(np.float64) + 1
    factors_error = (m_error + F32 * np.abs(m)) @ np.abs(coefficients.T) + F32
    innovation = (x - before[:, 0])[:, None]
    innovation_error = (x_error + F32 * (np.abs(x) + np.abs(before[:, 0])))[:, None]
    step = factors[:, :, None] * innovation
    error = F32 * (np.abs(before) + np.abs(step))
    error += np.abs(factors)[:, :, None] * innovation_error + factors_error[:, :, None] * np.abs(innovation)
    expected = before + step
    close("streams", actual[: case.count], expected, error)
    same("streams outside", actual[case.count :], predicted[case.count :])

    scaled = expected[:, 0] * weights[1]
    close("first", actual_first[: case.count], scaled, error[:, 0] * np.abs(weights[1]) + F32 * np.abs(scaled))
    same("rows outside", actual_first[case.count :], UNTOUCHED)
