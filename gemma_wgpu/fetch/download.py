"""Model folders on plain static hosting, kept in a cache folder of this machine.

In the cache each address has a folder, with a file that says what the address is and each version of the model by the
hash of its manifest: a newer one never mixes with an older one. The manifest is written last, so that a version
without it is not whole.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.store import Cache, Cached, nothing_from
from gemma_wgpu.files import lock
from gemma_wgpu.weights.manifest import MANIFEST, File, Manifest

T = TypeVar("T")
Progress = Callable[[int, int], None]

_TIMEOUT = 20.0  # seconds for which a server may be silent
_PAUSES = (1.0, 2.0, 4.0)  # seconds before each new try
_LOCK_PATIENCE = 300.0  # seconds in which another process must get ahead; more than the above can take together
_LOCK_INTERVAL = 0.1
_CHUNK = 1 << 20
_ADDRESS = "address"  # a file
_LEGAL = "/%:@!$&'()*+,;=~?"  # characters of a path or query that stay as they are


def download(url: str, progress: Progress | None = None) -> Path:
    """The model folder that is hosted at `url` (where its manifest.json is), as a folder in `cache_folder()`.

    Only what is not there already is downloaded; what an earlier run has left unfinished is gone on with. Each
    file is checked against the SHA-256 in the manifest. `progress` is called with bytes done and bytes in all, and
    not at all when nothing is to be downloaded. When the server cannot be reached, or is in trouble itself, the
    latest whole version in the cache is returned. A newer version takes the place of older ones.

    Raises ModelError naming the address or file when the server does not have it, when it is not a model folder or
    a damaged one, when the connection fails several times (the next run then goes on where this one stopped), or
    when the cache cannot be written.
    """
    home = cache_folder() / _cache_name(url)
    kept = _latest(url, home)
    address = _address(url, MANIFEST)
    try:
        data = _manifest(address, pauses=() if kept else _PAUSES[:1])
    except _TransferError as error:
        if kept:
            return kept
        raise ModelError(f"{address}: cannot be downloaded ({error}); try again later") from error
    manifest = Manifest.from_web(data, address)
    version = _Version(url, home / hashlib.sha256(data).hexdigest()[:16], manifest)
    if not version.whole():
        with _writing(home):
            home.mkdir(parents=True, exist_ok=True)
            (home / _ADDRESS).write_text(_folder_address(url), encoding="utf-8")
        with _locked(home / "lock", version, progress):
            version.download(data, progress)
            for other in home.iterdir():
                if other.is_dir() and other != version.folder:
                    shutil.rmtree(other, ignore_errors=True)
    return version.folder


def cache_folder() -> Path:
    """Where downloads are kept: $GEMMA_WGPU_CACHE, or gemma_wgpu among this system's caches."""
    chosen = os.environ.get("GEMMA_WGPU_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches.absolute() / "gemma_wgpu"


class Downloads(Cache):
    """What `download` keeps."""

    async def models(self) -> list[Cached]:
        """All of them, by address."""
        models = [Cached(url, _folder_size(home)) for url, home in _homes().items()]
        return sorted(models, key=lambda model: model.url)

    async def delete(self, url: str) -> None:
        """Delete what came from an address. ModelError where that is nothing, or it cannot be deleted."""
        home = _homes().get(_folder_address(url))
        if home is None:
            raise nothing_from(url)
        with _writing(home):
            shutil.rmtree(home)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine made of the above to its end."""
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        raise AssertionError("nothing above awaits")


def _homes() -> dict[str, Path]:
    """By the address that it came from: the folder of each model in the cache, be it whole or not."""
    files = cache_folder().glob(f"*/{_ADDRESS}")
    return {file.read_text(encoding="utf-8"): file.parent for file in files}


def _folder_size(folder: Path) -> int:
    return sum(max(_size(path), 0) for path in folder.rglob("*") if path.is_file())


class _TransferError(Exception):
    """The server cannot be reached, is in trouble or fell silent: another try may well succeed. Says why."""


@dataclass(frozen=True)
class _Version:
    """A version of the model at `url`, as `manifest` lists it, in `folder`."""

    url: str
    folder: Path
    manifest: Manifest

    @property
    def files(self) -> tuple[File, ...]:
        """All but the manifest."""
        return (self.manifest.config, self.manifest.vocabulary, *self.manifest.shards)

    def whole(self) -> bool:
        """Whether everything is there. Reading the folder checks the hashes."""
        return (self.folder / MANIFEST).is_file() and all(
            _size(self.folder / file.name) == file.nbytes for file in self.files
        )

    def bytes_there(self) -> int:
        """Bytes of `files` in the folder, be they finished or not."""
        paths = [self.folder / file.name for file in self.files]
        return sum(max(_size(path), _size(_unfinished(path)), 0) for path in paths)

    def download(self, manifest: bytes, progress: Progress | None) -> None:
        """Complete the folder; `manifest` is its manifest.json."""
        total = sum(file.nbytes for file in self.files)
        before = 0

        def report(done: int) -> None:
            if progress:
                progress(before + done, total)

        with _writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        for file in self.files:
            path = self.folder / file.name
            if _size(path) != file.nbytes:
                _download(_address(self.url, file.name), file, path, report)
            before += file.nbytes
        report(0)
        path = self.folder / MANIFEST
        with _writing(path):
            with _unfinished(path).open("wb") as out:
                out.write(manifest)
                _flush(out)
            _unfinished(path).replace(path)


def _download(address: str, file: File, path: Path, report: Callable[[int], None]) -> None:
    """Download one file. A try counts as failed unless it gets well beyond where those before it got."""
    part = _unfinished(path)
    furthest = failures = 0
    while True:
        try:
            digest = _go_on(address, file, part, report)
            break
        except _TransferError as error:
            reached = max(_size(part), 0)
            if reached >= furthest + _CHUNK:
                furthest, failures = reached, 0
            if failures == len(_PAUSES):
                raise ModelError(
                    f"{address}: the download stopped at {reached:,} of {file.nbytes:,} bytes ({error}); "
                    "run it again, it goes on from there"
                ) from error
            time.sleep(_PAUSES[failures])
            failures += 1
    with _writing(path):
        if digest != file.sha256:
            part.unlink()
            raise ModelError(
                f"{address}: its SHA-256 is not the one in {MANIFEST}, so it was deleted; run the download again, "
                "and if that does not help, the hosted file is damaged"
            )
        part.replace(path)


def _go_on(address: str, file: File, part: Path, report: Callable[[int], None]) -> str:
    """Download what is missing of `part`; the SHA-256 of the whole in hexadecimal."""
    with _writing(part), part.open("ab") as out:
        done = _size(part)
        digest = hashlib.sha256()
        if done > file.nbytes:
            out.truncate(0)
            done = 0
        elif done:
            with part.open("rb") as begun:
                digest = hashlib.file_digest(begun, "sha256")
        report(done)
        if done < file.nbytes:
            with _open(address, done) as response:
                if done and response.status != 206:  # the server sends the whole file, whatever was asked for
                    out.truncate(0)
                    done = 0
                    digest = hashlib.sha256()
                length = response.headers.get("Content-Length")
                if length is not None and length != str(file.nbytes - done):
                    raise ModelError(
                        f"{address}: the server has {length} bytes where {MANIFEST} leaves {file.nbytes - done}; the "
                        "hosted folder is not whole, or it is being replaced"
                    )
                for chunk in _chunks(response, file.nbytes - done):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    report(done)
        _flush(out)
    return digest.hexdigest()


def _manifest(address: str, pauses: tuple[float, ...]) -> bytes:
    """What is at the address of a manifest.json."""
    for pause in (*pauses, None):
        try:
            with _open(address) as response, _network():
                data: bytes = response.read()
            break
        except _TransferError:
            if pause is None:
                raise
            time.sleep(pause)
    return data


def _open(address: str, start: int = 0) -> HTTPResponse:
    """The file from byte `start` on, with status 206; or all of it, where the server does not send parts."""
    headers = {"User-Agent": "gemma-wgpu", "Cache-Control": "no-cache"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with _network():
            response: HTTPResponse = urlopen(Request(address, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return _open(address)
        answer = f"the server answers {error.code} {' '.join(str(error.reason).split())}"
        if error.code in (408, 429) or error.code >= 500:
            raise _TransferError(answer) from error
        raise ModelError(f"{address}: {answer}; check the address, and that all files are there") from error
    sent = response.headers.get("Content-Range", "")
    if start and response.status == 206 and not sent.startswith(f"bytes {start}-"):
        response.close()
        return _open(address)
    return response


def _chunks(response: HTTPResponse, nbytes: int) -> Iterator[bytes]:
    """The next `nbytes` bytes, as they arrive."""
    while nbytes:
        with _network():
            chunk = response.read1(min(nbytes, _CHUNK))
        if not chunk:
            raise _TransferError("the connection was closed")
        nbytes -= len(chunk)
        yield chunk


@contextmanager
def _network() -> Iterator[None]:
    """Tells what goes wrong between here and the server from what is wrong with the address, or the disk."""
    try:
        yield
    except HTTPError:
        raise
    except TimeoutError as error:
        raise _TransferError(f"the server was silent for {_TIMEOUT:g} s") from error
    except URLError as error:
        silent = isinstance(error.reason, TimeoutError)
        raise _TransferError(f"no connection within {_TIMEOUT:g} s" if silent else str(error.reason)) from error
    except (OSError, HTTPException) as error:
        raise _TransferError(str(error) or type(error).__name__) from error


def _address(url: str, name: str) -> str:
    """The address of a file in the folder at `url`, which may be that of its manifest. Raises ModelError."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a ValueError where it is not one
        host = parts.netloc.encode("idna").decode()
    except ValueError as error:
        raise ModelError(f"{url}: not a web address: {error}") from error
    if not re.fullmatch(r"[\w.:\[\]-]+", host):
        raise ModelError(f"{url}: not a web address that can be used: {host!r} is not the name of a host")
    folder = parts.path.rstrip("/").removesuffix(f"/{MANIFEST}")
    path, query = quote(f"{folder}/{name}", safe=_LEGAL), quote(parts.query, safe=_LEGAL)
    return urlunsplit((parts.scheme, host, path, query, ""))


def _folder_address(url: str) -> str:
    """The same for all ways to write it."""
    return _address(url, "").rstrip("/")


def _cache_name(url: str) -> str:
    """A folder's name: the end of the address for people to read, and a hash of it."""
    address = _address(url, "")
    _, _, readable = address.partition("://")
    readable = re.sub(r"[^a-z0-9.-]+", "_", readable.lower()).strip("_.")[-60:]
    return f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def _latest(url: str, home: Path) -> Path | None:
    """The whole version that was completed last."""
    found = []
    for path in home.glob(f"*/{MANIFEST}"):
        with suppress(OSError, ModelError):  # another process is deleting it; or it is of a newer format
            manifest = Manifest.from_json(path.read_bytes(), str(path))
            if _Version(url, path.parent, manifest).whole():
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


@contextmanager
def _locked(path: Path, version: _Version, progress: Progress | None) -> Iterator[None]:
    """Keep other processes out. One that came first is waited for, as long as it gets ahead."""
    with _writing(path):
        file = path.open("ab")
    with file:
        total = sum(listed.nbytes for listed in version.files)
        there, since = -1, time.monotonic()
        while not _taken(file, path):
            if (now_there := version.bytes_there()) != there:
                there, since = now_there, time.monotonic()
                if progress:
                    progress(there, total)
            if time.monotonic() - since > _LOCK_PATIENCE:
                raise ModelError(
                    f"{path}: another process is downloading this model and gets no further; end it, or wait"
                )
            time.sleep(_LOCK_INTERVAL)
        yield


def _taken(file: BinaryIO, path: Path) -> bool:
    with _writing(path):
        return lock(file)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    """In bytes; -1 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())  # nothing gets its final name before it is on the disk


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"{path}: the disk is full; make room, or set GEMMA_WGPU_CACHE to another place, and run it again"
            ) from error
        raise ModelError(
            f"{path}: cannot be written ({error.strerror or error}); set GEMMA_WGPU_CACHE to a folder that can"
        ) from error
