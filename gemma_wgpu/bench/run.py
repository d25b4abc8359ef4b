"""How fast a model is, in the terms of llama-bench, and where the time goes.

It is asynchronous at the bottom and needs nothing but numpy, so it runs in a browser too. benchmarks/README.md says
how to read the figures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import numpy as np

from gemma_wgpu.bench.records import from_dict
from gemma_wgpu.engine import session
from gemma_wgpu.engine.runner import Draw, Row, Runner
from gemma_wgpu.errors import RequestError
from gemma_wgpu.files import sha256
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.gpu.device import AdapterInfo, Buffer, Device, Limits, Program
from gemma_wgpu.ops.kernels import READ_STEP, Kernels
from gemma_wgpu.ops.launch import record
from gemma_wgpu.options import Options
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.manifest import MANIFEST

OURS = "gemma-wgpu"
FORMAT = 2
_HOST_STEPS = 64  # the median of so many is taken
_HOST_SECONDS = 1.0  # after so long, fewer steps will do
_PROFILED_STEPS = 8  # the mean of so many steps of decode is taken
_READ_BYTES = 256 << 20  # this is more than the caches of a GPU hold
_READ_SECONDS = 0.05  # a measurement lasts so long at least, so that the wait for the GPU does not count
_GREEDY = Draw(Options(temperature=0), seed=0)
_SHAPE = re.compile(r"(?:pp(\d+))?\+?(?:tg(\d+))?")
_DEPTH = re.compile(r"(\d+)(k?)")
# This is from Lewis Carroll's Alice's Adventures in Wonderland (1865), which has no copyright any more.
_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
    "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    "and what is the use of a book, thought Alice, without pictures or conversations? So she was considering in her "
    "own mind, as well as she could, for the hot day made her feel very sleepy and stupid, whether the pleasure of "
    "making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White "
    "Rabbit with pink eyes ran close by her.\n"
)


@dataclass(frozen=True)
class Shape:
    """What a run times, in tokens.

    It computes `prefill` tokens of a prompt and then `decode` tokens one after the other, while the cache holds
    `depth` tokens before them. Without a prompt, decode begins with one token that is not counted.

    Raises RequestError if there is nothing to time.
    """

    prefill: int
    decode: int
    depth: int = 0

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.depth) < 0 or not self.prefill + self.decode:
            raise RequestError(
                f"a benchmark of {self.prefill} tokens of prefill and {self.decode} of decode at a depth of "
                f"{self.depth} is nothing to time; give whole numbers above 0"
            )

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Return the shape of a name: "pp512", "tg128", "pp1024+tg256", or "litert", which is the last one of these.

        Raises RequestError for other names.
        """
        match = _SHAPE.fullmatch("pp1024+tg256" if text == "litert" else text)
        if not match or not any(match.groups()):
            raise RequestError(f"{text!r} is not a shape such as pp512, tg128, pp512+tg128 or litert")
        return cls(int(match[1] or 0), int(match[2] or 0))

    def __str__(self) -> str:
        names = [f"pp{self.prefill}"] * bool(self.prefill) + [f"tg{self.decode}"] * bool(self.decode)
        return "+".join(names) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def prompt(self) -> int:
        """Return how many tokens are given."""
        return max(self.prefill, 1)

    @property
    def context(self) -> int:
        """Return how many tokens the context must hold."""
        return self.depth + self.prompt + self.decode


def parse_depths(text: str) -> list[int]:
    """Return the depths in a text such as "0,1k,4k", where 1k is 1024. Raises RequestError for any other text."""
    found = [_DEPTH.fullmatch(number.strip().lower()) for number in text.split(",")]
    if not all(found):
        raise RequestError(f"{text!r} is not a list of depths such as 0,1k,4k,16k")
    return [int(match[1]) << 10 * len(match[2]) for match in found if match]


def check_context(shapes: Iterable[Shape], context_length: int) -> None:
    """Raise RequestError, which names the shape, if a shape is longer than `context_length`."""
    for shape in shapes:
        if shape.context > context_length:
            raise RequestError(
                f"{shape} takes a context of {shape.context:,} tokens, and this model has one of {context_length:,}; "
                "choose a smaller shape or depth"
            )


