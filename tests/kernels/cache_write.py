"""cache_write.wgsl: keys and values into the ring."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kv_cache import Ring
from tests.kernels.bench import UNTOUCHED, Bench, same


@dataclass(frozen=True)
class Case:
    size: int
    capacity: int
    chunks: tuple[tuple[int, int], ...]  # of position and count
    half: bool = False


_CASES = (
    Case(256, 512, ((0, 1), (3, 700), (511, 2), (1000, 600), (1024, 512))),
    Case(512, 64, ((0, 64), (63, 1), (64, 3), (100, 65))),  # more vectors than a workgroup takes
    Case(32, 7, ((5, 4), (3, 6), (2, 8), (13, 30))),
)
CASES = tuple(replace(case, half=half) for half in (False, True) for case in _CASES)
MAX_COUNT = 700


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.capacity)
    rows = 3 * case.capacity + 2
    with Bench(device, half=case.half) as bench:
        keys, values = rng.standard_normal((2, MAX_COUNT, case.size)).astype(bench.half)
        inputs = bench.put(keys, bench.half), bench.put(values, bench.half)
        for position, count in case.chunks:
            ring = Ring(position % 3 * case.capacity + 1, case.capacity)
            caches = [bench.blank(rows, case.size, dtype=bench.half) for _ in range(2)]
            state = bench.state(position, count, ring)
            bench.run(bench.kernels.cache_write(state, *inputs, *caches, size=case.size, ring=0, max_count=MAX_COUNT))
            for written, cache in zip((keys, values), caches, strict=True):
                expected = np.full((rows, case.size), UNTOUCHED)
                for i in range(count):  # in order, so that the last of those on a row stays
                    expected[ring.start + (position + i) % case.capacity] = written[i]
                actual = await bench.get(cache, *expected.shape, dtype=bench.half)
                same(f"cache after position {position}, {count} tokens", actual, expected)
