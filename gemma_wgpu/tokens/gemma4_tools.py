"""How Gemma 4 writes tools down: declarations, calls, and what they return, as its published template has them.

The form is like JSON's, with bare keys and with texts between two tokens <|"|> in the place of quotes, so nothing in
a text needs to be escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gemma_wgpu.errors import RequestError
from gemma_wgpu.tokens.chat import Tool
from gemma_wgpu.tokens.messages import Message


class Token(str):
    """A control token, by its name. Any other str in a list of parts is text, whatever it looks like."""


Part = str  # a Token, or a text

_QUOTE = Token('<|"|>')
# These keys of a schema are no parameters, where one without "properties" is read as a list of them.
_KEYWORDS = ("description", "type", "properties", "required", "nullable")


@dataclass(frozen=True)
class Call:
    """A call of the tool `name` with some arguments; `id` tells it from others."""

    id: object
    name: str
    arguments: Mapping[str, Any]

    def parts(self) -> Iterator[Part]:
        """Yield the call as the model writes it."""
        yield from (Token("<|tool_call>"), f"call:{self.name}{{")
        yield from _joined(_pairs(self.arguments))
        yield from ("}", Token("<tool_call|>"))


def calls_of(message: Message, index: int) -> list[Call]:
    """Return the calls in message number `index`. Raises RequestError if they are not of OpenAI's form."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"message {index} has tool_calls of type {type(calls).__name__}; it must be a list")
    return [_call(call, index) for call in calls]


def _call(call: object, index: int) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise RequestError(
            f'message {index} has a tool call that is not {{"id": ..., "function": {{"name": ..., '
            '"arguments": ...}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"message {index} calls {name} with arguments that are not JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"message {index} calls {name} with arguments of type {type(arguments).__name__}; they must be an object"
        )
    return Call(call.get("id"), name, arguments)


def result_of(message: Message, index: int, calls: Sequence[Call]) -> tuple[str, object]:
    """Return the tool that message number `index` is of, and what it returned: one of `calls`, if it names none.

    A list of texts is one text. Raises RequestError for a list of anything else.
    """
    name = message.get("name") or "unknown"
    for call in calls:
        if call.id == message.get("tool_call_id"):
            name = call.name
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"message {index} has role tool and a part that is no text; give it texts only")
        content = "".join(map(str, texts))
    return str(name), content


def response(name: str, content: object) -> Iterator[Part]:
    """Yield what the tool `name` returned: an object, or anything else that JSON has."""
    values = content if isinstance(content, Mapping) else {"value": content}
    yield from (Token("<|tool_response>"), f"response:{name}{{")
    yield from _joined(_pairs(values))
    yield from ("}", Token("<tool_response|>"))


def declaration(tool: Tool, index: int) -> list[Part]:
    """Return what the model is told of tool number `index`. Raises RequestError if it is not of OpenAI's form."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise RequestError(
            f'tool {index} is not {{"type": "function", "function": {{"name": ..., "description": ..., '
            '"parameters": ...}}',
            option="tools",
        )
    fields: list[list[Part]] = [["description:", *_quoted(function.get("description") or "")]]
    for key, inner in (("parameters", _parameters), ("response", _returned)):
        schema = function.get(key)
        if not schema:
            continue
        try:
            if schema["type"].upper() != "OBJECT":
                raise TypeError("it describes no object")
            fields.append([f"{key}:{{", *_joined(inner(schema)), "}"])
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RequestError(
                f'tool {index}, {name}: its {key} must be a JSON schema of an object, {{"type": "object", '
                '"properties": ...}',
                option="tools",
            ) from error
    return [f"declaration:{name}{{", *_joined(fields), "}"]


def _parameters(schema: Mapping[str, Any]) -> Iterator[list[Part]]:
    if schema.get("properties"):
        yield ["properties:{", *_joined(_properties(schema["properties"])), "}"]
    if schema.get("required"):
        yield ["required:", *_names(schema["required"])]
    yield ["type:", *_quoted("OBJECT")]


def _returned(schema: Mapping[str, Any]) -> Iterator[list[Part]]:
    if schema.get("description"):
        yield ["description:", *_quoted(schema["description"])]
    yield ["type:", *_quoted("OBJECT")]


def _properties(properties: Mapping[str, Any], without: Sequence[str] = ()) -> Iterator[list[Part]]:
    """Yield each of the parameters that a schema describes."""
    for key, schema in _in_order(properties):
        if key not in without:
            fields = _fields(schema if isinstance(schema, Mapping) else {})
            yield [f"{key}:{{", *_joined(fields), "}"]


def _fields(schema: Mapping[str, Any]) -> Iterator[list[Part]]:
    """Yield what the schema of a parameter says of it, as far as the model is told."""
    kind = str(schema.get("type", "")).upper()
    if schema.get("description"):
        yield ["description:", *_quoted(schema["description"])]
    if kind == "STRING" and schema.get("enum"):
        yield ["enum:", *_value(schema["enum"], quoted=True)]
    items = schema.get("items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        yield ["items:{", *_joined(_items(items)), "}"]
    if schema.get("nullable"):
        yield ["nullable:true"]
    if kind == "OBJECT":
        inner = schema.get("properties")
        found = _properties(inner) if isinstance(inner, Mapping) else _properties(schema, _KEYWORDS)
        yield ["properties:{", *_joined(found), "}"]
        if schema.get("required"):
            yield ["required:", *_names(schema["required"])]
    yield ["type:", *_quoted(kind)]


def _items(schema: Mapping[str, Any]) -> Iterator[list[Part]]:
    """Yield what the schema of an array's items says, which is all that is in it."""
    for key, value in _in_order(schema):
        if value is None:
            continue
        if key == "properties":
            inner = _properties(value) if isinstance(value, Mapping) else ()
            yield ["properties:{", *_joined(inner), "}"]
        elif key == "required":
            yield ["required:", *_names(value)]
        elif key == "type":
            upper = value.upper() if isinstance(value, str) else [str(each).upper() for each in value]
            yield ["type:", *_value(upper, quoted=True)]
        else:
            yield [f"{key}:", *_value(value, quoted=True)]


def _value(value: object, *, quoted: bool) -> Iterator[Part]:
    """Yield a value that JSON has; `quoted` says whether the keys of objects are quoted as texts are."""
    if value is None:
        yield "null"
    elif isinstance(value, str):
        yield from _quoted(value)
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, Mapping):
        yield "{"
        yield from _joined(_pairs(value, quoted=quoted))
        yield "}"
    elif isinstance(value, Sequence):
        yield "["
        yield from _joined(_value(each, quoted=quoted) for each in value)
        yield "]"
    else:
        yield str(value)


def _pairs(mapping: Mapping[str, Any], *, quoted: bool = False) -> Iterator[Iterable[Part]]:
    """Yield each key of an object with its value."""
    for key, value in _in_order(mapping):
        yield chain(_quoted(key) if quoted else [key], [":"], _value(value, quoted=quoted))


def _in_order(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return keys and values, in the order of the keys without regard to case."""
    return sorted(((str(key), value) for key, value in mapping.items()), key=lambda pair: pair[0].lower())


def _names(names: Iterable[object]) -> Iterator[Part]:
    """Yield a list of texts."""
    yield "["
    yield from _joined(map(_quoted, names))
    yield "]"


def _quoted(text: object) -> tuple[Part, Part, Part]:
    return _QUOTE, str(text), _QUOTE


def _joined(items: Iterable[Iterable[Part]]) -> Iterator[Part]:
    """Yield items with commas between them."""
    for number, item in enumerate(items):
        if number:
            yield ","
        yield from item
