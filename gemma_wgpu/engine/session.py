"""A conversation's cache in a file, to go on with it later.

Numpy's .npz, with keys and values as the GPU has them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.runner import Runner
from gemma_wgpu.errors import RequestError
from gemma_wgpu.files import reason, replacing
from gemma_wgpu.gpu.device import Buffer
from gemma_wgpu.ops.kv_cache import KVCache, Stored

_FORMAT = 2


async def save(runner: Runner, fingerprint: str, path: Path) -> None:
    """Write the tokens of the sequence that was begun last, and the keys and values that are kept of them.

    `fingerprint` tells models apart. Raises RequestError if the file cannot be written.
    """
    with runner.device.lock:
        stored = runner.cache.newest() or Stored([])
        ids = stored.ids[: stored.computed]
        oldest = min(stored.oldest, len(ids))
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "model": np.array(fingerprint),
            "half": np.array(runner.half),
            "ids": np.array(ids, np.int64),
            "oldest": np.array(oldest),
        }
        reading = {
            keys.name: [runner.device.read(keys.buffer, at, size) for at, size in keys.runs(stored, len(ids))]
            for keys in _kept(runner, oldest)
        }
    for name, runs in reading.items():
        arrays[name] = np.concatenate([np.empty(0, np.uint8), *[await run for run in runs]])
    try:
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise RequestError(f"{path}: the session cannot be written: {reason(error)}") from error


def restore(runner: Runner, fingerprint: str, path: Path) -> list[int]:
    """Put what `save` wrote into the cache of the same model.

    Returns the tokens; where an image stood, they are negative numbers that tell its content.

    Raises RequestError for a file that is damaged, of another model or precision, or longer than the context, and
    DeviceError if the GPU's memory is exhausted.
    """
    arrays = _read(path)
    try:
        if arrays["format"] != _FORMAT:
            raise RequestError(f"{path}: the session was written by another version of gemma_wgpu")
        if arrays["model"] != fingerprint or arrays["half"] != runner.half:
            raise RequestError(f"{path}: the session belongs to another model, or to another precision of it")
        ids: list[int] = arrays["ids"].tolist()
        oldest = int(arrays["oldest"])
        if len(ids) > runner.context_length:
            raise RequestError(
                f"{path}: the session has {len(ids):,} tokens, more than the context_length of "
                f"{runner.context_length:,}; load the model with a longer one"
            )
        with runner.device.lock:
            whole = {keys.name: keys.size(len(ids)) for keys in _kept(runner, oldest)}
            if not 0 <= oldest <= len(ids) or any(arrays[name].shape != (size,) for name, size in whole.items()):
                raise _damaged(path)
            stored = runner.cache.put(ids, oldest)
            for keys in _kept(runner, stored.oldest):
                data = arrays[keys.name][whole[keys.name] - keys.size(len(ids)) :]
                for at, size in keys.runs(stored, len(ids)):
                    runner.device.write(keys.buffer, data[:size], at)
                    data = data[size:]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _damaged(path) from error
    return ids


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except OSError as error:
        raise RequestError(f"{path}: the session cannot be read: {reason(error)}") from error
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> RequestError:
    return RequestError(f"{path}: this is not a session, or it is damaged")


@dataclass(frozen=True)
class _Kept:
    """The keys or the values of a cache, of which those of positions from `first` on are kept."""

    name: str
    cache: KVCache
    index: int
    first: int

    @property
    def buffer(self) -> Buffer:
        """Return where they are."""
        return (self.cache.keys if self.name.endswith("keys") else self.cache.values)(self.index)

    def size(self, length: int) -> int:
        """Return the bytes that they take for a sequence of so many positions."""
        return (length - self.first) * self.cache.row_bytes(self.index)

    def runs(self, stored: Stored, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) in bytes of the runs in which they lie, in the order of positions."""
        if length:
            row_bytes = self.cache.row_bytes(self.index)
            for start, rows in stored.rings[self.cache.ring_of(self.index)].rows(self.first, length):
                yield start * row_bytes, rows * row_bytes


def _kept(runner: Runner, oldest: int) -> Iterator[_Kept]:
    cache = runner.cache
    for index in range(len(cache.specs)):
        first = oldest if cache.ring_of(index) == 0 else 0
        for name in ("keys", "values"):
            yield _Kept(f"{index:02}.{name}", cache, index, first)
