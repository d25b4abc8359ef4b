"""read.wgsl: all of a buffer, read and summed up by xor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import READ_STEP
from tests.kernels.bench import UNTOUCHED, Bench, same


@dataclass(frozen=True)
class Case:
    workgroups: int
    steps: int
    half: bool  # which makes no difference


CASES = (Case(1, 1, False), Case(3, 5, False), Case(8, 2, True))


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.steps)
    words = rng.integers(0, 1 << 32, (case.workgroups, case.steps, READ_STEP // 4), np.uint32)
    with Bench(device, half=case.half) as bench:
        out = bench.blank(case.workgroups + 1, READ_STEP // 4, dtype=np.float32)
        bench.run(bench.kernels.read(bench.put(words, np.uint32), out, workgroups=case.workgroups))
        actual = await bench.get(out, case.workgroups + 1, READ_STEP // 4, dtype=np.uint32)
    same("out", actual[:-1], np.bitwise_xor.reduce(words, axis=1))
    same("shares outside", actual[-1:].view(np.float32), UNTOUCHED)
