"""Continuous batching: texts join a batch and leave it between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.batch import Batch, Member
from gemma_wgpu.engine.request import Piece, Text

_AHEAD = 2  # steps that the GPU may be ahead of the host


@dataclass
class _Place:
    """Where a text is in the batch, and how many of its tokens were asked for."""

    member: Member
    submitted: int = 1


@dataclass
class _Prompt:
    """The text whose prompt is on its way through the model, and the chunks that are left of it."""

    text: Text
    turn: int
    chunks: Iterator[bool]


@dataclass
class _Step:
    """One that was submitted: its texts, the tokens to come, and the logits of those that want log-probabilities."""

    texts: list[Text]
    states: Awaitable[NDArray[np.uint8]]
    logits: dict[int, Awaitable[NDArray[np.uint8]]]


class Scheduler:
    """Generates texts side by side in `batch`, in the order in which they were added as far as there is room.

    While it has texts, nobody else may use the batch, and what else is done with its model waits between two steps.
    """

    def __init__(self, batch: Batch) -> None:
        self.device = batch.model.device
        self._batch = batch
        self._owner = batch.begin()
        self._model = batch.model
        self._waiting: deque[Text] = deque()
        self._prompt: _Prompt | None = None
        self._running: dict[Text, _Place] = {}  # in the order of the batch's members
        self._steps: deque[_Step] = deque()

    @property
    def waiting(self) -> int:
        """Texts that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that have."""
        return len(self._running) + (self._prompt is not None)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything for `step` to do."""
        return bool(self._waiting or self._prompt or self._running or self._steps)

    def add(self, text: Text) -> None:
        """Generate a text, as soon as there is room for it."""
        self._waiting.append(text)

    def remove(self, text: Text) -> None:
        """Generate it no further, which makes room for another. Does nothing for one that ended."""
        text.stats.finish_reason = text.stats.finish_reason or "interrupted"
        if text in self._waiting:
            self._waiting.remove(text)
        if self._prompt and self._prompt.text is text:
            self._prompt = None
        self._leave(text)

    def clear(self) -> None:
        """Remove all texts."""
        texts = {*self._waiting, *self._running, *(text for step in self._steps for text in step.texts)}
        for text in texts | ({self._prompt.text} if self._prompt else set()):
            self.remove(text)
        self._steps.clear()

    async def step(self) -> list[tuple[Text, Piece]]:
        """A chunk of the next prompt, and a token for each text under way: the pieces of text that came of it.

        Raises what the GPU raises, and RequestError where the batch has got another scheduler; then all texts are
        removed.
        """
        try:
            self._batch.check(self._owner)
            pieces = await self._advance_prompt()
            # What a constraint allows is known when the last token is.
            ahead = 1 if any(text.mask for text in self._running) else _AHEAD
            while self._running and len(self._steps) < ahead:
                self._submit()
            if self._steps:
                pieces += await self._receive(self._steps.popleft())
            return pieces
        except BaseException:
            self.clear()
            raise

    async def _advance_prompt(self) -> list[tuple[Text, Piece]]:
        model = self._model
        if self._prompt is None:
            if not self._waiting or self._batch.is_full:
                return []
            text = self._waiting.popleft()
            text.begin()
            turn = model.begin(text.prompt, text.sampling)
            text.stats.reused_tokens = model.sequence.computed
            self._prompt = _Prompt(text, turn, model.chunks())
        prompt = self._prompt
        if next(prompt.chunks, False):
            if not self._running:  # else the texts under way are waited for
                await model.device.read(model.state)
            return []
        self._prompt = None
        return await self._join(prompt)

    async def _join(self, prompt: _Prompt) -> list[tuple[Text, Piece]]:
        """The first token of a text, and its place in the batch unless that is the last one."""
        model, text, length = self._model, prompt.text, len(prompt.text.prompt)
        chosen = model.sample(length, text.mask)
        logits = None if text.top is None else model.read_logits()
        token = int((await chosen).view(np.uint32)[0])
        model.check(prompt.turn)
        pieces = self._push(text, token, None if logits is None else await logits)
        if text.stats.finish_reason is None:
            self._running[text] = _Place(self._batch.join(length, token, text.sampling))
        return pieces

    def _submit(self) -> None:
        texts = list(self._running)
        states = self._batch.step([text.mask for text in texts])
        logits = {row: self._batch.logits(row) for row, text in enumerate(texts) if text.top is not None}
        self._steps.append(_Step(texts, states, logits))
        for text, place in list(self._running.items()):
            place.submitted += 1
            if place.submitted == text.most:
                self._leave(text)

    async def _receive(self, step: _Step) -> list[tuple[Text, Piece]]:
        pieces = []
        tokens = self._batch.tokens(await step.states)
        for row, (text, token) in enumerate(zip(step.texts, tokens, strict=True)):
            logits = await step.logits[row] if row in step.logits else None
            if text.stats.finish_reason is None:
                pieces += self._push(text, token, logits)
        return pieces

    def _push(self, text: Text, token: int, logits: NDArray[np.uint8] | None) -> list[tuple[Text, Piece]]:
        self._model.check_token(token)
        text.count()
        pieces = text.push(token, None if logits is None else text.logprobs(logits.view(np.float32), token))
        if text.stats.finish_reason:
            self._leave(text)
        return [(text, piece) for piece in pieces]

    def _leave(self, text: Text) -> None:
        if place := self._running.pop(text, None):
            self._batch.leave(place.member)
