"""The models that are kept on this machine of those that came over the network: in a folder among the system's
caches (`$GEMMA_WGPU_CACHE`), or in the browser's storage. Hugging Face's cache is its own.
"""

import builtins

from gemma_wgpu.fetch.store import Cached
from gemma_wgpu.gpu import model_cache

__all__ = ["Cached", "delete", "delete_async", "list", "list_async", "size", "size_async"]


def list() -> builtins.list[Cached]:
    """The models, each with its `url` and the bytes `nbytes` that it takes up; also those not yet loaded in full."""
    return model_cache().wait(list_async())


async def list_async() -> builtins.list[Cached]:
    """`list`, for an event loop."""
    return await model_cache().models()


def size() -> int:
    """Bytes that all models take up together."""
    return model_cache().wait(size_async())


async def size_async() -> int:
    """`size`, for an event loop."""
    return sum(model.nbytes for model in await list_async())


def delete(url: str) -> None:
    """Delete the model that came from `url`. Raises ModelError where there is none, or it cannot be deleted."""
    model_cache().wait(delete_async(url))


async def delete_async(url: str) -> None:
    """`delete`, for an event loop."""
    await model_cache().delete(url)
