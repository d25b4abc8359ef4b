"""import_q6_k.wgsl: blocks of a GGUF file in Q6_K become words of their layout."""

from __future__ import annotations

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.weights.encodings import Q6_K
from tests.kernels import importing
from tests.kernels.importing import CASES as CASES
from tests.kernels.importing import Case


async def check(device: Device, case: Case) -> None:
    await importing.check(device, case, Q6_K, 208)
