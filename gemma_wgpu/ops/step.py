"""A step of a model: what its forward pass is written on.

A step takes a chunk of one sequence's tokens, one token of one sequence, or one token of each of several sequences
through the layers. A forward pass calls the step's operations in order. They write kernel launches down, and choose
the kernels that serve this kind of step best: `norm`, `add` and the first half of `geglu` cost one token nothing, for
example, since the kernel of the matrix that follows does them on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVarTuple, cast

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import AttentionShape, Kernels, Sight
from gemma_wgpu.ops.kv_cache import KVCache
from gemma_wgpu.ops.launch import Launch, Operand, Value
from gemma_wgpu.ops.linear import HostTable, Linear, Part
from gemma_wgpu.ops.rope import Rope, RopeTables

Ts = TypeVarTuple("Ts")

# GeGLU's product can pass the range of float16 before the down projection; this power of two keeps it inside.
_GEGLU_SCALE = 2.0**-6


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm: x / sqrt(mean(x^2) + eps) * weight, with weight float32 (n,)."""

    weight: NDArray[np.float32]
    eps: float


class Normed:
    """The norm of a vector for each token. It is computed where it is used."""

    def __init__(self, x: Value | Sum, norm: Norm) -> None:
        self.x, self.norm = x, norm
        self.value: Value | None = None


class Sum:
    """A vector for each token plus a normed one, times `factor`. It is computed where it is used."""

    def __init__(self, x: Value, y: Normed, factor: float = 1.0) -> None:
        self.x, self.y, self.factor = x, y, factor
        self.value: Value | None = None


class Product:
    """A matrix times a norm or a sum for one token. It is computed where it is used."""

    def __init__(self, matrix: Linear, x: Normed | Sum, label: str) -> None:
        self.matrix, self.x, self.label = matrix, x, label
        self.value: Value | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a layer: RMSNorm of queries and keys, rotation, softmax(scale q k) v over its cache.

    Values are normed, too, without a weight, if there is a `value_norm`. A layer without a `k_norm` has no keys and
    values of its own: it reads those that another layer has written to its cache.

    A query sees `window` positions, itself included, or all of them if `window` is None. Query head h goes with
    key/value head h * kv_heads / heads. Layers may share a cache. If it is `two_way`, the soft tokens of an image see
    each other, those after them too.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    q_norm: Norm
    k_norm: Norm | None
    rope: Rope
    cache: int
    two_way: bool = False
    value_norm: bool = False


_NONE = Norm(np.zeros(0, np.float32), 0.0)


class Norms:
    """The weights of norms on the GPU, two by two, as the kernels read them."""

    def __init__(self, device: Device) -> None:
        self.nbytes = 0
        self._device = device
        self._pairs: dict[tuple[Norm | None, Norm | None, float], Buffer] = {}

    def pair(self, first: Norm | None, second: Norm | None, factor: float = 1.0) -> Buffer:
        """Return float32 (2, n): the weights of both norms, those of the first one times `factor`; none are zeros.

        A `factor` other than 1 stands behind them.
        """
        key = first, second, factor
        if key not in self._pairs:
            size = len((first or second or _NONE).weight)
            rows = [np.zeros(size, np.float32) if norm is None else norm.weight for norm in (first, second)]
            weights = np.concatenate((rows[0] * np.float32(factor), rows[1]))
            if factor != 1:
                weights = np.append(weights, np.float32(factor))
            buffer = self._device.upload(weights, "norms")
            self.nbytes += buffer.size
            self._pairs[key] = buffer
        return self._pairs[key]


@dataclass(frozen=True)
class _Terms:
    """What a norm or a sum is of.

    That is a vector, what is added to it if `add`, the norms' weights, and whether the sum is scaled.
    """

    residual: Value
    y: Operand
    norms: Buffer
    add: bool
    scaled: bool


