"""The models that came over the network and are kept on this machine.

They are in a folder among the system's caches (`$GEMMA_WGPU_CACHE`), or in the browser's storage. Models from Hugging
Face are not among them, since its library has a cache of its own.
"""

from __future__ import annotations

import builtins

from gemma_wgpu.fetch.platform import model_cache
from gemma_wgpu.fetch.store import Cached

__all__ = ["Cached", "delete", "delete_async", "list", "list_async", "size", "size_async"]


def list() -> builtins.list[Cached]:
    """Return the models, each with its `url` and the bytes `nbytes` that it takes; some may not be whole yet."""
    return model_cache().wait(list_async())


async def list_async() -> builtins.list[Cached]:
    """Do what `list` does, for an event loop."""
    return await model_cache().models()


def size() -> int:
    """Return the bytes that all models take together."""
    return model_cache().wait(size_async())


async def size_async() -> int:
    """Do what `size` does, for an event loop."""
    return sum(model.nbytes for model in await list_async())


def delete(url: str) -> None:
    """Delete the model that came from `url`. Raises ModelError if there is none, or if it cannot be deleted."""
    model_cache().wait(delete_async(url))


async def delete_async(url: str) -> None:
    """Do what `delete` does, for an event loop."""
    await model_cache().delete(url)
