"""Structured output: JSON by a schema, text that matches a regular expression, or one of several choices.

from gemma_wgpu import structured

dog = structured.json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
print(gemma.chat("Describe a dog", constraint=dog))

Before each token llguidance, a grammar library, says which ones may come next, and the GPU draws from those. It comes
with the extra `structured`. There is no build of it for Pyodide, so constraints do not work in browsers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.options import Constraint
from gemma_wgpu.tokens.tokenizer import Tokenizer

# This is as json.dumps writes it. If any amount of white space is allowed, small models may never stop to write it.
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema(schema: Mapping[str, Any]) -> Constraint:
    """Return the form of JSON on one line that is valid by `schema` (JSON Schema, draft 2020-12).

    Properties come in the order of the schema. What it does not bound (by maxLength, maxItems, maximum, ...) may go
    on until the context is full. An "x-guidance" in the schema holds options of llguidance, such as for white space.

    Raises RequestError for a schema that is invalid, or has keywords that llguidance lacks ("not", "uniqueItems").
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"a JSON schema is a dict, not {type(schema).__name__}")
    matcher = _llguidance().LLMatcher
    try:
        grammar = matcher.grammar_from_json_schema(json.dumps(schema), defaults=_ONE_LINE)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be used: {error}") from error
    return _checked("the JSON schema", grammar)


def json_object() -> Constraint:
    """Return the form of any JSON object, on one line."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Constraint:
    """Return the form of a text that all of `pattern` matches.

    The syntax is that of Rust's regex crate, which has no look-around and no back references.

    Raises RequestError for a pattern that is invalid.
    """
    if not isinstance(pattern, str):
        raise RequestError(f"a regular expression is a str, not {type(pattern).__name__}")
    return _checked(f"the regular expression {pattern!r}", _llguidance().LLMatcher.grammar_from_regex(pattern))


def choice(options: Sequence[str]) -> Constraint:
    """Return the form of one of `options`, word for word. Raises RequestError unless they are texts, none empty."""
    if isinstance(options, str) or not options or not all(isinstance(text, str) and text for text in options):
        raise RequestError(f"choices are {options!r}; they must be a list of texts, none of them empty")
    pattern = "|".join("".join(f"\\x{{{ord(character):X}}}" for character in text) for text in options)
    return _checked(f"choices {options!r}", _llguidance().LLMatcher.grammar_from_regex(pattern))


def from_response_format(response_format: Mapping[str, Any]) -> Constraint | None:
    """Return what `response_format` in a request to OpenAI's API asks for; None if that is {"type": "text"}.

    Raises RequestError if it is none of text, json_object and json_schema, and as `json_schema` does.
    """
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return json_object()
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return json_schema(schema)
    raise RequestError(
        'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
        '{"name": ..., "schema": ...}}'
    )


class Matcher:
    """Knows how far a text has come in the form that it must have."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words

    def mask(self) -> NDArray[np.uint32]:
        """Return the tokens that may come next, a bit for each.

        The end tokens are among them if the form is complete.
        """
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]

    def accept(self, token: int) -> None:
        """Note that `token` has come next."""
        self._matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        """Say whether the form became too complex for llguidance; only end tokens are in the mask then."""
        return bool(self._matcher.is_error())


class Grammars:
    """Prepares the first `size` tokens of a model's vocabulary for constraints, which takes a second."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        llguidance = _llguidance()
        tokens = _Tokens(tokenizer, size)
        ends = sorted(token for token in tokenizer.eos_ids if token < size)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=ends)
        self._matcher = llguidance.LLMatcher
        self._words = -(-size // 32)

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a matcher for a new text.

        Raises RequestError if `constraint` is no Constraint, or is too complex.
        """
        if not isinstance(constraint, Constraint):
            raise RequestError(
                f"constraint is a {type(constraint).__name__}; make one by gemma_wgpu.structured.json_schema, "
                "json_object, regex or choice"
            )
        matcher = self._matcher(self._tokenizer, constraint.grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the constraint cannot be kept: {_reason(matcher.get_error())}")
        return Matcher(matcher, self._words)


class _Tokens:
    """A tokenizer as llguidance asks for it, with the names that it gives."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokens = tokenizer.token_bytes()[:size]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.eos_ids)
        self._tokenizer = tokenizer
        self._byte_ids = {self.tokens[token]: token for token in tokenizer.byte_ids}

    def __call__(self, text: str) -> list[int]:
        """Return how the model would write a text if nothing else can come."""
        ids, data = self._tokenizer.encode(text, bos=False, control=False), text.encode()
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        # It is text of which the tokenizer makes tokens without one, as <unused0>, or with another, as U+2581.
        return [self._byte_ids[data[at : at + 1]] for at in range(len(data))]


def _checked(name: str, grammar: str) -> Constraint:
    error = _llguidance().LLMatcher.validate_grammar(grammar)
    if error:
        raise RequestError(f"{name} cannot be used: {_reason(error)}")
    return Constraint(grammar)


def _reason(error: str) -> str:
    """Return the sentence in llguidance's report; its other lines point at places in grammars that it made."""
    found = re.search(r"error: (.+)", error)
    return found[1] if found else re.sub(r"^(at )?\d+\(\d+\): ", "", error.strip().partition("\n")[0])


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "constraints take llguidance, which is not installed; pip install 'gemma-wgpu[structured]' (in browsers "
            "there is none)"
        ) from error
    return llguidance
