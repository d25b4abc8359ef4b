"""The text of one sequence: from its tokens, as they come, to pieces of text and the figures of how it went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.engine.structured import Matcher
from gemma_wgpu.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the probabilities at one position: of the token there, and of the likeliest, by rank."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: NDArray[np.floating], token: int, count: int) -> Logprobs:
        """From the logits (vocab_size,) of the position, with the `count` likeliest.

        With as many as there are, where a constraint left fewer.
        """
        logprobs = logits.astype(np.float64) - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        likeliest = np.argpartition(-logprobs, count)[:count]
        likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        likeliest = likeliest[np.exp(logprobs[likeliest]) > 0]
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
    "context" (the context is full), "constraint" (it became too complex to be kept), "interrupted", or None while it
    runs. `prefill_seconds` lasts until the first token, `decode_seconds` from there. `new_tokens` counts the token
    that ended the text, `reused_tokens` those of the prompt that the cache held. `dispatches_per_token` is 0 for a
    text that shares them with others.
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


class Text:
    """A text that is to be generated, and how far it is.

    `prompt` are token ids (n,), `most` the tokens that it can have, `top` of how many of the likeliest tokens the
    log-probabilities are wanted beside its own, if any. `text` and `ids` are what has come so far. `mask` says which
    tokens may come next, where not all may.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: NDArray[np.uint32],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str],
        top: int | None,
        context_length: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.top = top
        self.most = min(max_new_tokens, context_length - len(prompt) + 1)
        self.text = ""
        self.ids: list[int] = []
        self.stats = Stats(len(prompt))
        self.mask = matcher.mask if matcher else None
        self._matcher = matcher
        self._limit = "length" if self.most == max_new_tokens else "context"
        self._eos_ids = tokenizer.eos_ids
        self._stream = tokenizer.stream(control=False)
        self._stop = _StopStrings(stop)
        self._since = 0.0

    def begin(self) -> None:
        """The prompt is on its way."""
        self._since = time.perf_counter()

    def count(self) -> None:
        """A token has come."""
        stats, now = self.stats, time.perf_counter()
        if not stats.new_tokens:
            stats.prefill_seconds, self._since = now - self._since, now
        stats.decode_seconds = now - self._since
        stats.new_tokens += 1

    def logprobs(self, logits: NDArray[np.float32], token: int) -> Logprobs | None:
        """Where they are wanted, those of a token, from the logits (vocab_size,) that it was sampled from."""
        if self.top is None:
            return None
        return Logprobs.of(logits * np.float32(self.sampling.divisor), token, self.top)

    def push(self, token: int, logprobs: Logprobs | None = None) -> list[Piece]:
        """What the token that was counted last completes; `stats.finish_reason` tells whether the text ended."""
        if token in self._eos_ids:
            return self.end("constraint" if self._matcher and self._matcher.failed else "eos")
        if self._matcher:
            self._matcher.accept(token)
        self.ids.append(token)
        text, stopped = self._stop.push(self._stream.push(token))
        self.text += text
        pieces = [Piece(text, (token,), logprobs)]
        if stopped:
            self.stats.finish_reason = "stop"
        elif self.stats.new_tokens == self.most:
            pieces += self.end(self._limit)
        return pieces

    def end(self, reason: str) -> list[Piece]:
        """The text ends here: what was held back comes out."""
        text, stopped = self._stop.push(self._stream.flush())
        self.stats.finish_reason = "stop" if stopped else reason
        if not stopped:
            text += self._stop.held
        self.text += text
        return [Piece(text, ())] if text else []
