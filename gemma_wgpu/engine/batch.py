"""Several sequences through the same weights: a step reads each weight once for a token of every one of them."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.model import STATE_BYTES, Layer, Mask, Model, seen_bits
from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gpu.device import Buffer, Dispatch, Program
from gemma_wgpu.ops.kernels import VOCABULARY_PART, ceil_div
from gemma_wgpu.weights.upload import Matrix

_STATE_WORDS = STATE_BYTES // 4


@dataclass(eq=False)
class Member:
    """A sequence of a batch: where its cache is, and the position of its last token, which is to be computed next."""

    slot: int
    position: int
    sampling: Sampling


class Batch:
    """`size` sequences at most, beside the model's own, each with a cache of the model's `context_length`.

    Prompts go through the model's own cache, which keeps them for others that begin alike, and are copied from there.
    What a step computes is what `Model` does at decode, with activations in float32 in every precision.

    Raises DeviceError where the GPU's memory is exhausted.
    """

    def __init__(self, model: Model, size: int) -> None:
        self.model = model
        self.size = size
        self.turn = 0
        self.members: list[Member] = []  # a row of the buffers below each
        self._free = list(reversed(range(size)))
        self._changed = False
        self._programs: dict[int, tuple[Program, Program, Program]] = {}  # layers, mask, sampling
        self._buffers: list[Buffer] = []
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        model, config, size = self.model, self.model.config, self.size
        self._context = model.context_length + 1
        self._seen_words = ceil_div(config.vocab_size, 32)
        splits = max(layer.splits for layer in model.layers)
        qkv_size = config.query_size + 2 * config.key_value_size
        # A slot each.
        self._caches = []
        for layer in model.layers:
            nbytes = size * layer.attention.capacity * model.slot_bytes
            self._caches.append((self._buffer(nbytes, "batch keys"), self._buffer(nbytes, "batch values")))
        self._tokens = self._buffer(4 * size * self._context, "batch tokens")
        self._seen = self._buffer(4 * size * self._seen_words, "batch seen")
        # A row each.
        self._states = self._buffer(size * STATE_BYTES, "batch states")
        self._samplings = self._buffer(size * model.sampling.size, "batch samplings")
        self._residual = self._buffer(4 * size * config.hidden_size, "batch residual")
        self._y = self._buffer(4 * size * config.hidden_size, "batch y")
        self._normed = self._buffer(4 * size * config.hidden_size, "batch normed")
        self._qkv = self._buffer(4 * size * qkv_size, "batch qkv")
        self._attended = self._buffer(4 * size * config.query_size, "batch attended")
        self._shares = self._buffer(4 * size * splits * config.query_size, "batch attention shares")
        self._share_stats = self._buffer(8 * size * splits * config.num_attention_heads, "batch share stats")
        self._gate_up = self._buffer(4 * size * 2 * config.intermediate_size, "batch gate_up")
        self._gated = self._buffer(4 * size * config.intermediate_size, "batch gated")
        self._logits = self._buffer(4 * size * config.vocab_size, "batch logits")
        self._masks = self._buffer(4 * size * self._seen_words, "batch masks")
        self._summaries = self._buffer(16 * size * ceil_div(config.vocab_size, VOCABULARY_PART), "batch summaries")
        # Of all rows together: their number; and, of the caches of each capacity, what is to be copied.
        self._state = self._buffer(STATE_BYTES, "batch state")
        capacities = {layer.attention.capacity for layer in model.layers}
        self._copies = {capacity: self._buffer(STATE_BYTES, "batch copy") for capacity in capacities}

    def _buffer(self, size: int, label: str) -> Buffer:
        self._buffers.append(self.model.device.buffer(size, label))
        return self._buffers[-1]

    def begin(self) -> int:
        """Let all members go. Returns the new `turn`, as `Model.begin` does."""
        for member in list(self.members):
            self.leave(member)
        self.turn += 1
        return self.turn

    def check(self, turn: int) -> None:
        """Raise RequestError unless nobody else has begun since `turn`."""
        if self.turn != turn:
            raise RequestError("these generations ended when the model was given others")

    @property
    def nbytes(self) -> int:
        """What it takes on the GPU."""
        return sum(buffer.size for buffer in self._buffers)

    @property
    def is_full(self) -> bool:
        """Whether nobody can join."""
        return not self._free

    def join(self, length: int, token: int, sampling: Sampling) -> Member:
        """Take over the model's own sequence: the `length` tokens that its cache holds, and the one after them."""
        model, slot = self.model, self._free.pop()
        for capacity, state in self._copies.items():
            self._write(state, [0, min(length, capacity), 0, slot, 0])
        model.device.submit([self._copy_program])
        ids = np.array([*model.sequence.ids[:length], token], np.uint32)
        seen = seen_bits(ids, model.config.vocab_size)
        model.device.write(self._seen, seen, slot * seen.nbytes)
        model.device.write(self._tokens, ids[-1:], 4 * (slot * self._context + length))
        member = Member(slot, length, sampling)
        self.members.append(member)
        self._changed = True
        return member

    def leave(self, member: Member) -> None:
        """Make room for another sequence; what was submitted stays as it is. Does nothing for one that left."""
        if member not in self.members:
            return
        self.members.remove(member)
        self._free.append(member.slot)
        self._changed = True

    def step(self, masks: Sequence[Mask | None] = ()) -> Awaitable[NDArray[np.uint8]]:
        """The last token of each member through the layers, and the next one chosen; with `masks` as in `Model`.

        The bytes are for `tokens`; `members` says whose they are.
        """
        count, device = len(self.members), self.model.device
        if self._changed:
            self._write(self._state, [0, count, 0, 0, 0])
            self._write(self._states, [[member.position, 1, 0, member.slot, 0] for member in self.members])
            device.write(self._samplings, np.concatenate([member.sampling.words() for member in self.members]))
            self._changed = False
        for member in self.members:
            member.position += 1
        if count not in self._programs:
            steps = self._forward(count), [self._mask(count)], self._sample(count)
            self._programs[count] = device.record([*steps[0]]), device.record(steps[1]), device.record([*steps[2]])
        layers, mask, sampling = self._programs[count]
        programs = [layers, sampling]
        if any(masks):
            device.submit([layers])
            self._write_masks(masks)
            programs = [mask, sampling]
        return device.read(self._states, 0, count * STATE_BYTES, after=programs)

    def _write_masks(self, masks: Sequence[Mask | None]) -> None:
        rows = np.full((len(masks), self._seen_words), 0xFFFFFFFF, np.uint32)
        for row, mask in zip(rows, masks, strict=True):
            if mask is not None:
                words = mask()
                row[: len(words)] = words
        self.model.device.write(self._masks, rows)

    @staticmethod
    def tokens(states: NDArray[np.uint8]) -> list[int]:
        """The ids that a `step` chose."""
        ids: list[int] = states.view(np.uint32).reshape(-1, _STATE_WORDS)[:, -1].tolist()
        return ids

    def logits(self, row: int) -> Awaitable[NDArray[np.uint8]]:
        """What the last `step` sampled from in a row: float32 (vocab_size,)."""
        size = 4 * self.model.config.vocab_size
        return self.model.device.read(self._logits, row * size, size)

    def close(self) -> None:
        """Free the GPU's memory. Idempotent."""
        self.turn += 1
        for buffer in self._buffers:
            buffer.destroy()

    def _write(self, state: Buffer, words: list[int] | list[list[int]]) -> None:
        self.model.device.write(state, np.array(words, np.uint32))

    @cached_property
    def _copy_program(self) -> Program:
        """The model's caches into those of a slot: all that they hold, as if it were a chunk's keys and values."""
        return self.model.device.record(
            [
                self.model.kernels.cache_write(
                    layer.attention,
                    self._copies[layer.attention.capacity],
                    layer.key_cache,
                    layer.value_cache,
                    *caches,
                    max_count=layer.attention.capacity,
                )
                for layer, caches in zip(self.model.layers, self._caches, strict=True)
            ]
        )

    def _forward(self, count: int) -> Iterator[Dispatch]:
        """From the last tokens to the logits of the next ones."""
        model, k = self.model, self.model.kernels
        scale = float(model.config.hidden_size**0.5)
        for part in model.embedding.parts:
            yield k.embed(
                part,
                self._states,
                self._tokens,
                self._residual,
                scale=scale,
                sequences=count,
                context=self._context,
            )
        for index, (layer, caches) in enumerate(zip(model.layers, self._caches, strict=True)):
            yield self._norm(layer.attention_norms, count, add=index > 0)
            yield from self._matvecs(layer.qkv, self._normed, self._qkv, count)
            yield from self._attention(layer, *caches, count)
            yield from self._matvecs(layer.o, self._attended, self._y, count)
            yield self._norm(layer.feedforward_norms, count)
            yield from self._matvecs(layer.gate_up, self._normed, self._gate_up, count)
            size = model.config.intermediate_size
            yield k.geglu(self._state, self._gate_up, self._gated, size=size, scale=1.0, max_count=count, half=False)
            yield from self._matvecs(layer.down, self._gated, self._y, count)
        yield self._norm(model.final_norms, count)
        yield from self._matvecs(model.embedding, self._normed, self._logits, count)

    def _norm(self, norms: Buffer, count: int, *, add: bool = True) -> Dispatch:
        config = self.model.config
        return self.model.kernels.rms_norm(
            self._state,
            self._residual,
            self._y,
            norms,
            self._normed,
            size=config.hidden_size,
            eps=config.rms_norm_eps,
            add=add,
            max_count=count,
            half=False,
        )

    def _matvecs(self, matrix: Matrix, x: Buffer, y: Buffer, count: int) -> Iterator[Dispatch]:
        k = self.model.kernels
        for part in matrix.parts:
            if count == 1:  # a server's usual company
                yield k.matvec(part, x, y)
            else:
                yield k.matvecs(part, self._state, x, y, stride=matrix.rows, max_count=count)

    def _attention(self, layer: Layer, key_cache: Buffer, value_cache: Buffer, count: int) -> Iterator[Dispatch]:
        k, splits = self.model.kernels, layer.splits
        yield k.attention_decode(
            layer.attention,
            self._states,
            self._qkv,
            layer.head_norms,
            layer.rope,
            key_cache,
            value_cache,
            self._shares if splits > 1 else self._attended,
            self._share_stats,
            splits=splits,
            sequences=count,
        )
        if splits > 1:
            shares, stats = self._shares, self._share_stats
            yield k.attention_combine(layer.attention, shares, stats, self._attended, splits=splits, sequences=count)

    def _mask(self, count: int) -> Dispatch:
        model = self.model
        vocab, stride = model.drawable, model.config.vocab_size
        return model.kernels.mask(self._masks, self._logits, vocab=vocab, sequences=count, stride=stride)

    def _sample(self, count: int) -> Iterator[Dispatch]:
        model, k = self.model, self.model.kernels
        vocab, stride = model.drawable, model.config.vocab_size
        states, samplings, logits, summaries = self._states, self._samplings, self._logits, self._summaries
        yield k.logits_scan(
            states, samplings, self._seen, logits, summaries, vocab=vocab, sequences=count, stride=stride
        )
        yield k.sample(
            states,
            samplings,
            logits,
            summaries,
            self._tokens,
            self._seen,
            vocab=vocab,
            sequences=count,
            stride=stride,
            context=self._context,
        )
