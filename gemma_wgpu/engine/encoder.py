"""Images and sounds on their way through the towers that read them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.models.spec import Tower
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.launch import Launch, record
from gemma_wgpu.ops.scratch import Scratch
from gemma_wgpu.ops.step import Norms
from gemma_wgpu.progress import OnProgress, Progress

KEPT_BYTES = 64 << 20  # of the features of what a tower encoded last

Bytes = NDArray[np.uint8]


class Encoder:
    """A tower on a device. It remembers the features of what it encoded last, in the host's memory."""

    def __init__(self, device: Device, kernels: Kernels, norms: Norms, tower: Tower) -> None:
        self.tower = tower
        self._device, self._kernels, self._norms = device, kernels, norms
        self._kept: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self.hard: dict[int, NDArray[np.float32]] = {}

    def features(self, medium: Medium) -> NDArray[np.float32] | None:
        """Return the features of an image or a sound, float32 (tokens, hidden size), if it was encoded lately."""
        if medium.key in self._kept:
            self._kept.move_to_end(medium.key)
        return self._kept.get(medium.key)

    def begin(self, medium: Medium) -> Encoding:
        """Encode an image or a sound. Raises DeviceError if the GPU's memory is exhausted."""
        return Encoding(self, medium, self._device, self._kernels, self._norms)

    async def encode(self, medium: Medium, progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Return the features of an image or a sound, which is encoded if need be."""
        features, lock = self.features(medium), self._device.lock
        if features is not None:
            return features
        with lock:
            encoding = self.begin(medium)
        try:
            while features is None:
                with lock:
                    reading = encoding.submit()
                data = await reading
                with lock:
                    features = encoding.receive(data)
                if progress:
                    progress(encoding.progress)
        finally:
            with lock:
                encoding.close()
        return features

    def keep(self, medium: Medium, features: NDArray[np.float32]) -> None:
        """Remember the features of something, and forget those that were used longest ago."""
        self._kept[medium.key] = features
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)

    async def start(self) -> None:
        """Compute the vectors of the ids that are the tower's own, which `hard` has then by id.

        Raises DeviceError if the GPU's memory is exhausted.
        """
        if not self.tower.hard:
            return
        step, scratch = EncoderStep(self._device, self._kernels, self._norms), Scratch(self._device)
        try:
            with self._device.lock:
                out = self.tower.hard_rows(step)
                placed = scratch.place(step.launches)
                reading = self._device.read(
                    placed[out], 0, out.nbytes, after=[record(self._device, step.launches, placed)]
                )
            rows = (await reading).view(np.float32).reshape(len(self.tower.hard), -1)
        finally:
            scratch.close()
            step.close()
        self.hard = dict(zip(self.tower.hard, rows, strict=True))

    def forget(self) -> None:
        """Forget all features."""
        self._kept.clear()


class Encoding:
    """An image or a sound on its way: `steps` programs, to be submitted one after the other.

    Its programs and their memory, which is large, last until it is closed: such things are rare, and the language
    model has the memory to itself between them.
    """

    def __init__(self, encoder: Encoder, medium: Medium, device: Device, kernels: Kernels, norms: Norms) -> None:
        self.submitted = self.done = 0
        self.medium = medium
        self._encoder, self._device = encoder, device
        patches = encoder.tower.patches(medium.data)
        self._step = EncoderStep(device, kernels, norms, *patches.shape)
        self._scratch = Scratch(device)
        try:
            out = encoder.tower.forward(self._step)
            placed = self._scratch.place(self._step.launches)
            self._out: Buffer = placed[out]
            self._size = out.nbytes
            ends = [0, *self._step.pauses, len(self._step.launches)]
            self.programs = [record(device, self._step.launches[a:b], placed) for a, b in pairwise(ends) if a < b]
            padded = np.zeros((len(patches), self._step.patches.size), np.float16 if kernels.half else np.float32)
            padded[:, : patches.shape[1]] = patches
            device.write(placed[self._step.patches], padded)
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> int:
        """Return how many programs there are."""
        return len(self.programs)

    @property
    def progress(self) -> Progress:
        """Return how far it is."""
        return Progress(f"reading the {self.medium.noun}", self.done, self.steps, "steps")

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of the memory that it takes beside the weights."""
        return self._scratch.nbytes

    @property
    def launches(self) -> Sequence[Launch]:
        """Return the kernel launches of all programs."""
        return self._step.launches

    def submit(self) -> Awaitable[Bytes]:
        """Submit the next program; what is to be awaited is for `receive`."""
        program = self.programs[self.submitted]
        self.submitted += 1
        size = self._size if self.submitted == self.steps else 4
        return self._device.read(self._out, 0, size, after=[program])

    def receive(self, data: Bytes) -> NDArray[np.float32] | None:
        """Take what came of the oldest program that was submitted; return the features if it was the last one."""
        self.done += 1
        if self.done < self.steps:
            return None
        features = data.view(np.float32).reshape(self._encoder.tower.tokens.count, -1)
        self._encoder.keep(self.medium, features)
        self.close()
        return features

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self._scratch.close()
        self._step.close()
