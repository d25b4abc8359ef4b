"""The one type in which everything that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """This is how far something is: `done` of `total`, in `unit`. `total` is 0 if it is not known.

    `what` says what is being done, in a word or two: "downloading", "loading".
    """

    what: str
    done: int
    total: int
    unit: str = "bytes"


OnProgress = Callable[[Progress], None]
"""This is called again and again with the Progress so far."""
