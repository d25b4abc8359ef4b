"""Model folders on plain static hosting, which are kept in a cache folder of this machine.

In the cache, each address has a folder, with a file that holds the address, and with a folder for each version of the
model, named by the hash of its manifest: so a newer version never mixes with an older one. The manifest is written
last, so a version without it is not whole.
"""

from __future__ import annotations

import hashlib
import re
import shutil
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
from gemma_wgpu.files import cache_folder, is_full, lock, reason, replacing, sync
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.weights.manifest import MANIFEST, File, Manifest

T = TypeVar("T")

_TIMEOUT = 20.0  # seconds for which a server may be silent
_PAUSES = (1.0, 2.0, 4.0)  # seconds before each new try
_LOCK_PATIENCE = 300.0  # seconds in which another process must get ahead: more than its pauses can take
_LOCK_INTERVAL = 0.1  # seconds
_CHUNK = 1 << 20  # bytes
_ADDRESS = "address"  # the name of a file
_LEGAL = "/%:@!$&'()*+,;=~?"  # characters of a path or query that stay as they are


def download(url: str, progress: OnProgress | None = None) -> Path:
    """Download the model folder that is hosted at `url` (where its manifest.json is) into `cache_folder()`.

    Returns its folder there. Only what is missing is downloaded; a file that an earlier run has left unfinished is
    gone on with. Each file is checked against the SHA-256 in the manifest. `progress` is not called if nothing is to
    be downloaded. If the server cannot be reached, or is in trouble itself, the latest whole version in the cache is
    returned. A newer version takes the place of older ones.

    Raises ModelError, which names the address or the file, if the server does not have it, if it is damaged or not a
    model folder, if the connection fails several times (the next run then goes on where this one stopped), or if the
    cache cannot be written.
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
        with _locked(home / "lock", version, progress):
            _write(home / _ADDRESS, _folder_address(url).encode())
            version.download(data, progress)
            for other in home.iterdir():
                if other.is_dir() and other != version.folder:
                    shutil.rmtree(other, ignore_errors=True)
    return version.folder


class Downloads(Cache):
    """The models that `download` has left in the cache folder."""

    async def models(self) -> list[Cached]:
        """Return all of them, sorted by address."""
        models = [Cached(url, _folder_size(home)) for url, home in _homes().items()]
        return sorted(models, key=lambda model: model.url)

    async def delete(self, url: str) -> None:
        """Delete all that came from an address. Raises ModelError if that is nothing, or it cannot be deleted."""
        home = _homes().get(_folder_address(url))
        if home is None:
            raise nothing_from(url)
        with _writing(home):
            shutil.rmtree(home)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that awaits no more than these methods to its end."""
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        raise AssertionError("the coroutine awaits something else")


def _homes() -> dict[str, Path]:
    """Return the folders of the models in the cache, whole or not, by the addresses that they came from."""
    homes = {}
    for file in cache_folder().glob(f"*/{_ADDRESS}"):
        with suppress(FileNotFoundError):  # another process is deleting it
            homes[file.read_text(encoding="utf-8")] = file.parent
    return homes


def _folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(max(_size(path), 0) for path in folder.rglob("*") if path.is_file())


class _TransferError(Exception):
    """The server cannot be reached, is in trouble or fell silent, as the message says. Another try may succeed."""


