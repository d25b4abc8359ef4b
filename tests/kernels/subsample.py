"""subsample.wgsl: a convolution that halves frames and bands, and the moments of what it makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F32_SUM, UNTOUCHED, Bench, Floats, close, same


@dataclass(frozen=True)
class Case:
    frames: int
    bands: int
    channels: tuple[int, int]
    half: bool


CASES = tuple(
    Case(frames, bands, channels, half)
    for half in (False, True)
    for frames, bands, channels in (
        (1, 128, (1, 128)),
        (2, 10, (1, 8)),
        (5, 64, (128, 32)),
        (6, 7, (3, 4)),  # an odd number of bands
        (13, 1, (4, 12)),
        (97, 32, (1, 20)),
    )
)


def convolved(x: Floats, weight: Floats) -> Floats:
    """The convolution of (frames, bands, in) with (3, 3, in, out), in steps of 2."""
    frames, bands, _ = x.shape
    padded = np.pad(x, ((0, 2), (1, 1), (0, 0)))
    out = np.zeros((-(-frames // 2), -(-bands // 2), weight.shape[-1]))
    for i in range(3):
        for j in range(3):
            seen = padded[i : i + 2 * out.shape[0] - 1 : 2, j : j + 2 * out.shape[1] - 1 : 2]
            out += seen @ weight[i, j]
    return out


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.frames)
    x = rng.standard_normal((case.frames + 2, case.bands, case.channels[0])) + 3  # the last two are not to be read
    weight = rng.standard_normal((3, 3, *case.channels)).astype(np.float32)
    rows, bands, outs = -(-case.frames // 2), -(-case.bands // 2), case.channels[1]
    with Bench(device, half=case.half) as bench:
        x = x.astype(bench.half)
        out, moments = bench.blank(rows + 1, bands, outs), bench.blank(rows + 1, 2)
        bench.run(
            bench.kernels.subsample(
                bench.state(3, case.frames),
                bench.put(x, bench.half),
                bench.put(weight),
                out,
                moments,
                bands=case.bands,
                channels=case.channels,
                max_count=case.frames + 2,
                half=case.half,
            )
        )
        actual = await bench.get(out, rows + 1, bands, outs)
        actual_moments = await bench.get(moments, rows + 1, 2)

    x64, w64 = x[: case.frames].astype(np.float64), weight.astype(np.float64)
    error = F32_SUM * convolved(np.abs(x64), np.abs(w64))
    close("out", actual[:rows], convolved(x64, w64), error)
    same("rows outside", actual[rows:], UNTOUCHED)
    same("moments outside", actual_moments[rows:], UNTOUCHED)
    made = actual[:rows].reshape(rows, -1).astype(np.float64)
    mean = made.mean(axis=1)
    magnitude = np.abs(made).mean(axis=1)
    squares = ((made - mean[:, None]) ** 2).sum(axis=1)
    close("means", actual_moments[:rows, 0], mean, F32_SUM * magnitude)
    close("squares", actual_moments[:rows, 1], squares, 2 * F32_SUM * (squares + magnitude**2))
