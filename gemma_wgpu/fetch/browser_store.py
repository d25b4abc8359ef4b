"""Hosted model folders in the browser, from Pyodide, in a page or in a worker.

`store.js` drives the network and the storage. The files of a model are kept in a folder of their own, beside a file
that holds the address that they came from.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, TypeVar

import js
import numpy as np
from pyodide.code import run_js
from pyodide.ffi import JsException, create_proxy, to_js

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.store import Cache, Cached, nothing_from
from gemma_wgpu.gpu.browser import block_on
from gemma_wgpu.gpu.device import Held
from gemma_wgpu.weights.hosted import KeptFile, WebFolder

T = TypeVar("T")

_HOSTED = re.compile(r"https?://|\.{0,2}/", re.IGNORECASE)
_ADDRESS = "address"


class BrowserHeld(Held):
    """Bytes in a Uint8Array."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.nbytes: int = view.length

    def slice(self, offset: int, nbytes: int) -> BrowserHeld:
        """Return a view of some bytes."""
        return BrowserHeld(self.view.subarray(offset, offset + nbytes))

    def to_bytes(self) -> bytes:
        """Return a copy in Python's memory."""
        data: bytes = self.view.to_bytes()
        return data

    def free(self) -> None:
        """Detach the memory, so that JavaScript gives it back at once."""
        self.view.buffer.transfer(0)


class BrowserFolder(WebFolder):
    """The folder at `url`, which ends neither with a slash nor with a file's name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._home = hashlib.sha256(url.encode()).hexdigest()[:16]
        self._store: Any = None

    async def read(self, name: str) -> bytes:
        """Return a small file from the network, or from the storage if the network does not answer."""
        store = await self._opened()
        with self.as_model_error(name) as address:
            data: bytes = (await store.fetchSmall(self._home, name, address)).to_bytes()
        return data

    async def load(self, name: str, nbytes: int, sha256: str, report: Callable[[int], None]) -> BrowserHeld:
        """Return a file from the storage, or from the network while it is checked and stored."""
        store, proxy = await self._opened(), create_proxy(report)
        try:
            with self.as_model_error(name) as address:
                held = BrowserHeld(await store.load(self._home, name, address, nbytes, sha256, proxy))
        finally:
            proxy.destroy()
        self._warn()
        return held

    async def kept(self, name: str, data: Held) -> KeptFile:
        """Return a file to read from: the one that is stored, or else a copy of `data`."""
        assert isinstance(data, BrowserHeld)
        store = await self._opened()
        return _BrowserFile(self, name, store, await store.blob(self._home, name, data.view))

    async def retain(self, name: str, data: bytes, others: frozenset[str]) -> None:
        """Keep the manifest and the files that it names, and delete everything else of this model."""
        store = await self._opened()
        await store.keep(self._home, _ADDRESS, to_js(self.url.encode()))
        await store.keep(self._home, name, to_js(data))
        for home, file, _ in await store.list():
            if home == self._home and file.removesuffix(".part") not in {_ADDRESS, name, *others}:
                await store.remove(home, file)
        self._warn()

    def seconds(self) -> dict[str, float]:
        """Return the seconds that `store.js` spent on each kind of work."""
        seconds: dict[str, float] = self._store.seconds.to_py() if self._store is not None else {}
        return seconds

    def close(self) -> None:
        """Stop the downloads that are under way."""
        if self._store is not None:
            self._store.stop()

    async def _opened(self) -> Any:
        self._store = self._store or await _open_store()
        return self._store

    @contextmanager
    def as_model_error(self, name: str) -> Iterator[str]:
        """Yield the address of a file, and make a ModelError, which names it, of JavaScript's errors."""
        address = js.URL.new(self.url)
        address.pathname = f"{address.pathname.rstrip('/')}/{name}"
        try:
            yield address.href
        except JsException as error:
            raise ModelError(f"{address.href}: {' '.join(error.message.split())}") from error

    def _warn(self) -> None:
        problem = self._store.problem()
        if problem:
            warnings.warn(
                f"{self.url} is not kept for next time: {problem}; gemma_wgpu.cache lists and deletes what is kept",
                stacklevel=2,
            )


class _BrowserFile(KeptFile):
    """A Blob."""

    def __init__(self, folder: BrowserFolder, name: str, store: Any, blob: Any) -> None:
        self._folder, self._name, self._store, self._blob = folder, name, store, blob

    async def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        """Return the bytes of some spans."""
        with self._folder.as_model_error(self._name):
            data: bytes = (
                await self._store.slices(self._blob, to_js(np.array(spans, np.float64).reshape(-1)))
            ).to_bytes()
        return data


class BrowserCache(Cache):
    """The models that `BrowserFolder` keeps."""

    async def models(self) -> list[Cached]:
        """Return the models in the browser's storage, sorted by address."""
        models = await _models(await _open_store())
        return [Cached(url, sum(files.values())) for url, (_, files) in sorted(models.items())]

    async def delete(self, url: str) -> None:
        """Delete the files of the model that came from `url`."""
        store = await _open_store()
        models, address = await _models(store), _absolute(url)
        if address not in models:
            raise nothing_from(url)
        home, files = models[address]
        for name in files:
            await store.remove(home, name)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Block until `coroutine` ends, which takes JSPI."""
        return block_on(coroutine)


def open_folder(name: str) -> BrowserFolder | None:
    """Return the folder at an address; None for another name.

    The address may be relative: to that of the page or of the worker, or to the one that the environment variable
    GEMMA_WGPU_BASE names, which may itself be relative to these. Raises ModelError if it is not an address.
    """
    return BrowserFolder(_absolute(name)) if _HOSTED.match(name) else None


def _absolute(name: str) -> str:
    """Return a folder's whole address. Raises ModelError if it is not an address."""
    document = getattr(js, "document", None)
    try:
        base = js.URL.new(os.environ.get("GEMMA_WGPU_BASE", ""), document.baseURI if document else js.location.href)
        url = js.URL.new(name, base)
    except JsException:
        raise ModelError(f"{name}: this is not a web address; give all of it, from https:// on") from None
    url.pathname = url.pathname.rstrip("/")
    url.hash = ""
    address: str = url.href
    return address


async def _open_store() -> Any:
    """Return the object that store.js makes."""
    return await run_js((files("gemma_wgpu.fetch") / "store.js").read_text(encoding="utf-8"))()


async def _models(store: Any) -> dict[str, tuple[str, dict[str, int]]]:
    """Return the names of the models' folders, and the sizes of the files in them, by the models' addresses."""
    homes: dict[str, dict[str, int]] = {}
    for home, name, nbytes in await store.list():
        homes.setdefault(home, {})[name] = nbytes
    models = {}
    for home, sizes in homes.items():
        address = await store.read(home, _ADDRESS)
        models[address.to_bytes().decode() if address else home] = home, sizes
    return models
