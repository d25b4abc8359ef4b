"""Opening a model on disk, whatever its format is."""

from __future__ import annotations

from pathlib import Path

from gemma_wgpu.errors import ModelError
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.gguf import GGUFCheckpoint
from gemma_wgpu.weights.manifest import MANIFEST
from gemma_wgpu.weights.safetensors import SafetensorsCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file, a model folder, or a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

    Raises ModelError, which names the file and the tensor or key, if the model is missing, damaged, incomplete or not
    of a family that can be run.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderCheckpoint(path) if (path / MANIFEST).exists() else SafetensorsCheckpoint(path)
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder; give a .gguf file or a model folder")
    return GGUFCheckpoint(path)
