"""Chats: messages become a prompt, just as the chat template that is published with a model renders them.

An image or a sound in a prompt is a fixed number of tokens, whose embeddings come from the tower that reads it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.messages import MediumPart, Message, a, parts_of, roles_of
from gemma_wgpu.tokens.tokenizer import BOS, Tokenizer

Tool = Mapping[str, Any]
"""A function that a model may call, as OpenAI's API has it: {"type": "function", "function": {"name": str,
"description": str, "parameters": JSON schema of an object}}."""

_MARKS = {"image": "<start_of_image>", "sound": "<start_of_audio>"}
_NOUNS = {mark: noun for noun, mark in _MARKS.items()}
_SPLIT = re.compile(f"({'|'.join(_NOUNS)})")
# Newlines stand around every image and sound, and these texts around an image that has crops, which follow it.
_NEWLINES = "\n\n"
_ORIGINAL = "Here is the original image "
_CROPS = " and here are some crops to help you see better "


@dataclass(frozen=True)
class MediumTokens:
    """The ids that an image or a sound is in a prompt: `begin`, `count` times `soft`, and `end`.

    A tower replaces the embeddings of `soft`. This id may lie outside of the tokenizer's vocabulary.
    """

    begin: int
    soft: int
    end: int
    count: int

    @property
    def ids(self) -> list[int]:
        """Return the ids of one."""
        return [self.begin, *[self.soft] * self.count, self.end]


@dataclass(frozen=True)
class ThoughtTokens:
    """The control tokens around a thought in a reply. After `begin` come its name and a newline."""

    begin: str
    end: str


NO_MEDIA: Mapping[str, MediumTokens] = {}


class ChatTemplate(ABC):
    """Writes a chat down in the way that a family's models were trained on.

    `thoughts` says how thoughts are marked in the replies of models that think before they answer.
    """

    thoughts: ThoughtTokens | None = None

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
    ) -> str:
        """Return the prompt as text, for people to read: a control token that a user typed looks like a real one.

        An image is one token. If `add_generation_prompt` is true, the prompt ends with the beginning of a reply. The
        model may call `tools`; with `thinking`, it is asked to think before it answers, which is off if it is None.
        Raises RequestError, which names the index of the message at fault, and if the family has no tools or no
        thoughts.
        """

    @abstractmethod
    def media(self, messages: Sequence[Message]) -> list[MediumPart]:
        """Return the images and sounds of all messages, in order. Raises RequestError as `render` does."""

    @abstractmethod
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
        """Return the prompt as ids: those of the rendered text, except that control tokens in a message are text.

        An image becomes the ids `media["image"]`, and so does each of its crops: image i has `crops[i]`, or none if
        `crops` does not reach it. A sound becomes the ids `media["sound"]`. Raises RequestError as `render` does, for
        what `media` does not have, and if `crops` has more entries than there are images; and ModelError if the
        vocabulary has no tokens for chats.
        """


def check_media(
    parts: Sequence[tuple[int, MediumPart]], media: Mapping[str, MediumTokens], crops: Sequence[int]
) -> None:
    """Raise RequestError if images and sounds, each with the index of its message, cannot be put in a prompt.

    `media` and `crops` are those of `ChatTemplate.encode`.
    """
    images = sum(part.noun == "image" for _, part in parts)
    if len(crops) > images:
        raise RequestError(
            f"crops has {len(crops)} entries, but the number of images in the chat is {images}; give one for each"
        )
    for index, part in parts:
        if part.noun not in media:
            able, verb = ("reads text only", "reads images") if part.noun == "image" else ("has no ears", "hears")
            raise RequestError(
                f"message {index} has {a(part.noun)}, but this model {able}; leave the {part.noun} out, or load a "
                f"model that {verb}"
            )


class Gemma3Chat(ChatTemplate):
    """The template of Gemma 3: turns of a user and the model, between <start_of_turn> and <end_of_turn>.

    The system's text goes in front of the first user's.
    """

    _start = "<start_of_turn>"
    _end = "<end_of_turn>\n"
    _reply = "model\n"

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
    ) -> str:
        """Return the prompt as text."""
        _refuse(tools, thinking)
        turns = [f"{self._start}{turn.text}{self._end}" for turn in _turns(messages)]
        return "".join([BOS, *turns, self._start + self._reply if add_generation_prompt else ""])

    def media(self, messages: Sequence[Message]) -> list[MediumPart]:
        """Return the images and sounds of all messages, in order."""
        return [part for turn in _turns(messages) for part in turn.media]

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
        _refuse(tools, thinking)
        start, end = (tokenizer.encode(marker, bos=False) for marker in (self._start, self._end))
        if not {start[0], end[0]} <= tokenizer.control_ids:
            raise ModelError("the vocabulary has no <start_of_turn> and <end_of_turn>; this model cannot chat")
        turns = _turns(messages)
        check_media([(turn.index, part) for turn in turns for part in turn.media], media, crops)
        left = iter(chain(crops, repeat(0)))
        ids = [tokenizer.bos_id]
        for turn in turns:
            texts, nouns = _spread(turn.texts, [part.noun for part in turn.media], left)
            ids += [*start, *_encode(tokenizer, texts, [media[noun] for noun in nouns], control=False), *end]
        if add_generation_prompt:
            ids += [*start, *tokenizer.encode(self._reply, bos=False)]
        return ids


def _refuse(tools: Sequence[Tool], thinking: bool | None) -> None:
    """Raise RequestError for what Gemma 3 was not trained on."""
    if tools:
        raise RequestError(
            "this model was not trained to call tools; leave tools out, or load a Gemma 4", option="tools"
        )
    if thinking:
        raise RequestError(
            "this model was not trained to think before it answers; leave thinking off, or load a Gemma 4",
            option="thinking",
        )


GEMMA3 = Gemma3Chat()


def text_with_media(
    tokenizer: Tokenizer, text: str, media: Mapping[str, MediumTokens], sounds: int, crops: Sequence[int]
) -> list[int]:
    """Return the ids of a prompt that is no chat, with BOS in front.

    Each "<start_of_image>" in `text` is an image, and each "<start_of_audio>" is one of so many `sounds`. `crops` has
    an entry for each image: how many crops it has. Other control tokens in `text` are control tokens. Raises
    RequestError if `text` has another number of images or sounds, or has soft tokens of its own.
    """
    texts, nouns = _SPLIT.split(text)[::2], [_NOUNS[mark] for mark in _SPLIT.split(text)[1::2]]
    for noun, count in (("image", len(crops)), ("sound", sounds)):
        if nouns.count(noun) != count:
            raise RequestError(
                f"the number of {_MARKS[noun]} in the prompt is {nouns.count(noun)}, but that of its {noun}s is "
                f"{count}; write one for each {noun}"
            )
    texts, nouns = _spread(texts, nouns, iter(crops))
    ids = _encode(tokenizer, texts, [media[noun] for noun in nouns], control=True)
    for noun, tokens in media.items():
        if ids.count(tokens.soft) != tokens.count * nouns.count(noun):
            soft = f"<{'image' if noun == 'image' else 'audio'}_soft_token>"
            raise RequestError(f"the prompt has {soft}, which only {noun}s have; write {_MARKS[noun]} for {a(noun)}")
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _spread(texts: Sequence[str], nouns: Sequence[str], crops: Iterator[int]) -> tuple[list[str], list[str]]:
    """Return the texts around images, their crops and sounds, and what stands between each two of these texts.

    That is given without crops as `texts` and `nouns`; `crops` are how many crops each image has.
    """
    spread, between = [texts[0]], []
    for text, noun in zip(texts[1:], nouns, strict=True):
        if noun == "image" and (count := next(crops)):
            spread[-1] += _ORIGINAL
            spread += [_CROPS, *[" "] * (count - 1)]
            between += [noun] * count
        spread.append(text)
        between.append(noun)
    return spread, between


def _encode(tokenizer: Tokenizer, texts: Sequence[str], media: Sequence[MediumTokens], control: bool) -> list[int]:
    """Return the ids of `texts` with an image or a sound between each two of them."""
    ids: list[int] = []
    for at, text in enumerate(texts):
        if at:
            ids += media[at - 1].ids
        # The newlines around an image become one token with those of the text beside it.
        before = _NEWLINES if at else ""
        after = _NEWLINES if at + 1 < len(texts) else ""
        ids += tokenizer.encode(before + text + after, bos=False, control=control)
    return ids


@dataclass(frozen=True)
class _Turn:
    """What stands between the control tokens of message `index`: texts, and a medium between each two of them.

    The first text begins with the role and a newline.
    """

    index: int
    texts: list[str]
    media: list[MediumPart]

    @property
    def text(self) -> str:
        """Return all as a text."""
        marks = [_MARKS[part.noun] for part in self.media]
        return "".join(chain.from_iterable(zip(self.texts, [*marks, ""], strict=True)))


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    """Return the turns of a chat."""
    roles = roles_of(messages, ("system", "user", "assistant"))
    first = int(roles[0] == "system")
    preface = _content(messages[0], 0, "system")[0][0] + "\n\n" if first else ""
    turns = []
    for index in range(first, len(roles)):
        expected = "assistant" if (index - first) % 2 else "user"
        if roles[index] != expected:
            raise RequestError(f"message {index} has role {roles[index]} where {expected} must stand")
        texts, media = _content(messages[index], index, expected)
        texts[0] = f"{'user' if expected == 'user' else 'model'}\n{preface}{texts[0]}"
        turns.append(_Turn(index, texts, media))
        preface = ""
    return turns


def _content(message: Message, index: int, role: str) -> tuple[list[str], list[MediumPart]]:
    """Return the texts of a message, and its images and sounds, of which one stands between each two texts."""
    texts, media = [""], []
    for part in parts_of(message, index, role):
        if isinstance(part, MediumPart):
            media.append(part)
            texts.append("")
        else:
            # The template strips every text but the system's.
            texts[-1] += part if role == "system" else part.strip()
    return texts, media
