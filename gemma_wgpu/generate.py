"""Text from a model: the loop around the GPU's steps."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import html
from gemma_wgpu.errors import DeviceError
from gemma_wgpu.model import ROLLBACK, Model
from gemma_wgpu.sampling import Sampling
from gemma_wgpu.tokenizer import Tokenizer

_LATENESS = 0.005  # seconds from a step's end on the GPU to the next one's submission by a host that waits for it


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the probabilities at one position: of the token there, and of the likeliest, by rank."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: NDArray[np.floating], token: int, count: int) -> Logprobs:
        """From the logits (vocab_size,) of the position, with the `count` likeliest."""
        logprobs = logits.astype(np.float64) - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        likeliest = np.argpartition(-logprobs, count)[:count]
        likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        top = tuple(zip(likeliest.tolist(), logprobs[likeliest].tolist(), strict=True))
        return cls(token, float(logprobs[token]), top)


@dataclass(frozen=True)
class Piece:
    """The text that a token completed, and its id; no id where the last text that was held back comes out.

    The text is empty while a character, or what may be a stop string, is not whole. `logprobs` is of the token, where
    it was asked for.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: Logprobs | None = None

    def __str__(self) -> str:
        return self.text


@dataclass
class Stats:
    """How a generation went. Times are in seconds of wall clock.

    `finish_reason` is "eos" (the model ended its text), "stop" (a stop string), "length" (max_new_tokens),
    "context" (the context is full), "interrupted", or None while it runs. `prefill_seconds` lasts until the first
    token, `decode_seconds` from there. `new_tokens` counts the token that ended the text, `reused_tokens` those of
    the prompt that the cache held.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    dispatches_per_token: int = 0
    finish_reason: str | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the prompt, but for the tokens that were in the cache already."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the new tokens after the first, which prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class _StopStrings:
    """Holds back text while it may be the beginning of a stop string."""

    strings: Sequence[str]
    held: str = field(default="", init=False)

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain to come before any stop string, whether one has come)."""
        self.held += text
        found = [at for at in map(self.held.find, self.strings) if at >= 0]
        if found:
            return self.held[: min(found)], True
        keep = max((self._overlap(string) for string in self.strings), default=0)
        cut = len(self.held) - keep
        certain, self.held = self.held[:cut], self.held[cut:]
        return certain, False

    def _overlap(self, string: str) -> int:
        longest = min(len(string) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)


class Generation:
    """Text under way: iterate over its Pieces, with `for` where the platform can block, or with `async for`.

    `text` and `ids` are what has come so far, `stats` how it goes. A token that ends the text is not part of it.
    Leaving the loop early, or starting another generation on the same model, ends this one.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        ids: NDArray[np.uint32],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str],
        logprobs: int | None = None,
    ) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.sampling = sampling
        self.stats = Stats(len(ids))
        self._model = model
        self._tokenizer = tokenizer
        self._prompt = ids
        self._max_new_tokens = max_new_tokens
        self._stop = _StopStrings(stop)
        self._top = logprobs
        self._logprobs: Logprobs | None = None  # of the last token
        self._pieces = self._run()

    def _repr_html_(self) -> str:
        stats = self.stats
        if not stats.new_tokens:
            return "<i>Nothing yet: the text comes as this is iterated over.</i>"
        return html.text(
            self.text,
            f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
            f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason or 'under way'})",
        )

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            return self._model.device.wait(self._next())
        except StopAsyncIteration:
            raise StopIteration from None
        except KeyboardInterrupt:  # natively it comes from outside of the coroutine
            self.stats.finish_reason = "interrupted"
            raise

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    async def _next(self) -> Piece:
        return await anext(self._pieces)

    async def _run(self) -> AsyncIterator[Piece]:
        stats = self.stats
        stream = self._tokenizer.stream(control=False)
        try:
            async for token in self.tokens():
                if token in self._tokenizer.eos_ids:
                    stats.finish_reason = "eos"
                    break
                self.ids.append(token)
                text, stopped = self._stop.push(stream.push(token))
                self.text += text
                if stopped:
                    stats.finish_reason = "stop"
                yield Piece(text, (token,), self._logprobs)
                if stopped:
                    return
        except (KeyboardInterrupt, asyncio.CancelledError):
            stats.finish_reason = "interrupted"
            raise
        stats.finish_reason = stats.finish_reason or self._limit
        text, stopped = self._stop.push(stream.flush())
        if stopped:
            stats.finish_reason = "stop"
        else:
            text += self._stop.held
        if text:
            self.text += text
            yield Piece(text, ())

    @property
    def _limit(self) -> str:
        return "length" if self.stats.new_tokens == self._max_new_tokens else "context"

    async def tokens(self) -> AsyncIterator[int]:
        """Instead of the Pieces, the tokens as they come from the GPU, whatever they say: past the text's end too.

        The GPU is always some steps ahead of the host.
        """
        model, stats, length = self._model, self.stats, len(self._prompt)
        most = min(self._max_new_tokens, model.context_length - length + 1)
        started = time.perf_counter()
        turn = model.begin(self._prompt, self.sampling)
        stats.reused_tokens = model.sequence.computed
        await model.prefill()
        pending = deque([(model.sample(length), self._logits())])
        stats.dispatches_per_token = model.decode_dispatches
        submitted = 1
        for n in range(1, most + 1):
            # Steps past the end of the text are for nothing, so only as many ahead as a host may be late.
            ahead = min(1 + int(_LATENESS * stats.decode_tokens_per_second), ROLLBACK)
            while submitted < min(most, n + ahead):
                pending.append((model.decode(length + submitted), self._logits()))
                submitted += 1
            chosen, logits = pending.popleft()
            token = int((await chosen).view(np.uint32)[0])
            now = time.perf_counter()
            if n == 1:
                stats.prefill_seconds, started = now - started, now
            stats.decode_seconds = now - started
            if token >= model.config.vocab_size:
                raise DeviceError(f"{model.device.info} computed logits that are no numbers; try precision='f32'")
            if logits is not None and self._top is not None:
                values = (await logits).view(np.float32) * np.float32(self.sampling.divisor)
                self._logprobs = Logprobs.of(values, token, self._top)
            model.check(turn)
            model.sequence.ids.append(token)
            stats.new_tokens += 1
            yield token
            model.check(turn)

    def _logits(self) -> Awaitable[NDArray[np.uint8]] | None:
        """What the step that was submitted last sampled from, where that is asked for."""
        model = self._model
        return None if self._top is None else model.device.read(model.logits, 0, 4 * model.config.vocab_size)
