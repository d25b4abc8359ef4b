"""What people give for a picture or a sound: the bytes of a file, its path, or a data: URI."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError

MOST_BYTES = 50_000_000
"""A file may have so many bytes."""

_LONGEST_PATH = 4096  # characters
_WEB = re.compile(r"https?://", re.IGNORECASE)
_FILE = re.compile(r"file:", re.IGNORECASE)
_DATA = re.compile(r"data:", re.IGNORECASE)


def file_bytes(source: object, noun: str, taken: str, *, files: bool = True) -> tuple[bytes, str]:
    """Return the bytes of a file, and what to call it in messages: its path, or "the" and `noun`.

    `source` is the bytes themselves, a path (str or Path), or a data: URI (str). Without `files`, paths are refused.
    `taken` says what may be given. Raises RequestError if the source is something else, cannot be read, is empty, or
    is above MOST_BYTES.
    """
    name = f"the {noun}"
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and _DATA.match(source):
        data = _from_data_uri(source, name)
    elif isinstance(source, str | Path):
        path = _path(source, noun, taken, files)
        data, name = _read(path, noun), str(path)
    else:
        raise RequestError(f"{name} is of type {type(source).__name__}; give {taken}")
    if not data:
        raise RequestError(f"{name}: there is nothing in it; give a {noun}")
    if len(data) > MOST_BYTES:
        raise _too_large(name)
    return data, name


def content_key(data: NDArray[np.float32]) -> int:
    """Return a number that stands for the content of an array: below 0, and at least -2**62.

    It is -1 minus the first 62 bits of the SHA-256 of the numbers, so it never is a token's id.
    """
    digest = hashlib.sha256(np.ascontiguousarray(data, dtype="<f4").tobytes()).digest()
    return -1 - (int.from_bytes(digest[:8], "big") >> 2)


def _path(source: str | Path, noun: str, taken: str, files: bool) -> Path:
    """Return the path that a source is. Raises RequestError if it is not one, or if paths are not taken."""
    text = str(source)
    if _WEB.match(text):
        raise RequestError(
            f"the {noun} is a web address, which has to be fetched first; give the bytes that "
            f"gemma_wgpu.fetch.{noun}s.fetch_{noun} returns"
        )
    if not files:
        raise RequestError(f"the {noun} is a path, or a text that means nothing; only data: URIs are taken here")
    if _FILE.match(text):
        raise RequestError(f"the {noun} is a file: address; give the path instead")
    if len(text) > _LONGEST_PATH:
        raise RequestError(f"the {noun} is a text of {len(text):,} characters, which is no path; give {taken}")
    return Path(source)


def _read(path: Path, noun: str) -> bytes:
    """Return the bytes of a file. Raises RequestError if there is none."""
    try:
        path = path.expanduser()
        if not path.exists():
            raise RequestError(f"{path}: there is no such file")
        if not path.is_file():  # a device could be endless
            raise RequestError(f"{path}: this is no file; give the path of a {noun}")
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except RequestError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path}: it cannot be read ({why})") from error


def _from_data_uri(uri: str, name: str) -> bytes:
    """Return the bytes in a data: URI. Raises RequestError if it is damaged or above MOST_BYTES."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise RequestError(f"{name}: its data: URI has no comma, so it has no data")
    if len(body) > MOST_BYTES * 4 // 3 + 4:  # four characters of base64 are three bytes
        raise _too_large(name)
    try:
        data = unquote_to_bytes(body)
        if not head.lower().rstrip().endswith(";base64"):
            return data
        data = b"".join(data.split())
        return base64.b64decode(data.rstrip(b"=") + b"=" * (-len(data.rstrip(b"=")) % 4), validate=True)
    except ValueError as error:
        raise RequestError(f"{name}: its data: URI is damaged ({error})") from error


def _too_large(name: str) -> RequestError:
    return RequestError(f"{name}: it has more than {MOST_BYTES:,} bytes, which is the limit; make it smaller first")