@dataclass(frozen=True)
class Run:
    """One run of an engine on a shape.

    `prefill_seconds` last until the first new token, `decode_seconds` from there to the last one. `cached` counts the
    tokens that the engine had in its cache before. `ids` are the new ones, greedily chosen, and `token_seconds` are
    the times from each to the next, if the engine tells.
    """

    cached: int
    prefill_seconds: float
    decode_seconds: float
    ids: list[int]
    token_seconds: list[float] = field(default_factory=list)


def timed_run(cached: int, started: float, ids: list[int], times: Sequence[float]) -> Run:
    """Return the run that `started` at a time and yielded `ids` at `times`, in seconds."""
    return Run(cached, times[0] - started, times[-1] - times[0], ids, np.diff(times).tolist())


class Engine(ABC):
    """What runs a model: this package, or a peer.

    `versions` has the version of each package that counts, by name.
    """

    name: str
    versions: dict[str, str]

    @abstractmethod
    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more, and wait until that is so."""

    @abstractmethod
    async def run(self, ids: Sequence[int], decode: int) -> Run:
        """Compute `ids` after what the cache holds, then `decode` tokens after the first new one, past any end."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory of the engine."""


class _Ours(Engine):
    name = OURS

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma
        self._folder = tempfile.TemporaryDirectory()
        self._ids: list[int] = []  # in the cache
        self._saved: list[int] = []  # in the session's file
        try:
            self.versions = {OURS: version(OURS)}
        except PackageNotFoundError:  # it runs from its sources
            self.versions = {OURS: "not installed"}

    async def fill(self, ids: Sequence[int]) -> None:
        gemma, runner, path = self._gemma, self._gemma.runner, Path(self._folder.name) / "session"
        gemma.reset()
        self._ids = list(ids)
        if ids and self._ids == self._saved:  # a long one takes much longer to compute than to write back
            session.restore(runner, gemma.fingerprint, path)
        elif ids:
            await self._compute(ids)
            await session.save(runner, gemma.fingerprint, path)
            self._saved = self._ids
        with runner.device.lock:
            reading = runner.device.read(runner.cache.keys(0), 0, 4)
        await reading

    async def _compute(self, ids: Sequence[int]) -> None:
        runner, lock = self._gemma.runner, self._gemma.device.lock
        with lock:
            lease = runner.begin(ids, 0)
        try:
            while left := len(ids) - lease.computed:
                count = min(left, runner.prefill_chunk)
                await runner.look_up(ids[-left:][:count])
                with lock:
                    reading = runner.prefill(lease, count)
                await reading
        finally:
            with lock:
                lease.release()

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        options = Options(max_new_tokens=decode + 1, temperature=0, ignore_eos=True)
        generation = self._gemma.generate([*self._ids, *ids], options=options)
        started = time.perf_counter()
        times = [time.perf_counter() async for piece in generation if piece.ids]
        return timed_run(generation.stats.reused_tokens, started, generation.ids, times)

    def close(self) -> None:
        self._folder.cleanup()
        self._gemma.reset()


@dataclass(frozen=True)
class Kernel:
    """The GPU time, in seconds, of the dispatches of one shader that have the same grid."""

    shader: str
    workgroups: tuple[int, int, int]
    dispatches: int
    seconds: float


