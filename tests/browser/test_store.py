"""Loads model folders by their address: some of it comes over the network, some is kept, and much can go wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma_wgpu.weights.manifest import Manifest
from tests.browser.conftest import SUB_PATH, Chromium
from tests.host import Host, Reply, answer, drop, flipped, no_ranges, reset, stall, whole

SMALL_FILES = ["manifest.json", "config.json", "vocabulary.bin"]
HIDE_FILES = "Object.defineProperty(navigator.storage, 'getDirectory', { value: undefined, configurable: true })"
HIDE_CACHES = "Object.defineProperty(globalThis, 'caches', { value: undefined, configurable: true })"
SHOW = "delete navigator.storage.getDirectory; delete globalThis.caches"


@pytest.fixture
def url(host: Host, request: pytest.FixtureRequest) -> str:
    """Return an address for this test alone, from which nothing can be kept yet."""
    return f"{host.address}/models/{re.sub('[^a-z_]', '-', request.node.name)}"


@pytest.fixture
def shards(small_model: Path) -> list[str]:
    names = [shard.name for shard in manifest(small_model).shards]
    assert len(names) > 3
    return names


def manifest(folder: Path) -> Manifest:
    return Manifest.from_json((folder / "manifest.json").read_bytes(), str(folder))


def load(chromium: Chromium, url: str, where: str = "worker") -> dict[str, Any]:
    result: dict[str, Any] = json.loads(
        chromium.run(f"from tests.browser.inside import load; await load({url!r})", where=where)
    )
    return result


def loads(chromium: Chromium, url: str, where: str = "worker") -> None:
    result = load(chromium, url, where)
    assert (result["error"], result["warnings"]) == (None, [])


def fails(chromium: Chromium, url: str, message: str) -> None:
    """The error is one line."""
    error = load(chromium, url)["error"]
    assert error is not None
    assert re.fullmatch(message, error)


def broken(after: int) -> Reply:
    """Break the connection when so many bytes are on the way, and the browser has had time to read them."""
    return drop(after, linger=0.5)


def asked(host: Host) -> list[str]:
    """Return the files that were asked for since the last call."""
    return [name for name, _ in host.asked()]


def files(chromium: Chromium, url: str) -> dict[str, int]:
    """Return the names and the sizes of a model's files that are kept."""
    code = (
        "import json\n"
        "from gemma_wgpu.fetch import browser_store as module\n"
        f"json.dumps((await module._models(await module._open_store())).get({url!r}, ('', {{}}))[1])"
    )
    found: dict[str, int] = json.loads(chromium.run(code))
    return found


def whole_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@contextmanager
def network_errors(chromium: Chromium) -> Iterator[None]:
    """Ignore that the browser logs requests that fail, as they do here."""
    yield
    chromium.complaints[:] = [
        complaint
        for complaint in chromium.complaints
        if not re.search(r"Failed to load resource|blocked by CORS policy", complaint)
    ]


@contextmanager
def without(chromium: Chromium, *hide: str) -> Iterator[None]:
    """Hide some of the browser's storage from the worker."""

    def run(script: str) -> None:
        chromium.run(f"from pyodide.code import run_js\nrun_js({script!r})\nNone")

    run("; ".join(hide))
    yield
    run(SHOW)


@pytest.mark.parametrize("where", ["page", "worker"])
def test_the_second_load_fetches_no_weights(
    chromium: Chromium, host: Host, url: str, shards: list[str], small_model: Path, where: str
) -> None:
    loads(chromium, url, where)
    assert asked(host) == [*SMALL_FILES, *shards]
    chromium.reload()
    loads(chromium, url, where)
    assert asked(host) == ["manifest.json"]
    kept = files(chromium, url)
    assert kept.pop("address") == len(url)
    assert kept == whole_sizes(small_model)


