"""The small Gemma 3 with a vision tower in tests/data/gemma3_vision, and what transformers makes of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.tokens.chat import MediumTokens

FOLDER = Path(__file__).parent / "data" / "gemma3_vision"
TOKENS = MediumTokens(begin=509, soft=512, end=510, count=4)

with np.load(FOLDER / "pictures.npz") as _pictures:
    PIXELS: NDArray[np.float32] = _pictures["pixel_values"]


@dataclass(frozen=True)
class Golden:
    """What transformers makes of a prompt; see tests/reference/record_vision.py."""

    ids: list[int]
    images: list[NDArray[np.float32]]
    logits: NDArray[np.float32]
    greedy: list[int]


class _Recorded:
    """The prompts by name."""

    def __init__(self) -> None:
        with np.load(FOLDER / "reference.npz") as recorded:
            self._arrays = dict(recorded)
        self.features: NDArray[np.float32] = self._arrays["features"]

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix("_ids") for name in self._arrays if name.endswith("_ids"))

    def __getitem__(self, name: str) -> Golden:
        ids, images, logits, greedy = (
            self._arrays[f"{name}_{what}"] for what in ("ids", "images", "logits", "greedy")
        )
        return Golden(ids.tolist(), [PIXELS[index] for index in images], logits, greedy.tolist())


GOLDEN = _Recorded()
