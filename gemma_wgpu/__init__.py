"""Gemma 3 from Python on any GPU, through WGSL compute shaders.

import gemma_wgpu

with gemma_wgpu.load("demo") as gemma:
    for piece in gemma.generate("The capital of France is", max_new_tokens=32):
        print(piece, end="", flush=True)
"""

from gemma_wgpu import cache, structured
from gemma_wgpu.errors import DeviceError, GemmaError, ModelError, RequestError
from gemma_wgpu.gemma import Gemma, load, load_async
from gemma_wgpu.generate import Generation, Generations
from gemma_wgpu.sampling import Sampling
from gemma_wgpu.text import Piece, Stats

__all__ = [
    "DeviceError",
    "Gemma",
    "GemmaError",
    "Generation",
    "Generations",
    "ModelError",
    "Piece",
    "RequestError",
    "Sampling",
    "Stats",
    "cache",
    "load",
    "load_async",
    "structured",
]
