"""What a checkpoint is made of, in numbers."""

from dataclasses import dataclass

from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.checkpoint import EMBEDDING, Checkpoint, Tensor, matrix_shapes, norm_shapes


@dataclass(frozen=True)
class LayoutUse:
    """How many matrices are in `layout`, with how many weights, in how many bytes on the GPU."""

    layout: Layout
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Summary:
    """A checkpoint's make-up: the embedding, the other matrices by layout, and the bytes of the norms (float32).

    `nbytes` is what the weights take on the GPU; `file_bytes` what they take where they are stored.
    """

    name: str
    quantization: str
    config: Gemma3Config
    parameters: int
    embedding: LayoutUse
    matrices: tuple[LayoutUse, ...]
    norm_bytes: int
    file_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on the GPU."""
        return self.embedding.nbytes + sum(use.nbytes for use in self.matrices) + self.norm_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the matrices outside the embedding, scales included."""
        return 8 * sum(use.nbytes for use in self.matrices) / sum(use.weights for use in self.matrices)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint's tensors; no weights are read."""
    shapes = matrix_shapes(checkpoint.config)
    matrices = [checkpoint.tensor(name) for name in shapes if name != EMBEDDING]
    layouts = sorted({matrix.layout for matrix in matrices})
    norm_weights = sum(size for (size,) in norm_shapes(checkpoint.config).values())
    return Summary(
        name=checkpoint.name,
        quantization=checkpoint.quantization,
        config=checkpoint.config,
        parameters=norm_weights + sum(rows * cols for rows, cols in shapes.values()),
        embedding=_use([checkpoint.tensor(EMBEDDING)]),
        matrices=tuple(_use([matrix for matrix in matrices if matrix.layout == layout]) for layout in layouts),
        norm_bytes=4 * norm_weights,
        file_bytes=checkpoint.nbytes,
    )


def _use(matrices: list[Tensor]) -> LayoutUse:
    layout = matrices[0].layout
    shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
    words = sum(layout.quant_words(*shape) + layout.scale_words(*shape) for shape in shapes)
    return LayoutUse(layout, len(matrices), sum(rows * cols for rows, cols in shapes), 4 * words)
