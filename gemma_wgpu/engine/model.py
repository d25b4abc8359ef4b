"""Gemma 3 as a program of kernel dispatches (Gemma 3 report, arXiv 2503.19786).

The residual stream is float32 in every precision: it passes the range of float16. It lies in two buffers: a kernel at
decode reads one and writes the other, since all of its workgroups read what one of them writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.engine.sequence import Sequence
from gemma_wgpu.errors import DeviceError, ModelError, RequestError
from gemma_wgpu.gpu.device import Adapter, Buffer, Device, Dispatch, Program
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.kernels import VOCABULARY_PART, Attention, Kernels, Tuning, ceil_div
from gemma_wgpu.weights.checkpoint import EMBEDDING, Weights
from gemma_wgpu.weights.upload import Advance, Matrix, upload

# GeGLU's product can pass the range of float16 before the down projection; this power of two keeps it inside.
_GEGLU_SCALE = 2.0**-6
PREFILL_CHUNK = 512
ROLLBACK = 32  # positions that a local layer keeps beyond its window, so that a sequence can go back so far
STATE_BYTES = 20  # the struct State of shaders/state.wgsl
_SMALLEST_CHUNK = 32
_ROPE_ROWS = 512  # at a time: memory in a browser is dear
_LOGITS_BYTES = 64 << 20  # at most, of the buffer that `logits` reads from


Mask = Callable[[], NDArray[np.uint32]]
"""Says which tokens may be drawn next, a bit each: u32 [vocab_size / 32] at most."""


@dataclass(frozen=True)
class Layer:
    """One transformer block: its weights, its cache, and the two norms in front of each half of it."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    attention_norms: Buffer  # f32 [2, hidden_size]: the previous layer's post_feedforward, input
    feedforward_norms: Buffer  # f32 [2, hidden_size]: post_attention, pre_feedforward
    head_norms: Buffer  # f32 [2, head_dim]: q, k
    attention: Attention
    splits: int  # of the positions among workgroups, at decode
    rope: Buffer
    key_cache: Buffer
    value_cache: Buffer


