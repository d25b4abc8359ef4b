"""The tower of a model in a GGUF file, which llama.cpp keeps in a file of its own, with "mmproj" in its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.keys import Keys, shown
from gemma_wgpu.models.spec import Family, TensorSpec
from gemma_wgpu.weights.gguf_file import GGUFHeader
from gemma_wgpu.weights.stored import MappedFile, StoredTensor, matched

ARCHITECTURE = "clip"
_KIND_OF_FILE = "general.architecture"
_HAS_VISION = "clip.has_vision_encoder"
_PROJECTORS = ("clip.projector_type", "clip.vision.projector_type")
_SIZE = "clip.vision.projection_dim"
_UP, _DOWN = "ffn_up", "ffn_down"
_OTHER = {_UP: _DOWN, _DOWN: _UP}


def is_mmproj(name: str) -> bool:
    """Say whether the name of a file is that of a tower."""
    name = name.lower()
    return "mmproj" in name and name.endswith(".gguf")


@dataclass(frozen=True)
class Tower:
    """A tower in a file of its own, with its tensors by name. `config` is that of the whole model."""

    file: MappedFile
    config: Any
    stored: Mapping[str, StoredTensor]


def find_tower(model: Path, family: Family, config: Any) -> Tower | None:
    """Return the first tower, in the order of names, that lies beside the file `model` and fits it.

    `family` and `config` are those of the language model. What does not fit or is damaged is passed over.
    """
    if family.with_projector is None:
        return None
    with suppress(OSError):  # a folder may not be listed, though a file in it can be read
        for path in sorted(path for path in model.parent.iterdir() if is_mmproj(path.name)):
            with suppress(ModelError):
                return read_tower(path, family, config)
    return None


def read_tower(path: Path, family: Family, config: Any) -> Tower:
    """Return the tower in a file, for the language model of `family` and `config`.

    Raises ModelError, which names the file and what is wrong, if it is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; vision takes an mmproj file, which ends in .gguf")
    file = MappedFile(path)
    header = GGUFHeader(file)
    keys = Keys(header.metadata, str(path), family.name)
    architecture = keys.text(_KIND_OF_FILE)
    if architecture != ARCHITECTURE:
        raise keys.error(_KIND_OF_FILE, f"is {shown(architecture)}; a file with a tower has {ARCHITECTURE}")
    if keys.get(_HAS_VISION, True) is False:
        raise keys.error(_HAS_VISION, "is false; the tower in this file does not read images")
    # llama.cpp calls the projector of Gemma 3 as it calls the language model.
    key = next((key for key in _PROJECTORS if key in header.metadata), _PROJECTORS[0])
    kind = keys.text(key)
    if family.with_projector is None or kind not in family.architectures:
        raise keys.error(key, f"is {shown(kind)}; that is no tower for a {family.name} model")
    size = keys.count(_SIZE, config.hidden_size)
    if size != config.hidden_size:
        raise keys.error(_SIZE, f"is {size} where the language model has {config.hidden_size}; take its own mmproj")
    whole = family.with_projector(config, header.metadata, str(path))
    specs = [spec for spec in family.tensors(whole) if spec.tower]
    stored = _by_todays_names(header.tensors(), specs)
    return Tower(file, whole, matched(family, specs, stored, place=str(path), file_name=lambda spec: spec.gguf))


def _by_todays_names(stored: Mapping[str, StoredTensor], specs: Sequence[TensorSpec]) -> Mapping[str, StoredTensor]:
    """Return the tensors by the names that the table has.

    Old versions of llama.cpp's converter called the two matrices of an MLP by each other's names.
    """
    up = next((spec for spec in specs if spec.gguf.endswith(f".{_UP}.weight")), None)
    found = stored.get(up.gguf) if up else None
    if not up or not found or found.shape == up.shape or found.shape != up.shape[::-1]:
        return stored
    return {".".join(_OTHER.get(part, part) for part in name.split(".")): tensor for name, tensor in stored.items()}
