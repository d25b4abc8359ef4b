"""Tensors that lie in mapped files as their formats store them, and the checks that they make a whole model."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.files import reason
from gemma_wgpu.gpu.device import Data
from gemma_wgpu.models.spec import Family, Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.checkpoint import Checkpoint, LocalTensor
from gemma_wgpu.weights.encodings import Encoding
from gemma_wgpu.weights.packed import Packed, padded, widen

_COMPARED = 1 << 24


class MappedFile:
    """The bytes of a file, which are read from disk when they are touched.

    Raises ModelError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            raise ModelError(f"{path}: the file is empty; download it again") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {reason(error)}") from error
        self.size = len(self._map)

    @property
    def map(self) -> mmap.mmap:
        """Return the mapping itself; a slice of it is a copy, as bytes."""
        if self._map is None:
            raise ModelError(f"{self.path}: the checkpoint is closed; open it again to read weights")
        return self._map

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return a read-only view of bytes that are known to be there."""
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def release(self) -> None:
        """Let the system take back the memory of pages that were read; touched again, they are read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping, which ends when the last view of it does."""
        self._map = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of any shape in a file, which calls it `label` and has it row-major from byte `offset` on.

    Raises ModelError if its rows do not divide into the encoding's groups, or if the file ends too early.
    """

    label: str
    shape: tuple[int, ...]
    encoding: Encoding
    file: MappedFile
    offset: int

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise self.error(f"has the impossible shape {_dims(self.shape)}")
        cols, group = self.shape[-1], self.encoding.group
        if cols % group:
            raise self.error(f"has rows of {cols}, not a multiple of {group} as {self.encoding.name} needs")
        missing = self.offset + self.nbytes - self.file.size
        if missing > 0:
            raise self.error(
                f"lacks {min(missing, self.nbytes)} of its {self.nbytes} bytes: the file is cut short, "
                "download it again"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file."""
        return math.prod(self.shape) // self.encoding.group * self.encoding.group_bytes

    def values(self) -> NDArray[np.float32]:
        """Return all of a dense tensor, float32 in its own shape."""
        return widen(self.file.read(self.offset, self.nbytes), self.encoding.layout).reshape(self.shape)

    def number(self, index: int) -> StoredTensor:
        """Return tensor number `index` of those that are stacked in this one."""
        nbytes = self.nbytes // self.shape[0]
        return StoredTensor(self.label, self.shape[1:], self.encoding, self.file, self.offset + index * nbytes)

    def columns(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of columns [start, stop) of a dense matrix, one column after the other."""
        rows, cols = self.shape
        data = self.file.read(self.offset, self.nbytes).reshape(rows, cols, -1)
        return np.ascontiguousarray(data[:, start:stop].swapaxes(0, 1)).reshape(-1)

    def equals(self, other: StoredTensor) -> bool:
        """Say whether both hold the same weights in the same bytes."""
        return (self.shape, self.encoding) == (other.shape, other.encoding) and all(
            np.array_equal(
                self.file.read(self.offset + at, min(_COMPARED, self.nbytes - at)),
                other.file.read(other.offset + at, min(_COMPARED, self.nbytes - at)),
            )
            for at in range(0, self.nbytes, _COMPARED)
        )

    def error(self, problem: str) -> ModelError:
        """Return an error that names the file and the tensor."""
        return ModelError(f"{self.file.path}: tensor {self.label!r} {problem}")


class StoredMatrix(LocalTensor):
    """A stored tensor as a weight matrix, as its entry in the family's table says.

    Further dimensions than the first are the columns, or all but the last one are if it is transposed. `pack` fills
    rows up with zeros to whole blocks.
    """

    def __init__(self, spec: TensorSpec, stored: StoredTensor) -> None:
        self.name = spec.name
        self.shape = spec.stored_shape
        self._spec, self._stored = spec, stored

    @property
    def layout(self) -> Layout:
        """Return the layout that `pack` gives."""
        return self._stored.encoding.layout

    @property
    def encoding(self) -> Encoding | None:
        """Return how `raw` gives rows; None if the file has them transposed, or shorter."""
        return None if self._spec.transposed or self._is_padded else self._stored.encoding

    async def raw(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data]]:
        """Yield rows [start, stop) as the file has them, in one run."""
        data = self._read(*self._checked(start, stop))
        yield start, data if data.size % 4 == 0 else np.concatenate((data, np.zeros(-data.size % 4, np.uint8)))

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default; no others are read. Raises RequestError outside the matrix."""
        start, stop = self._checked(start, stop)
        stored, cols = self._stored, self.shape[1]
        data = stored.columns(start, stop) if self._spec.transposed else self._read(start, stop)
        if self._is_padded:
            # Only plain floats, whose groups are single weights, can have such rows.
            data = padded(data, stop - start, cols * stored.encoding.group_bytes)
        return Packed(self.layout, stop - start, cols, *stored.encoding.split(data))

    @property
    def _is_padded(self) -> bool:
        """Say whether rows have more columns than the file has."""
        return self.shape[0] * self.shape[1] > self._spec.size

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = self._stored.nbytes // self.shape[0]
        return self._stored.file.read(self._stored.offset + start * row_bytes, (stop - start) * row_bytes)


def matched(
    family: Family,
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor],
    *,
    unread: Sequence[TensorSpec] = (),
    place: str,
    file_name: Callable[[TensorSpec], str],
) -> dict[str, StoredTensor]:
    """Return the tensors of `specs`, which are entries of the family's table, by the names that they have there.

    `stored` has them by the names that the files at `place` use, and `file_name` gives that name for an entry. Those
    of `unread` may be there, too. Raises
    ModelError for a tensor that is missing or has another shape, and for one that the model does not have.
    """
    left = dict(stored)
    found = {spec.name: _taken(left, spec, file_name(spec), family, place) for spec in specs}
    for spec in specs:
        for copy in spec.copies:
            # Some savers write the tied head out. A head that was trained on its own makes another architecture.
            if (other := left.pop(copy, None)) is not None and not other.equals(found[spec.name]):
                raise other.error(f"is a head apart from the embedding; {family.name} has them tied")
    for spec in unread:
        left.pop(file_name(spec), None)
    if left:
        raise next(iter(left.values())).error(f"is not one that {family.name} has; this is another architecture")
    return found


def _taken(left: dict[str, StoredTensor], spec: TensorSpec, label: str, family: Family, place: str) -> StoredTensor:
    """Take the tensor of an entry of the table out of those that are `left`, and return it, checked."""
    if label not in left:
        problem = f"this is not a complete {family.name} model"
        if spec.tower:
            problem = "the tower that reads images is not complete, and vision=False leaves it out"
        raise ModelError(f"{place}: tensor {label!r} is missing; {problem}")
    found = left.pop(label)
    if found.shape != spec.shape:
        raise found.error(f"is {_dims(found.shape)} where the configuration makes it {_dims(spec.shape)}")
    if not found.encoding.dense and (not spec.kind.is_matrix or spec.transposed):
        raise found.error(f"is {found.encoding.name}; {spec.name} must be plain floats")
    return found


class StoredCheckpoint(Checkpoint):
    """A checkpoint whose tensors are `stored` in `files`, by the names of the family's table.

    `plus_one` says whether the files hold norms of the kind NORM_PLUS_ONE without the 1, which is then added. If
    `quantization` is None, it is the commonest encoding of the language model's matrices.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        family: Family,
        config: Any,
        files: Iterable[MappedFile],
        stored: Mapping[str, StoredTensor],
        *,
        plus_one: bool,
        quantization: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.family = family
        self.config = config
        self._files = tuple(files)
        self._stored = stored
        self._plus_one = plus_one
        self.nbytes = sum(tensor.nbytes for tensor in stored.values())
        self.quantization = quantization or self._commonest_encoding()

    def tensor(self, name: str) -> StoredMatrix:
        """Return a matrix of the table. Raises ModelError for any other name."""
        spec = self.spec(name, matrix=True)
        return StoredMatrix(spec, self._stored[name])

    def values(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""
        spec = self.spec(name, matrix=False)
        values = self._stored[name].values()
        return values + np.float32(1) if self._plus_one and spec.kind == Kind.NORM_PLUS_ONE else values

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that hold the weights."""
        return tuple(file.path for file in self._files)

    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""
        for file in self._files:
            file.close()

    def _commonest_encoding(self) -> str:
        specs = [spec for spec in self.table.values() if spec.kind.is_matrix and not spec.tower]
        [(name, _)] = Counter(self._stored[spec.name].encoding.name for spec in specs).most_common(1)
        return name


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
