"""Byte-pair merging by SentencePiece scores, in the order of the merges in Gemma's tokenizer.json."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

SPACE = "▁"  # U+2581, which Gemma's pieces have in place of a space

_CACHED_WORDS = 1 << 15
_CACHED_LENGTH = 64

# A possible merge is (-score, -left length, -right length, id of the result, start), in characters. So merges are
# sorted as in tokenizer.json: by score, then the longer left side, then the longer right side, then the id; and the
# leftmost of equal merges is first.
_Merge = tuple[float, int, int, int, int]


class PairMerger:
    """Turns text without added tokens into ids.

    `ids` maps every piece that a merge may make, and every single character, to its id, with SPACE for a space.
    `scores` is float32 (ids,), and the highest one merges first. `byte_ids` has the 256 ids that stand for bytes, of
    which characters that are not pieces are made.
    """

    def __init__(self, ids: Mapping[str, int], scores: NDArray[np.float32], byte_ids: Sequence[int]) -> None:
        self._ids = ids
        self._costs = array("f", (-scores).tobytes())
        self._byte_ids = byte_ids
        self._words = _word_pattern(ids)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, which has no surrogates. This takes O(n log n) time for n characters."""
        out: list[int] = []
        cache = self._cache
        for word in self._words.findall(text.replace(" ", SPACE)):
            ids = cache.get(word)
            if ids is None:
                ids = self._merge(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = ids
            out += ids
        return out

    def _merge(self, word: str) -> list[int]:
        # A symbol is known by its start: ends[start] is its end, or 0 when it has become part of the one before it.
        length = len(word)
        ids: list[int | None] = [self._ids.get(character) for character in word]
        ends = list(range(1, length + 1))
        before = list(range(-1, length - 1))
        heap = [merge for start in range(length - 1) if (merge := self._candidate(word, ids, ends, start))]
        heapify(heap)
        while heap:
            _, left, right, merged, start = heappop(heap)
            middle = start - left
            end = middle - right
            if ends[start] != middle or ends[middle] != end:
                continue  # one of the two has been merged with something else since
            ids[start] = merged
            ends[start], ends[middle] = end, 0
            if end < length:
                before[end] = start
                if merge := self._candidate(word, ids, ends, start):
                    heappush(heap, merge)
            if start and (merge := self._candidate(word, ids, ends, before[start])):
                heappush(heap, merge)
        out: list[int] = []
        start = 0
        while start < length:
            symbol = ids[start]
            if symbol is None:
                out += [self._byte_ids[byte] for byte in word[start].encode()]
            else:
                out.append(symbol)
            start = ends[start]
        return out

    def _candidate(self, word: str, ids: list[int | None], ends: list[int], start: int) -> _Merge | None:
        """Return the merge of the symbol at `start` with the next one, which exists; None if they make no piece."""
        middle = ends[start]
        end = ends[middle]
        merged = self._ids.get(word[start:end])
        if merged is None or ids[start] is None or ids[middle] is None:
            return None
        return self._costs[merged], start - middle, middle - end, merged, start


def _word_pattern(pieces: Mapping[str, int]) -> re.Pattern[str]:
    """Return the pattern of words: no piece reaches from one into the next, so each can be merged on its own.

    A word ends before a SPACE that follows another character, unless a piece has just these two in it (Gemma 3 has
    one: ">▁</").
    """
    inside = {piece[at - 1] for piece in pieces for at in _inner_spaces(piece)}
    joined = f"(?<=[{re.escape(''.join(sorted(inside)))}]){SPACE}++[^{SPACE}]*+" if inside else "(?!)"
    return re.compile(f"{SPACE}++[^{SPACE}]*+(?:{joined})*+|[^{SPACE}]++(?:{joined})*+")


def _inner_spaces(piece: str) -> list[int]:
    """Return the places where `piece` has a SPACE right after another character."""
    if SPACE not in piece[1:]:
        return []
    return [at for at in range(1, len(piece)) if piece[at] == SPACE != piece[at - 1]]
