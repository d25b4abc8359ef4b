"""Where requests share the GPU.

The rest of the server knows of it that a request is submitted and is a stream, which can be cancelled by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from gemma_wgpu.engine.request import Piece, Stats, Text
from gemma_wgpu.errors import DeviceError, GemmaError
from gemma_wgpu.gemma import Gemma

log = logging.getLogger(__name__)


class BusyError(GemmaError):
    """As many requests are waiting as may; another one can be made in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(GemmaError):
    """The turn was cancelled before it ended."""

    def __init__(self) -> None:
        super().__init__("the server stopped before this request was done; try again")


class Turn:
    """The texts of one request, waiting or under way.

    Iterate over (index of the text, its next Piece), where a Piece of None is its end; on the event loop that
    submitted it. Raises StoppedError where it was cancelled, and what its generation raises.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.submitted = time.perf_counter()
        self.cancelled = False
        self.to_begin = deque(enumerate(texts))
        self.running = 0  # texts
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, Piece | None] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        left = len(self.texts)
        while left:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1] is None
            yield item

    @property
    def waits(self) -> bool:
        """Whether none of its texts has begun."""
        return len(self.to_begin) == len(self.texts) and not self.cancelled

    def cancel(self) -> None:
        """End it: at once where it waits, after a token or a chunk of the prompt where it runs.

        Idempotent, from any thread. Other requests go on.
        """
        self.cancelled = True
        self.put(StoppedError())

    def put(self, item: tuple[int, Piece | None] | Exception) -> None:
        """Hand something over, from any thread."""
        with suppress(RuntimeError):  # the event loop was closed, and nobody listens
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


@dataclass
class _Place:
    """Of a text under way: whose it is, which one of them, and the seconds for which it waited."""

    turn: Turn
    index: int
    waited: float


class Engine:
    """Generates the texts of requests, up to `batch_size` side by side; they join and leave between two steps.

    They are on a thread of its own, since a GPU is driven by one thread, and nobody else may use `gemma`. `waiting`
    texts may wait beside those under way. `on_end` is called on that thread with the figures of each text that came
    to an end, why it did, and the seconds that it waited. A context manager: `close` stops what runs.

    Raises DeviceError where the GPU's memory is exhausted.
    """

    def __init__(
        self, gemma: Gemma, batch_size: int, waiting: int, on_end: Callable[[Stats, str, float], None]
    ) -> None:
        self.failure: DeviceError | None = None  # of the last step
        self._device = gemma.device
        self._scheduler = gemma.scheduler(batch_size)
        self._batch_size = batch_size
        self._most = batch_size + waiting
        self._on_end = on_end
        self._turns: list[Turn] = []  # that have not ended
        self._places: dict[Text, _Place] = {}
        self._closed = False
        self._seconds = 1.0  # that a turn lasts, by and large
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="gemma_wgpu engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(turn.waits for turn in self._turns)

    @property
    def running(self) -> int:
        """Requests under way."""
        return sum(turn.running > 0 for turn in self._turns)

    def submit(self, texts: Sequence[Text]) -> Turn:
        """Generate the texts of a request, none of which has begun.

        Raises BusyError where too many wait, StoppedError after `close`.
        """
        turn = Turn(texts)
        with self._changed:
            if self._closed:
                raise StoppedError
            if sum(turn.running + len(turn.to_begin) for turn in self._turns) >= self._most:
                raise BusyError(self.waiting, min(max(math.ceil(self._seconds), 1), 60))
            self._turns.append(turn)
            self._changed.notify()
        return turn

    def close(self) -> None:
        """Cancel all turns, and wait until the GPU is left alone. Idempotent."""
        with self._changed:
            self._closed = True
            for turn in self._turns:
                turn.cancel()
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while self._admit():
            try:
                pieces = self._device.wait(self._scheduler.step())
            except Exception as error:
                self._fail(error)
            else:
                self._hand_over(pieces)

    def _admit(self) -> bool:
        """Let go of what has ended, wait for something to do, and begin what there is room for; False is the end."""
        with self._changed:
            for text, place in list(self._places.items()):
                if place.turn.cancelled:
                    self._scheduler.remove(text)
                    self._end(text, "cancelled")
            ended = [turn for turn in self._turns if not turn.running and (turn.cancelled or not turn.to_begin)]
            for turn in ended:
                self._turns.remove(turn)
                self._seconds += (time.perf_counter() - turn.submitted - self._seconds) / 4
            self._changed.wait_for(lambda: self._turns or self._closed)
            for turn in self._turns:
                while turn.to_begin and not turn.cancelled and len(self._places) < self._batch_size:
                    index, text = turn.to_begin.popleft()
                    turn.running += 1
                    self._places[text] = _Place(turn, index, time.perf_counter() - turn.submitted)
                    self._scheduler.add(text)
            return bool(self._turns)

    def _hand_over(self, pieces: Iterable[tuple[Text, Piece]]) -> None:
        self.failure = None
        for text, piece in pieces:
            place = self._places[text]
            place.turn.put((place.index, piece))
        for text, place in list(self._places.items()):
            if reason := text.stats.finish_reason:
                place.turn.put((place.index, None))
                self._end(text, reason)

    def _fail(self, error: Exception) -> None:
        """What was under way has ended by `error`."""
        if isinstance(error, DeviceError):
            self.failure = error
        elif not isinstance(error, GemmaError):
            log.error("a step failed", exc_info=error)
        for text, place in list(self._places.items()):
            place.turn.put(error)
            place.turn.to_begin.clear()
            self._end(text, "failed")

    def _end(self, text: Text, reason: str) -> None:
        place = self._places.pop(text)
        place.turn.running -= 1
        self._on_end(text.stats, reason, place.waited)
