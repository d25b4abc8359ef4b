"""The models that came over the network and are kept on this machine: what the platforms have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from gemma_wgpu.errors import ModelError

T = TypeVar("T")


@dataclass(frozen=True)
class Cached:
    """A model that is kept on this machine, whole or in part: the address that it came from, and its bytes here."""

    url: str
    nbytes: int


class Cache(ABC):
    """The models that a platform keeps."""

    @abstractmethod
    async def models(self) -> list[Cached]:
        """Return all of them, sorted by address."""

    @abstractmethod
    async def delete(self, url: str) -> None:
        """Delete all that came from an address. Raises ModelError if that is nothing, or it cannot be deleted."""

    @abstractmethod
    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Block until a coroutine that awaits these methods ends. Raises DeviceError if blocking is impossible."""


def nothing_from(url: str) -> ModelError:
    """Return the error of `Cache.delete`."""
    return ModelError(f"{url}: nothing is kept from there; gemma_wgpu.cache.list() has the addresses")
