"""Reading a Hugging Face model folder: config.json, safetensors in one file or in shards, tokenizer.json."""

import json
import re
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.tokens.tokenizer import HFTokenizer, Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.stored import HEAD, MappedFile, StoredCheckpoint, StoredTensor

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")  # a file of the folder itself, wherever an index may point

_ENCODINGS = {"F32": encodings.F32, "F16": encodings.F16, "BF16": encodings.BF16}

# A multimodal checkpoint keeps its text model under the first of these, since transformers 5 the second ...
_TEXT = ("language_model.model.", "model.language_model.")
# ... and beside it the vision tower, which is left alone.
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class SafetensorsCheckpoint(StoredCheckpoint):
    """A Gemma 3 in a Hugging Face folder, in bf16, f16 or f32.

    Raises ModelError, naming the file and what is wrong, unless every tensor is there and can be read.
    """

    def __init__(self, path: Path) -> None:
        if not (path / _CONFIG).is_file():
            raise ModelError(
                f"{path}: no {_CONFIG} in this folder; give a Hugging Face model folder, or a .gguf file"
            )
        config = Gemma3Config.from_hf(_json(path / _CONFIG), source=str(path / _CONFIG))
        files = [MappedFile(shard) for shard in _shards(path)]
        stored: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in _tensors(file):
                if tensor.name in stored:
                    other = stored[tensor.name].file.path.name
                    raise tensor.error(f"is in {other} too; these shards are not of one model")
                stored[tensor.name] = tensor
        super().__init__(path, path.resolve().name, config, files, stored, file_name=str, norm_bias=1)
        self.quantization = self.quantization.lower()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights, config.json and tokenizer.json."""
        return (*super().files, self.path / _CONFIG, self.path / _TOKENIZER)

    def vocabulary(self) -> Vocabulary:
        """The vocabulary in tokenizer.json. Raises ModelError when it is missing, damaged or not Gemma's."""
        return Vocabulary.from_tokenizer_json(self.path / _TOKENIZER)

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer.json. Raises ModelError when it is missing or damaged."""
        return HFTokenizer(self.path / _TOKENIZER)


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a folder; the single one first, as transformers does."""
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.is_file():
        raise ModelError(f"{path}: neither {_SINGLE} nor {_INDEX} in this folder; download the model's weights")
    entries = _json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{index}: no weight_map; download it again")
    for name in entries.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(f"{index}: {name!r} in weight_map is not the name of a safetensors file")
    shards = [path / name for name in sorted(set(entries.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard}: no such file, but {_INDEX} lists it; download this shard")
    return shards


def _tensors(file: MappedFile) -> list[StoredTensor]:
    """The text model's tensors, by the names they have in a checkpoint without vision."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks what the rest relies on: the header, every shape, that the data fills the file.
        with safe_open(file.path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file.path}: not a whole safetensors file ({error}); download it again") from error
    # numpy has no bfloat16, so safe_open cannot hand such a tensor out: its bytes are found by the header.
    length = int.from_bytes(file.map[:8], "little")
    header = json.loads(file.map[8 : 8 + length])
    tensors = []
    for label, entry in header.items():
        if label == "__metadata__" or label.startswith(_VISION):
            continue
        encoding = _ENCODINGS.get(entry["dtype"])
        if encoding is None:
            raise ModelError(
                f"{file.path}: tensor {label!r} is {entry['dtype']}; only {', '.join(_ENCODINGS)} can be "
                "read, use the model's bf16 original or a GGUF"
            )
        offset = 8 + length + entry["data_offsets"][0]
        tensors.append(StoredTensor(_name(label), tuple(entry["shape"]), label, encoding, file, offset))
    return tensors


def _name(label: str) -> str:
    for prefix in _TEXT:
        if label.startswith(prefix):
            return "model." + label.removeprefix(prefix)
    return HEAD if label == f"language_model.{HEAD}" else label


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object; download it again")
    return content