@dataclass
class _Chunk:
    """The keys and values of a chunk in one cache, and how many attentions have used them."""

    keys: Value
    values: Value
    uses: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What all steps of a model share."""

    kernels: Kernels
    norms: Norms
    ropes: RopeTables
    caches: KVCache
    int8: bool  # whether the activations of prompts are rounded to 8 bits
    rows: Buffer | None = None  # float32, in which the host puts the tokens' rows of a table that stays with it


class Step(ABC):
    """Writes the launches of a forward pass down, for `count` tokens at most.

    `states` (struct State of shaders/state.wgsl) says where each sequence stands, and `tokens` u32 has the tokens: of
    a chunk, or the last one of each slot. `whole` is a State whose count is that of all tokens of the step. `half`
    says whether the activations are float16. A step is of so many `sequences`. `embedded` are the tokens' embeddings,
    which the first `embedding_launches` compute; other vectors may take their place before the others run.
    """

    sequences = 1
    embedded: Value
    embedding_launches: int

    def __init__(
        self,
        around: Surroundings,
        states: Buffer,
        tokens: Buffer,
        count: int,
        *,
        whole: Buffer | None = None,
        half: bool = False,
    ) -> None:
        self.around = around
        self.states, self.tokens, self.count, self.half = states, tokens, count, half
        self.whole = whole or states
        self.launches: list[Launch] = []

    # The operations of a model.

    def embed(self, table: Linear, *, scale: float) -> Value:
        """Look up the tokens' rows of `table`, times `scale`: float32 (count, cols)."""
        self.embedded = self._looked_up(table, scale, "residual")
        self.embedding_launches = len(self.launches)
        return self.embedded

    def norm(self, x: Value | Product | Sum, norm: Norm) -> Normed:
        """Return the RMSNorm of `x`."""
        return Normed(x if isinstance(x, Sum) else self._plain(x), norm)

    def add(self, x: Value | Sum, y: Normed, *, factor: float = 1.0) -> Sum:
        """Return (x + y) * factor. Nothing may use `x` afterwards: the sum takes its place."""
        return Sum(x if isinstance(x, Value) else self._sum(x), y, factor)

    def linear(self, matrix: Linear, x: Value | Normed | Sum, label: str = "y") -> Value | Product:
        """Return scale W x + bias, float32 (count, rows). `label` names it in messages."""
        return self._linear(matrix, self._computed(x), label)

    def geglu(self, gate_up: Value | Product, *, cut: float | None = None) -> Value:
        """Return gelu(gate) * up, where `gate_up` has a gate and an up of the same size one after the other.

        With a `cut`, of each token only those gates are let through that are so many standard deviations above their
        mean, less that.
        """
        x = self._plain(gate_up)
        out = self._gated(x.size // 2)
        if cut is not None:
            self.launch(
                self.around.kernels.sparse_geglu(
                    self.whole,
                    x,
                    out,
                    size=out.size,
                    cut=cut,
                    scale=out.scale,
                    max_count=self.count,
                    half=self.half,
                )
            )
            return out
        self.launch(
            self.around.kernels.geglu(
                self.whole, x, out, size=out.size, scale=out.scale, max_count=self.count, half=self.half
            )
        )
        return out

    def lookup(self, table: Linear | HostTable) -> Operand:
        """Look up the tokens' rows of any table: float32 (count, cols). The host brings those of a table it keeps."""
        if isinstance(table, Linear):
            return self._looked_up(table, 1.0, "rows")
        assert self.around.rows, "there is room for rows if a model has such a table"
        return self.around.rows

    def _looked_up(self, table: Linear, scale: float, label: str) -> Value:
        out = self.value(label, table.cols)
        for part in table.parts:
            self._embed(part, out, scale, table.rows)
        return out

    def per_layer_inputs(self, context: Value | Product, rows: Operand, norm: Norm, *, scale: float) -> Value:
        """Return (norm(context) + scale * rows) / sqrt(2) for each layer: float32 (count, layers * n)."""
        x, size = self._plain(context), len(norm.weight)
        out = self.value("per-layer inputs", x.size)
        self.launch(
            self.around.kernels.per_layer_inputs(
                self.whole,
                x,
                rows,
                self.around.norms.pair(norm, None),
                out,
                layers=x.size // size,
                size=size,
                scale=scale,
                eps=norm.eps,
                max_count=self.count,
            )
        )
        return out

    def gated_input(self, gate: Value | Product, inputs: Value, layer: int) -> Value:
        """Return gelu(gate) times the inputs of a layer, (count, n), of `inputs`, (count, layers * n)."""
        g = self._plain(gate)
        out = self._gated(g.size)
        self.launch(
            self.around.kernels.gated_input(
                self.whole,
                g,
                inputs,
                self.kernels.number(layer),
                out,
                layers=inputs.size // g.size,
                size=g.size,
                scale=out.scale,
                max_count=self.count,
                half=self.half,
            )
        )
        return out

    def laurel(self, x: Value, attended: Normed, normed: Value, low: Normed) -> Value:
        """Return (x + attended + normed + low) / sqrt(2): an attention beside a LAuReL (arXiv 2411.07501)."""
        y, _ = self.normed_operands(attended)
        z, _ = self.normed_operands(low)
        out = self.value("residual", x.size)
        self.launch(
            self.kernels.laurel(
                self.whole,
                x,
                y,
                normed,
                z,
                self.around.norms.pair(attended.norm, low.norm),
                out,
                size=x.size,
                eps=attended.norm.eps,
                max_count=self.count,
                half=half_of(normed, self.half),
            )
        )
        return out

    def last_tokens(self, *values: *Ts) -> tuple[Step, *Ts]:
        """Go on with the last token of each sequence alone, if nobody wants to know more of this step.

        The layers from here on may then have no keys and values of their own. Returns the step of those tokens, and
        `values` (Value, Sum or Normed) of them alone.
        """
        return self, *values

    @abstractmethod
    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Return what the heads gather, (count, heads * head_dim), and write keys and values to the cache.

        `qkv` has the tokens' queries, and then keys and values if the layer has its own, one after the other.
        """

    @abstractmethod
    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after the last token of each sequence to `out`, float32 (sequences, rows of `head`)."""

    def softcap(self, logits: Operand, cap: float, size: int, count: int) -> Launch:
        """Return what keeps logits of `count` tokens, float32 (count, size), inside of [-cap, cap]."""
        return self.around.kernels.softcap(self.whole, logits, size=size, cap=cap, max_count=count)

    def hidden(self, x: Normed, out: Operand) -> Launch:
        """Return what writes a norm for each token to `out`, (count, n), instead of going on with it."""
        terms = self._terms(x)
        return self.around.kernels.rms_norm(
            self.whole,
            terms.residual,
            terms.y,
            terms.norms,
            out,
            size=len(x.norm.weight),
            eps=x.norm.eps,
            add=terms.add,
            scaled=terms.scaled,
            max_count=self.count,
            half=self.half,
        )

    def logits_of(self, hidden: Operand, head: Linear, out: Operand) -> list[Launch]:
        """Return what writes the logits after each token, whose norms are in `hidden`, to `out`."""
        return self._products(head, hidden, out, head.scale)

    # What the kinds of steps do in their own ways.

    @abstractmethod
    def _embed(self, part: Part, out: Value, scale: float, vocabulary: int) -> None: ...

    @abstractmethod
    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]: ...

    def _linear(self, matrix: Linear, x: Value, label: str) -> Value:
        out = self.value(label, matrix.rows)
        self.launch(*self._products(matrix, x, out, matrix.scale / x.scale))
        return out

    def value(self, label: str, size: int, itemsize: int = 4, scale: float = 1.0) -> Value:
        """Return a new value, (count, size)."""
        return Value(label, self.count, size, itemsize, scale)

    def _activation(self, label: str, size: int, scale: float = 1.0) -> Value:
        return self.value(label, size, 2 if self.half else 4, scale)

    def _gated(self, size: int) -> Value:
        return self._activation("gated", size)

    def launch(self, *launches: Launch) -> None:
        """Write launches down."""
        self.launches += launches

    @property
    def kernels(self) -> Kernels:
        """Return the shaders."""
        return self.around.kernels

    def compute(self, x: Value | Product | Normed | Sum) -> Value:
        """Compute what would be computed where it is used. A norm is an activation, anything else is float32."""
        return self._plain(x) if isinstance(x, Product) else self._computed(x)

    def normed_operands(self, x: Normed) -> tuple[Value, Operand]:
        """Return what a norm is of, and its weight, for kernels that compute it on the way."""
        return self.compute(x.x), self.around.norms.pair(x.norm, None)

    def _computed(self, x: Value | Normed | Sum) -> Value:
        if isinstance(x, Value):
            return x
        return self._normed(x) if isinstance(x, Normed) else self._sum(x)

    def _normed(self, x: Normed) -> Value:
        """Compute a norm, and the sum that it is of."""
        if x.value is None:
            x.value = self._rms_norm(x, self._activation("normed", len(x.norm.weight)))
        return x.value

    def _rms_norm(self, x: Normed, out: Value, *, last: bool = False, half: bool | None = None) -> Value:
        terms = self._terms(x)
        self.launch(
            self.around.kernels.rms_norm(
                self.whole,
                terms.residual,
                terms.y,
                terms.norms,
                out,
                size=len(x.norm.weight),
                eps=x.norm.eps,
                add=terms.add,
                scaled=terms.scaled,
                max_count=1 if last else self.count,
                last=last,
                half=self.half if half is None else half,
            )
        )
        if isinstance(x.x, Sum):
            x.x.value = terms.residual
        return out

    def _terms(self, x: Normed | Sum) -> _Terms:
        """Return what a norm is of, or what a sum is."""
        inner, norm = (x.x, x.norm) if isinstance(x, Normed) else (x, None)
        norms = self.around.norms
        if isinstance(inner, Sum) and inner.value is None:
            y = inner.y
            if not isinstance(y.x, Value):
                raise NotImplementedError("the norm of a sum cannot be added")
            return _Terms(inner.x, y.x, norms.pair(y.norm, norm, inner.factor), True, inner.factor != 1)
        value = inner if isinstance(inner, Value) else inner.value
        assert value is not None
        return _Terms(value, self.around.kernels.unread, norms.pair(None, norm), False, False)

    def _sum(self, x: Sum) -> Value:
        """Compute a sum. No kernel does this alone, so it goes with a norm that nobody needs."""
        if x.value is None:
            size = len(x.y.norm.weight)
            ones = Norm(np.ones(size, np.float32), x.y.norm.eps)
            self._rms_norm(Normed(x, ones), self._activation("not needed", size))
        assert x.value is not None
        return x.value

    def _plain(self, x: Value | Product) -> Value:
        assert isinstance(x, Value)
        return x

    def _shape(self, attention: Attention) -> AttentionShape:
        caches = self.around.caches
        spec = caches.specs[attention.cache]
        return AttentionShape(
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            attention.scale,
            attention.q_norm.eps,
            window=caches.window(spec),
            ring=caches.ring_of(attention.cache),
            value_norm=attention.value_norm,
            shared=attention.k_norm is None,
        )

    def _decode_attention(self, attention: Attention, qkv: Value, sequences: int) -> Value:
        """Let one token of each sequence attend."""
        kernels, caches, shape = self.around.kernels, self.around.caches, self._shape(attention)
        splits = kernels.splits(shape.window)
        out = self.value("attended", shape.heads * shape.head_dim)
        shares = self.value("attention shares", splits * out.size) if splits > 1 else out
        stats = self.value("attention stats", 2 * splits * shape.heads)
        self.launch(
            kernels.attention_decode(
                shape,
                self.states,
                qkv,
                self.around.norms.pair(attention.q_norm, attention.k_norm),
                self.around.ropes[attention.rope],
                caches.keys(attention.cache),
                caches.values(attention.cache),
                shares,
                stats,
                splits=splits,
                sequences=sequences,
            )
        )
        if splits > 1:
            self.launch(kernels.attention_combine(shape, shares, stats, out, splits=splits, sequences=sequences))
        return out


