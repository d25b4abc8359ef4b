"""Which tokens' keys and values the cache holds, so that a conversation goes on without computing them again."""

from collections.abc import Sequence as Ids

import numpy as np


class Sequence:
    """The tokens that are known, and how many of them went through the layers.

    A global layer keeps every position. A local one keeps the last `capacity` positions in a ring, of which a query
    sees the last `window`: what was dropped from the ring cannot be gone back to.
    """

    def __init__(self, window: int, capacity: int) -> None:
        self.ids: list[int] = []
        self.computed = 0  # positions in the cache; those past the end of `ids` are of no use
        self.oldest = 0  # position that the rings still hold
        self._window, self._capacity = window, capacity

    def begin(self, ids: Ids[int], most: int) -> int:
        """Make `ids` the sequence. Returns how many of them, `most` at most, need not be computed."""
        reused = self._common(ids, most)
        if self.oldest and reused < self.oldest + self._window - 1:
            reused = 0
        self.ids = list(ids)
        self.computed = reused
        if not reused:
            self.oldest = 0
        return reused

    def advance(self, end: int) -> None:
        """The positions below `end` went through the layers."""
        self.computed = end
        self.oldest = max(self.oldest, end - self._capacity)

    def restore(self, ids: Ids[int], oldest: int) -> None:
        """The cache was made to hold `ids`, the rings from `oldest` on."""
        self.ids = list(ids)
        self.computed = len(ids)
        self.oldest = oldest

    def forget(self) -> None:
        """Reuse nothing of what is there."""
        self.ids.clear()

    def _common(self, ids: Ids[int], most: int) -> int:
        most = min(most, self.computed, len(self.ids))
        differ = np.flatnonzero(np.not_equal(self.ids[:most], ids[:most]))
        return int(differ[0]) if len(differ) else most
