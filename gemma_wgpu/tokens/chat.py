"""Chats: messages become a prompt, just as the chat template that is published with a model renders them.

An image in a prompt is a fixed number of tokens, whose embeddings come from the vision model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.messages import ImagePart, Message, parts_of, roles_of
from gemma_wgpu.tokens.tokenizer import BOS, Tokenizer

Tool = Mapping[str, Any]
"""A function that a model may call, as OpenAI's API has it: {"type": "function", "function": {"name": str,
"description": str, "parameters": JSON schema of an object}}."""

_IMAGE = "<start_of_image>"
# Newlines stand around every image, and these texts around an image that has crops, which follow it.
_NEWLINES = "\n\n"
_ORIGINAL = "Here is the original image "
_CROPS = " and here are some crops to help you see better "


@dataclass(frozen=True)
class ImageTokens:
    """The ids that an image is in a prompt: `begin`, `count` times `soft`, and `end`.

    The vision model replaces the embeddings of `soft`. This id may lie outside of the tokenizer's vocabulary.
    """

    begin: int
    soft: int
    end: int
    count: int

    @property
    def ids(self) -> list[int]:
        """The ids of one image."""
        return [self.begin, *[self.soft] * self.count, self.end]


@dataclass(frozen=True)
class ThoughtTokens:
    """The control tokens around a thought in a reply. After `begin` come its name and a newline."""

    begin: str
    end: str


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
    def images(self, messages: Sequence[Message]) -> list[object]:
        """Return what the image parts of all messages hold, in order.

        That is the value of "image" as it is, a Path for "path", a str for "url", and a data URI for "base64". Raises
        RequestError as `render` does.
        """

    @abstractmethod
    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
        images: ImageTokens | None = None,
        crops: Sequence[int] = (),
    ) -> list[int]:
        """Return the prompt as ids: those of the rendered text, except that control tokens in a message are text.

        Image i of the chat becomes the ids `images`, and so does each of its `crops[i]` crops; images that `crops`
        does not reach have none. Raises RequestError as `render` does, if there is an image but `images` is None, and
        if `crops` has more entries than there are images; and ModelError if the vocabulary has no tokens for chats.
        """


def check_images(indices: Sequence[int], images: ImageTokens | None, crops: Sequence[int]) -> None:
    """Raise RequestError if images, which are in the messages of these indices, cannot be put in a prompt.

    `images` and `crops` are those of `ChatTemplate.encode`.
    """
    if len(crops) > len(indices):
        raise RequestError(
            f"crops has {len(crops)} entries, but the number of images in the chat is {len(indices)}; give one for "
            "each"
        )
    if indices and images is None:
        raise RequestError(
            f"message {indices[0]} has an image, but this model reads text only; leave the image out, or load a "
            "model that reads images"
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
        turns = [f"{self._start}{_IMAGE.join(turn.texts)}{self._end}" for turn in _turns(messages)]
        return "".join([BOS, *turns, self._start + self._reply if add_generation_prompt else ""])

    def images(self, messages: Sequence[Message]) -> list[object]:
        """Return what the image parts of all messages hold, in order."""
        return [image for turn in _turns(messages) for image in turn.images]

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
        images: ImageTokens | None = None,
        crops: Sequence[int] = (),
    ) -> list[int]:
        """Return the prompt as ids."""
        _refuse(tools, thinking)
        start, end = (tokenizer.encode(marker, bos=False) for marker in (self._start, self._end))
        if not {start[0], end[0]} <= tokenizer.control_ids:
            raise ModelError("the vocabulary has no <start_of_turn> and <end_of_turn>; this model cannot chat")
        turns = _turns(messages)
        check_images([turn.index for turn in turns for _ in turn.images], images, crops)
        left = chain(crops, repeat(0))
        ids = [tokenizer.bos_id]
        for turn in turns:
            texts = _spread(turn.texts, islice(left, len(turn.images)))
            ids += [*start, *_encode(tokenizer, texts, images, control=False), *end]
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


def text_with_images(tokenizer: Tokenizer, text: str, images: ImageTokens, crops: Sequence[int]) -> list[int]:
    """Return the ids of a prompt that is no chat, with BOS in front: each "<start_of_image>" in `text` is an image.

    `crops` has an entry for each image: how many crops it has. Other control tokens in `text` are control tokens.
    Raises RequestError if `text` has another number of images, or has soft tokens of its own.
    """
    texts = text.split(_IMAGE)
    if len(texts) - 1 != len(crops):
        raise RequestError(
            f"the number of {_IMAGE} in the prompt is {len(texts) - 1}, but that of its images is {len(crops)}; "
            "write one for each image"
        )
    texts = _spread(texts, crops)
    ids = _encode(tokenizer, texts, images, control=True)
    if ids.count(images.soft) != images.count * (len(texts) - 1):
        raise RequestError(f"the prompt has <image_soft_token>, which only images have; write {_IMAGE} for an image")
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _spread(texts: Sequence[str], crops: Iterable[int]) -> list[str]:
    """Return the texts around images and their crops, from those around the images; `crops` are how many each has."""
    spread = [texts[0]]
    for text, count in zip(texts[1:], crops, strict=True):
        if count:
            spread[-1] += _ORIGINAL
            spread += [_CROPS, *[" "] * (count - 1)]
        spread.append(text)
    return spread


def _encode(tokenizer: Tokenizer, texts: Sequence[str], images: ImageTokens | None, control: bool) -> list[int]:
    """Return the ids of `texts` with an image between each two of them; without images there is one text."""
    ids: list[int] = []
    for at, text in enumerate(texts):
        if at and images:
            ids += images.ids
        # The newlines around an image become one token with those of the text beside it.
        before = _NEWLINES if at else ""
        after = _NEWLINES if at + 1 < len(texts) else ""
        ids += tokenizer.encode(before + text + after, bos=False, control=control)
    return ids


@dataclass(frozen=True)
class _Turn:
    """What stands between the control tokens of message `index`: texts, and an image between each two of them.

    The first text begins with the role and a newline.
    """

    index: int
    texts: list[str]
    images: list[object]


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
        texts, images = _content(messages[index], index, expected)
        texts[0] = f"{'user' if expected == 'user' else 'model'}\n{preface}{texts[0]}"
        turns.append(_Turn(index, texts, images))
        preface = ""
    return turns


def _content(message: Message, index: int, role: str) -> tuple[list[str], list[object]]:
    """Return the texts of a message and its images, of which one stands between each two texts."""
    texts = [""]
    images = []
    for part in parts_of(message, index, role):
        if isinstance(part, ImagePart):
            images.append(part.source)
            texts.append("")
        else:
            # The template strips every text but the system's.
            texts[-1] += part if role == "system" else part.strip()
    return texts, images
