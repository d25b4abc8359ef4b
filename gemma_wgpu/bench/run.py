"""How fast a model is, in the terms of llama-bench, and where the time goes.

Asynchronous at the bottom and in need of nothing but numpy, so that it runs in a browser too. How to read the figures
stands in benchmarks/README.md.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import numpy as np

from gemma_wgpu.bench.records import structured
from gemma_wgpu.engine import session
from gemma_wgpu.engine.model import Model
from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.gpu.device import AdapterInfo, Buffer, Device, Limits, Program
from gemma_wgpu.ops.kernels import READ_STEP, Kernels
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.manifest import MANIFEST

Progress = Callable[[str, int, int], None]
"""Told what begins, and how many steps of all are done."""

OURS = "gemma-wgpu"
FORMAT = 2
_HOST_STEPS = 64  # of which the median is taken
_HOST_SECONDS = 1.0  # after which fewer will do
_PROFILED_STEPS = 8  # of decode, whose mean is taken
_READ_BYTES = 256 << 20  # more than caches hold
_READ_SECONDS = 0.05  # at least, so that the wait for the GPU does not count
_SHAPE = re.compile(r"(?:pp(\d+))?\+?(?:tg(\d+))?")
_DEPTH = re.compile(r"(\d+)(k?)")
# Lewis Carroll, Alice's Adventures in Wonderland (1865), which has no copyright any more.
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
    """What a run times, in tokens: `prefill` of a prompt, then `decode` one after the other, on top of `depth` in the
    cache.

    Without a prompt, decode begins with one token that is not counted. Raises RequestError where there is nothing to
    time.
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
        """ "pp512", "tg128", "pp1024+tg256", or "litert", which is the last one. Raises RequestError for others."""
        match = _SHAPE.fullmatch("pp1024+tg256" if text == "litert" else text)
        if not match or not any(match.groups()):
            raise RequestError(f"{text!r} is not a shape such as pp512, tg128, pp512+tg128 or litert")
        return cls(int(match[1] or 0), int(match[2] or 0))

    def __str__(self) -> str:
        parts = [f"pp{self.prefill}"] * bool(self.prefill) + [f"tg{self.decode}"] * bool(self.decode)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def prompt(self) -> int:
        """Tokens that are given."""
        return max(self.prefill, 1)

    @property
    def context(self) -> int:
        """Tokens that the context must hold."""
        return self.depth + self.prompt + self.decode


def parse_depths(text: str) -> list[int]:
    """ "0,1k,4k": whole numbers, 1k being 1024. Raises RequestError for anything else."""
    found = [_DEPTH.fullmatch(part.strip().lower()) for part in text.split(",")]
    if not all(found):
        raise RequestError(f"{text!r} is not a list of depths such as 0,1k,4k,16k")
    return [int(match[1]) << 10 * len(match[2]) for match in found if match]


def check_context(shapes: Iterable[Shape], context_length: int) -> None:
    """Raise RequestError naming a shape that is longer than `context_length`."""
    for shape in shapes:
        if shape.context > context_length:
            raise RequestError(
                f"{shape} takes a context of {shape.context:,} tokens, and this model has {context_length:,}; "
                "choose a smaller shape or depth"
            )


@dataclass(frozen=True)
class Run:
    """`prefill_seconds` last until the first new token, `decode_seconds` from there to the last one.

    `cached` counts the tokens that the engine had in its cache before; `ids` are the new ones, greedily chosen, and
    `token_seconds` the time from each to the next, where the engine tells.
    """

    cached: int
    prefill_seconds: float
    decode_seconds: float
    ids: list[int]
    token_seconds: list[float] = field(default_factory=list)


def timed_run(cached: int, started: float, ids: list[int], times: Sequence[float]) -> Run:
    """The run that `started` at a time and yielded `ids` at `times`, in seconds."""
    return Run(cached, times[0] - started, times[-1] - times[0], ids, np.diff(times).tolist())


