"""How fast a model is, in the terms of llama-bench, and where the time goes.

Asynchronous at the bottom and in need of nothing but numpy, so that it runs in a browser too. How to read the figures
stands in benchmarks/README.md.
"""

from __future__ import annotations

import hashlib
import json
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

from gemma_wgpu import session
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.gpu.device import AdapterInfo, Device, Program
from gemma_wgpu.kernels import READ_STEP, Kernels
from gemma_wgpu.model import Model
from gemma_wgpu.sampling import Sampling
from gemma_wgpu.tokenizer import Tokenizer
from gemma_wgpu.weights.manifest import MANIFEST

Progress = Callable[[int, int], None]

OURS = "gemma-wgpu"
_FORMAT = 1
_HOST_STEPS = 64  # of which the median is taken
_PROFILED_STEPS = 8  # of decode, whose mean is taken
_READ_BYTES = 256 << 20  # more than caches hold
_READ_SECONDS = 0.05  # at least, so that the wait for the GPU does not count
_SHAPE = re.compile(r"(?:pp(\d+))?\+?(?:tg(\d+))?")
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

    `cached` counts the tokens that the engine had in its cache before; `ids` are the new ones, greedily chosen.
    """

    cached: int
    prefill_seconds: float
    decode_seconds: float
    ids: list[int]


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
        new = [token async for token in generation.tokens()]
        stats = generation.stats
        return Run(stats.reused_tokens, stats.prefill_seconds, stats.decode_seconds, new)

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
    """

    engine: str
    shape: Shape
    warm_up: Run
    runs: list[Run]
    decode_bytes: int | None = None
    prefill_kernels: list[Kernel] = field(default_factory=list)
    decode_kernels: list[Kernel] = field(default_factory=list)

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
    """Seconds to load the model: first, its files not in memory where the system lets go of them; then again."""

    cold: float
    warm: float


@dataclass(frozen=True)
class Report:
    """All that a benchmark found. `bandwidth` is what the read kernel reaches, in bytes a second."""

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
    load: Load | None = None
    sha256: str | None = None
    format: int = _FORMAT

    def to_json(self) -> str:
        """Everything, each run by itself."""
        return json.dumps(asdict(self), indent=1) + "\n"


async def bench(
    gemma: Gemma,
    shapes: Sequence[Shape],
    *,
    repetitions: int = 5,
    peers: Sequence[Engine] = (),
    progress: Progress | None = None,
) -> Report:
    """Time `shapes` on a model, `repetitions` times each after one run to warm up, by turns with its `peers`.

    `progress` is called with (runs done, runs in all). Raises RequestError for a shape that the context is too short
    for, and for less than one repetition.
    """
    check_context(shapes, gemma.context_length)
    if repetitions < 1:
        raise RequestError(f"repetitions is {repetitions}; it must be above 0")
    model, device = gemma._model, gemma.device
    engines = [_Ours(gemma), *peers]
    done, total = 0, len(shapes) * len(engines) * (repetitions + 1)
    results = []
    try:
        for shape in shapes:
            ids = prompt_ids(gemma.tokenizer, shape.depth + shape.prompt)
            runs: list[list[Run]] = [[] for _ in engines]
            for _ in range(repetitions + 1):
                for engine, its_runs in zip(engines, runs, strict=True):
                    await engine.fill(ids[: shape.depth])
                    its_runs.append(await engine.run(ids[shape.depth :], shape.decode))
                    done += 1
                    if progress:
                        progress(done, total)
            found = [Result(e.name, shape, first, rest) for e, (first, *rest) in zip(engines, runs, strict=True)]
            found[0] = replace(found[0], decode_bytes=_decode_bytes(model, shape))
            if "timestamp-query" in device.features:
                await engines[0].fill(ids[: shape.depth])
                prefill, decode = await _profile(model, ids, shape)
                found[0] = replace(found[0], prefill_kernels=prefill, decode_kernels=decode)
            results += found
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
            bandwidth=await read_bandwidth(device),
            dispatches_per_token=model.decode_dispatches,
            host=await _host_time(model, gemma.tokenizer),
            results=results,
        )
    finally:
        engines[0].close()


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


async def _profile(model: Model, ids: Sequence[int], shape: Shape) -> tuple[list[Kernel], list[Kernel]]:
    """The GPU's time for the prompt, and for one token after it."""
    device = model.device
    model.begin(np.array(ids, np.uint32), Sampling(temperature=0))
    prefill: list[tuple[list[Program], list[float]]] = []
    for start in range(shape.depth, len(ids), model.prefill_chunk):
        count = min(model.prefill_chunk, len(ids) - start)
        programs = [model.chunk_program(start, count)]
        if start + count == len(ids):
            programs += model.sample_programs
        prefill.append((programs, (await device.profile(programs)).tolist()))
    steps = min(_PROFILED_STEPS, shape.decode)
    decode = []
    for _ in range(steps):
        decode.append((model.decode_programs, ((await device.profile(model.decode_programs)) / steps).tolist()))
    model.sequence.forget()
    return (_by_kernel(prefill) if shape.prefill else []), _by_kernel(decode, steps)


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
    program = device.record([Kernels(device, half=False).read(words, out, workgroups=workgroups)])
    best, passes, elapsed = 0.0, 1, 0.0
    for _ in range(3):
        while True:
            started = time.perf_counter()
            await device.read(out, 0, 4, after=[program] * passes)
            elapsed = time.perf_counter() - started
            if elapsed >= _READ_SECONDS:
                break
            passes *= 2
        best = max(best, passes * words.size / elapsed)
    words.destroy()
    out.destroy()
    return best


async def _host_time(model: Model, tokenizer: Tokenizer) -> HostTime:
    device = model.device
    idle = [
        device.record([replace(dispatch, workgroups=(0, 0, 0)) for dispatch in program.dispatches])
        for program in model.decode_programs
    ]
    alone, beside = [], []
    for _ in range(_HOST_STEPS):
        started = time.perf_counter()
        reading = device.read(model.tokens, 0, 4, after=idle)
        alone.append(time.perf_counter() - started)
        await reading
    model.begin(np.array([tokenizer.bos_id], np.uint32), Sampling(temperature=0))
    await model.prefill()
    await model.sample(1)
    for position in range(2, min(_HOST_STEPS + 2, model.context_length + 1)):
        started = time.perf_counter()
        reading = model.decode(position)
        beside.append(time.perf_counter() - started)
        await reading
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
