"""What a tower, or a part of one, makes of what it reads."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.encoder import Encoder
from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.spec import Tower
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.launch import Value, record
from gemma_wgpu.ops.scratch import Scratch
from gemma_wgpu.ops.step import Norms
from gemma_wgpu.ops.tuning import Tuning

Floats = NDArray[np.float32]


def features(device: Device, tower: Tower, data: Floats, *, half: bool, tuning: Tuning | None) -> Floats:
    """Return the features of an image or a sound, float32 (tokens, hidden size)."""
    kernels = Kernels(device, half=half, tuning=tuning)
    made = device.wait(Encoder(device, kernels, Norms(device), tower).encode(Medium(data, -1)))
    kernels.close()
    return made


def computed(
    device: Device, write: Callable[[EncoderStep], Value], patches: Floats, *, tuning: Tuning | None
) -> Floats:
    """Return what a part of a tower, which `write` writes down, makes of patches in F32."""
    kernels, scratch = Kernels(device, half=False, tuning=tuning), Scratch(device)
    step = EncoderStep(device, kernels, Norms(device), *patches.shape)
    out = write(step)
    placed = scratch.place(step.launches, [out])
    if step.patches in placed:
        device.write(placed[step.patches], np.pad(patches, ((0, 0), (0, step.patches.size - patches.shape[1]))))

    async def read() -> NDArray[np.uint8]:
        return await device.read(placed[out], 0, out.nbytes, after=[record(device, step.launches, placed)])

    made = device.wait(read()).view(np.float32).reshape(out.rows, out.size).copy()
    for each in (step, scratch, kernels):
        each.close()
    return made
