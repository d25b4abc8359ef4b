"""How fast the kernels are by themselves, at the shapes that a model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma_wgpu.bench.run import pass_seconds, read_bandwidth
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import STATE_WORDS, AttentionShape, Kernels
from gemma_wgpu.ops.kv_cache import Ring, ring_words
from gemma_wgpu.ops.launch import Launch, record
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.ops.tuning import Tuning
from gemma_wgpu.options import check_count
from gemma_wgpu.progress import OnProgress, Progress

LAYOUTS = (Layout.INT4, Layout.INT4_SUPER, Layout.INT8, Layout.F16)
_LOCAL, _GLOBAL = 512, 4096  # positions that a layer sees
_EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Gemma 3 that has 4 query heads of 256, and one head of keys and values."""

    hidden: int
    intermediate: int
    head_dim: int = 256
    heads: int = 4
    kv_heads: int = 1

    @property
    def qkv(self) -> int:
        """Return the size of a token's queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


MODELS = {"gemma-3-270m": Sizes(640, 2048), "gemma-3-1b": Sizes(1152, 6912)}


@dataclass(frozen=True)
class Timing:
    """The time of one kernel.

    `nbytes` are the bytes that it must read and write at least. `operations` are its multiplications and additions.
    """

    kernel: str
    shape: str
    seconds: float
    nbytes: int
    operations: int

    @property
    def bandwidth(self) -> float:
        """Return the bytes per second."""
        return self.nbytes / self.seconds

    @property
    def rate(self) -> float:
        """Return the operations per second."""
        return self.operations / self.seconds


@dataclass(frozen=True)
class Timings:
    """The times of the kernels, and the bandwidth that the read kernel reaches, in bytes per second."""

    model: str
    precision: str
    tuning: str
    tokens: int
    bandwidth: float
    kernels: list[Timing]


@dataclass(frozen=True)
class _Case:
    """A launch, the buffer that it writes, and what it must move and compute."""

    kernel: str
    shape: str
    launch: Launch
    out: Buffer
    nbytes: int
    operations: int


async def time_kernels(
    device: Device,
    model: str,
    *,
    half: bool,
    tuning: Tuning,
    tokens: int = 512,
    progress: OnProgress | None = None,
) -> Timings:
    """Time the kernels at the shapes of a model of MODELS; a prompt has `tokens` tokens.

    Raises RequestError for another model, and for a number of tokens outside 1 to 4096.
    """
    if model not in MODELS:
        raise RequestError(f"there are no shapes of {model!r}; choose from {', '.join(MODELS)}")
    check_count("tokens", tokens, 1, _GLOBAL)
    timings = []
    kernels = Kernels(device, half=half, tuning=tuning)
    try:
        bench = _Bench(device, kernels, MODELS[model], tokens)
        makers = list(bench.cases())

        def tell(what: str, done: int) -> None:
            if progress:
                progress(Progress(what, done, len(makers) + 1, "kernels"))

        for number, make in enumerate(makers):
            with bench:
                case = make()
                tell(f"{case.kernel}, {case.shape}", number)
                seconds = await pass_seconds(device, record(device, [case.launch]), case.out)
            timings.append(Timing(case.kernel, case.shape, seconds, case.nbytes, case.operations))
        tell("measuring bandwidth", len(makers))
        bandwidth = await read_bandwidth(device)
    finally:
        kernels.close()
    return Timings(model, "f16" if half else "f32", str(tuning), tokens, bandwidth, timings)


class _Bench:
    """The buffers of one case at a time, which are freed when it is done."""

    def __init__(self, device: Device, kernels: Kernels, sizes: Sizes, tokens: int) -> None:
        self._device, self._kernels, self._sizes, self._tokens = device, kernels, sizes, tokens
        self._itemsize = 2 if kernels.half else 4
        self._buffers: list[Buffer] = []

    def __enter__(self) -> None:
        """Do nothing: the case makes its buffers."""

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            buffer.destroy()
        self._buffers.clear()

    def cases(self) -> Iterator[Callable[[], _Case]]:
        """Yield what makes each case."""
        for layout in LAYOUTS:
            yield partial(self._matvec, layout)
        for layout in LAYOUTS:
            yield partial(self._matmul, layout)
        yield self._matmul_int8
        for seen in (_LOCAL, _GLOBAL):
            yield partial(self._attention_decode, seen)
        yield self._attention_prefill
        yield self._rms_norm

    def _buffer(self, nbytes: int) -> Buffer:
        buffer = self._device.buffer(nbytes, "kernel under test")
        self._buffers.append(buffer)
        return buffer

    def _state(self, position: int, count: int, rows: int = 1) -> Buffer:
        """Return the State of a sequence whose cache has so many rows."""
        state = self._buffer(4 * STATE_WORDS)
        words = np.array([position, count, 0, 0], np.uint32)
        with self._device.lock:
            self._device.write(state, np.concatenate((words, ring_words([Ring(0, rows)] * 2))))
        return state

    def _matrix(self, layout: Layout) -> tuple[Part, str]:
        """Return the matrix of gate and up, which are most of a layer. It is zero, which takes no other time."""
        rows, cols = 2 * self._sizes.intermediate, self._sizes.hidden
        cols = -(-cols // layout.group) * layout.group
        quants = self._buffer(4 * layout.quant_words(rows, cols))
        scales = self._buffer(4 * layout.scale_words(rows, cols))
        return Part(layout, 0, rows, cols, quants, scales), f"{rows}×{cols} {layout.name.lower()}"

    def _matvec(self, layout: Layout) -> _Case:
        part, shape = self._matrix(layout)
        x, y = self._buffer(4 * part.cols), self._buffer(4 * part.rows)
        moved = sum(buffer.size for buffer in (part.quants, part.scales, x, y))
        return _Case("matvec", shape, self._kernels.matvec(part, x, y), y, moved, 2 * part.rows * part.cols)

    def _matmul(self, layout: Layout) -> _Case:
        part, shape = self._matrix(layout)
        n = self._tokens
        x, y = self._buffer(self._itemsize * n * part.cols), self._buffer(4 * n * part.rows)
        launch = self._kernels.matmul(part, self._state(0, n), x, y, stride=part.rows, max_count=n)
        return self._product("matmul", shape, part, launch, (x, y))

    def _matmul_int8(self) -> _Case:
        part, shape = self._matrix(Layout.INT8)
        n = self._tokens
        q, factors, y = self._buffer(n * part.cols), self._buffer(n * part.cols // 4), self._buffer(4 * n * part.rows)
        state = self._state(0, n)
        launch = self._kernels.matmul_int8(part, state, q, factors, y, stride=part.rows, max_count=n)
        return self._product("matmul_int8", shape, part, launch, (q, factors, y))

    def _product(self, kernel: str, shape: str, part: Part, launch: Launch, others: Sequence[Buffer]) -> _Case:
        """Return a case of a matrix and `others`, the last of which is written."""
        moved = sum(buffer.size for buffer in (part.quants, part.scales, *others))
        operations = 2 * self._tokens * part.rows * part.cols
        return _Case(kernel, f"{shape}, {self._tokens} tokens", launch, others[-1], moved, operations)

    def _attention(self, window: int) -> AttentionShape:
        sizes = self._sizes
        return AttentionShape(sizes.heads, sizes.kv_heads, sizes.head_dim, 1 / 16, _EPS, window, ring=0)

    def _attention_decode(self, seen: int) -> _Case:
        sizes, shape = self._sizes, self._attention(seen)
        splits = self._kernels.splits(seen)
        queries = sizes.heads * sizes.head_dim
        qkv, norms = self._buffer(4 * sizes.qkv), self._buffer(8 * sizes.head_dim)
        rope = self._buffer(4 * seen * sizes.head_dim)
        nbytes = self._itemsize * seen * sizes.kv_heads * sizes.head_dim
        keys, values = self._buffer(nbytes), self._buffer(nbytes)
        out, stats = self._buffer(4 * splits * queries), self._buffer(8 * splits * sizes.heads)
        state = self._state(seen - 1, 1, rows=seen)
        launch = self._kernels.attention_decode(
            shape, state, qkv, norms, rope, keys, values, out, stats, splits=splits
        )
        return _Case("attention_decode", f"{seen} positions", launch, out, 2 * nbytes, 4 * queries * seen)

    def _attention_prefill(self) -> _Case:
        sizes, n = self._sizes, self._tokens
        shape = self._attention(_LOCAL)
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        queries, out = self._buffer(self._itemsize * n * q), self._buffer(self._itemsize * n * q)
        keys, values = self._buffer(self._itemsize * n * kv), self._buffer(self._itemsize * n * kv)
        caches = self._buffer(self._itemsize * _LOCAL * kv), self._buffer(self._itemsize * _LOCAL * kv)
        state = self._state(0, n, rows=_LOCAL)
        launch = self._kernels.attention_prefill(shape, state, queries, keys, values, *caches, out, max_count=n)
        pairs = sum(min(position, _LOCAL) for position in range(1, n + 1))  # of a query and a key that it sees
        moved = queries.size + keys.size + values.size + out.size
        return _Case("attention_prefill", f"{n} tokens", launch, out, moved, 4 * q * pairs)

    def _rms_norm(self) -> _Case:
        size, n = self._sizes.hidden, self._tokens
        residual, y = self._buffer(4 * n * size), self._buffer(4 * n * size)
        norms, out = self._buffer(8 * size), self._buffer(self._itemsize * n * size)
        launch = self._kernels.rms_norm(
            self._state(0, n), residual, y, norms, out, size=size, eps=_EPS, add=True, max_count=n
        )
        moved = 2 * residual.size + y.size + norms.size + out.size
        return _Case("rms_norm", f"{n}×{size}", launch, out, moved, 8 * n * size)
