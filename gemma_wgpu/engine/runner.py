"""Runs the steps of a model: prompts chunk by chunk, and one token for each of some sequences.

Everything that a step does is on the GPU, the choice of the next token too. A step is recorded once and replayed. All
methods that touch the GPU do so at once and return, or return what can be awaited; whoever calls them holds the
device's lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.encoder import Encoder
from gemma_wgpu.engine.lookup import Lookup
from gemma_wgpu.engine.prompt import runs
from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu.device import Buffer, Device, Program
from gemma_wgpu.models.spec import LanguageModel
from gemma_wgpu.ops.kernels import STATE_WORDS, SUMMARY_BYTES, VOCABULARY_PART, Kernels, ceil_div
from gemma_wgpu.ops.kv_cache import KVCache, Lease, Ring, ring_words
from gemma_wgpu.ops.launch import Launch, Value, record
from gemma_wgpu.ops.linear import HostTable
from gemma_wgpu.ops.rope import RopeTables
from gemma_wgpu.ops.scratch import Scratch
from gemma_wgpu.ops.step import (
    Attention,
    BatchStep,
    ChunkStep,
    Normed,
    Norms,
    Product,
    Step,
    Surroundings,
    TokenStep,
)
from gemma_wgpu.ops.tuning import Tuning
from gemma_wgpu.options import Options

PREFILL_CHUNK = 512
_SMALLEST_CHUNK = 32
_LOGITS_BYTES = 64 << 20  # at most, of the buffer that `chunk_logits` reads from
_LOOKUP_ROWS = 512  # that are remembered beside those of two chunks
_STATE_BYTES = 4 * STATE_WORDS
_TOKEN = 3  # the word of a State with the token that was chosen
_SAMPLING_WORDS = 6  # of the struct Sampling of shaders/sampling.wgsl
# Below this temperature, logits over it leave float32, and the likeliest token has all the probability anyway.
_COLDEST = 1e-4
_SMALLEST = 2.0**-126  # that a GPU's float32 tells from 0

Bytes = NDArray[np.uint8]
Features = Mapping[int, NDArray[np.float32]]
"""The features of images and sounds, float32 (tokens, hidden size), by their keys."""
NO_FEATURES: Features = {}

Mask = Callable[[], NDArray[np.uint32]]
"""Says which tokens may be drawn next, a bit each: u32 (vocab_size / 32,) at most."""


@dataclass(frozen=True)
class Draw:
    """How the next tokens of a sequence are drawn: the options of sampling, and the seed."""

    options: Options
    seed: int

    @property
    def divisor(self) -> float:
        """Return what the logits are divided by: 1 if the likeliest token is taken."""
        return self.options.temperature if self.options.temperature >= _COLDEST else 1.0

    def words(self) -> NDArray[np.uint32]:
        """Return the struct Sampling of shaders/sampling.wgsl."""
        options = self.options
        temperature = options.temperature if options.temperature >= _COLDEST else 0.0
        floats = [temperature, max(options.top_p, _SMALLEST), options.min_p, options.repetition_penalty]
        integers = np.array([options.top_k, self.seed], np.uint32)
        return np.concatenate((np.array(floats, np.float32).view(np.uint32), integers))


@dataclass(eq=False)
class Row:
    """A sequence that takes part in steps of one token: the next step computes the token at `position`."""

    lease: Lease
    position: int
    draw: Draw


@dataclass(frozen=True)
class _Recorded:
    """A step, recorded: its layers, the head that yields the logits, and what writes its hidden states instead.

    If other vectors may take the place of embeddings, `embedding` comes before the layers, and writes `embedded`. The
    layers that fill no cache are apart, as `last`, if they are for the last token of a prompt alone.
    """

    embedding: Program | None
    embedded: Value
    layers: Program
    last: Program | None
    head: Program
    hidden: Launch
    hidden_out: Value
    placed: dict[Value, Buffer]


class Runner:
    """A model on a device, with the cache of its sequences and all buffers that do not depend on the weights.

    `half` is F16 mode, `int8` rounds prompts' activations to 8 bits; `context_length` and `prefill_chunk` are in
    tokens. Only token ids below `drawable` can be drawn. `encoders` read images and sounds, if the model can.
    `host_table` is the model's table that stays off the GPU, if one does: then `lookup` must have the rows of a
    step's tokens before the step is submitted. Raises DeviceError if the GPU's memory is exhausted.
    """

    def __init__(
        self,
        device: Device,
        model: LanguageModel,
        *,
        half: bool,
        int8: bool = False,
        tuning: Tuning | None = None,
        context_length: int,
        prefill_chunk: int = PREFILL_CHUNK,
        drawable: int | None = None,
        host_table: HostTable | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self.half = half
        self.int8 = int8
        self.context_length = context_length
        self.prefill_chunk = prefill_chunk
        self.vocab_size = model.head.rows
        self.drawable = self.vocab_size if drawable is None else min(drawable, self.vocab_size)
        self.kernels = Kernels(device, half=half, tuning=tuning)
        self.cache = KVCache(device, self.kernels, model.caches, context_length=context_length, half=half)
        self._ropes = RopeTables(device, model.ropes, context_length)
        self._norms = Norms(device)
        self._scratch = Scratch(device)
        self.encoders = {
            name: Encoder(device, self.kernels, self._norms, tower)
            for name, tower in {**model.towers, **model.hard_tokens}.items()
        }
        self._hard = {token for encoder in self.encoders.values() for token in encoder.tower.hard}
        self.lookup = Lookup(host_table, 2 * prefill_chunk + _LOOKUP_ROWS) if host_table else None
        self._around = Surroundings(self.kernels, self._norms, self._ropes, self.cache, int8)
        self._steps: dict[tuple[str, int], _Recorded] = {}
        self._programs: dict[tuple[str, int], Program] = {}
        self._versions = (0, 0)
        self._own: dict[str, Buffer] = {}
        self._rows: list[Row] = []
        self._fresh = False  # whether the states on the GPU are those of `_rows`, whose rings were `_written`
        self._written: list[tuple[Ring, ...]] = []
        self._seen_words = ceil_div(self.vocab_size, 32)
        self._make_buffers(rows=1, slots=1)
        self._plan()

    # Memory.

    def _make_buffers(self, *, rows: int, slots: int) -> None:
        """Make the buffers that have something for each row of a step, or for each slot of a sequence."""
        vocab, words = self.vocab_size, self._seen_words
        for name, size in (
            ("prompt state", _STATE_BYTES),
            ("last state", _STATE_BYTES),
            ("prompt sampling", 4 * _SAMPLING_WORDS),
            ("prompt tokens", 4 * self.prefill_chunk),
            *([("reach", 4 * self.prefill_chunk)] if self.encoders else []),
            *([("rows", max(self.prefill_chunk, rows) * self.lookup.row_bytes)] if self.lookup else []),
            ("states", rows * _STATE_BYTES),
            ("batch state", _STATE_BYTES),
            ("samplings", 4 * rows * _SAMPLING_WORDS),
            ("logits", 4 * rows * vocab),
            ("masks", 4 * rows * words),
            ("summaries", rows * SUMMARY_BYTES * ceil_div(vocab, VOCABULARY_PART)),
            ("tokens", 4 * slots),
            ("seen", 4 * slots * words),
        ):
            old = self._own.get(name)
            if old is not None and old.size >= size:
                continue
            new = self.device.buffer(size, name)
            if old is not None:
                self.device.copy(old, new, old.size)
                old.destroy()
                self._forget_programs()
            self._own[name] = new
        self._around = replace(self._around, rows=self._own.get("rows"))

    def reserve(self, rows: int) -> None:
        """Make room for so many sequences side by side. Raises DeviceError if the GPU's memory is exhausted."""
        self._make_buffers(rows=rows, slots=rows)

    def _plan(self) -> None:
        """Make the memory for the largest steps, so that what the model takes is known before it runs."""
        lease = self.cache.lease([], 0)
        chunk = self.prefill_chunk
        # The one that needs most comes first, since the others then find room in its memory.
        steps: tuple[Step, ...] = self._chunk_step(chunk, whole=True), self._chunk_step(chunk)
        for step in (*steps, self._token_step(prompt=False)):
            self._logits(step, self.model.forward(step))
            self._scratch.place(step.launches)
        lease.end("nothing was computed")

    @property
    def norm_bytes(self) -> int:
        """Return the bytes of the norms' weights."""
        return self._norms.nbytes

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of keys and values, and of the tables of rotations, as they are now."""
        return self.cache.nbytes + self._ropes.nbytes

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of everything else but the weights."""
        own = sum(buffer.size for buffer in self._own.values())
        return self._scratch.nbytes + own + self.kernels.nbytes

    def fill(self) -> None:
        """Let the cache take what it takes at most for one sequence. Raises DeviceError if that is too much."""
        lease = self.cache.lease([], 0)
        lease.reserve(self.context_length)
        self._ropes.reserve(self.context_length)
        lease.end("nothing was computed")

    # The programs.

    def _forget_programs(self) -> None:
        self._steps.clear()
        self._programs.clear()
        self._fresh = False

    def _current(self) -> None:
        """Forget the programs if a cache or a table has become another buffer."""
        versions = self.cache.version, self._ropes.version
        if versions != self._versions:
            self._versions = versions
            self._forget_programs()

    def _chunk_step(self, count: int, *, images: bool = False, whole: bool = False) -> ChunkStep:
        own = self._own
        reach, last = own["reach"] if images else None, None if whole else own["last state"]
        return ChunkStep(self._around, own["prompt state"], own["prompt tokens"], count, reach, last=last)

    def _token_step(self, *, prompt: bool) -> TokenStep:
        if prompt:
            return TokenStep(self._around, self._own["prompt state"], self._own["prompt tokens"], by_slot=False)
        return TokenStep(self._around, self._own["states"], self._own["tokens"], by_slot=True)

    def _batch_step(self, count: int) -> Step:
        if count == 1:
            return self._token_step(prompt=False)
        own = self._own
        return BatchStep(self._around, own["states"], own["tokens"], count, own["batch state"])

    def _chunk(self, lease: Lease, count: int, whole: bool) -> _Recorded:
        """Make room for the next `count` tokens of a sequence; return what takes them through the layers.

        It is for the logits after the last token, or after any of them if `whole`.
        """
        start = lease.computed
        self._reserve(lease, start + count)
        images = any(map(self._is_foreign, lease.ids[start : start + count]))
        if count == 1 and not images:
            return self._recorded("token", 1, self._token_step(prompt=True))
        size = self._chunk_size(count)
        kind = ("whole " if whole else "") + ("image chunk" if images else "chunk")
        return self._recorded(kind, size, self._chunk_step(size, images=images, whole=whole))

    def _is_foreign(self, token: int) -> bool:
        """Say whether a tower has the vector of a token: one of an image, of a sound, or of its own."""
        return token < 0 or token in self._hard

    def _batch(self, count: int) -> _Recorded:
        """Return what takes one token of each of `count` sequences through the layers."""
        return self._recorded("batch", count, self._batch_step(count))

    def _recorded(self, kind: str, count: int, step: Step) -> _Recorded:
        self._current()
        if (kind, count) not in self._steps:
            x = self.model.forward(step)
            first = step.embedding_launches if kind.endswith("image chunk") else 0
            layers = len(step.launches)
            own = step.own_launches if isinstance(step, ChunkStep) and step.own_launches is not None else layers
            hidden_out = Value("hidden states", step.count, len(x.norm.weight))
            hidden = step.hidden(x, hidden_out)
            self._logits(step, x)
            placed = self._scratch.place(step.launches)
            self._steps[kind, count] = _Recorded(
                record(self.device, step.launches[:first], placed) if first else None,
                step.embedded,
                record(self.device, step.launches[first:own], placed),
                record(self.device, step.launches[own:layers], placed) if own < layers else None,
                record(self.device, step.launches[layers:], placed),
                hidden,
                hidden_out,
                placed,
            )
        return self._steps[kind, count]

    def _logits(self, step: Step, x: Normed) -> None:
        """Write down what computes the logits of a step."""
        step.logits(x, self.model.head, self._own["logits"])
        step.launches += self._capped(step, self._own["logits"], step.sequences)

    def _capped(self, step: Step, logits: Buffer, rows: int) -> list[Launch]:
        cap = self.model.softcap
        return [] if cap is None else [step.softcap(logits, cap, self.vocab_size, rows)]

    def _program(self, kind: str, count: int, launches: Callable[[], Sequence[Launch]]) -> Program:
        self._current()
        if (kind, count) not in self._programs:
            self._programs[kind, count] = record(self.device, launches())
        return self._programs[kind, count]

    def _sample_program(self, states: str, samplings: str, count: int) -> Program:
        """Return what draws the next token of `count` sequences from the logits."""
        own, kernels = self._own, self.kernels
        shape: dict[str, Any] = {"vocab": self.drawable, "stride": self.vocab_size, "sequences": count}

        def launches() -> Sequence[Launch]:
            common = own[states], own[samplings]
            return [
                kernels.logits_scan(*common, own["seen"], own["logits"], own["summaries"], **shape),
                kernels.sample(*common, own["logits"], own["summaries"], own["tokens"], own["seen"], **shape),
            ]

        return self._program(f"sample {states}", count, launches)

    def _mask_program(self, count: int) -> Program:
        """Return what leaves only those tokens to be drawn that the masks allow."""
        own, shape = self._own, {"vocab": self.drawable, "stride": self.vocab_size, "sequences": count}
        return self._program("mask", count, lambda: [self.kernels.mask(own["masks"], own["logits"], **shape)])

    # Prompts.

    def begin(self, ids: Sequence[int], most: int) -> Lease:
        """Begin a sequence of `ids`, of which `most` at most may come from the cache.

        Where an image's soft tokens are, `ids` has the image's key.
        """
        lease = self.cache.lease(ids, most)
        try:
            self._make_buffers(rows=1, slots=self.cache.slots)
            seen = seen_bits(np.array([token for token in ids if token >= 0], np.uint32), self.vocab_size)
            self.device.write(self._own["seen"], seen, lease.slot * seen.nbytes)
        except BaseException:
            lease.end("it could not begin")
            raise
        return lease

    def next_count(self, lease: Lease) -> int:
        """Return how many tokens of a sequence the next chunk is for: it ends in no image and no sound."""
        ids, start = lease.ids, lease.computed
        stop = min(start + self.prefill_chunk, len(ids))
        while stop < len(ids) and ids[stop - 1] < 0 and ids[stop] < 0:
            stop -= 1
        return stop - start

    def missing(self, tokens: Sequence[int]) -> list[int]:
        """Return the numbers of the rows that are to be fetched by `lookup` before a step of some tokens."""
        return self.lookup.missing(tokens) if self.lookup else []

    async def look_up(self, tokens: Sequence[int]) -> None:
        """Fetch what a step of some tokens needs of a table that stays off the GPU.

        Raises ModelError if it cannot be read.
        """
        if self.lookup and (numbers := self.lookup.missing(tokens)):
            self.lookup.keep(numbers, await self.lookup.fetch(numbers))

    def _write_lookup(self, tokens: Sequence[int]) -> None:
        if self.lookup:
            self.device.write(self._own["rows"], self.lookup.rows(tokens))

    def chunk(self, lease: Lease, count: int, features: Features = NO_FEATURES) -> Program:
        """Make the next `count` tokens of a sequence, at most `prefill_chunk`, ready; return what computes them.

        `features` are those of the images and sounds among them, by key.
        """
        return self._advance(lease, count, features).layers

    def _advance(self, lease: Lease, count: int, features: Features, *, whole: bool = False) -> _Recorded:
        """Do what `chunk` does; return the whole step."""
        start, recorded = lease.computed, self._chunk(lease, count, whole)
        self._write_chunk(lease, start, count)
        if recorded.embedding:
            self.device.submit([recorded.embedding])
            self._write_features(lease.ids[start : start + count], features, recorded.placed[recorded.embedded])
        lease.advance(start + count)
        return recorded

    def _write_chunk(self, lease: Lease, start: int, count: int) -> None:
        """Write down where a chunk stands, and its tokens."""
        self._write_state("prompt state", lease, start, count)
        self._write_state("last state", lease, start + count - 1, 1)
        # What is looked up for a soft token has no use.
        tokens = lease.ids[start : start + count]
        ids = np.maximum(np.array(tokens, np.int64), 0).astype(np.uint32)
        self.device.write(self._own["prompt tokens"], ids)
        self._write_lookup(tokens)

    def _write_features(self, ids: Sequence[int], features: Features, embedded: Buffer) -> None:
        """Put the towers' vectors into the place of embeddings, and write down which tokens see each other."""
        reach, row_bytes = np.arange(len(ids), dtype=np.uint32), 4 * self.model.head.cols
        for start, stop in runs(np.less(ids, 0)):
            reach[start:stop] = stop - 1
            first = start
            while first < stop:
                rows = features[ids[first]]
                self.device.write(embedded, rows, first * row_bytes)
                first += len(rows)
        self.device.write(self._own["reach"], reach)
        for index, token in enumerate(ids):
            if token in self._hard:
                self.device.write(embedded, self._hard_row(token), index * row_bytes)

    def _hard_row(self, token: int) -> NDArray[np.float32]:
        [row] = [encoder.hard[token] for encoder in self.encoders.values() if token in encoder.hard]
        return row

    def prefill(self, lease: Lease, count: int, features: Features = NO_FEATURES) -> Awaitable[object]:
        """Compute the next `count` tokens of a sequence, at most `prefill_chunk`; wait until that is so."""
        programs = [self.chunk(lease, count, features)]
        return self.device.read(self._own["prompt state"], 0, 4, after=programs)

    def finish(
        self, lease: Lease, count: int, draw: Draw, mask: Mask | None = None, features: Features = NO_FEATURES
    ) -> Awaitable[Bytes]:
        """Compute the last `count` tokens of a prompt, and draw the token after them, whose bytes are for `tokens`.

        `mask` is asked while the GPU computes the logits.
        """
        programs = self.finish_programs(lease, count, draw, features)
        if mask is not None:
            self.device.submit(programs[:-1])
            self._write_masks([mask])
            programs = [self._mask_program(1), programs[-1]]
        return self.device.read(self._own["prompt state"], 0, _STATE_BYTES, after=programs)

    def finish_programs(
        self, lease: Lease, count: int, draw: Draw, features: Features = NO_FEATURES
    ) -> list[Program]:
        """Make what `finish` submits without a mask ready, and return it."""
        recorded = self._advance(lease, count, features)
        self.device.write(self._own["prompt sampling"], draw.words())
        layers = [recorded.layers, recorded.last] if recorded.last else [recorded.layers]
        return [*layers, recorded.head, self._sample_program("prompt state", "prompt sampling", 1)]

    # Steps of one token.

    def set_rows(self, rows: Sequence[Row]) -> None:
        """Say which sequences take part in the next steps, in this order."""
        if len(rows) != len(self._rows) or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            self._rows, self._fresh = list(rows), False

    def step(self, masks: Sequence[Mask | None] = ()) -> Awaitable[Bytes]:
        """Take the last token of each row through the layers, and draw the next one; the bytes are for `tokens`.

        The `masks` are asked while the GPU computes the logits. Raises DeviceError if a cache cannot grow.
        """
        programs = self.step_programs()
        if any(masks):
            self.device.submit(programs[:-1])
            self._write_masks(masks)
            programs = [self._mask_program(len(self._rows)), programs[-1]]
        return self.device.read(self._own["states"], 0, len(self._rows) * _STATE_BYTES, after=programs)

    def step_programs(self) -> list[Program]:
        """Make what `step` submits without masks ready, and return it."""
        count = len(self._rows)
        self._make_buffers(rows=count, slots=self.cache.slots)
        for row in self._rows:
            self._reserve(row.lease, row.position + 1)
        programs = self.decode_programs(count)
        rings = [tuple(row.lease.rings) for row in self._rows]
        if not self._fresh or rings != self._written:
            self._write_rows()
            self._fresh, self._written = True, rings
        self._write_lookup(self.tokens_of(self._rows))
        for row in self._rows:
            row.position += 1
            row.lease.advance(row.position)
        return programs

    @staticmethod
    def tokens_of(rows: Sequence[Row]) -> list[int]:
        """Return the tokens that the next step of some rows takes through the layers, as far as the host knows them.

        The token of a row that the host does not know is -1.
        """
        return [row.lease.ids[row.position] if row.position < len(row.lease.ids) else -1 for row in rows]

    def decode_programs(self, count: int = 1) -> list[Program]:
        """Return what a step of `count` sequences submits."""
        recorded = self._batch(count)
        return [recorded.layers, recorded.head, self._sample_program("states", "samplings", count)]

    @property
    def decode_dispatches(self) -> int:
        """Return the dispatches of a step of one sequence."""
        return sum(len(program.dispatches) for program in self.decode_programs())

    def _write_rows(self) -> None:
        states = [_state(row.lease, row.position, 1) for row in self._rows]
        self.device.write(self._own["states"], np.concatenate(states))
        self.device.write(self._own["batch state"], np.array([0, len(states)], np.uint32))
        self.device.write(self._own["samplings"], np.concatenate([row.draw.words() for row in self._rows]))

    def _write_masks(self, masks: Sequence[Mask | None]) -> None:
        rows = np.full((len(masks), self._seen_words), 0xFFFFFFFF, np.uint32)
        for row, mask in zip(rows, masks, strict=True):
            if mask is not None:
                words = mask()
                row[: len(words)] = words
        self.device.write(self._own["masks"], rows)

    def _write_state(self, name: str, lease: Lease, position: int, count: int) -> None:
        self.device.write(self._own[name], _state(lease, position, count))

    def _reserve(self, lease: Lease, length: int) -> None:
        lease.reserve(length)
        self._ropes.reserve(length)

    def tokens(self, states: Bytes) -> list[int]:
        """Return the ids that were drawn.

        An id may be `vocab_size` or above, if the logits were no numbers; `check_token` tells.
        """
        ids: list[int] = states.view(np.uint32).reshape(-1, STATE_WORDS)[:, _TOKEN].tolist()
        return ids

    def check_token(self, token: int) -> None:
        """Raise DeviceError for a token that was drawn from logits that are no numbers."""
        if token >= self.vocab_size:
            raise DeviceError(f"{self.device.info} computed logits that are no numbers; try precision='f32'")

    def read_logits(self, row: int = 0) -> Awaitable[Bytes]:
        """Return what was drawn from last in a row: float32 (vocab_size,)."""
        size = 4 * self.vocab_size
        return self.device.read(self._own["logits"], row * size, size)

    # What looks into the model.

    def chunk_logits(
        self, lease: Lease, count: int, first: int, features: Features = NO_FEATURES
    ) -> Generator[Awaitable[Bytes], None, None]:
        """Compute the next `count` tokens of a sequence; yield the logits after those from number `first` of them on.

        Each item is float32 (n, vocab_size) for the next n tokens. Other steps may run between two items.
        """
        hidden_size, vocab = self.model.head.cols, self.vocab_size
        itemsize = 2 if self.half and count > 1 else 4
        n = max(1, min(count, _LOGITS_BYTES // (4 * vocab)))
        buffers = [
            self.device.buffer(size, label)
            for size, label in (
                (itemsize * self._chunk_size(count) * hidden_size, "hidden states"),
                (itemsize * n * hidden_size, "hidden states of some tokens"),
                (4 * n * vocab, "logits of some tokens"),
                (_STATE_BYTES, "state of some tokens"),
            )
        ]
        hidden, some, logits, state = buffers
        try:
            recorded = self._advance(lease, count, features, whole=True)
            keep = record(self.device, [recorded.hidden], recorded.placed | {recorded.hidden_out: hidden})
            step: Step = ChunkStep(self._around, state, self._own["prompt tokens"], n)
            if count == 1:
                step = TokenStep(self._around, state, self._own["prompt tokens"], by_slot=False)
            head = record(
                self.device, [*step.logits_of(some, self.model.head, logits), *self._capped(step, logits, n)]
            )
            self.device.submit([recorded.layers, keep])
            for start in range(first, count, n):
                rows = min(n, count - start)
                self.device.write(state, np.array([0, rows, 0, 0, 0, 1, 0, 1], np.uint32))
                row_bytes = itemsize * hidden_size
                self.device.copy(hidden, some, rows * row_bytes, start * row_bytes)
                yield self.device.read(logits, 0, 4 * rows * vocab, after=[head])
        finally:
            for buffer in buffers:
                buffer.destroy()

    def _chunk_size(self, count: int) -> int:
        return 1 if count == 1 else min(max(_SMALLEST_CHUNK, 1 << (count - 1).bit_length()), self.prefill_chunk)

    def heads(
        self, lease: Lease, layer: int, features: Features = NO_FEATURES
    ) -> tuple[Attention, Awaitable[Bytes], Awaitable[Bytes]]:
        """Take all tokens of a sequence, at most `prefill_chunk`, as far as the attention of layer `layer`.

        Returns that attention, and its queries (scaled) and keys, normed and rotated: half (tokens, heads, head_dim).
        """
        count = len(lease.ids)
        self._reserve(lease, count)
        self._current()
        own, images = self._own, any(map(self._is_foreign, lease.ids))
        reach = own["reach"] if images else None
        step = _Probe(self._around, own["prompt state"], own["prompt tokens"], count, layer, reach)
        found = step.run(self.model)
        placed = self._scratch.place(step.launches, (found.queries, found.keys))
        self._write_chunk(lease, 0, count)
        self.device.submit([record(self.device, step.launches[: step.embedding_launches], placed)])
        if images:
            self._write_features(lease.ids, features, placed[step.embedded])
        program = record(self.device, step.launches[step.embedding_launches :], placed)
        queries = self.device.read(placed[found.queries], 0, found.queries.nbytes, after=[program])
        return found.attention, queries, self.device.read(placed[found.keys], 0, found.keys.nbytes)


class _FoundError(Exception):
    """The layer that was looked for has been reached."""

    def __init__(self, attention: Attention, queries: Value, keys: Value) -> None:
        super().__init__()
        self.attention, self.queries, self.keys = attention, queries, keys


class _Probe(ChunkStep):
    """Goes through the layers up to one attention."""

    def __init__(
        self,
        around: Surroundings,
        states: Buffer,
        tokens: Buffer,
        count: int,
        layer: int,
        reach: Buffer | None,
    ) -> None:
        super().__init__(around, states, tokens, count, reach)
        self._layers_left = layer

    def run(self, model: LanguageModel) -> _FoundError:
        """Return what was found."""
        try:
            model.forward(self)
        except _FoundError as found:
            return found
        raise AssertionError("the model has no such layer")

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Stop here, or go on."""
        if not self._layers_left:
            queries, keys, _ = self.heads(attention, qkv)
            raise _FoundError(attention, queries, keys)
        self._layers_left -= 1
        return super().attention(attention, qkv)


def _state(lease: Lease, position: int, count: int) -> NDArray[np.uint32]:
    """Return the struct State of shaders/state.wgsl."""
    return np.concatenate((np.array([position, count, lease.slot, 0], np.uint32), ring_words(lease.rings)))


def seen_bits(ids: NDArray[np.uint32], vocab: int) -> NDArray[np.uint32]:
    """Return a bit for each token of the vocabulary, set for those of `ids`: u32 (vocab / 32,), rounded up."""
    seen = np.zeros(ceil_div(vocab, 32), np.uint32)
    np.bitwise_or.at(seen, ids // 32, np.uint32(1) << (ids % 32))
    return seen