@dataclass(frozen=True)
class _Version:
    """A version of the model at `url`, which has the files that `manifest` lists, in `folder`."""

    url: str
    folder: Path
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files but the manifest."""
        return sum(file.nbytes for file in self.manifest.files)

    def whole(self) -> bool:
        """Say whether every file is there, with the right size. Reading the folder checks the hashes."""
        return (self.folder / MANIFEST).is_file() and all(
            _size(self.folder / file.name) == file.nbytes for file in self.manifest.files
        )

    def bytes_there(self) -> int:
        """Return the bytes of these files that are in the folder, whether the files are finished or not."""
        paths = [self.folder / file.name for file in self.manifest.files]
        return sum(max(_size(path), _size(_unfinished(path)), 0) for path in paths)

    def download(self, manifest: bytes, progress: OnProgress | None) -> None:
        """Complete the folder; `manifest` is the content of its manifest.json."""
        total, before = self.nbytes, 0

        def report(done: int) -> None:
            if progress:
                progress(Progress("downloading", before + done, total))

        with _writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        for file in self.manifest.files:
            path = self.folder / file.name
            if _size(path) != file.nbytes:
                _download(_address(self.url, file.name), file, path, report)
            before += file.nbytes
        report(0)
        _write(self.folder / MANIFEST, manifest)


def _download(address: str, file: File, path: Path, report: Callable[[int], None]) -> None:
    """Download one file. A try has failed unless it gets well beyond the point that earlier tries reached."""
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
    """Download what is missing of `part`, and return the SHA-256 of the whole file in hexadecimal."""
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
        sync(out)
    return digest.hexdigest()


def _manifest(address: str, pauses: tuple[float, ...]) -> bytes:
    """Return the content of the manifest.json at an address."""
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
    """Ask for a file from byte `start` on, status 206; or for all of it, if the server does not send parts."""
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
    """Yield the next `nbytes` bytes as they arrive."""
    while nbytes:
        with _network():
            chunk = response.read1(min(nbytes, _CHUNK))
        if not chunk:
            raise _TransferError("the connection was closed")
        nbytes -= len(chunk)
        yield chunk


@contextmanager
def _network() -> Iterator[None]:
    """Make a _TransferError of what goes wrong between here and the server, but not with the address or the disk."""
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
    """Return the address of a file in the folder at `url`, or beside the manifest at `url`.

    Raises ModelError if that is not a web address.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError if it is not one
        host = parts.netloc.encode("idna").decode()
    except ValueError as error:
        raise ModelError(f"{url}: this is not a web address: {error}") from error
    if not re.fullmatch(r"[\w.:\[\]-]+", host):
        raise ModelError(f"{url}: this is not a web address that can be used: {host!r} is not the name of a host")
    folder = parts.path.rstrip("/").removesuffix(f"/{MANIFEST}")
    path, query = quote(f"{folder}/{name}", safe=_LEGAL), quote(parts.query, safe=_LEGAL)
    return urlunsplit((parts.scheme, host, path, query, ""))


def _folder_address(url: str) -> str:
    """Return the address of the folder at `url`, which is the same for all ways to write it."""
    return _address(url, "").rstrip("/")


def _cache_name(url: str) -> str:
    """Return a folder's name, which has the end of the address, for people to read, and a hash of all of it."""
    address = _address(url, "")
    _, _, readable = address.partition("://")
    readable = re.sub(r"[^a-z0-9.-]+", "_", readable.lower()).strip("_.")[-60:]
    return f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def _latest(url: str, home: Path) -> Path | None:
    """Return the whole version that was completed last, if there is one."""
    found = []
    for path in home.glob(f"*/{MANIFEST}"):
        with suppress(OSError, ModelError):  # another process is deleting it, or it is of a newer format
            manifest = Manifest.from_json(path.read_bytes(), str(path))
            if _Version(url, path.parent, manifest).whole():
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


@contextmanager
def _locked(path: Path, version: _Version, progress: OnProgress | None) -> Iterator[None]:
    """Keep other processes out. A process that came first is waited for, as long as it gets ahead."""
    with _writing(path):
        file = path.open("ab")
    with file:
        there, since = -1, time.monotonic()
        while not _taken(file, path):
            if (now_there := version.bytes_there()) != there:
                there, since = now_there, time.monotonic()
                if progress:
                    progress(Progress("downloading", there, version.nbytes))
            if time.monotonic() - since > _LOCK_PATIENCE:
                raise ModelError(
                    f"{path}: another process is downloading this model and gets no further; end it, or wait"
                )
            time.sleep(_LOCK_INTERVAL)
        yield


def _taken(file: BinaryIO, path: Path) -> bool:
    with _writing(path):
        return lock(file)


def _write(path: Path, data: bytes) -> None:
    with _writing(path), replacing(path) as file:
        file.write(data)


def _unfinished(path: Path) -> Path:
    """Return the file that a download is written to until it is whole."""
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make a ModelError, which names `path`, of an OSError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ModelError(
                f"{path}: the disk is full; make room, or set GEMMA_WGPU_CACHE to another place, and run it again"
            ) from error
        raise ModelError(
            f"{path}: cannot be written ({reason(error)}); set GEMMA_WGPU_CACHE to a folder that can"
        ) from error
