"""Gemma 3 from Python on any GPU, through WGSL compute shaders.

import gemma_wgpu

with gemma_wgpu.load("demo") as gemma:
    for piece in gemma.generate("The capital of France is", max_new_tokens=32):
        print(piece, end="", flush=True)
"""

from gemma_wgpu.engine import structured
from gemma_wgpu.engine.generation import Generation, Generations
from gemma_wgpu.engine.request import Piece, Stats
from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.errors import DeviceError, GemmaError, ModelError, RequestError
from gemma_wgpu.fetch import cache
from gemma_wgpu.gemma import Gemma, load, load_async

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