@dataclass(frozen=True)
class Figure:
    """The median and the range of some values."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Return the figure of `values`, of which there is one at least."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.smallest:.1f}..{self.largest:.1f})"


@dataclass(frozen=True)
class Result:
    """The runs of one engine on one shape. `warm_up` came before them; its time does not count.

    - decode_bytes: the bytes that a step in the middle of the decode reads: all weights, and what the layers see of
      the cache. It is None for peers, and if nothing is decoded.
    - prefill_kernels, decode_kernels: the GPU time of the prompt and of one token. They are empty for peers, and if
      the adapter cannot measure it.
    - prefill_profiled, decode_profiled: the seconds of wall clock in which all of these kernels ran.
    """

    engine: str
    shape: Shape
    warm_up: Run
    runs: list[Run]
    decode_bytes: int | None = None
    prefill_kernels: list[Kernel] = field(default_factory=list)
    decode_kernels: list[Kernel] = field(default_factory=list)
    prefill_profiled: float = 0.0
    decode_profiled: float = 0.0

    @property
    def prefill(self) -> Figure | None:
        """Return the tokens of the prompt per second, up to the first new token; None without a prompt."""
        if not self.shape.prefill:
            return None
        return Figure.of([self.shape.prefill / run.prefill_seconds for run in self.runs])

    @property
    def decode(self) -> Figure | None:
        """Return the decoded tokens per second; None if nothing is decoded."""
        if not self.shape.decode:
            return None
        return Figure.of([self.shape.decode / run.decode_seconds for run in self.runs])

    @property
    def first_token(self) -> Figure:
        """Return the seconds until the first new token."""
        return Figure.of([run.prefill_seconds for run in self.runs])

    @property
    def token_percentiles(self) -> tuple[float, float, float] | None:
        """Return the seconds that 50, 95 and 99 % of the tokens take at most; None if the engine does not tell."""
        seconds = [duration for run in self.runs for duration in run.token_seconds]
        if not seconds:
            return None
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist()
        return p50, p95, p99

    @property
    def decode_bandwidth(self) -> float | None:
        """Return the bytes per second that decode reads, if they are known."""
        if self.decode is None or self.decode_bytes is None:
            return None
        return self.decode.median * self.decode_bytes


@dataclass(frozen=True)
class HostTime:
    """The seconds that the host takes to put one step of decode on an idle queue.

    - alone: for a step whose dispatches have no workgroups, which is the cost of the host itself.
    - beside_shaders: for a real step. This is more if the adapter is the CPU, whose caches the shaders fill.
    """

    alone: Figure
    beside_shaders: Figure


@dataclass(frozen=True)
class Load:
    """The seconds that it took to load the model: first `cold`, then `warm`.

    When it is cold, its files are not in memory, if the system lets go of them, or a browser has yet to download
    them. `cold` is None if there was nothing to download. The stages say how much of it was spent on what.
    """

    cold: float | None
    warm: float
    cold_stages: dict[str, float] = field(default_factory=dict)
    warm_stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt `ids`, and the `tokens` that another implementation chose greedily after it."""

    ids: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Reference:
    """The prompts that another implementation was given, which `source` names."""

    source: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class Match:
    """How many `tokens`, after so many `prompts`, were compared with those of a reference, and how many are right."""

    source: str
    prompts: int
    tokens: int
    same: int


@dataclass(frozen=True)
class Report:
    """All that a benchmark found.

    - bandwidth: the bytes per second that the read kernel reaches.
    - match: how the model's tokens compare with a reference; None if no reference is known. If a token is wrong, the
      figures are void: see `valid`.
    - gpu_bytes: the bytes on the GPU at the end, by what they are for.
    - host_bytes: the bytes of the host's memory, by what holds them, if that can be known.
    - model_bytes: the bytes of the model's files.
    """

    date: str
    machine: str
    versions: dict[str, str]
    adapter: AdapterInfo
    model: str
    quantization: str
    precision: str
    activations: str
    tuning: str
    context_length: int
    gpu_bytes: dict[str, int]
    bandwidth: float
    dispatches_per_token: int
    host: HostTime
    results: list[Result]
    features: list[str]
    limits: Limits
    match: Match | None = None
    load: Load | None = None
    sha256: str | None = None
    model_bytes: int | None = None
    host_bytes: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def valid(self) -> bool:
        """Say whether the figures count: no token is known to be wrong, and all runs of ours have the same tokens."""
        ours = [result for result in self.results if result.engine == OURS]
        repeated = all(run.ids == result.warm_up.ids for result in ours for run in result.runs)
        return repeated and (self.match is None or self.match.same == self.match.tokens)

    def to_json(self) -> str:
        """Return everything as JSON, with each single run."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises RequestError for anything else, also for a report of another format."""
        try:
            content = json.loads(text)
            version = content["format"]
            report: Report | None = from_dict(cls, content) if version == FORMAT else None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RequestError(f"this is not a report of gemma-wgpu's benchmark ({error})") from error
        if report is None:
            raise RequestError(
                f"this report has format {str(version)[:40]}, and this gemma-wgpu reads {FORMAT}; measure again"
            )
        if not report.results or not all(_sound(result) for result in report.results):
            raise RequestError("the runs of this report do not fit their shapes; measure again")
        return report