def test_progress(chromium: Chromium, url: str, small_model: Path) -> None:
    total = sum(shard.nbytes for shard in manifest(small_model).shards)
    for _ in range(2):
        steps = [tuple(step) for step in load(chromium, url)["progress"]]
        assert len(steps) > 3
        assert steps == sorted(steps)
        assert {of for _, of in steps} == {total}
        assert steps[-1][0] == total


def test_without_jspi(chromium: Chromium, url: str) -> None:
    code = f"import asyncio\nfrom tests.browser.inside import load\nasyncio.ensure_future(load({url!r}))"
    for where in ("page", "worker"):
        assert json.loads(chromium.run(code, where=where, can_block=False))["error"] is None


def test_addresses_relative_to_the_page(chromium: Chromium, site: Path, small_model: Path) -> None:
    """They are relative to the worker too, which is beside the page."""
    (site / SUB_PATH / "models").symlink_to(small_model.parent)
    for where in ("page", "worker"):
        for name in ("./models/model", "../project/models/model/", f"/{SUB_PATH}/models/model/manifest.json"):
            loads(chromium, name, where)
    kept = json.loads(
        chromium.run("import json\nfrom gemma_wgpu import cache\njson.dumps([m.url for m in cache.list()])")
    )
    assert [url for url in kept if url.startswith(chromium.origins[0])] == [
        f"{chromium.origins[0]}/{SUB_PATH}/models/model"
    ]


def test_a_hugging_face_id(chromium: Chromium, host: Host, shards: list[str], small_model: Path) -> None:
    """The repository has a model folder."""
    headers = {"Access-Control-Allow-Origin": "*"}
    origin = "https://huggingface.co"
    chromium.origins.append(origin)
    chromium.page.context.route(
        f"{origin}/someone/small/resolve/main/*",
        lambda route: route.fulfill(path=small_model / route.request.url.rpartition("/")[2], headers=headers),
    )
    loads(chromium, "someone/small")
    chromium.page.context.unroute_all()
    chromium.origins.remove(origin)


