"""Downloading model folders from a real server, which can do all that servers and connections do."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from huggingface_hub.errors import LocalEntryNotFoundError

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch import download as module
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.files import cache_folder
from gemma_wgpu.progress import Progress
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.opening import open_checkpoint
from tests.checkpoints import gguf_metadata, gguf_tensors, write_gguf
from tests.host import (
    Host,
    Reply,
    answer,
    drop,
    flipped,
    no_ranges,
    redirect,
    silent,
    stall,
    unsized,
    whole,
    wrong_range,
)
from tests.table import EMBEDDING

SHARD = 60_000
FIRST, SECOND = (f"weights-{number:05}-of-00003.safetensors" for number in (1, 2))
FILES = ["config.json", "vocabulary.bin", *(f"weights-{number:05}-of-00003.safetensors" for number in range(1, 4))]


def made(folder: Path, seed: int) -> Path:
    tensors = gguf_tensors(np.random.default_rng(seed), GGMLQuantizationType.BF16)
    with open_checkpoint(write_gguf(folder / f"{seed}.gguf", gguf_metadata(), tensors)) as original:
        convert(original, folder / f"tiny-{seed}", quant="keep", shard_size=SHARD)
    return folder / f"tiny-{seed}"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    old, new = made(folder, 1), made(folder, 2)
    assert sorted(path.name for path in old.iterdir()) == sorted(["manifest.json", *FILES])
    return old, new


@pytest.fixture
def host(versions: tuple[Path, Path]) -> Iterator[Host]:
    host = Host(versions[0])
    yield host
    host.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache; new tries come soon."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMMA_WGPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_PAUSES", (0.01,) * 3)
    return tmp_path / "cache"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers may not be silent for long."""
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)


def check(folder: Path, original: Path) -> None:
    """Both folders have the same files with the same bytes."""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }


