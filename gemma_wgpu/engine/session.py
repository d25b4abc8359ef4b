"""A conversation's cache in a file, to go on with it later: numpy's .npz, the keys and values as the GPU has them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.model import Model
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gpu.device import Buffer

_FORMAT = 1


async def save(model: Model, path: Path) -> None:
    """Write the tokens that `model` has computed, and what it keeps of them."""
    sequence = model.sequence
    ids = sequence.ids[: sequence.computed]
    arrays = {
        "format": np.array(_FORMAT),
        "model": np.array(model.fingerprint),
        "half": np.array(model.half),
        "ids": np.array(ids, np.uint32),
        "oldest": np.array(sequence.oldest),
    }
    for name, buffer, used in _caches(model, len(ids)):
        arrays[name] = await model.device.read(buffer, 0, used) if used else np.empty(0, np.uint8)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise RequestError(f"{path}: the session cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def restore(model: Model, path: Path) -> list[int]:
    """Put what `save` wrote back into the cache of the same model. Returns the tokens.

    Raises RequestError for a file that is damaged, of another model or precision, or longer than the context.
    """
    arrays = _read(path)
    if arrays["format"] != _FORMAT:
        raise RequestError(f"{path}: the session was written by another version of gemma_wgpu")
    if arrays["model"] != model.fingerprint or arrays["half"] != model.half:
        raise RequestError(f"{path}: the session belongs to another model, or to another precision of it")
    ids: list[int] = arrays["ids"].tolist()
    if len(ids) > model.context_length:
        raise RequestError(
            f"{path}: the session has {len(ids):,} tokens, more than the context_length of "
            f"{model.context_length:,}; load the model with a longer one"
        )
    caches = list(_caches(model, len(ids)))
    if any(arrays[name].nbytes != used for name, _, used in caches):
        raise RequestError(f"{path}: the session is of a context_length whose windows have another size")
    for name, buffer, _ in caches:
        model.device.write(buffer, arrays[name])
    model.turn += 1  # whatever runs has lost its cache
    model.sequence.restore(ids, int(arrays["oldest"]))
    return ids


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        arrays["format"]
    except OSError as error:
        raise RequestError(f"{path}: the session cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: this is not a session, or it is damaged") from error
    return arrays


def _caches(model: Model, length: int) -> Iterator[tuple[str, Buffer, int]]:
    """(name, buffer, bytes in use) of each layer's keys and values."""
    for layer, caches in enumerate(model.caches):
        for name, buffer in zip(("keys", "values"), caches, strict=True):
            yield f"{layer:02}.{name}", buffer, min(length * model.slot_bytes, buffer.size)
