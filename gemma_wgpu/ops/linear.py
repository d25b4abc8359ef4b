"""Weight matrices on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_wgpu.gpu.device import Buffer
from gemma_wgpu.ops.layout import Layout


@dataclass(frozen=True)
class Part:
    """Rows `first_row` to `first_row + rows` of a matrix, which have one layout and are inside the binding limit.

    The matrix has `cols` columns, a multiple of 32. `quants` and `scales` are as `Layout` describes them.
    """

    layout: Layout
    first_row: int
    rows: int
    cols: int
    quants: Buffer
    scales: Buffer


@dataclass(frozen=True)
class Linear:
    """A linear layer, y = scale W x + bias, with W (rows, cols) and bias float32 (rows,), if it has one.

    W is in one part if the layouts of its rows and the binding limit allow that. Columns beyond those of the model,
    which make `cols` a multiple of 32, are zero.
    """

    rows: int
    cols: int
    parts: tuple[Part, ...]
    bias: Buffer | None = None
    scale: float = 1.0