def parts(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.part"))


def fails(url: str, message: str) -> None:
    """The error is one line."""
    with pytest.raises(ModelError, match=message) as raised:
        find(url)
    assert "\n" not in str(raised.value)


def test_a_hosted_folder(host: Host, cache: Path) -> None:
    seen: list[Progress] = []
    folder = find(host.url, seen.append)
    check(folder, host.folder)
    assert cache in folder.parents
    assert host.asked() == [(name, None) for name in ["manifest.json", *FILES]]
    total = sum((host.folder / name).stat().st_size for name in FILES)
    assert {(step.what, step.total, step.unit) for step in seen} == {("downloading", total, "bytes")}
    done = [step.done for step in seen]
    assert done == sorted(done) and (done[0], done[-1]) == (0, total)
    with FolderCheckpoint(folder) as checkpoint, FolderCheckpoint(host.folder) as original:
        assert np.array_equal(checkpoint.tensor(EMBEDDING).pack().quants, original.tensor(EMBEDDING).pack().quants)


def test_a_folder_that_is_there_is_not_downloaded_again(host: Host) -> None:
    folder = find(host.url)
    host.asked()
    assert find(host.url, lambda *_: pytest.fail("nothing is to be done")) == folder
    assert host.asked() == [("manifest.json", None)]


@pytest.mark.parametrize("suffix", ["/", "/manifest.json", "//", "#weights"])
def test_ways_to_write_an_address(host: Host, suffix: str) -> None:
    folder = find(host.url)
    host.asked()
    assert find(host.url.replace("http://", "HTTP://") + suffix) == folder
    assert host.asked() == [("manifest.json", None)]


def test_an_address_with_a_query_and_signs(host: Host) -> None:
    check(find(f"{host.address}/models/größe 1+2%20?key=a b&c=%C3%A4"), host.folder)
    assert {path.rpartition("/")[0] for path in host.paths} == {"/models/gr%C3%B6%C3%9Fe%201+2%20"}
    assert {path.partition("?")[2] for path in host.paths} == {"key=a%20b&c=%C3%A4"}


def test_two_addresses_do_not_mix(host: Host, versions: tuple[Path, Path]) -> None:
    first = find(host.url)
    host.folder = versions[1]
    check(find(f"{host.address}/models/other"), versions[1])
    check(first, versions[0])


@pytest.mark.parametrize(
    "url",
    ["http://", "https:///path", "http://host:port/x", "http://[::1/x", "http://a..b/x", "http://ho st/x"],
)
def test_what_is_not_an_address(url: str) -> None:
    fails(url, "this is not a web address")


def test_a_password_in_an_address() -> None:
    fails("http://me:secret@host/x", "this is not a web address that can be used")


def test_a_dropped_connection_is_gone_on_with(host: Host, cache: Path) -> None:
    host.replies[FIRST] = [drop(10_000), drop(5_000), whole]
    check(find(host.url), host.folder)
    ranges = [asked for name, asked in host.asked() if name == FIRST]
    assert ranges == [None, "bytes=10000-", "bytes=15000-"]


def test_a_connection_that_drops_often_but_gets_ahead(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2_000)
    host.replies[FIRST] = [drop(2_000)]
    check(find(host.url), host.folder)
    assert len([name for name, _ in host.asked() if name == FIRST]) > 10


def test_a_connection_that_gets_no_further(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.replies[FIRST] = [drop(10_000), drop(0)]
    size = (host.folder / FIRST).stat().st_size
    fails(
        host.url,
        rf"{FIRST}: the download stopped at 10,000 of {size:,} bytes \(the connection was closed\); "
        "run it again, it goes on from there$",
    )
    assert len([name for name, _ in host.asked() if name == FIRST]) == 4


def test_the_next_run_goes_on(host: Host, cache: Path) -> None:
    host.replies[SECOND] = [drop(7_000), drop(0)]
    fails(host.url, "stopped at 7,000")
    assert parts(cache) == [f"{SECOND}.part"]
    assert not list(cache.rglob("manifest.json"))  # so that nothing takes it for whole
    host.asked()
    del host.replies[SECOND]
    seen: list[int] = []
    check(find(host.url, lambda step: seen.append(step.done)), host.folder)
    names = ["manifest.json", *FILES[FILES.index(SECOND) :]]
    assert host.asked() == [(name, "bytes=7000-" if name == SECOND else None) for name in names]
    assert seen == sorted(seen)


@pytest.mark.parametrize("other", [no_ranges, wrong_range], ids=["all", "another part"])
def test_a_server_that_does_not_send_parts(host: Host, other: Reply) -> None:
    replies = [drop(10_000), other, whole] if other is wrong_range else [drop(10_000), other]
    host.replies[FIRST] = replies
    check(find(host.url), host.folder)


def test_a_server_that_does_not_send_parts_and_always_drops(host: Host) -> None:
    host.replies[FIRST] = [lambda handler, data: handler.send(200, data, most=10_000)]
    fails(host.url, "stopped at 10,000")
    assert len([name for name, _ in host.asked() if name == FIRST]) == 4


def test_a_server_that_does_not_tell_sizes(host: Host) -> None:
    host.replies[FIRST] = [unsized(10_000), unsized(SHARD)]
    check(find(host.url), host.folder)


def leave_part(host: Host, cache: Path, data: bytes) -> None:
    """Make `data` what an earlier run has left of the first shard."""
    host.replies[FIRST] = [drop(100), drop(0)]
    fails(host.url, "stopped")
    next(cache.rglob(f"{FIRST}.part")).write_bytes(data)
    del host.replies[FIRST]
    host.asked()


def test_a_part_that_is_whole(host: Host, cache: Path) -> None:
    leave_part(host, cache, (host.folder / FIRST).read_bytes())
    check(find(host.url), host.folder)
    assert FIRST not in [name for name, _ in host.asked()]


def test_a_part_that_is_too_long(host: Host, cache: Path) -> None:
    leave_part(host, cache, (host.folder / FIRST).read_bytes() + b"more")
    check(find(host.url), host.folder)


def test_a_part_that_is_longer_than_the_hosted_file(host: Host, cache: Path, versions: tuple[Path, Path]) -> None:
    """The server answers 416 and then has too little."""
    leave_part(host, cache, (host.folder / FIRST).read_bytes()[:-1])
    host.replies[FIRST] = [lambda handler, data: handler.send_part(data[:1000])]
    fails(host.url, rf"{FIRST}: the server has 1000 bytes where manifest.json leaves \d+; the hosted folder is not")
    assert [asked for name, asked in host.asked() if name == FIRST][1:] == [None]


def test_a_page_in_the_place_of_a_file(host: Host) -> None:
    host.replies["vocabulary.bin"] = [answer(200, b"<html>Not here</html>")]
    fails(host.url, r"vocabulary.bin: the server has 21 bytes where manifest.json leaves \d+")


def test_damaged_on_the_way(host: Host, cache: Path) -> None:
    host.replies[FIRST] = [flipped, whole]
    fails(host.url, rf"^{host.url}/{FIRST}: its SHA-256 is not the one in manifest.json, so it was deleted; run the")
    assert not parts(cache) and not list(cache.rglob(FIRST))
    check(find(host.url), host.folder)


def test_a_damaged_part(host: Host, cache: Path) -> None:
    leave_part(host, cache, b"not what has been there before")
    fails(host.url, f"{FIRST}: its SHA-256")
    check(find(host.url), host.folder)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_falls_silent(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.replies[FIRST] = [stall(12_345), silent]
    fails(
        host.url,
        r"stopped at 12,345 of \d\d,\d{3} bytes \(the server was silent for 0.2 s\); run it again, it goes on",
    )
    del host.replies[FIRST]
    host.asked()
    monkeypatch.setattr(module, "_TIMEOUT", 20.0)
    check(find(host.url), host.folder)
    assert (FIRST, "bytes=12345-") in host.asked()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_silent_from_the_start(host: Host) -> None:
    host.replies["manifest.json"] = [silent]
    fails(host.url, r"manifest.json: cannot be downloaded \(the server was silent for 0.2 s\); try again later")


def test_a_manifest_that_is_cut_short(host: Host) -> None:
    host.replies["manifest.json"] = [drop(100), whole]
    check(find(host.url), host.folder)
    host.replies["manifest.json"] = [drop(100)]
    assert find(host.url)  # the one in the cache
    fails(f"{host.address}/models/other", r"other/manifest.json: cannot be downloaded \(IncompleteRead\(100 bytes")


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fails(f"http://127.0.0.1:{unused.getsockname()[1]}/x", r"x/manifest.json: cannot be downloaded \(.*refused\)")


def test_what_the_server_does_not_have(host: Host) -> None:
    fails(
        f"{host.address}/x", rf"^{host.address}/x/manifest.json: the server answers 404 Not Found; check the address"
    )
    host.replies[SECOND] = [answer(404)]
    fails(host.url, f"^{host.url}/{SECOND}: the server answers 404 Not Found; check the address, and that all files")
    assert [name for name, _ in host.asked()].count(SECOND) == 1


def test_a_server_in_trouble(host: Host) -> None:
    host.replies["manifest.json"] = [answer(503), whole]
    host.replies[FIRST] = [answer(500), answer(429), whole]
    check(find(host.url), host.folder)
    host.replies["manifest.json"] = [answer(503)]
    fails(f"{host.address}/models/other", r"cannot be downloaded \(the server answers 503 Service Unavailable\)")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_not_a_model_folder(host: Host, body: bytes) -> None:
    host.replies["manifest.json"] = [answer(200, body)]
    fails(host.url, f"^{host.url}/manifest.json: this is not the manifest of a model folder; give the address of")


def test_a_newer_format(host: Host) -> None:
    content = json.loads((host.folder / "manifest.json").read_bytes()) | {"format": 2}
    host.replies["manifest.json"] = [answer(200, json.dumps(content).encode())]
    fails(host.url, f"^{host.url}/manifest.json: the model folder has format 2, .*upgrade it$")


def test_a_manifest_of_another_kind(host: Host) -> None:
    host.replies["manifest.json"] = [answer(200, b'{"name": "A web app"}')]
    fails(host.url, f"^{host.url}/manifest.json: the manifest is damaged")


def test_redirects(host: Host) -> None:
    for name in ["manifest.json", *FILES]:
        host.replies[f"/latest/{name}"] = [redirect(f"/models/tiny/{name}")]
    host.replies[f"/models/tiny/{FIRST}"] = [drop(10_000), whole]
    check(find(f"{host.address}/latest"), host.folder)
    assert [asked for name, asked in host.asked() if name == FIRST] == [None, None, "bytes=10000-", "bytes=10000-"]


def test_redirects_in_a_circle(host: Host) -> None:
    host.replies["/a/manifest.json"] = [redirect("/b/manifest.json")]
    host.replies["/b/manifest.json"] = [redirect("/a/manifest.json")]
    fails(f"{host.address}/a", "a/manifest.json: the server answers 302 .*infinite loop")


def test_a_newer_version_takes_the_place_of_the_older_one(host: Host, versions: tuple[Path, Path]) -> None:
    old = find(host.url)
    host.folder = versions[1]
    new = find(host.url)
    check(new, versions[1])
    assert new != old and not old.exists()
    assert find(host.url) == new


@pytest.mark.parametrize("trouble", [answer(503), silent, drop(100)], ids=["503", "silent", "dropped"])
def test_without_the_server_the_cache_will_do(host: Host, trouble: Reply, request: pytest.FixtureRequest) -> None:
    folder = find(host.url)
    request.getfixturevalue("impatient")
    host.replies["manifest.json"] = [trouble]
    assert find(host.url) == folder
    host.asked()
    host.close()
    assert find(host.url) == folder


def test_a_newer_version_that_is_not_whole_leaves_the_older_one(
    host: Host, versions: tuple[Path, Path], cache: Path
) -> None:
    old = find(host.url)
    host.folder = versions[1]
    host.replies[SECOND] = [drop(100), drop(0)]
    fails(host.url, "stopped at 100")
    host.replies["manifest.json"] = [answer(503)]
    assert find(host.url) == old
    check(old, versions[0])


def test_a_cache_that_is_not_whole_does_not_do(host: Host) -> None:
    folder = find(host.url)
    (folder / SECOND).unlink()
    host.replies["manifest.json"] = [answer(503)]
    fails(host.url, "cannot be downloaded")


def test_of_two_versions_in_the_cache_the_newer_one_will_do(
    host: Host, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    """The older one could not be deleted."""
    old = find(host.url)
    shutil.copytree(old, tmp_path / "old")
    host.folder = versions[1]
    new = find(host.url)
    shutil.copytree(tmp_path / "old", old)
    os.utime(old / "manifest.json", (0, 0))
    host.replies["manifest.json"] = [answer(503)]
    assert find(host.url) == new
    os.utime(new / "manifest.json", (-1, -1))
    assert find(host.url) == old


def test_a_process_that_ended_before_the_manifest_was_written(host: Host) -> None:
    folder = find(host.url)
    (folder / "manifest.json").unlink()
    host.asked()
    total = sum((folder / name).stat().st_size for name in FILES)
    seen: list[Progress] = []
    assert find(host.url, seen.append) == folder
    assert seen == [Progress("downloading", total, total)]
    check(folder, host.folder)
    assert host.asked() == [("manifest.json", None)]


def test_what_is_missing_in_the_cache_is_downloaded(host: Host) -> None:
    folder = find(host.url)
    (folder / FIRST).unlink()
    with (folder / SECOND).open("ab") as file:
        file.write(b"more")
    host.asked()
    assert find(host.url) == folder
    check(folder, host.folder)
    assert host.asked() == [(name, None) for name in ("manifest.json", FIRST, SECOND)]


def test_a_full_disk(host: Host, cache: Path) -> None:
    """/dev/full takes the place of an unfinished file: every write to it fails as on a full disk."""
    host.replies[FIRST] = [drop(0)]
    fails(host.url, "stopped at 0")
    part = next(cache.rglob(f"{FIRST}.part"))
    part.unlink()
    part.symlink_to("/dev/full")
    del host.replies[FIRST]
    fails(
        host.url, f"{FIRST}.part: the disk is full; make room, or set GEMMA_WGPU_CACHE to another place, and run it"
    )
    part.unlink()
    check(find(host.url), host.folder)


def test_a_cache_that_cannot_be_written(host: Host, cache: Path) -> None:
    cache.write_text("in the way")
    fails(host.url, r"cannot be written \(Not a directory\); set GEMMA_WGPU_CACHE to a folder that can$")


def process(url: str) -> subprocess.Popen[str]:
    script = "import sys; from gemma_wgpu.fetch.hub import find; print(find(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True)


def test_several_processes_at_once(host: Host) -> None:
    processes = [process(host.url) for _ in range(3)]
    folders = {run.communicate()[0].strip() for run in processes}
    assert [run.returncode for run in processes] == [0, 0, 0]
    (folder,) = folders
    check(Path(folder), host.folder)
    names = [name for name, _ in host.asked()]
    assert sorted(names) == sorted([*["manifest.json"] * 3, *FILES])  # one has downloaded, the others have waited


def test_several_threads_at_once(host: Host) -> None:
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(find, [host.url] * 4))
    check(folder, host.folder)
    names = [name for name, _ in host.asked()]
    assert sorted(names) == sorted([*["manifest.json"] * 4, *FILES])


def test_a_killed_process_is_in_nobodys_way(host: Host) -> None:
    host.replies[FIRST] = [stall(20_000), whole]
    with process(host.url) as run:
        assert host.stalled.wait(60)
        run.send_signal(signal.SIGKILL)
    check(find(host.url), host.folder)


class Clock:
    """Stands in for `time`: sleeping takes no time in truth, and by this clock far more than is asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 100


def test_another_process_is_waited_for_while_it_gets_ahead(
    host: Host, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_part(host, cache, b"")
    part, content = next(cache.rglob(f"{FIRST}.part")), (host.folder / FIRST).read_bytes()
    monkeypatch.setattr(module, "time", Clock())
    seen: list[int] = []

    def get_ahead(step: Progress) -> None:
        """Do what the other process does meanwhile: it ends when it has 10,000 bytes of the shard."""
        seen.append(step.done)
        if not other.closed and part.stat().st_size == 10_000:
            other.close()
        elif not other.closed:
            part.write_bytes(content[: part.stat().st_size + 1000])

    with next(cache.rglob("lock")).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fails(host.url, "lock: another process is downloading this model and gets no further; end it, or wait$")
        check(find(host.url, get_ahead), host.folder)
    assert len([asked for name, asked in host.asked() if (name, asked) == (FIRST, "bytes=10000-")]) == 1
    assert seen == sorted(seen)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("GEMMA_WGPU_CACHE", "~/models")
    assert cache_folder() == Path("/home/me/models")
    monkeypatch.delenv("GEMMA_WGPU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/gemma_wgpu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/gemma_wgpu")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/Users/me/AppData/Local")
    assert cache_folder() == Path("/Users/me/AppData/Local/gemma_wgpu")


COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Does as much of Hugging Face's work as downloads take; the folders in `server.root` are its repositories."""

    server: "HubServer"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            _, _, _, user, name, *rest = path.split("/")
            self.api(f"{user}/{name}", rest)
            return
        _, user, name, _, _, file = path.split("/", 5)
        stored = self.server.root / user / name / file
        if stored.is_file():
            self.server.downloaded.append(file)
            self.send(200, stored.read_bytes())
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def api(self, repository: str, rest: list[str]) -> None:
        folder = self.server.root / repository
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        content: Any = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        if rest[:1] == ["tree"]:
            content = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": sha256(name.encode()).hexdigest()}
                for name, path in zip(names, files, strict=True)
            ]
        if repository.startswith("gated/"):
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not files:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        tag = f'"{sha256(data).hexdigest()}"'
        for key, value in {"X-Repo-Commit": COMMIT, "ETag": tag, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.root = root
        self.downloaded: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture(scope="module")
def hub(versions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")

    def repository(name: str, *files: str) -> None:
        for file in files:
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text(f"{name} {file}")

    repository("some/folder", "README.md", "onnx/model.onnx")
    shutil.copytree(versions[0], root / "some" / "folder", dirs_exist_ok=True)
    repository("some/plain", "README.md", "config.json", "tokenizer.json", "model.safetensors", "model.gguf")
    repository("some/one", "README.md", "config.json", "only-Q4_0.gguf", "mmproj-F16.gguf")
    repository("some/several", "b-Q8_0.gguf", "a-Q4_0.gguf", "more/c.gguf")
    repository("some/none", "README.md")
    repository("gated/model", "model.safetensors")
    server = HubServer(root)
    yield server
    server.shutdown()
    server.server_close()


FIND = """
import json, sys
from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.hub import find
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = str(find(name))
    except ModelError as error:
        found[name] = f"ModelError: {error}"
print(json.dumps(found))
"""


def found(address: str, home: Path, *names: str) -> dict[str, str]:
    """Return what `find` gives for each name in a new process, where huggingface_hub asks the server at `address`."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        **{"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    }
    run = subprocess.run([sys.executable, "-c", FIND, *names], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    paths: dict[str, str] = json.loads(run.stdout)
    return paths


def test_hugging_face(hub: HubServer, versions: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["some/folder", "some/plain", "some/one", "some/several/a-Q4_0.gguf", "some/several/more/c.gguf"]
    paths = {name: Path(path) for name, path in found(hub.address, tmp_path, *names).items()}
    check(paths["some/folder"], versions[0])
    with open_checkpoint(paths["some/folder"]) as checkpoint:
        assert isinstance(checkpoint, FolderCheckpoint)
    assert {path.name for path in paths["some/plain"].iterdir()} == {
        *("config.json", "tokenizer.json", "model.safetensors")
    }
    assert paths["some/one"].read_text() == "some/one only-Q4_0.gguf"
    assert paths["some/several/a-Q4_0.gguf"].read_text() == "some/several a-Q4_0.gguf"
    assert paths["some/several/more/c.gguf"].read_text() == "some/several more/c.gguf"
    assert (paths["some/one"].parent / "mmproj-F16.gguf").read_text() == "some/one mmproj-F16.gguf"
    assert not {"b-Q8_0.gguf", "onnx/model.onnx", "model.gguf"} & set(hub.downloaded)
    with socket.socket() as unused:  # no connection: what was downloaded is found again
        unused.bind(("127.0.0.1", 0))
        offline = found(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, *names)
    assert {name: Path(path) for name, path in offline.items()} == paths


def test_hugging_face_does_not_have_it(hub: HubServer, tmp_path: Path) -> None:
    errors = found(
        hub.address, tmp_path, "some/several", "some/several/x.gguf", "some/none/x.gguf", "gone/model", "gated/model"
    )
    assert errors["some/several"] == (
        "ModelError: some/several: there are several models; choose one of some/several/a-Q4_0.gguf, "
        "some/several/b-Q8_0.gguf, some/several/more/c.gguf"
    )
    assert errors["some/several/x.gguf"] == (
        "ModelError: some/several/x.gguf: there is no such file in that repository; choose one of "
        "some/several/a-Q4_0.gguf, some/several/b-Q8_0.gguf, some/several/more/c.gguf"
    )
    assert errors["some/none/x.gguf"].endswith("there is no such file in that repository; it has no .gguf file")
    assert (
        "gone/model: there is no such file or folder, and it cannot be downloaded: there is no such repository"
        in errors["gone/model"]
    )
    assert "its terms must be accepted" in errors["gated/model"]


def test_hugging_face_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = found(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, "some/one")["some/one"]
    assert error.startswith("ModelError: some/one: there is no such file or folder, and it cannot be downloaded: ")
    assert "\n" not in error


def test_a_connection_to_hugging_face_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a failure does not mean that there is no such file."""

    def download(*_: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    files = SimpleNamespace(siblings=[SimpleNamespace(rfilename="x.gguf")])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: files)
    fails(
        "some/one/x.gguf",
        "^some/one/x.gguf: there is no such file or folder, and it cannot be downloaded: no connection$",
    )
