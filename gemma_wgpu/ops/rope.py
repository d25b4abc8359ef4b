"""Rotary position embeddings: their angles, and the tables that the shaders read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Buffer, Device

_SHORTEST = 1024  # positions of a new table
_ROWS = 512  # positions that are written at a time: memory in a browser is dear


@dataclass(frozen=True)
class Rope:
    """The rotation of the heads of some layers (RoFormer, arXiv 2104.09864).

    Elements i and i + head_dim / 2 of a head are turned by position / factor * theta^(-2 i / head_dim). If `turned`
    is given, only the first so many pairs are, and the others are left alone.
    """

    theta: float
    head_dim: int
    factor: float = 1.0
    turned: int | None = None

    def table(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return (cos, sin) for positions [start, stop): float32 (stop - start, head_dim / 2, 2).

        Periods, frequencies and angles are rounded to float32 one after the other, as they were when the models were
        trained and are in other implementations. Over some hundred positions, exact ones move the logits by 3e-3.
        """
        periods = self.theta ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        frequencies = np.float32(1) / periods.astype(np.float32) / np.float32(self.factor)
        frequencies[self.turned or len(frequencies) :] = 0
        angles = (np.arange(start, stop, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
        return np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32)


class RopeTables:
    """The tables of a model's rotations on the GPU. They grow with the longest sequence, up to `context_length`.

    `version` changes when a table becomes another buffer.
    """

    def __init__(self, device: Device, ropes: Iterable[Rope], context_length: int) -> None:
        self.version = 0
        self._device = device
        self._ropes = tuple(dict.fromkeys(ropes))
        self._most = context_length
        self._length = 0
        self._tables: dict[Rope, Buffer] = {}
        self.reserve(1)

    def __getitem__(self, rope: Rope) -> Buffer:
        return self._tables[rope]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tables."""
        return sum(table.size for table in self._tables.values())

    def reserve(self, length: int) -> None:
        """Make the tables hold at least `length` positions. Raises DeviceError if the GPU's memory is exhausted."""
        if length <= self._length:
            return
        length = min(max(_SHORTEST, 1 << (length - 1).bit_length()), self._most)
        for rope in self._ropes:
            table = self._device.buffer(4 * length * rope.head_dim, f"rope {rope.theta:.0f}")
            for start in range(0, length, _ROWS):
                rows = rope.table(start, min(start + _ROWS, length))
                self._device.write(table, rows, 4 * start * rope.head_dim)
            if rope in self._tables:
                self._tables[rope].destroy()
            self._tables[rope] = table
            self.version += 1
        self._length = length
