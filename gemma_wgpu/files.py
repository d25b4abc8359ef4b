"""Files on this machine: where the package keeps its own, how it replaces one, and how a process has one alone."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def cache_folder() -> Path:
    """Return the folder of what the package keeps: $GEMMA_WGPU_CACHE, or gemma_wgpu among this system's caches."""
    chosen = os.environ.get("GEMMA_WGPU_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches.absolute() / "gemma_wgpu"


def lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or its process ends. Return False if another process has it. Raises OSError."""
    file.seek(0)
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing, which takes the place of `path` when the block has ended without an error.

    So `path` has its old content or all of its new one, whatever happens, a power cut included. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    """Wait until all that was written to a file is on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def is_full(error: OSError) -> bool:
    """Say whether the disk is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason(error: OSError) -> str:
    """Return what went wrong, in words and without the file's name."""
    return "the disk is full" if is_full(error) else error.strerror or str(error)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