class ChunkStep(Step):
    """Takes up to `count` tokens of one sequence through the layers.

    `reach` is for chunks that have soft tokens: u32 (count,), the last token of the chunk that each token sees in
    layers that are two-way. `last` is a State for the last token alone, which is to be given if nobody wants to know
    more than the logits after that token. The last token's own launches are those from `own_launches` on.
    """

    own_launches: int | None = None

    def __init__(
        self,
        around: Surroundings,
        states: Buffer,
        tokens: Buffer,
        count: int,
        reach: Buffer | None = None,
        *,
        last: Buffer | None = None,
    ) -> None:
        super().__init__(around, states, tokens, count, half=around.kernels.half)
        self._reach = reach
        self._last = last
        self._last_step: TokenStep | None = None
        self._chunks: dict[int, _Chunk] = {}

    def last_tokens(self, *values: *Ts) -> tuple[Step, *Ts]:
        """Go on with the chunk's last token alone, if nobody wants to know more."""
        if self._last is None:
            return self, *values
        for cache, chunk in self._chunks.items():
            if chunk.uses < self.around.caches.specs[cache].layers:
                self._write_cache(cache, chunk)
        self.own_launches = len(self.launches)
        self._last_step = TokenStep(self.around, self._last, self.tokens, by_slot=False)
        self._last_step.launches = self.launches
        return self._last_step, *cast("tuple[*Ts]", tuple(map(self._of_last, values)))

    def _of_last(self, x: object) -> object:
        """Return a value, a sum or a norm of the last token alone."""
        if isinstance(x, Normed):
            return Normed(cast("Value | Sum", self._of_last(x.x)), x.norm)
        if isinstance(x, Sum) and x.value is None:
            return Sum(cast("Value", self._of_last(x.x)), cast("Normed", self._of_last(x.y)), x.factor)
        value = x.value if isinstance(x, Sum) else x
        assert isinstance(value, Value) and value.itemsize == 4
        out = Value(value.label, 1, value.size, scale=value.scale)
        self.launch(self.around.kernels.last_row(self.states, value, out, size=value.size))
        return out

    def _embed(self, part: Part, out: Value, scale: float, vocabulary: int) -> None:
        self.launch(
            self.around.kernels.embed(
                part, self.states, self.tokens, out, scale=scale, vocabulary=vocabulary, max_count=self.count
            )
        )

    def _gated(self, size: int) -> Value:
        return self._activation("gated", size, _GEGLU_SCALE)

    def _linear(self, matrix: Linear, x: Value, label: str) -> Value:
        if (
            self.around.int8
            and matrix.bias is None
            and half_of(x, self.half) == self.half
            and all(part.layout.is_integer for part in matrix.parts)
        ):
            return self._int8_product(matrix, x, label)
        return super()._linear(matrix, x, label)

    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
        return [
            self.around.kernels.matmul(
                part,
                self.states,
                x,
                out,
                stride=matrix.rows,
                scale=scale,
                bias=matrix.bias,
                max_count=self.count,
                half=half_of(x, self.half),
            )
            for part in matrix.parts
        ]

    def _int8_product(self, matrix: Linear, x: Value, label: str) -> Value:
        kernels, scale, out = self.around.kernels, matrix.scale / x.scale, self.value(label, matrix.rows)
        q, factors = self.value("quantized", x.size, 1), self.value("quantized factors", x.size // 32, 8)
        self.launch(kernels.quantize(self.states, x, q, factors, size=x.size, max_count=self.count))
        for part in matrix.parts:
            self.launch(
                kernels.matmul_int8(
                    part, self.states, q, factors, out, stride=matrix.rows, scale=scale, max_count=self.count
                )
            )
        return out

    def heads(self, attention: Attention, qkv: Value | Product) -> tuple[Value, Value, Value]:
        """Return the queries, scaled, the keys and the values, normed and rotated, (count, heads, head_dim) each."""
        shape = self._shape(attention)
        queries = self._activation("queries", shape.heads * shape.head_dim)
        size = 4 if shape.shared else shape.kv_heads * shape.head_dim  # a shared layer writes none
        keys, values = self._activation("keys", size), self._activation("values", size)
        self.launch(
            self.around.kernels.qk_norm_rope(
                shape,
                self.states,
                self._plain(qkv),
                self.around.norms.pair(attention.q_norm, attention.k_norm),
                self.around.ropes[attention.rope],
                queries,
                keys,
                values,
                max_count=self.count,
            )
        )
        if shape.shared:
            chunk = self._chunks[attention.cache]
            return queries, chunk.keys, chunk.values
        self._chunks[attention.cache] = _Chunk(keys, values)
        return queries, keys, values

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Let the chunk attend to the cache and to itself."""
        kernels, caches, shape = self.around.kernels, self.around.caches, self._shape(attention)
        queries, keys, values = self.heads(attention, qkv)
        chunk = self._chunks[attention.cache]
        chunk.uses += 1
        cache = caches.keys(attention.cache), caches.values(attention.cache)
        out = self._activation("attended", shape.heads * shape.head_dim)
        self.launch(
            kernels.attention_prefill(
                shape,
                self.states,
                queries,
                keys,
                values,
                *cache,
                out,
                max_count=self.count,
                sight=Sight.REACH if self._reach and attention.two_way else Sight.CAUSAL,
                reach=self._reach,
            ),
        )
        # This comes after all attentions to the cache: until then a ring holds the window before the chunk.
        if chunk.uses == caches.specs[attention.cache].layers:
            self._write_cache(attention.cache, chunk)
        return out

    def _write_cache(self, cache: int, chunk: _Chunk) -> None:
        caches = self.around.caches
        self.launch(
            self.around.kernels.cache_write(
                self.states,
                chunk.keys,
                chunk.values,
                caches.keys(cache),
                caches.values(cache),
                size=chunk.keys.size,
                ring=caches.ring_of(cache),
                max_count=self.count,
            )
        )

    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after the last token of the chunk."""
        if self._last_step:
            self._last_step.logits(x, head, out)
        else:
            _last_logits(self, x, head, out)


class TokenStep(Step):
    """Takes one token of one sequence through the layers.

    What surrounds a matrix is part of its kernel: a launch costs as much as a small matrix.
    """

    def __init__(self, around: Surroundings, states: Buffer, tokens: Buffer, *, by_slot: bool) -> None:
        super().__init__(around, states, tokens, 1)
        self._by_slot = by_slot

    def _embed(self, part: Part, out: Value, scale: float, vocabulary: int) -> None:
        self.launch(
            self.around.kernels.embed(
                part, self.states, self.tokens, out, scale=scale, vocabulary=vocabulary, by_slot=self._by_slot
            )
        )

    def linear(self, matrix: Linear, x: Value | Normed | Sum, label: str = "y") -> Value | Product:
        """Return scale W x + bias."""
        if not isinstance(x, Value) and matrix.bias is None and matrix.scale == 1:
            return Product(matrix, x, label)
        return super().linear(matrix, x, label)

    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
        return _vector_products(self, matrix, x, out, scale)

    def _plain(self, x: Value | Product) -> Value:
        if isinstance(x, Value):
            return x
        if x.value is None:
            x.value = self.value(x.label, x.matrix.rows)
            self._norm_product(x, x.value, geglu=False)
        return x.value

    def geglu(self, gate_up: Value | Product, *, cut: float | None = None) -> Value:
        """Return gelu(gate) * up."""
        if isinstance(gate_up, Value) or len(gate_up.matrix.parts) > 1 or cut is not None:
            return super().geglu(gate_up, cut=cut)
        out = self._gated(gate_up.matrix.rows // 2)
        self._norm_product(gate_up, out, geglu=True)
        return out

    def _norm_product(self, x: Product, out: Value, *, geglu: bool) -> None:
        terms, normed = self._terms(x.x), isinstance(x.x, Normed)
        summed = x.x.x if isinstance(x.x, Normed) else x.x
        new = self.value("residual", terms.residual.size) if terms.add else terms.residual
        for part in x.matrix.parts:
            self.launch(
                self.around.kernels.norm_matvec(
                    part,
                    terms.residual,
                    terms.y,
                    terms.norms,
                    new if terms.add else self.around.kernels.unwritten,
                    out,
                    eps=x.x.norm.eps if isinstance(x.x, Normed) else x.x.y.norm.eps,
                    add=terms.add,
                    scaled=terms.scaled,
                    normed=normed,
                    geglu=geglu,
                )
            )
        if isinstance(summed, Sum):
            summed.value = new

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Let the token attend to the cache and to itself."""
        return self._decode_attention(attention, self._plain(qkv), 1)

    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after the token. The norm is on its own: too many workgroups would repeat it."""
        _last_logits(self, x, head, out)


class BatchStep(Step):
    """Takes one token of each of `count` sequences through the layers. Activations are float32 in every precision."""

    def __init__(self, around: Surroundings, states: Buffer, tokens: Buffer, count: int, whole: Buffer) -> None:
        super().__init__(around, states, tokens, count, whole=whole)
        self.sequences = count

    def _embed(self, part: Part, out: Value, scale: float, vocabulary: int) -> None:
        self.launch(
            self.around.kernels.embed(
                part,
                self.states,
                self.tokens,
                out,
                scale=scale,
                vocabulary=vocabulary,
                sequences=self.count,
                by_slot=True,
            )
        )

    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
        return _vector_products(self, matrix, x, out, scale)

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Let each token attend to the cache of its sequence."""
        return self._decode_attention(attention, self._plain(qkv), self.count)

    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after each token."""
        self.launch(*self._products(head, self._normed(x), out, head.scale))


def half_of(x: Operand, default: bool) -> bool:
    """Say whether a matrix's operand is float16; a buffer is as the step's activations are."""
    return x.itemsize == 2 if isinstance(x, Value) else default


def _last_logits(step: Step, x: Normed, head: Linear, out: Buffer) -> None:
    """Write the logits after the last token of the one sequence that a step has."""
    final = Value("final norm", 1, len(x.norm.weight))
    step._rms_norm(x, final, last=True, half=False)
    step.launch(*(step.around.kernels.matvec(part, final, out) for part in head.parts))


def _vector_products(step: Step, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
    """Return what multiplies a matrix by the vectors of a few tokens."""
    kernels, whole, rows, count = step.around.kernels, step.whole, matrix.rows, step.count
    if matrix.bias is not None or scale != 1:
        return [
            kernels.matmul(
                part, whole, x, out, stride=rows, scale=scale, bias=matrix.bias, max_count=count, half=False
            )
            for part in matrix.parts
        ]
    if count == 1:
        return [kernels.matvec(part, x, out) for part in matrix.parts]
    return [kernels.matvecs(part, whole, x, out, stride=rows, max_count=count) for part in matrix.parts]
