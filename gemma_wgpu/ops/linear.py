"""Weight matrices on the GPU, and tables that stay off it."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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


class HostTable(Protocol):
    """A table that stays off the GPU, to which the rows of a step's tokens are sent. `shape` is (rows, cols)."""

    shape: tuple[int, int]

    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        """Fetch some rows, float32 (len(numbers), cols). What is returned may be awaited more than once.

        Raises ModelError if they cannot be read.
        """
