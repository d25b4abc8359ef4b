"""Prompts: token ids, and the images and sounds whose soft tokens are among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.thoughts import Thoughts
from gemma_wgpu.errors import RequestError
from gemma_wgpu.models.spec import Tower


@dataclass(frozen=True, eq=False)
class Medium:
    """An image or a sound that a prompt has, as its tower takes it.

    An image has float32 pixels (3, image_size, image_size), normalised, and a sound has float32 log-mel features
    (frames, 128). `key` is a negative number that tells its content. `noun` is "image" or "sound".
    """

    data: NDArray[np.float32]
    key: int
    noun: str = "image"


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with the soft tokens of images and sounds in place, and these in their order.

    `thoughts` says how the thoughts in a reply to it are marked, if there may be some.
    """

    ids: Sequence[int]
    media: Sequence[Medium] = ()
    thoughts: Thoughts | None = None

    def keyed(self, towers: Mapping[str, Tower], most: int) -> list[int]:
        """Return the ids with the key of an image or a sound in the place of each of its soft tokens.

        So what is reused of the cache depends on what an image shows. `towers` are the model's, by what they read.
        Raises RequestError if there are not as many soft tokens as the images and sounds have, or if those that stand
        side by side have more than `most`.
        """
        ids = list(self.ids)
        for noun, tower in towers.items():
            self._put_keys(ids, noun, tower.tokens.soft, tower.tokens.count)
        for start, stop in runs(np.less(ids, 0)):
            if stop - start > most:
                raise RequestError(
                    f"{_nouns(towers)} with {stop - start:,} tokens stand side by side, more than the prefill_chunk "
                    f"of {most:,}, in which they are computed at once; put text between them or load the model with "
                    "a longer one"
                )
        return ids

    def _put_keys(self, ids: list[int], noun: str, token: int, count: int) -> None:
        """Put the keys of all images, or of all sounds, into the places of their soft tokens."""
        media = [medium for medium in self.media if medium.noun == noun]
        is_soft = np.equal(ids, token)
        soft = np.flatnonzero(is_soft).tolist()
        if len(soft) != len(media) * count:
            raise RequestError(
                f"the prompt has {len(soft):,} soft tokens of {noun}s (id {token}), and its {len(media)} {noun}s "
                f"have {len(media) * count:,}: each has {count}"
            )
        for start, stop in runs(is_soft):
            if (stop - start) % count:
                article = "an" if noun == "image" else "a"
                raise RequestError(
                    f"{stop - start:,} soft tokens of {noun}s stand side by side at index {start}; {article} {noun} "
                    f"has {count}"
                )
        for number, index in enumerate(soft):
            ids[index] = media[number // count].key


def _nouns(towers: Mapping[str, Tower]) -> str:
    return " and ".join(f"{noun}s" for noun in towers)


def runs(places: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of places that are true."""
    soft = np.concatenate(([False], places, [False]))
    edges = np.flatnonzero(soft[1:] != soft[:-1])
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
