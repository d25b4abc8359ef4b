"""A smaller model out of a larger one: MatFormer (arXiv 2310.07707), as Gemma 3n was trained for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.spec import Cut, MatFormerSlice
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Checkpoint, LocalTensor
from gemma_wgpu.weights.packed import Packed

_DENSE = {Layout.F32: np.uint32, Layout.F16: np.uint16, Layout.BF16: np.uint16}


class SlicedCheckpoint(Checkpoint):
    """The layers and the parts of feed-forward networks of `whole` that `slice_` takes.

    Raises ModelError if the whole model is not of that family, or if a size or a layer is not one of its own.
    """

    def __init__(self, whole: Checkpoint, slice_: MatFormerSlice) -> None:
        if whole.family.sliced is None:
            raise ModelError(f"{whole.path}: {whole.family.name} was not trained to be sliced; only Gemma 3n was")
        self.config, self._cuts = whole.family.sliced(whole.config, slice_)
        self.path, self.family = whole.path, whole.family
        without = f" without layers {', '.join(map(str, slice_.skipped))}" if slice_.skipped else ""
        width = f", width {', '.join(map(str, slice_.intermediate_size))}" if slice_.intermediate_size else ""
        self.name = f"{whole.name}{without}{width}"
        self.quantization = whole.quantization
        self._whole = whole
        self.nbytes = sum(
            tensor.layout.nbytes(*tensor.shape) for tensor in map(self.tensor, self._names(matrix=True))
        ) + sum(self.values(name).nbytes for name in self._names(matrix=False))

    def _names(self, *, matrix: bool) -> list[str]:
        return [spec.name for spec in self.table.values() if spec.kind.is_matrix == matrix]

    def tensor(self, name: str) -> LocalTensor:
        """Return a matrix of the table. Raises ModelError for any other name."""
        spec, cut = self.spec(name, matrix=True), self._cuts.get(name, Cut(name))
        return _SlicedMatrix(name, spec.stored_shape, self._whole.tensor(cut.name), cut)

    def values(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""
        self.spec(name, matrix=False)
        return self._whole.values(self._cuts.get(name, Cut(name)).name)

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of the whole model."""
        return self._whole.vocabulary()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the whole model."""
        return self._whole.tokenizer()

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files of the whole model."""
        return self._whole.files

    def release(self) -> None:
        """Give the memory of what was read back to the system."""
        self._whole.release()

    def close(self) -> None:
        """Let go of the files."""
        self._whole.close()


class _SlicedMatrix(LocalTensor):
    """Some rows and columns of a matrix, which has to be of plain floats if columns are left out."""

    def __init__(self, name: str, shape: tuple[int, int], whole: LocalTensor, cut: Cut) -> None:
        self.name, self.shape = name, shape
        self._whole, self._cut = whole, cut
        if cut.cols is not None and whole.layout not in _DENSE:
            raise ModelError(
                f"tensor {cut.name!r} is quantised and cannot be sliced; slice the model's bf16 original"
            )

    @property
    def layout(self) -> Layout:
        """Return the layout of the whole matrix."""
        return self._whole.layout

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default. Raises RequestError outside the matrix."""
        start, stop = self._checked(start, stop)
        parts, at = [], 0
        for first, last in self._cut.rows or ((0, self.shape[0]),):
            begin, end = max(start, at), min(stop, at + last - first)
            if begin < end:
                parts.append(self._whole.pack(first + begin - at, first + end - at))
            at += last - first
        quants = np.concatenate([part.quants for part in parts])
        scales = np.concatenate([part.scales for part in parts])
        if self._cut.cols is not None:
            dtype, rows = _DENSE[self.layout], stop - start
            columns = quants.view(dtype).reshape(rows, -1)
            kept = np.concatenate([columns[:, first:last] for first, last in self._cut.cols], axis=1)
            quants = np.ascontiguousarray(kept).reshape(-1).view(np.uint32)
        return Packed(self.layout, stop - start, self.shape[1], quants, scales)
