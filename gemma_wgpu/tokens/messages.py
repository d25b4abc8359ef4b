"""Messages of a chat as people write them: their roles, their texts, and what their images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from gemma_wgpu.errors import RequestError

Message = Mapping[str, object]
"""A message has a "role" ("system", only in front; "user"; "assistant" or "model"; "tool") and a "content", which is
a str or a list of parts. A part is {"type": "text", "text": str} or, in a user's message, an image: {"type": "image"}
with one of "image", "path", "url" and "base64", or {"type": "image_url", "image_url": {"url": str}}.

For models that call tools, an assistant's message may have "tool_calls", as OpenAI's API has them: a list of
{"id": str, "function": {"name": str, "arguments": dict or JSON of one}}. A message of a "tool" follows it with what
the tool returned: a content of any JSON type, and a "tool_call_id" or a "name". For models that think, an assistant's
message may have its thought as "reasoning_content"."""

_SOURCES = ("image", "path", "url", "base64")


@dataclass(frozen=True)
class ImagePart:
    """An image in a message: a Path, a str (an address or a data URI), or whatever "image" held."""

    source: object


Parts = list[str | ImagePart]
"""The texts and the images of a message, in order."""


def roles_of(messages: Sequence[Message], known: Sequence[str]) -> list[str]:
    """Return the role of each message; "model" is another name for "assistant".

    Raises RequestError for one that is not `known`, and if there is no message but one of the system.
    """
    if not isinstance(messages, Sequence):
        raise RequestError(f"a chat is a list of messages, not {type(messages).__name__}")
    roles = [_role(message, index, known) for index, message in enumerate(messages)]
    if roles in ([], ["system"]):
        raise RequestError(f"message {len(roles)} is missing; a chat needs a user message")
    return roles


def _role(message: Message, index: int, known: Sequence[str]) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    role = "assistant" if role == "model" else role
    if role not in known:
        *others, last = known
        raise RequestError(f"message {index} has role {role!r}; give it a role of {', '.join(others)} or {last}")
    return str(role)


def parts_of(message: Message, index: int, role: str) -> Parts:
    """Return the content of message number `index`. Raises RequestError unless it is one that `role` may have."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise RequestError(f"message {index} has content of type {type(content).__name__}; it must be text")
    return [_part(part, index, role) for part in content]


def _part(part: object, index: int, role: str) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("image", "image_url"):
        if role != "user":
            raise RequestError(f"message {index} has role {role} and an image; only a user message may have images")
        return ImagePart(_image(part, index))
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
    if not isinstance(text, str):
        raise RequestError(
            f'message {index} has a part that is not {{"type": "text", "text": ...}} or '
            '{"type": "image", "url": ...}'
        )
    return text


def _image(part: Mapping[str, Any], index: int) -> object:
    if part["type"] == "image_url":
        nested = part.get("image_url")
        part = nested if isinstance(nested, Mapping) else {"url": nested}
        sources: tuple[str, ...] = ("url",)
    else:
        sources = _SOURCES
    given = [(source, part[source]) for source in sources if part.get(source) is not None]
    if len(given) != 1:
        wanted = "a url" if sources == ("url",) else "exactly one of image, path, url and base64"
        raise RequestError(f"message {index} has an image with {len(given)} sources; give it {wanted}")
    source, value = given[0]
    if source == "image":
        return value
    if source == "path" and isinstance(value, (str, PurePath)):
        return Path(value)
    if not isinstance(value, str):
        raise RequestError(f"message {index} has an image whose {source} is {type(value).__name__}; it must be a str")
    return f"data:;base64,{value}" if source == "base64" and not value.startswith("data:") else value
