"""import_q5_0.wgsl: blocks of a GGUF file in Q5_0 become words of their layout."""

from __future__ import annotations

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.weights.encodings import Q5_0
from tests.kernels import importing
from tests.kernels.importing import CASES as CASES
from tests.kernels.importing import Case


async def check(device: Device, case: Case) -> None:
    await importing.check(device, case, Q5_0, 0)
