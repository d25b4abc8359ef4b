"""The other half of the seam: models that come over the network, and what is kept of them on this machine."""

from __future__ import annotations

import abc
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from gemma_wgpu.errors import ModelError
from gemma_wgpu.gpu.device import Held

T = TypeVar("T")


class Folder(abc.ABC):
    """A folder of files on the web, each of which is kept on this machine once it has come; `url` is its address.

    Errors are ModelErrors that name the file's address.
    """

    url: str

    @abc.abstractmethod
    async def read(self, name: str) -> bytes:
        """A small file as it is now; as it was kept where the server cannot be reached."""

    @abc.abstractmethod
    async def load(self, name: str, nbytes: int, sha256: str, report: Callable[[int], None]) -> Held:
        """A file of which size and SHA-256 are known, from where it is kept or else over the network.

        `report` is called with the bytes that have come.
        """

    @abc.abstractmethod
    async def retain(self, name: str, data: bytes, others: frozenset[str]) -> None:
        """Keep `data` as the file `name`, and from now on nothing beside it but `others`."""

    @abc.abstractmethod
    def seconds(self) -> dict[str, float]:
        """Spent on loading so far, by what for: "storage", "download", "hash"."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop what is under way. Idempotent."""


@dataclass(frozen=True)
class Cached:
    """A model that is kept on this machine, whole or in part: the address it came from, and its bytes here."""

    url: str
    nbytes: int


class Cache(abc.ABC):
    """The models that this platform keeps."""

    @abc.abstractmethod
    async def models(self) -> list[Cached]:
        """All of them, by address."""

    @abc.abstractmethod
    async def delete(self, url: str) -> None:
        """Delete all that came from an address. ModelError where that is nothing, or it cannot be deleted."""

    @abc.abstractmethod
    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine made of the above to its end, blocking. DeviceError where one can't block."""


def nothing_from(url: str) -> ModelError:
    """The error of `Cache.delete`."""
    return ModelError(f"{url}: nothing is kept from there; gemma_wgpu.cache.list() has the addresses")
