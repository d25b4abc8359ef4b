"""The rows of a table that stays off the GPU: they are fetched before the steps that need them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.ops.linear import HostTable

Rows = NDArray[np.float32]


class Lookup:
    """Fetches rows of `table`, and remembers the `most` that were used last: float32 (cols,) each.

    A token without a row of its own has that of token 0, and so has an image's soft token, which is negative.
    """

    def __init__(self, table: HostTable, most: int) -> None:
        self.row_bytes = 4 * table.shape[1]
        self._table, self._most = table, most
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def missing(self, tokens: Sequence[int]) -> list[int]:
        """Return the numbers of the rows that some tokens need and that are to be fetched, each once."""
        return [number for number in dict.fromkeys(map(self._number, tokens)) if number not in self._kept]

    def fetch(self, numbers: Sequence[int]) -> Awaitable[Rows]:
        """Fetch rows, which are for `keep`: float32 (len(numbers), cols)."""
        return self._table.fetch(numbers)

    def keep(self, numbers: Sequence[int], rows: Rows) -> None:
        """Remember rows that were fetched, and forget those that were used longest ago."""
        self._kept.update(zip(numbers, rows, strict=True))
        while len(self._kept) > max(self._most, len(numbers)):
            self._kept.popitem(last=False)

    def rows(self, tokens: Sequence[int]) -> Rows:
        """Return the rows of some tokens, none of which is missing: float32 (len(tokens), cols)."""
        numbers = list(map(self._number, tokens))
        for number in numbers:
            self._kept.move_to_end(number)
        return np.stack([self._kept[number] for number in numbers])

    def _number(self, token: int) -> int:
        return token if 0 <= token < self._table.shape[0] else 0
