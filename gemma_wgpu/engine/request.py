"""One text that is to be generated.

From its tokens, as they come, to pieces of text and the figures of how it went.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.engine.runner import Draw, Mask
from gemma_wgpu.engine.structured import Matcher
from gemma_wgpu.engine.thoughts import Channel, Thoughts
from gemma_wgpu.options import Options
from gemma_wgpu.progress import OnProgress
from gemma_wgpu.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the probabilities at one position: of the token there, and of the likeliest, by rank."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: NDArray[np.floating], token: int, count: int) -> Logprobs:
        """Compute them from the logits (vocab_size,) of the position, with the `count` likeliest.

        There are fewer if a constraint left fewer.
        """
        logprobs = logits.astype(np.float64) - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        likeliest = np.argpartition(-logprobs, count)[:count]
        likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        likeliest = likeliest[np.exp(logprobs[likeliest]) > 0]
        top = tuple(zip(likeliest.tolist(), logprobs[likeliest].tolist(), strict=True))
        return cls(token, float(logprobs[token]), top)


class Piece(str):
    """The text that a token completed. It is a str, and `"".join(pieces)` is the whole text.

    `ids` has the token's id, or nothing if the last text that was held back comes out. The text is empty while a
    character, or what may be a stop string, is not whole. `logprobs` is the token's, if it was asked for.
    `is_thought` says whether the token is of a thought, whose text is empty if thoughts are hidden.
    """

    ids: tuple[int, ...]
    logprobs: Logprobs | None
    is_thought: bool

    def __new__(
        cls, text: str, ids: tuple[int, ...] = (), logprobs: Logprobs | None = None, is_thought: bool = False
    ) -> Piece:
        """Make a piece."""
        piece = super().__new__(cls, text)
        piece.ids, piece.logprobs, piece.is_thought = ids, logprobs, is_thought
        return piece

    @property
    def text(self) -> str:
        """Return the text as a plain str."""
        return str.__str__(self)


@dataclass
class Stats:
    """How a generation went. Times are in seconds of wall clock.

    `finish_reason` is "eos" (the model ended its text), "stop" (a stop string came), "length" (max_new_tokens),
    "context" (the context is full), "constraint" (it became too complex to be kept), "interrupted", or None while the
    text is under way. `prefill_seconds` lasts until the first token, `decode_seconds` from there. `new_tokens` counts
    the token that ended the text too, `reused_tokens` are those of the prompt that the cache held, and
    `encoded_images` are those of its images that had to be encoded.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    encoded_images: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Return the speed of the prompt, without the tokens that were in the cache already."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the speed of the new tokens after the first one, which prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class _StopStrings:
    """Holds back text while it may be the beginning of a stop string."""

    strings: Sequence[str]
    held: str = field(default="", init=False)

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain to come before any stop string, and whether one has come."""
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


class Request:
    """A text that is asked for, and how far it is.

    `prompt` are its token ids; where the soft tokens of an image or a sound are, it has its key. `media` are those of
    the prompt, by key. `text` and `ids` are what has come so far; `answer` is the text without thoughts, and
    `thought` is all that was thought, shown or hidden. `pieces` are those that nobody has taken yet, and `error` is
    why the text could not go on, if it could not. `mask` says which tokens may come next, if not all may.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: Options,
        context_length: int,
        matcher: Matcher | None = None,
        media: Sequence[Medium] = (),
        progress: OnProgress | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.media = {medium.key: medium for medium in media}
        self.progress = progress  # of the encoding of images and sounds
        self.options = options
        self.draw = Draw(options, options.drawn_seed())
        room = context_length - len(prompt) + 1
        self.most = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
        self.text = self.answer = self.thought = ""
        self.ids: list[int] = []
        self.stats = Stats(len(prompt))
        self.pieces: deque[Piece] = deque()
        self.error: Exception | None = None
        self.abandoned = False  # nobody waits for it any more
        self.mask: Mask | None = self._allowed if matcher else None
        self._matcher = matcher
        self._limit = "length" if self.most == options.max_new_tokens else "context"
        self._eos_ids = frozenset() if options.ignore_eos else tokenizer.eos_ids
        self._stream = tokenizer.stream(control=False)
        self._stop = _StopStrings(options.stop_strings)
        self._channel = Channel(thoughts, prompt)
        self._since = 0.0

    @property
    def seed(self) -> int:
        """Return the seed, which was drawn if none was given."""
        return self.draw.seed

    @property
    def ended(self) -> bool:
        """Say whether there will be no more pieces."""
        return self.stats.finish_reason is not None or self.error is not None

    def begin(self) -> None:
        """Note that the prompt is on its way."""
        self._since = time.perf_counter()

    def push(self, token: int, logits: NDArray[np.float32] | None = None) -> None:
        """Take the next token, and the logits (vocab_size,) that it was drawn from if `logprobs` are wanted."""
        self._count()
        if token in self._eos_ids:
            self.end("constraint" if self._matcher and self._matcher.failed else "eos")
            return
        logprobs = self._logprobs(token, logits)
        self.ids.append(token)
        if self._channel.is_mark(token):
            if self._let_out():
                self.stats.finish_reason = "stop"
            self._channel.turn(token)
            self._out("", (token,), logprobs, is_thought=True)
        elif self._channel.inside:
            self._out(self._channel.unnamed(self._stream.push(token)), (token,), logprobs, is_thought=True)
        else:
            if self._matcher:
                self._matcher.accept(token)
            text, stopped = self._stop.push(self._stream.push(token))
            self._out(text, (token,), logprobs)
            if stopped:
                self.stats.finish_reason = "stop"
        if self.stats.new_tokens == self.most:
            self.end(self._limit)

    def end(self, why: str) -> None:
        """End the text here: what was held back comes out. Does nothing if it has ended already."""
        if self.ended:
            return
        self.stats.finish_reason = "stop" if self._let_out() else why

    def _let_out(self) -> bool:
        """Let out what was held back; say whether a stop string has come."""
        text = self._stream.flush()
        if self._channel.inside:
            text, stopped = self._channel.unnamed(text), False
        else:
            text, stopped = self._stop.push(text)
            if not stopped:
                text += self._stop.held
                self._stop.held = ""
        if text:
            self._out(text, is_thought=self._channel.inside)
        return stopped

    def fail(self, error: Exception) -> None:
        """End the text by an error."""
        if not self.ended:
            self.error = error

    def _out(
        self,
        text: str,
        ids: tuple[int, ...] = (),
        logprobs: Logprobs | None = None,
        *,
        is_thought: bool = False,
    ) -> None:
        if is_thought:
            self.thought += text
        else:
            self.answer += text
        piece = Piece(text if self._channel.shown else "", ids, logprobs, is_thought)
        self.text += piece
        self.pieces.append(piece)

    def _allowed(self) -> NDArray[np.uint32]:
        """Return the mask of the tokens that may come next. The form is that of the answer; a thought has none."""
        assert self._matcher
        mask = self._matcher.mask()
        if self._channel.inside:
            mask = np.full_like(mask, 0xFFFFFFFF)
            for token in self._eos_ids:
                mask[token // 32] &= ~np.uint32(1 << token % 32)
        elif not self.ids and (begin := self._channel.may_begin) is not None:
            mask = mask.copy()
            mask[begin // 32] |= np.uint32(1 << begin % 32)
        return mask

    def _count(self) -> None:
        stats, now = self.stats, time.perf_counter()
        if not stats.new_tokens:
            stats.prefill_seconds, self._since = now - self._since, now
        stats.decode_seconds = now - self._since
        stats.new_tokens += 1

    def _logprobs(self, token: int, logits: NDArray[np.float32] | None) -> Logprobs | None:
        if self.options.logprobs is None or logits is None:
            return None
        return Logprobs.of(logits * np.float32(self.draw.divisor), token, self.options.logprobs)
