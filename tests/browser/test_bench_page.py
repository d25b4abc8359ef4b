"""The benchmark page, as the site has it, is run, cancelled, exported and looked at. One page serves all tests."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Worker

from gemma_wgpu.bench.run import Report, Shape
from gemma_wgpu.weights.folder import FolderCheckpoint
from tests.browser.conftest import SCREENSHOTS, SUB_PATH, complaints_of

STARTED = 60_000  # milliseconds that Pyodide may take on a slow machine
PATIENCE = 200_000  # milliseconds that a run may take
# This counts the bytes of buffers that nobody has destroyed, on devices that nobody has. Python counts on its own.
COUNT_BYTES = """() => {
    const held = new Map();
    const { createBuffer, destroy } = GPUDevice.prototype;
    GPUDevice.prototype.createBuffer = function (options) {
        const buffer = createBuffer.call(this, options);
        if (!held.has(this)) held.set(this, new Set());
        held.get(this).add(buffer);
        return buffer;
    };
    GPUDevice.prototype.destroy = function () {
        held.delete(this);
        destroy.call(this);
    };
    const destroyBuffer = GPUBuffer.prototype.destroy;
    GPUBuffer.prototype.destroy = function () {
        held.forEach((buffers) => buffers.delete(this));
        destroyBuffer.call(this);
    };
    const sum = (buffers) => [...buffers].reduce((bytes, { size }) => bytes + size, 0);
    self.heldBytes = () => [...held.values()].reduce((bytes, buffers) => bytes + sum(buffers), 0);
}"""
CANCEL_AT = """what => {
    new MutationObserver((_, observer) => {
        if (!document.querySelector("#doing").textContent.includes(what)) return;
        observer.disconnect();
        document.querySelector("[data-does=cancel]").click();
    }).observe(document.querySelector("#doing"), { childList: true });
}"""


class Bench:
    """The page, which is open."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("body[data-ready]").wait_for(timeout=STARTED)

    @property
    def worker(self) -> Worker:
        [worker] = self.page.workers
        return worker

    def fill(self, **settings: str) -> None:
        """Fill in the form, with no shape chosen and one repetition unless `settings` say otherwise."""
        for box in self.page.locator("input[name=shape]").all():
            box.uncheck()
        for name, value in ({"repetitions": "1", "context": "", "depths": "0"} | settings).items():
            self.page.locator(f"#settings [name={name}]").fill(value)

    def start(self) -> None:
        self.page.locator("#settings").get_by_role("button", name="Run").click()

    def wait(self) -> str:
        """Wait until nothing is under way; return what the page complains of."""
        self.page.locator("#running").wait_for(state="hidden")
        return self.page.locator("#trouble").inner_text()

    def run(self, **settings: str) -> None:
        reports = self.page.locator("#reports details")
        count = reports.count()
        self.fill(**settings)
        self.start()
        assert self.wait() == ""
        reports.nth(count).wait_for()

    def save(self, button: str) -> str:
        """Press a button; return the file that it saves."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=button).click()
        return download.value.path().read_text(encoding="utf-8")

    def open(self, path: Path) -> None:
        self.page.locator("#import").set_input_files(path)

    def remove(self, report: int) -> None:
        """Remove the report of this number, which begins at 1 and must be the last one."""
        last = self.page.locator("#reports details").nth(report - 1)
        last.locator("summary").click()
        last.get_by_role("button", name="Remove").click()
        last.wait_for(state="detached")

    def clear(self) -> None:
        self.page.get_by_role("button", name="Clear").click()
        self.page.locator("#none").wait_for()

    @property
    def card(self) -> list[dict[str, str]]:
        table = self.page.locator("#card")
        head = table.locator("th").all_inner_texts()
        cells = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
        return [dict(zip(head, row, strict=True)) for row in cells]


@pytest.fixture(scope="module")
def bench(browser: Browser, built: Path, origin: str, small_model: Path) -> Iterator[Bench]:
    for name in ("small", "slow"):
        shutil.copytree(small_model, built / "models" / name)
    corrupt(built / "models")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints = complaints_of(page, [origin])
    yield Bench(page, f"{origin}/{SUB_PATH}/bench/index.html")
    context.close()
    assert complaints == []


def corrupt(models: Path) -> None:
    """Add another demo, one byte of whose last norm is wrong, so that a weight is 2^64 times as large."""
    shutil.copytree(models / "demo", models / "corrupt", copy_function=os.link)
    manifest = FolderCheckpoint(models / "demo").manifest
    [part] = next(tensor for tensor in manifest.tensors if tensor.name == "model.norm.weight").parts
    shard = models / "corrupt" / manifest.shards[part.shard].name
    data = bytearray(shard.read_bytes())
    data[part.quants[0] + 3] ^= 0x20
    shard.unlink()  # since the demo has the same file
    shard.write_bytes(data)


@pytest.fixture(scope="module")
def measured(bench: Bench) -> str:
    """Return the report of the demo model, as it was saved."""
    bench.run(model="../models/demo", shapes="pp8+tg3", context="64")
    return bench.save("Save as JSON")


def test_a_run_fits_together(bench: Bench, measured: str, built: Path) -> None:
    report = Report.from_json(measured)
    [result] = report.results
    [run] = result.runs
    assert result.shape == Shape(8, 3)
    assert result.prefill is not None
    assert result.decode is not None
    assert result.prefill.median == pytest.approx(8 / run.prefill_seconds)
    assert result.decode.median == pytest.approx(3 / run.decode_seconds)
    assert len(run.token_seconds) == 3
    assert sum(run.token_seconds) == pytest.approx(run.decode_seconds, rel=0.01)
    assert result.token_percentiles == pytest.approx(np.percentile(run.token_seconds, [50, 95, 99]))
    rounding = 1e-4 * report.dispatches_per_token  # which browsers do to each timestamp
    for kernels, profiled in (
        (result.prefill_kernels, result.prefill_profiled),
        (result.decode_kernels, result.decode_profiled),
    ):
        assert 0.5 * profiled < sum(kernel.seconds for kernel in kernels) < profiled + rounding
    assert report.match is not None
    assert (report.match.same, report.match.tokens) == (4, 4)
    assert report.valid
    manifest = (built / "models" / "demo" / "manifest.json").read_bytes()
    assert report.sha256 == hashlib.sha256(manifest).hexdigest()
    files = (built / "models" / "demo").iterdir()
    assert report.model_bytes == sum(path.stat().st_size for path in files)
    assert report.load is not None
    assert report.load.cold is not None
    for stages, seconds in ((report.load.cold_stages, report.load.cold), (report.load.warm_stages, report.load.warm)):
        assert set(stages) == {"storage", "download", "hash"}
        assert 0 < sum(stages.values()) < seconds
    assert report.load.cold_stages["download"] > 0
    assert report.load.warm_stages["download"] == 0
    assert report.adapter.type == "CPU"
    assert report.host_bytes["Python's memory"] > 30e6
    assert "Chromium" in report.machine
    assert re.fullmatch(r"0\.1\.0 \([0-9a-f]{7,}(-dirty)?\)", report.versions["gemma-wgpu"])

    [row] = bench.card
    assert row["engine"] == "gemma-wgpu"
    assert row["quantisation"] == "Q4_K_M"
    assert row["precision"] == "F32"
    assert row["decode tokens/s"] == str(result.decode)
    assert row["tokens right"] == "4 of 4"
    assert row["GPU memory"] == f"{sum(report.gpu_bytes.values()) / 1e6:,.0f} MB"
    assert "no GPU" in bench.page.locator("#adapter").inner_text()
    assert "is the CPU" in bench.page.locator("#warnings").inner_text()
    assert bench.page.locator("#plots canvas").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width"), [("desktop", 1280), ("phone", 390)])
def test_it_can_be_read(bench: Bench, measured: str, scheme: Any, device: str, width: int) -> None:
    page = bench.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.evaluate("() => scrollTo(0, 0)")
    page.wait_for_timeout(300)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"bench-{device}-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def test_what_is_saved_can_be_opened(bench: Bench, measured: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(measured)
    content = json.loads(measured)
    content["adapter"]["device"] = "another GPU"
    content["results"][0]["runs"][0]["decode_seconds"] /= 2
    two.write_text(json.dumps(content))
    card = bench.card
    bench.clear()
    assert bench.page.get_by_role("button", name="Save as JSON").is_disabled()
    bench.open(one)
    bench.page.locator("#card").wait_for()
    assert bench.card == card
    assert json.loads(bench.save("Save as JSON")) == json.loads(measured)
    bench.open(two)
    bench.page.locator("#card tbody tr").nth(1).wait_for()
    slow, fast = (float(row["decode tokens/s"].split()[0]) for row in bench.card)
    assert fast == pytest.approx(2 * slow, abs=0.2)
    assert len(json.loads(bench.save("Save as JSON"))) == 2
    rows = list(csv.DictReader(bench.save("CSV").splitlines()))
    assert [row["adapter"].split()[0] for row in rows] == ["swiftshader"] * 2 + ["another"] * 2
    assert bench.save("Markdown").count("| pp8+tg3, decode |") == 2
    bench.remove(2)
    assert bench.card == card
    two.write_text(json.dumps(content | {"results": []}))
    bench.open(two)
    bench.page.get_by_text("two.json: the runs of this report do not fit").wait_for()
    assert bench.card == card


def test_a_link_has_the_settings(bench: Bench, measured: str) -> None:
    bench.fill(model="./x", shapes="pp64", depths="0,1k", repetitions="7")
    bench.page.get_by_label("LiteRT").check()
    bench.page.get_by_role("button", name="Copy a link").click()
    link = bench.page.evaluate("() => navigator.clipboard.readText()")
    other = bench.page.context.new_page()
    other.goto(link)
    other.locator("#models option").first.wait_for(state="attached")
    for name, value in {"model": "./x", "shapes": "pp64", "depths": "0,1k", "repetitions": "7"}.items():
        assert other.locator(f"#settings [name={name}]").input_value() == value
    checked = other.locator("input[name=shape]:checked")
    assert [box.input_value() for box in checked.all()] == ["pp1024+tg256"]
    other.close()


def test_with_the_keyboard(bench: Bench) -> None:
    page = bench.page
    page.get_by_role("tab", name="A model").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Kernels").get_attribute("aria-selected") == "true"
    page.keyboard.press("Tab")
    assert page.locator("#kernel-settings select").first.evaluate("element => element === document.activeElement")
    page.get_by_label("Tokens of a prompt").fill("8")
    page.keyboard.press("Enter")
    page.locator("#running").wait_for()
    assert bench.wait() == ""
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#kernel-results tbody tr").all()]
    assert {row[0] for row in rows} >= {"matvec", "matmul", "attention_decode", "attention_prefill", "rms_norm"}
    for _, _, microseconds, bandwidth, *_ in rows:
        assert float(microseconds.removesuffix(" µs").replace(",", "")) > 0
        assert float(bandwidth) >= 0
    assert Axe().run(page).violations_count == 0
    page.screenshot(path=SCREENSHOTS / "bench-kernels.png", full_page=True)
    page.get_by_role("tab", name="Kernels").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#settings").is_visible()


@contextmanager
def no_hash_check(worker: Worker) -> Iterator[None]:
    """Let the worker believe that whatever comes is what the demo's manifest says."""
    worker.evaluate(
        """() => {
            self.digest = crypto.subtle.digest;
            crypto.subtle.digest = async (_, data) => {
                const { shards } = await (await fetch("../models/demo/manifest.json")).json();
                const shard = shards.find(({ nbytes }) => nbytes === data.byteLength);
                if (!shard) return digest.call(crypto.subtle, "SHA-256", data);
                return Uint8Array.from(shard.sha256.match(/../g), (byte) => parseInt(byte, 16)).buffer;
            };
        }"""
    )
    yield
    worker.evaluate("() => { crypto.subtle.digest = digest; }")


