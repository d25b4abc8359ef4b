"""Messages of a chat as people write them: their roles, their texts, and what their images and sounds are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from gemma_wgpu.errors import RequestError

Message = Mapping[str, object]
"""A message has a "role" ("system", only in front; "user"; "assistant" or "model"; "tool") and a "content", which is
a str or a list of parts. A part is {"type": "text", "text": str} or, in a user's message, an image: {"type": "image"}
with one of "image", "path", "url" and "base64", or {"type": "image_url", "image_url": {"url": str}}; or a sound:
{"type": "audio"} with one of "audio", "path", "url" and "base64", or {"type": "input_audio", "input_audio":
{"data": str of base64}}.

For models that call tools, an assistant's message may have "tool_calls", as OpenAI's API has them: a list of
{"id": str, "function": {"name": str, "arguments": dict or JSON of one}}. A message of a "tool" follows it with what
the tool returned: a content of any JSON type, and a "tool_call_id" or a "name". For models that think, an assistant's
message may have its thought as "reasoning_content"."""

_SOURCES = ("path", "url", "base64")
# What parts with an image or a sound are called, where the second kind has a source of its own only, and what it is.
_NOUNS = {"image": "image", "image_url": "image", "audio": "sound", "input_audio": "sound"}
_NESTED = {"image_url": "url", "input_audio": "data"}


@dataclass(frozen=True)
class MediumPart:
    """An image or a sound in a message: a Path, an address or a data URI (str), or whatever "image" or "audio" held.

    `noun` is "image" or "sound".
    """

    noun: str
    source: object


Parts = list[str | MediumPart]
"""The texts of a message, and its images and sounds, in order."""


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


def _part(part: object, index: int, role: str) -> str | MediumPart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and isinstance(kind, str) and kind in _NOUNS:
        noun = _NOUNS[kind]
        if role != "user":
            raise RequestError(f"message {index} has role {role} and {a(noun)}; only a user message may have {noun}s")
        return MediumPart(noun, _source(part, kind, index))
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
    if not isinstance(text, str):
        raise RequestError(
            f'message {index} has a part that is not {{"type": "text", "text": ...}} or '
            '{"type": "image", "url": ...}'
        )
    return text


def _source(part: Mapping[str, Any], kind: str, index: int) -> object:
    """Return what a part with an image or a sound holds: see MediumPart."""
    thing = a(_NOUNS[kind])
    sources: tuple[str, ...] = (kind, *_SOURCES)
    if kind in _NESTED:
        nested, sources = part.get(kind), (_NESTED[kind],)
        part = nested if isinstance(nested, Mapping) else {_NESTED[kind]: nested}
    given = [(source, part[source]) for source in sources if part.get(source) is not None]
    if len(given) != 1:
        wanted = f"a {sources[0]}" if len(sources) == 1 else f"exactly one of {', '.join(sources[:-1])} and base64"
        raise RequestError(f"message {index} has {thing} with {len(given)} sources; give it {wanted}")
    source, value = given[0]
    if source == kind:
        return value
    if source == "path" and isinstance(value, (str, PurePath)):
        return Path(value)
    if not isinstance(value, str):
        raise RequestError(f"message {index} has {thing} whose {source} is {type(value).__name__}; it must be a str")
    is_base64 = source in ("base64", "data") and not value.startswith("data:")
    return f"data:;base64,{value}" if is_base64 else value


def a(noun: str) -> str:
    """Return a noun after its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
