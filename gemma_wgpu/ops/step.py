"""A step of a model: what its forward pass is written on.

A step takes a chunk of one sequence's tokens, one token of one sequence, or one token of each of several sequences
through the layers. A forward pass calls the step's operations in order. They write kernel launches down, and choose
the kernels that serve this kind of step best: `norm`, `add` and the first half of `geglu` cost one token nothing, for
example, since the kernel of the matrix that follows does them on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import AttentionShape, Kernels, Sight
from gemma_wgpu.ops.kv_cache import KVCache
from gemma_wgpu.ops.launch import Launch, Operand, Value
from gemma_wgpu.ops.linear import Linear, Part
from gemma_wgpu.ops.rope import Rope, RopeTables

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
    """A vector for each token plus a normed one. It is computed where it is used."""

    def __init__(self, x: Value, y: Normed) -> None:
        self.x, self.y = x, y
        self.value: Value | None = None


class Product:
    """A matrix times a normed vector for one token. It is computed where it is used."""

    def __init__(self, matrix: Linear, x: Normed, label: str) -> None:
        self.matrix, self.x, self.label = matrix, x, label
        self.value: Value | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a layer: RMSNorm of queries and keys, rotation, softmax(scale q k) v over its cache.

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
    k_norm: Norm
    rope: Rope
    cache: int
    two_way: bool = False


class Norms:
    """The weights of norms on the GPU, two by two, as the kernels read them."""

    def __init__(self, device: Device) -> None:
        self.nbytes = 0
        self._device = device
        self._pairs: dict[tuple[Norm | None, Norm], Buffer] = {}

    def pair(self, first: Norm | None, second: Norm) -> Buffer:
        """Return float32 (2, n): the weights of both norms; those of the first one are zero if it is None."""
        if (first, second) not in self._pairs:
            weights = np.stack((np.zeros_like(second.weight) if first is None else first.weight, second.weight))
            buffer = self._device.upload(weights, "norms")
            self.nbytes += buffer.size
            self._pairs[first, second] = buffer
        return self._pairs[first, second]


@dataclass(frozen=True)
class Surroundings:
    """What all steps of a model share."""

    kernels: Kernels
    norms: Norms
    ropes: RopeTables
    caches: KVCache
    int8: bool  # whether the activations of prompts are rounded to 8 bits


class Step(ABC):
    """Writes the launches of a forward pass down, for `count` tokens at most.

    `states` (struct State of shaders/state.wgsl) says where each sequence stands, and `tokens` u32 has the tokens: of
    a chunk, or the last one of each slot. `whole` is a State whose count is that of all tokens of the step. `half`
    says whether the activations are float16. `embedded` are the tokens' embeddings, which the first
    `embedding_launches` compute; other vectors may take their place before the others run.
    """

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
        self.embedded = out = self._value("residual", table.cols)
        for part in table.parts:
            self._embed(part, out, scale)
        self.embedding_launches = len(self.launches)
        return out

    def norm(self, x: Value | Product | Sum, norm: Norm) -> Normed:
        """Return the RMSNorm of `x`."""
        return Normed(x if isinstance(x, Sum) else self._plain(x), norm)

    def add(self, x: Value | Sum, y: Normed) -> Sum:
        """Return x + y. Nothing may use `x` afterwards: the sum takes its place."""
        return Sum(x if isinstance(x, Value) else self._sum(x), y)

    def linear(self, matrix: Linear, x: Value | Normed, label: str = "y") -> Value | Product:
        """Return scale W x + bias, float32 (count, rows). `label` names it in messages."""
        return self._linear(matrix, self._normed(x) if isinstance(x, Normed) else x, label)

    def geglu(self, gate_up: Value | Product) -> Value:
        """Return gelu(gate) * up, where `gate_up` has a gate and an up of the same size one after the other."""
        x = self._plain(gate_up)
        out = self._gated(x.size // 2)
        self._launch(
            self.around.kernels.geglu(
                self.whole, x, out, size=out.size, scale=out.scale, max_count=self.count, half=self.half
            )
        )
        return out

    @abstractmethod
    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Return what the heads gather, (count, heads * head_dim), and write keys and values to the cache.

        `qkv` has the tokens' queries, keys and values one after the other.
        """

    @abstractmethod
    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after the last token of each sequence to `out`, float32 (sequences, rows of `head`)."""

    def hidden(self, x: Normed, out: Operand) -> Launch:
        """Return what writes a norm for each token to `out`, (count, n), instead of going on with it."""
        residual, y, norms, add = self._terms(x)
        size, eps = len(x.norm.weight), x.norm.eps
        return self.around.kernels.rms_norm(
            self.whole, residual, y, norms, out, size=size, eps=eps, add=add, max_count=self.count, half=self.half
        )

    def logits_of(self, hidden: Operand, head: Linear, out: Operand) -> list[Launch]:
        """Return what writes the logits after each token, whose norms are in `hidden`, to `out`."""
        return self._products(head, hidden, out, head.scale)

    # What the kinds of steps do in their own ways.

    @abstractmethod
    def _embed(self, part: Part, out: Value, scale: float) -> None: ...

    @abstractmethod
    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]: ...

    def _linear(self, matrix: Linear, x: Value, label: str) -> Value:
        out = self._value(label, matrix.rows)
        self._launch(*self._products(matrix, x, out, matrix.scale / x.scale))
        return out

    def _value(self, label: str, size: int, itemsize: int = 4, scale: float = 1.0) -> Value:
        return Value(label, self.count, size, itemsize, scale)

    def _activation(self, label: str, size: int, scale: float = 1.0) -> Value:
        return self._value(label, size, 2 if self.half else 4, scale)

    def _gated(self, size: int) -> Value:
        return self._activation("gated", size)

    def _launch(self, *launches: Launch) -> None:
        self.launches += launches

    def _normed(self, x: Normed) -> Value:
        """Compute a norm, and the sum that it is of."""
        if x.value is None:
            x.value = self._rms_norm(x, self._activation("normed", len(x.norm.weight)))
        return x.value

    def _rms_norm(self, x: Normed, out: Value, *, last: bool = False, half: bool | None = None) -> Value:
        residual, y, norms, add = self._terms(x)
        self._launch(
            self.around.kernels.rms_norm(
                self.whole,
                residual,
                y,
                norms,
                out,
                size=len(x.norm.weight),
                eps=x.norm.eps,
                add=add,
                max_count=1 if last else self.count,
                last=last,
                half=self.half if half is None else half,
            )
        )
        if isinstance(x.x, Sum):
            x.x.value = residual
        return out

    def _terms(self, x: Normed) -> tuple[Value, Operand, Buffer, bool]:
        """Return what a norm is of: the vector, what is added to it, the weights of both norms, whether to add."""
        if isinstance(x.x, Value):
            return x.x, self.around.kernels.unread, self.around.norms.pair(None, x.norm), False
        if x.x.value is not None:
            return x.x.value, self.around.kernels.unread, self.around.norms.pair(None, x.norm), False
        y = x.x.y
        if not isinstance(y.x, Value):
            raise NotImplementedError("the norm of a sum cannot be added")
        return x.x.x, y.x, self.around.norms.pair(y.norm, x.norm), True

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
        )

    def _decode_attention(self, attention: Attention, qkv: Value, sequences: int) -> Value:
        """Let one token of each sequence attend."""
        kernels, caches, shape = self.around.kernels, self.around.caches, self._shape(attention)
        splits = kernels.splits(shape.window)
        out = self._value("attended", shape.heads * shape.head_dim)
        shares = self._value("attention shares", splits * out.size) if splits > 1 else out
        stats = self._value("attention stats", 2 * splits * shape.heads)
        self._launch(
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
            self._launch(kernels.attention_combine(shape, shares, stats, out, splits=splits, sequences=sequences))
        return out


class ChunkStep(Step):
    """Takes up to `count` tokens of one sequence through the layers.

    `reach` is for chunks that have soft tokens: u32 (count,), the last token of the chunk that each token sees in
    layers that are two-way.
    """

    def __init__(
        self, around: Surroundings, states: Buffer, tokens: Buffer, count: int, reach: Buffer | None = None
    ) -> None:
        super().__init__(around, states, tokens, count, half=around.kernels.half)
        self._reach = reach

    def _embed(self, part: Part, out: Value, scale: float) -> None:
        self._launch(
            self.around.kernels.embed(part, self.states, self.tokens, out, scale=scale, max_count=self.count)
        )

    def _gated(self, size: int) -> Value:
        return self._activation("gated", size, _GEGLU_SCALE)

    def _linear(self, matrix: Linear, x: Value, label: str) -> Value:
        if self.around.int8 and matrix.bias is None and all(part.layout.is_integer for part in matrix.parts):
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
            )
            for part in matrix.parts
        ]

    def _int8_product(self, matrix: Linear, x: Value, label: str) -> Value:
        kernels, scale, out = self.around.kernels, matrix.scale / x.scale, self._value(label, matrix.rows)
        q, factors = self._value("quantized", x.size, 1), self._value("quantized factors", x.size // 32, 8)
        self._launch(kernels.quantize(self.states, x, q, factors, size=x.size, max_count=self.count))
        for part in matrix.parts:
            self._launch(
                kernels.matmul_int8(
                    part, self.states, q, factors, out, stride=matrix.rows, scale=scale, max_count=self.count
                )
            )
        return out

    def heads(self, attention: Attention, qkv: Value | Product) -> tuple[Value, Value, Value]:
        """Return the queries, scaled, the keys and the values, normed and rotated, (count, heads, head_dim) each."""
        shape = self._shape(attention)
        queries = self._activation("queries", shape.heads * shape.head_dim)
        keys = self._activation("keys", shape.kv_heads * shape.head_dim)
        values = self._activation("values", shape.kv_heads * shape.head_dim)
        self._launch(
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
        return queries, keys, values

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Let the chunk attend to the cache and to itself."""
        kernels, caches, shape = self.around.kernels, self.around.caches, self._shape(attention)
        queries, keys, values = self.heads(attention, qkv)
        cache = caches.keys(attention.cache), caches.values(attention.cache)
        out = self._activation("attended", shape.heads * shape.head_dim)
        self._launch(
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
            # This comes after the attention: until then a ring holds the window before the chunk.
            kernels.cache_write(
                self.states, keys, values, *cache, size=keys.size, ring=shape.ring, max_count=self.count
            ),
        )
        return out

    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after the last token of the chunk."""
        _last_logits(self, x, head, out)


class TokenStep(Step):
    """Takes one token of one sequence through the layers.

    What surrounds a matrix is part of its kernel: a launch costs as much as a small matrix.
    """

    def __init__(self, around: Surroundings, states: Buffer, tokens: Buffer, *, by_slot: bool) -> None:
        super().__init__(around, states, tokens, 1)
        self._by_slot = by_slot

    def _embed(self, part: Part, out: Value, scale: float) -> None:
        self._launch(
            self.around.kernels.embed(part, self.states, self.tokens, out, scale=scale, by_slot=self._by_slot)
        )

    def linear(self, matrix: Linear, x: Value | Normed, label: str = "y") -> Value | Product:
        """Return scale W x + bias."""
        if isinstance(x, Normed) and matrix.bias is None and matrix.scale == 1:
            return Product(matrix, x, label)
        return super().linear(matrix, x, label)

    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
        return _vector_products(self, matrix, x, out, scale)

    def _plain(self, x: Value | Product) -> Value:
        if isinstance(x, Value):
            return x
        if x.value is None:
            x.value = self._value(x.label, x.matrix.rows)
            self._norm_product(x, x.value, geglu=False)
        return x.value

    def geglu(self, gate_up: Value | Product) -> Value:
        """Return gelu(gate) * up."""
        if isinstance(gate_up, Value) or len(gate_up.matrix.parts) > 1:
            return super().geglu(gate_up)
        out = self._gated(gate_up.matrix.rows // 2)
        self._norm_product(gate_up, out, geglu=True)
        return out

    def _norm_product(self, x: Product, out: Value, *, geglu: bool) -> None:
        residual, previous, norms, add = self._terms(x.x)
        new = self._value("residual", residual.size) if add else residual
        for part in x.matrix.parts:
            self._launch(
                self.around.kernels.norm_matvec(
                    part,
                    residual,
                    previous,
                    norms,
                    new if add else self.around.kernels.unwritten,
                    out,
                    eps=x.x.norm.eps,
                    add=add,
                    geglu=geglu,
                )
            )
        if isinstance(x.x.x, Sum):
            x.x.x.value = new

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

    def _embed(self, part: Part, out: Value, scale: float) -> None:
        self._launch(
            self.around.kernels.embed(
                part, self.states, self.tokens, out, scale=scale, sequences=self.count, by_slot=True
            )
        )

    def _products(self, matrix: Linear, x: Operand, out: Operand, scale: float) -> list[Launch]:
        return _vector_products(self, matrix, x, out, scale)

    def attention(self, attention: Attention, qkv: Value | Product) -> Value:
        """Let each token attend to the cache of its sequence."""
        return self._decode_attention(attention, self._plain(qkv), self.count)

    def logits(self, x: Normed, head: Linear, out: Buffer) -> None:
        """Write the logits after each token."""
        self._launch(*self._products(head, self._normed(x), out, head.scale))


def _last_logits(step: Step, x: Normed, head: Linear, out: Buffer) -> None:
    """Write the logits after the last token of the one sequence that a step has."""
    final = Value("final norm", 1, len(x.norm.weight))
    step._rms_norm(x, final, last=True, half=False)
    step._launch(*(step.around.kernels.matvec(part, final, out) for part in head.parts))


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
