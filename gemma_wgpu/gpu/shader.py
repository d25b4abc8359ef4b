"""The preprocessor of the shaders, which does two things and no more.

* The type `half` is f16 or f32: a first line `enable f16; alias half = f16;` or `alias half = f32;` is put in front.
* A line `#include "name.wgsl"` is replaced by that file.

All other variation is by WGSL `override` constants.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([a-z0-9_]+)\.wgsl"$', re.MULTILINE)


@functools.cache
def _read(name: str) -> str:
    packaged = files("gemma_wgpu") / "shaders" / f"{name}.wgsl"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    checkout = Path(__file__).parents[2] / "shaders" / f"{name}.wgsl"
    return checkout.read_text(encoding="utf-8")


def load_shader(name: str, *, half: bool) -> str:
    """The WGSL of `shaders/<name>.wgsl`, preprocessed, with f16 (`half`) or f32 as its type `half`."""
    prologue = "enable f16; alias half = f16;\n" if half else "alias half = f32;\n"
    return prologue + _INCLUDE.sub(lambda match: _read(match[1]), _read(name))
