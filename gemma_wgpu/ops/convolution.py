"""Images of many channels: convolutions, norms of pixels, and an attention in which all heads share keys and values.

An image is a square, row by row, with the channels of a pixel side by side: (side * side, channels). The blocks are
those of MobileNetV4 (arXiv 2404.10518). What is large is made in bands of rows, so that its memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm

BAND_BYTES = 32 << 20

# A norm over channels is at most sqrt(channels) times its weight, and what no norm bounds can be larger. This power
# of two keeps them inside float16, and the kernels that follow take it back.
_SCALE = 2.0**-6


@dataclass(frozen=True, eq=False)
class Convolution:
    """A full convolution with a square kernel: `matrix` is (channels made, channels * kernel^2), as files have it."""

    matrix: Linear
    kernel: int
    stride: int


@dataclass(frozen=True, eq=False)
class Depthwise:
    """A convolution of each channel by itself: `weight` is float32 (kernel^2, channels)."""

    weight: Operand
    kernel: int
    stride: int


@dataclass(frozen=True)
class Image:
    """What the blocks pass on: float32 (side^2, channels), and the same as matrices read it, half.

    In F32 mode both are one.
    """

    x: Value
    half: Value

    @property
    def side(self) -> int:
        """Return the rows of the image."""
        return math.isqrt(self.x.rows)


@dataclass(frozen=True)
class Band:
    """Pixels `first` to `first + count - 1` of an image: whole rows."""

    first: int
    count: int


def bands(side: int, pixel_bytes: int) -> Iterator[Band]:
    """Yield the bands of an image, as equal as they can be, of at most BAND_BYTES where a row allows it."""
    rows = max(BAND_BYTES // (side * pixel_bytes), 1)
    rows = -(-side // -(-side // rows))
    for row in range(0, side, rows):
        yield Band(row * side, min(rows, side - row) * side)


def image(step: EncoderStep, side: int, channels: int) -> Image:
    """Return an image that `end` is to fill."""
    x = Value("image", side**2, channels)
    return Image(x, activated(step, side**2, channels) if step.kernels.half else x)


def activated(step: EncoderStep, pixels: int, channels: int) -> Value:
    """Return the place of what a matrix is to read, half."""
    return step.activation("activated", pixels, channels, _SCALE if step.kernels.half else 1.0)


def convolve(step: EncoderStep, convolution: Convolution, x: Value, band: Band) -> Value:
    """Return a band of a convolution's result, float32 (count, channels made); `x` is half."""
    columns = -(-(convolution.kernel**2) * x.size // BLOCK) * BLOCK
    patches = step.activation("patches", band.count, columns, x.scale)
    step.launch(
        step.kernels.gather_patches(
            step.state(band.count, band.first),
            x,
            patches,
            channels=x.size,
            side=math.isqrt(x.rows),
            kernel=convolution.kernel,
            stride=convolution.stride,
            max_count=band.count,
        )
    )
    return step.linear(convolution.matrix, patches)


def depthwise(step: EncoderStep, convolution: Depthwise, x: Value, band: Band | None = None) -> Value:
    """Return a convolution's result or a band of it, float32 (count, channels); `x` is half or float32."""
    side = math.isqrt(x.rows)
    band = band or Band(0, (-(-side // convolution.stride)) ** 2)
    out = Value("convolved", band.count, x.size)
    step.launch(
        step.kernels.depthwise(
            step.state(band.count, band.first),
            x,
            convolution.weight,
            out,
            channels=x.size,
            side=side,
            kernel=convolution.kernel,
            stride=convolution.stride,
            scale=1 / x.scale,
            max_count=band.count,
            half=x.itemsize == 2,
        )
    )
    return out


def norm(
    step: EncoderStep, x: Value, norm: Norm, *, gelu: bool = False, out: Value | None = None, band: Band | None = None
) -> Value:
    """Return the RMSNorm of each pixel, or its GELU, half. If `x` is a band, `out` has all pixels."""
    band = band or Band(0, x.rows)
    out = out or activated(step, x.rows, x.size)
    step.launch(
        step.kernels.pixel_norm(
            step.state(band.count, band.first),
            x,
            step.weights(norm),
            out,
            size=x.size,
            eps=norm.eps,
            gelu=gelu,
            scale=out.scale,
            max_count=band.count,
            half=step.kernels.half,
        )
    )
    return out


def end(
    step: EncoderStep,
    y: Value,
    norm: Norm,
    out: Image,
    *,
    residual: Image | None,
    normed: bool = True,
    band: Band | None = None,
) -> None:
    """Write the residual, if there is one, plus the norm of `y` into `out`, or into a band of it if `y` is one.

    If not `normed`, `y` is only multiplied by the norm's weight.
    """
    band = band or Band(0, y.rows)
    step.launch(
        step.kernels.block_end(
            step.state(band.count, band.first),
            y,
            step.weights(norm),
            residual.x if residual else None,
            out.x,
            out.half if step.kernels.half else None,
            size=y.size,
            eps=norm.eps if normed else None,
            scale=out.half.scale,
            max_count=band.count,
        )
    )


def attention(step: EncoderStep, queries: Value, keys: Value, values: Value, *, scale: float) -> Value:
    """Let heads that share their keys and values attend (arXiv 1911.02150): softmax(scale q k) v, float32.

    `queries` and the result are (count, heads * head_dim); `keys` and `values` are float32 (seen, head_dim). Each
    head of each query is a row of one product with the keys, and of another one with the values.
    """
    kernels, head_dim, seen = step.kernels, keys.size, keys.rows
    rows = queries.size // head_dim * queries.rows
    state, padded = step.state(rows), -(-seen // BLOCK) * BLOCK
    scores, shares = Value("scores", rows, seen), step.activation("shares", rows, padded)
    columns, out = step.activation("columns", head_dim, padded), Value("attended", queries.rows, queries.size)
    step.launch(
        kernels.products(
            state, keys, queries, scores, rows=seen, cols=head_dim, scale=scale, max_count=rows, half=False
        ),
        kernels.softmax(state, scores, shares, size=seen, max_count=rows),
        kernels.transpose(step.state(seen), values, columns, size=head_dim, count=seen),
        kernels.products(state, columns, shares, out, rows=head_dim, cols=padded, max_count=rows, half=kernels.half),
    )
    return out


def join(step: EncoderStep, fine: Image, coarse: Image) -> Value:
    """Return the channels of a fine image and, behind them, those of a coarse one, enlarged, half."""
    out = step.activation("joined", fine.x.rows, fine.x.size + coarse.x.size, fine.half.scale)
    step.launch(
        step.kernels.join_scales(
            fine.half, coarse.half, out, sizes=(fine.x.size, coarse.x.size), sides=(fine.side, coarse.side)
        )
    )
    return out
