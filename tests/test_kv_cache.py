"""The cache of keys and values: on a device in numpy, every row of which says what lies in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.gpu.device import Adapter, AdapterInfo, Buffer, Constants, Dispatch, Limits, Program
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.kv_cache import ROLLBACK, CacheSpec, KVCache, Lease, Ring, Rows, ring_words

WINDOW, CONTEXT = 150, 700  # past the smallest ring of 128 rows
SIZE = 4  # elements of a row
CAPACITY = WINDOW + ROLLBACK


class Words:
    """A buffer."""

    def __init__(self, size: int) -> None:
        self.words = np.full(size // 4, 0xDEADBEEF, np.uint32)

    def destroy(self) -> None:
        self.words = self.words[:0]


class Recorded(Program):
    def __init__(self, dispatches: Sequence[Dispatch]) -> None:
        self.dispatches = dispatches


class Memory(Ledger):
    """A device that keeps what is written, and runs one kernel: cache_copy."""

    def _create_buffer(self, size: int, label: str) -> Any:
        return Words(size)

    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        return constants

    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        words = np.ascontiguousarray(data).view(np.uint32).reshape(-1)
        buffer.handle.words[offset // 4 : offset // 4 + words.size] = words

    def copy(self, source: Buffer, target: Buffer, size: int, source_offset: int = 0, target_offset: int = 0) -> None:
        words = source.handle.words[source_offset // 4 : (source_offset + size) // 4]
        target.handle.words[target_offset // 4 : (target_offset + size) // 4] = words

    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        return Recorded(dispatches)

    def submit(self, programs: Sequence[Program]) -> None:
        for dispatch in itertools.chain.from_iterable(program.dispatches for program in programs):
            assert dispatch.pipeline.label == "cache_copy"
            copy, *caches = (buffer.handle.words for buffer in dispatch.bindings)
            start, capacity, new_start, new_capacity, first, count = copy[:6].astype(np.int64)
            positions = np.arange(first, first + count)
            for cache in caches:
                rows = cache[: len(cache) // SIZE * SIZE].reshape(-1, SIZE)
                rows[new_start + positions % new_capacity] = rows[start + positions % capacity].copy()


def memory(*, limit: int = 1 << 30) -> Memory:
    info = AdapterInfo("", "", "numpy", "", "Vulkan", "CPU")
    return Memory(Adapter(info, Limits(limit, limit, 8, 1 << 15, 256, 65535), frozenset()))


def cache_on(device: Memory, context: int = CONTEXT) -> KVCache:
    specs = [CacheSpec(1, SIZE, WINDOW), CacheSpec(1, SIZE, None)]
    return KVCache(device, Kernels(device, half=False), specs, context_length=context, half=False)


def row(ids: Sequence[int], position: int) -> list[int]:
    """What lies in the row of a position."""
    digest = 0
    for token in ids[: position + 1]:
        digest = (digest * 31 + token + 1) & 0xFFFFFFFF
    return [position, digest, len(ids[: position + 1]), ids[position]]


class Text:
    """A sequence that somebody has, and all that it says, also what nobody knows of."""

    def __init__(self, cache: KVCache, ids: list[int], most: int) -> None:
        self.cache = cache
        self.ids = list(ids)
        self.lease = cache.lease(ids, most)
        self.known = len(ids)
        assert 0 <= self.lease.reused == self.lease.computed <= most

    def advance(self) -> None:
        """Compute what is known and not computed, one token after the other."""
        for position in range(self.lease.computed, len(self.ids)):
            self.lease.reserve(position + 1)
            for index, words in self._words():
                ring = self.lease.rings[self.cache.ring_of(index)]
                words[ring.start + position % ring.capacity] = row(self.ids, position)
            self.lease.advance(position + 1)
            self.check(position)

    def check(self, position: int) -> None:
        """All that a query at `position` sees is there."""
        for index, words in self._words():
            ring = self.lease.rings[self.cache.ring_of(index)]
            first = max(0, position + 1 - self.cache.window(self.cache.specs[index]))
            for seen in {first, (first + position) // 2, position, max(first, position - 1)}:
                assert words[ring.start + seen % ring.capacity].tolist() == row(self.ids, seen), (index, seen)

    def _words(self) -> list[tuple[int, NDArray[np.uint32]]]:
        return [
            (index, buffer.handle.words[: buffer.size // 16 * SIZE].reshape(-1, SIZE))
            for index in range(2)
            for buffer in (self.cache.keys(index), self.cache.values(index))
        ]

    def generate(self, known: int, beyond: int) -> None:
        """Go on by some tokens, of which the last ones are computed, and nobody knows them."""
        for n in range(known + beyond):
            if len(self.ids) == CONTEXT:
                break
            self.ids.append(n % 3)
            if n < known:
                self.lease.append(n % 3)
                self.known += 1
            self.advance()


actions = st.tuples(
    st.sampled_from(["begin", "begin", "begin", "generate", "generate", "release", "end", "forget"]),
    st.integers(0, 7),  # which text
    st.integers(0, 250),  # tokens at its end that are given up, or that are generated
    st.lists(st.integers(0, 2), min_size=1, max_size=120),  # tokens that come instead
    st.integers(0, ROLLBACK),  # steps beyond, of which nobody knows
    st.integers(0, 2 * CONTEXT),  # the first position whose logits are wanted
)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.lists(actions, min_size=1, max_size=14))
def test_every_sequence_finds_what_it_computed(
    history: list[tuple[str, int, int, list[int], int, int]],
) -> None:
    device = memory()
    cache = cache_on(device)
    texts: list[Text] = []
    said: list[list[int]] = [[]]
    for action, which, count, more, beyond, first in history:
        if action == "begin":
            model = said[which % len(said)]
            ids = [*model[: max(0, len(model) - count)], *more][:CONTEXT]
            text = Text(cache, ids, min(first, len(ids) - 1))
            text.advance()
            texts.append(text)
            said.append(text.ids)
        elif action == "forget":
            cache.forget("all is forgotten")
            for text in texts:
                with pytest.raises(RequestError, match="^all is forgotten$"):
                    text.lease.reserve(1)
            texts.clear()
        elif texts:
            text = texts[which % len(texts)]
            if action == "generate":
                text.generate(count % 40, beyond)
            else:
                texts.remove(text)
                text.lease.release() if action == "release" else text.lease.end("it was ended")
        for text in texts:
            text.check(len(text.ids) - 1)
            assert text.lease.slot < cache.slots
        assert len({text.lease.slot for text in texts}) == len(texts)


def begun(cache: KVCache, ids: list[int]) -> int:
    """Compute a text, and give it back; how much of it was there."""
    text = Text(cache, ids, len(ids) - 1)
    text.advance()
    text.lease.release()
    return text.lease.reused


def test_a_conversation_that_goes_on_is_not_computed_again() -> None:
    cache, ids = cache_on(memory()), list(range(400))
    assert begun(cache, ids[:120]) == 0
    assert begun(cache, ids[:150]) == 120
    assert begun(cache, ids) == 150
    assert begun(cache, ids) == 399


def test_going_back_as_far_as_the_ring_reaches() -> None:
    ids = list(range(400))
    for back, reused in ((1, 399), (ROLLBACK + 1, 399 - ROLLBACK), (ROLLBACK + 2, 0), (120, 0)):
        cache = cache_on(memory())
        begun(cache, ids)
        assert begun(cache, [*ids[:-back], 777]) == reused, back


def test_in_a_short_text_one_can_go_back_anywhere() -> None:
    cache, ids = cache_on(memory()), list(range(CAPACITY))
    begun(cache, ids)
    assert begun(cache, [*ids[: CAPACITY // 2], 777]) == CAPACITY // 2


def test_a_short_text_between_does_not_cost_a_long_one_its_cache() -> None:
    """That is so as long as it is no longer than a window."""
    for between, reused in ((128, 600), (129, 0)):
        cache, ids = cache_on(memory()), list(range(600))
        begun(cache, ids)
        assert begun(cache, [7] * between) == 0
        assert begun(cache, [*ids, 1]) == reused


def test_what_others_begin_with_is_copied() -> None:
    cache, shared = cache_on(memory()), list(range(120))
    first = Text(cache, [*shared, 1], 120)
    first.advance()
    second = Text(cache, [*shared, 2], 120)
    assert second.lease.reused == 120
    second.advance()
    first.generate(60, 3)  # far from the other one's
    first.check(len(first.ids) - 1)
    second.check(len(second.ids) - 1)


def test_the_cache_is_bounded() -> None:
    """However many texts have ended, what is kept of them fits the room of one, and a window."""
    device = memory()
    cache = cache_on(device)
    row_bytes = cache.row_bytes(0)
    for start in range(12):
        begun(cache, list(range(start, start + 600)))
    assert cache.nbytes <= 2 * row_bytes * (3 * CAPACITY + CONTEXT + CAPACITY)
    for start in range(20):
        begun(cache, list(range(start, start + 50)))
    assert cache.nbytes <= 2 * row_bytes * (3 * CAPACITY + 2 * CONTEXT)


def test_one_text_takes_no_more_than_its_rows() -> None:
    cache = cache_on(memory())
    text = Text(cache, [1], 0)
    text.generate(CONTEXT - 1, 0)
    assert cache.nbytes == 2 * cache.row_bytes(0) * (CAPACITY + CONTEXT)


def test_memory_that_runs_out() -> None:
    """Sequences that have room go on. The one that needs more says so, and its rows are free again."""
    device = memory(limit=16 * 700)
    cache = cache_on(device)
    first, second = Text(cache, [1, 2, 3], 0), Text(cache, [4, 5, 6], 0)
    first.generate(300, 0)
    with pytest.raises(DeviceError, match="keys of cache 1"):
        second.generate(300, 0)
    first.generate(100, 0)
    second.lease.end("it failed")
    first.generate(290, 0)
    with pytest.raises(DeviceError, match="keys of cache 1"):
        cache.lease([7], 0)
    first.generate(5, 0)
    first.lease.end("it has ended")
    assert begun(cache, list(range(600))) == 0


def test_a_lease_that_was_given_back_can_do_nothing() -> None:
    cache = cache_on(memory())
    lease = cache.lease([1, 2], 0)
    lease.release()
    lease.release()
    lease.end("too late")
    for use in (
        lambda: lease.ids,
        lambda: lease.computed,
        lambda: lease.rings,
        lambda: lease.reserve(3),
        lambda: lease.advance(1),
        lambda: lease.append(7),
    ):
        with pytest.raises(RequestError, match="^this text has ended$"):
            use()
    assert begun(cache, [1, 2, 3]) == 0


def test_a_session_that_was_put_is_found() -> None:
    cache, ids = cache_on(memory()), list(range(400))
    running = Text(cache, [9, 8, 7], 0)
    running.advance()
    stored = cache.put(ids, 300)
    assert cache.newest() is stored
    assert stored.oldest == 300
    lease = cache.lease([*ids, 5], 400)
    assert lease.reused == 0  # 300 is too late for the window
    lease.end("it was looked at")
    assert cache.put(ids, 0).oldest == 400 - CAPACITY
    assert cache.lease([*ids, 5], 400).reused == 400
    running.generate(200, 0)


def test_rows() -> None:
    assert Rows().take(1) is None
    rows = Rows(110, 10)
    first, second, third = (rows.take(count) for count in (30, 20, 50))
    assert (first, second, third) == (Ring(10, 30), Ring(40, 20), Ring(60, 50))
    assert rows.take(1) is None
    assert first is not None
    assert second is not None
    assert third is not None
    assert rows.extend(first, 31) is None
    rows.give(second)
    assert rows.extend(first, 51) is None
    assert rows.extend(first, 45) == Ring(10, 45)
    rows.give(third)
    assert rows.take(56) is None
    assert rows.take(55) == Ring(55, 55)
    rows.give(Ring(10, 45))
    rows.give(Ring(55, 55))
    assert rows.take(100) == Ring(10, 100)


def test_runs_of_a_ring() -> None:
    assert list(Ring(10, 4).rows(2, 9)) == [(12, 2), (10, 4), (10, 1)]
    assert list(Ring(10, 4).rows(3, 3)) == []


def test_words_of_rings() -> None:
    assert ring_words([Ring(3, 4), Ring(0, 0)]).tolist() == [3, 4, 0, 1]


def test_two_windows_are_one_too_many() -> None:
    device = memory()
    with pytest.raises(NotImplementedError):
        KVCache(
            device,
            Kernels(device, half=False),
            [CacheSpec(1, SIZE, 5), CacheSpec(1, SIZE, 6)],
            context_length=40,
            half=False,
        )


def test_leases_by_identity() -> None:
    cache = cache_on(memory())
    leases = [cache.lease([1], 0) for _ in range(3)]
    assert sorted(lease.slot for lease in leases) == [0, 1, 2]
    leases[1].release()
    again: Lease = cache.lease([2], 0)
    assert again.slot == 1
    assert cache.slots == 3
