"""Gemma from Python on any GPU, through WGSL compute shaders.

import gemma_wgpu

with gemma_wgpu.load("demo") as gemma:
    for piece in gemma.generate("The capital of France is", max_new_tokens=32):
        print(piece, end="", flush=True)
"""

from gemma_wgpu.engine import structured
from gemma_wgpu.engine.generation import Generation, Generations
from gemma_wgpu.engine.request import Logprobs, Piece, Stats
from gemma_wgpu.errors import ContextError, DeviceError, GemmaError, ModelError, RequestError
from gemma_wgpu.fetch import cache
from gemma_wgpu.gemma import Gemma, load, load_async
from gemma_wgpu.options import Constraint, Options
from gemma_wgpu.progress import Progress

__all__ = [
    "Constraint",
    "ContextError",
    "DeviceError",
    "Gemma",
    "GemmaError",
    "Generation",
    "Generations",
    "Logprobs",
    "ModelError",
    "Options",
    "Piece",
    "Progress",
    "RequestError",
    "Stats",
    "cache",
    "load",
    "load_async",
    "structured",
]
