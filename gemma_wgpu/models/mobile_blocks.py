"""The blocks of MobileNetV4 and MobileNetV5 (arXiv 2404.10518), and how timm writes them down.

A text says what kind of a block it is, how often it comes (r), and the block's numbers, each behind its letter:
"uir_r1_a3_k5_s2_e6_c256". In all blocks s is the stride and c the channels that come out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from gemma_wgpu.models.keys import listed
from gemma_wgpu.ops.layout import BLOCK

_MOST_TIMES = 64
_MOST_EXPANSION = 16


@dataclass(frozen=True)
class EdgeResidual:
    """A full convolution with kernel k that widens by e, and a matrix that narrows again."""

    name: ClassVar = "er"
    k: int
    s: int
    e: int
    c: int


@dataclass(frozen=True)
class InvertedResidual:
    """A matrix that widens by e, and one that narrows; depthwise kernels a before both and k between, unless 0."""

    name: ClassVar = "uir"
    a: int
    k: int
    s: int
    e: int
    c: int


@dataclass(frozen=True)
class MobileAttention:
    """An attention of h heads of size d; keys and values are of an image that kernel k reduces by v, if v is 2."""

    name: ClassVar = "mqa"
    h: int
    d: int
    c: int
    k: int = 3
    v: int = 1
    s: int = 1


Block = EdgeResidual | InvertedResidual | MobileAttention
_KINDS: dict[str, type[Block]] = {kind.name: kind for kind in (EdgeResidual, InvertedResidual, MobileAttention)}


def parsed(text: str) -> list[Block]:
    """Return the blocks that a text in timm's words stands for. Raises ValueError, which says why none can be run."""
    kind, *parts = text.split("_")
    numbers = {part[0]: int(part[1:]) for part in parts if re.fullmatch(r"[a-z]\d{1,5}", part)}
    if kind not in _KINDS or len(numbers) < len(parts):
        raise ValueError("does not begin with er_, uir_ or mqa_, or has more than letters with numbers after that")
    times = numbers.pop("r", 1)
    try:
        block = _KINDS[kind](**numbers)
    except TypeError:
        names = listed([field.name for field in fields(_KINDS[kind])])
        raise ValueError(f"has other numbers than this kind, which has {names}") from None
    if problem := _problem(block):
        raise ValueError(problem)
    if not 1 <= times <= _MOST_TIMES:
        raise ValueError(f"does not come 1 to {_MOST_TIMES} times")
    return [block, *(times - 1) * [replace(block, s=1)]]  # only the first has the stride


def _problem(block: Block) -> str | None:
    """Say why a block cannot be run, if it cannot."""
    if block.c < BLOCK or block.c % BLOCK:
        return f"has channels that are not a multiple of {BLOCK}"
    if block.s not in (1, 2):
        return "has a stride that is not 1 or 2"
    kernels = {block.k, block.a} - {0} if isinstance(block, InvertedResidual) else {block.k}
    if not kernels <= {1, 3, 5, 7}:
        return "has a kernel that is not 1, 3, 5 or 7"
    if isinstance(block, MobileAttention):
        if block.s != 1 or block.v not in (1, 2) or not block.h:
            return "is not an attention of one head or more, with s1, and with v1 or v2"
        return f"has heads that are not of a multiple of {BLOCK}" if block.d < BLOCK or block.d % BLOCK else None
    if not 1 <= block.e <= _MOST_EXPANSION:
        return f"does not widen by 1 to {_MOST_EXPANSION}"
    return None if block.s == 1 or kernels else "has a stride and no kernel"


@dataclass(frozen=True)
class Placed:
    """A block where it stands: what it is called, and the image that comes in, its sides and its channels."""

    block: Block
    name: str
    side: int
    channels: int

    @property
    def skips(self) -> bool:
        """Say whether what comes in is added to what the block makes of it."""
        return self.block.s == 1 and self.block.c == self.channels

    @property
    def side_out(self) -> int:
        """Return the sides of the image that comes out."""
        return -(-self.side // self.block.s)

    @property
    def wide(self) -> int:
        """Return the channels in the middle of a block that widens, or of all heads."""
        block = self.block
        return block.h * block.d if isinstance(block, MobileAttention) else block.e * self.channels