def _sound(result: Result) -> bool:
    """Say whether all that is computed from a result can be computed."""
    shape = result.shape
    return bool(result.runs) and all(
        len(run.ids) == shape.decode + 1 and run.prefill_seconds > 0 and (run.decode_seconds > 0 or not shape.decode)
        for run in result.runs
    )


async def bench(
    gemma: Gemma,
    shapes: Sequence[Shape],
    *,
    repetitions: int = 5,
    peers: Sequence[Engine] = (),
    reference: Reference | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Time `shapes` on a model, `repetitions` times each after one run to warm up.

    Each of the `peers` makes every run right after the model does. The model's tokens are also compared with those of
    a `reference`. `progress` is told of each step as it begins. Other texts of the model end by a RequestError.

    Raises RequestError for a shape that the context is too short for, for less than one repetition, and for a context
    of one token, in which nothing can be decoded.
    """
    check_context(shapes, gemma.context_length)
    if repetitions < 1:
        raise RequestError(f"repetitions is {repetitions}; it must be above 0")
    if gemma.context_length < 2:
        raise RequestError("this model was loaded with a context of 1 token; a benchmark needs one of 2 at least")
    runner, device = gemma.runner, gemma.device
    engines = [_Ours(gemma), *peers]
    timed = "timestamp-query" in device.features
    steps = _Steps(bool(reference) + len(shapes) * (len(engines) * (repetitions + 1) + timed) + 2, progress)
    results = []
    try:
        for shape in shapes:
            ids = prompt_ids(gemma.tokenizer, shape.depth + shape.prompt)
            runs: list[list[Run]] = [[] for _ in engines]
            for repetition in range(repetitions + 1):
                for engine, its_runs in zip(engines, runs, strict=True):
                    number = f"run {repetition} of {repetitions}" if repetition else "run to warm up"
                    steps.begin(f"{engine.name}, {shape}, {number}")
                    await engine.fill(ids[: shape.depth])
                    its_runs.append(await engine.run(ids[shape.depth :], shape.decode))
            found = [Result(e.name, shape, first, rest) for e, (first, *rest) in zip(engines, runs, strict=True)]
            found[0] = replace(found[0], decode_bytes=_decode_bytes(gemma, shape))
            if timed:
                steps.begin(f"timing kernels, {shape}")
                await engines[0].fill(ids[: shape.depth])
                found[0] = await _profiled(found[0], runner, ids)
            results += found
        if reference:
            steps.begin("comparing tokens with the reference")
        match = await compare(gemma, reference, shapes) if reference else None
        steps.begin("measuring bandwidth")
        bandwidth = await read_bandwidth(device)
        steps.begin("timing the host")
        host = await _host_time(runner, gemma.tokenizer)
        steps.end()
        return Report(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=f"{platform.platform()}, {os.cpu_count()} cores",
            versions=dict(chain.from_iterable(engine.versions.items() for engine in engines)),
            adapter=device.info,
            model=gemma.name,
            quantization=gemma.quantization,
            precision=gemma.precision,
            activations=gemma.activations,
            tuning=str(runner.kernels.tuning),
            context_length=gemma.context_length,
            gpu_bytes=gemma.gpu_bytes,
            bandwidth=bandwidth,
            dispatches_per_token=runner.decode_dispatches,
            host=host,
            results=results,
            features=sorted(device.features),
            limits=device.limits,
            match=match,
        )
    finally:
        engines[0].close()


class _Steps:
    """Tells `progress` of each step of a benchmark."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def begin(self, what: str) -> None:
        """Say what the next step is."""
        if self._progress:
            self._progress(Progress(what, self._done, self._total, "steps"))
        self._done += 1

    def end(self) -> None:
        """Say that all steps are done."""
        self.begin("done")


async def compare(gemma: Gemma, reference: Reference, shapes: Iterable[Shape]) -> Match:
    """Compare the model's tokens with those of a reference.

    The prompts are those of the reference that are no longer than those of `shapes`, or its shortest one. After each
    of them, as many tokens are compared as `shapes` decode and one more, or as many as the reference has.
    """
    shapes = list(shapes)
    longest, most = max(shape.prompt for shape in shapes), max(shape.decode for shape in shapes) + 1
    by_length = sorted(reference.prompts, key=lambda prompt: len(prompt.ids))
    prompts = by_length[:1] + [prompt for prompt in by_length[1:] if len(prompt.ids) <= longest]
    tokens = same = 0
    for prompt in prompts:
        expected = prompt.tokens[:most]
        options = Options(max_new_tokens=len(expected), temperature=0, ignore_eos=True)
        generation = gemma.generate(prompt.ids, options=options)
        await generation
        tokens += len(expected)
        same += sum(a == b for a, b in zip(generation.ids, expected, strict=False))
    return Match(reference.source, len(prompts), tokens, same)


def prompt_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Return `count` ids, the same for every engine: BOS, and a text over and over."""
    text = tokenizer.encode(_TEXT, bos=False)
    return [tokenizer.bos_id, *(text * (count // len(text) + 1))][:count]


def _decode_bytes(gemma: Gemma, shape: Shape) -> int | None:
    """Return what `Result.decode_bytes` is."""
    if not shape.decode:
        return None
    cache = gemma.runner.cache
    seen = shape.depth + shape.prompt + shape.decode // 2
    read = sum(2 * min(cache.window(spec), seen) * cache.row_bytes(index) for index, spec in enumerate(cache.specs))
    return gemma.gpu_bytes["weights"] + read


async def _profiled(result: Result, runner: Runner, ids: Sequence[int]) -> Result:
    """Add the GPU's time for the prompt `ids`, whose depth is in the cache, and for one token after it.

    Unlike elsewhere, the lock is held during the waits too: other threads' work would be in the times.
    """
    device, shape = runner.device, result.shape
    steps = min(_PROFILED_STEPS, shape.decode)
    prefill: list[_Profile] = []
    decode: list[_Profile] = []
    with device.lock:
        started = time.perf_counter()
        lease = runner.begin(ids, shape.depth)
        try:
            while left := len(ids) - lease.computed:
                await runner.look_up(ids[-left:][: runner.prefill_chunk])
                if left > runner.prefill_chunk:
                    programs = [runner.chunk(lease, runner.prefill_chunk)]
                else:
                    programs = runner.finish_programs(lease, left, _GREEDY)
                prefill.append((programs, (await device.profile(programs)).tolist()))
            begun = time.perf_counter()
            runner.set_rows([row := Row(lease, len(ids), _GREEDY)])
            for _ in range(steps):
                await runner.look_up(runner.tokens_of([row]))
                programs = runner.step_programs()
                decode.append((programs, (await device.profile(programs)).tolist()))
            ended = time.perf_counter()
        finally:
            lease.end("this text was only timed")
    if shape.prefill:
        result = replace(result, prefill_kernels=_by_kernel(prefill), prefill_profiled=begun - started)
    if shape.decode:
        result = replace(result, decode_kernels=_by_kernel(decode, steps), decode_profiled=(ended - begun) / steps)
    return result


_Profile = tuple[list[Program], list[float]]
"""Some programs, and the seconds of each of their dispatches."""


def _by_kernel(profiles: Iterable[_Profile], steps: int = 1) -> list[Kernel]:
    """Sum up profiles of so many equal steps: the mean of a step, with the slowest kernel first."""
    sums: dict[tuple[str, tuple[int, int, int]], tuple[int, float]] = {}
    for programs, seconds in profiles:
        dispatches = chain.from_iterable(program.dispatches for program in programs)
        for dispatch, duration in zip(dispatches, seconds, strict=True):
            key = dispatch.pipeline.label, dispatch.workgroups
            count, total = sums.get(key, (0, 0.0))
            sums[key] = count + 1, total + duration
    kernels = [Kernel(*key, count // steps, total / steps) for key, (count, total) in sums.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


async def read_bandwidth(device: Device) -> float:
    """Return the bytes per second that the read kernel reaches at best on a buffer that no cache holds."""
    workgroups = 256 if device.info.type == "CPU" else 2048  # large shares, but enough of them for all threads
    unit = READ_STEP * workgroups
    size = min(_READ_BYTES, device.limits.max_storage_buffer_binding_size, device.limits.max_buffer_size)
    kernels = Kernels(device, half=False)
    words = device.buffer(size // unit * unit, "words to read")
    out = device.buffer(unit, "their sums")
    try:
        program = record(device, [kernels.read(words, out, workgroups=workgroups)])
        return words.size / await pass_seconds(device, program, out)
    finally:
        kernels.close()
        words.destroy()
        out.destroy()


async def pass_seconds(device: Device, program: Program, out: Buffer) -> float:
    """Return the seconds that a program, which writes `out`, takes at best.

    It runs many times in a row, so that the wait for the GPU does not count.
    """

    async def run(passes: int) -> float:
        with device.lock:
            started = time.perf_counter()
            reading = device.read(out, 0, 4, after=[program] * passes)
        await reading
        return time.perf_counter() - started

    await run(1)  # this compiles it
    best, passes = math.inf, 1
    for _ in range(3):
        while (elapsed := await run(passes)) < _READ_SECONDS:
            passes *= 2
        best = min(best, elapsed / passes)
    return best


async def _host_time(runner: Runner, tokenizer: Tokenizer) -> HostTime:
    return HostTime(Figure.of(await _times_alone(runner)), Figure.of(await _times_beside_shaders(runner, tokenizer)))


async def _times_alone(runner: Runner) -> list[float]:
    """Return the seconds that the host takes for steps of decode whose dispatches have no workgroups."""
    device = runner.device
    with device.lock:
        idle = [
            device.record([replace(dispatch, workgroups=(0, 0, 0)) for dispatch in program.dispatches])
            for program in runner.decode_programs()
        ]
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < _HOST_STEPS and time.perf_counter() - begun < _HOST_SECONDS:
        with device.lock:
            started = time.perf_counter()
            reading = device.read(runner.cache.keys(0), 0, 4, after=idle)
            times.append(time.perf_counter() - started)
        await reading
    return times


async def _times_beside_shaders(runner: Runner, tokenizer: Tokenizer) -> list[float]:
    """Return the seconds that the host takes for real steps of decode."""
    lock = runner.device.lock
    with lock:
        lease = runner.begin([tokenizer.bos_id], 0)
    try:
        await runner.look_up([tokenizer.bos_id])
        with lock:
            reading = runner.finish(lease, 1, _GREEDY)
        await reading
        row = Row(lease, 1, _GREEDY)
        await runner.look_up(runner.tokens_of([row]))
        times: list[float] = []
        most, begun = min(_HOST_STEPS, runner.context_length - 1), time.perf_counter()
        while len(times) < most and time.perf_counter() - begun < _HOST_SECONDS:
            with lock:
                runner.set_rows([row])
                started = time.perf_counter()
                reading = runner.step()
                times.append(time.perf_counter() - started)
            await reading
        return times
    finally:
        with lock:
            lease.end("this text was only timed")


def evict(files: Iterable[Path]) -> None:
    """Ask the system to keep nothing of `files` in memory, if it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_hash(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a model, in hexadecimal.

    It is that of a model folder's manifest, which has those of its other files; or that of a single file; or else
    that of the SHA-256 of all files in the order of their names. Raises OSError if a file cannot be read.
    """
    chosen = [path for path in files if path.name == MANIFEST] or sorted(files)
    digests = [sha256(path) for path in chosen]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
