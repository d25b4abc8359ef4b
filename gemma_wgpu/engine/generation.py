"""Text from a model: the loop around the GPU's steps."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import html
from gemma_wgpu.engine.model import ROLLBACK, Model
from gemma_wgpu.engine.request import Logprobs, Piece, Text
from gemma_wgpu.engine.scheduler import Scheduler
from gemma_wgpu.gpu.device import Device

_LATENESS = 0.005  # seconds from a step's end on the GPU to the next one's submission by a host that waits for it


T = TypeVar("T")


class _Stream(ABC, Generic[T]):
    """An iterator for both `for` and `async for`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._items = self._run()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._device.wait(self._next())
        except StopAsyncIteration:
            raise StopIteration from None
        except KeyboardInterrupt:  # natively it comes from outside of the coroutine
            self._interrupted()
            raise

    def __aiter__(self) -> AsyncIterator[T]:
        return self._items

    async def _next(self) -> T:
        return await anext(self._items)

    @abstractmethod
    def _run(self) -> AsyncIterator[T]:
        """The items as they come."""

    @abstractmethod
    def _interrupted(self) -> None:
        """There will be no more."""


class Generation(_Stream[Piece]):
    """Text under way: iterate over its Pieces, with `for` where the platform can block, or with `async for`.

    `text` and `ids` are what has come so far, `stats` how it goes. A token that ends the text is not part of it.
    Leaving the loop early, or starting another generation on the same model, ends this one.
    """

    def __init__(self, model: Model, text: Text) -> None:
        self.draft = text
        self.sampling, self.stats = text.sampling, text.stats
        self.ids = text.ids
        self._model = model
        self._logprobs: Logprobs | None = None  # of the last token
        super().__init__(model.device)

    @property
    def text(self) -> str:
        """What has come so far."""
        return self.draft.text

    def _repr_html_(self) -> str:
        stats = self.stats
        if not stats.new_tokens:
            return "<i>Nothing yet: the text comes as this is iterated over.</i>"
        return html.text(
            self.text,
            f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
            f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason or 'under way'})",
        )

    def _interrupted(self) -> None:
        self.stats.finish_reason = "interrupted"

    async def _run(self) -> AsyncIterator[Piece]:
        try:
            async for token in self.tokens():
                for piece in self.draft.push(token, self._logprobs):
                    yield piece
                if self.stats.finish_reason:
                    return
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._interrupted()
            raise

    async def tokens(self) -> AsyncIterator[int]:
        """Instead of the Pieces, the tokens as they come from the GPU, whatever they say: past the text's end too.

        The GPU is always some steps ahead of the host, unless a constraint has to know a token before the next one.
        """
        model, draft, stats, length = self._model, self.draft, self.stats, len(self.draft.prompt)
        mask = draft.mask
        draft.begin()
        turn = model.begin(draft.prompt, draft.sampling)
        stats.reused_tokens = model.sequence.computed
        await model.prefill()
        pending = deque([(model.sample(length, mask), self._logits())])
        stats.dispatches_per_token = model.decode_dispatches + bool(mask)
        submitted = 1
        for n in range(1, draft.most + 1):
            # Steps past the end of the text are for nothing, so only as many ahead as a host may be late.
            ahead = 0 if mask else min(1 + int(_LATENESS * stats.decode_tokens_per_second), ROLLBACK)
            while submitted < min(draft.most, n + ahead):
                pending.append((model.decode(length + submitted, mask), self._logits()))
                submitted += 1
            chosen, logits = pending.popleft()
            token = int((await chosen).view(np.uint32)[0])
            draft.count()
            model.check_token(token)
            if logits is not None:
                self._logprobs = draft.logprobs((await logits).view(np.float32), token)
            model.check(turn)
            model.sequence.ids.append(token)
            yield token
            model.check(turn)

    def _logits(self) -> Awaitable[NDArray[np.uint8]] | None:
        """What the step that was submitted last sampled from, where that is asked for."""
        return None if self.draft.top is None else self._model.read_logits()


class Generations(_Stream[tuple[int, Piece]]):
    """Texts under way side by side: iterate over (index of the prompt, Piece), or take the `result`.

    `texts`, `ids` and `stats` are those of a Generation, in a list by prompt. Starting others on the same model ends
    these.
    """

    def __init__(self, scheduler: Scheduler, drafts: Sequence[Text]) -> None:
        self.samplings = [draft.sampling for draft in drafts]
        self.stats = [draft.stats for draft in drafts]
        self.ids = [draft.ids for draft in drafts]
        self._drafts = drafts
        self._scheduler = scheduler
        super().__init__(scheduler.device)

    @property
    def texts(self) -> list[str]:
        """What has come so far."""
        return [draft.text for draft in self._drafts]

    def result(self) -> list[str]:
        """The texts when all of them have ended."""
        for _ in self:
            pass
        return self.texts

    async def result_async(self) -> list[str]:
        """`result`, for an event loop."""
        async for _ in self:
            pass
        return self.texts

    def _repr_html_(self) -> str:
        return "".join(html.text(draft.text, draft.stats.finish_reason or "under way") for draft in self._drafts)

    async def _run(self) -> AsyncIterator[tuple[int, Piece]]:
        index = {draft: i for i, draft in enumerate(self._drafts)}
        for draft in self._drafts:
            self._scheduler.add(draft)
        try:
            while self._scheduler.is_busy:
                for draft, piece in await self._scheduler.step():
                    yield index[draft], piece
        finally:
            self._interrupted()

    def _interrupted(self) -> None:
        self._scheduler.clear()
