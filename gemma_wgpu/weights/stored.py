"""Tensors that lie in mapped files, and the checks that a set of them is a whole Gemma 3."""

import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout, Packed, widen
from gemma_wgpu.weights.checkpoint import EMBEDDING, Checkpoint, Tensor, matrix_shapes, norm_shapes
from gemma_wgpu.weights.encodings import Encoding

HEAD = "lm_head.weight"
_COMPARED = 1 << 24


class MappedFile:
    """A file's bytes, read from disk when they are touched. Raises ModelError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            raise ModelError(f"{path}: the file is empty; download it again") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.size = len(self._map)

    @property
    def map(self) -> mmap.mmap:
        """The mapping itself; a slice of it is a copy, as bytes."""
        if self._map is None:
            raise ModelError(f"{self.path}: the checkpoint is closed; open it again to read weights")
        return self._map

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A read-only view of bytes that are known to be there."""
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def release(self) -> None:
        """Let the system take back the memory of pages that were read; touched again, they are read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping, which ends when the last view of it does."""
        self._map = None


@dataclass(frozen=True, eq=False)
class StoredTensor(Tensor):
    """A row-major tensor at byte `offset` of `file`, where it is called `label`.

    Raises ModelError when its rows do not divide into the encoding's groups, or the file ends too early.
    """

    name: str
    shape: tuple[int, ...]
    label: str
    encoding: Encoding
    file: MappedFile
    offset: int

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise self.error(f"has the impossible shape {_dims(self.shape)}")
        group = self.encoding.group
        if self.shape[-1] % group:
            raise self.error(f"has rows of {self.shape[-1]}, not a multiple of {group} as {self.encoding.name} needs")
        missing = self.offset + self.nbytes - self.file.size
        if missing > 0:
            raise self.error(
                f"lacks {min(missing, self.nbytes)} of its {self.nbytes} bytes: the file is cut short, "
                "download it again"
            )

    @property
    def layout(self) -> Layout:
        """The layout that `pack` gives."""
        return self.encoding.layout

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.encoding.group * self.encoding.group_bytes

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Rows [start, stop), all by default; no others are read. Raises RequestError outside the matrix."""
        start, stop = self._checked(start, stop)
        rows, cols = self.shape
        row_bytes = self.nbytes // rows
        data = self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes)
        return Packed(self.layout, stop - start, cols, *self.encoding.split(data))

    def values(self) -> NDArray[np.float32]:
        """All of a dense tensor, float32 in its shape."""
        return widen(self.file.read(self.offset, self.nbytes), self.layout).reshape(self.shape)

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both hold the same weights in the same bytes."""
        return (self.shape, self.encoding) == (other.shape, other.encoding) and all(
            np.array_equal(
                self.file.read(self.offset + at, min(_COMPARED, self.nbytes - at)),
                other.file.read(other.offset + at, min(_COMPARED, self.nbytes - at)),
            )
            for at in range(0, self.nbytes, _COMPARED)
        )

    def error(self, problem: str) -> ModelError:
        """An error that names the file and the tensor."""
        return ModelError(f"{self.file.path}: tensor {self.label!r} {problem}")


class StoredCheckpoint(Checkpoint):
    """A checkpoint whose tensors are `stored`, by the names they have in its files.

    `file_name` gives that name for one of Hugging Face's. `norm_bias` is to be added to a stored norm.
    Raises ModelError for a tensor that is missing, of another shape than `config` makes it, or not Gemma 3's.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: Gemma3Config,
        files: Iterable[MappedFile],
        stored: Mapping[str, StoredTensor],
        *,
        file_name: Callable[[str], str],
        norm_bias: float,
        quantization: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self._files = tuple(files)
        self._norm_bias = np.float32(norm_bias)
        left = dict(stored)

        def taken(tensor: str, shape: tuple[int, ...]) -> StoredTensor:
            label = file_name(tensor)
            if label not in left:
                raise ModelError(f"{path}: tensor {label!r} is missing; this is not a complete Gemma 3 model")
            found = left.pop(label)
            if found.shape != shape:
                raise found.error(f"is {_dims(found.shape)} where the configuration makes it {_dims(shape)}")
            return replace(found, name=tensor)

        self._matrices = {tensor: taken(tensor, shape) for tensor, shape in matrix_shapes(config).items()}
        self._norms = {tensor: taken(tensor, shape) for tensor, shape in norm_shapes(config).items()}
        for matrix in self._matrices.values():
            if matrix.shape[1] % matrix.layout.group:
                raise matrix.error(f"has rows of {matrix.shape[1]}, not a multiple of {matrix.layout.group}")
        for norm in self._norms.values():
            if not norm.encoding.dense:
                raise norm.error(f"is {norm.encoding.name}; norms must be plain floats")
        self._check_head(left.pop(file_name(HEAD), None))
        if left:
            raise next(iter(left.values())).error("is not one that Gemma 3 has; this is another architecture")
        self.nbytes = sum(tensor.nbytes for tensor in (*self._matrices.values(), *self._norms.values()))
        self.quantization = quantization or self._commonest_encoding()

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of a name in `matrix_shapes`. Raises ModelError for any other."""
        if name not in self._matrices:
            raise ModelError(f"{self.path}: Gemma 3 has no matrix {name}")
        return self._matrices[name]

    def norm(self, name: str) -> NDArray[np.float32]:
        """What a norm of `norm_shapes` multiplies by, 1 + w, float32 (n,). Raises ModelError for others."""
        if name not in self._norms:
            raise ModelError(f"{self.path}: Gemma 3 has no norm {name}")
        return self._norms[name].values() + self._norm_bias

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(file.path for file in self._files)

    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""
        for file in self._files:
            file.close()

    def _check_head(self, head: StoredTensor | None) -> None:
        # Some savers write the tied head out. One that was trained on its own would be another architecture.
        if head is not None and not head.equals(self._matrices[EMBEDDING]):
            raise head.error("is a head apart from the embedding; Gemma 3 has them tied")

    def _commonest_encoding(self) -> str:
        [(name, _)] = Counter(matrix.encoding.name for matrix in self._matrices.values()).most_common(1)
        return name


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
