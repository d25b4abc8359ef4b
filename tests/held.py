"""Weights in memory, for parts of models that no file has alone."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.spec import TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.checkpoint import LocalTensor, Weights
from gemma_wgpu.weights.packed import Packed


class _Matrix(LocalTensor):
    def __init__(self, spec: TensorSpec, values: NDArray[np.float32]) -> None:
        self.name, self.shape = spec.name, spec.stored_shape
        self._rows = values.T if spec.transposed else values.reshape(len(values), -1)

    @property
    def layout(self) -> Layout:
        return Layout.F32

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        start, stop = self._checked(start, stop)
        rows = np.zeros((stop - start, self.shape[1]), np.float32)
        rows[:, : self._rows.shape[1]] = self._rows[start:stop]
        return Packed(Layout.F32, *rows.shape, rows.reshape(-1).view(np.uint32), np.empty(0, np.uint32))


class Held(Weights):
    """The tensors of a table, float32 in the shapes that it gives, by name."""

    name, quantization, reports_progress, config = "held", "f32", False, None
    place = "memory"

    def __init__(self, table: Sequence[TensorSpec], values: Mapping[str, NDArray[np.float32]]) -> None:
        self.family = SimpleNamespace(name="tower", tensors=lambda config: table)  # type: ignore[assignment]
        self._values = values
        for spec in table:
            assert values[spec.name].shape == spec.shape, spec.name

    def tensor(self, name: str) -> _Matrix:
        return _Matrix(self.spec(name, matrix=True), self._values[name])

    async def vector(self, name: str) -> NDArray[np.float32]:
        self.spec(name, matrix=False)
        return self._values[name]

    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass
