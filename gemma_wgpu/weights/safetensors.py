"""Reading a Hugging Face model folder: config.json, safetensors in one file or in shards, tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import ModelError
from gemma_wgpu.files import reason
from gemma_wgpu.models.registry import family_of_hf
from gemma_wgpu.models.spec import Family
from gemma_wgpu.tokens.tokenizer import HFTokenizer, NoTokenizer, Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.stored import MappedFile, StoredCheckpoint, StoredTensor, matched

_CONFIG = "config.json"
_TOWERS = ("vision_config", "audio_config")  # its keys that describe towers
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")  # so an index cannot name a file outside of the folder

_ENCODINGS = {"F32": encodings.F32, "F16": encodings.F16, "BF16": encodings.BF16}


class SafetensorsCheckpoint(StoredCheckpoint):
    """A model in a Hugging Face folder, in bf16, f16 or f32, with its towers if there are some and `vision` is true.

    If the family allows it, the files may lack a tower as a whole though the configuration names it.

    Raises ModelError, which names the file and what is wrong, unless every tensor is there and can be read.
    """

    def __init__(self, path: Path, *, vision: bool = True) -> None:
        if not (path / _CONFIG).is_file():
            raise ModelError(
                f"{path}: there is no {_CONFIG} in this folder; give a Hugging Face model folder, or a .gguf file"
            )
        content, source = _json(path / _CONFIG), str(path / _CONFIG)
        family, files = family_of_hf(content, source), [MappedFile(shard) for shard in _shards(path)]
        if not vision:
            for key in _TOWERS:  # so a tower that cannot be run is in nobody's way
                content.pop(key, None)
        names = {_name(label, family) for file in files for label in _header(file)}
        for key, (start, behind) in family.towers.items():
            part = content.get(key)
            if not isinstance(part, dict) or any(name.startswith(start) for name in names):
                continue
            if any(name.startswith(behind) for name in names):
                content[key] = part | {"tower": False}
            else:
                del content[key]
        config = family.config.from_hf(content, source=source)
        config = config if vision else family.text_only(config)
        specs = family.tensors(config)
        # Where the configuration has a tower, a tensor of it that the table lacks makes another architecture.
        ignored = tuple(start for start in family.ignored if not any(spec.name.startswith(start) for spec in specs))
        stored: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in _tensors(file, family, ignored):
                if name in stored:
                    other = stored[name].file.path.name
                    raise tensor.error(f"is in {other} too; these shards are not of one model")
                stored[name] = tensor
        super().__init__(
            path,
            path.resolve().name,
            family,
            config,
            files,
            matched(
                family,
                specs,
                stored,
                unread=family.unread(config),
                place=str(path),
                file_name=lambda spec: spec.name,
            ),
            plus_one=True,
        )
        self.quantization = self.quantization.lower()

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the weights, config.json and tokenizer.json."""
        return (*super().files, self.path / _CONFIG, self.path / _TOKENIZER)

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary in tokenizer.json. Raises ModelError if it is missing, damaged or not Gemma's."""
        return Vocabulary.from_tokenizer_json(self.path / _TOKENIZER)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of tokenizer.json, or one that takes no text if there is no such file.

        Raises ModelError if it is damaged.
        """
        path = self.path / _TOKENIZER
        if not path.exists():
            return NoTokenizer(
                self.config.vocab_size,
                f"{path}: there is no such file, so this model takes token ids only, and no text; download the file",
            )
        return HFTokenizer(path)


def _shards(path: Path) -> list[Path]:
    """Return the safetensors files of a folder; a single one is preferred, as transformers does."""
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.is_file():
        raise ModelError(
            f"{path}: there is neither {_SINGLE} nor {_INDEX} in this folder; download the model's weights"
        )
    entries = _json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{index}: it has no weight_map; download it again")
    for name in entries.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(f"{index}: {name!r} in weight_map is not the name of a safetensors file")
    shards = [path / name for name in sorted(set(entries.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard}: there is no such file, but {_INDEX} lists it; download this shard")
    return shards


def _tensors(file: MappedFile, family: Family, ignored: tuple[str, ...]) -> list[tuple[str, StoredTensor]]:
    """Return the tensors of a file with their names in the table, but not those whose names begin as `ignored`."""
    start = 8 + int.from_bytes(file.map[:8], "little")
    tensors = []
    for label, entry in _header(file).items():
        name = _name(label, family)
        if name.startswith(ignored):
            continue
        encoding = _ENCODINGS.get(entry["dtype"])
        if encoding is None:
            raise ModelError(
                f"{file.path}: tensor {label!r} is {entry['dtype']}; only {', '.join(_ENCODINGS)} can be read, use "
                "the model's bf16 original or a GGUF"
            )
        offset = start + entry["data_offsets"][0]
        tensors.append((name, StoredTensor(label, tuple(entry["shape"]), encoding, file, offset)))
    return tensors


def _header(file: MappedFile) -> dict[str, Any]:
    """Return what a file says of its tensors, by their names in it. Raises ModelError if it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks what the rest relies on: the header, every shape, that the data fills the file.
        with safe_open(file.path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file.path}: this is not a whole safetensors file ({error}); download it again") from error
    # numpy has no bfloat16, so safe_open cannot hand such a tensor out; the header says where its bytes are.
    length = int.from_bytes(file.map[:8], "little")
    header: dict[str, Any] = json.loads(file.map[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


def _name(label: str, family: Family) -> str:
    """Return the name that a tensor has in the family's table."""
    for prefix, plain in family.prefixes.items():
        if label.startswith(prefix):
            return plain + label.removeprefix(prefix)
    return label


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: this is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: this is not a JSON object; download it again")
    return content
