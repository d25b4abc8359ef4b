"""The Python side of the benchmark page, in its worker: it answers questions by JSON, or by text to be saved."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, astuple, replace
from typing import Any

import js
import pyodide_js
from pyodide.ffi import JsException, to_js

from gemma_wgpu.bench import tables
from gemma_wgpu.bench.micro import MODELS, Timings, time_kernels
from gemma_wgpu.bench.records import from_dict
from gemma_wgpu.bench.run import OURS, Engine, Kernel, Load, Reference, Report, Run, Shape, bench, parse_depths
from gemma_wgpu.errors import GemmaError, ModelError, RequestError
from gemma_wgpu.fetch import cache
from gemma_wgpu.fetch.hub import hosted
from gemma_wgpu.gemma import Gemma, load_async
from gemma_wgpu.gpu import open_device
from gemma_wgpu.ops.tuner import tuned
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.manifest import MANIFEST, Manifest

_MOST_BARS = 8
_PEERS = {"transformers.js", "wllama"}
Settings = dict[str, Any]
Show = Callable[[str, int, int], None]
"""Shows the page what is being done, how much of it is done, and how much there is in all, or 0."""


class Page:
    """Answers one question at a time. `site` is the content of site.json; peers.js exports `open_peer`."""

    def __init__(self, site: str, open_peer: Callable[..., Awaitable[Any]]) -> None:
        self._site: dict[str, Any] = json.loads(site)
        self._open_peer = open_peer
        self._task: asyncio.Task[str] | None = None

    async def answer(self, question: str, argument: str, show: Show) -> str:
        """Return a JSON object with an "answer", with an "error", or with neither if `cancel` was called."""
        ask: Callable[[Any, OnProgress], Coroutine[Any, Any, str]] = getattr(self, f"ask_{question}")

        def progress(step: Progress) -> None:
            show(step.what, step.done, step.total)

        self._task = asyncio.create_task(ask(json.loads(argument), progress))
        try:
            return json.dumps({"answer": await self._task})
        except GemmaError as error:
            return json.dumps({"error": str(error)})
        except asyncio.CancelledError:
            return json.dumps({})
        finally:
            self._task = None

    def cancel(self) -> None:
        """End what is under way."""
        if self._task is not None:
            self._task.cancel()

    async def ask_adapter(self, _: None, progress: OnProgress) -> str:
        """Return which GPU this is, and what it can do."""
        device = await open_device()
        device.close()
        found = {
            "name": str(device.info),
            "cpu": device.info.type == "CPU",
            "facts": {
                "vendor": device.info.vendor,
                "architecture": device.info.architecture,
                "driver": device.info.driver,
                "features": ", ".join(sorted(device.features)) or "none that matter here",
                **{name.replace("_", " "): f"{value:,}" for name, value in asdict(device.limits).items()},
                "browser": await _machine(),
            },
            "half": "shader-f16" in device.features,
            "kernels": list(MODELS),
        }
        return json.dumps(found)

    async def ask_measure(self, settings: Settings, progress: OnProgress) -> str:
        """Measure a model, and return the report."""
        name = settings["model"]
        depths = parse_depths(settings["depths"])
        shapes = [replace(Shape.parse(text), depth=depth) for depth in depths for text in settings["shapes"]]
        if not shapes:
            raise RequestError("there is no shape to time; choose one")
        folder = hosted(name)
        if folder is None:
            raise ModelError(f"{name}: this is not the address of a model folder; give one, or drop the files of one")
        listing = await folder.read(MANIFEST)
        manifest = Manifest.from_web(listing, f"{folder.url}/{MANIFEST}")
        files = (manifest.config, manifest.vocabulary, *manifest.shards)
        sha256 = hashlib.sha256(listing).hexdigest()
        known = self._site["references"].get(sha256)
        if settings["cold"]:
            with suppress(ModelError):  # there is nothing to delete
                await cache.delete_async(folder.url)
        gemma, load = await _load(settings, progress)
        with gemma, ExitStack() as stack:
            peers = []
            for peer in settings["peers"]:
                progress(Progress(f"loading {peer['kind']} and its model", 0, 0))
                opened = await self._peer(peer, gemma.tokenizer, max(shape.context for shape in shapes))
                peers.append(stack.enter_context(closing(opened)))
            report = await bench(
                gemma,
                shapes,
                repetitions=settings["repetitions"],
                peers=peers,
                reference=from_dict(Reference, known) if known else None,
                progress=progress,
            )
            report = replace(
                report,
                machine=await _machine(),
                versions=report.versions | {OURS: f"{report.versions[OURS]} ({self._site['commit']})"},
                load=load,
                sha256=sha256,
                model_bytes=len(listing) + sum(file.nbytes for file in files),
                host_bytes=_host_bytes(),
            )
        return report.to_json()

    async def ask_kernels(self, settings: Settings, progress: OnProgress) -> str:
        """Time the kernels by themselves; return the timings, and a table of them."""
        device = await open_device()
        with closing(device):
            half = settings["precision"] != "f32" and "shader-f16" in device.features
            timings = await time_kernels(
                device,
                settings["model"],
                half=half,
                tuning=await tuned(device),
                tokens=settings["tokens"],
                progress=progress,
            )
        table = _kernel_table(timings, str(device.info))
        return json.dumps({"timings": asdict(timings), "table": asdict(table)})

    async def ask_show(self, texts: list[str], progress: OnProgress) -> str:
        """Return the tables and plots of reports, which are given as JSON."""
        reports = [Report.from_json(text) for text in texts]
        shown = {
            "card": asdict(tables.card(reports)),
            "panels": list(_panels(reports)),
            "bars": list(_bars(reports)),
            "absent": sorted(_PEERS - {result.engine for report in reports for result in report.results}),
            "reports": [
                {
                    "title": tables.title(report),
                    "headline": [
                        {"figure": figure, "unit": unit, "what": what} for figure, unit, what in _headline(report)
                    ],
                    "valid": report.valid,
                    "warnings": tables.warnings(report),
                    "tables": [asdict(table) for table in (*tables.tables(report), tables.runs(report))],
                }
                for report in reports
            ],
        }
        return json.dumps(shown)

    async def ask_markdown(self, texts: list[str], progress: OnProgress) -> str:
        """Return reports as Markdown, one after the other below the table that compares them."""
        reports = [Report.from_json(text) for text in texts]
        return "\n\n".join([str(tables.card(reports)), *map(tables.markdown, reports)])

    async def ask_csv(self, texts: list[str], progress: OnProgress) -> str:
        """Return reports as one CSV file."""
        return tables.to_csv(*map(Report.from_json, texts))

    async def _peer(self, peer: dict[str, str], tokenizer: Tokenizer, context: int) -> Peer:
        try:
            opened = await self._open_peer(peer["kind"], peer["library"], peer["model"], context)
        except JsException as error:
            raise RequestError(f"{peer['kind']} cannot be loaded: {' '.join(error.message.split())}") from error
        return Peer(peer["kind"], opened, tokenizer)


class Peer(Engine):
    """An engine that peers.js has opened."""

    def __init__(self, name: str, opened: Any, tokenizer: Tokenizer) -> None:
        self.name, self._opened, self._tokenizer = name, opened, tokenizer
        self.versions = opened.versions.to_py()

    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more."""
        await self._call(self._opened.fill(*self._given(ids)))

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        """Compute `ids` after what the cache holds, then `decode` tokens after the first new one."""
        found = await self._call(self._opened.run(*self._given(ids), decode))
        prefill, *others = found.seconds.to_py()
        return Run(found.cached, prefill, sum(others), found.ids.to_py(), others)

    def close(self) -> None:
        """Free the memory of the engine."""
        self._opened.close()

    def _given(self, ids: Sequence[int]) -> tuple[Any, str]:
        return to_js(list(ids)), self._tokenizer.decode(list(ids), control=False)

    async def _call(self, promise: Awaitable[Any]) -> Any:
        try:
            return await promise
        except JsException as error:
            raise RequestError(f"{self.name} failed: {' '.join(error.message.split())}") from error


