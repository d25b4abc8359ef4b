"""cache_copy.wgsl: positions from one ring to another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kv_cache import Ring
from tests.kernels.bench import Bench, same


@dataclass(frozen=True)
class Case:
    size: int
    old: Ring
    new: Ring
    first: int
    count: int
    half: bool


CASES = tuple(
    Case(*case, half)
    for half in (False, True)
    for case in (
        (256, Ring(0, 128), Ring(128, 256), 0, 128),
        (256, Ring(300, 544), Ring(3, 256), 700, 200),  # round both rings
        (32, Ring(9, 7), Ring(20, 40), 3, 7),
        (512, Ring(5, 5), Ring(0, 5), 11, 1),
    )
)
ROWS = 900


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.count)
    with Bench(device, half=case.half) as bench:
        before = rng.standard_normal((2, ROWS, case.size)).astype(bench.half)
        caches = [bench.put(cache, bench.half) for cache in before]
        words = [case.old.start, case.old.capacity, case.new.start, case.new.capacity, case.first, case.count]
        bench.run(bench.kernels.cache_copy(bench.put(words, np.uint32), *caches, size=case.size, count=case.count))
        after = [await bench.get(cache, ROWS, case.size, dtype=bench.half) for cache in caches]
    expected = before.copy()
    for position in range(case.first, case.first + case.count):
        new = case.new.start + position % case.new.capacity
        expected[:, new] = before[:, case.old.start + position % case.old.capacity]
    same("keys", after[0], expected[0])
    same("values", after[1], expected[1])
