"""The references of the sampling kernels: what is done to logits, which tokens are allowed, and the noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.options import Options
from tests.kernels.bench import Floats

# float32 has the noise to 1e-4 where a uniform number near 1 makes it small, and WGSL's log is good to 2^-21 of 1.
NOISE = 2e-3


def temper(logits: NDArray[np.float32], seen: NDArray[np.bool_], options: Options) -> Floats:
    """Hugging Face's RepetitionPenaltyLogitsProcessor, then its TemperatureLogitsWarper."""
    tempered = logits.astype(np.float64)
    penalty = options.repetition_penalty
    tempered[seen] = np.where(tempered < 0, tempered * penalty, tempered / penalty)[seen]
    return tempered / (options.temperature or 1.0)


def allowed(tempered: Floats, options: Options) -> NDArray[np.bool_]:
    """Hugging Face's TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper, except that ties stay together."""
    kept = np.ones(len(tempered), np.bool_)
    if 0 < options.top_k < len(tempered):
        kept &= tempered >= np.sort(tempered)[-options.top_k]
    probabilities = np.where(kept, np.exp(tempered - tempered.max()), 0)
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        descending = np.sort(probabilities)[::-1]
        before = np.cumsum(descending) - descending  # the probability of those above
        kept &= probabilities >= descending[before < options.top_p][-1]
    return kept & (probabilities >= options.min_p * probabilities.max())


def _hash(word: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Shifts and multiplications in turn, of the constants that shaders/sampling.wgsl documents."""
    word = (word ^ word >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    word = (word ^ word >> np.uint32(15)) * np.uint32(0x735A2D97)
    return word ^ word >> np.uint32(15)


def gumbel(seed: int, position: int, vocab: int) -> Floats:
    """The noise of every token: a hash of seed, position and token, as a uniform number, as a Gumbel variable."""
    golden = np.uint32(0x9E3779B9)
    word = _hash(np.array([seed], np.uint32))
    word = _hash(np.array([position], np.uint32) + golden * word)
    uniform = (_hash(np.arange(vocab, dtype=np.uint32) + golden * word) + 0.5) / 2**32
    return -np.log(-np.log1p(-np.minimum(uniform, 1 - 2**-24)))


def bits(seen: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """A bit a token, in words."""
    padded = np.zeros(-(-len(seen) // 32) * 32, np.bool_)
    padded[: len(seen)] = seen
    return np.packbits(padded, bitorder="little").view(np.uint32)