class Engine(ABC):
    """What runs a model: ours, or a peer's."""

    name: str
    versions: dict[str, str]

    @abstractmethod
    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more, and wait until that is so."""

    @abstractmethod
    async def run(self, ids: Sequence[int], decode: int) -> Run:
        """`ids` on top of the cache, then `decode` tokens after the first new one, whatever they say."""

    @abstractmethod
    def close(self) -> None:
        """Free its memory."""


class _Ours(Engine):
    name = OURS

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma
        self._model = gemma._model
        self._folder = tempfile.TemporaryDirectory()
        self._ids: list[int] = []  # in the cache
        self._saved: list[int] = []  # in the session's file
        try:
            self.versions = {OURS: version(OURS)}
        except PackageNotFoundError:  # run from its source
            self.versions = {OURS: "not installed"}

    async def fill(self, ids: Sequence[int]) -> None:
        model, path = self._model, Path(self._folder.name) / "session"
        self._gemma.reset()
        self._ids = list(ids)
        if ids and self._ids == self._saved:  # a long one takes much longer to compute than to write back
            session.restore(model, path)
        elif ids:
            model.begin(np.array(ids, np.uint32), Sampling(temperature=0))
            await model.prefill()
            await session.save(model, path)
            self._saved = self._ids
        await model.device.read(model.state)

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        prompt = [*self._ids, *ids]
        generation = self._gemma.generate(prompt, max_new_tokens=decode + 1, temperature=0)
        new, times = [], []
        async for token in generation.tokens():
            new.append(token)
            times.append(time.perf_counter())
        stats = generation.stats
        return Run(stats.reused_tokens, stats.prefill_seconds, stats.decode_seconds, new, np.diff(times).tolist())

    def close(self) -> None:
        self._gemma.reset()
        self._folder.cleanup()


@dataclass(frozen=True)
class Kernel:
    """GPU seconds of the dispatches of one shader that have the same grid."""

    shader: str
    workgroups: tuple[int, int, int]
    dispatches: int
    seconds: float


@dataclass(frozen=True)
class Figure:
    """Of some runs."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Sum up `values`."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.smallest:.1f}..{self.largest:.1f})"


@dataclass(frozen=True)
class Result:
    """The runs of one engine on one shape. `warm_up` came before them and counts for nothing else.

    - decode_bytes: what one step of decode reads, in the middle of the decode: all weights, and of the cache what the
      layers see; of ours only.
    - prefill_kernels, decode_kernels: GPU time of the prompt and of one token; empty where it cannot be measured.
    - prefill_profiled, decode_profiled: seconds of the clock that the same took, in which all of these kernels ran.
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
        """Tokens of the prompt a second, up to the first new token; None without a prompt."""
        if not self.shape.prefill:
            return None
        return Figure.of([self.shape.prefill / run.prefill_seconds for run in self.runs])

    @property
    def decode(self) -> Figure | None:
        """Tokens a second; None without any."""
        if not self.shape.decode:
            return None
        return Figure.of([self.shape.decode / run.decode_seconds for run in self.runs])

    @property
    def first_token(self) -> Figure:
        """Seconds."""
        return Figure.of([run.prefill_seconds for run in self.runs])

    @property
    def token_percentiles(self) -> tuple[float, float, float] | None:
        """Seconds that 50, 95 and 99 % of the tokens take at most; None where the engine does not tell."""
        seconds = [duration for run in self.runs for duration in run.token_seconds]
        if not seconds:
            return None
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist()
        return p50, p95, p99

    @property
    def decode_bandwidth(self) -> float | None:
        """Bytes a second that decode reads."""
        if self.decode is None or self.decode_bytes is None:
            return None
        return self.decode.median * self.decode_bytes


@dataclass(frozen=True)
class HostTime:
    """Seconds that the host takes to put one decode step on an idle queue.

    - alone: of a step whose dispatches have no workgroups: what the host itself costs.
    - beside_shaders: of a real step. It is more where the adapter is the CPU, whose caches the shaders fill.
    """

    alone: Figure
    beside_shaders: Figure


@dataclass(frozen=True)
class Load:
    """Seconds to load the model: first, its files not in memory where the system lets go of them, or in a browser not
    yet downloaded; then again. `cold` is None where there was nothing left to download. The `stages` are parts of it.
    """

    cold: float | None
    warm: float
    cold_stages: dict[str, float] = field(default_factory=dict)
    warm_stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What another implementation says to a prompt: `tokens`, greedily chosen after `ids`."""

    ids: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Reference:
    """What `source`, another implementation, says to some prompts."""

    source: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class Match:
    """How many of the tokens that were compared with those of a reference were the same."""

    source: str
    prompts: int
    tokens: int
    same: int


