"""Counting what a checkpoint is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_wgpu.models.spec import Kind
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
class Summary:
    """The make-up of a checkpoint: the embedding, the other matrices by layout, and the vectors, in float32.

    `nbytes` is what all weights take on the GPU, and `file_bytes` what they take in their files.
    """

    name: str
    quantization: str
    config: Any
    parameters: int
    embedding: LayoutUse
    matrices: tuple[LayoutUse, ...]
    vector_bytes: int
    file_bytes: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights on the GPU."""
        return self.embedding.nbytes + sum(use.nbytes for use in self.matrices) + self.vector_bytes

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that a weight outside the embedding takes, scales included."""
        return 8 * sum(use.nbytes for use in self.matrices) / sum(use.weights for use in self.matrices)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint's tensors; no weights are read."""
    matrices = checkpoint.matrices(Kind.MATRIX)
    layouts = sorted({matrix.layout for matrix in matrices})
    specs = checkpoint.table.values()
    vectors = sum(spec.size for spec in specs if not spec.kind.is_matrix)
    return Summary(
        name=checkpoint.name,
        quantization=checkpoint.quantization,
        config=checkpoint.config,
        parameters=sum(spec.size for spec in specs),
        embedding=_use(checkpoint.matrices(Kind.EMBEDDING)),
        matrices=tuple(_use([matrix for matrix in matrices if matrix.layout == layout]) for layout in layouts),
        vector_bytes=4 * vectors,
        file_bytes=checkpoint.nbytes,
    )


def _use(matrices: Sequence[Tensor]) -> LayoutUse:
    layout = matrices[0].layout
    shapes = [matrix.shape for matrix in matrices]
    nbytes = sum(layout.nbytes(*shape) for shape in shapes)
    return LayoutUse(layout, len(matrices), sum(rows * cols for rows, cols in shapes), nbytes)
