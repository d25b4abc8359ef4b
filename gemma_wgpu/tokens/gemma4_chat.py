"""The chats of Gemma 4, as the template that is published with E2B and E4B writes them (9 July 2026).

A chat may have a system's turn, tools that the model may call, and thoughts before its answers. The larger models'
template differs in one thing: it adds an empty thought to the beginning of a reply if thinking is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.chat import NO_MEDIA, ChatTemplate, MediumTokens, ThoughtTokens, Tool, check_media
from gemma_wgpu.tokens.gemma4_tools import Call, Part, Token, calls_of, declaration, response, result_of
from gemma_wgpu.tokens.messages import MediumPart, Message, Parts, parts_of, roles_of
from gemma_wgpu.tokens.tokenizer import BOS, Tokenizer

_TURN, _TURN_END = Token("<|turn>"), Token("<turn|>")
_CHANNEL, _CHANNEL_END = Token("<|channel>"), Token("<channel|>")
_THOUGHT = "thought\n"
_THINK = Token("<|think|>")
_TOOL, _TOOL_END = Token("<|tool>"), Token("<tool|>")
_RESPONSE = Token("<|tool_response>")
_MARKS = {"image": Token("<|image|>"), "sound": Token("<|audio|>")}
_NOUNS: dict[str, str] = {mark: noun for noun, mark in _MARKS.items()}


@dataclass
class _Turn:
    """What message `index` says: a thought, calls of tools and what they returned, and then texts and images."""

    index: int
    role: str
    content: Parts
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    results: list[list[Part]] = field(default_factory=list)

    @property
    def texts(self) -> list[Part]:
        """Return the content as it is written: each text is stripped, and the model's have lost their thoughts."""
        clean = _without_thoughts if self.role == "assistant" else str.strip
        return [_MARKS[part.noun] if isinstance(part, MediumPart) else clean(part) for part in self.content]


class Gemma4Chat(ChatTemplate):
    """The template of Gemma 4: turns of a system, a user and the model, between <|turn> and <turn|>."""

    thoughts = ThoughtTokens(_CHANNEL, _CHANNEL_END)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
    ) -> str:
        """Return the prompt as text."""
        return "".join(_parts(messages, tools, bool(thinking), add_generation_prompt))

    def media(self, messages: Sequence[Message]) -> list[MediumPart]:
        """Return the images and sounds of all messages, in order."""
        _, turns = _turns(messages)
        return [part for turn in turns for part in turn.content if isinstance(part, MediumPart)]

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
        media: Mapping[str, MediumTokens] = NO_MEDIA,
        crops: Sequence[int] = (),
    ) -> list[int]:
        """Return the prompt as ids."""
        parts = _parts(messages, tools, bool(thinking), add_generation_prompt)
        _, turns = _turns(messages)
        seen = [(turn.index, part) for turn in turns for part in turn.content if isinstance(part, MediumPart)]
        check_media(seen, media, crops)
        ids: list[int] = []
        for is_token, group in groupby(parts, lambda part: isinstance(part, Token)):
            if not is_token:
                ids += tokenizer.encode("".join(group), bos=False, control=False)
                continue
            for token in group:
                noun = _NOUNS.get(token)
                ids += media[noun].ids if noun else [_id(tokenizer, token)]
        return ids


GEMMA4 = Gemma4Chat()


def _id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token, bos=False)
    if len(ids) != 1 or ids[0] not in tokenizer.control_ids:
        raise ModelError(f"the vocabulary has no {token}; this model cannot chat")
    return ids[0]


def _parts(messages: Sequence[Message], tools: Sequence[Tool], thinking: bool, prompt: bool) -> list[Part]:
    """Return a chat as texts and control tokens."""
    system, turns = _turns(messages)
    parts: list[Part] = [Token(BOS)]
    if system is not None or tools or thinking:
        parts += [_TURN, "system\n", *([_THINK, "\n"] if thinking else []), system or ""]
        for index, tool in enumerate(tools):
            parts += [_TOOL, *declaration(tool, index), _TOOL_END]
        parts += [_TURN_END, "\n"]
    last_user = max((turn.index for turn in turns if turn.role == "user"), default=-1)
    for number, turn in enumerate(turns):
        before = turns[number - 1].role if number else None
        after = turns[number + 1].role if number + 1 < len(turns) else None
        parts += _turn(turn, before, after, is_new=turn.index > last_user)
    if prompt:
        last = turns[-1]
        if not last.calls:
            parts += [_TURN, "model\n"]
        elif last.results and thinking:
            parts += [_CHANNEL, _THOUGHT]
    return parts


def _turn(turn: _Turn, before: str | None, after: str | None, *, is_new: bool) -> Iterator[Part]:
    """Yield a turn between turns of the roles `before` and `after`; a thought is kept if it is a new one.

    Messages of the assistant that follow each other are one turn of the model, in which tools return what they were
    asked for, and the model goes on after what they returned.
    """
    is_model = turn.role == "assistant"
    if not (is_model and before == "assistant"):
        yield from (_TURN, f"{'model' if is_model else turn.role}\n")
    if turn.thought and is_new:
        yield from (_CHANNEL, f"{_THOUGHT}{turn.thought}\n", _CHANNEL_END)
    for call in turn.calls:
        yield from call.parts()
    for result in turn.results:
        yield from result
    texts = turn.texts
    yield from texts
    if turn.calls and not turn.results:
        yield _RESPONSE
    elif is_model and after == "assistant":
        return
    elif not turn.results or after or "".join(texts).strip():
        yield from (_TURN_END, "\n")


def _without_thoughts(text: str) -> str:
    """Return a text of the model without the thoughts in it, stripped."""
    return "".join(part.partition(_CHANNEL)[0] for part in text.split(_CHANNEL_END)).strip()


def _turns(messages: Sequence[Message]) -> tuple[str | None, list[_Turn]]:
    """Return what the system says, if it does, and the turns of the others; what a tool returned is with its call."""
    roles = roles_of(messages, ("system", "user", "assistant", "tool"))
    system: str | None = None
    turns: list[_Turn] = []
    for index, (message, role) in enumerate(zip(messages, roles, strict=True)):
        if role == "system":
            if index:
                raise RequestError(f"message {index} has role system; only the first message may have it")
            system = _system(message)
        elif role == "tool":
            if not turns or not turns[-1].calls:
                raise RequestError(f"message {index} has role tool, but the message before it calls no tool")
            turns[-1].results.append(list(response(*result_of(message, index, turns[-1].calls))))
        else:
            turns.append(_said(message, index, role))
    return system, turns


def _system(message: Message) -> str:
    parts = parts_of(message, 0, "system")
    if isinstance(message.get("content"), str):
        return "".join(map(str, parts)).strip()
    return "".join(f"{str(part).strip()} " for part in parts)


def _said(message: Message, index: int, role: str) -> _Turn:
    """Return the turn of a message of the user or the assistant."""
    if role == "user":
        return _Turn(index, role, parts_of(message, index, role))
    calls = calls_of(message, index)
    thought = message.get("reasoning") or message.get("reasoning_content") or ""
    if not isinstance(thought, str):
        raise RequestError(f"message {index} has a thought of type {type(thought).__name__}; it must be text")
    if message.get("content") is None and calls:
        return _Turn(index, role, [], thought, calls)
    return _Turn(index, role, parts_of(message, index, role), thought, calls)
