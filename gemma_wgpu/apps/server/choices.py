"""Turns the pieces of texts into the responses of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from gemma_wgpu.apps.server.schemas import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    Delta,
    FinishReason,
    PromptDetails,
    Reply,
    Rival,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    Usage,
)
from gemma_wgpu.engine.request import Logprobs, Piece, Request
from gemma_wgpu.tokens.tokenizer import Tokenizer


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Gemma has the byte tokens in the order of the bytes.
        self._bytes = {token: byte for byte, token in enumerate(sorted(tokenizer.byte_ids))}

    def rival(self, token: int, logprob: float) -> Rival:
        """Return a token with its log-probability."""
        byte = self._bytes.get(token, 0)
        if byte >= 0x80:  # it is no text by itself
            return Rival(token=f"\\x{byte:02x}", logprob=logprob, bytes=[byte])
        text = self._tokenizer.decode([token])
        return Rival(token=text, logprob=logprob, bytes=list(text.encode()))

    def entry(self, at: Logprobs) -> TokenLogprob:
        """Return the token at a position, and its rivals."""
        chosen = self.rival(at.token, at.logprob)
        return TokenLogprob(**dict(chosen), top_logprobs=[self.rival(*rival) for rival in at.top])


@dataclass
class Increment:
    """What a text has gained: new text, its tokens if they are wanted, and how many characters came before it.

    `thought` is what has been thought, which is not part of the text.
    """

    text: str
    logprobs: list[TokenLogprob] | None
    offset: int
    thought: str = ""


@dataclass
class Choice:
    """One text under way, for which a client waits."""

    request: Request
    texts: TokenTexts
    wants_logprobs: bool
    _text: str = ""
    _thought: str = ""
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    # A token goes out with its text, which may be held back, or turn out to belong to a stop string.
    _held: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # each token, and where its bytes begin
    _pushed: int = 0  # bytes of the tokens so far
    _out: int = 0  # bytes of the text so far
    _taken: int = 0  # characters that were taken

    def push(self, piece: Piece | None) -> None:
        """Add the next piece. None is the end."""
        if piece is None:
            if self.request.stats.finish_reason != "stop":
                self._release(self._pushed + 1)
            return
        if piece.is_thought:
            self._thought += piece.text
            return
        self._text += piece.text
        self._out += len(piece.text.encode())
        if piece.logprobs is not None:
            entry = self.texts.entry(piece.logprobs)
            self._held.append((self._pushed, entry))
            self._pushed += len(entry.bytes)
        self._release(self._out)

    def _release(self, end: int) -> None:
        while self._held and self._held[0][0] < end:
            self._logprobs.append(self._held.pop(0)[1])

    def take(self) -> Increment:
        """Return what came since the last call."""
        logprobs = self._logprobs if self.wants_logprobs else None
        increment = Increment(self._text, logprobs, self._taken, self._thought)
        self._taken += len(self._text)
        self._text, self._logprobs, self._thought = "", [], ""
        return increment

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the text ended."""
        return "stop" if self.request.stats.finish_reason in ("eos", "stop") else "length"


class Format(ABC):
    """The form of one kind of completion, for one response of the model `model`."""

    prefix: str
    response: type[BaseModel]
    event: type[BaseModel]

    def __init__(self, model: str) -> None:
        made = f"{self.prefix}-{uuid.uuid4().hex}"
        self._base: dict[str, Any] = {"id": made, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """Return the response that is not streamed."""
        made = [self._whole(index, choice.take(), choice.finish_reason) for index, choice in enumerate(choices)]
        return self.response(**self._base, choices=made, usage=usage)

    def begin(self, index: int) -> BaseModel | None:
        """Return the chunk before the first one of a text, if there is one."""
        return None

    def chunk(self, index: int, new: Increment, finish_reason: FinishReason | None) -> BaseModel:
        """Return a chunk of a stream."""
        return self.event(**self._base, choices=[self._increment(index, new, finish_reason)])

    def last(self, usage: Usage) -> BaseModel:
        """Return the chunk that has no text and the usage."""
        return self.event(**self._base, choices=[], usage=usage)

    @abstractmethod
    def _whole(self, index: int, new: Increment, finish_reason: FinishReason) -> BaseModel:
        """Return the choice that has a whole text."""

    @abstractmethod
    def _increment(self, index: int, new: Increment, finish_reason: FinishReason | None) -> BaseModel:
        """Return the choice that has what a text has gained."""


class ChatFormat(Format):
    """The form of /v1/chat/completions."""

    prefix, response, event = "chatcmpl", ChatCompletion, ChatChunk

    def begin(self, index: int) -> BaseModel:
        """Return the chunk that says whose text it is."""
        delta = Delta(role="assistant", content="")
        return ChatChunk(**self._base, choices=[ChatDelta(index=index, delta=delta)])

    def _whole(self, index: int, new: Increment, finish_reason: FinishReason) -> BaseModel:
        logprobs = ChatLogprobs.of(new.logprobs)
        reply = Reply(content=new.text, reasoning_content=new.thought or None)
        return ChatChoice(index=index, message=reply, logprobs=logprobs, finish_reason=finish_reason)

    def _increment(self, index: int, new: Increment, finish_reason: FinishReason | None) -> BaseModel:
        logprobs = ChatLogprobs.of(new.logprobs)
        delta = Delta(content=new.text or None, reasoning_content=new.thought or None)
        return ChatDelta(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


class TextFormat(Format):
    """The form of /v1/completions."""

    prefix, response, event = "cmpl", Completion, Completion

    def _whole(self, index: int, new: Increment, finish_reason: FinishReason) -> BaseModel:
        return self._increment(index, new, finish_reason)

    def _increment(self, index: int, new: Increment, finish_reason: FinishReason | None) -> BaseModel:
        return TextChoice(index=index, text=new.text, logprobs=_text_logprobs(new), finish_reason=finish_reason)


def _text_logprobs(new: Increment) -> TextLogprobs | None:
    if new.logprobs is None:
        return None
    offsets, offset = [], new.offset
    for entry in new.logprobs:
        offsets.append(offset)
        offset += sum(byte & 0xC0 != 0x80 for byte in entry.bytes)  # bytes that begin a character
    return TextLogprobs(
        tokens=[_name(entry) for entry in new.logprobs],
        token_logprobs=[entry.logprob for entry in new.logprobs],
        # If two have the same name, the likelier stays.
        top_logprobs=[{_name(r): r.logprob for r in reversed(entry.top_logprobs)} for entry in new.logprobs],
        text_offset=offsets,
    )


def _name(rival: Rival) -> str:
    return f"bytes:{rival.token}" if len(rival.bytes) == 1 and rival.bytes[0] >= 0x80 else rival.token


def usage(requests: Sequence[Request], prompts: int) -> Usage:
    """Count the tokens of texts that go on from `prompts` prompts, with as many texts in a row from each.

    A prompt counts once.
    """
    own = [request.stats for request in requests[:: len(requests) // prompts]]
    prompt = sum(stats.prompt_tokens for stats in own)
    new = sum(request.stats.new_tokens for request in requests)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(stats.reused_tokens for stats in own)),
    )
