"""From the pieces of a generation to what OpenAI's API says of them."""

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
from gemma_wgpu.engine.request import Logprobs, Piece, Text
from gemma_wgpu.tokens.tokenizer import Tokenizer


class TokenTexts:
    """What single tokens say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Gemma has the byte tokens in the order of the bytes.
        self._bytes = {token: byte for byte, token in enumerate(sorted(tokenizer.byte_ids))}

    def rival(self, token: int, logprob: float) -> Rival:
        """A token with its log-probability."""
        byte = self._bytes.get(token, 0)
        if byte >= 0x80:  # by itself no text
            return Rival(token=f"\\x{byte:02x}", logprob=logprob, bytes=[byte])
        text = self._tokenizer.decode([token])
        return Rival(token=text, logprob=logprob, bytes=list(text.encode()))

    def entry(self, at: Logprobs) -> TokenLogprob:
        """A position's token and its rivals."""
        chosen = self.rival(at.token, at.logprob)
        return TokenLogprob(**dict(chosen), top_logprobs=[self.rival(*rival) for rival in at.top])


@dataclass
class Part:
    """What is new of a text: the text, its tokens where asked for, and the characters that came before."""

    text: str
    logprobs: list[TokenLogprob] | None
    offset: int


@dataclass
class Choice:
    """One text under way."""

    source: Text
    texts: TokenTexts
    wants_logprobs: bool
    _text: str = ""
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    # A token goes out with its text, which may be held back, or turn out to be part of a stop string.
    _held: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # each after so many bytes of text
    _pushed: int = 0  # bytes of the tokens so far
    _out: int = 0  # bytes of the text so far
    _taken: int = 0  # characters

    def push(self, piece: Piece | None) -> None:
        """The next piece; None is the end."""
        if piece is None:
            if self.source.stats.finish_reason != "stop":
                self._release(self._pushed + 1)
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

    def take(self) -> Part:
        """What came since the last call."""
        part = Part(self._text, self._logprobs if self.wants_logprobs else None, self._taken)
        self._taken += len(self._text)
        self._text, self._logprobs = "", []
        return part

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended."""
        return "stop" if self.source.stats.finish_reason in ("eos", "stop") else "length"


class Format(ABC):
    """What one of the two kinds of completion looks like, for one request to `model`."""

    prefix: str
    response: type[BaseModel]
    event: type[BaseModel]

    def __init__(self, model: str) -> None:
        made = f"{self.prefix}-{uuid.uuid4().hex}"
        self._base: dict[str, Any] = {"id": made, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """The response that is not streamed."""
        made = [self._whole(index, choice.take(), choice.finish_reason) for index, choice in enumerate(choices)]
        return self.response(**self._base, choices=made, usage=usage)

    def begin(self, index: int) -> BaseModel | None:
        """The chunk before the first one of a text, if there is one."""
        return None

    def chunk(self, index: int, part: Part, finish_reason: FinishReason | None) -> BaseModel:
        """A chunk of a stream."""
        return self.event(**self._base, choices=[self._part(index, part, finish_reason)])

    def last(self, usage: Usage) -> BaseModel:
        """The chunk that has no text and the usage."""
        return self.event(**self._base, choices=[], usage=usage)

    @abstractmethod
    def _whole(self, index: int, part: Part, finish_reason: FinishReason) -> BaseModel:
        """A text."""

    @abstractmethod
    def _part(self, index: int, part: Part, finish_reason: FinishReason | None) -> BaseModel:
        """What is new of a text."""


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, response, event = "chatcmpl", ChatCompletion, ChatChunk

    def begin(self, index: int) -> BaseModel:
        """The chunk that says whose text it is."""
        delta = Delta(role="assistant", content="")
        return ChatChunk(**self._base, choices=[ChatDelta(index=index, delta=delta)])

    def _whole(self, index: int, part: Part, finish_reason: FinishReason) -> BaseModel:
        logprobs = ChatLogprobs.of(part.logprobs)
        reply = Reply(content=part.text)
        return ChatChoice(index=index, message=reply, logprobs=logprobs, finish_reason=finish_reason)

    def _part(self, index: int, part: Part, finish_reason: FinishReason | None) -> BaseModel:
        logprobs = ChatLogprobs.of(part.logprobs)
        delta = Delta(content=part.text or None)
        return ChatDelta(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


class TextFormat(Format):
    """Of /v1/completions."""

    prefix, response, event = "cmpl", Completion, Completion

    def _whole(self, index: int, part: Part, finish_reason: FinishReason) -> BaseModel:
        return self._part(index, part, finish_reason)

    def _part(self, index: int, part: Part, finish_reason: FinishReason | None) -> BaseModel:
        return TextChoice(index=index, text=part.text, logprobs=_text_logprobs(part), finish_reason=finish_reason)


def _text_logprobs(part: Part) -> TextLogprobs | None:
    if part.logprobs is None:
        return None
    offsets, offset = [], part.offset
    for entry in part.logprobs:
        offsets.append(offset)
        offset += sum(byte & 0xC0 != 0x80 for byte in entry.bytes)  # bytes that begin a character
    return TextLogprobs(
        tokens=[_name(entry) for entry in part.logprobs],
        token_logprobs=[entry.logprob for entry in part.logprobs],
        # Of two that read the same, the likelier.
        top_logprobs=[{_name(r): r.logprob for r in reversed(entry.top_logprobs)} for entry in part.logprobs],
        text_offset=offsets,
    )


def _name(rival: Rival) -> str:
    return f"bytes:{rival.token}" if len(rival.bytes) == 1 and rival.bytes[0] >= 0x80 else rival.token


def usage(texts: Sequence[Text], prompts: int) -> Usage:
    """Of texts that go on from `prompts` prompts, each as many in a row; a prompt counts once."""
    own = [text.stats for text in texts[:: len(texts) // prompts]]
    prompt = sum(stats.prompt_tokens for stats in own)
    new = sum(text.stats.new_tokens for text in texts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(stats.reused_tokens for stats in own)),
    )
