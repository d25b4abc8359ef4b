"""What the tests call inside the browser, where there is neither pytest nor anything but numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemma_wgpu
from gemma_wgpu.gpu import open_device
from gemma_wgpu.gpu.device import Device
from tests.kernels.cases import KERNELS

_devices: list[Device] = []


async def shared_device() -> Device:
    """The device that the checks of the kernels share."""
    if not _devices:
        _devices.append(await open_device())
    return _devices[0]


def cases(kernel: str) -> list[Any]:
    """A kernel's cases without float16, which the software adapter lacks; those that only have it, in float32."""
    return list(dict.fromkeys(replace(case, half=False) for case in KERNELS[kernel].CASES))


async def check_kernel(kernel: str, case: int) -> None:
    """As test_kernel does natively."""
    device = await shared_device()
    before = device.allocated
    await KERNELS[kernel].check(device, cases(kernel)[case])
    assert device.allocated == before


async def _fetched() -> Path:
    """The model folder that test_generate.py serves."""
    folder = Path("model")
    if not folder.is_dir():
        from pyodide.http import pyfetch

        response = await pyfetch("model.zip")
        await response.unpack_archive(extract_dir=folder)
    return folder


async def generate(prompt: list[int], options: list[dict[str, Any]]) -> str:
    """The ids of a Generation for each of `options`, as JSON."""
    ids = []
    with await gemma_wgpu.load_async(await _fetched()) as gemma:
        for chosen in options:
            generation = gemma.generate(prompt, **chosen)
            pieces = [piece.text async for piece in generation]
            assert "".join(pieces) == generation.text
            ids.append(generation.ids)
    return json.dumps(ids)


async def generate_blocking(prompt: list[int], options: list[dict[str, Any]]) -> str:
    """`generate`, through the blocking interface alone."""
    ids = []
    with gemma_wgpu.load(await _fetched()) as gemma:
        for chosen in options:
            generation = gemma.generate(prompt, **chosen)
            pieces = [piece.text for piece in generation]
            assert "".join(pieces) == generation.text
            ids.append(generation.ids)
    return json.dumps(ids)
