"""Texts under way, as Python sees them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import Generic, TypeVar

from gemma_wgpu import html
from gemma_wgpu.engine.request import Piece, Request, Stats
from gemma_wgpu.engine.scheduler import Scheduler

T = TypeVar("T")


class _Stream(ABC, Generic[T]):
    """Items of texts under way, for both `for` and `async for`. Nothing is computed before the first item."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._begun = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._scheduler.device.wait(self._next())
        except StopAsyncIteration:
            raise StopIteration from None
        except KeyboardInterrupt:  # natively it comes from outside of the coroutine
            self._interrupt()
            raise

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._next()
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._interrupt()
            raise

    def __del__(self) -> None:
        for request in self._requests:  # this may be any thread: the scheduler acts on it when it is its turn
            request.abandoned = True

    async def _next(self) -> T:
        if not self._begun:
            self._begin()
            self._begun = True
        while (item := self._take()) is None:
            await self._scheduler.advance()
        return item

    @abstractmethod
    def _begin(self) -> None:
        """Add texts to the scheduler."""

    @abstractmethod
    def _take(self) -> T | None:
        """Return the next item, if it is there. Raises StopAsyncIteration after the last one."""

    def _interrupt(self) -> None:
        for request in self._requests:
            self._scheduler.remove(request)


class Generation(_Stream[Piece]):
    """A text under way.

    Iterate over its Pieces, with `for` if the platform can block, or with `async for`. Or take the whole text:
    `generation.result()`, `str(generation)` or `await generation`. `text` and `ids` are what has come so far, `stats`
    says how it goes. A token that ends the text is not part of it. If the model thinks before it answers, `answer` is
    the text without its thoughts, and `thought` is what it thought, shown or not.
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        super().__init__(scheduler, [request])
        self.request = request

    @property
    def text(self) -> str:
        """Return what has come so far."""
        return self.request.text

    @property
    def answer(self) -> str:
        """Return what has come so far, without thoughts."""
        return self.request.answer

    @property
    def thought(self) -> str:
        """Return what the model has thought so far."""
        return self.request.thought

    @property
    def ids(self) -> list[int]:
        """Return the token ids that have come so far, those of thoughts too."""
        return self.request.ids

    @property
    def stats(self) -> Stats:
        """Return how it goes."""
        return self.request.stats

    @property
    def seed(self) -> int:
        """Return the seed, which was drawn if none was given."""
        return self.request.seed

    def result(self) -> str:
        """Generate to the end; return the whole text."""
        for _ in self:
            pass
        return self.text

    def __str__(self) -> str:
        return self.result()

    def __await__(self) -> Generator[object, None, str]:
        return self._all().__await__()

    async def _all(self) -> str:
        async for _ in self:
            pass
        return self.text

    def _repr_html_(self) -> str:
        stats = self.stats
        if not stats.new_tokens:
            return "<i>Nothing has been generated yet: iterate over this, print it, or await it.</i>"
        return html.text(
            self.text,
            f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
            f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason or 'under way'})",
        )

    def _begin(self) -> None:
        self._scheduler.add(self.request)

    def _take(self) -> Piece | None:
        if self.request.pieces:
            return self.request.pieces.popleft()
        if self.request.error is not None:
            error, self.request.error = self.request.error, None
            self.request.stats.finish_reason = "interrupted"
            raise error
        if self.request.ended:
            raise StopAsyncIteration
        return None


class Generations(_Stream[tuple[int, Piece]]):
    """Texts under way side by side.

    Iterate over (index of the prompt, Piece), or take all texts: `generations.result()` or `await generations`.
    `texts`, `answers`, `thoughts`, `ids`, `stats` and `seeds` are those of a Generation, in a list by prompt. At most
    `batch_size` of the texts are under way at a time.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request], batch_size: int) -> None:
        super().__init__(scheduler, requests)
        self._waiting = list(reversed(list(enumerate(requests))))
        self._running: dict[int, Request] = {}
        self._batch_size = batch_size

    @property
    def texts(self) -> list[str]:
        """Return what has come so far."""
        return [request.text for request in self._requests]

    @property
    def answers(self) -> list[str]:
        """Return what has come so far, without thoughts."""
        return [request.answer for request in self._requests]

    @property
    def thoughts(self) -> list[str]:
        """Return what the model has thought so far."""
        return [request.thought for request in self._requests]

    @property
    def ids(self) -> list[list[int]]:
        """Return the token ids that have come so far."""
        return [request.ids for request in self._requests]

    @property
    def stats(self) -> list[Stats]:
        """Return how it goes."""
        return [request.stats for request in self._requests]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds."""
        return [request.seed for request in self._requests]

    def result(self) -> list[str]:
        """Generate to the end; return all texts."""
        for _ in self:
            pass
        return self.texts

    def __await__(self) -> Generator[object, None, list[str]]:
        return self._all().__await__()

    async def _all(self) -> list[str]:
        async for _ in self:
            pass
        return self.texts

    def _repr_html_(self) -> str:
        return "".join(
            html.text(request.text, request.stats.finish_reason or "under way") for request in self._requests
        )

    def _begin(self) -> None:
        self._scheduler.reserve(min(self._batch_size, len(self._requests)))
        self._add()

    def _add(self) -> None:
        while self._waiting and len(self._running) < self._batch_size:
            index, request = self._waiting.pop()
            self._running[index] = request
            self._scheduler.add(request)

    def _take(self) -> tuple[int, Piece] | None:
        for index, request in list(self._running.items()):
            if request.pieces:
                return index, request.pieces.popleft()
            if request.error is not None:
                error = request.error
                self._interrupt()
                self._running.clear()
                self._waiting.clear()
                raise error
            if request.ended:
                del self._running[index]
        self._add()
        if not self._running:
            raise StopAsyncIteration
        return None