def test_a_load_that_is_cancelled(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    host.replies[shards[1]] = [stall(100_000)]
    chromium.run(f"from tests.browser.inside import cancelled; await cancelled({url!r})")
    host.replies.clear()
    host.asked()
    loads(chromium, url)
    assert host.asked()[:2] == [("manifest.json", None), (shards[1], "bytes=100000-")]


def test_a_server_that_stops_inside_a_shard(
    chromium: Chromium, host: Host, url: str, shards: list[str], small_model: Path
) -> None:
    name = shards[1]
    host.replies[name] = [broken(150_000), reset]
    with network_errors(chromium):
        error = load(chromium, url)["error"]
    assert len(asked(host)) == len(SMALL_FILES) + 2 + 3
    came = files(chromium, url)[f"{name}.part"]
    assert 0 < came <= 150_000
    assert re.fullmatch(
        f"{url}/{name}: stopped at {came} of {(small_model / name).stat().st_size} bytes: no answer .*; "
        "load the model again, it goes on from there",
        error,
    )
    host.replies.clear()
    loads(chromium, url)
    assert host.asked() == [("manifest.json", None), (name, f"bytes={came}-"), *((name, None) for name in shards[2:])]
    assert f"{name}.part" not in files(chromium, url)


def test_a_server_in_trouble(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    host.replies[shards[2]] = [broken(100_000), answer(503), whole]
    with network_errors(chromium):
        loads(chromium, url)
    whole_one, *rest = [area for name, area in host.asked() if name == shards[2]]
    assert whole_one is None
    assert len(rest) == 2
    assert all(re.fullmatch(r"bytes=\d+-", area or "") for area in rest)


def test_a_server_that_sends_no_parts(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    host.replies[shards[1]] = [broken(100_000), no_ranges]
    with network_errors(chromium):
        loads(chromium, url)


def test_a_damaged_shard_in_the_browser(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    loads(chromium, url)
    asked(host)
    chromium.run(
        "from gemma_wgpu.fetch import browser_store as module\n"
        "store = await module._open_store()\n"
        f"home, _ = (await module._models(store))[{url!r}]\n"
        f"data = await store.read(home, {shards[1]!r})\n"
        "data[1000] ^= 1\n"
        f"await store.keep(home, {shards[1]!r}, data)\n"
        "None"
    )
    for expected in (["manifest.json", shards[1]], ["manifest.json"]):
        loads(chromium, url)
        assert asked(host) == expected


def test_a_damaged_shard_on_the_server(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    host.replies[shards[1]] = [flipped]
    for _ in range(2):
        fails(chromium, url, f"{url}/{shards[1]}: its SHA-256 is not the one in the manifest, .*")
        assert asked(host).count(shards[1]) == 2
        assert {shards[1], f"{shards[1]}.part"}.isdisjoint(files(chromium, url))
    host.replies[shards[1]] = [flipped, whole]
    loads(chromium, url)


def test_a_damaged_beginning_is_fetched_again(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    host.replies[shards[1]] = [lambda handler, data: broken(100_000)(handler, b"x" + data[1:]), answer(404)]
    with network_errors(chromium):
        fails(chromium, url, f"{url}/{shards[1]}: the server answers 404 .*; check the address.*")
    came = files(chromium, url)[f"{shards[1]}.part"]
    host.replies.clear()
    host.asked()
    loads(chromium, url)
    assert [area for name, area in host.asked() if name == shards[1]] == [f"bytes={came}-", None]


def test_a_newer_version_takes_the_place(
    chromium: Chromium, host: Host, url: str, small_model: Path, tmp_path: Path
) -> None:
    older = tmp_path / "model"
    older.mkdir()
    for path in small_model.iterdir():
        (older / path.name.replace("weights-", "old-weights-")).write_bytes(path.read_bytes())
    listing = (small_model / "manifest.json").read_text().replace("weights-", "old-weights-")
    (older / "manifest.json").write_text(listing)
    host.folder = older
    loads(chromium, url)
    host.folder = small_model
    loads(chromium, url)
    assert files(chromium, url) == whole_sizes(small_model) | {"address": len(url)}


def test_a_server_out_of_reach(chromium: Chromium, host: Host, url: str) -> None:
    with network_errors(chromium):
        host.replies[f"/models/{url.rpartition('/')[2]}/manifest.json"] = [reset]
        fails(chromium, url, f"{url}/manifest.json: no answer .*; the server is out of reach, or .* \\(CORS\\)")
        host.replies.clear()
        loads(chromium, url)
        host.replies["manifest.json"] = [reset]
        loads(chromium, url)  # what is kept


def test_a_server_that_other_sites_may_not_read(chromium: Chromium, host: Host, url: str) -> None:
    host.open_to_other_sites = False
    with network_errors(chromium):
        fails(chromium, url, f"{url}/manifest.json: no answer .*; the server is out of reach, or .* \\(CORS\\)")


def test_no_model_folder(chromium: Chromium, host: Host, url: str) -> None:
    with network_errors(chromium):
        fails(
            chromium,
            f"{host.address}/x",
            f"{host.address}/x/manifest.json: the server answers 404 Not Found; check the address, .*",
        )
    for body, message in (
        (b"<html>", "this is not the manifest of a model folder; give the address of a folder that has one"),
        (b'{"format": 99}', "the model folder has format 99, and this gemma-wgpu reads 1; upgrade it"),
    ):
        host.replies["manifest.json"] = [answer(200, body)]
        fails(chromium, url, f"{url}/manifest.json: {message}")
    assert files(chromium, url) == {}


def test_the_cache_api_where_there_are_no_files(
    chromium: Chromium, host: Host, url: str, shards: list[str], small_model: Path
) -> None:
    with without(chromium, HIDE_FILES):
        host.replies[shards[1]] = [broken(150_000), answer(404)]
        with network_errors(chromium):
            fails(chromium, url, f"{url}/{shards[1]}: the server answers 404 .*")
        host.replies.clear()
        asked(host)
        loads(chromium, url)
        assert asked(host) == ["manifest.json", *shards[1:]]
        loads(chromium, url)
        assert asked(host) == ["manifest.json"]
        assert files(chromium, url) == whole_sizes(small_model) | {"address": len(url)}
        chromium.run(f"from gemma_wgpu import cache\ncache.delete({url!r})")
        assert files(chromium, url) == {}
    assert files(chromium, url) == {}


def test_no_storage_at_all(chromium: Chromium, host: Host, url: str, shards: list[str]) -> None:
    with without(chromium, HIDE_FILES, HIDE_CACHES):
        for _ in range(2):
            result = load(chromium, url)
            assert result["error"] is None
            assert all(message.startswith(f"{url} is not kept for next time: ") for message in result["warnings"])
            assert result["warnings"]
            assert asked(host) == [*SMALL_FILES, *shards]


def test_storage_that_is_full(chromium: Chromium, host: Host, url: str, shards: list[str], small_model: Path) -> None:
    session = chromium.page.context.new_cdp_session(chromium.page)

    def allow(**quota: int) -> None:
        session.send("Storage.overrideQuotaForOrigin", {"origin": chromium.origins[0], **quota})

    usage = chromium.page.evaluate("async () => (await navigator.storage.estimate()).usage")
    allow(quotaSize=usage + 500_000)
    try:
        result = load(chromium, url)
    finally:
        allow()
    assert result["error"] is None
    assert any("storage is full; gemma_wgpu.cache lists and deletes" in message for message in result["warnings"])
    kept, sizes = files(chromium, url), whole_sizes(small_model) | {"address": len(url)}
    assert 0 < len([name for name in kept if name in shards]) < len(shards)
    assert kept == {name: sizes[name] for name in kept}
    asked(host)
    loads(chromium, url)
    assert asked(host) == ["manifest.json", *(name for name in shards if name not in kept)]


def test_two_pages_at_once(chromium: Chromium, host: Host, url: str, small_model: Path) -> None:
    code = f"from tests.browser.inside import load; await load({url!r})"
    other = chromium.page.context.new_page()
    other.goto(chromium.page.url)
    other.get_by_text("ready").wait_for()
    for page in (chromium.page, other):
        page.evaluate("code => { window.result = inPage(code, true) }", code)
    for page in (chromium.page, other):
        assert json.loads(page.evaluate("() => window.result"))["error"] is None
    other.close()
    asked(host)
    loads(chromium, url)
    assert asked(host) == ["manifest.json"]
    assert files(chromium, url) == whole_sizes(small_model) | {"address": len(url)}


@pytest.mark.parametrize("call", ["{}_async", "{}"])
def test_the_public_cache(chromium: Chromium, host: Host, url: str, small_model: Path, call: str) -> None:
    waiting = "await " if "async" in call else ""

    def run(expression: str) -> Any:
        return json.loads(chromium.run(f"import json\nfrom gemma_wgpu import cache\njson.dumps({expression})"))

    def listed() -> dict[str, int]:
        models: dict[str, int] = run(f"{{m.url: m.nbytes for m in {waiting}cache.{call.format('list')}()}}")
        assert sum(models.values()) == run(f"{waiting}cache.{call.format('size')}()")
        return models

    before = listed()
    assert url not in before
    loads(chromium, url)
    assert listed() == before | {url: sum(whole_sizes(small_model).values()) + len(url)}
    run(f"{waiting}cache.{call.format('delete')}({url!r})")
    assert listed() == before
    with pytest.raises(
        pytest.fail.Exception, match=r"nothing is kept from there; gemma_wgpu\.cache\.list\(\) has the"
    ):
        run(f"{waiting}cache.{call.format('delete')}({url!r})")