def test_a_wrong_byte_makes_it_invalid(bench: Bench, measured: str) -> None:
    with no_hash_check(bench.worker):
        bench.run(model="../models/corrupt", shapes="tg1", context="64")
    first, second = bench.card
    assert "INVALID" not in first["tokens right"]
    assert re.fullmatch(r"[01] of 2: INVALID", second["tokens right"])
    assert bench.page.locator("#card tr.void").count() == 1
    assert "INVALID" in bench.page.locator("#warnings").inner_text()
    saved = Report.from_json(json.dumps(json.loads(bench.save("Save as JSON"))[1]))
    assert saved.match is not None
    assert saved.match.same < saved.match.tokens
    assert not saved.valid
    bench.page.screenshot(path=SCREENSHOTS / "bench-invalid.png", full_page=True)
    bench.remove(2)


def test_it_can_be_cancelled_at_any_time(bench: Bench, measured: str) -> None:
    bench.worker.evaluate(COUNT_BYTES)
    card = bench.card

    def cancel(what: str, **settings: str) -> None:
        bench.fill(**{"model": "../models/small", "shapes": "pp8+tg8"} | settings)
        bench.page.evaluate(CANCEL_AT, what)
        bench.start()
        assert bench.wait().startswith("Cancelled"), what
        assert bench.worker.evaluate("heldBytes()") == 0, what
        assert bench.card == card

    bench.page.context.route("**/models/slow/weights-*", lambda route: None)  # no answer, ever
    cancel("loading the model", model="../models/slow")
    bench.page.context.unroute_all(behavior="ignoreErrors")
    # tests/test_bench.py cancels at every step of what is measured.
    for what in ("loading it again", "run to warm up", "timing kernels", "timing the host"):
        bench.page.locator("[name=cold]").set_checked(what == "loading it again")
        cancel(what)
    bench.page.locator("[name=cold]").uncheck()


