"""What a model is loaded from: its configuration, its tensors by the names of its family's table, its tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.gpu.device import Data
from gemma_wgpu.models.spec import Family, Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.encodings import Encoding
from gemma_wgpu.weights.packed import Packed


class Tensor(ABC):
    """A weight matrix on its way to the GPU. `shape` is (rows, cols) as it is stored there; rows are its outputs."""

    name: str  # that of the family's table
    shape: tuple[int, int]

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Return the layout of the words."""

    @abstractmethod
    def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        """Yield rows [start, stop) in one or more runs of (the first row, quants, scales). `start` is even."""

    @property
    def encoding(self) -> Encoding | None:
        """Return how `raw` stores rows, whose layout is `layout`; None if there is no `raw`."""
        return None

    def raw(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data]]:
        """Yield rows [start, stop) in one or more runs of (the first row, the bytes of the rows as files store them).

        Behind these there may be up to three bytes of anything, which make them whole words of four bytes. An even
        number of blocks comes before `start`, and before each run: runs of 64 rows or of multiples of that are right
        for any matrix. Raises ModelError if the bytes cannot be read.
        """
        raise NotImplementedError  # by tensors without an `encoding`

    @abstractmethod
    async def stay(self) -> None:
        """Get ready for `fetch`, which reads rows for as long as the model is open; check the matrix once.

        Raises ModelError if it is damaged.
        """

    @abstractmethod
    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        """Fetch some rows, float32 (len(numbers), cols). What is returned may be awaited more than once.

        Raises ModelError if they cannot be read.
        """


class Weights(ABC):
    """What a model is loaded from. It is a context manager; `close` it when the weights have been read.

    `quantization` is as the files call it: "Q4_K_M", "bf16". `reports_progress` says whether it tells by itself how
    many bytes have come, since they come slowly.
    """

    name: str
    family: Family
    config: Any  # of the family
    quantization: str
    reports_progress: bool

    @cached_property
    def table(self) -> Mapping[str, TensorSpec]:
        """Return the tensors that the model has, by name and in the order of their use."""
        return {spec.name: spec for spec in self.family.tensors(self.config)}

    def spec(self, name: str, *, matrix: bool) -> TensorSpec:
        """Return the entry of a matrix or of a vector. Raises ModelError if there is none of that name."""
        spec = self.table.get(name)
        if spec is None or spec.kind.is_matrix != matrix:
            raise ModelError(f"{self.place}: {self.family.name} has no {'matrix' if matrix else 'vector'} {name}")
        return spec

    @property
    @abstractmethod
    def place(self) -> str:
        """Return the path or the address of it, for messages."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a matrix of the table. Raises ModelError for any other name."""

    @abstractmethod
    async def vector(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that belongs to the model. Raises ModelError if it is missing or damaged."""

    def seconds(self) -> dict[str, float]:
        """Return the seconds that fetching files has taken so far, by what they were spent on."""
        return {}

    @abstractmethod
    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid.

        Until then, weights that were read from a mapped file count as the process's memory.
        """

    def rest(self) -> None:
        """Let go of all that nobody needs who only fetches rows of tensors that stay."""
        self.release()

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ready(Awaitable[NDArray[np.float32]]):
    """What can be awaited and is there already."""

    def __init__(self, value: NDArray[np.float32]) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, None, NDArray[np.float32]]:
        return self._value
        yield


class LocalTensor(Tensor):
    """A weight matrix that can be read at once."""

    @abstractmethod
    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default; no others are read. Raises RequestError outside the matrix."""

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        """Yield rows [start, stop) as `pack` gives them."""
        packed = self.pack(start, stop)
        yield start, packed.quants, packed.scales

    async def stay(self) -> None:
        """Read a row, which checks the file if it has not been read."""
        self.pack(0, 1)

    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        """Return rows, which are there at once: no others are read."""
        return _Ready(np.concatenate([self.pack(number, number + 1).dequantize() for number in numbers]))

    def _checked(self, start: int, stop: int | None) -> tuple[int, int]:
        """Return the rows that `pack` is asked for. Raises RequestError outside the matrix."""
        rows = self.shape[0]
        stop = rows if stop is None else stop
        if not 0 <= start < stop <= rows:
            raise RequestError(f"rows {start} to {stop} of {self.name} do not exist; it has {rows}")
        return start, stop


class Checkpoint(Weights):
    """A model that was found whole: every tensor of the table was checked when it was opened.

    `nbytes` counts the bytes that these tensors take in the files.
    """

    path: Path
    nbytes: int
    reports_progress = False

    @property
    def place(self) -> str:
        """Return the path."""
        return str(self.path)

    @abstractmethod
    def tensor(self, name: str) -> LocalTensor:
        """Return a matrix of the table. Raises ModelError for any other name."""

    @abstractmethod
    def values(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""

    async def vector(self, name: str) -> NDArray[np.float32]:
        """Return `values`."""
        return self.values(name)

    def matrices(self, kind: Kind | None = None, *, tower: bool = False) -> list[LocalTensor]:
        """Return the matrices of the language model, or else of its tower: all of them, or those of one kind."""
        specs = [spec for spec in self.table.values() if spec.kind.is_matrix and spec.tower == tower]
        return [self.tensor(spec.name) for spec in specs if kind in (None, spec.kind)]

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of the tokenizer, in our own form. Raises ModelError if it is missing or damaged."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Return all the files that the model is made of."""
