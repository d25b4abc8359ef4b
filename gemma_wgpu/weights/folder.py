"""Reading a model folder: its bytes are the GPU's, so packing rows is no more than a view of a mapped file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout, Packed
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Checkpoint, Tensor, norm_shapes
from gemma_wgpu.weights.manifest import MANIFEST, Entry, File, Manifest, upload_order
from gemma_wgpu.weights.stored import MappedFile


def checked_config(manifest: Manifest, config: bytes, folder: str) -> Gemma3Config:
    """What the config.json of a folder says. Raises ModelError where it is damaged, or the manifest does not fit."""
    source = f"{folder}/{manifest.config.name}"
    try:
        content = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: not valid JSON ({error}); convert the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{source}: not a JSON object; convert the model again")
    checked = Gemma3Config.from_hf(content, source=source)
    shapes = {tensor.name: (tensor.rows, tensor.cols) for tensor in manifest.tensors}
    if list(shapes.items()) != list(upload_order(checked).items()):
        raise ModelError(
            f"{folder}/{MANIFEST}: its tensors are not those of the model in {manifest.config.name}; convert it again"
        )
    norms = norm_shapes(checked)
    for tensor in manifest.tensors:
        if tensor.name in norms and tensor.layout != Layout.F32:
            raise ModelError(f"{folder}/{MANIFEST}: {tensor.name} is {tensor.layout.name}; norms must be F32")
    return checked


class FolderCheckpoint(Checkpoint):
    """A Gemma 3 in a model folder, as `convert` writes it; `manifest` says what is in it.

    Files are checked for being there and of the right size now, for their SHA-256 when they are first read.
    Either raises ModelError naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.from_json(_read(path / MANIFEST), str(path / MANIFEST))
        self.name = self.manifest.name
        self.quantization = self.manifest.quantization
        self.config = checked_config(self.manifest, self._whole(self.manifest.config), str(path))
        self._shards = tuple(_Shard(path, shard) for shard in self.manifest.shards)
        tensors = {tensor.name: _FolderTensor(tensor, self._shards) for tensor in self.manifest.tensors}
        self._norms = {name: tensors.pop(name) for name in norm_shapes(self.config)}
        self._matrices = tensors
        self.nbytes = sum(tensor.nbytes for tensor in self.manifest.tensors)

    def tensor(self, name: str) -> Tensor:
        """The matrix of a name in `matrix_shapes`. Raises ModelError for any other."""
        if name not in self._matrices:
            raise ModelError(f"{self.path}: Gemma 3 has no matrix {name}")
        return self._matrices[name]

    def norm(self, name: str) -> NDArray[np.float32]:
        """What a norm of `norm_shapes` multiplies by, 1 + w, float32 (n,). Raises ModelError for others."""
        if name not in self._norms:
            raise ModelError(f"{self.path}: Gemma 3 has no norm {name}")
        return self._norms[name].pack().dequantize().reshape(-1)

    def vocabulary(self) -> Vocabulary:
        """The vocabulary file. Raises ModelError when it is missing or damaged."""
        file = self.manifest.vocabulary
        return Vocabulary.from_bytes(self._whole(file), str(self.path / file.name))

    def tokenizer(self) -> Tokenizer:
        """The vocabulary's tokenizer. Raises ModelError when it is missing or damaged."""
        return self.vocabulary().tokenizer(str(self.path / self.manifest.vocabulary.name))

    @property
    def files(self) -> tuple[Path, ...]:
        """The manifest and the files that it lists."""
        listed = (self.manifest.config, self.manifest.vocabulary, *self.manifest.shards)
        return (self.path / MANIFEST, *(self.path / file.name for file in listed))

    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid."""
        for shard in self._shards:
            shard.release()

    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""
        for shard in self._shards:
            shard.close()

    def _whole(self, file: File) -> bytes:
        """All of a small file, checked."""
        data = _read(self.path / file.name)
        if len(data) != file.nbytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(self.path / file.name)
        return data


class _Shard(MappedFile):
    """A shard whose SHA-256 is checked before any of it is read."""

    def __init__(self, folder: Path, file: File) -> None:
        path = folder / file.name
        if not path.is_file():
            raise ModelError(f"{path}: no such file, but {MANIFEST} lists it; download this shard")
        super().__init__(path)
        if self.size != file.nbytes:
            raise ModelError(
                f"{path}: {self.size:,} bytes where {MANIFEST} has {file.nbytes:,}: the file is cut short or not of "
                "this folder; download this shard again"
            )
        self._sha256 = file.sha256
        self._checked = False

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A read-only view of bytes. Raises ModelError, before any are seen, when the file is damaged."""
        view = super().read(offset, nbytes)
        if not self._checked:
            # Read, not mapped: it leaves the pages in the system's cache, and none in this process.
            if file_sha256(self.path) != self._sha256:
                raise _damaged(self.path)
            self._checked = True
        return view


class _FolderTensor(Tensor):
    """A matrix, or a norm as its one row, in the shards of a folder."""

    def __init__(self, entry: Entry, shards: Sequence[_Shard]) -> None:
        self.name = entry.name
        self.shape = (entry.rows, entry.cols)
        self._layout = entry.layout
        self._parts = entry.parts
        self._shards = shards
        # A row's scales may begin or end inside a word, those of two rows do not.
        two_rows = entry.part_bytes(0, 2)
        self._row_bytes = two_rows[0] // 2, two_rows[1] // 2

    @property
    def layout(self) -> Layout:
        """The layout of the words in the shards."""
        return self._layout

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Rows [start, stop), all by default; views of the file where they lie in one shard.

        Raises RequestError outside the matrix, ModelError naming a shard that is damaged.
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
    """The parts joined, as a view where that can be; what is missing of the last word is zero."""
    size = sum(part.size for part in parts)
    if len(parts) == 1 and size % 4 == 0 and parts[0].ctypes.data % 4 == 0:
        return parts[0].view(np.uint32)
    words = np.zeros(-(-size // 4), np.uint32)
    np.concatenate(parts, out=words.view(np.uint8)[:size])
    return words


def file_sha256(path: Path) -> str:
    """In hexadecimal. Raises ModelError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}; download the folder again") from error


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path}: its SHA-256 is not the one in {MANIFEST}: the file is damaged, delete it and download it again"
    )
