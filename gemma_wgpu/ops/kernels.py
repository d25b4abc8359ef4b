"""One thin function for each shader: it chooses the constants, names the operands and counts the workgroups.

What a kernel computes, and how its buffers are laid out, stands at the top of its file under shaders/. What is called
`half` there is float16 in F16 mode and float32 in F32 mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from gemma_wgpu.gpu.device import Buffer, Constants, Device
from gemma_wgpu.ops.launch import Launch, Operand
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.ops.linear import Part
from gemma_wgpu.ops.tuning import Tuning, usual_tuning

VOCABULARY_PART = 1024  # tokens that a workgroup of logits_scan sums up
QUERY_ROWS = 16  # query heads times tokens in a workgroup of attention_prefill
READ_STEP = 4096  # bytes that a workgroup of read takes at once
STATE_WORDS = 8  # of the struct State of shaders/state.wgsl
SUMMARY_BYTES = 16  # of the struct Summary of shaders/sampling.wgsl
# By the encodings of GGUF files that import_blocks takes: whole words of their blocks, in bytes, and how many threads
# import these.
IMPORTED = {
    "Q4_0": (36, 1),
    "Q4_1": (20, 1),
    "Q5_0": (44, 1),
    "Q8_0": (68, 1),
    "Q4_K": (144, 4),
    "Q6_K": (420, 8),
}
_REDUCE = 64  # threads of the kernels that sum over a workgroup
_NEIGHBOURS = 8  # queries in a workgroup of relative_attention
_ALTUP_FLOOR = 1e-5  # of the mean square of a stream that is made as long as another one


class Sight(IntEnum):
    """Which tokens after itself a token of a chunk sees: none, those up to its `reach`, or all."""

    CAUSAL = 0
    REACH = 1
    ALL = 2


@dataclass(frozen=True)
class AttentionShape:
    """The shape of an attention.

    Its heads, the window that a query sees, itself included, the ring it lies in, whether values are normed, and
    whether its keys and values are another layer's.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    window: int
    ring: int
    value_norm: bool = False
    shared: bool = False


