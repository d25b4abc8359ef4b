"""What the checks of import_<encoding>.wgsl share: blocks of any bits, against what numpy makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.weights.encodings import Encoding
from tests.kernels.bench import UNTOUCHED, Bench, same

# Negative zero, infinities, NaN, the least and the largest number below those that have a leading one.
ODD_HALVES = (0x8000, 0x7C00, 0xFC00, 0x7E01, 0x0001, 0x83FF)


@dataclass(frozen=True)
class Case:
    """Rows of so many groups that come after `before` rows of a part; there is room for more in a transfer."""

    rows: int
    groups: int
    before: int
    room: int  # rows
    grid: int  # workgroups in a dimension at most
    half: bool  # it makes no difference


CASES = (
    Case(1, 1, 0, 1, 65535, half=False),
    Case(1, 5, 0, 64, 65535, half=True),
    Case(64, 3, 64, 64, 65535, half=False),
    Case(7, 3, 128, 64, 65535, half=False),
    Case(3, 20, 64, 3, 65535, half=False),
    Case(64, 9, 0, 128, 3, half=True),
)


async def check(device: Device, case: Case, encoding: Encoding, *halves: int) -> None:
    """Compare all of a part with what `split` makes of the same bytes; `halves` are where a group has its floats."""
    rng = np.random.default_rng(case.rows + case.groups)
    groups, layout = case.rows * case.groups, encoding.layout
    data = rng.integers(0, 256, (groups, encoding.group_bytes), np.uint8)
    for half in halves:
        odd = rng.permutation(ODD_HALVES)[:groups].astype(np.uint16)
        data[-len(odd) :, half : half + 2] = odd[:, None].view(np.uint8)
    rows, cols = case.before + case.rows + 2, case.groups * encoding.group
    raw = np.full(case.room * case.groups * encoding.group_bytes, 0xFF, np.uint8)
    raw[: data.size] = data.reshape(-1)
    untouched = np.float32(UNTOUCHED).view(np.uint32)
    expected = [np.full(words(rows, cols), untouched) for words in (layout.quant_words, layout.scale_words)]
    starts = layout.quant_words(case.before, cols), layout.scale_words(case.before, cols)
    for whole, words, start in zip(expected, encoding.split(data.reshape(-1)), starts, strict=True):
        whole[start : start + words.size] = words

    with Bench(device, half=case.half) as bench:
        bench.kernels._most_workgroups = case.grid
        buffers = [bench.blank(words.size) for words in expected]
        run = bench.put([case.before * case.groups, groups], np.uint32)
        part = Part(layout, 0, rows, cols, *buffers)
        bench.run(bench.kernels.import_blocks(encoding.name, run, bench.put(raw, np.uint8), part))
        quants, scales = [
            await bench.get(buffer, words.size, dtype=np.uint32)
            for buffer, words in zip(buffers, expected, strict=True)
        ]
    same("quants", quants, expected[0])
    same("scales", scales, expected[1])
