"""Opening a model on disk, whatever its format is."""

from __future__ import annotations

from pathlib import Path

from gemma_wgpu.errors import ModelError
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.gguf import GGUFCheckpoint
from gemma_wgpu.weights.manifest import MANIFEST
from gemma_wgpu.weights.safetensors import SafetensorsCheckpoint


def open_checkpoint(path: str | Path, *, vision: bool | str | Path = True) -> Checkpoint:
    """Open a .gguf file, a model folder, or a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

    If `vision` is True, the tower that reads images is taken along if there is one; that of a .gguf file is in a file
    beside it, with "mmproj" in its name. If it is False, the tower is left out. If it is a path, it is that of the
    file that has the tower of a .gguf file.

    Raises ModelError, which names the file and the tensor or key, if the model is missing, damaged, incomplete or not
    of a family that can be run, or if the file `vision` does not fit it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        own = own_tower(path, vision)
        whole = FolderCheckpoint if (path / MANIFEST).exists() else SafetensorsCheckpoint
        return whole(path, vision=own)
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder; give a .gguf file or a model folder")
    return GGUFCheckpoint(path, vision=vision if isinstance(vision, bool) else Path(vision).expanduser())


def own_tower(place: str | Path, vision: bool | str | Path) -> bool:
    """Say whether a model in a folder at `place` takes its own tower along.

    Raises ModelError if `vision` is a path.
    """
    if not isinstance(vision, bool):
        raise ModelError(f"{place}: vision is {vision}, but only a .gguf file takes its tower from another file")
    return vision
