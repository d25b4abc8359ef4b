"""Conversion changes nothing in a real model if it only repacks, and little if it quantises."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import Gemma, load
from gemma_wgpu.bench.evaluate import Evaluation, evaluate
from gemma_wgpu.weights import convert as module
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.quantize import quantize
from tests import bf16

pytestmark = pytest.mark.slow

TEXT = Path(__file__).parent / "data/alice.txt"
PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank, and"
TOKENS, SEGMENT = 256, 129


@pytest.fixture(scope="module")
def repacked(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repacked") / "demo"
    with open_checkpoint(demo_gguf) as checkpoint:
        module.convert(checkpoint, out, quant="keep")
    return out


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_repacking_changes_nothing(demo_gguf: Path, repacked: Path, precision: str) -> None:
    def told(path: Path) -> tuple[NDArray[np.float32], list[int]]:
        with load(path, precision=precision, context_length=128) as gemma:
            assert gemma.precision == precision
            ids = gemma.tokenizer.encode(PROMPT)
            logits = gemma.logits(ids)
            pieces = gemma.generate(ids, temperature=0, max_new_tokens=40)
            return logits, [token for piece in pieces for token in piece.ids]

    logits, tokens = told(demo_gguf)
    assert len(tokens) == 40
    assert len(set(tokens)) > 10
    logits_after, tokens_after = told(repacked)
    assert tokens_after == tokens
    assert np.array_equal(logits_after.view(np.uint32), logits.view(np.uint32))


class _Remembered:
    """A model whose logits are computed once, however many others are measured against it."""

    def __init__(self, gemma: Gemma) -> None:
        self._gemma = gemma
        self._rows: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._gemma, name)

    async def logit_rows(self, ids: Sequence[int]) -> AsyncIterator[NDArray[np.float32]]:
        if tuple(ids) not in self._rows:
            self._rows[tuple(ids)] = [rows.copy() async for rows in self._gemma.logit_rows(ids)]
        for rows in self._rows[tuple(ids)]:
            yield rows


@pytest.fixture(scope="module")
def original(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bf16.write(demo_gguf, tmp_path_factory.mktemp("bf16") / "demo.gguf")


@pytest.fixture(scope="module")
def judge(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Evaluation]]:
    """Convert the original by `quantize`, or by another function in its place, and evaluate the result against it."""
    text = TEXT.read_text(encoding="utf-8")
    with load(original, precision="f32", context_length=SEGMENT) as gemma:
        remembered = _Remembered(gemma)

        def evaluated(quant: module.Quant, quantiser: Callable[..., object] = quantize) -> Evaluation:
            out = tmp_path_factory.mktemp("quantised") / quant
            with open_checkpoint(original) as checkpoint, pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "quantize", quantiser)
                module.convert(checkpoint, out, quant=quant)
            # Both compute in float32, so only the weights differ.
            with load(out, precision="f32", context_length=SEGMENT) as converted:
                return evaluate(
                    converted,
                    text,
                    against=remembered,  # type: ignore[arg-type]
                    segment=SEGMENT,
                    max_tokens=TOKENS,
                )

        yield evaluated


@pytest.mark.parametrize(("quant", "most", "ratio"), [("int8", 0.005, 0.7), ("int4", 0.4, 0.95)])
def test_quantising(judge: Callable[..., Evaluation], quant: module.Quant, most: float, ratio: float) -> None:
    """The divergence has a bound, in nats a token, also relative to plain rounding. benchmarks/README.md has more."""
    ours, plain = judge(quant), judge(quant, bf16.nearest)
    print(f"{quant}: {ours.divergence:.5f} nats a token, plain rounding {plain.divergence:.5f}")
    assert ours.divergence is not None
    assert plain.divergence is not None
    assert ours.divergence < most
    assert ours.divergence < ratio * plain.divergence
