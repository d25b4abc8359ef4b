"""How the next token is chosen from the logits."""

import math
import operator
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError

# Below this temperature, logits over it leave f32, and the likeliest token has all the probability anyway.
_COLDEST = 1e-4
_SMALLEST = 2.0**-126  # that a GPU's float32 tells from 0


@dataclass(frozen=True)
class Sampling:
    """The options of sampling, applied in this order; the defaults are those that Gemma 3's authors recommend.

    - repetition_penalty: logits of tokens that occur in the prompt or the text are divided by it, negative ones
      multiplied (arXiv 1909.05858); 1 is off.
    - temperature: logits are divided by it; 0 takes the likeliest token, and the options below do not matter.
    - top_k: only the k likeliest tokens; 0 is off.
    - top_p: only the likeliest tokens that together have this probability (arXiv 1904.09751); 1 is off.
    - min_p: only tokens at least this times as likely as the likeliest (arXiv 2407.01082); 0 is off.
    - seed: the same seed gives the same text; one is drawn where it is None.

    Raises RequestError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 100)
        check_integer("top_k", self.top_k, 0, 1 << 24)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(32))
        check_integer("seed", self.seed, 0, (1 << 32) - 1)

    @property
    def divisor(self) -> float:
        """What the logits are divided by: 1 where the likeliest token is taken."""
        return self.temperature if self.temperature >= _COLDEST else 1.0

    def words(self) -> NDArray[np.uint32]:
        """The struct Sampling of shaders/sampling.wgsl."""
        temperature = self.temperature if self.temperature >= _COLDEST else 0.0
        top_p = max(self.top_p, _SMALLEST)
        floats = [temperature, top_p, self.min_p, self.repetition_penalty]
        integers = np.array([self.top_k, self.seed], np.uint32)
        return np.concatenate((np.array(floats, np.float32).view(np.uint32), integers))


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    range_ = f"a number {'above' if above else 'from'} {low} {'up ' if above else ''}to {high}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise RequestError(f"{name} is {value!r}; it must be {range_}")
    if math.isnan(value) or not low <= value <= high or (above and value == low):
        raise RequestError(f"{name} is {value}; it must be {range_}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise RequestError unless `value`, of the option `name`, is a whole number in [low, high]."""
    try:
        inside = not isinstance(value, bool) and low <= operator.index(value) <= high  # type: ignore[arg-type]
    except TypeError:
        inside = False
    if not inside:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
