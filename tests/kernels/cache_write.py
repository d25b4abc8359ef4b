"""cache_write.wgsl: keys and values into the ring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import UNTOUCHED, Bench, same
from tests.kernels.heads import shape_of


@dataclass(frozen=True)
class Case:
    kv_heads: int
    head_dim: int
    capacity: int
    chunks: tuple[tuple[int, int], ...]  # of position and count
    half: bool


CASES = tuple(
    Case(*case, half)
    for half in (False, True)
    for case in (
        (1, 256, 512, ((0, 1), (3, 700), (511, 2), (1000, 600), (1024, 512))),
        (2, 256, 64, ((0, 64), (63, 1), (64, 3), (100, 65))),  # more vectors than a workgroup takes
        (1, 32, 7, ((5, 4), (3, 6), (2, 8), (13, 30))),
    )
)
MAX_COUNT = 700


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.capacity)
    shape = shape_of(case.kv_heads, case.kv_heads, case.head_dim, case.capacity, case.capacity)
    size = case.kv_heads * case.head_dim
    with Bench(device, half=case.half) as bench:
        keys, values = rng.standard_normal((2, MAX_COUNT, size)).astype(bench.half)
        inputs = bench.put(keys, bench.half), bench.put(values, bench.half)
        for position, count in case.chunks:
            caches = [bench.blank(3, case.capacity, size, dtype=bench.half) for _ in range(2)]
            state = bench.states([position], [position % 3], count)
            bench.run(bench.kernels.cache_write(shape, state, *inputs, *caches, max_count=MAX_COUNT))
            for rows, cache in zip((keys, values), caches, strict=True):
                expected = np.full((3, case.capacity, size), UNTOUCHED)
                for i in range(count):  # in order, so that the last of those on a slot stays
                    expected[position % 3, (position + i) % case.capacity] = rows[i]
                actual = await bench.get(cache, *expected.shape, dtype=bench.half)
                same(f"cache after position {position}, {count} tokens", actual, expected)
