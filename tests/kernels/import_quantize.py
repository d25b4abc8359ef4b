"""import_quantize.wgsl: plain floats are rounded to blocks of integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.weights.packed import pack_halves, pack_nibbles, widen
from tests.kernels.bench import UNTOUCHED, Bench, Floats, same


@dataclass(frozen=True)
class Case:
    """Rows of so many blocks that come after `before` rows of a part; there is room for more in a transfer."""

    source: Layout
    layout: Layout
    rows: int
    blocks: int
    before: int
    room: int  # rows
    grid: int  # workgroups in a dimension at most
    bad: float  # a weight that cannot be rounded, or zero
    half: bool  # it makes no difference


_KINDS = [
    (source, layout) for source in (Layout.F32, Layout.F16, Layout.BF16) for layout in (Layout.INT8, Layout.INT4)
]
CASES = (
    *(Case(*kinds, *shape, 65535, 0.0, half=False) for kinds in _KINDS for shape in ((43, 3, 64, 64), (1, 1, 0, 1))),
    *(Case(*kinds, 64, 9, 64, 128, 3, 0.0, half=True) for kinds in _KINDS),
    *(Case(*kinds, 2, 3, 0, 2, 65535, bad, half=False) for kinds in _KINDS for bad in (np.nan, -np.inf)),
    *(
        Case(Layout.F32, layout, 2, 3, 0, 2, 65535, bad, half=False)
        for _, layout in _KINDS[:2]
        for bad in (3e38, -1e7)
    ),
)
_LEVELS = {Layout.INT8: 127, Layout.INT4: 8}


def weights(rng: np.random.Generator, layout: Layout, count: int) -> NDArray[np.float32]:
    """Blocks (count, 32) of weights of any size, and of weights about which a careless kernel is wrong."""
    blocks = rng.standard_normal((count, 32)) * 2.0 ** rng.integers(-34, 14, (count, 1))
    blocks[1::7] = np.round(blocks[1::7], 1)  # many of one magnitude, of either sign
    levels = _LEVELS[layout]
    for i in range(0, count - 1, 3):  # weights halfway between two numbers, and the floats beside these
        d = np.float64(np.float16(rng.uniform(1, 2) * 2.0 ** rng.integers(-23, 8)))
        halfway = (rng.integers(-levels, levels, 32) + 0.5).astype(np.float64) * d
        nearby = np.nextafter(halfway.astype(np.float32), rng.choice([-np.inf, np.inf], 32).astype(np.float32))
        blocks[i] = np.where(rng.random(32) < 0.5, halfway, nearby)
        blocks[i, rng.integers(32)] = d * -levels
    odd = np.zeros((10, 32))
    odd[1] = -0.0
    odd[2, 5] = 1e-40  # below the float32 that have a leading one
    odd[3, 5:8] = levels * np.array([2.0**-25, -(2.0**-26), 2.0**-27])  # halfway to the least scale
    odd[4, 5:8] = levels * np.array([2.0**-26, 2.0**-25 * (1 + 2.0**-7), 0])
    odd[5, 5:8] = levels * 1.5 * np.array([2.0**-24, -(2.0**-24), 0])
    odd[6, 9:11] = levels * (1 + 2.0**-11) * np.array([1, -1])  # halfway between two scales
    odd[7, 9:11] = levels * (1 + 3 * 2.0**-11) * np.array([-1, 1])
    odd[8, 9:11] = levels * (1 - 2.0**-12 + 2.0**-23)
    odd[9] = levels * rng.uniform(-65480, 65480, 32)
    end = min(count, 10)
    blocks[count - end :] = odd[10 - end :]
    with np.errstate(over="ignore", under="ignore"):
        return blocks.astype(np.float32)


def stored(values: NDArray[np.float32], source: Layout) -> NDArray[np.uint8]:
    """The bytes of `values` as `source`; those that float16 cannot hold become its largest, unless it has them."""
    match source:
        case Layout.F32:
            return values.reshape(-1).view(np.uint8)
        case Layout.F16:
            inside = np.where(np.isfinite(values), np.clip(values, -65504, 65504), values)
            return inside.astype(np.float16).reshape(-1).view(np.uint8)
        case _:
            return np.ascontiguousarray(values.reshape(-1).view(np.uint16)[1::2]).view(np.uint8)


def rounded(blocks: Floats, layout: Layout) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Quants and scales of blocks (n, 32). A float64 quotient of these is halfway only if the true one is."""
    outermost = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    d = (np.abs(outermost) / 127 if layout == Layout.INT8 else outermost / -8).astype(np.float16)
    d[d == 0] = 0  # and not negative
    quotients = np.divide(blocks, d, where=d != 0, out=np.zeros_like(blocks))
    if layout == Layout.INT8:
        return np.rint(quotients).clip(-127, 127).astype(np.int8).reshape(-1).view(np.uint32), pack_halves(d)
    return pack_nibbles((np.rint(quotients).clip(-8, 7) + 8).astype(np.uint8)), pack_halves(d)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.rows * case.blocks + case.source)
    layout, count, cols = case.layout, case.rows * case.blocks, case.blocks * 32
    values = weights(rng, layout, count)
    if case.bad:
        values[3, 7] = case.bad
    data = stored(values, case.source)
    rows = case.before + case.rows + 2
    raw = np.full(case.room * cols * case.source.bits // 8, 0xFF, np.uint8)
    raw[: data.size] = data
    blocks = widen(data, case.source).astype(np.float64).reshape(-1, 32)
    if case.bad:
        blocks[3] = 0
    untouched = np.float32(UNTOUCHED).view(np.uint32)
    expected = [np.full(words(rows, cols), untouched) for words in (layout.quant_words, layout.scale_words)]
    starts = layout.quant_words(case.before, cols), layout.scale_words(case.before, cols)
    for whole, words, start in zip(expected, rounded(blocks, layout), starts, strict=True):
        whole[start : start + words.size] = words

    with Bench(device, half=case.half) as bench:
        bench.kernels._most_workgroups = case.grid
        buffers = [bench.blank(words.size) for words in expected]
        part = Part(layout, 0, rows, cols, *buffers)
        run = bench.put([case.before * case.blocks, count], np.uint32)
        faults = bench.put([0], np.uint32)
        bench.run(bench.kernels.import_quantize(case.source, run, bench.put(raw, np.uint8), part, faults))
        quants, scales = [
            await bench.get(buffer, words.size, dtype=np.uint32)
            for buffer, words in zip(buffers, expected, strict=True)
        ]
        same("faults", await bench.get(faults, 1, dtype=np.uint32), int(case.bad != 0))
    same("scales", scales, expected[1])
    same("quants", quants, expected[0])
