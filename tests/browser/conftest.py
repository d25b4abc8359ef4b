"""A Chromium with WebGPU on its software adapter, in which Pyodide runs this package from a plain static server."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright

from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests import vision
from tests.host import Host
from tests.reference import random_1b

ROOT = Path(__file__).parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"
TINY_VISION = ROOT / "site" / "content" / "models" / "tiny-vision"
SUB_PATH = "some/project"
SMALL = random_1b.CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "max_position_embeddings": 256,
}


def complaints_of(page: Page, origins: Sequence[str]) -> list[str]:
    """What a page logs as an error, and its requests to anywhere else than `origins`, as they come."""
    complaints: list[str] = []

    def log(message: ConsoleMessage) -> None:
        if message.type == "error":
            complaints.append(message.text)

    def check(request: Request) -> None:
        if not request.url.startswith((*origins, "data:", "blob:")):
            complaints.append(f"request to {request.url}")

    page.on("console", log)
    page.on("pageerror", lambda error: complaints.append(error.message))
    page.on("request", check)
    return complaints


class Chromium:
    """The page of index.html. Whatever it logs as an error, and requests to anywhere else, are in `complaints`."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origins = [origin]  # to which requests are expected
        self.complaints = complaints_of(page, self.origins)
        page.goto(f"{origin}/{SUB_PATH}/")
        self._wait()

    def reload(self) -> None:
        """The page anew, and the worker."""
        self.page.reload()
        self._wait()

    def _wait(self) -> None:
        self.page.get_by_text("ready").wait_for()

    def run(self, code: str, *, where: str = "worker", can_block: bool = True) -> Any:
        """The last expression of Python `code`, in the "page" or the "worker". A failure there is one here."""
        try:
            return self.page.evaluate(
                f"call => in{where.capitalize()}(...call)",  # which index.html defines
                [code, can_block],
            )
        except Error as error:
            pytest.fail(error.message, pytrace=False)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server serves: Pyodide, the sources of the package and of the tests, and the page."""
    pyodide = ROOT / "build" / "pyodide"
    subprocess.run([sys.executable, ROOT / "tools" / "fetch_pyodide.py", pyodide], check=True)
    root = tmp_path_factory.mktemp("site")
    site = root / SUB_PATH
    site.mkdir(parents=True)
    (site / "pyodide").symlink_to(pyodide)
    for file in ("index.html", "worker.mjs", "python.mjs"):
        shutil.copy(Path(__file__).parent / file, site)
    with ZipFile(site / "sources.zip", "w") as archive:
        for folder in ("gemma_wgpu", "shaders", "tests"):
            for path in (ROOT / folder).rglob("*"):
                if path.suffix in (".py", ".js", ".wgsl") or (path.parent == vision.FOLDER and path.suffix == ".npz"):
                    archive.write(path, path.relative_to(ROOT))
    return root


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The origin of a plain static server of `root`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make site` builds it."""
    folder = tmp_path_factory.mktemp("root") / SUB_PATH
    subprocess.run([sys.executable, ROOT / "site" / "build.py", "--output", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def origin(built: Path) -> Iterator[str]:
    """The origin of a server of the site."""
    with serving(built.parents[len(Path(SUB_PATH).parts) - 1]) as origin:
        yield origin


@pytest.fixture(scope="session")
def server(site: Path) -> Iterator[str]:
    """The origin of a server of `site`."""
    with serving(site) as origin:
        yield origin


@pytest.fixture(scope="package")  # it leaves an event loop running in this thread, which other tests could not bear
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "chromium is missing; tools/install_chromium.sh installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
            ignore_default_args=["--disable-gpu"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def chromium(browser: Browser, server: str) -> Chromium:
    return Chromium(browser.new_context().new_page(), server)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model, in several shards."""
    work = tmp_path_factory.mktemp("small")
    with open_checkpoint(random_1b.write(work / "source", SMALL)) as source:
        convert(source, work / "model", quant="int4", shard_size=200_000)
    return work / "model"


@pytest.fixture
def host(small_model: Path, chromium: Chromium) -> Iterator[Host]:
    """A server of the small model, of another origin than the page's."""
    host = Host(small_model)
    chromium.origins.append(host.address)
    yield host
    chromium.origins.remove(host.address)
    host.close()


@pytest.fixture(autouse=True)
def no_complaints(chromium: Chromium) -> Iterator[None]:
    yield
    complaints = list(chromium.complaints)
    chromium.complaints.clear()
    assert complaints == []


@pytest.fixture
def url(folder: Path, chromium: Chromium) -> Iterator[str]:
    """The address of the module's own model `folder`, which the browser may ask."""
    host = Host(folder)
    chromium.origins.append(host.address)
    yield host.url
    chromium.origins.remove(host.address)
    host.close()
