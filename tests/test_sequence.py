"""Which tokens are taken from the cache: against a cache that remembers what lies in each of its slots."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_wgpu.engine.sequence import Sequence

WINDOW, SPARE, CONTEXT = 5, 3, 40


class Cache:
    """A ring, and a cache of all positions: (position, token before it and itself) in each slot."""

    def __init__(self, capacity: int) -> None:
        self.ring: list[object] = [None] * capacity
        self.whole: list[object] = [None] * CONTEXT

    def write(self, ids: list[int], position: int) -> None:
        self.ring[position % len(self.ring)] = self.whole[position] = (position, ids[: position + 1])

    def check(self, ids: list[int], position: int) -> None:
        """All that a query at `position` sees is there and belongs to `ids`."""
        for seen in range(position + 1):
            assert self.whole[seen] == (seen, ids[: seen + 1])
            if seen > position - WINDOW:
                assert self.ring[seen % len(self.ring)] == (seen, ids[: seen + 1])


turns = st.tuples(
    st.integers(0, 8),  # tokens at the end that are given up
    st.lists(st.integers(0, 1), min_size=1, max_size=8),  # and those that come instead
    st.integers(0, 6),  # tokens that are generated
    st.integers(-1, SPARE),  # steps beyond, of which nobody knows; or -1: the last token is not computed
    st.integers(0, 2 * CONTEXT),  # the first position whose logits are wanted
)


@settings(max_examples=500)
@given(st.lists(turns, min_size=1, max_size=12))
def test_what_is_reused_is_there(conversation: list[tuple[int, list[int], int, int, int]]) -> None:
    sequence, cache = Sequence(WINDOW, WINDOW + SPARE), Cache(WINDOW + SPARE)
    ids: list[int] = []
    for back, more, known, beyond, first in conversation:
        ids = [*ids[: max(0, len(ids) - back)], *more][:CONTEXT]
        most = min(first, len(ids) - 1)
        assert sequence.begin(ids, most) == sequence.computed <= most
        so_far = list(ids)
        for n in range(known + beyond + 1):
            for position in range(sequence.computed, len(so_far)):
                cache.write(so_far, position)
                cache.check(so_far, position)
            sequence.advance(len(so_far))
            if len(so_far) == CONTEXT:
                break
            so_far = [*so_far, n % 2]
            if n < known:
                ids = so_far
                sequence.ids.append(ids[-1])


def begun(sequence: Sequence, ids: list[int]) -> int:
    reused = sequence.begin(ids, len(ids) - 1)
    sequence.advance(len(ids))
    return reused


def test_a_conversation_that_goes_on_is_not_computed_again() -> None:
    sequence = Sequence(WINDOW, WINDOW + SPARE)
    ids = list(range(20))
    assert begun(sequence, ids[:12]) == 0
    assert begun(sequence, ids[:15]) == 12
    assert begun(sequence, ids) == 15
    assert begun(sequence, ids) == 19


def test_going_back_as_far_as_the_ring_reaches() -> None:
    ids = list(range(20))
    for back, reused in ((1, 19), (SPARE + 1, 19 - SPARE), (SPARE + 2, 0), (12, 0)):
        sequence = Sequence(WINDOW, WINDOW + SPARE)
        begun(sequence, ids)
        assert begun(sequence, [*ids[:-back], 77]) == reused, back


def test_a_new_text_makes_room_to_go_back() -> None:
    sequence = Sequence(WINDOW, WINDOW + SPARE)
    begun(sequence, list(range(20)))
    begun(sequence, [77, 78, 79])
    assert begun(sequence, [77, 78]) == 1


def test_in_a_short_text_one_can_go_back_anywhere() -> None:
    sequence = Sequence(WINDOW, WINDOW + SPARE)
    begun(sequence, list(range(WINDOW + SPARE)))
    assert begun(sequence, [0, 1, 77]) == 2


def test_nothing_is_reused_of_what_is_forgotten() -> None:
    sequence = Sequence(WINDOW, WINDOW + SPARE)
    begun(sequence, [1, 2, 3])
    sequence.forget()
    assert begun(sequence, [1, 2, 3]) == 0
