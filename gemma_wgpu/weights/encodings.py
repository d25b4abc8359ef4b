"""How model files store rows of weights, and how that becomes the two arrays of a Layout, bit for bit.

The quantised encodings are GGUF's block types, which ggml defines (ggml-quants.c): a row is made of records of a few
bytes, each of which has the scales and the numbers of 32 or 256 neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.weights.packed import pack_halves, pack_nibbles

Words = NDArray[np.uint32]
Split = Callable[[NDArray[np.uint8]], tuple[Words, Words]]


@dataclass(frozen=True)
class Encoding:
    """An encoding in which `group` neighbours take `group_bytes`; `split` makes (quants, scales) of whole groups."""

    name: str
    layout: Layout
    group: int
    group_bytes: int
    split: Split

    @property
    def dense(self) -> bool:
        """Say whether the weights are plain floats, one after the other."""
        return self.group == 1

    def nbytes(self, weights: int) -> int:
        """Return the bytes of so many neighbours, a whole number of groups."""
        return weights // self.group * self.group_bytes


def _floats(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    return _words(data), np.empty(0, np.uint32)


_Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])


def _q4_0(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    blocks = data.view(_Q4_0)
    return _words(blocks["qs"]), pack_halves(blocks["d"])


# "dm" is two float16: d and m here, d and dmin in Q4_K. It is a word of scales as it stands.
_Q4_1 = np.dtype([("dm", "<u4"), ("qs", "u1", 16)])


def _q4_1(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    blocks = data.view(_Q4_1)
    return _words(blocks["qs"]), _words(blocks["dm"])


_Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])


def _q5_0(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    blocks = data.view(_Q5_0)
    low = blocks["qs"]
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    numbers = np.concatenate((low & 15, low >> 4), axis=1) | high << 4
    return _words(numbers.view(np.int8) - np.int8(16)), pack_halves(blocks["d"])


_Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", BLOCK)])


def _q8_0(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    blocks = data.view(_Q8_0)
    return _words(blocks["qs"]), pack_halves(blocks["d"])


_Q4_K = np.dtype([("dm", "<u4"), ("scales", "u1", (3, 4)), ("qs", "u1", (4, BLOCK))])


def _q4_k(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    groups = data.view(_Q4_K)
    # The 6-bit sc and m of blocks 0-3 are the low bits of bytes 0-3 and 4-7. The sc and m of blocks 4-7 have their
    # low four bits in the nibbles of bytes 8-11, and their high two bits in the top bits of bytes 0-3 and 4-7.
    first, last = groups["scales"][:, :2], groups["scales"][:, 2]
    pairs = np.empty((len(groups), 8, 2), np.uint8)
    pairs[:, :4] = np.moveaxis(first & 63, 1, 2)
    pairs[:, 4:] = np.moveaxis(first >> 6 << 4, 1, 2)
    pairs[:, 4:, 0] |= last & 15
    pairs[:, 4:, 1] |= last >> 4
    scales = np.empty((len(groups), 5), np.uint32)
    scales[:, 0] = groups["dm"]
    scales[:, 1:] = pairs.reshape(-1, 16).view(np.uint32)
    # Each run of 32 bytes has one block in its low nibbles and the next in its high ones.
    numbers = np.stack((groups["qs"] & 15, groups["qs"] >> 4), axis=2)
    return pack_nibbles(numbers), scales.reshape(-1)


_Q6_K = np.dtype([("ql", "u1", (2, 2, BLOCK)), ("qh", "u1", (2, BLOCK)), ("scales", "u1", 16), ("d", "<u2")])


def _q6_k(data: NDArray[np.uint8]) -> tuple[Words, Words]:
    groups = data.view(_Q6_K)
    # Each half of a group begins with the low nibbles of two runs of 32 bytes, and their high nibbles follow. Two
    # bits of qh stand above each nibble.
    low = np.concatenate((groups["ql"] & 15, groups["ql"] >> 4), axis=2)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    numbers = low | (groups["qh"][:, :, None] >> shifts & 3) << 4
    scales = np.empty((len(groups), 5), np.uint32)
    scales[:, 0] = groups["d"]
    scales[:, 1:] = np.ascontiguousarray(groups["scales"]).view(np.uint32)
    return _words(numbers.view(np.int8) - np.int8(32)), scales.reshape(-1)


def _words(array: NDArray[np.generic]) -> Words:
    # This copies what is scattered, and what lies in the file at an address that is no multiple of four.
    return np.require(np.ascontiguousarray(array).reshape(-1).view(np.uint32), requirements="A")


F32 = Encoding("F32", Layout.F32, 1, 4, _floats)
F16 = Encoding("F16", Layout.F16, 1, 2, _floats)
BF16 = Encoding("BF16", Layout.BF16, 1, 2, _floats)
Q4_0 = Encoding("Q4_0", Layout.INT4, 32, _Q4_0.itemsize, _q4_0)
Q4_1 = Encoding("Q4_1", Layout.INT4_OFFSET, 32, _Q4_1.itemsize, _q4_1)
Q5_0 = Encoding("Q5_0", Layout.INT8, 32, _Q5_0.itemsize, _q5_0)
Q8_0 = Encoding("Q8_0", Layout.INT8, 32, _Q8_0.itemsize, _q8_0)
Q4_K = Encoding("Q4_K", Layout.INT4_SUPER, 256, _Q4_K.itemsize, _q4_k)
Q6_K = Encoding("Q6_K", Layout.INT8_SUPER, 256, _Q6_K.itemsize, _q6_k)

DENSE = {encoding.layout: encoding for encoding in (F32, F16, BF16)}
"""The encodings of plain floats, by their layouts, whose `quants` are the bytes of the file."""
