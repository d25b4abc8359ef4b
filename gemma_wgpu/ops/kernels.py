"""One thin function a shader: it chooses the constants, binds the buffers and counts the workgroups.

What a kernel computes, and how its buffers are laid out, stands at the top of its file under shaders/. What is called
`half` there is float16 in F16 mode and float32 in F32 mode.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_wgpu.gpu.device import AdapterInfo, Buffer, Constants, Device, Dispatch
from gemma_wgpu.weights.upload import Part

VOCABULARY_PART = 1024  # tokens that a workgroup of logits_scan sums up
QUERY_ROWS = 16  # query heads times tokens in a workgroup of attention_prefill
READ_STEP = 4096  # bytes that a workgroup of read takes at once
_REDUCE = 64  # threads of the kernels that sum over a workgroup


@dataclass(frozen=True)
class Attention:
    """The shape of a layer's attention. `window` counts the query; `capacity` is the slots of the cache."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    window: int
    capacity: int


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Tuning:
    """Variants of the kernels: what computes the same, faster on one GPU than on another.

    `lanes` is the threads that share a row of a matrix at decode: they read its memory together, but on a CPU their
    barriers cost more than that saves. `subgroups` takes the kernels that are made for CPUs which stand in for a GPU.
    """

    lanes: int
    subgroups: bool

    def __str__(self) -> str:
        return f"lanes={self.lanes}" + (",subgroups" if self.subgroups else "")

    @property
    def on_cpu(self) -> bool:
        """Whether few workgroups run at a time, so that decode is to be divided into few."""
        return self.lanes == 1


def usual_tuning(adapter: AdapterInfo, features: frozenset[str]) -> Tuning:
    """What is likely to be best for an adapter's kind."""
    if adapter.type != "CPU":
        return Tuning(16, subgroups=False)
    # Natively: in browsers' WGSL `enable subgroups` must be said, and their CPU adapter has them of 4 only.
    return Tuning(1, subgroups="subgroups" in features and adapter.backend != "WebGPU")


