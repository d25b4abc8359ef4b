"""running_moments.wgsl: the mean and the scale of each frame of a cumulative norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, Floats, close, same


@dataclass(frozen=True)
class Case:
    frames: int
    size: int
    half: bool  # it makes no difference


CASES = (
    Case(1, 8192, half=False),
    Case(12, 32, half=True),
    Case(13, 1024, half=False),
    Case(64, 20, half=False),
    Case(65, 20, half=False),
    Case(750, 36, half=True),
    Case(1499, 16, half=False),
)
EPS = 1e-3


def running(x: Floats) -> tuple[Floats, Floats]:
    """The mean of each of the frames (frames, size) and of all before, and their variance as the norm has it."""
    counts = x.shape[1] * np.arange(1, len(x) + 1)
    mean = np.cumsum(x.sum(axis=1)) / counts
    return mean, np.cumsum(((x - mean[:, None]) ** 2).sum(axis=1)) / counts


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.frames)
    # The mean drifts, so that a frame's own running mean is not that of a later time.
    x = rng.standard_normal((case.frames, case.size)) + np.linspace(-2, 5, case.frames)[:, None]
    x[: case.frames // 5] *= 1e-3  # eps decides
    mean = x.mean(axis=1)
    moments = np.stack((mean, ((x - mean[:, None]) ** 2).sum(axis=1)), 1)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.frames + 1, 2)
        bench.run(
            bench.kernels.running_moments(
                bench.state(5, case.frames), bench.put(moments), out, size=case.size, eps=EPS
            )
        )
        actual = await bench.get(out, case.frames + 1, 2)

    mean, variance = running(x)
    magnitude = np.cumsum(np.abs(x.mean(axis=1))) / np.arange(1, case.frames + 1)
    close("mean", actual[:-1, 0], mean, F32_SUM * magnitude)
    scale = 1 / np.sqrt(variance + EPS)
    close("scale", actual[:-1, 1], scale, 2 * F32_SUM * scale)
    same("rows outside", actual[-1], UNTOUCHED)