@dataclass(frozen=True)
class Report:
    """All that a benchmark found.

    - bandwidth: what the read kernel reaches, in bytes a second.
    - match: how the model's tokens compare with a reference; None where none is known. Without a full match the
      figures are void: see `valid`.
    - host_bytes: of the host's memory, by what holds them, where that can be known.
    - model_bytes: of the model's files.
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
        """Whether nothing is known against the figures: a wrong token, or runs of ours that differ."""
        ours = [result for result in self.results if result.engine == OURS]
        repeated = all(run.ids == result.warm_up.ids for result in ours for run in result.runs)
        return repeated and (self.match is None or self.match.same == self.match.tokens)

    def to_json(self) -> str:
        """Everything, each run by itself."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote. Raises RequestError for anything else, also of another format's number."""
        try:
            content = json.loads(text)
            version = content["format"]
            report: Report | None = structured(cls, content) if version == FORMAT else None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RequestError(f"not a report of gemma-wgpu's benchmark ({error})") from error
        if report is None:
            raise RequestError(f"a report of format {version}, this gemma-wgpu reads {FORMAT}; measure again")
        if not report.results or not all(_sound(result) for result in report.results):
            raise RequestError("a report whose runs do not fit their shape; measure again")
        return report


def _sound(result: Result) -> bool:
    """Whether all that is computed from a result can be."""
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
    progress: Progress | None = None,
) -> Report:
    """Time `shapes` on a model, `repetitions` times each after one run to warm up, by turns with its `peers`.

    Its tokens are compared with those of a `reference` too. Raises RequestError for a shape that the context is too
    short for, and for less than one repetition.
    """
    check_context(shapes, gemma.context_length)
    if repetitions < 1:
        raise RequestError(f"repetitions is {repetitions}; it must be above 0")
    model, device = gemma._model, gemma.device
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
            found[0] = replace(found[0], decode_bytes=_decode_bytes(model, shape))
            if timed:
                steps.begin(f"timing kernels, {shape}")
                await engines[0].fill(ids[: shape.depth])
                found[0] = await _profiled(found[0], model, ids)
            results += found
        if reference:
            steps.begin("comparing tokens with the reference")
        match = await compare(gemma, reference, shapes) if reference else None
        steps.begin("measuring bandwidth")
        bandwidth = await read_bandwidth(device)
        steps.begin("timing the host")
        host = await _host_time(model, gemma.tokenizer)
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
            tuning=str(model.tuning),
            context_length=gemma.context_length,
            gpu_bytes=gemma.gpu_bytes,
            bandwidth=bandwidth,
            dispatches_per_token=model.decode_dispatches,
            host=host,
            results=results,
            features=sorted(device.features),
            limits=device.limits,
            match=match,
        )
    finally:
        engines[0].close()


class _Steps:
    """Tells `progress` of each step."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def begin(self, what: str) -> None:
        """The next one."""
        if self._progress:
            self._progress(what, self._done, self._total)
        self._done += 1

    def end(self) -> None:
        """All are done."""
        self.begin("done")


async def compare(gemma: Gemma, reference: Reference, shapes: Iterable[Shape]) -> Match:
    """How the model's tokens compare with a reference's: after its prompts that are no longer than those of `shapes`,
    or the shortest, as many tokens as `shapes` decode and the one before, where the reference has them."""
    shapes = list(shapes)
    longest, most = max(shape.prompt for shape in shapes), max(shape.decode for shape in shapes) + 1
    by_length = sorted(reference.prompts, key=lambda prompt: len(prompt.ids))
    prompts = by_length[:1] + [prompt for prompt in by_length[1:] if len(prompt.ids) <= longest]
    tokens = same = 0
    for prompt in prompts:
        expected = prompt.tokens[:most]
        generation = gemma.generate(prompt.ids, max_new_tokens=len(expected), temperature=0)
        async for _ in generation:
            pass
        tokens += len(expected)
        same += sum(a == b for a, b in zip(generation.ids, expected, strict=False))
    return Match(reference.source, len(prompts), tokens, same)


def prompt_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """`count` ids, the same for every engine: BOS, and a text over and over."""
    text = tokenizer.encode(_TEXT, bos=False)
    return [tokenizer.bos_id, *(text * (count // len(text) + 1))][:count]


def _decode_bytes(model: Model, shape: Shape) -> int | None:
    if not shape.decode:
        return None
    seen = shape.depth + shape.prompt + shape.decode // 2
    slots = sum(min(layer.attention.window, seen) for layer in model.layers)
    return model.weight_bytes + 2 * slots * model.slot_bytes


async def _profiled(result: Result, model: Model, ids: Sequence[int]) -> Result:
    """With the GPU's time for the prompt, and for one token after it."""
    device, shape = model.device, result.shape
    started = time.perf_counter()
    model.begin(np.array(ids, np.uint32), Sampling(temperature=0))
    prefill: list[tuple[list[Program], list[float]]] = []
    for start in range(shape.depth, len(ids), model.prefill_chunk):
        count = min(model.prefill_chunk, len(ids) - start)
        programs = [model.chunk_program(start, count)]
        if start + count == len(ids):
            programs += model.sample_programs
        prefill.append((programs, (await device.profile(programs)).tolist()))
    begun = time.perf_counter()
    steps = min(_PROFILED_STEPS, shape.decode)
    decode = []
    for _ in range(steps):
        decode.append((model.decode_programs, ((await device.profile(model.decode_programs)) / steps).tolist()))
    ended = time.perf_counter()
    model.sequence.forget()
    if shape.prefill:
        result = replace(result, prefill_kernels=_by_kernel(prefill), prefill_profiled=begun - started)
    if shape.decode:
        result = replace(result, decode_kernels=_by_kernel(decode, steps), decode_profiled=(ended - begun) / steps)
    return result


