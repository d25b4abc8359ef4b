"""Values recorded from transformers, and how far ours are from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import Gemma

FOLDER = Path(__file__).parent

# F32: the largest error of a logit where all of a position are recorded, and of the 32 highest and the logsumexp.
# F16: the Kullback-Leibler divergence from the reference, in nats, and how many greedy tokens are the same. What
# float16 storage alone comes to, roundings of either direction drawn at random since WGSL leaves it to the driver
# (f16_noise.py): at most 1.4e-5 after the short prompts in 36 draws, and 3e-4 to 9e-3 in 12 draws after the long one,
# whose last token is the most sensitive one of 702: nine in ten stay below 3e-6. There the usual kernels have a bound
# that they meet on the adapter of the tests, and the others one that storage alone allows.
# Activations of 8 bits: the divergence after a prompt (0.001 to 0.081 were measured, 0.0018 a token over a text).
F32_LOGITS = 2e-3
F32_TOPS = 5e-3
F16_DIVERGENCE = 2.5e-5
F16_LONG_DIVERGENCE = 1e-3
F16_STORAGE_DIVERGENCE = 1e-2
F16_GREEDY = 20
INT8_DIVERGENCE = 0.2

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Tops:
    """Of each position the 32 highest logits and their ids, (positions, 32), and the logsumexp, (positions,)."""

    ids: NDArray[np.int32]
    logits: Logits
    logsumexp: Logits

    @classmethod
    def read(cls, recorded: Mapping[str, NDArray[np.generic]], prefix: str = "") -> "Tops":
        ids, logits, logsumexp = (recorded[f"{prefix}{key}"] for key in ("top32_ids", "top32_logits", "logsumexp"))
        return cls(ids.astype(np.int32), logits.astype(np.float32), logsumexp.astype(np.float32))

    def error(self, logits: Logits) -> float:
        """The largest error of `logits`, (positions, vocabulary), one row for each of the first positions here."""
        rows = len(logits)
        tops = np.take_along_axis(logits, self.ids[:rows], axis=1)
        return largest_error(
            np.column_stack([tops, _logsumexp(logits)]),
            np.column_stack([self.logits[:rows], self.logsumexp[:rows]]),
        )


def largest_error(ours: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """The largest absolute difference; NaN if there is a NaN."""
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours.astype(np.float64) - reference)))


def divergence(logits: Logits, reference: Logits) -> float:
    """The Kullback-Leibler divergence, in nats, of the softmax of `logits` from that of `reference`, in float64."""
    assert logits.shape == reference.shape
    ours, theirs = (values - _logsumexp(values[None]) for values in (logits, reference))
    return float(np.sum(np.exp(theirs) * (theirs - ours)))


def greedy(model: Gemma, ids: Sequence[int], most: int = 40) -> list[int]:
    """The `most` likely ids after `ids`, one after the other, or those before the end of the text."""
    return [token for piece in model.generate(ids, max_new_tokens=most, temperature=0.0) for token in piece.ids]


def before_stop(ids: NDArray[np.int32]) -> list[int]:
    """The recorded `ids` without the stop at their end, if there is one."""
    return [token for token in ids.tolist() if token not in (1, 106)]


def common_start(ours: Sequence[int], reference: Sequence[int]) -> int:
    """How many ids at the start are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, reference, strict=False)))


def _logsumexp(logits: Logits) -> NDArray[np.float64]:
    """In float64, of each row."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=1)
    total: NDArray[np.float64] = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=1))
    return total
