"""The place where the clients of the server share the GPU.

The rest of the server knows that a job is submitted and is a stream, which can be cancelled by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from gemma_wgpu.engine.request import Piece, Request, Stats
from gemma_wgpu.errors import DeviceError, GemmaError
from gemma_wgpu.gemma import Gemma

log = logging.getLogger(__name__)


class BusyError(GemmaError):
    """As many jobs are waiting as may; the client can try again in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(GemmaError):
    """The job was cancelled before it ended."""

    def __init__(self) -> None:
        super().__init__("the server stopped before this request was done; try again")


class Job:
    """The texts that one client asked for at once, waiting or under way.

    Iterate over (index of the text, its next Piece), on the event loop that submitted it. A Piece of None is the end
    of a text. Raises StoppedError if the job was cancelled, and the error that ended one of its texts.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.submitted = time.perf_counter()
        self.cancelled = False
        self.to_begin = deque(enumerate(requests))
        self.running = 0  # texts
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, Piece | None] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        left = len(self.requests)
        while left:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1] is None
            yield item

    @property
    def waits(self) -> bool:
        """Say whether none of its texts has begun."""
        return len(self.to_begin) == len(self.requests) and not self.cancelled

    def cancel(self, error: Exception | None = None) -> None:
        """End it by an error, a StoppedError if none is given.

        It ends at once if it waits, and after a token or a chunk of the prompt if it runs. Other jobs go on. This is
        idempotent, and can be called from any thread.
        """
        self.cancelled = True
        self.put(error or StoppedError())

    def put(self, item: tuple[int, Piece | None] | Exception) -> None:
        """Hand something over, from any thread."""
        with suppress(RuntimeError):  # the event loop was closed, and nobody listens
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


@dataclass(frozen=True)
class _Place:
    """The place of a text under way: its job, its index there, and the seconds for which it waited."""

    job: Job
    index: int
    waited: float


class Engine:
    """Generates the texts of jobs, up to `batch_size` side by side; they join and leave between two steps.

    They are generated on a thread of the engine's own. `waiting` texts may wait beside those under way. `on_end` is
    called on that thread with the figures of each text that has ended, why it did, and the seconds that it waited.
    `failure` is the GPU's error in the last step, if there was one. The engine is a context manager: `close` stops
    what runs.

    Raises DeviceError if the GPU's memory is exhausted.
    """

    def __init__(
        self, gemma: Gemma, batch_size: int, waiting: int, on_end: Callable[[Stats, str, float], None]
    ) -> None:
        self.failure: DeviceError | None = None
        self._device = gemma.device
        self._scheduler = gemma.scheduler
        self._scheduler.reserve(batch_size)
        self._batch_size = batch_size
        self._most = batch_size + waiting
        self._on_end = on_end
        self._jobs: list[Job] = []  # those that have not ended
        self._places: dict[Request, _Place] = {}
        self._closed = False
        self._seconds = 1.0  # for which a job lasts, on average
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="gemma_wgpu engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return how many jobs wait."""
        return sum(job.waits for job in self._jobs)

    @property
    def running(self) -> int:
        """Return how many jobs are under way."""
        return sum(job.running > 0 for job in self._jobs)

    def submit(self, requests: Sequence[Request]) -> Job:
        """Generate the texts of a client, none of which has begun.

        Raises BusyError if too many wait, and StoppedError after `stop` and `close`.
        """
        job = Job(requests)
        with self._changed:
            if self._closed:
                raise StoppedError
            if sum(job.running + len(job.to_begin) for job in self._jobs) >= self._most:
                raise BusyError(self.waiting, min(max(math.ceil(self._seconds), 1), 60))
            self._jobs.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Cancel all jobs, and take no others. It does not wait for them, and is idempotent."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancel()
            self._changed.notify()

    def close(self) -> None:
        """Do what `stop` does, and wait until the GPU is left alone. It is idempotent."""
        self.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while self._admit():
            try:
                self._device.wait(self._scheduler.advance())
            except Exception as error:
                self._scheduler.clear(error)
            self._hand_over()

    def _admit(self) -> bool:
        """Let go of what has ended, wait for something to do, and begin what there is room for.

        Returns False if the engine was closed and nothing is left to do.
        """
        with self._changed:
            for request, place in list(self._places.items()):
                if place.job.cancelled:
                    self._scheduler.remove(request)
                    self._end(request, "cancelled")
            ended = [job for job in self._jobs if not job.running and (job.cancelled or not job.to_begin)]
            for job in ended:
                self._jobs.remove(job)
                self._seconds += (time.perf_counter() - job.submitted - self._seconds) / 4
            self._changed.wait_for(lambda: self._jobs or self._closed)
            for job in self._jobs:
                while job.to_begin and not job.cancelled and len(self._places) < self._batch_size:
                    index, request = job.to_begin.popleft()
                    job.running += 1
                    self._places[request] = _Place(job, index, time.perf_counter() - job.submitted)
                    try:
                        self._scheduler.add(request)
                    except DeviceError as error:  # the model was closed
                        request.fail(error)
            return bool(self._jobs)

    def _hand_over(self) -> None:
        """Pass on the pieces that have come, and the ends of texts."""
        errors: set[Exception] = set()
        good = False
        for request, place in list(self._places.items()):
            good = good or bool(request.pieces)
            while request.pieces:
                place.job.put((place.index, request.pieces.popleft()))
            if request.error is not None:
                errors.add(request.error)
                self._end(request, "failed")
                place.job.cancel(request.error)
            elif request.stats.finish_reason is not None:
                good = True
                self._end(request, request.stats.finish_reason)
                place.job.put((place.index, None))
        for error in errors:
            if not isinstance(error, GemmaError):
                log.error("a step failed", exc_info=error)
        failures = [error for error in errors if isinstance(error, DeviceError)]
        if failures or good:
            self.failure = failures[0] if failures else None

    def _end(self, request: Request, reason: str) -> None:
        place = self._places.pop(request)
        place.job.running -= 1
        self._on_end(request.stats, reason, place.waited)
