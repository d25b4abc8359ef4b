"""attention_decode.wgsl: attention of one token over the ring, and its key and value into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import AttentionShape
from gemma_wgpu.ops.kv_cache import Ring
from tests.kernels.bench import F16, F16_SMALLEST, F32, UNTOUCHED, Bench, close, normalize, same
from tests.kernels.heads import EPS, POISON, attend, reach, rope_table, rotate, shape_of


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    splits: int
    positions: tuple[int, ...]
    half: bool
    theta: float = 1e4
    gain: float = 1.0  # of the queries: large ones make the softmax sharp
    spare: int = 0  # slots of the ring beyond the window
    together: bool = False  # a sequence each of the positions
    value_norm: bool = False
    shared: bool = False  # another layer has written the keys and values


# Few shapes, since a CPU adapter compiles this shader for seconds: for ten in float32 if heads are small.
CASES = (
    *(Case(4, 1, 256, 512, 1, (0, 1, 63, 64, 510, 511, 512, 513, 1027, 32767), half=half) for half in (False, True)),
    Case(4, 1, 256, 700, 4, (0, 1, 3, 4, 511, 512, 699, 700, 2000), half=False, theta=1e6),
    Case(4, 1, 256, 700, 4, (300, 699, 2000), half=False, gain=30.0),
    Case(4, 1, 256, 544, 1, (0, 510, 511, 512, 543, 544, 1027), half=False, spare=32),
    Case(2, 1, 64, 40, 3, (0, 9, 10, 39, 40, 41, 100), half=False, spare=30),
    Case(1, 1, 32, 16, 1, (0, 3, 7, 8, 15, 16, 17, 40), half=False),
    Case(2, 1, 64, 24, 3, (0, 1, 2, 3, 23, 24, 25, 100), half=False),
    Case(8, 4, 64, 33, 2, (0, 1, 31, 32, 33, 66), half=True),
    Case(4, 2, 64, 20, 5, (0, 4, 5, 18, 19, 20, 259), half=True),
    Case(2, 1, 64, 24, 3, (0, 1, 2, 3, 23, 24, 25, 100), half=False, together=True),
    Case(4, 1, 256, 544, 1, (0, 510, 600), half=False, spare=32, together=True),
    Case(8, 1, 512, 300, 4, (0, 127, 128, 299, 700), half=False, theta=1e6, value_norm=True),
    Case(8, 1, 512, 140, 1, (3, 200), half=True, theta=1e6, value_norm=True),
    Case(8, 1, 512, 300, 4, (0, 299, 700), half=False, theta=1e6, value_norm=True, shared=True),
    Case(6, 1, 128, 40, 3, (0, 1, 2, 39, 40, 41, 100), half=False),  # workgroups of four heads and of two
    Case(3, 1, 256, 70, 1, (0, 63, 64, 69, 70, 150), half=False),
    Case(10, 2, 128, 40, 1, (0, 9, 39, 40, 100), half=False, spare=10, value_norm=True, together=True),
    Case(10, 2, 64, 40, 3, (0, 1, 9, 39, 40, 100), half=True, spare=10, shared=True, together=True),
    Case(3, 1, 64, 20, 1, (0, 19, 20, 50), half=True, shared=True),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.capacity)
    window = case.capacity - case.spare
    shape = shape_of(case.heads, case.kv_heads, case.head_dim, window, value_norm=case.value_norm, shared=case.shared)
    row_heads = case.heads if case.shared else case.heads + 2 * case.kv_heads
    norms = (rng.uniform(0.5, 1.5, (2, case.head_dim)) * [[case.gain], [1]]).astype(np.float32)
    steps = [case.positions] if case.together else [(position,) for position in case.positions]
    with Bench(device, half=case.half) as bench:
        norms_buffer, rope = (
            bench.put(norms),
            bench.put(rope_table(case.head_dim, case.theta, max(case.positions) + 1)),
        )
        for positions in steps:
            count = len(positions)
            # Rings lie one after the other in any order, with rows of nobody before, between and after them.
            places: list[int] = rng.permutation(count + 1)[:count].tolist() if case.together else [0]
            rings = [Ring(3 + place * (case.capacity + 2), case.capacity) for place in places]
            cache_shape = 3 + (max(places) + 1) * (case.capacity + 2), case.kv_heads, case.head_dim
            out_shape = count, case.splits, case.heads, case.head_dim
            caches = np.full((2, *cache_shape), POISON, bench.half)
            for position, ring in zip(positions, rings, strict=True):
                rows = ring.start + _earlier(shape, position) % case.capacity
                caches[:, rows] = rng.standard_normal((2, len(rows), *cache_shape[1:]))
            key_cache, value_cache = (bench.put(cache, bench.half) for cache in caches)
            qkv = rng.standard_normal((count, row_heads, case.head_dim)).astype(np.float32)
            out, stats = bench.blank(*out_shape), bench.blank(*out_shape[:-1], 2)
            bench.run(
                bench.kernels.attention_decode(
                    shape,
                    bench.states(positions, places, rings=rings),
                    bench.put(qkv),
                    norms_buffer,
                    rope,
                    key_cache,
                    value_cache,
                    out,
                    stats,
                    splits=case.splits,
                    sequences=count,
                )
            )
            after = np.stack(
                [await bench.get(cache, *cache_shape, dtype=bench.half) for cache in (key_cache, value_cache)]
            )
            actual = await bench.get(out, *out_shape)
            shares = await bench.get(stats, *out_shape[:-1], 2)
            unused = np.ones(cache_shape[0], np.bool_)
            for row, (position, ring) in enumerate(zip(positions, rings, strict=True)):
                own = slice(ring.start, ring.start + ring.capacity)
                unused[own] = False
                _check_row(
                    case, shape, position, norms, qkv[row], caches[:, own], after[:, own], actual[row], shares[row]
                )
            same("rows of nobody", after[:, unused], caches[:, unused])


def _earlier(shape: AttentionShape, position: int) -> NDArray[np.int64]:
    """The positions that the cache has: those that are seen, but the last one if it is still to be written."""
    return np.arange(max(0, position + 1 - shape.window), position + shape.shared)


def _check_row(
    case: Case,
    shape: AttentionShape,
    position: int,
    norms: NDArray[np.float32],
    qkv: NDArray[np.float32],
    caches: NDArray[np.floating],
    after: NDArray[np.floating],
    actual: NDArray[np.float32],
    stats: NDArray[np.float32],
) -> None:
    """One sequence: its keys and values before and after, what came out, and the softmax of its shares."""
    highest, total = np.moveaxis(stats, -1, 0)
    slots = _earlier(shape, position) % case.capacity
    q, k, v = np.split(qkv.astype(np.float64)[None], (case.heads, case.heads + case.kv_heads), axis=1)
    at = np.array([position])
    q = rotate(normalize(q, norms[0], EPS) * shape.scale, at, case.theta)
    keys, values = caches[:, slots].astype(np.float64)
    k_errors, v_errors = np.zeros_like(keys), np.zeros_like(values)
    if case.shared:
        same(f"keys and values at position {position}", after, caches)
    else:
        k = normalize(k, norms[1], EPS)
        k_error, k = F32 * reach(k), rotate(k, at, case.theta)
        v = normalize(v, 1.0, EPS) if shape.value_norm else v
        v_error = F32 * np.abs(v) * shape.value_norm
        if case.half:
            k_error, v_error = (e + F16 * np.abs(a) + F16_SMALLEST for e, a in ((k_error, k), (v_error, v)))
        slot = position % case.capacity
        for name, cache, before, new, error in zip(
            ("key", "value"), after, caches, (k, v), (k_error, v_error), strict=True
        ):
            close(f"new {name} at position {position}", cache[[slot]], new, error)
            same(f"{name}s outside", np.delete(cache, slot, 0), np.delete(before, slot, 0))
        keys, k_errors = np.concatenate((keys, k)), np.concatenate((k_errors, k_error))
        values, v_errors = np.concatenate((values, v)), np.concatenate((v_errors, v_error))

    exact, tolerance, weights = attend(q, keys, values, np.ones((1, len(keys)), np.bool_), k_errors)
    v_errors = np.repeat(v_errors, case.heads // case.kv_heads, axis=1)
    tolerance += np.einsum("thn,nhd->thd", weights, v_errors)
    if case.splits == 1:
        same("stats", highest, UNTOUCHED)
        merged = actual[0]
    else:
        share = np.exp(highest.astype(np.float64) - highest.max(axis=0))
        merged = np.einsum("sh,shd->hd", share, actual) / np.einsum("sh,sh->h", share, total)[:, None]
    close(f"out at position {position}", merged, exact[0], tolerance[0])
