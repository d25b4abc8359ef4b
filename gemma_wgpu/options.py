"""All options of a generation, once: their names, defaults and ranges, and what people are told of them.

Python, the command line, the terminal chat, batch files and the server read them from here.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import numpy as np

from gemma_wgpu.errors import RequestError


@dataclass(frozen=True)
class Constraint:
    """The form that a text must have. The functions of `gemma_wgpu.structured` make one."""

    grammar: str  # as llguidance reads it


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, and `help`, which says what it does.

    Without a `high`, the option is any whole number from `low` on.
    """

    help: str
    low: float
    high: float | None
    whole: bool = False
    open: bool = False  # whether `low` itself is outside

    def check(self, name: str, value: object) -> None:
        """Raise RequestError unless `value` is in the range; `name` is the option's."""
        if not (_is_whole(value) if self.whole else _is_number(value)) or not self._contains(value):
            raise RequestError(f"{name} is {value!r}; it must be {self}", option=name)

    def _contains(self, value: Any) -> bool:
        high = math.inf if self.high is None else self.high
        return bool(self.low < value <= high if self.open else self.low <= value <= high)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high is None:
            return f"{kind} above {self.low - 1:,}"
        return (
            f"{kind} above {self.low:,} up to {self.high:,}"
            if self.open
            else f"{kind} from {self.low:,} to {self.high:,}"
        )


def _is_whole(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def _option(default: float | None, range_: Range) -> Any:
    return field(default=default, metadata={"range": range_})


class OptionFields(TypedDict, total=False):
    """The fields of Options as keyword arguments."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    constraint: Constraint | None
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a generation. The defaults of sampling are those that Gemma's authors recommend.

    The next token is chosen from the logits in this order:

    - repetition_penalty: the logits of tokens that have occurred in the prompt or the text are divided by it, and
      negative ones are multiplied by it (arXiv 1909.05858). 1 is off.
    - temperature: the logits are divided by it. 0 takes the likeliest token, and the options below do not matter.
    - top_k: only the k likeliest tokens can be drawn. 0 is off.
    - top_p: only the likeliest tokens that together have this probability can be drawn (arXiv 1904.09751). 1 is off.
    - min_p: only tokens that are at least this times as likely as the likeliest can be drawn (arXiv 2407.01082). 0
      is off.
    - seed: the same seed gives the same text. One is drawn if it is None.

    The text ends at the model's end token, or sooner:

    - max_new_tokens: the text has at most so many tokens. If it is None, the text may fill the context.
    - stop: the text ends before any of these strings.
    - constraint: the text has this form, and ends when it is complete.
    - ignore_eos: the text goes on after an end token. This is for benchmarks.

    With `logprobs`, each piece has the logarithm of its token's probability and those of so many of the likeliest
    tokens, before the options above change them.

    Raises RequestError, which names the option, for a value outside its range.
    """

    max_new_tokens: int | None = _option(None, Range("Stop after so many tokens.", 1, None, whole=True))
    temperature: float = _option(1.0, Range("0 always takes the likeliest token.", 0, 100))
    top_k: int = _option(64, Range("Draw from the k likeliest tokens; 0 is off.", 0, 1 << 24, whole=True))
    top_p: float = _option(0.95, Range("Draw from the likeliest tokens that make up p; 1 is off.", 0, 1, open=True))
    min_p: float = _option(0.0, Range("Draw from tokens p times as likely as the likeliest; 0 is off.", 0, 1))
    repetition_penalty: float = _option(1.0, Range("Above 1, tokens repeat less often.", 0.01, 100))
    seed: int | None = _option(None, Range("The same seed gives the same text.", 0, (1 << 32) - 1, whole=True))
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, range_ in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                range_.check(name, value)
        strings = (
            (self.stop,) if isinstance(self.stop, str) or not isinstance(self.stop, Iterable) else tuple(self.stop)
        )
        if not all(isinstance(text, str) and text for text in strings):
            raise RequestError(
                f"stop is {self.stop!r}; it must be a text or a list of texts, none of them empty", option="stop"
            )
        object.__setattr__(self, "stop", strings)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`, which may be one text alone."""
        return tuple(self.stop)

    def for_text(self, index: int) -> Options:
        """Return the options of text number `index` of several: its seed is `seed + index`."""
        if self.seed is None or not index:
            return self
        return replace(self, seed=(self.seed + index) % (1 << 32))

    def drawn_seed(self) -> int:
        """Return the seed, or a new one if there is none."""
        return secrets.randbits(32) if self.seed is None else self.seed


_MAY_BE_NONE = ("max_new_tokens", "seed")
RANGES: dict[str, Range] = {f.name: f.metadata["range"] for f in fields(Options) if "range" in f.metadata}
"""The options that are numbers, by name. The command line, the chat and the batch files offer these."""


def check_count(name: str, value: object, low: int, high: int) -> None:
    """Raise RequestError unless `value`, of the option `name`, is a whole number from `low` to `high`."""
    Range("", low, high, whole=True).check(name, value)
