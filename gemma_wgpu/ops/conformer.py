"""What reads sounds: convolutions that make a sound shorter, and the parts of a conformer (arXiv 2005.08100).

The forms are those of Gemma 3n's audio encoder, a Universal Speech Model (arXiv 2303.01037). A sound has a frame in
each row. The bands of a frame are side by side, and so are the channels of a band.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.step import Norm

# SiLU's result can pass the range of float16 before the matrix that follows; this power of two keeps it inside.
_SILU_SCALE = 2.0**-6


@dataclass(frozen=True, eq=False)
class Subsampling:
    """A 3 x 3 convolution that halves frames and bands, with a cumulative group norm and a ReLU behind it.

    `weight` is float32 (3, 3, channels before, channels after), for time, band and channels, and `norm` float32
    (channels after). `channels` are these two numbers, and `eps` is added to the variance.
    """

    weight: Operand
    norm: Operand
    channels: tuple[int, int]
    eps: float


@dataclass(frozen=True, eq=False)
class LightConvolution:
    """A convolution over time of each channel by itself, between a gate and an RMSNorm: weight float32 (taps, n)."""

    weight: Operand
    taps: int
    norm: Norm


@dataclass(frozen=True, eq=False)
class RelativeAttention:
    """An attention to the `past` tokens before each token, itself and the `future` ones after it.

    `scale` is float32 (head_dim,), by which queries are multiplied. `position` is float32 (past + 1 + future, heads *
    head_dim): what is added to the keys, by their place, the one furthest back first. Scores stay inside of [-cap,
    cap].
    """

    heads: int
    head_dim: int
    past: int
    future: int
    cap: float
    scale: Operand
    position: Operand


def subsample(step: EncoderStep, sampling: Subsampling, x: Value) -> Value:
    """Return a sound with half the frames and half the bands, both rounded up: half (frames, bands * channels)."""
    kernels, (before, after) = step.kernels, sampling.channels
    bands = x.size // before
    frames, made = -(-x.rows // 2), -(-bands // 2)
    convolved = Value("convolved", frames, made * after)
    moments, running = Value("moments", frames, 2), Value("running moments", frames, 2)
    out = step.activation("subsampled", frames, made * after)
    step.launch(
        kernels.subsample(
            step.state(x.rows),
            x,
            sampling.weight,
            convolved,
            moments,
            bands=bands,
            channels=sampling.channels,
            max_count=x.rows,
            half=x.itemsize == 2,
        ),
        kernels.running_moments(step.state(frames), moments, running, size=made * after, eps=sampling.eps),
        kernels.cumulative_norm(
            step.state(frames),
            convolved,
            running,
            sampling.norm,
            out,
            bands=made,
            channels=after,
            max_count=frames,
        ),
    )
    return out


def add_norm(step: EncoderStep, x: Value, y: Value, post: Norm | None, norm: Norm, *, half: bool = True) -> Value:
    """Add the norm `post` of `y` to `x`, or `y` itself if there is none; return the RMSNorm of the sum.

    The sum takes the place of `x`. The norm is float32 in F16 mode too unless `half`.
    """
    assert post is None or post.eps == norm.eps, "both norms are computed in one kernel"
    half = half and step.kernels.half
    out = Value("normed", x.rows, x.size, 2 if half else 4)
    step.launch(
        step.kernels.rms_norm(
            step.state(x.rows),
            x,
            y,
            step.norms(post, norm),
            out,
            size=x.size,
            eps=norm.eps,
            add=True,
            plain=post is None,
            max_count=x.rows,
            half=half,
        )
    )
    return out


def silu(step: EncoderStep, x: Value) -> Value:
    """Return silu(x), half."""
    out = step.activation("silu", x.rows, x.size, _SILU_SCALE)
    step.launch(step.kernels.silu(step.state(x.rows), x, out, size=x.size, scale=out.scale, max_count=x.rows))
    return out


def light_convolution(step: EncoderStep, convolution: LightConvolution, x: Value) -> Value:
    """Return silu(norm(convolution(a * sigmoid(b)))), half (count, n); `x` has a and b one after the other."""
    out = step.activation("light convolution", x.rows, x.size // 2)
    step.launch(
        step.kernels.light_convolution(
            step.state(x.rows),
            x,
            convolution.weight,
            step.weights(convolution.norm),
            out,
            size=out.size,
            taps=convolution.taps,
            eps=convolution.norm.eps,
            max_count=x.rows,
        )
    )
    return out


def attention(step: EncoderStep, attention: RelativeAttention, qkv: Value) -> Value:
    """Let every token attend to its neighbours: half (count, heads * head_dim).

    `qkv` has the tokens' queries, keys and values one after the other.
    """
    out = step.activation("attended", qkv.rows, qkv.size // 3)
    step.launch(
        step.kernels.relative_attention(
            step.state(qkv.rows),
            qkv,
            attention.scale,
            attention.position,
            out,
            heads=attention.heads,
            head_dim=attention.head_dim,
            past=attention.past,
            future=attention.future,
            cap=attention.cap,
            max_count=qkv.rows,
        )
    )
    return out


def every(step: EncoderStep, x: Value, stride: int) -> Value:
    """Return each row of float32 `x` whose index is a multiple of `stride`."""
    out = Value("picked", -(-x.rows // stride), x.size)
    step.launch(
        step.kernels.take_rows(
            step.state(out.rows), x, step.kernels.unread, out, size=x.size, stride=stride, rows=out.rows
        )
    )
    return out


def fill(step: EncoderStep, x: Value, filler: Value, rows: int) -> Value:
    """Return float32 `x` with the last row of `filler` behind it as often as it takes to make so many rows."""
    out = Value("filled", rows, x.size)
    step.launch(
        step.kernels.take_rows(step.state(x.rows), x, filler, out, size=x.size, row=filler.rows - 1, rows=rows)
    )
    return out
