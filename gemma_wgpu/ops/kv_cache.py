"""The cache of keys and values: which sequences it holds, where they lie, and who may advance them.

A model has some caches, each of them with the keys and values of one layer or of several that share them. Every cache
is one buffer of keys and one of values, both of rows; a row is a position of a sequence. In the caches of layers with
a sliding window a sequence has a ring of rows, in which it loses what left the window; in the other caches it keeps
all positions. Both kinds of rings begin small and grow as the sequence does.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.launch import record

ROLLBACK = 32  # positions that a ring keeps beyond its window, so that a sequence can go back so far
_SMALLEST_RING = 128  # rows
_WORTH_COPYING = 16  # positions; fewer are computed again
_RINGS = 2  # kinds of rings, as in the struct State of shaders/state.wgsl


@dataclass(frozen=True)
class CacheSpec:
    """The shape of one cache.

    It has `layers` layers, whose queries see `window` positions, themselves included, or all if it is None.
    """

    kv_heads: int
    head_dim: int
    window: int | None
    layers: int = 1

    @property
    def size(self) -> int:
        """Return the elements of a position's keys, or of its values."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Ring:
    """`capacity` rows from row `start` on; position p lies at row start + p % capacity."""

    start: int
    capacity: int

    def rows(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the rows of positions [first, stop) as runs of (first row, number of rows), in order."""
        while first < stop:
            place = first % self.capacity
            count = min(stop - first, self.capacity - place)
            yield self.start + place, count
            first += count


class Rows:
    """Which rows of some caches are free: of `total` rows, those from row `used` on."""

    def __init__(self, total: int = 0, used: int = 0) -> None:
        self._free = [(used, total - used)] if total > used else []  # (start, count), sorted, none touching another

    def take(self, count: int) -> Ring | None:
        """Return a ring of `count` rows; None if no free run is long enough."""
        for index, (start, free) in enumerate(self._free):
            if free >= count:
                self._replace(index, start + count, free - count)
                return Ring(start, count)
        return None

    def extend(self, ring: Ring, capacity: int) -> Ring | None:
        """Return the ring with a larger capacity; None if the rows behind it are not free."""
        more, end = capacity - ring.capacity, ring.start + ring.capacity
        for index, (start, free) in enumerate(self._free):
            if start == end and free >= more:
                self._replace(index, start + more, free - more)
                return Ring(ring.start, capacity)
        return None

    def give(self, ring: Ring) -> None:
        """Take the rows of a ring back."""
        insort(self._free, (ring.start, ring.capacity))
        joined: list[tuple[int, int]] = []
        for start, count in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((start, count))
        self._free = joined

    def _replace(self, index: int, start: int, count: int) -> None:
        self._free[index : index + 1] = [(start, count)] if count else []


@dataclass(eq=False)
class Stored:
    """A sequence in the cache.

    `ids` are the tokens that are known. A negative one tells the content of the image whose soft token is there; a
    run of them is a block, whose tokens see each other. `computed` positions went through the layers; those of them
    past the end of `ids` are of no use. `oldest` is the first position that its ring with a window still holds.
    `moved` is higher the later the sequence last moved on.
    """

    rings: list[Ring]
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    oldest: int = 0
    moved: int = 0

    def common(self, ids: Sequence[int], most: int, window: int) -> int:
        """Return how many of `ids`, `most` at most, begin the sequence and need not be computed.

        A query after them must see its whole window: what a ring has lost cannot be gone back to. Nor can the cut be
        inside a block, whose beginning depends on its end.
        """
        most = min(most, self.computed, len(self.ids))
        differ = np.flatnonzero(np.not_equal(self.ids[:most], ids[:most]))
        found = int(differ[0]) if len(differ) else most
        if any(other[found : found + 1] and other[found] < 0 for other in (ids, self.ids)):
            while found and ids[found - 1] < 0:
                found -= 1
        return found if not self.oldest or found >= self.oldest + window - 1 else 0


class Lease:
    """The right to advance one sequence. Whoever has none may not touch a sequence.

    `slot` is the sequence's place in the buffers that keep something for each sequence. Every method raises
    RequestError, which says why, once the right was taken away.
    """

    def __init__(self, cache: KVCache, stored: Stored, slot: int) -> None:
        self.slot = slot
        self.reused = stored.computed
        self._cache = cache
        self._stored = stored
        self._ended: str | None = None

    @property
    def ids(self) -> Sequence[int]:
        """Return the tokens that are known."""
        return self._held().ids

    @property
    def computed(self) -> int:
        """Return how many positions went through the layers."""
        return self._held().computed

    @property
    def rings(self) -> list[Ring]:
        """Return where the sequence lies."""
        return self._held().rings

    def reserve(self, length: int) -> None:
        """Make room for `length` positions. Raises DeviceError if the GPU's memory is exhausted."""
        self._cache._grow(self._held(), length)

    def advance(self, end: int) -> None:
        """Note that the positions below `end` went through the layers."""
        stored = self._held()
        stored.computed = end
        stored.oldest = max(stored.oldest, end - self._cache.capacity(0))
        self._cache.note(stored)

    def append(self, token: int) -> None:
        """Note which token comes next."""
        self._held().ids.append(token)

    def release(self) -> None:
        """Give the right back: the sequence stays in the cache as long as there is room. Idempotent."""
        if self._ended is None:
            self._ended = "this text has ended"
            self._cache._keep(self, self._stored)

    def end(self, why: str) -> None:
        """Take the right away, and drop the sequence."""
        if self._ended is None:
            self._ended = why
            self._cache._drop(self, self._stored)

    def _held(self) -> Stored:
        if self._ended is not None:
            raise RequestError(self._ended)
        return self._stored


class KVCache:
    """The keys and values of all sequences of a model, in `half` precision or in float32.

    `version` changes when a cache becomes another buffer: what was recorded before is void. `slots` is the number of
    slots that leases have had at most.
    """

    def __init__(
        self, device: Device, kernels: Kernels, specs: Sequence[CacheSpec], *, context_length: int, half: bool
    ) -> None:
        self.version = 0
        self.slots = 0
        self.specs = tuple(specs)
        self._device = device
        self._kernels = kernels
        self._itemsize = 2 if half else 4
        self._context = context_length
        windows = {window for spec in specs if (window := self.window(spec)) < context_length}
        if len(windows) > 1:
            raise NotImplementedError(f"windows of {sorted(windows)} are more than one kind")
        self._windows = [min(windows, default=context_length), context_length]
        self._rows = [Rows() for _ in range(_RINGS)]
        self._kinds = sorted({self.ring_of(cache) for cache in range(len(self.specs))})  # of rings that there are
        self._buffers: list[tuple[Buffer, Buffer] | None] = [None] * len(self.specs)
        self._kept: list[Stored] = []  # the one that ended last is last
        self._leases: dict[Lease, Stored] = {}
        self._free_slots: list[int] = []
        self._copies: list[Buffer] = []
        self._clock = itertools.count(1)

    # The shapes.

    def window(self, spec: CacheSpec) -> int:
        """Return how many positions a query sees, itself included."""
        return min(spec.window or self._context, self._context)

    def ring_of(self, cache: int) -> int:
        """Return the kind of ring that a cache has: 0 with a window, 1 without one."""
        return int(self.window(self.specs[cache]) == self._context)

    def capacity(self, ring: int) -> int:
        """Return the rows that a ring of this kind has at most."""
        return min(self._windows[ring] + ROLLBACK, self._context)

    def keys(self, cache: int) -> Buffer:
        """Return the keys of a cache."""
        return self._pair(cache)[0]

    def values(self, cache: int) -> Buffer:
        """Return the values of a cache."""
        return self._pair(cache)[1]

    def _pair(self, cache: int) -> tuple[Buffer, Buffer]:
        pair = self._buffers[cache]
        assert pair is not None, "no sequence was begun yet"
        return pair

    def row_bytes(self, cache: int) -> int:
        """Return the bytes of a position's keys in a cache, or of its values."""
        return self.specs[cache].size * self._itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all caches, and of what it takes to copy rows."""
        caches = sum(buffer.size for pair in self._buffers if pair for buffer in pair)
        return caches + sum(buffer.size for buffer in self._copies)

    # The sequences.

    def lease(self, ids: Sequence[int], most: int) -> Lease:
        """Begin a sequence of `ids`, of which `most` at most may come from what the cache holds.

        Raises DeviceError if the GPU's memory is exhausted.
        """
        stored = self._begun(ids, most)
        if not self._free_slots:
            self._free_slots.append(self.slots)
            self.slots += 1
        lease = Lease(self, stored, self._free_slots.pop())
        self._leases[lease] = stored
        return lease

    def _begun(self, ids: Sequence[int], most: int) -> Stored:
        window = self._windows[0]

        def usable(stored: Stored) -> int:
            return stored.common(ids, most, window)

        kept = max(self._kept, key=usable, default=None)
        common = usable(kept) if kept else 0
        if kept and (common == most or 2 * common >= kept.computed):  # most of it goes on being of use
            self._kept.remove(kept)
            kept.computed = common
            if not kept.computed:
                kept.oldest = 0
            kept.ids = list(ids)
            return kept
        stored = Stored([Ring(0, 0)] * _RINGS, list(ids))
        model = max((*self._leases.values(), *self._kept), key=usable, default=None)
        common = usable(model) if model else 0
        if common < _WORTH_COPYING:
            common = 0
        try:
            self._grow(stored, max(common, 1), also=model)
            if model and common:
                stored.oldest = max(model.oldest, common - self.capacity(0), 0)
                self._copy(model.rings, stored.rings, (stored.oldest, 0), common)
                stored.computed = common
        except BaseException:
            self._free(stored)
            raise
        return stored

    def note(self, stored: Stored) -> None:
        """Note that a sequence has moved on."""
        stored.moved = next(self._clock)

    def newest(self) -> Stored | None:
        """Return the sequence that moved on last."""
        return max((*self._leases.values(), *self._kept), key=lambda stored: stored.moved, default=None)

    def put(self, ids: Sequence[int], oldest: int) -> Stored:
        """Make room for a sequence that somebody else computed; it is kept as one that has just ended.

        Positions from `oldest` on are at hand for rings with a window. Raises DeviceError if the GPU's memory is
        exhausted.
        """
        stored = Stored([Ring(0, 0)] * _RINGS, list(ids), len(ids), max(oldest, len(ids) - self.capacity(0)))
        try:
            self._grow(stored, max(len(ids), 1))
        except BaseException:
            self._free(stored)
            raise
        self.note(stored)
        self._kept.append(stored)
        return stored

    def forget(self, why: str) -> None:
        """Drop all sequences; those that are leased end, and `why` is what is said of it."""
        for lease in list(self._leases):
            lease.end(why)
        for stored in self._kept:
            self._free(stored)
        self._kept.clear()

    def _keep(self, lease: Lease, stored: Stored) -> None:
        self._end(lease)
        self._kept.append(stored)
        for ring in self._kinds:
            self._make_room(ring, max(1, len(self._leases)), 0, also=stored)

    def _drop(self, lease: Lease, stored: Stored) -> None:
        self._end(lease)
        self._free(stored)

    def _end(self, lease: Lease) -> None:
        del self._leases[lease]
        self._free_slots.append(lease.slot)

    # The rows.

    def _free(self, stored: Stored) -> None:
        for rows, ring in zip(self._rows, stored.rings, strict=True):
            if ring.capacity:
                rows.give(ring)
        stored.rings = [Ring(0, 0)] * _RINGS

    def _grow(self, stored: Stored, length: int, also: Stored | None = None) -> None:
        """Give a sequence room for `length` positions; `also` is another one that must stay."""
        for ring in self._kinds:
            old, most = stored.rings[ring], self.capacity(ring)
            needed = min(length, most)
            if old.capacity >= needed:
                continue
            capacity = min(max(_SMALLEST_RING, 1 << (needed - 1).bit_length()), most)
            rows = self._rows[ring]
            live = len(self._leases) + (stored not in self._leases.values())
            self._make_room(ring, live, capacity - old.capacity, also)
            if old.capacity and (larger := rows.extend(old, capacity)):
                stored.rings[ring] = larger
            elif found := rows.take(capacity):
                moved = [found if kind == ring else other for kind, other in enumerate(stored.rings)]
                self._copy(stored.rings, moved, (0, 0), min(stored.computed, old.capacity), rings=(ring,))
                if old.capacity:
                    rows.give(old)
                stored.rings[ring] = found
            else:
                self._rebuild(ring, stored, capacity, live)

    def _make_room(self, ring: int, live: int, more: int, also: Stored | None = None) -> None:
        """Drop sequences that ended, the longest ago first, until `more` rows fit what the live ones may need.

        One window more is kept in any case, so that a short text between does not cost a long one its cache.
        """
        room = live * self.capacity(ring) + self.capacity(0)
        used = more + sum(stored.rings[ring].capacity for stored in (*self._leases.values(), *self._kept))
        for stored in list(self._kept):
            if used <= room:
                return
            if stored is not also:
                used -= stored.rings[ring].capacity
                self._kept.remove(stored)
                self._free(stored)

    def _rebuild(self, ring: int, stored: Stored, capacity: int, live: int) -> None:
        """Put all sequences into larger buffers, one after the other, and one of them with a larger ring."""
        sequences = [stored, *(other for other in (*self._leases.values(), *self._kept) if other is not stored)]
        capacities = [capacity, *(other.rings[ring].capacity for other in sequences[1:])]
        total = sum(capacities)
        spare = max(0, min(total // 2, live * self.capacity(ring) - total))
        caches = [cache for cache in range(len(self.specs)) if self.ring_of(cache) == ring]
        try:
            pairs = self._allocated(caches, total + spare)
        except DeviceError:
            spare, pairs = 0, self._allocated(caches, total)
        self.version += 1
        starts = [0, *itertools.accumulate(capacities)]
        for cache, pair in zip(caches, pairs, strict=True):
            row_bytes, before = self.row_bytes(cache), self._buffers[cache] or ()
            for old, new in zip(before, pair, strict=bool(before)):
                for sequence, start in zip(sequences, starts, strict=False):
                    rows = sequence.rings[ring]
                    if rows.capacity:
                        # A ring that grows has not gone round yet, so that its rows stay in their order.
                        size = rows.capacity * row_bytes
                        self._device.copy(old, new, size, rows.start * row_bytes, start * row_bytes)
                old.destroy()
            self._buffers[cache] = pair
        for sequence, start, count in zip(sequences, starts, capacities, strict=False):
            if count:
                sequence.rings[ring] = Ring(start, count)
        self._rows[ring] = Rows(total + spare, total)

    def _allocated(self, caches: Sequence[int], rows: int) -> list[tuple[Buffer, Buffer]]:
        """Return new buffers for the keys and the values of caches; none are made unless all can be."""
        made: list[Buffer] = []
        try:
            for cache in caches:
                spec, size = self.specs[cache], rows * self.row_bytes(cache)
                for what in ("keys", "values"):
                    label = f"{what} of cache {cache} ({spec.kv_heads} heads of {spec.head_dim})"
                    made.append(self._device.buffer(size, label))
        except BaseException:
            for buffer in made:
                buffer.destroy()
            raise
        return list(zip(made[::2], made[1::2], strict=True))

    def _copy(
        self,
        source: Sequence[Ring],
        target: Sequence[Ring],
        first: tuple[int, int],
        stop: int,
        rings: Sequence[int] = range(_RINGS),
    ) -> None:
        """Copy positions [first[ring], stop) from the rings of one sequence to those of another one."""
        launches, words = [], []
        for ring in rings:
            positions = stop - first[ring]
            caches = [cache for cache in range(len(self.specs)) if self.ring_of(cache) == ring]
            if positions <= 0 or not caches:
                continue
            old, new = source[ring], target[ring]
            words.append([old.start, old.capacity, new.start, new.capacity, first[ring], positions])
            if len(self._copies) < len(words):
                self._copies.append(self._device.buffer(24, "copy of rows"))
            copy = self._copies[len(words) - 1]
            self._device.write(copy, np.array(words[-1], np.uint32))
            launches += [
                self._kernels.cache_copy(
                    copy, self.keys(cache), self.values(cache), size=self.specs[cache].size, count=positions
                )
                for cache in caches
            ]
        if launches:
            self._device.submit([record(self._device, launches)])


def ring_words(rings: Sequence[Ring]) -> NDArray[np.uint32]:
    """Return `rings` of the struct State of shaders/state.wgsl."""
    # A ring that no cache of the model has is never looked at, but a division by its capacity must not be by 0.
    words = [(ring.start, max(ring.capacity, 1)) for ring in rings]
    return np.array(words, np.uint32).reshape(-1)
