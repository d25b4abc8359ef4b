"""AltUp: four streams instead of one, of which each layer computes the first (arXiv 2301.13310, as in Gemma 3n)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Normed, Step

STREAMS = 4


@dataclass(frozen=True, eq=False)
class AltUp:
    """The weights of a layer's AltUp, all float32.

    - router (5, n): the weight of the router's norm, and the router's matrix.
    - prediction (16, 4) and correction (4, 4): what makes coefficients of the router's result.
    - output (2, n): the weight of the norm of the layer's output, and what the first stream is multiplied by where
      the layer's own input is gated.
    """

    router: Operand
    prediction: Operand
    correction: Operand
    output: Operand
    eps: float


def begin(step: Step, x: Value, projected: Value) -> Value:
    """Return the streams of the first layer, (count, 4 * n): `x`, (count, n), and its three projections."""
    streams = step.value("streams", STREAMS * x.size)
    step.launch(step.kernels.altup_begin(step.whole, x, projected, streams, size=x.size, max_count=step.count))
    return streams


def predict(step: Step, altup: AltUp, streams: Value, added: Normed | None) -> tuple[Value, Value]:
    """Return what the streams are expected to be, and the first of them, (count, n), which the layer computes.

    `added` is what is added to all streams but the first before that.
    """
    size = streams.size // STREAMS
    predicted, active = step.value("predicted streams", streams.size), step.value("active stream", size)
    y, weight = (step.kernels.unread, step.kernels.unread) if added is None else step.normed_operands(added)
    step.launch(
        step.kernels.altup_predict(
            step.whole,
            streams,
            y,
            weight,
            altup.router,
            altup.prediction,
            predicted,
            active,
            size=size,
            eps=altup.eps,
            add=added is not None,
            max_count=step.count,
        )
    )
    return predicted, active


def correct(step: Step, altup: AltUp, predicted: Value, residual: Value, y: Value) -> Value:
    """Correct the predicted streams by a layer's output, which is `residual` plus the norm of `y`.

    The corrected streams take the place of the predicted ones. Returns the first of them, scaled: (count, n).
    """
    first = step.value("first stream", residual.size)
    step.launch(
        step.kernels.altup_correct(
            step.whole,
            residual,
            y,
            altup.output,
            altup.router,
            altup.correction,
            predicted,
            first,
            size=residual.size,
            eps=altup.eps,
            max_count=step.count,
        )
    )
    return first


def end(step: Step, streams: Value, added: Normed, projections: Sequence[Linear]) -> Value:
    """Return the mean of the first stream and of the `projections` of the others, (count, n).

    `added` is what is added to all streams but the first before that.
    """
    size = streams.size // STREAMS
    y, weight = step.normed_operands(added)
    apart = [step.value("stream", size) for _ in range(STREAMS)]
    step.launch(
        step.kernels.altup_split(
            step.whole, streams, y, weight, apart, size=size, eps=added.norm.eps, max_count=step.count
        )
    )
    first, *others = apart
    projected = [step.compute(step.linear(matrix, other)) for matrix, other in zip(projections, others, strict=True)]
    out = step.value("residual", size)
    step.launch(step.kernels.altup_end(step.whole, first, projected, out, size=size, max_count=step.count))
    return out