def test_a_folder_of_ones_own(bench: Bench, measured: str, small_model: Path) -> None:
    bench.page.locator("#folder").set_input_files(small_model)
    model = bench.page.locator("#settings [name=model]").input_value()
    assert re.fullmatch(r"\./dropped/model-\d+-\d+", model)
    bench.run(model=model, shapes="pp4+tg2")
    assert [row["tokens right"] for row in bench.card] == ["4 of 4", "not known"]


def test_what_cannot_be_measured(bench: Bench) -> None:
    for settings, message in (
        ({"model": "x"}, "x: this is not the address of a model folder"),
        ({"shapes": "pp"}, "'pp' is not a shape"),
        ({"shapes": ""}, "no shape to time"),
        ({"depths": "deep"}, "'deep' is not a list of depths"),
        ({"shapes": "pp4000", "context": "10"}, "pp4000 takes a context of 4,000 tokens"),
    ):
        bench.fill(**{"model": "../models/small", "shapes": "tg1"} | settings)
        bench.start()
        assert message in bench.wait()


@pytest.mark.parametrize("kind", ["transformers.js", "wllama"])
def test_a_peer_that_is_not_there(bench: Bench, kind: str) -> None:
    bench.page.evaluate("() => { document.querySelector('#peers').open = true; }")
    bench.fill(model="../models/small", shapes="tg1")
    fields = [bench.page.locator(f'[name="{kind} {what}"]') for what in ("library", "model")]
    for field in fields:
        field.fill("../nowhere.js")
    bench.start()
    assert re.fullmatch(rf"{kind} cannot be loaded: .*/nowhere\.js", bench.wait())
    for field in fields:
        field.fill("")