class Kernels:
    """The shaders on one device in one precision, in the usual tuning or another.

    `max_count` is the number of tokens that a program is made for, of one sequence. Or they are of as many
    `sequences`, one of each; then `context` is the length of a sequence's row of tokens, and `stride` that of its row
    of logits.
    """

    def __init__(self, device: Device, *, half: bool, tuning: Tuning | None = None) -> None:
        self._device = device
        self._half = half
        self.tuning = tuning or usual_tuning(device.info, device.features)

    def splits(self, window: int) -> int:
        """Into how many shares decode divides the positions of a layer that sees `window` of them."""
        if window <= 512:
            return 1
        return 4 if self.tuning.on_cpu else 16

    def _dispatch(
        self,
        shader: str,
        constants: Constants,
        bindings: tuple[Buffer, ...],
        *workgroups: int,
        half: bool | None = None,
    ) -> Dispatch:
        x, y, z = (*workgroups, 1, 1)[:3]
        half = self._half if half is None else half
        pipeline = self._device.pipeline(shader, constants, half=half, subgroups=self.tuning.subgroups)
        return Dispatch(pipeline, bindings, (x, y, z))

    def _spread(self, workgroups: int) -> tuple[int, int]:
        """A grid of at least so many workgroups, inside the limit of a dimension."""
        y = ceil_div(workgroups, self._device.limits.max_compute_workgroups_per_dimension)
        return ceil_div(workgroups, y), y

    def _rows_grid(self, rows: int) -> tuple[int, int]:
        return self._spread(ceil_div(rows, 2 * (_REDUCE // self.tuning.lanes)))

    def embed(
        self,
        part: Part,
        state: Buffer,
        tokens: Buffer,
        residual: Buffer,
        *,
        scale: float,
        max_count: int = 1,
        sequences: int = 1,
        context: int = 0,
    ) -> Dispatch:
        """Look up the tokens whose embeddings lie in `part`."""
        constants = _weights(part) | {"SCALE": scale, "CONTEXT": context}
        bindings = (part.quants, part.scales, state, tokens, residual)
        return self._dispatch("embed", constants, bindings, ceil_div(part.cols // 32, 32), max_count, sequences)

    def rms_norm(
        self,
        state: Buffer,
        residual: Buffer,
        y: Buffer,
        norms: Buffer,
        out: Buffer,
        *,
        size: int,
        eps: float,
        add: bool,
        max_count: int,
        last: bool = False,
        half: bool | None = None,
    ) -> Dispatch:
        """Norm of the residual, after adding the norm of `y` to it where `add`; of the `last` token only.

        `half` says what `out` holds, if not what the precision says.
        """
        constants = {"WORKGROUP_SIZE": _REDUCE, "K": size, "EPS": eps, "ADD": add, "LAST": last}
        return self._dispatch("rms_norm", constants, (state, residual, y, norms, out), max_count, half=half)

    def matvec(self, part: Part, x: Buffer, y: Buffer) -> Dispatch:
        """A part of a matrix times a vector."""
        constants = _weights(part) | self._teams()
        return self._dispatch("matvec", constants, (part.quants, part.scales, x, y), *self._rows_grid(part.rows))

    def norm_matvec(
        self,
        part: Part,
        state: Buffer,
        residual: Buffer,
        previous: Buffer,
        norms: Buffer,
        new_residual: Buffer,
        y: Buffer,
        *,
        eps: float,
        add: bool,
        geglu: bool = False,
    ) -> Dispatch:
        """A part of a matrix times the norm of the residual, after adding the norm of `previous` where `add`."""
        rows = part.rows // 2 if geglu else part.rows
        workgroups = ceil_div(part.rows, 2 * (_REDUCE // self.tuning.lanes))
        # Workgroups enough to keep the GPU busy, and no more: each computes the norm.
        rounds = min(max(workgroups // (8 if self.tuning.on_cpu else 256), 1), 4)
        constants = _weights(part) | self._teams()
        constants |= {"ROUNDS": rounds, "ROWS": rows, "EPS": eps, "ADD": add, "GEGLU": geglu}
        bindings = (part.quants, part.scales, state, residual, previous, norms, new_residual, y)
        return self._dispatch("norm_matvec", constants, bindings, *self._spread(ceil_div(workgroups, rounds)))

    def matvecs(self, part: Part, state: Buffer, x: Buffer, y: Buffer, *, stride: int, max_count: int) -> Dispatch:
        """A part of a matrix times a few float32 vectors; `stride` is the length of a row of `y`."""
        if self.tuning.subgroups:  # where `matmul` is made for few tokens already
            return self.matmul(part, state, x, y, stride=stride, max_count=max_count, half=False)
        vectors = min(max_count, 8)
        constants = _weights(part) | self._teams() | {"STRIDE": stride, "VECTORS": vectors}
        grid = *self._rows_grid(part.rows), ceil_div(max_count, vectors)
        return self._dispatch("matvecs", constants, (part.quants, part.scales, state, x, y), *grid)

    def matmul(
        self,
        part: Part,
        state: Buffer,
        x: Buffer,
        y: Buffer,
        *,
        stride: int,
        scale: float = 1.0,
        max_count: int,
        half: bool | None = None,
    ) -> Dispatch:
        """A part of a matrix times the vectors of the tokens; `stride` is the length of a row of `y`.

        `half` says what `x` holds, if not what the precision says.
        """
        tokens = min(1 << (max_count - 1).bit_length(), 8) if self.tuning.subgroups else 32  # of a tile
        constants = _weights(part) | {"TOKENS": tokens, "STRIDE": stride, "SCALE": scale}
        bindings = (part.quants, part.scales, state, x, y)
        grid = ceil_div(part.rows, 64), ceil_div(max_count, tokens)
        return self._dispatch("matmul", constants, bindings, *grid, half=half)

    def quantize(
        self, state: Buffer, x: Buffer, q: Buffer, factors: Buffer, *, size: int, max_count: int
    ) -> Dispatch:
        """The vectors of the tokens as 8-bit integers, for `matmul_int8`."""
        grid = ceil_div(size // 32, 64), max_count
        return self._dispatch("quantize", {"K": size}, (state, x, q, factors), *grid)

    def matmul_int8(
        self,
        part: Part,
        state: Buffer,
        q: Buffer,
        factors: Buffer,
        y: Buffer,
        *,
        stride: int,
        scale: float = 1.0,
        max_count: int,
    ) -> Dispatch:
        """`matmul` for a layout of integers, with the vectors that `quantize` made."""
        rows, tokens = (128, 8) if self.tuning.subgroups else (64, 32)  # of a tile
        constants = _weights(part) | {"TOKENS": tokens, "STRIDE": stride, "SCALE": scale}
        bindings = (part.quants, part.scales, state, q, factors, y)
        grid = ceil_div(part.rows, rows), ceil_div(max_count, tokens)
        return self._dispatch("matmul_int8", constants, bindings, *grid)

    def geglu(
        self, state: Buffer, gate_up: Buffer, out: Buffer, *, size: int, scale: float, max_count: int, half: bool
    ) -> Dispatch:
        """GELU of the gate times up; `half` says what `out` holds."""
        grid = ceil_div(size // 4, 64), max_count
        return self._dispatch("geglu", {"SIZE": size, "SCALE": scale}, (state, gate_up, out), *grid, half=half)

    def qk_norm_rope(
        self,
        shape: Attention,
        state: Buffer,
        qkv: Buffer,
        norms: Buffer,
        rope: Buffer,
        queries: Buffer,
        keys: Buffer,
        values: Buffer,
        *,
        max_count: int,
    ) -> Dispatch:
        """Queries, keys and values, normalised and rotated."""
        constants = _heads(shape) | {"HEAD_DIM": shape.head_dim, "EPS": shape.eps, "SCALE": shape.scale}
        bindings = (state, qkv, norms, rope, queries, keys, values)
        return self._dispatch("qk_norm_rope", constants, bindings, shape.heads + 2 * shape.kv_heads, max_count)

    def attention_prefill(
        self,
        shape: Attention,
        state: Buffer,
        queries: Buffer,
        keys: Buffer,
        values: Buffer,
        key_cache: Buffer,
        value_cache: Buffer,
        out: Buffer,
        *,
        max_count: int,
    ) -> Dispatch:
        """Attention of a chunk of tokens over the cache and the chunk."""
        constants = _heads(shape) | {"WINDOW": shape.window, "CAPACITY": shape.capacity}
        bindings = (state, queries, keys, values, key_cache, value_cache, out)
        tiles = ceil_div(max_count, QUERY_ROWS // (shape.heads // shape.kv_heads))
        return self._dispatch("attention_prefill", constants, bindings, tiles, shape.kv_heads)

    def cache_write(
        self,
        shape: Attention,
        state: Buffer,
        keys: Buffer,
        values: Buffer,
        key_cache: Buffer,
        value_cache: Buffer,
        *,
        max_count: int,
    ) -> Dispatch:
        """A chunk's keys and values into the cache."""
        size = shape.kv_heads * shape.head_dim
        constants = {"SIZE": size, "CAPACITY": shape.capacity}
        bindings = (state, keys, values, key_cache, value_cache)
        return self._dispatch("cache_write", constants, bindings, ceil_div(size // 4, 64), max_count)

    def attention_decode(
        self,
        shape: Attention,
        state: Buffer,
        qkv: Buffer,
        norms: Buffer,
        rope: Buffer,
        key_cache: Buffer,
        value_cache: Buffer,
        out: Buffer,
        stats: Buffer,
        *,
        splits: int,
        sequences: int = 1,
    ) -> Dispatch:
        """Attention of one token, its keys and values written to the cache on the way."""
        constants = _heads(shape) | {
            "HEAD_DIM": shape.head_dim,
            "EPS": shape.eps,
            "SCALE": shape.scale,
            "WINDOW": shape.window,
            "CAPACITY": shape.capacity,
            "SPLITS": splits,
        }
        bindings = (state, qkv, norms, rope, key_cache, value_cache, out, stats)
        return self._dispatch("attention_decode", constants, bindings, splits, shape.kv_heads, sequences)

    def attention_combine(
        self, shape: Attention, shares: Buffer, stats: Buffer, out: Buffer, *, splits: int, sequences: int = 1
    ) -> Dispatch:
        """One softmax out of the shares that the splits computed."""
        constants = {"HEADS": shape.heads, "SPLITS": splits, "WORKGROUP_SIZE": shape.head_dim // 4}
        return self._dispatch("attention_combine", constants, (shares, stats, out), shape.heads, sequences)

    def mask(self, mask: Buffer, logits: Buffer, *, vocab: int, sequences: int = 1, stride: int = 0) -> Dispatch:
        """Leave only the tokens whose bit is set to be drawn."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "WORKGROUP_SIZE": _REDUCE}
        return self._dispatch("mask", constants, (mask, logits), ceil_div(vocab, VOCABULARY_PART), sequences)

    def logits_scan(
        self,
        state: Buffer,
        sampling: Buffer,
        seen: Buffer,
        logits: Buffer,
        summaries: Buffer,
        *,
        vocab: int,
        sequences: int = 1,
        stride: int = 0,
    ) -> Dispatch:
        """Penalise and temper the logits, and sum up each part of the vocabulary."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "WORKGROUP_SIZE": _REDUCE}
        bindings = (state, sampling, seen, logits, summaries)
        return self._dispatch("logits_scan", constants, bindings, ceil_div(vocab, VOCABULARY_PART), sequences)

    def sample(
        self,
        state: Buffer,
        sampling: Buffer,
        logits: Buffer,
        summaries: Buffer,
        tokens: Buffer,
        seen: Buffer,
        *,
        vocab: int,
        sequences: int = 1,
        stride: int = 0,
        context: int = 0,
    ) -> Dispatch:
        """Choose the next token, append it and advance the state."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "CONTEXT": context}
        bindings = (state, sampling, logits, summaries, tokens, seen)
        return self._dispatch("sample", constants | {"WORKGROUP_SIZE": _REDUCE}, bindings, sequences)

    def read(self, words: Buffer, out: Buffer, *, workgroups: int) -> Dispatch:
        """Read all of `words`, whose size each workgroup has an equal share of, in steps of 4096 bytes."""
        constants = {"SIZE": words.size // (READ_STEP * workgroups)}
        return self._dispatch("read", constants, (words, out), workgroups, half=False)

    def _teams(self) -> dict[str, int]:
        return {"WORKGROUP_SIZE": _REDUCE, "LANES": self.tuning.lanes}


def _weights(part: Part) -> dict[str, int | float | bool]:
    return {"LAYOUT": int(part.layout), "K": part.cols, "FIRST_ROW": part.first_row, "ROWS": part.rows}


def _heads(shape: Attention) -> dict[str, int | float | bool]:
    return {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "WORKGROUP_SIZE": shape.head_dim // 4}
