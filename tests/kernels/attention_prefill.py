"""attention_prefill.wgsl: attention of a chunk over the ring and itself, causal or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import Sight
from gemma_wgpu.ops.kv_cache import Ring
from tests.kernels.bench import F16, F16_SMALLEST, UNTOUCHED, Bench, close, same
from tests.kernels.heads import POISON, attend, shape_of


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    capacity: int
    chunks: tuple[tuple[int, int], ...]  # of position and count
    half: bool
    gain: float = 1.0  # of the queries: large ones make the softmax sharp
    sight: Sight = Sight.CAUSAL
    cpu: bool = True  # the variants for CPU adapters, if this is one


_CASES = (
    *(
        Case(4, 1, 256, 512, 512, ((0, 1), (0, 37), (490, 30), (511, 3), (512, 2), (1000, 39)), half)
        for half in (False, True)
    ),
    *(Case(4, 1, 256, 512, 512, ((600, 7),), half, gain=30.0) for half in (False, True)),
    Case(4, 1, 256, 1500, 1500, ((0, 5), (1203, 21)), half=True),
    Case(1, 1, 32, 8, 8, ((0, 1), (0, 40), (5, 17), (100, 33)), half=False),  # chunks longer than the window
    Case(2, 1, 32, 24, 24, ((0, 9), (23, 9), (47, 100)), half=True),
    Case(4, 2, 32, 20, 64, ((0, 21), (19, 2), (130, 30)), half=False),  # a window shorter than the ring
    Case(8, 4, 64, 33, 33, ((32, 1), (33, 65)), half=True, gain=30.0),
    Case(2, 2, 72, 300, 300, ((0, 1), (0, 31), (17, 100)), half=False),  # heads that do not fill a subgroup
    Case(2, 2, 72, 1000, 1, ((0, 100), (0, 5)), half=True, sight=Sight.ALL),  # an encoder's
    Case(3, 3, 72, 1000, 1, ((0, 1), (0, 33)), half=False, sight=Sight.ALL, gain=30.0),
    Case(8, 1, 512, 1000, 1000, ((0, 3), (130, 19)), half=False),
    Case(8, 1, 512, 64, 64, ((0, 1), (100, 7)), half=True, gain=30.0),
    Case(3, 1, 32, 24, 24, ((0, 5), (23, 9), (47, 100)), half=False),  # of 16 rows, 15 are taken
    Case(3, 1, 256, 100, 100, ((130, 16),), half=True),
    Case(12, 2, 64, 20, 20, ((0, 21), (130, 30)), half=False),  # and 12
    Case(3, 1, 64, 8, 8, ((11, 100),), half=False, sight=Sight.REACH),
    Case(4, 2, 128, 8, 8, ((0, 53), (11, 100), (3, 1)), half=False, sight=Sight.REACH),  # blocks beyond the window
    Case(4, 1, 256, 64, 64, ((0, 70), (90, 100)), half=True, sight=Sight.REACH),
)
CASES = tuple(replace(case, cpu=cpu) for case in _CASES for cpu in (True, False))
MAX_COUNT = 100


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.window)
    shape, ring = shape_of(case.heads, case.kv_heads, case.head_dim, case.window), Ring(5, case.capacity)
    with Bench(device, half=case.half, cpu=case.cpu) as bench:
        for position, count in case.chunks:
            length = position + count
            k, v = rng.standard_normal((2, length, case.kv_heads, case.head_dim)).astype(bench.half)
            q = rng.standard_normal((MAX_COUNT, case.heads, case.head_dim)) * shape.scale * case.gain
            q = q.astype(bench.half)
            queries, rows = bench.put(q, bench.half), []
            for history in (k, v):
                chunk = np.full((MAX_COUNT, case.kv_heads, case.head_dim), POISON)
                chunk[:count] = history[position:]
                rows.append(bench.put(chunk, bench.half))
            for history in (k, v):
                cache = np.full((ring.start + case.capacity + 3, case.kv_heads, case.head_dim), POISON)
                # The first that a query sees: what lies before it, in the ring or not, is not to be read.
                for j in range(max(0, position + 1 - case.window), position):
                    cache[ring.start + j % case.capacity] = history[j]
                rows.append(bench.put(cache, bench.half))
            out = bench.blank(MAX_COUNT, case.heads, case.head_dim, dtype=bench.half)
            state = bench.state(position, count, ring)
            reach = _reach(rng, count)
            keys, values, key_cache, value_cache = rows
            bench.run(
                bench.kernels.attention_prefill(
                    shape,
                    state,
                    queries,
                    keys,
                    values,
                    key_cache,
                    value_cache,
                    out,
                    max_count=MAX_COUNT,
                    sight=case.sight,
                    reach=bench.put(reach, np.uint32),
                )
            )
            actual = await bench.get(out, MAX_COUNT, case.heads, case.head_dim, dtype=bench.half)

            query, key = np.arange(position, length)[:, None], np.arange(length)
            last = {Sight.CAUSAL: query, Sight.REACH: position + reach[:, None], Sight.ALL: query * 0 + length}
            visible = (key <= last[case.sight]) & (key > query - case.window)
            exact, tolerance, _ = attend(
                q[:count].astype(np.float64), k.astype(np.float64), v.astype(np.float64), visible
            )
            stored = F16 * np.abs(exact) + F16_SMALLEST if case.half else 0.0
            close(f"out from position {position}, {count} tokens", actual[:count], exact, tolerance + stored)
            same("rows outside", actual[count:], UNTOUCHED)


def _reach(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """The last token that each token of a chunk sees: itself, or the last one of its block."""
    reach = np.arange(count)
    starts = np.flatnonzero(rng.random(count) < 0.1)
    for start, stop in pairwise([*starts, count]):
        end = min(start + int(rng.integers(1, 30)), stop)
        reach[start:end] = end - 1
    return reach