def _by_kernel(profiles: Iterable[tuple[list[Program], list[float]]], steps: int = 1) -> list[Kernel]:
    """The slowest first; dispatches are those of one step."""
    sums: dict[tuple[str, tuple[int, int, int]], tuple[int, float]] = {}
    for programs, seconds in profiles:
        dispatches = chain.from_iterable(program.dispatches for program in programs)
        for dispatch, duration in zip(dispatches, seconds, strict=True):
            key = dispatch.pipeline.label, dispatch.workgroups
            count, total = sums.get(key, (0, 0.0))
            sums[key] = count + 1, total + duration
    kernels = [Kernel(*key, count // steps, total) for key, (count, total) in sums.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


async def read_bandwidth(device: Device) -> float:
    """Bytes a second that the read kernel reaches at best on a buffer that no cache holds."""
    workgroups = 256 if device.info.type == "CPU" else 2048  # large shares, but enough of them for all threads
    unit = READ_STEP * workgroups
    size = min(_READ_BYTES, device.limits.max_storage_buffer_binding_size, device.limits.max_buffer_size)
    words = device.buffer(size // unit * unit, "words to read")
    out = device.buffer(unit, "their sums")
    try:
        program = device.record([Kernels(device, half=False).read(words, out, workgroups=workgroups)])
        return words.size / await pass_seconds(device, program, out)
    finally:
        words.destroy()
        out.destroy()


async def pass_seconds(device: Device, program: Program, out: Buffer) -> float:
    """Seconds that a program takes at best, which writes `out`; many times over, so that a wait does not count."""
    await device.read(out, 0, 4, after=[program])  # compiled
    best, passes = math.inf, 1
    for _ in range(3):
        while True:
            started = time.perf_counter()
            await device.read(out, 0, 4, after=[program] * passes)
            elapsed = time.perf_counter() - started
            if elapsed >= _READ_SECONDS:
                break
            passes *= 2
        best = min(best, elapsed / passes)
    return best


async def _host_time(model: Model, tokenizer: Tokenizer) -> HostTime:
    device = model.device
    idle = [
        device.record([replace(dispatch, workgroups=(0, 0, 0)) for dispatch in program.dispatches])
        for program in model.decode_programs
    ]
    alone, beside = [], []
    begun = time.perf_counter()
    for _ in range(_HOST_STEPS):
        started = time.perf_counter()
        reading = device.read(model.tokens, 0, 4, after=idle)
        alone.append(time.perf_counter() - started)
        await reading
        if time.perf_counter() - begun > _HOST_SECONDS:
            break
    model.begin(np.array([tokenizer.bos_id], np.uint32), Sampling(temperature=0))
    await model.prefill()
    await model.sample(1)
    begun = time.perf_counter()
    for position in range(2, min(_HOST_STEPS + 2, model.context_length + 1)):
        started = time.perf_counter()
        reading = model.decode(position)
        beside.append(time.perf_counter() - started)
        await reading
        if time.perf_counter() - begun > _HOST_SECONDS:
            break
    model.sequence.forget()
    return HostTime(Figure.of(alone), Figure.of(beside))


def evict(files: Iterable[Path]) -> None:
    """Ask the system to keep nothing of `files` in memory, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_hash(files: Sequence[Path]) -> str:
    """SHA-256 of a model: of a model folder's manifest, which has those of its other files; of a single file; else
    of the SHA-256 of all files in the order of their names."""
    chosen = [path for path in files if path.name == MANIFEST] or sorted(files)
    digests = []
    for path in chosen:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
