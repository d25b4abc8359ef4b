"""The choice of the kernels' variants: they are measured on a GPU's first use, and kept by adapter and driver.

The environment variable GEMMA_WGPU_TUNING takes the choice over. It is "off" for the usual tuning of the GPU's kind,
without a measurement, or for example "lanes=8" or "lanes=1,cpu"; see `Tuning`.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

from gemma_wgpu.errors import RequestError
from gemma_wgpu.files import cache_folder, replacing
from gemma_wgpu.gpu.device import Adapter, Device
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.launch import record
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.ops.tuning import Tuning, usual_tuning

_VARIABLE = "GEMMA_WGPU_TUNING"
_ROWS, _COLS = 16384, 1152  # of the matrix that is timed; a product in no time would not tell variants apart
_REPEATS = 3
_LANES = (4, 8, 16, 32)  # on GPUs
_VERSION = 2  # of the kernels: a new one voids what was kept


def candidates(gpu: Adapter | Device) -> dict[str, Tuning]:
    """Return what there is to choose from, by name, the usual one first."""
    usual = usual_tuning(gpu.info, gpu.features)
    lanes = (1,) if gpu.info.type == "CPU" else _LANES
    others = [Tuning(count, cpu=False) for count in lanes]
    return {str(tuning): tuning for tuning in (usual, *others)}


def variants(gpu: Adapter | Device) -> dict[str, Tuning]:
    """Return all that run, by name: the candidates, and those of other kinds of GPUs."""
    plain = [Tuning(lanes, cpu=False) for lanes in (1, *_LANES)]
    return candidates(gpu) | {str(tuning): tuning for tuning in plain}


def chosen(gpu: Adapter | Device) -> Tuning | None:
    """Return the tuning that the environment or an earlier measurement chose, or the only one; else None.

    Raises RequestError if the environment variable says nothing sensible.
    """
    allowed = variants(gpu)
    asked = os.environ.get(_VARIABLE)
    if asked is None and len(candidates(gpu)) > 1:
        return candidates(gpu).get(_read().get(_key(gpu), ""))
    if asked is None or asked == "off":
        return usual_tuning(gpu.info, gpu.features)
    if asked not in allowed:
        choices = ", ".join(f"'{choice}'" for choice in allowed)
        raise RequestError(f"{_VARIABLE} is {asked!r}; on this GPU it can be 'off' or one of {choices}")
    return allowed[asked]


async def tuned(device: Device) -> Tuning:
    """Return the tuning that was chosen, or measure now which is the fastest, which takes a second or two.

    Raises RequestError if the environment variable says nothing sensible.
    """
    tuning = chosen(device)
    if tuning is None:
        seconds = {tuning: await _seconds(device, tuning) for tuning in candidates(device).values()}
        tuning = min(seconds, key=seconds.__getitem__)
        _write(_read() | {_key(device): str(tuning)})
    return tuning


def _key(gpu: Adapter | Device) -> str:
    return f"{_VERSION} {gpu.info.vendor} {gpu.info}"


async def _seconds(device: Device, tuning: Tuning) -> float:
    """Return how long a matrix of zeros takes to be multiplied by a vector."""
    layout = Layout.INT8
    kernels = Kernels(device, half=False, tuning=tuning)
    quants = device.buffer(4 * layout.quant_words(_ROWS, _COLS), "tuning quants")
    scales = device.buffer(4 * layout.scale_words(_ROWS, _COLS), "tuning scales")
    x, y = device.buffer(4 * _COLS, "tuning x"), device.buffer(4 * _ROWS, "tuning y")
    try:
        part = Part(layout, 0, _ROWS, _COLS, quants, scales)
        program = record(device, [kernels.matvec(part, x, y)])
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            device.submit([program] * 4)
            await device.read(y, 0, 4)
            times.append(time.perf_counter() - started)
        return min(times[1:])  # the first one compiles
    finally:
        kernels.close()
        for buffer in (quants, scales, x, y):
            buffer.destroy()


def _read() -> dict[str, str]:
    try:
        kept = json.loads((cache_folder() / "tuning.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: text for key, text in kept.items() if isinstance(text, str)} if isinstance(kept, dict) else {}


def _write(kept: dict[str, str]) -> None:
    """Keep it, if there is a place for it."""
    path = cache_folder() / "tuning.json"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(kept, indent=1).encode())