async def _load(settings: Settings, progress: OnProgress) -> tuple[Gemma, Load]:
    """Return the model, and how long it took to load. If it was downloaded, it is loaded again as it is kept."""

    async def load(how: str) -> tuple[Gemma, float, dict[str, float]]:
        progress(Progress(how, 0, 0))
        started = time.perf_counter()
        gemma = await load_async(
            settings["model"],
            precision=settings["precision"],
            context_length=settings["context"],
            progress=lambda step: progress(replace(step, what=how)),
        )
        return gemma, time.perf_counter() - started, gemma.load_seconds

    gemma, seconds, stages = await load("loading the model")
    if not stages["download"]:
        return gemma, Load(None, seconds, warm_stages=stages)
    gemma.close()
    gemma, again, stages_again = await load("loading it again, as it is kept")
    return gemma, Load(seconds, again, stages, stages_again)


async def _machine() -> str:
    """Return what the browser and the system tell of themselves."""
    navigator = js.navigator
    told = [navigator.userAgent]
    with suppress(AttributeError, JsException):  # only Chromium has this
        hints = ["platform", "platformVersion", "architecture", "fullVersionList"]
        said = (await navigator.userAgentData.getHighEntropyValues(to_js(hints))).to_py()
        brands = ", ".join(f"{brand['brand']} {brand['version']}" for brand in said["fullVersionList"])
        told = [brands, " ".join(filter(None, (said["platform"], said["platformVersion"], said["architecture"])))]
    return "; ".join([*filter(None, told), f"{navigator.hardwareConcurrency} cores"])


