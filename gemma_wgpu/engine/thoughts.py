"""Thoughts: what some models write before their answer, and how the one is told from the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_wgpu.errors import RequestError
from gemma_wgpu.tokens.chat import ChatTemplate
from gemma_wgpu.tokens.tokenizer import Tokenizer

THINKING = ("show", "hide", "off")
"""What a model may be asked for: to think before it answers, and to show or to hide what it thought; or not to."""


@dataclass(frozen=True)
class Thoughts:
    """The ids of the tokens that begin and end a thought in a reply.

    `wanted` says whether the model was asked to think, and `shown` whether its thoughts are part of the text.
    """

    begin: int
    end: int
    wanted: bool
    shown: bool

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer, thinking: str) -> Thoughts | None:
        """Return those of a chat's reply, or None if the family has no thoughts; `thinking` is one of THINKING."""
        if template.thoughts is None:
            return None
        begin, end = (
            tokenizer.encode(token, bos=False)[0] for token in (template.thoughts.begin, template.thoughts.end)
        )
        return cls(begin, end, wants(thinking), thinking == "show")


def wants(thinking: str) -> bool:
    """Say whether a model is asked to think. Raises RequestError unless `thinking` is one of THINKING."""
    if thinking not in THINKING:
        raise RequestError(f"thinking is {thinking!r}; it must be one of {', '.join(THINKING)}", option="thinking")
    return thinking != "off"


class Channel:
    """Follows a reply token by token, and knows whether it is inside of a thought. A prompt may begin one.

    `had` says whether there was a thought, or is one.
    """

    def __init__(self, thoughts: Thoughts | None, prompt: Sequence[int]) -> None:
        self._thoughts = thoughts
        marks = [token for token in prompt if thoughts and token in (thoughts.begin, thoughts.end)]
        self.inside = self.had = bool(thoughts and marks[-1:] == [thoughts.begin])
        self._is_named = True

    @property
    def shown(self) -> bool:
        """Say whether what comes now is part of the text."""
        return not self.inside or bool(self._thoughts and self._thoughts.shown)

    @property
    def may_begin(self) -> int | None:
        """Return the token that begins a thought, if the model was asked to think and has not begun."""
        return self._thoughts.begin if self._thoughts and self._thoughts.wanted and not self.had else None

    def is_mark(self, token: int) -> bool:
        """Say whether `token` begins or ends a thought."""
        return self._thoughts is not None and token in (self._thoughts.begin, self._thoughts.end)

    def turn(self, token: int) -> None:
        """Begin or end a thought by a token that `is_mark`."""
        self.inside = self._thoughts is not None and token == self._thoughts.begin
        self.had |= self.inside
        self._is_named = not self.inside

    def unnamed(self, text: str) -> str:
        """Return text of a thought without the line of its name, which comes first."""
        if self._is_named:
            return text
        _, newline, rest = text.partition("\n")
        self._is_named = bool(newline)
        return rest