class Model:
    """The weights, cache, sequence and programs of one Gemma 3 on one device.

    `half` is F16 mode, `int8` makes prompts' activations 8-bit integers; `context_length` and `prefill_chunk` are in
    tokens. Raises ModelError for a shape that the kernels cannot run.
    """

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        *,
        half: bool,
        int8: bool = False,
        tuning: Tuning | None = None,
        context_length: int,
        prefill_chunk: int,
    ) -> None:
        if config.num_attention_heads > 4 * config.num_key_value_heads or config.head_dim % 32:
            raise ModelError(
                f"{config.num_attention_heads} query heads on {config.num_key_value_heads} key/value heads of "
                f"{config.head_dim}: at most 4 on each, of a multiple of 32, can be run"
            )
        self.device = device
        self.config = config
        self.half = half
        self.int8 = int8
        self.context_length = context_length
        self.prefill_chunk = prefill_chunk
        self.drawable = config.vocab_size  # ids below it can be drawn; a tokenizer may have no text for those above
        self.kernels = Kernels(device, half=half, tuning=tuning)
        window = min(config.sliding_window, context_length)
        self.sequence = Sequence(window, self._capacity(window))
        self.turn = 0
        self._prefill_programs: dict[int, Program] = {}

    def allocate(self) -> None:
        """Make the cache and all other buffers that do not depend on the weights."""
        before = self.device.allocated
        shapes = [self._attention(layer) for layer in range(self.config.num_hidden_layers)]
        self.caches = [(self._cache(shape, "key cache"), self._cache(shape, "value cache")) for shape in shapes]
        self.cache_bytes = self.device.allocated - before
        self.ropes = {is_global: self._rope(is_global) for is_global in (False, True)}
        self._make_scratch(max(self.kernels.splits(shape.window) for shape in shapes))
        self.scratch_bytes = self.device.allocated - before - self.cache_bytes

    async def load(self, weights: Weights, advance: Advance) -> None:
        """Put the weights on the GPU, in the order of a model folder; `advance` is told the bytes as they arrive."""
        before = self.device.allocated
        self._identity = hashlib.sha256(f"{self.config} {weights.quantization}".encode())
        self.embedding = await upload(self.device, [weights.tensor(EMBEDDING)], EMBEDDING, advance)
        self.layers = []
        norms = self._norms(self.config.hidden_size, "first norms")  # there is nothing to add before the first layer
        for index in range(self.config.num_hidden_layers):
            following = self._norms(self.config.hidden_size, f"norms after layer {index}")
            self.layers.append(await self._load_layer(weights, index, norms, following, advance))
            norms = following
            weights.release()
        self.final_norms = norms
        await self._load_norm(weights, "model.norm.weight", norms, 1)
        self.weight_bytes = self.device.allocated - before

    @property
    def fingerprint(self) -> str:
        """Tells models apart: by their shape, their quantisation, and their norms, which no two trainings share."""
        return self._identity.hexdigest()

    def _attention(self, layer: int) -> Attention:
        config, window = self.config, self.context_length
        if not config.is_global(layer):
            window = min(config.sliding_window, window)
        return Attention(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.query_pre_attn_scalar**-0.5,
            config.rms_norm_eps,
            window=window,
            capacity=self._capacity(window),
        )

    def _capacity(self, window: int) -> int:
        return min(window + ROLLBACK, self.context_length)

    async def _load_layer(
        self, weights: Weights, index: int, attention_norms: Buffer, following: Buffer, advance: Advance
    ) -> Layer:
        """`following` takes this layer's last norm, which the next one begins with."""
        prefix = f"model.layers.{index}"
        attention = self._attention(index)
        key_cache, value_cache = self.caches[index]

        async def matrix(*names: str) -> Matrix:
            tensors = [weights.tensor(f"{prefix}.{name}.weight") for name in names]
            return await upload(self.device, tensors, f"{prefix}.{names[0]}", advance)

        feedforward_norms = self._norms(self.config.hidden_size, f"{prefix}.feedforward norms")
        head_norms = self._norms(self.config.head_dim, f"{prefix}.head norms")
        for name, buffer, row in (
            ("input_layernorm", attention_norms, 1),
            ("post_attention_layernorm", feedforward_norms, 0),
            ("pre_feedforward_layernorm", feedforward_norms, 1),
            ("post_feedforward_layernorm", following, 0),
            ("self_attn.q_norm", head_norms, 0),
            ("self_attn.k_norm", head_norms, 1),
        ):
            await self._load_norm(weights, f"{prefix}.{name}.weight", buffer, row)
        return Layer(
            qkv=await matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=await matrix("self_attn.o_proj"),
            gate_up=await matrix("mlp.gate_proj", "mlp.up_proj"),
            down=await matrix("mlp.down_proj"),
            attention_norms=attention_norms,
            feedforward_norms=feedforward_norms,
            head_norms=head_norms,
            attention=attention,
            splits=self.kernels.splits(attention.window),
            rope=self.ropes[self.config.is_global(index)],
            key_cache=key_cache,
            value_cache=value_cache,
        )

    def _norms(self, size: int, label: str) -> Buffer:
        return self.device.buffer(4 * 2 * size, label)

    async def _load_norm(self, weights: Weights, name: str, buffer: Buffer, row: int) -> None:
        factors = await weights.norm_factors(name)
        self._identity.update(factors.tobytes())
        self.device.write(buffer, factors, row * factors.nbytes)

    @property
    def slot_bytes(self) -> int:
        """Of a position's keys in one layer, or of its values."""
        return self.config.key_value_size * (2 if self.half else 4)

    def _cache(self, shape: Attention, label: str) -> Buffer:
        return self.device.buffer(shape.capacity * self.slot_bytes, label)

    def _rope(self, is_global: bool) -> Buffer:
        """The table that shaders/rope.wgsl describes.

        Periods, frequencies and angles are rounded to float32 one after the other, as they were when the model was
        trained and are in other implementations: over some hundred positions, exact ones move the logits by 3e-3.
        """
        config = self.config
        theta, factor = config.rope_local_base_freq, 1.0
        if is_global:
            theta, factor = config.rope_theta, config.rope_scaling_factor
        periods = theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        frequencies = np.float32(1) / periods.astype(np.float32) / np.float32(factor)
        buffer = self.device.buffer(4 * self.context_length * config.head_dim, f"rope {theta:.0f}")
        for start in range(0, self.context_length, _ROPE_ROWS):
            positions = np.arange(start, min(start + _ROPE_ROWS, self.context_length), dtype=np.float32)
            angles = (positions[:, None] * frequencies).astype(np.float64)
            table = np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32)
            self.device.write(buffer, table, 4 * start * config.head_dim)
        return buffer

    def _make_scratch(self, splits: int) -> None:
        config, chunk = self.config, self.prefill_chunk
        half = 2 if self.half else 4
        qkv_size = config.query_size + 2 * config.key_value_size
        vocab = config.vocab_size
        buffer = self.device.buffer
        self.state = buffer(STATE_BYTES, "state")
        self.tokens = buffer(4 * (self.context_length + 1), "tokens")
        # `residuals[0]` holds a chunk's at prefill, and is where decode ends, so that one head serves both.
        self.residuals = (
            buffer(4 * chunk * config.hidden_size, "residual 0"),
            buffer(4 * config.hidden_size, "residual 1"),
        )
        self.y = buffer(4 * chunk * config.hidden_size, "y")  # what a block's half adds to the residual
        self.qkv = buffer(4 * chunk * qkv_size, "qkv")
        self.gate_up = buffer(4 * chunk * 2 * config.intermediate_size, "gate_up")
        self.final = buffer(4 * config.hidden_size, "final norm")
        self.logits = buffer(4 * vocab, "logits")
        # of decode
        self.attended = buffer(4 * config.query_size, "attended")
        self.shares = buffer(4 * splits * config.query_size, "attention shares")
        self.share_stats = buffer(8 * splits * config.num_attention_heads, "attention share stats")
        self.gated = buffer(4 * config.intermediate_size, "gated")
        # of prefill
        self.normed = buffer(half * chunk * config.hidden_size, "normed")
        self.queries = buffer(half * chunk * config.query_size, "queries")
        self.keys = buffer(half * chunk * config.key_value_size, "keys")
        self.values = buffer(half * chunk * config.key_value_size, "values")
        self.chunk_attended = buffer(half * chunk * config.query_size, "chunk attended")
        self.chunk_gated = buffer(half * chunk * config.intermediate_size, "chunk gated")
        if self.int8:
            longest = chunk * max(config.hidden_size, config.query_size, config.intermediate_size)
            self.quantized = buffer(longest, "quantized")
            self.quantized_factors = buffer(longest // 4, "quantized factors")
        # of sampling
        self.sampling = buffer(32, "sampling")
        self.seen = buffer(4 * ceil_div(vocab, 32), "seen")
        self.mask = buffer(4 * ceil_div(vocab, 32), "mask")
        self.summaries = buffer(16 * ceil_div(vocab, VOCABULARY_PART), "summaries")

    # The forward pass, of one token and of a chunk.

    def _embed(self, residual: Buffer, max_count: int) -> Iterator[Dispatch]:
        scale = float(self.config.hidden_size**0.5)
        for part in self.embedding.parts:
            yield self.kernels.embed(part, self.state, self.tokens, residual, scale=scale, max_count=max_count)

    @cached_property
    def _decode_program(self) -> Program:
        """The next token through all layers."""
        old, new = self.residuals[1], self.residuals[0]
        dispatches = [*self._embed(old, 1)]
        for index, layer in enumerate(self.layers):
            dispatches += self._decode_attention(layer, old, new, add=index > 0)
            if index > 0:
                old, new = new, old
            dispatches += self._decode_feedforward(layer, old, new)
            old, new = new, old
        return self.device.record(dispatches)

    def _decode_attention(
        self, layer: Layer, residual: Buffer, new_residual: Buffer, *, add: bool
    ) -> Iterator[Dispatch]:
        k, eps = self.kernels, self.config.rms_norm_eps
        for part in layer.qkv.parts:
            yield k.norm_matvec(
                part, self.state, residual, self.y, layer.attention_norms, new_residual, self.qkv, eps=eps, add=add
            )
        out = self.shares if layer.splits > 1 else self.attended
        yield k.attention_decode(
            layer.attention,
            self.state,
            self.qkv,
            layer.head_norms,
            layer.rope,
            layer.key_cache,
            layer.value_cache,
            out,
            self.share_stats,
            splits=layer.splits,
        )
        if layer.splits > 1:
            yield k.attention_combine(
                layer.attention, self.shares, self.share_stats, self.attended, splits=layer.splits
            )
        for part in layer.o.parts:
            yield k.matvec(part, self.attended, self.y)

    def _decode_feedforward(self, layer: Layer, residual: Buffer, new_residual: Buffer) -> Iterator[Dispatch]:
        k, eps = self.kernels, self.config.rms_norm_eps
        fused = len(layer.gate_up.parts) == 1
        for part in layer.gate_up.parts:
            yield k.norm_matvec(
                part,
                self.state,
                residual,
                self.y,
                layer.feedforward_norms,
                new_residual,
                self.gated if fused else self.gate_up,
                eps=eps,
                add=True,
                geglu=fused,
            )
        if not fused:
            size = self.config.intermediate_size
            yield k.geglu(self.state, self.gate_up, self.gated, size=size, scale=1.0, max_count=1, half=False)
        for part in layer.down.parts:
            yield k.matvec(part, self.gated, self.y)

    def _prefill_program(self, count: int) -> Program:
        """A chunk of up to the next power of two of `count` tokens through all layers."""
        size = min(max(_SMALLEST_CHUNK, 1 << (count - 1).bit_length()), self.prefill_chunk)
        if size not in self._prefill_programs:
            dispatches = [*self._embed(self.residuals[0], size)]
            for index, layer in enumerate(self.layers):
                dispatches += self._prefill_attention(layer, size, add=index > 0)
                dispatches += self._prefill_feedforward(layer, size)
            self._prefill_programs[size] = self.device.record(dispatches)
        return self._prefill_programs[size]

    def _prefill_norm(self, norms: Buffer, *, add: bool, max_count: int) -> Dispatch:
        return self.kernels.rms_norm(
            self.state,
            self.residuals[0],
            self.y,
            norms,
            self.normed,
            size=self.config.hidden_size,
            eps=self.config.rms_norm_eps,
            add=add,
            max_count=max_count,
        )

    def _matmul(
        self, matrix: Matrix, x: Buffer, y: Buffer, *, scale: float = 1.0, max_count: int
    ) -> Iterator[Dispatch]:
        for part in matrix.parts:
            yield self.kernels.matmul(part, self.state, x, y, stride=matrix.rows, scale=scale, max_count=max_count)

    def _prompt_matmul(
        self, matrix: Matrix, x: Buffer, y: Buffer, *, scale: float = 1.0, max_count: int
    ) -> Iterator[Dispatch]:
        """`_matmul`, in products of 8-bit integers where asked for and all weights are."""
        if not self.int8 or not all(part.layout.is_integer for part in matrix.parts):
            yield from self._matmul(matrix, x, y, scale=scale, max_count=max_count)
            return
        k, q, factors, cols = self.kernels, self.quantized, self.quantized_factors, matrix.parts[0].cols
        yield k.quantize(self.state, x, q, factors, size=cols, max_count=max_count)
        for part in matrix.parts:
            yield k.matmul_int8(part, self.state, q, factors, y, stride=matrix.rows, scale=scale, max_count=max_count)

    def _prefill_heads(self, layer: Layer, n: int, *, add: bool) -> Iterator[Dispatch]:
        yield self._prefill_norm(layer.attention_norms, add=add, max_count=n)
        yield from self._prompt_matmul(layer.qkv, self.normed, self.qkv, max_count=n)
        yield self.kernels.qk_norm_rope(
            layer.attention,
            self.state,
            self.qkv,
            layer.head_norms,
            layer.rope,
            self.queries,
            self.keys,
            self.values,
            max_count=n,
        )

    def _prefill_attention(self, layer: Layer, n: int, *, add: bool) -> Iterator[Dispatch]:
        k, shape = self.kernels, layer.attention
        yield from self._prefill_heads(layer, n, add=add)
        yield k.attention_prefill(
            shape,
            self.state,
            self.queries,
            self.keys,
            self.values,
            layer.key_cache,
            layer.value_cache,
            self.chunk_attended,
            max_count=n,
        )
        # After the attention: until then a local layer's ring holds the window before the chunk.
        yield k.cache_write(
            shape, self.state, self.keys, self.values, layer.key_cache, layer.value_cache, max_count=n
        )
        yield from self._prompt_matmul(layer.o, self.chunk_attended, self.y, max_count=n)

    def _prefill_feedforward(self, layer: Layer, n: int) -> Iterator[Dispatch]:
        yield self._prefill_norm(layer.feedforward_norms, add=True, max_count=n)
        yield from self._prompt_matmul(layer.gate_up, self.normed, self.gate_up, max_count=n)
        yield self.kernels.geglu(
            self.state,
            self.gate_up,
            self.chunk_gated,
            size=self.config.intermediate_size,
            scale=_GEGLU_SCALE,
            max_count=n,
            half=self.half,
        )
        yield from self._prompt_matmul(layer.down, self.chunk_gated, self.y, scale=1 / _GEGLU_SCALE, max_count=n)

    @cached_property
    def _head_program(self) -> Program:
        """The logits of the last token. Its norm is on its own: too many workgroups would repeat it."""
        norm = self.kernels.rms_norm(
            self.state,
            self.residuals[0],
            self.y,
            self.final_norms,
            self.final,
            size=self.config.hidden_size,
            eps=self.config.rms_norm_eps,
            add=True,
            max_count=1,
            last=True,
            half=False,
        )
        parts = [self.kernels.matvec(part, self.final, self.logits) for part in self.embedding.parts]
        return self.device.record([norm, *parts])

    @cached_property
    def _sample_program(self) -> Program:
        """The next token out of the logits, appended to the sequence."""
        k, vocab = self.kernels, self.drawable
        return self.device.record(
            [
                k.logits_scan(self.state, self.sampling, self.seen, self.logits, self.summaries, vocab=vocab),
                k.sample(self.state, self.sampling, self.logits, self.summaries, self.tokens, self.seen, vocab=vocab),
            ]
        )

    @cached_property
    def _mask_program(self) -> Program:
        """Of the logits, only those of the tokens in `mask`."""
        return self.device.record([self.kernels.mask(self.mask, self.logits, vocab=self.drawable)])

    @cached_property
    def _chunk_head(self) -> tuple[int, Buffer, Program]:
        """(n, logits f32 [n, vocab_size], program): the logits of n tokens of a chunk, from token state.first on."""
        vocab = self.config.vocab_size
        n = max(1, min(self.prefill_chunk, _LOGITS_BYTES // (4 * vocab)))
        logits = self.device.buffer(4 * n * vocab, "chunk logits")
        norm = self._prefill_norm(self.final_norms, add=True, max_count=n)
        return n, logits, self.device.record([norm, *self._matmul(self.embedding, self.normed, logits, max_count=n)])

    # What generation and `logits` ask for.

    def begin(self, ids: NDArray[np.uint32], sampling: Sampling, first: int | None = None) -> int:
        """Make `ids`, at most `context_length` of them, the sequence.

        What of them is in the cache already stays, up to the position `first`, whose logits are wanted; by default
        the last one. Returns the new `turn`, which tells whether the sequence is still the same one.
        """
        self.sequence.begin(ids.tolist(), len(ids) - 1 if first is None else first)
        self.device.write(self.seen, seen_bits(ids, self.config.vocab_size))
        self.device.write(self.sampling, sampling.words())
        self.device.write(self.tokens, ids)
        self.turn += 1
        return self.turn

    def check(self, turn: int) -> None:
        """Raise RequestError unless the sequence is still that of `turn`."""
        if self.turn != turn:
            raise RequestError("this generation ended when the model was given something else to do")

    def chunks(self) -> Iterator[bool]:
        """What of the sequence is not in the cache through the layers, by chunks; after each, if more come."""
        turn, length = self.turn, len(self.sequence.ids)
        for start in range(self.sequence.computed, length, self.prefill_chunk):
            self.check(turn)
            self._prefill_one(start, min(self.prefill_chunk, length - start))
            yield start + self.prefill_chunk < length

    def check_token(self, token: int) -> None:
        """Raise DeviceError for a token that was chosen from logits that are no numbers."""
        if token >= self.config.vocab_size:
            raise DeviceError(f"{self.device.info} computed logits that are no numbers; try precision='f32'")

    async def prefill(self) -> None:
        """All of `chunks`, never more than one ahead of the GPU, so that an interrupt is heard."""
        for more in self.chunks():
            if more:
                await self.device.read(self.state)

    def _prefill_one(self, position: int, count: int) -> None:
        """Tokens [position, position + count) of the sequence, at most `prefill_chunk`, through the layers."""
        self.device.submit([self.chunk_program(position, count)])

    def chunk_program(self, position: int, count: int) -> Program:
        """What is to be submitted next, for tokens [position, position + count) to go through the layers."""
        self._set_state(position, count)
        self.sequence.advance(position + count)
        return self._decode_program if count == 1 else self._prefill_program(count)

    def sample(self, position: int, mask: Mask | None = None) -> Awaitable[NDArray[np.uint8]]:
        """Choose the token after those of the last step, which is that at `position`: its id is in the 4 bytes.

        `mask` is asked while the GPU computes the logits.
        """
        return self._chosen(position, self.sample_programs, mask)

    def decode(self, position: int, mask: Mask | None = None) -> Awaitable[NDArray[np.uint8]]:
        """The last token through the layers, and `sample`."""
        self.sequence.advance(position)
        return self._chosen(position, self.decode_programs, mask)

    def _chosen(self, position: int, programs: list[Program], mask: Mask | None) -> Awaitable[NDArray[np.uint8]]:
        if mask is not None:
            self.device.submit(programs[:-1])
            self.device.write(self.mask, mask())
            programs = [self._mask_program, programs[-1]]
        return self.device.read(self.tokens, 4 * position, 4, after=programs)

    def read_logits(self) -> Awaitable[NDArray[np.uint8]]:
        """What the last step sampled from: float32 (vocab_size,)."""
        return self.device.read(self.logits, 0, 4 * self.config.vocab_size)

    @property
    def tuning(self) -> Tuning:
        """The variants of the kernels that are used."""
        return self.kernels.tuning

    @property
    def sample_programs(self) -> list[Program]:
        """What `sample` submits."""
        return [self._head_program, self._sample_program]

    @property
    def decode_programs(self) -> list[Program]:
        """What `decode` submits."""
        return [self._decode_program, *self.sample_programs]

    async def prompt_logits(self, first: int) -> AsyncIterator[NDArray[np.float32]]:
        """Prefill the sequence; the logits after its tokens from `first` on, some rows (n, vocab_size) at a time."""
        n, buffer, program = self._chunk_head
        vocab, turn, length = self.config.vocab_size, self.turn, len(self.sequence.ids)
        for position in range(self.sequence.computed, length, self.prefill_chunk):
            count = min(self.prefill_chunk, length - position)
            self.check(turn)
            self._prefill_one(position, count)
            for start in range(max(first - position, 0), count, n):
                rows = min(n, count - start)
                self.check(turn)
                self._set_state(position, rows, start)
                self.device.submit([program])
                data = await self.device.read(buffer, 0, 4 * rows * vocab)
                yield data.view(np.float32).reshape(rows, vocab)

    async def attention(self, length: int, index: int) -> NDArray[np.float32]:
        """How the heads of layer `index` share out their attention: float32 (heads, length, length).

        Prefills `length` tokens, at most `prefill_chunk`, up to that layer. The attention kernels compute the same on
        the way, and keep it to themselves.
        """
        config, layer = self.config, self.layers[index]
        dispatches = [*self._embed(self.residuals[0], length)]
        for number, below in enumerate(self.layers[:index]):
            dispatches += self._prefill_attention(below, length, add=number > 0)
            dispatches += self._prefill_feedforward(below, length)
        dispatches += self._prefill_heads(layer, length, add=index > 0)
        self._set_state(0, length)
        self.device.submit([self.device.record(dispatches)])
        q = await self._heads(self.queries, length, config.num_attention_heads)
        k = await self._heads(self.keys, length, config.num_key_value_heads)
        k = np.repeat(k, config.num_attention_heads // config.num_key_value_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True)  # the queries are scaled already
        distance = np.arange(length)[:, None] - np.arange(length)
        scores[:, (distance < 0) | (distance >= layer.attention.window)] = -np.inf
        shares: NDArray[np.float32] = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return shares

    async def _heads(self, buffer: Buffer, length: int, heads: int) -> NDArray[np.float32]:
        """The queries or the keys of a chunk's first `length` tokens: (length, heads, head_dim)."""
        dtype = np.dtype(np.float16 if self.half else np.float32)
        size = length * heads * self.config.head_dim * dtype.itemsize
        stored = (await self.device.read(buffer, 0, size)).view(dtype)
        return stored.reshape(length, heads, -1).astype(np.float32)

    @property
    def decode_dispatches(self) -> int:
        """Dispatches a token, at decode."""
        return sum(len(program.dispatches) for program in self.decode_programs)

    def _set_state(self, position: int, count: int, first: int = 0) -> None:
        self.device.write(self.state, np.array([position, count, first, 0, 0], np.uint32))


def seen_bits(ids: NDArray[np.uint32], vocab: int) -> NDArray[np.uint32]:
    """A bit a token of the vocabulary, set for those of `ids`: u32 [vocab / 32], rounded up."""
    seen = np.zeros(ceil_div(vocab, 32), np.uint32)
    np.bitwise_or.at(seen, ids // 32, np.uint32(1) << (ids % 32))
    return seen


def expected_bytes(
    adapter: Adapter, config: Gemma3Config, *, half: bool, context_length: int, prefill_chunk: int = PREFILL_CHUNK
) -> dict[str, int]:
    """Bytes that a model takes on a GPU beside its weights: {"cache": ..., "scratch": ...}.

    Raises DeviceError when a buffer is over the adapter's limits.
    """
    ledger = Ledger(adapter)
    chunk = min(prefill_chunk, context_length)
    model = Model(ledger, config, half=half, context_length=context_length, prefill_chunk=chunk)
    model.allocate()
    return {"cache": model.cache_bytes, "scratch": model.scratch_bytes}
