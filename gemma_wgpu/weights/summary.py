"""Counting what a checkpoint is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.checkpoint import Checkpoint, Tensor


@dataclass(frozen=True)
class LayoutUse:
    """The matrices in one layout: how many they are, how many weights they have, and their bytes on the GPU."""

    layout: Layout
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that a weight takes, scales included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class TowerUse:
    """What a tower is made of: the matrices by layout, and the vectors and tables, in float32."""

    parameters: int
    matrices: tuple[LayoutUse, ...]
    vector_bytes: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tower on the GPU."""
        return sum(use.nbytes for use in self.matrices) + self.vector_bytes


@dataclass(frozen=True)
class Summary:
    """The make-up of a checkpoint: the embedding, the other matrices by layout, and the vectors, in float32.

    `lookup` is the table of which only the tokens' rows are read, if there is one. These and `parameters` are of the
    language model; `tower` has the same of its tower, if it has one. `nbytes` is what all weights take on the GPU,
    the tower's too, and `file_bytes` what they take in their files.
    """

    name: str
    quantization: str
    config: Any
    parameters: int
    embedding: LayoutUse
    lookup: LayoutUse | None
    matrices: tuple[LayoutUse, ...]
    vector_bytes: int
    file_bytes: int
    tower: TowerUse | None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights on the GPU."""
        language = self.embedding.nbytes + sum(use.nbytes for use in self.matrices) + self.vector_bytes
        return language + sum(part.nbytes for part in (self.lookup, self.tower) if part)

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that a weight of the language model takes outside the embedding, scales included."""
        return 8 * sum(use.nbytes for use in self.matrices) / sum(use.weights for use in self.matrices)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint's tensors; no weights are read."""
    specs = [spec for spec in checkpoint.table.values() if not spec.tower]
    tower = [spec for spec in checkpoint.table.values() if spec.tower]
    return Summary(
        name=checkpoint.name,
        quantization=checkpoint.quantization,
        config=checkpoint.config,
        parameters=_parameters(specs),
        embedding=_use(checkpoint.matrices(Kind.EMBEDDING)),
        lookup=_use(tables) if (tables := checkpoint.matrices(Kind.LOOKUP)) else None,
        matrices=_uses(checkpoint.matrices(Kind.MATRIX)),
        vector_bytes=_vector_bytes(specs),
        file_bytes=checkpoint.nbytes,
        tower=_tower(checkpoint, tower) if tower else None,
    )


def _tower(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> TowerUse:
    return TowerUse(_parameters(specs), _uses(checkpoint.matrices(tower=True)), _vector_bytes(specs))


def _parameters(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.size for spec in specs)


def _vector_bytes(specs: Sequence[TensorSpec]) -> int:
    return sum(4 * spec.size for spec in specs if not spec.kind.is_matrix)


def _uses(matrices: Sequence[Tensor]) -> tuple[LayoutUse, ...]:
    layouts = sorted({matrix.layout for matrix in matrices})
    return tuple(_use([matrix for matrix in matrices if matrix.layout == layout]) for layout in layouts)


def _use(matrices: Sequence[Tensor]) -> LayoutUse:
    layout = matrices[0].layout
    shapes = [matrix.shape for matrix in matrices]
    nbytes = sum(layout.nbytes(*shape) for shape in shapes)
    return LayoutUse(layout, len(matrices), sum(rows * cols for rows, cols in shapes), nbytes)
