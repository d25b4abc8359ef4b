"""The tests call these functions inside the browser, which has neither pytest nor any package but numpy."""

from __future__ import annotations

import asyncio
import json
import warnings
from base64 import b64decode, b64encode
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gemma_wgpu
from gemma_wgpu import pictures
from gemma_wgpu.bench.run import Shape, bench
from gemma_wgpu.gpu import open_device
from gemma_wgpu.gpu.device import Device
from tests.kernels.cases import KERNELS

_devices: list[Device] = []


async def shared_device() -> Device:
    """Return the device that the checks of the kernels share."""
    if not _devices:
        _devices.append(await open_device())
    return _devices[0]


def cases(kernel: str) -> list[Any]:
    """Return a kernel's cases in float32, since the software adapter lacks float16."""
    return list(dict.fromkeys(replace(case, half=False) for case in KERNELS[kernel].CASES))


async def check_kernel(kernel: str, case: int) -> None:
    """Do what test_kernel does natively."""
    device = await shared_device()
    before = device.allocated
    await KERNELS[kernel].check(device, cases(kernel)[case])
    assert device.allocated == before


async def load(url: str) -> str:
    """Load a model; return a JSON object of the error, the warnings, and the progress as pairs (done, total)."""
    progress: list[tuple[int, int]] = []
    error = None

    def told(step: gemma_wgpu.Progress) -> None:
        progress.append((step.done, step.total))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            (await gemma_wgpu.load_async(url, progress=told)).close()
        except gemma_wgpu.ModelError as raised:
            error = str(raised)
    return json.dumps({"error": error, "warnings": [str(w.message) for w in caught], "progress": progress})


async def cancelled(url: str) -> None:
    """Begin to load a model, cancel that when nothing comes any more, and wait until it has ended."""
    came: list[int] = []
    loading = asyncio.ensure_future(gemma_wgpu.load_async(url, progress=lambda step: came.append(step.done)))
    seen = -1
    while not came or seen != len(came):
        seen = len(came)
        await asyncio.sleep(0.5)
    loading.cancel()
    await asyncio.wait([loading])
    assert loading.cancelled()
    await asyncio.sleep(0.5)


async def generate(url: str, prompt: list[int], options: list[dict[str, Any]], table: str = "auto") -> str:
    """Return the ids of a Generation for each of `options`, as JSON."""
    ids = []
    with await gemma_wgpu.load_async(url, per_layer_table=table) as gemma:
        for chosen in options:
            generation = gemma.generate(prompt, **chosen)
            pieces = [piece.text async for piece in generation]
            assert "".join(pieces) == generation.text
            ids.append(generation.ids)
    return json.dumps(ids)


async def generate_blocking(url: str, prompt: list[int], options: list[dict[str, Any]]) -> str:
    """Do what `generate` does, through the blocking interface alone."""
    ids = []
    with gemma_wgpu.load(url) as gemma:
        for chosen in options:
            generation = gemma.generate(prompt, **chosen)
            pieces = [piece.text for piece in generation]
            assert "".join(pieces) == generation.text
            ids.append(generation.ids)
    return json.dumps(ids)


async def generate_after_a_loss(url: str, prompt: list[int], options: list[dict[str, Any]]) -> str:
    """Do what `generate` does, after a device was lost in the middle of a text."""
    gemma = await gemma_wgpu.load_async(url)
    generation = gemma.generate(prompt, temperature=0.0)
    try:
        async for _ in generation:
            if len(generation.ids) == 5:
                gemma.device._gpu.device.destroy()  # type: ignore[attr-defined]  # as a driver that is reset does
    except gemma_wgpu.DeviceError as error:
        assert str(error).endswith("was lost; load the model again"), error
    else:
        raise AssertionError("nothing was said of the loss")
    assert 5 <= len(generation.ids) < 40
    gemma.close()
    return await generate(url, prompt, options)


async def golden_logits(url: str) -> str:
    """Return the features of the images of tests/vision.py, and the logits of its prompts by name, as JSON."""
    from tests.vision import GOLDEN, PIXELS

    found = {}
    with await gemma_wgpu.load_async(url) as gemma:
        found["features"] = np.stack([await gemma.image_features_async(pixels) for pixels in PIXELS])
        for name in GOLDEN:
            gemma.reset()
            golden = GOLDEN[name]
            found[name] = await gemma.logits_async(golden.ids, images=golden.images)
    return json.dumps({name: encoded(values) for name, values in found.items()})


async def golden_texts(url: str) -> str:
    """Return the ids that follow the prompts of tests/vision.py, which are computed side by side, as JSON."""
    from tests.vision import GOLDEN

    prompts = [GOLDEN[name] for name in GOLDEN]
    with await gemma_wgpu.load_async(url) as gemma:
        generations = gemma.generate(
            [golden.ids for golden in prompts],
            images=[golden.images for golden in prompts],
            max_new_tokens=8,
            temperature=0.0,
        )
        await generations
    return json.dumps(generations.ids)


async def prepared(files: list[str], size: int) -> str:
    """Return the pixels that are made of image files in base64, as JSON."""
    import pyodide_js

    await pyodide_js.loadPackage("pillow")
    opened = [pictures.opened(b64decode(file)) for file in files]
    return json.dumps([encoded(pictures.prepared(image, size)) for image in opened])


async def without_pillow(url: str, prompt: list[int]) -> None:
    """Check that a model reads text, and says what it lacks for a picture, where there is no Pillow."""
    assert find_spec("PIL") is None
    with await gemma_wgpu.load_async(url) as gemma:
        assert await gemma.generate(prompt, max_new_tokens=2)
        try:
            gemma.prompt("<start_of_image>", [b"GIF89a"])
        except gemma_wgpu.RequestError as error:
            assert str(error).startswith("pictures need Pillow"), error
        else:
            raise AssertionError("a picture was read without Pillow")


def encoded(values: NDArray[np.float32]) -> str:
    """Return the bytes of an array in base64."""
    return b64encode(values.tobytes()).decode()


async def benchmark(url: str, shapes: list[dict[str, int]]) -> str:
    """Return a Report as JSON."""
    with await gemma_wgpu.load_async(url) as gemma:
        report = await bench(gemma, [Shape(**shape) for shape in shapes], repetitions=1)
    return report.to_json()


async def generate_demo(url: str, prompt: str, tokens: int) -> str:
    """Return the ids of a greedy text, and by how many bytes Python's memory has grown for it, as JSON."""
    before = heap()
    with await gemma_wgpu.load_async(url) as gemma:
        generation = gemma.generate(prompt, max_new_tokens=tokens, temperature=0.0)
        await generation
    return json.dumps({"ids": generation.ids, "growth": heap() - before})


def heap() -> int:
    """Return the bytes of Python's memory."""
    import pyodide_js

    size: int = pyodide_js._module.HEAPU8.length
    return size
