"""qk_norm_rope.wgsl: queries, keys and values of a prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gemma_wgpu.gpu.device import Device
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, normalize, same
from tests.kernels.heads import EPS, reach, rope_table, rotate, shape_of


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    chunks: tuple[tuple[int, int], ...]  # of position and count
    value_norm: bool = False
    shared: bool = False  # there are queries alone
    half: bool = False


_CASES = (
    Case(4, 1, 256, 1e4, ((0, 5), (254, 4), (511, 3), (32766, 2))),
    Case(4, 1, 256, 1e6, ((32763, 5),)),
    Case(1, 1, 32, 1e4, ((7, 1), (510, 5))),
    Case(4, 2, 32, 1e6, ((255, 2), (1023, 3))),
    Case(2, 2, 64, 1e4, ((20000, 4),)),
    Case(8, 1, 512, 1e6, ((0, 3), (8190, 2)), value_norm=True),
    Case(6, 2, 96, 1e4, ((100, 5),), value_norm=True),  # threads that are no power of two
    Case(3, 1, 256, 1e4, ((510, 4),), shared=True),
    Case(8, 1, 512, 1e6, ((0, 3), (8190, 2)), value_norm=True, shared=True),
)
CASES = tuple(replace(case, half=half) for half in (False, True) for case in _CASES)
MAX_COUNT = 6


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.heads * case.head_dim)
    shape = shape_of(case.heads, case.kv_heads, case.head_dim, 512, value_norm=case.value_norm, shared=case.shared)
    all_heads = case.heads if case.shared else case.heads + 2 * case.kv_heads
    qkv = rng.standard_normal((MAX_COUNT, all_heads, case.head_dim)) * 10.0 ** rng.integers(-3, 3, (all_heads, 1))
    qkv[0, -1] = 0  # eps decides
    norms = rng.uniform(-2, 2, (2, case.head_dim))
    qkv, norms = qkv.astype(np.float32), norms.astype(np.float32)
    results = []
    with Bench(device, half=case.half) as bench:
        length = max(position + count for position, count in case.chunks)
        inputs = bench.put(qkv), bench.put(norms), bench.put(rope_table(case.head_dim, case.theta, length))
        sizes = [(MAX_COUNT, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        for position, count in case.chunks:
            outs = [bench.blank(*size, dtype=bench.half) for size in sizes]
            state = bench.state(position, count)
            bench.run(bench.kernels.qk_norm_rope(shape, state, *inputs, *outs, max_count=MAX_COUNT))
            results.append(
                [await bench.get(out, *size, dtype=bench.half) for out, size in zip(outs, sizes, strict=True)]
            )

    q, k, v = np.split(qkv.astype(np.float64), (case.heads, case.heads + case.kv_heads), axis=1)
    q, k = normalize(q, norms[0], EPS) * shape.scale, normalize(k, norms[1], EPS)
    if case.value_norm:
        v = normalize(v, 1.0, EPS)
    v_error = F32 * np.abs(v) if case.value_norm else np.zeros_like(v)
    for (position, count), result in zip(case.chunks, results, strict=True):
        positions = np.arange(position, position + count)
        turned = (rotate(q[:count], positions, case.theta), rotate(k[:count], positions, case.theta), v[:count])
        error = (F32 * reach(q[:count]), F32 * reach(k[:count]), v_error[:count])
        for name, actual, expected, float32 in zip(("queries", "keys", "values"), result, turned, error, strict=True):
            if case.shared and name != "queries":
                same(name, actual, UNTOUCHED)
                continue
            stored = F16 * np.abs(expected) + F16_SMALLEST if case.half else 0.0
            close(f"{name} from position {position}", actual[:count], expected, float32 + stored)
            same(f"{name} outside", actual[count:], UNTOUCHED)