def _host_bytes() -> dict[str, int]:
    found = {"Python's memory": pyodide_js._module.HEAPU8.length}
    with suppress(AttributeError):  # only Chromium has this
        found["JavaScript's heap"] = js.performance.memory.usedJSHeapSize
    return found


def _headline(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield the best of each speed: a figure, its unit, and what it is."""
    ours = [result for result in report.results if result.engine == OURS]
    for what, speeds in (
        ("Prefill", [(result.prefill.median, result) for result in ours if result.prefill]),
        ("Decode", [(result.decode.median, result) for result in ours if result.decode]),
    ):
        if speeds:
            speed, result = max(speeds, key=lambda pair: pair[0])
            yield f"{speed:,.{1 if speed < 100 else 0}f}", "tokens/s", f"{what}, {result.shape}"
    first = min((result for result in ours), key=lambda result: result.first_token.median)
    yield f"{first.first_token.median:,.2f}", "s", f"First token, {first.shape}"
    yield f"{sum(report.gpu_bytes.values()) / 1e6:,.0f}", "MB", "On the GPU"
    if report.match:
        yield f"{report.match.same} of {report.match.tokens}", "tokens", f"As in {report.match.source}"


def _labels(reports: Sequence[Report]) -> Iterator[tuple[str, Report]]:
    for number, report in enumerate(reports, 1):
        yield (f"{number}: " if len(reports) > 1 else ""), report


def _panels(reports: Sequence[Report]) -> Iterator[dict[str, Any]]:
    """Yield the plots of all reports together, one for each title, if there is a line to draw in it."""
    found: dict[str, dict[str, Any]] = {}
    for label, report in _labels(reports):
        for panel in tables.panels(report):
            merged = found.setdefault(panel.title, {"title": panel.title, "x": panel.x, "y": panel.y, "lines": {}})
            for name, points in panel.lines.items():
                merged["lines"][label + name] = [(x, *astuple(figure)) for x, figure in points]
    for merged in found.values():
        if len({point[0] for points in merged["lines"].values() for point in points}) > 1:
            yield merged


def _bars(reports: Sequence[Report]) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds of the GPU by kernel, once for prompts and once for tokens."""
    for what in ("prefill", "decode"):
        sets: dict[str, dict[str, float]] = {}
        for label, report in _labels(reports):
            for result in report.results:
                kernels: list[Kernel] = getattr(result, f"{what}_kernels")
                of = sets.setdefault(f"{label}{result.shape}", {}) if kernels else {}
                for kernel in kernels:
                    of[kernel.shader] = of.get(kernel.shader, 0.0) + 1000 * kernel.seconds
        if sets:
            totals = {name: sum(of.get(name, 0.0) for of in sets.values()) for of in sets.values() for name in of}
            names = sorted(totals, key=totals.__getitem__, reverse=True)[:_MOST_BARS]
            title = f"GPU time of a {'prompt' if what == 'prefill' else 'token'}, by kernel"
            values = {label: [of.get(name, 0.0) for name in names] for label, of in sets.items()}
            yield {"title": title, "x": "milliseconds", "names": names, "sets": values}


def _kernel_table(timings: Timings, adapter: str) -> tables.Table:
    rows = [
        [
            timing.kernel,
            timing.shape,
            f"{1e6 * timing.seconds:,.1f} µs",
            f"{timing.bandwidth / 1e9:,.1f}",
            f"{timing.rate / 1e9:,.1f}",
            f"{timing.bandwidth / timings.bandwidth:.0%}",
        ]
        for timing in timings.kernels
    ]
    title = (
        f"{timings.model}, {timings.precision}, {timings.tuning}, on {adapter}: reading reaches "
        f"{timings.bandwidth / 1e9:,.1f} GB/s"
    )
    return tables.Table(title, ["kernel", "shape", "time", "GB/s", "GFLOP/s", "of reading"], rows)
