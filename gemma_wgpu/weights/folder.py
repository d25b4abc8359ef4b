"""Reading model folders. Their bytes are those that the GPU reads, so `pack` returns views of the mapped files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.files import reason, sha256
from gemma_wgpu.models.registry import family_of_hf
from gemma_wgpu.models.spec import Family
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Checkpoint, LocalTensor
from gemma_wgpu.weights.manifest import MANIFEST, Entry, File, Manifest
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.stored import MappedFile


def checked_config(manifest: Manifest, config: bytes, folder: str, *, vision: bool) -> tuple[Family, Any]:
    """Return the family and the configuration that are in the config.json of a folder, with the tower or without.

    `config` is the content of that file, and `folder` the path or the address of the folder, for messages. Raises
    ModelError if the file is damaged or the manifest does not fit it.
    """
    source = f"{folder}/{manifest.config.name}"
    try:
        content = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: this is not valid JSON ({error}); convert the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{source}: this is not a JSON object; convert the model again")
    family = family_of_hf(content, source)
    checked = family.config.from_hf(content, source=source)
    table = family.tensors(checked)
    listed = [(tensor.name, (tensor.rows, tensor.cols)) for tensor in manifest.tensors]
    if listed != [(spec.name, spec.stored_shape) for spec in table]:
        raise ModelError(
            f"{folder}/{MANIFEST}: its tensors are not those of the model in {manifest.config.name}; convert it again"
        )
    for tensor, spec in zip(manifest.tensors, table, strict=True):
        if not spec.kind.is_matrix and tensor.layout != Layout.F32:
            raise ModelError(f"{folder}/{MANIFEST}: {tensor.name} is {tensor.layout.name}; it must be F32")
    return family, checked if vision else family.text_only(checked)


class FolderCheckpoint(Checkpoint):
    """A model in a model folder that `convert` wrote; `manifest` is the content of its manifest.json.

    The shards that only have the tower are not needed if `vision` is false. Raises ModelError, which names the file,
    if a file is missing or its size is wrong; and when a file is first read, if its SHA-256 is wrong.
    """

    def __init__(self, path: Path, *, vision: bool = True) -> None:
        self.path = path
        self.manifest = Manifest.from_json(_read(path / MANIFEST), str(path / MANIFEST))
        self.name = self.manifest.name
        self.quantization = self.manifest.quantization
        config = self._whole(self.manifest.config)
        self.family, self.config = checked_config(self.manifest, config, str(path), vision=vision)
        self._shards = {n: _Shard(path, self.manifest.shards[n]) for n in self.manifest.shards_of(self.table)}
        self._entries = {tensor.name: tensor for tensor in self.manifest.tensors if tensor.name in self.table}
        self.nbytes = sum(tensor.nbytes for tensor in self._entries.values())

    def tensor(self, name: str) -> LocalTensor:
        """Return a matrix of the table. Raises ModelError for any other name."""
        return _FolderMatrix(self._entries[self.spec(name, matrix=True).name], self._shards)

    def values(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""
        spec = self.spec(name, matrix=False)
        parts = [self._shards[part.shard].read(*part.quants) for part in self._entries[name].parts]
        return np.concatenate(parts).view(np.float32).reshape(spec.shape)

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary. Raises ModelError if its file is missing or damaged."""
        file = self.manifest.vocabulary
        return Vocabulary.from_bytes(self._whole(file), str(self.path / file.name))

    def tokenizer(self) -> Tokenizer:
        """Return the vocabulary's tokenizer. Raises ModelError if it is missing or damaged."""
        return self.vocabulary().tokenizer(str(self.path / self.manifest.vocabulary.name))

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the manifest and the files that it lists, as far as they are needed."""
        small = (self.path / name for name in (MANIFEST, self.manifest.config.name, self.manifest.vocabulary.name))
        return (*small, *(shard.path for shard in self._shards.values()))

    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid."""
        for shard in self._shards.values():
            shard.release()

    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""
        for shard in self._shards.values():
            shard.close()

    def _whole(self, file: File) -> bytes:
        """Return all of a small file, checked."""
        data = _read(self.path / file.name)
        if len(data) != file.nbytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(self.path / file.name)
        return data


class _Shard(MappedFile):
    """A shard, whose SHA-256 is checked before any of it is read.

    Raises ModelError, which names the file, if it is missing or its size is wrong.
    """

    def __init__(self, folder: Path, file: File) -> None:
        path = folder / file.name
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file, but {MANIFEST} lists it; download this shard")
        super().__init__(path)
        if self.size != file.nbytes:
            raise ModelError(
                f"{path}: it has {self.size:,} bytes where {MANIFEST} says {file.nbytes:,}: it is cut short or not "
                "of this folder; download this shard again"
            )
        self._sha256 = file.sha256
        self._checked = False

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return a read-only view of bytes. Raises ModelError if the file is damaged, before any are seen."""
        view = super().read(offset, nbytes)
        if not self._checked:
            # Reading leaves the pages in the system's cache, and none in this process, as the mapping would.
            if _sha256(self.path) != self._sha256:
                raise _damaged(self.path)
            self._checked = True
        return view


class _FolderMatrix(LocalTensor):
    """A matrix in the shards of a folder."""

    def __init__(self, entry: Entry, shards: Mapping[int, _Shard]) -> None:
        self.name = entry.name
        self.shape = (entry.rows, entry.cols)
        self._layout = entry.layout
        self._parts = entry.parts
        self._shards = shards
        # The scales of a row may begin or end inside a word, but those of two rows do not.
        two_rows = entry.part_bytes(0, 2)
        self._row_bytes = two_rows[0] // 2, two_rows[1] // 2

    @property
    def layout(self) -> Layout:
        """Return the layout of the words in the shards."""
        return self._layout

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default; they are views of the file if they lie in one shard.

        Raises RequestError outside the matrix, and ModelError, which names the shard, if it is damaged.
        """
        start, stop = self._checked(start, stop)
        quants, scales = [], []
        for part in self._parts:
            first, last = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if first < last:
                quants.append(self._rows(part.shard, part.quants[0], self._row_bytes[0], first, last))
                scales.append(self._rows(part.shard, part.scales[0], self._row_bytes[1], first, last))
        return Packed(self.layout, stop - start, self.shape[1], _words(quants), _words(scales))

    def _rows(self, shard: int, offset: int, row_bytes: int, first: int, last: int) -> NDArray[np.uint8]:
        return self._shards[shard].read(offset + first * row_bytes, (last - first) * row_bytes)


def _words(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """Return the parts joined, as a view if possible; what the last word lacks is filled up with zeros."""
    size = sum(part.size for part in parts)
    if len(parts) == 1 and size % 4 == 0 and parts[0].ctypes.data % 4 == 0:
        return parts[0].view(np.uint32)
    words = np.zeros(-(-size // 4), np.uint32)
    np.concatenate(parts, out=words.view(np.uint8)[:size])
    return words


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {reason(error)}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {reason(error)}; download the folder again") from error


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path}: its SHA-256 is not the one in {MANIFEST}: the file is damaged, delete it and download it again"
    )
