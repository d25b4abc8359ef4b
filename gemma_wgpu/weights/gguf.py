"""Reading a model in a GGUF file, and its tower in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.keys import listed, shown
from gemma_wgpu.models.registry import family_of_gguf
from gemma_wgpu.models.spec import TensorSpec
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.gguf_file import GGUFHeader
from gemma_wgpu.weights.mmproj import ARCHITECTURE, Tower, find_tower, read_tower
from gemma_wgpu.weights.stored import MappedFile, StoredCheckpoint, StoredTensor, matched

# These values of `general.file_type` stand for files whose tensors can be read.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    14: "Q4_K_S",
    15: "Q4_K_M",
    18: "Q6_K",
    32: "BF16",
}

# What puts the merges of a vocabulary in order, by `tokenizer.ggml.model`.
_ORDERED_BY = {"llama": "scores", "gemma4": "merges"}


class GGUFCheckpoint(StoredCheckpoint):
    """A model in a GGUF file. `metadata` has the file's keys; lists of numbers are numpy arrays.

    `vision` says whether a tower that lies beside the file is taken along, or it is the file with the tower. Raises
    ModelError, which names the file and what is wrong, unless every tensor is there and can be read.
    """

    def __init__(self, path: Path, *, vision: bool | Path = True) -> None:
        file = MappedFile(path)
        header = GGUFHeader(file)
        self.metadata = header.metadata
        if self.metadata.get("general.architecture") == ARCHITECTURE:
            raise ModelError(f"{path}: this file has a tower only; give the file of the language model beside it")
        family = family_of_gguf(self.metadata, str(path))
        config = family.config.from_gguf(self.metadata, source=str(path))
        specs = family.tensors(config)
        tensors = header.tensors()
        for label, values in family.constants(config).items():
            constant = tensors.pop(label, None)
            if constant and not (constant.encoding.dense and np.array_equal(constant.values(), values)):
                raise constant.error(f"is not what {family.name} has there; this is another architecture")
        stored = matched(
            family,
            specs,
            _apart(specs, tensors),
            unread=family.unread(config),
            place=str(path),
            file_name=_name,
        )
        tower: Tower | None = None
        if isinstance(vision, Path):
            tower = read_tower(vision, family, config)
        elif vision:
            tower = find_tower(path, family, config)
        name = self.metadata.get("general.name")
        kind = self.metadata.get("general.file_type")
        super().__init__(
            path,
            name if isinstance(name, str) else path.stem,
            family,
            tower.config if tower else config,
            [file, tower.file] if tower else [file],
            {**stored, **tower.stored} if tower else stored,
            plus_one=False,  # the converter has added the 1
            quantization=_FILE_TYPES.get(kind) if isinstance(kind, int) else None,
        )

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary in the metadata. Raises ModelError if it is missing or damaged."""
        names = ("model", "tokens", "token_type", "scores", "merges")
        kind, pieces, types, scores, merges = (self.metadata.get(f"tokenizer.ggml.{name}") for name in names)
        if not isinstance(kind, str) or kind not in _ORDERED_BY or not isinstance(pieces, list):
            raise ModelError(
                f"{self.path}: tokenizer.ggml.model is {shown(kind)}; Gemma's vocabularies are "
                f"{listed(list(_ORDERED_BY))}"
            )
        if isinstance(types, np.ndarray):
            if kind == "llama" and isinstance(scores, np.ndarray):
                return Vocabulary(pieces, scores, types)
            if kind == "gemma4" and isinstance(merges, list):
                return Vocabulary.from_merges(pieces, merges, types, str(self.path))
        raise ModelError(
            f"{self.path}: tokenizer.ggml.{_ORDERED_BY[kind]} or token_type is missing; convert the model again"
        )

    def tokenizer(self) -> Tokenizer:
        """Return the vocabulary's tokenizer. Raises ModelError if it is damaged or not Gemma's."""
        return self.vocabulary().tokenizer(str(self.path))


def _name(spec: TensorSpec) -> str:
    """Return what a tensor is called once those that lie in one are apart."""
    return spec.gguf if spec.slot is None else f"{spec.gguf} [{spec.slot[0]}]"


def _apart(specs: Sequence[TensorSpec], stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a file with those apart that lie stacked in one."""
    apart = dict(stored)
    for spec in specs:
        whole = stored.get(spec.gguf)
        if spec.slot and whole and len(whole.shape) == len(spec.shape) + 1 and whole.shape[0] == spec.slot[1]:
            apart.pop(spec.gguf, None)
            apart[_name(spec)] = whole.number(spec.slot[0])
    return apart