def ceil_div(a: int, b: int) -> int:
    """Return the quotient, rounded up."""
    return -(-a // b)


class Kernels:
    """The shaders on one device in one precision, in the usual tuning or another one.

    `max_count` is the number of tokens that a launch is made for, which belong to one sequence. Or a launch is for
    one token of each of so many `sequences`; then `stride` is the length of a row of logits.
    """

    def __init__(self, device: Device, *, half: bool, tuning: Tuning | None = None) -> None:
        self.half = half
        self.tuning = tuning or usual_tuning(device.info, device.features)
        # These stand in for operands that a variant of a kernel does not touch.
        self.unread = device.buffer(16, "unread")
        self.unwritten = device.buffer(16, "unwritten")
        self._device = device
        self._numbers: dict[int, Buffer] = {}
        self._most_workgroups = device.limits.max_compute_workgroups_per_dimension

    @property
    def nbytes(self) -> int:
        """Return the bytes of what stands in for operands, and of numbers."""
        return self.unread.size + self.unwritten.size + sum(number.size for number in self._numbers.values())

    def close(self) -> None:
        """Free what stands in for operands, and numbers. Idempotent."""
        for buffer in (self.unread, self.unwritten, *self._numbers.values()):
            buffer.destroy()

    def number(self, value: int) -> Buffer:
        """Return a buffer with a number, u32, for what a kernel is not to be compiled again for."""
        if value not in self._numbers:
            self._numbers[value] = self._device.upload(np.array([value], np.uint32), "number")
        return self._numbers[value]

    def splits(self, window: int) -> int:
        """Return into how many shares decode divides the positions of a layer that sees `window` of them."""
        if window <= 512:
            return 1
        return 4 if self.tuning.on_cpu else 16

    def _launch(
        self,
        shader: str,
        constants: Constants,
        operands: tuple[Operand, ...],
        *workgroups: int,
        half: bool | None = None,
    ) -> Launch:
        x, y, z = (*workgroups, 1, 1)[:3]
        half = self.half if half is None else half
        return Launch(shader, constants, operands, (x, y, z), half, self.tuning.cpu)

    def _spread(self, workgroups: int) -> tuple[int, int]:
        """Return a grid of at least so many workgroups, inside the limit of a dimension."""
        y = ceil_div(workgroups, self._most_workgroups)
        return ceil_div(workgroups, y), y

    def _rows_grid(self, rows: int) -> tuple[int, int]:
        return self._spread(ceil_div(rows, 2 * (_REDUCE // self.tuning.lanes)))

    def _teams(self) -> dict[str, int]:
        return {"WORKGROUP_SIZE": _REDUCE, "LANES": self.tuning.lanes}

    def embed(
        self,
        part: Part,
        state: Operand,
        tokens: Operand,
        residual: Operand,
        *,
        scale: float,
        vocabulary: int,
        max_count: int = 1,
        sequences: int = 1,
        by_slot: bool = False,
    ) -> Launch:
        """Look up the tokens whose embeddings lie in `part`: those of a chunk, or the last ones of sequences.

        A token of `vocabulary` or above is looked up as token 0.
        """
        constants = _weights(part) | {"SCALE": scale, "BY_SLOT": by_slot, "VOCABULARY": vocabulary}
        operands = (part.quants, part.scales, state, tokens, residual)
        return self._launch("embed", constants, operands, ceil_div(part.cols // 32, 32), max_count, sequences)

    def rms_norm(
        self,
        state: Operand,
        residual: Operand,
        y: Operand,
        norms: Operand,
        out: Operand,
        *,
        size: int,
        eps: float,
        add: bool,
        plain: bool = False,
        scaled: bool = False,
        max_count: int,
        last: bool = False,
        half: bool | None = None,
    ) -> Launch:
        """Norm the residual, after adding the norm of `y` to it if `add`; of the `last` token only, or of all.

        If `plain`, `y` is added as it is. The sum is `scaled` by what stands behind `norms`. `half` says what `out`
        holds, if not what the precision says.
        """
        constants = {"WORKGROUP_SIZE": _REDUCE, "K": size, "EPS": eps, "ADD": add, "SCALED": scaled, "LAST": last}
        constants |= {"PLAIN": plain}
        return self._launch("rms_norm", constants, (state, residual, y, norms, out), max_count, half=half)

    def matvec(self, part: Part, x: Operand, y: Operand) -> Launch:
        """Multiply a part of a matrix by a vector."""
        constants = _weights(part) | self._teams()
        return self._launch("matvec", constants, (part.quants, part.scales, x, y), *self._rows_grid(part.rows))

    def norm_matvec(
        self,
        part: Part,
        residual: Operand,
        previous: Operand,
        norms: Operand,
        new_residual: Operand,
        y: Operand,
        *,
        eps: float,
        add: bool,
        scaled: bool = False,
        normed: bool = True,
        geglu: bool = False,
    ) -> Launch:
        """Multiply a part of a matrix by the norm of the residual, after adding the norm of `previous` if `add`.

        The sum is `scaled` by what stands behind `norms`. If not `normed`, the matrix is multiplied by the sum.
        """
        rows = part.rows // 2 if geglu else part.rows
        workgroups = ceil_div(part.rows, 2 * (_REDUCE // self.tuning.lanes))
        # There are workgroups enough to keep the GPU busy, and no more, since each computes the norm.
        rounds = min(max(workgroups // (8 if self.tuning.on_cpu else 256), 1), 4)
        constants = _weights(part) | self._teams()
        constants |= {"ROUNDS": rounds, "ROWS": rows, "EPS": eps, "ADD": add, "GEGLU": geglu}
        constants |= {"SCALED": scaled, "NORMED": normed}
        operands = (part.quants, part.scales, residual, previous, norms, new_residual, y)
        return self._launch("norm_matvec", constants, operands, *self._spread(ceil_div(workgroups, rounds)))

    def matvecs(self, part: Part, state: Operand, x: Operand, y: Operand, *, stride: int, max_count: int) -> Launch:
        """Multiply a part of a matrix by a few float32 vectors; `stride` is the length of a row of `y`."""
        if self.tuning.cpu:  # `matmul` is made for few tokens there
            return self.matmul(part, state, x, y, stride=stride, max_count=max_count, half=False)
        vectors = min(max_count, 8)
        constants = _weights(part) | self._teams() | {"STRIDE": stride, "VECTORS": vectors}
        grid = *self._rows_grid(part.rows), ceil_div(max_count, vectors)
        return self._launch("matvecs", constants, (part.quants, part.scales, state, x, y), *grid)

    def matmul(
        self,
        part: Part,
        state: Operand,
        x: Operand,
        y: Operand,
        *,
        stride: int,
        scale: float = 1.0,
        bias: Operand | None = None,
        max_count: int,
        half: bool | None = None,
    ) -> Launch:
        """Multiply a part of a matrix by the vectors of the tokens; `stride` is the length of a row of `y`.

        `half` says what `x` holds, if not what the precision says.
        """
        tokens = min(1 << (max_count - 1).bit_length(), 8) if self.tuning.cpu else 32  # of a tile
        constants = _weights(part) | {"TOKENS": tokens, "STRIDE": stride, "SCALE": scale, "BIAS": bias is not None}
        operands = (part.quants, part.scales, state, x, bias or self.unread, y)
        grid = ceil_div(part.rows, 64), ceil_div(max_count, tokens)
        return self._launch("matmul", constants, operands, *grid, half=half)

    def products(
        self,
        state: Operand,
        w: Operand,
        x: Operand,
        y: Operand,
        *,
        rows: int,
        cols: int,
        scale: float = 1.0,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Do what `matmul` does with a matrix (rows, cols) that a step has computed, of whole blocks of columns.

        `half` says what it and `x` hold.
        """
        tokens = min(1 << (max_count - 1).bit_length(), 8) if self.tuning.cpu else 32  # of a tile
        layout = Layout.F16 if half else Layout.F32
        constants: dict[str, int | float | bool] = {"LAYOUT": int(layout), "K": cols, "FIRST_ROW": 0, "ROWS": rows}
        constants |= {"TOKENS": tokens, "STRIDE": rows, "SCALE": scale, "BIAS": False}
        operands = (w, self.unread, state, x, self.unread, y)
        return self._launch("matmul", constants, operands, ceil_div(rows, 64), ceil_div(max_count, tokens), half=half)

    def quantize(
        self, state: Operand, x: Operand, q: Operand, factors: Operand, *, size: int, max_count: int
    ) -> Launch:
        """Round the vectors of the tokens to 8-bit integers, for `matmul_int8`."""
        grid = ceil_div(size // 32, 64), max_count
        return self._launch("quantize", {"K": size}, (state, x, q, factors), *grid)

    def matmul_int8(
        self,
        part: Part,
        state: Operand,
        q: Operand,
        factors: Operand,
        y: Operand,
        *,
        stride: int,
        scale: float = 1.0,
        max_count: int,
    ) -> Launch:
        """Do what `matmul` does, in a layout of integers, with the vectors that `quantize` made."""
        rows, tokens = (128, 8) if self.tuning.cpu else (64, 32)  # of a tile
        constants = _weights(part) | {"TOKENS": tokens, "STRIDE": stride, "SCALE": scale}
        operands = (part.quants, part.scales, state, q, factors, y)
        grid = ceil_div(part.rows, rows), ceil_div(max_count, tokens)
        return self._launch("matmul_int8", constants, operands, *grid)

    def geglu(
        self, state: Operand, gate_up: Operand, out: Operand, *, size: int, scale: float, max_count: int, half: bool
    ) -> Launch:
        """Multiply the GELU of the gate by up; `half` says what `out` holds."""
        grid = ceil_div(size // 4, 64), max_count
        return self._launch("geglu", {"SIZE": size, "SCALE": scale}, (state, gate_up, out), *grid, half=half)

    def sparse_geglu(
        self,
        state: Operand,
        gate_up: Operand,
        out: Operand,
        *,
        size: int,
        cut: float,
        scale: float,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Do what `geglu` does, for the gates that are more than `cut` standard deviations above their mean."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "SIZE": size, "CUT": cut, "SCALE": scale}
        return self._launch("sparse_geglu", constants, (state, gate_up, out), max_count, half=half)

    def per_layer_inputs(
        self,
        state: Operand,
        context: Operand,
        rows: Operand,
        weight: Operand,
        out: Operand,
        *,
        layers: int,
        size: int,
        scale: float,
        eps: float,
        max_count: int,
    ) -> Launch:
        """Add the norms of `context` to `scale` times `rows`; both have `size` numbers for each of some `layers`."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "LAYERS": layers, "SIZE": size, "SCALE": scale, "EPS": eps}
        return self._launch("per_layer_inputs", constants, (state, context, rows, weight, out), layers, max_count)

    def last_row(self, state: Operand, x: Operand, out: Operand, *, size: int) -> Launch:
        """Copy the vector of a chunk's last token, of `size` numbers."""
        return self._launch("last_row", {"SIZE": size}, (state, x, out), ceil_div(size, 4 * _REDUCE))

    def gated_input(
        self,
        state: Operand,
        gate: Operand,
        inputs: Operand,
        layer: Operand,
        out: Operand,
        *,
        layers: int,
        size: int,
        scale: float,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Multiply a layer's inputs by the GELU of its gate; `half` says what `out` holds."""
        constants = {"SIZE": size, "LAYERS": layers, "SCALE": scale}
        grid = ceil_div(size // 4, 64), max_count
        return self._launch("gated_input", constants, (state, gate, inputs, layer, out), *grid, half=half)

    def softcap(self, state: Operand, logits: Operand, *, size: int, cap: float, max_count: int) -> Launch:
        """Keep logits inside of [-cap, cap]."""
        constants = {"SIZE": size, "CAP": cap}
        return self._launch("softcap", constants, (state, logits), ceil_div(size, 64), max_count, half=False)

    def altup_begin(
        self, state: Operand, x: Operand, y: Operand, streams: Operand, *, size: int, max_count: int
    ) -> Launch:
        """Begin the streams with `x` and three projections of it."""
        return self._altup("altup_begin", (state, x, y, streams), size, max_count, FLOOR=_ALTUP_FLOOR)

    def altup_predict(
        self,
        state: Operand,
        streams: Operand,
        y: Operand,
        post_weight: Operand,
        router: Operand,
        coefficients: Operand,
        predicted: Operand,
        active: Operand,
        *,
        size: int,
        eps: float,
        add: bool,
        max_count: int,
    ) -> Launch:
        """Predict the streams, after adding the norm of `y` to all but the first if `add`."""
        operands = (state, streams, y, post_weight, router, coefficients, predicted, active)
        return self._altup("altup_predict", operands, size, max_count, EPS=eps, ADD=add)

    def altup_correct(
        self,
        state: Operand,
        residual: Operand,
        y: Operand,
        weights: Operand,
        router: Operand,
        coefficients: Operand,
        streams: Operand,
        first: Operand,
        *,
        size: int,
        eps: float,
        max_count: int,
    ) -> Launch:
        """Correct the predicted `streams` by the layer's output, which is the residual and the norm of `y`."""
        operands = (state, residual, y, weights, router, coefficients, streams, first)
        return self._altup("altup_correct", operands, size, max_count, EPS=eps)

    def altup_split(
        self,
        state: Operand,
        streams: Operand,
        y: Operand,
        weight: Operand,
        outs: Sequence[Operand],
        *,
        size: int,
        eps: float,
        max_count: int,
    ) -> Launch:
        """Take the streams apart, and add the norm of `y` to all but the first."""
        return self._altup("altup_split", (state, streams, y, weight, *outs), size, max_count, EPS=eps)

    def altup_end(
        self, state: Operand, x: Operand, ys: Sequence[Operand], out: Operand, *, size: int, max_count: int
    ) -> Launch:
        """Take the mean of the first stream and the projections of the others."""
        return self._altup("altup_end", (state, x, *ys, out), size, max_count, FLOOR=_ALTUP_FLOOR)

    def laurel(
        self,
        state: Operand,
        residual: Operand,
        y: Operand,
        normed: Operand,
        low: Operand,
        norms: Operand,
        out: Operand,
        *,
        size: int,
        eps: float,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Add an attention's and LAuReL's results to the residual; `half` says what `normed` holds."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "K": size, "EPS": eps}
        operands = (state, residual, y, normed, low, norms, out)
        return self._launch("laurel", constants, operands, max_count, half=half)

    def _altup(
        self, shader: str, operands: tuple[Operand, ...], size: int, max_count: int, **constants: float | bool
    ) -> Launch:
        common = {"WORKGROUP_SIZE": _REDUCE, "K": size}
        return self._launch(shader, common | constants, operands, max_count, half=False)

    def gelu(self, state: Operand, x: Operand, out: Operand, *, size: int, scale: float, max_count: int) -> Launch:
        """Take the GELU of vectors of `size` numbers, and fill them up with zeros to whole blocks of 32."""
        stride = ceil_div(size, 32) * 32
        grid = ceil_div(stride // 4, 64), max_count
        return self._launch("gelu", {"SIZE": size, "STRIDE": stride, "SCALE": scale}, (state, x, out), *grid)

    def layer_norm(
        self,
        state: Operand,
        residual: Operand,
        y: Operand,
        norm: Operand,
        out: Operand,
        *,
        size: int,
        eps: float,
        add: bool,
        max_count: int,
        half: bool | None = None,
    ) -> Launch:
        """Norm the residual, after adding `y` to it if `add`; `half` as in `rms_norm`."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "K": size, "EPS": eps, "ADD": add}
        return self._launch("layer_norm", constants, (state, residual, y, norm, out), max_count, half=half)

    def split_heads(
        self,
        state: Operand,
        qkv: Operand,
        queries: Operand,
        keys: Operand,
        values: Operand,
        *,
        size: int,
        scale: float,
        max_count: int,
    ) -> Launch:
        """Take queries, keys and values of `size` numbers each apart, and scale the queries."""
        grid = ceil_div(size // 4, 64), max_count
        return self._launch("split_heads", {"SIZE": size, "SCALE": scale}, (state, qkv, queries, keys, values), *grid)

    def average_pool(self, x: Operand, out: Operand, *, size: int, side: int, window: int) -> Launch:
        """Average vectors of `size` numbers over squares of `window` x `window` of a grid of `side` x `side`."""
        constants = {"K": size, "SIDE": side, "WINDOW": window}
        return self._launch(
            "average_pool", constants, (x, out), ceil_div(size // 4, 64), (side // window) ** 2, half=False
        )

    def gather_patches(
        self,
        state: Operand,
        x: Operand,
        out: Operand,
        *,
        channels: int,
        side: int,
        kernel: int,
        stride: int,
        max_count: int,
    ) -> Launch:
        """Lay down side by side what a convolution with a square kernel sees of each pixel of an image.

        The image has `side` x `side` pixels, and is padded as TensorFlow's "same" does.
        """
        columns = ceil_div(kernel**2 * channels, 32) * 32
        constants = {"CHANNELS": channels, "STRIDE_OUT": columns} | _window(side, kernel, stride)
        return self._launch("gather_patches", constants, (state, x, out), ceil_div(columns // 4, 64), max_count)

    def depthwise(
        self,
        state: Operand,
        x: Operand,
        weight: Operand,
        out: Operand,
        *,
        channels: int,
        side: int,
        kernel: int,
        stride: int,
        scale: float,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Convolve each channel of an image by itself, padded as in `gather_patches`; `half` says what `x` holds."""
        constants = {"CHANNELS": channels, "SCALE": scale} | _window(side, kernel, stride)
        grid = ceil_div(channels // 4, 64), max_count
        return self._launch("depthwise", constants, (state, x, weight, out), *grid, half=half)

    def pixel_norm(
        self,
        state: Operand,
        x: Operand,
        norm: Operand,
        out: Operand,
        *,
        size: int,
        eps: float,
        gelu: bool,
        scale: float,
        max_count: int,
        half: bool,
    ) -> Launch:
        """Norm pixels of `size` channels, and take the GELU of that if `gelu`; `half` says what `out` holds."""
        constants, grid = self._pixels(size, max_count)
        constants |= {"K": size, "EPS": eps, "GELU": gelu, "SCALE": scale}
        return self._launch("pixel_norm", constants, (state, x, norm, out), *grid, half=half)

    def block_end(
        self,
        state: Operand,
        y: Operand,
        norm: Operand,
        residual: Operand | None,
        out: Operand,
        copy: Operand | None,
        *,
        size: int,
        eps: float | None,
        scale: float,
        max_count: int,
    ) -> Launch:
        """Scale what a block made of pixels of `size` channels, after norming it unless `eps` is None.

        It is added to the `residual` if there is one, and `copy`, if there is one, is `scale` times the sum, half.
        """
        constants, grid = self._pixels(size, max_count)
        constants |= {"K": size, "EPS": eps or 0.0, "NORMED": eps is not None, "ADD": residual is not None}
        constants |= {"COPY": copy is not None, "SCALE": scale}
        operands = (state, y, norm, residual or self.unread, out, copy or self.unwritten)
        return self._launch("block_end", constants, operands, *grid)

    def softmax(self, state: Operand, x: Operand, out: Operand, *, size: int, max_count: int) -> Launch:
        """Take the softmax of rows of `size` numbers, and fill them up with zeros to whole blocks of 32."""
        constants, grid = self._pixels(size, max_count)
        constants |= {"K": size, "STRIDE": ceil_div(size, 32) * 32}
        return self._launch("softmax", constants, (state, x, out), *grid)

    def transpose(self, state: Operand, x: Operand, out: Operand, *, size: int, count: int) -> Launch:
        """Make rows of the columns of (count, size), and fill them up with zeros to whole blocks of 32."""
        stride = ceil_div(count, 32) * 32
        grid = ceil_div(stride // 4, 64), size
        return self._launch("transpose", {"SIZE": size, "STRIDE": stride}, (state, x, out), *grid)

    def join_scales(
        self,
        fine: Operand,
        coarse: Operand,
        out: Operand,
        *,
        sizes: tuple[int, int],
        sides: tuple[int, int],
    ) -> Launch:
        """Put the channels of a coarse image, enlarged, behind those of a fine one, whose sizes come first."""
        constants = {"FINE": sizes[0], "COARSE": sizes[1], "SIDE": sides[0], "COARSE_SIDE": sides[1]}
        return self._launch(
            "join_scales", constants, (fine, coarse, out), ceil_div(sum(sizes) // 4, 64), sides[0] ** 2
        )

    def _pixels(self, size: int, count: int) -> tuple[dict[str, int | float | bool], tuple[int, int]]:
        """Return the threads that work on `count` pixels of `size` channels, and a grid of workgroups for them."""
        lanes = 1 if self.tuning.on_cpu else 16 if size < 512 else 64
        return {"WORKGROUP_SIZE": _REDUCE, "LANES": lanes}, self._spread(ceil_div(count, _REDUCE // lanes))

    def qk_norm_rope(
        self,
        shape: AttentionShape,
        state: Operand,
        qkv: Operand,
        norms: Operand,
        rope: Operand,
        queries: Operand,
        keys: Operand,
        values: Operand,
        *,
        max_count: int,
    ) -> Launch:
        """Norm and rotate queries and keys, and take them and the values apart."""
        constants = _heads(shape) | _norms(shape)
        operands = (state, qkv, norms, rope, queries, keys, values)
        heads = shape.heads if shape.shared else shape.heads + 2 * shape.kv_heads
        return self._launch("qk_norm_rope", constants, operands, heads, max_count)

    def attention_prefill(
        self,
        shape: AttentionShape,
        state: Operand,
        queries: Operand,
        keys: Operand,
        values: Operand,
        key_cache: Operand,
        value_cache: Operand,
        out: Operand,
        *,
        max_count: int,
        sight: Sight = Sight.CAUSAL,
        reach: Operand | None = None,
    ) -> Launch:
        """Let a chunk of tokens attend to the cache and to the chunk.

        `reach`, u32 (max_count,), is the last token of the chunk that each token sees if its `sight` is REACH.
        """
        vectors = shape.head_dim // 4
        threads = ceil_div(vectors, 8) * 8 if self.tuning.on_cpu else 1 << (vectors - 1).bit_length()
        constants = _heads(shape) | {"WINDOW": shape.window, "RING": shape.ring, "SIGHT": int(sight)}
        constants |= {"VECTORS": vectors, "WORKGROUP_SIZE": threads}
        operands = (state, queries, keys, values, key_cache, value_cache, out, reach or self.unread)
        tiles = ceil_div(max_count, QUERY_ROWS // (shape.heads // shape.kv_heads))
        return self._launch("attention_prefill", constants, operands, tiles, shape.kv_heads)

    def subsample(
        self,
        state: Operand,
        x: Operand,
        weight: Operand,
        out: Operand,
        moments: Operand,
        *,
        bands: int,
        channels: tuple[int, int],
        max_count: int,
        half: bool,
    ) -> Launch:
        """Convolve a sound and halve its frames and bands; `channels` are those before and after.

        `half` says what `x` holds.
        """
        constants = {"WORKGROUP_SIZE": _REDUCE, "BANDS": bands, "IN": channels[0], "OUT": channels[1]}
        operands = (state, x, weight, out, moments)
        return self._launch("subsample", constants, operands, ceil_div(max_count, 2), half=half)

    def running_moments(self, state: Operand, moments: Operand, running: Operand, *, size: int, eps: float) -> Launch:
        """Sum up the moments of frames of `size` numbers, each with those before it."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "SIZE": size, "EPS": eps}
        return self._launch("running_moments", constants, (state, moments, running), 1, half=False)

    def cumulative_norm(
        self,
        state: Operand,
        x: Operand,
        running: Operand,
        weight: Operand,
        out: Operand,
        *,
        bands: int,
        channels: int,
        max_count: int,
    ) -> Launch:
        """Norm each frame by what `running_moments` found, and leave out what is below zero."""
        grid = ceil_div(bands * channels // 4, 64), max_count
        constants = {"BANDS": bands, "CHANNELS": channels}
        return self._launch("cumulative_norm", constants, (state, x, running, weight, out), *grid)

    def silu(self, state: Operand, x: Operand, out: Operand, *, size: int, scale: float, max_count: int) -> Launch:
        """Take the SiLU of vectors of `size` numbers."""
        grid = ceil_div(size // 4, 64), max_count
        return self._launch("silu", {"SIZE": size, "SCALE": scale}, (state, x, out), *grid)

    def light_convolution(
        self,
        state: Operand,
        x: Operand,
        weight: Operand,
        norm: Operand,
        out: Operand,
        *,
        size: int,
        taps: int,
        eps: float,
        max_count: int,
    ) -> Launch:
        """Gate vectors of `size` numbers, convolve them over `taps` frames, norm them and take the SiLU."""
        constants = {"WORKGROUP_SIZE": _REDUCE, "K": size, "TAPS": taps, "EPS": eps}
        return self._launch("light_convolution", constants, (state, x, weight, norm, out), max_count)

    def relative_attention(
        self,
        state: Operand,
        qkv: Operand,
        scale: Operand,
        position: Operand,
        out: Operand,
        *,
        heads: int,
        head_dim: int,
        past: int,
        future: int,
        cap: float,
        max_count: int,
    ) -> Launch:
        """Let each token attend to `past` tokens before it, itself and `future` ones after it, by their places."""
        constants = {"PAST": past, "SPAN": past + 1 + future, "CAP": cap, "HEADS": heads, "VECTORS": head_dim // 4}
        constants |= {"WORKGROUP_SIZE": _REDUCE, "QUERIES": _NEIGHBOURS}
        operands = (state, qkv, scale, position, out)
        return self._launch("relative_attention", constants, operands, ceil_div(max_count, _NEIGHBOURS), heads)

    def take_rows(
        self,
        state: Operand,
        x: Operand,
        filler: Operand,
        out: Operand,
        *,
        size: int,
        stride: int = 1,
        row: int = 0,
        rows: int,
    ) -> Launch:
        """Copy each row of `size` numbers whose index is a multiple of `stride`; `rows` are those of `out`.

        Where there are fewer, row number `row` of `filler` stands in.
        """
        constants = {"K": size, "STRIDE": stride, "ROW": row}
        return self._launch(
            "take_rows", constants, (state, x, filler, out), ceil_div(size // 4, 64), rows, half=False
        )

    def cache_write(
        self,
        state: Operand,
        keys: Operand,
        values: Operand,
        key_cache: Operand,
        value_cache: Operand,
        *,
        size: int,
        ring: int,
        max_count: int,
    ) -> Launch:
        """Write a chunk's keys and values, of `size` elements a token, into the cache."""
        constants = {"SIZE": size, "RING": ring}
        operands = (state, keys, values, key_cache, value_cache)
        return self._launch("cache_write", constants, operands, ceil_div(size // 4, 64), max_count)

    def cache_copy(self, copy: Operand, key_cache: Operand, value_cache: Operand, *, size: int, count: int) -> Launch:
        """Copy the keys and values of `count` positions, of `size` elements each, from one ring to another one."""
        grid = self._spread(ceil_div(count * size // 4, 64))
        return self._launch("cache_copy", {"SIZE": size}, (copy, key_cache, value_cache), *grid)

    def attention_decode(
        self,
        shape: AttentionShape,
        state: Operand,
        qkv: Operand,
        norms: Operand,
        rope: Operand,
        key_cache: Operand,
        value_cache: Operand,
        out: Operand,
        stats: Operand,
        *,
        splits: int,
        sequences: int = 1,
    ) -> Launch:
        """Let one token of each sequence attend to the cache, and write its key and value there on the way."""
        constants = _heads(shape) | _norms(shape)
        constants |= {"WINDOW": shape.window, "RING": shape.ring, "SPLITS": splits}
        operands = (state, qkv, norms, rope, key_cache, value_cache, out, stats)
        parts = shape.kv_heads * ceil_div(shape.heads // shape.kv_heads, 4)
        return self._launch("attention_decode", constants, operands, splits, parts, sequences)

    def attention_combine(
        self, shape: AttentionShape, shares: Operand, stats: Operand, out: Operand, *, splits: int, sequences: int = 1
    ) -> Launch:
        """Make one softmax out of the shares that the splits computed."""
        constants = {"HEADS": shape.heads, "SPLITS": splits, "WORKGROUP_SIZE": shape.head_dim // 4}
        return self._launch("attention_combine", constants, (shares, stats, out), shape.heads, sequences)

    def mask(self, mask: Operand, logits: Operand, *, vocab: int, stride: int, sequences: int = 1) -> Launch:
        """Leave only those tokens to be drawn whose bit is set."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "WORKGROUP_SIZE": _REDUCE}
        return self._launch("mask", constants, (mask, logits), ceil_div(vocab, VOCABULARY_PART), sequences)

    def logits_scan(
        self,
        state: Operand,
        sampling: Operand,
        seen: Operand,
        logits: Operand,
        summaries: Operand,
        *,
        vocab: int,
        stride: int,
        sequences: int = 1,
    ) -> Launch:
        """Penalise and temper the logits, and sum up each part of the vocabulary."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "WORKGROUP_SIZE": _REDUCE}
        operands = (state, sampling, seen, logits, summaries)
        return self._launch("logits_scan", constants, operands, ceil_div(vocab, VOCABULARY_PART), sequences)

    def sample(
        self,
        state: Operand,
        sampling: Operand,
        logits: Operand,
        summaries: Operand,
        tokens: Operand,
        seen: Operand,
        *,
        vocab: int,
        stride: int,
        sequences: int = 1,
    ) -> Launch:
        """Choose the next token, keep it as its sequence's last one and advance the state."""
        constants = {"VOCAB": vocab, "PART": VOCABULARY_PART, "STRIDE": stride, "WORKGROUP_SIZE": _REDUCE}
        operands = (state, sampling, logits, summaries, tokens, seen)
        return self._launch("sample", constants, operands, sequences)

    def read(self, words: Buffer, out: Operand, *, workgroups: int) -> Launch:
        """Read all of `words`, of which each workgroup has an equal share, in steps of 4096 bytes."""
        constants = {"SIZE": words.size // (READ_STEP * workgroups)}
        return self._launch("read", constants, (words, out), workgroups, half=False)

    def import_blocks(self, encoding: str, run: Operand, raw: Buffer, part: Part) -> Launch:
        """Make rows of `part` out of blocks of a GGUF file's `encoding`, one of IMPORTED.

        `run` is the struct Run of shaders/import_run.wgsl: which blocks of `part`, u32, and how many. They lie in
        `raw`, and there are no more of them than fit into it.
        """
        nbytes, threads = IMPORTED[encoding]
        grid = self._spread(ceil_div(ceil_div(raw.size, nbytes) * threads, 64))
        operands = (run, raw, part.quants, part.scales)
        return self._launch(f"import_{encoding.lower()}", {}, operands, *grid, half=False)

    def import_quantize(self, source: Layout, run: Operand, raw: Buffer, part: Part, faults: Operand) -> Launch:
        """Round plain floats, in the layout `source`, to rows of `part`, which is INT8 or INT4.

        `run` and `raw` are those of `import_blocks`, with blocks of 32. `faults`, u32, becomes 1 if a weight is not
        finite or too large for float16 scales.
        """
        grid = self._spread(ceil_div(ceil_div(raw.size, 2 * BLOCK * source.bits // 8), 64))
        operands = (run, raw, part.quants, part.scales, faults)
        constants = {"SOURCE": int(source), "LAYOUT": int(part.layout)}
        return self._launch("import_quantize", constants, operands, *grid, half=False)


def _weights(part: Part) -> dict[str, int | float | bool]:
    return {"LAYOUT": int(part.layout), "K": part.cols, "FIRST_ROW": part.first_row, "ROWS": part.rows}


def _window(side: int, kernel: int, stride: int) -> dict[str, int | float | bool]:
    """Return where a convolution looks at: as TensorFlow's "same", which pads the end by one more if it must."""
    out = ceil_div(side, stride)
    pad = max((out - 1) * stride + kernel - side, 0) // 2
    return {"KERNEL": kernel, "STRIDE": stride, "PAD": pad, "SIDE": side, "OUT_SIDE": out}


def _heads(shape: AttentionShape) -> dict[str, int | float | bool]:
    return {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "WORKGROUP_SIZE": shape.head_dim // 4}


def _norms(shape: AttentionShape) -> dict[str, int | float | bool]:
    return {
        "HEAD_DIM": shape.head_dim,
        "EPS": shape.eps,
        "SCALE": shape.scale,
        "VALUE_NORM": shape.value_norm,
        "SHARED": shape.shared,
    }
