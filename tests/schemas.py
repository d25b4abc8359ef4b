"""Random JSON schemas whose every instance is short, so that a text is complete before it has to be cut."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]
_Kind = Callable[[Random, int], Schema]

_NAMES = ["name", "age", "kind", "tags", "größe", "is ok", 'a"b', "x/y", "n_1", "😀"]


def random_schema(random: Random, depth: int = 3) -> Schema:
    """One of the kinds below; of those that hold others, at most `depth` in each other."""
    simple: list[_Kind] = [_string, _pattern, _format, _integer, _multiple, _enum, _const, _empty]
    nested: list[_Kind] = [_object, _object, _object, _array, _tuple, _any_of, _reference]
    return random.choice([*nested, *simple] if depth else simple)(random, depth - 1)


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(_NAMES, random.randint(1, 4))
    properties = {name: random_schema(random, depth) for name in names}
    required = [name for name in names if random.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(random: Random, depth: int) -> Schema:
    low = random.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(random, depth),
        "minItems": low,
        "maxItems": low + random.randint(0, 2),
    }


def _tuple(random: Random, depth: int) -> Schema:
    items = [random_schema(random, depth) for _ in range(random.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(random: Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(random, depth) for _ in range(2)]}


def _reference(random: Random, depth: int) -> Schema:
    return {
        "$id": f"urn:{random.random()}",  # what "#" is then
        "$defs": {"part": random_schema(random, 0)},
        "type": "array",
        "items": {"$ref": "#/$defs/part"},
        "maxItems": 2,
    }


def _string(random: Random, depth: int) -> Schema:
    low = random.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + random.randint(0, 6)}


def _pattern(random: Random, depth: int) -> Schema:
    return {"type": "string", "pattern": random.choice([r"^[A-Z]{2}-\d{3}$", "^(ab|c){1,3}$", "^é?[^a-z]{2}$"])}


def _format(random: Random, depth: int) -> Schema:
    return {"type": "string", "format": random.choice(["date", "ipv4", "uuid"])}


def _integer(random: Random, depth: int) -> Schema:
    low = random.randint(-200, 100)
    return {"type": "integer", "minimum": low, "maximum": low + random.choice([0, 5, 1000])}


def _multiple(random: Random, depth: int) -> Schema:
    return {"type": "integer", "exclusiveMinimum": -100, "exclusiveMaximum": 100, "multipleOf": random.randint(2, 50)}


def _enum(random: Random, depth: int) -> Schema:
    return {"enum": random.sample(["red", "grün", 'say "hi"', 3, -1.5, True, None, [1, 2], {"a": "b, c"}], 3)}


def _const(random: Random, depth: int) -> Schema:
    return {"const": random.choice(["a\nb", 7, False, "▁", {"k": [None]}])}


def _empty(random: Random, depth: int) -> Schema:
    return {"type": random.choice(["boolean", "null", ["boolean", "null"]])}
