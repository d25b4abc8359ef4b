"""An encoder's step: what the forward pass of a tower that reads images is written on.

All of an image's patches go through the layers at once, and nothing is kept. Activations that meet a matrix or an
attention are float16 in F16 mode, and the residual stream is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.gpu.device import Buffer, Device
from gemma_wgpu.ops.kernels import AttentionShape, Kernels, Sight
from gemma_wgpu.ops.launch import Launch, Operand, Value
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm, Norms

# GELU's result can pass the range of float16 before the matrix that follows; this power of two keeps it inside.
_GELU_SCALE = 2.0**-6


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A LayerNorm: (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias.

    `norm` has float32 (2, size): weight and bias.
    """

    norm: Buffer
    size: int
    eps: float


class Added:
    """A vector for each token plus another one. The norm that follows adds them up, in the place of the first."""

    def __init__(self, x: Value, y: Operand) -> None:
        self.x, self.y = x, y
        self.computed = False


class EncoderStep:
    """Writes the launches of an encoder's forward pass down, for `count` patches of `size` numbers.

    `patches` is what the pass begins with: (count, size, rounded up to a multiple of 32), half. `pauses` are the
    numbers of launches after which the host may look up.
    """

    def __init__(self, device: Device, kernels: Kernels, norms: Norms, count: int = 0, size: int = 0) -> None:
        self.launches: list[Launch] = []
        self.pauses: list[int] = []
        self._device, self.kernels, self._norms = device, kernels, norms
        self._states: dict[tuple[int, int], Buffer] = {}
        self.patches = self.activation("patches", count, -(-size // BLOCK) * BLOCK)

    def close(self) -> None:
        """Free what the launches share."""
        for state in self._states.values():
            state.destroy()

    def linear(self, matrix: Linear, x: Value) -> Value:
        """Return W x + bias, float32 (count, rows). `x` is half or float32."""
        out = Value("encoded", x.rows, matrix.rows)
        for part in matrix.parts:
            self.launch(
                self.kernels.matmul(
                    part,
                    self.state(x.rows),
                    x,
                    out,
                    stride=matrix.rows,
                    scale=matrix.scale / x.scale,
                    bias=matrix.bias,
                    max_count=x.rows,
                    half=x.itemsize == 2,
                )
            )
        return out

    def add(self, x: Value | Added, y: Operand) -> Added:
        """Return x + y, float32. Nothing may use `x` afterwards: the sum takes its place."""
        if isinstance(x, Added):
            if not x.computed:
                raise NotImplementedError("a sum cannot be added to before a norm has used it")
            x = x.x
        return Added(x, y)

    def layer_norm(self, x: Added, norm: LayerNorm, *, half: bool = True) -> Value:
        """Return the LayerNorm of `x`. It is float32 in F16 mode too unless `half`."""
        residual, half = x.x, half and self.kernels.half
        out = Value("normed", residual.rows, norm.size, 2 if half else 4)
        self.launch(
            self.kernels.layer_norm(
                self.state(residual.rows),
                residual,
                x.y,
                norm.norm,
                out,
                size=norm.size,
                eps=norm.eps,
                add=not x.computed,
                max_count=residual.rows,
                half=half,
            )
        )
        x.computed = True
        return out

    def rms_norm(self, x: Operand, norm: Norm, *, rows: int | None = None, half: bool = True) -> Value:
        """Return the RMSNorm of `x`. It is float32 in F16 mode too unless `half`; `rows` are those of a buffer."""
        kernels, size, half = self.kernels, len(norm.weight), half and self.kernels.half
        count = x.rows if isinstance(x, Value) else rows
        assert count is not None
        out = Value("normed", count, size, 2 if half else 4)
        self.launch(
            kernels.rms_norm(
                self.state(count),
                x,
                kernels.unread,
                self._norms.pair(None, norm),
                out,
                size=size,
                eps=norm.eps,
                add=False,
                max_count=count,
                half=half,
            )
        )
        return out

    def gelu(self, x: Value) -> Value:
        """Return gelu(x), with zeros up to whole blocks of 32."""
        out = self.activation("gelu", x.rows, -(-x.size // BLOCK) * BLOCK, _GELU_SCALE)
        self.launch(self.kernels.gelu(self.state(x.rows), x, out, size=x.size, scale=out.scale, max_count=x.rows))
        return out

    def attention(self, qkv: Value, heads: int, *, scale: float) -> Value:
        """Let every token attend to all: softmax(scale q k) v of each head, (count, heads * head_dim).

        `qkv` has the tokens' queries, keys and values one after the other.
        """
        count, size = qkv.rows, qkv.size // 3
        state = self.state(count)
        queries, keys, values = (self.activation(label, count, size) for label in ("queries", "keys", "values"))
        self.launch(
            self.kernels.split_heads(state, qkv, queries, keys, values, size=size, scale=scale, max_count=count)
        )
        out = self.activation("attended", count, size)
        shape = AttentionShape(heads, heads, size // heads, scale, 0.0, window=count, ring=0)
        cache = self.kernels.unread
        self.launch(
            self.kernels.attention_prefill(
                shape, state, queries, keys, values, cache, cache, out, max_count=count, sight=Sight.ALL
            )
        )
        return out

    def average_pool(self, x: Value, window: int) -> Value:
        """Average over squares of `window` x `window` tokens of a square grid: float32 (count / window^2, n)."""
        side = round(x.rows**0.5)
        out = Value("pooled", (side // window) ** 2, x.size)
        self.launch(self.kernels.average_pool(x, out, size=x.size, side=side, window=window))
        return out

    def launch(self, *launches: Launch) -> None:
        """Write launches down."""
        self.launches += launches

    def pause(self) -> None:
        """Let the host look up here: it shows progress, and may stop."""
        self.pauses.append(len(self.launches))

    def activation(self, label: str, rows: int, size: int, scale: float = 1.0) -> Value:
        """Return a new value, (rows, size), half; it is `scale` times what it stands for."""
        return Value(label, rows, size, 2 if self.kernels.half else 4, scale)

    def weights(self, norm: Norm) -> Buffer:
        """Return a norm's weights on the GPU: the first n of float32 (2, n)."""
        return self._norms.pair(norm, None)

    def norms(self, first: Norm | None, second: Norm | None) -> Buffer:
        """Return the weights of two norms on the GPU, float32 (2, n); those of None are zeros."""
        return self._norms.pair(first, second)

    def state(self, count: int, first: int = 0) -> Buffer:
        """Return the struct State of shaders/state.wgsl for `count` tokens from `first` on, in no ring."""
        if (count, first) not in self._states:
            words = np.array([first, count, 0, 0, 0, 1, 0, 1], np.uint32)
            self._states[count, first] = self._device.upload(words, "state of an encoder")
        return self._states[count, first]
