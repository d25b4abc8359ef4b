"""Prompts: token ids, and the images whose soft tokens are among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.tokens.chat import ImageTokens


@dataclass(frozen=True, eq=False)
class Image:
    """An image that a prompt has: float32 pixels (3, image_size, image_size), normalised.

    `key` is a negative number that tells its content.
    """

    pixels: NDArray[np.float32]
    key: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with the soft tokens of images in place, and these images in their order."""

    ids: Sequence[int]
    images: Sequence[Image] = ()

    def keyed(self, tokens: ImageTokens | None, most: int) -> list[int]:
        """Return the ids with an image's key in the place of each of its soft tokens.

        So what is reused of the cache depends on what an image shows. Raises RequestError if there are not as many
        soft tokens as the images have, or if images that stand side by side have more than `most`.
        """
        ids = list(self.ids)
        if tokens is None:
            return ids
        soft = [index for index, token in enumerate(ids) if token == tokens.soft]
        if len(soft) != len(self.images) * tokens.count:
            raise RequestError(
                f"the prompt has {len(soft):,} soft tokens of images (id {tokens.soft}), and its {len(self.images)} "
                f"images have {len(self.images) * tokens.count:,}: each has {tokens.count}"
            )
        for number, index in enumerate(soft):
            ids[index] = self.images[number // tokens.count].key
        for start, stop in runs(ids):
            if (stop - start) % tokens.count:
                raise RequestError(
                    f"{stop - start:,} soft tokens of images stand side by side at index {start}; an image has "
                    f"{tokens.count}"
                )
            if stop - start > most:
                raise RequestError(
                    f"images with {stop - start:,} tokens stand side by side, more than the prefill_chunk of "
                    f"{most:,}, in which they are computed at once; put text between them or load the model with a "
                    "longer one"
                )
        return ids


def runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return where images stand in `ids`: (start, stop) of each run of keys, which are negative."""
    soft = np.concatenate(([False], np.less(ids, 0), [False]))
    edges = np.flatnonzero(soft[1:] != soft[:-1])
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
