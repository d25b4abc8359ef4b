"""This is the preprocessor of the shaders, which does two things and no more.

* The type `half` is f16 or f32: a first line `enable f16; alias half = f16;` or `alias half = f32;` is put in front.
* A line `#include "name.wgsl"` is replaced by that file.

For a CPU adapter, a file `name.cpu.wgsl` takes the place of `name.wgsl` if there is one. Such files use subgroups,
and WGSL has no condition that would hide an operation from a compiler that lacks it.

All other variation is by WGSL `override` constants.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([a-z0-9_]+)\.wgsl"$', re.MULTILINE)


@functools.cache
def _find(name: str) -> Traversable | None:
    packaged = files("gemma_wgpu") / "shaders" / f"{name}.wgsl"
    checkout = Path(__file__).parents[2] / "shaders" / f"{name}.wgsl"
    return next((file for file in (packaged, checkout) if file.is_file()), None)


@functools.cache
def _read(name: str) -> str:
    file = _find(name)
    assert file is not None, name
    return file.read_text(encoding="utf-8")


def load_shader(name: str, *, half: bool, cpu: bool = False) -> str:
    """Return the WGSL of `shaders/<name>.wgsl`, preprocessed, with f16 (`half`) or f32 as its type `half`."""

    def read(name: str) -> str:
        variant = f"{name}.cpu"
        return _read(variant if cpu and _find(variant) else name)

    prologue = "enable f16; alias half = f16;\n" if half else "alias half = f32;\n"
    return prologue + _INCLUDE.sub(lambda match: read(match[1]), read(name))
