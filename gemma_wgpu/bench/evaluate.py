"""How well a model predicts a text, and how far it is from another model: the usual ways to judge a quantisation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.progress import OnProgress, Progress


@dataclass(frozen=True)
class Evaluation:
    """Means over the `tokens` of a text, each of which is predicted from those before it in its segment.

    - perplexity: e^(mean negative log-likelihood) of the model.
    - divergence: the Kullback-Leibler divergence of the model from the other one, in nats; None without another one.
    - divergence_error: the standard error of the divergence.
    - agreement: how often both models find the same token the likeliest, from 0 to 1.
    """

    tokens: int
    perplexity: float
    divergence: float | None = None
    divergence_error: float | None = None
    agreement: float | None = None


def evaluate(
    model: Gemma,
    text: str,
    *,
    against: Gemma | None = None,
    segment: int = 512,
    max_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> Evaluation:
    """Evaluate `model` on `text`, which is cut into segments of `segment` tokens that begin with BOS each.

    `max_tokens` takes only the beginning of the text. `progress` is told the tokens that are done. Raises
    RequestError if the text is empty, if a segment is too long, if `max_tokens` is below 1, or if the models have
    different vocabularies.
    """
    if against is model:
        raise RequestError("a model cannot be measured against itself; load it twice")
    if against and against.config.vocab_size != model.config.vocab_size:
        raise RequestError(
            f"{model.name} and {against.name} have vocabularies of {model.config.vocab_size} and "
            f"{against.config.vocab_size}; only models of one vocabulary can be compared"
        )
    if not 2 <= segment <= min(m.context_length for m in (model, against) if m):
        raise RequestError(f"segment is {segment}; it must be from 2 to the context_length of each model")
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}; it must be above 0")
    ids = model.tokenizer.encode(text, bos=False, control=False)[:max_tokens]
    if not ids:
        raise RequestError("the text to evaluate is empty")
    losses: list[float] = []
    divergences: list[float] = []
    agreements: list[bool] = []
    for start in range(0, len(ids), segment - 1):
        targets = ids[start : start + segment - 1]
        inputs = [model.tokenizer.bos_id, *targets[:-1]]
        others = _rows(against, inputs) if against else [None] * len(inputs)
        for target, row, other in zip(targets, _rows(model, inputs), others, strict=True):
            logs = _log_softmax(row)
            losses.append(-float(logs[target]))
            if other is not None:
                expected = _log_softmax(other)
                divergences.append(float(np.einsum("v,v->", np.exp(expected), expected - logs, dtype=np.float64)))
                agreements.append(bool(expected.argmax() == logs.argmax()))
            if progress:
                progress(Progress("evaluating", len(losses), len(ids), "tokens"))
    perplexity = float(np.exp(np.mean(losses)))
    if not against:
        return Evaluation(len(ids), perplexity)
    return Evaluation(
        len(ids),
        perplexity,
        float(np.mean(divergences)),
        float(np.std(divergences) / np.sqrt(len(ids))),
        float(np.mean(agreements)),
    )


def _rows(model: Gemma, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """Yield the logits (vocab_size,) after each of `ids`; some rows at a time come from the GPU."""
    rows = model.logit_rows(ids)
    while (block := model.device.wait(_next(rows))) is not None:
        yield from block


async def _next(rows: AsyncIterator[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    return await anext(rows, None)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    logs: NDArray[np.float32] = logits - logits.max()
    logs -= np.log(np.exp(logs).sum(dtype=np.float64)).astype(np.float32)
    return logs
