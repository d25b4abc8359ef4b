"""light_convolution.wgsl: gate, convolution over time, norm and SiLU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32_SUM, UNTOUCHED, Bench, close, normalize, same
from tests.kernels.silu import sigmoid


@dataclass(frozen=True)
class Case:
    size: int
    taps: int
    count: int
    max_count: int
    half: bool


CASES = tuple(
    Case(size, taps, count, max_count, half)
    for half in (False, True)
    for size, taps, count, max_count in (
        (1536, 5, 3, 4),
        (96, 5, 25, 25),
        (32, 5, 12, 13),  # fewer vectors than threads
        (288, 1, 2, 2),
        (36, 3, 1, 2),
        (64, 7, 13, 13),
    )
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.size)
    eps = 1e-6
    x = rng.standard_normal((case.max_count, 2, case.size))
    x[:, 1] *= 3
    x[0, 1, :2] = -1e20, 1e20
    x[case.count // 2] *= 1e-4  # eps decides where all frames are that small
    x = x.astype(np.float32)
    weight = rng.standard_normal((case.taps, case.size)).astype(np.float32)
    norm = rng.uniform(-2, 2, case.size).astype(np.float32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.max_count, case.size, dtype=bench.half)
        bench.run(
            bench.kernels.light_convolution(
                bench.state(4, case.count),
                bench.put(x),
                bench.put(weight),
                bench.put(norm),
                out,
                size=case.size,
                taps=case.taps,
                eps=eps,
                max_count=case.max_count,
            )
        )
        actual = await bench.get(out, case.max_count, case.size, dtype=bench.half)

    a, b = np.moveaxis(x[: case.count].astype(np.float64), 1, 0)
    gated = np.pad(a * sigmoid(b), ((case.taps - 1, 0), (0, 0)))
    windows = np.stack([gated[j : j + case.count] for j in range(case.taps)])
    mixed = np.einsum("jtc,jc->tc", windows, weight.astype(np.float64))
    magnitude = np.einsum("jtc,jc->tc", np.abs(windows), np.abs(weight).astype(np.float64))
    normed = normalize(mixed, norm, eps)
    expected = normed * sigmoid(normed)
    scale = np.abs(norm) / np.sqrt(np.mean(mixed**2, axis=1, keepdims=True) + eps)
    error = 2 * F32_SUM * (magnitude * scale + np.abs(normed)) + 1e-30  # SiLU is nowhere steeper than 1.1
    stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0
    close("out", actual[: case.count], expected, error + stored)
    same("rows outside", actual[case.count :], UNTOUCHED)
