"""Where requests take turns at the GPU."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Self

from gemma_wgpu.errors import DeviceError, GemmaError
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.generate import Generation
from gemma_wgpu.text import Piece, Stats

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
    """The generations of one request, waiting or under way.

    Iterate over (index of the generation, its next Piece), where a Piece of None is its end; on the event loop that
    submitted it. Raises StoppedError where it was cancelled, and what the generation raises.
    """

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations
        self.submitted = time.perf_counter()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, Piece | None] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        open_generations = len(self.generations)
        while open_generations:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            open_generations -= item[1] is None
            yield item

    def put(self, item: tuple[int, Piece | None] | Exception) -> None:
        """Hand something over, from any thread."""
        with suppress(RuntimeError):  # the event loop was closed, and nobody listens
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Engine:
    """Runs generations of `gemma` one after the other, on a thread of its own: a GPU is driven by one thread.

    `waiting` requests may wait while one runs. `on_end` is called on that thread with the figures of each generation
    that came to an end, and the seconds that its request waited. A context manager: `close` stops what runs.
    """

    def __init__(self, gemma: Gemma, waiting: int, on_end: Callable[[Stats, float], None]) -> None:
        self.failure: DeviceError | None = None  # of the last generation
        self._gemma = gemma
        self._most = waiting
        self._on_end = on_end
        self._queue: deque[Turn] = deque()
        self._running: Turn | None = None
        self._closed = False
        self._seconds = 1.0  # that a turn lasts, by and large
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="gemma_wgpu engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests under way."""
        return int(self._running is not None)

    def submit(self, generations: Sequence[Generation]) -> Turn:
        """Let a request take its turn. None of `generations` has begun, and nobody else may iterate over them.

        Raises BusyError where too many wait, StoppedError after `close`.
        """
        turn = Turn(generations)
        with self._changed:
            if self._closed:
                raise StoppedError
            if self.waiting + self.running > self._most:
                raise BusyError(len(self._queue), min(max(math.ceil(self._seconds), 1), 60))
            self._queue.append(turn)
            self._changed.notify()
        return turn

    def cancel(self, turn: Turn) -> None:
        """End a turn: at once where it waits, after a token or a chunk of the prompt where it runs.

        Idempotent, from any thread.
        """
        with self._changed:
            turn.cancelled = True
            if turn is self._running:
                self._gemma.interrupt()
            elif turn in self._queue:
                self._queue.remove(turn)
        turn.put(StoppedError())

    def close(self) -> None:
        """Cancel all turns, and wait until the GPU is left alone. Idempotent."""
        with self._changed:
            self._closed = True
            turns = [*self._queue, *([self._running] if self._running else [])]
            self._changed.notify()
        for turn in turns:
            self.cancel(turn)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while turn := self._next():
            started = time.perf_counter()
            try:
                self._run(turn, started - turn.submitted)
                self.failure = None
            except Exception as error:
                if isinstance(error, DeviceError):
                    self.failure = error
                elif not isinstance(error, GemmaError):
                    log.exception("a generation failed")
                turn.put(error)
            self._seconds += (time.perf_counter() - started - self._seconds) / 4

    def _next(self) -> Turn | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            self._running = self._queue.popleft()
            return self._running

    def _run(self, turn: Turn, waited: float) -> None:
        for index, generation in enumerate(turn.generations):
            try:
                for piece in generation:
                    turn.put((index, piece))
                    if turn.cancelled:
                        raise StoppedError
            finally:
                self._on_end(generation.stats, waited)
            turn.put((index, None))
