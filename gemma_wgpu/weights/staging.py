"""Weights as files store them become the words of a Layout on the GPU, without the host touching them."""

from __future__ import annotations

import numpy as np

from gemma_wgpu.gpu.device import Buffer, Data, Device, Program
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.launch import record
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.weights.encodings import Encoding


class Staging:
    """A buffer of `nbytes` on the GPU, in which rows arrive, and the kernels that make words of them.

    Runs of rows begin at even blocks of their parts, since two blocks of 32 weights share a word of scales in some
    layouts: a multiple of 64 rows is always right. Every method raises DeviceError if the GPU's memory is exhausted.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self._nbytes = device, nbytes
        self._kernels: Kernels | None = None
        self._buffers: list[Buffer] = []
        self._programs: dict[tuple[Part, str], Program] = {}

    def fill(self, part: Part, row: int, rows: int, data: Data, source: Encoding) -> None:
        """Write `rows` rows of `part`, from `row` on, whose bytes in a file are `data`.

        They keep their bits if the part has the layout of `source`. Plain floats are rounded if it is INT8 or INT4,
        as shaders/import_quantize.wgsl says, and `arrive` tells whether that was possible.
        """
        if source.dense and source.layout == part.layout:
            self._device.put(part.quants, data, 4 * part.layout.quant_words(row, part.cols))
            return
        if self._kernels is None:
            self._open()
        raw, run, _ = self._buffers
        if row * (part.cols // BLOCK) % 2:
            raise ValueError(f"row {row} of {part.cols} weights does not begin at an even block")
        blocks = part.cols // max(source.group, BLOCK)
        self._device.write(run, np.array([row * blocks, rows * blocks], np.uint32))
        self._device.put(raw, data)
        self._device.submit([self._program(part, source)])

    async def arrive(self, part: Part) -> bool:
        """Wait until all rows are in `part`, and say whether all were finite and small enough to be rounded."""
        if not self._buffers:
            await self._device.read(part.quants, 0, 4)
            return True
        return not (await self._device.read(self._buffers[2], 0, 4)).any()

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self._programs.clear()
        for buffer in self._buffers:
            buffer.destroy()
        if self._kernels is not None:
            self._kernels.close()

    def _open(self) -> None:
        self._kernels = Kernels(self._device, half=False)
        for nbytes, label in ((self._nbytes, "staging"), (8, "run"), (4, "faults")):
            self._buffers.append(self._device.buffer(nbytes, label))

    def _program(self, part: Part, source: Encoding) -> Program:
        """Return the launch for `part`, made once for all its runs."""
        key = part, source.name
        if key not in self._programs:
            assert self._kernels is not None
            raw, run, faults = self._buffers
            if source.layout == part.layout:
                launch = self._kernels.import_blocks(source.name, run, raw, part)
            else:
                launch = self._kernels.import_quantize(source.layout, run, raw, part, faults)
            self._programs[key] = record(self._device, [launch])
        return self._programs[key]
