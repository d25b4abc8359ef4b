"""The variants of the kernels that GPUs run, each forced on this adapter: the real model against transformers.

With them come the shares of the work that GPUs take: see `Tuning.on_cpu`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_wgpu import Gemma, load
from tests.reference.golden import (
    F16_DIVERGENCE,
    F16_STORAGE_DIVERGENCE,
    F32_LOGITS,
    INT8_DIVERGENCE,
    divergence,
    greedy,
    largest_error,
)
from tests.reference.test_reference import GOLDEN

Report = Callable[[str], None]

GPU = 16  # lanes of the usual variant; those of others differ at decode only
FLOAT = [(GPU, "f32", "float"), (GPU, "f16", "float")]
OTHERS = [(lanes, "f32", "float") for lanes in (1, 4, 32)]
INT8 = [(GPU, "f32", "int8"), (GPU, "f16", "int8")]
SHORT, LONG = "plain_capital", "long_700"
TOKENS = 8  # the greedy ones that are compared: software takes long for these variants


@pytest.fixture(scope="module")
def model(demo_gguf: Path, request: pytest.FixtureRequest) -> Iterator[Gemma]:
    lanes, precision, activations = request.param
    tuning = f"lanes={lanes}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_WGPU_TUNING", tuning)
        model = load(demo_gguf, precision=precision, activations=activations, context_length=1024)
    with model:
        assert str(model.runner.kernels.tuning) == tuning
        yield model


def cases(variants: list[tuple[int, str, str]], *prompts: str) -> pytest.MarkDecorator:
    both = [(variant, prompt) for variant in variants for prompt in prompts]
    names = [f"{lanes}-{precision}-{activations}-{prompt}" for (lanes, precision, activations), prompt in both]
    return pytest.mark.parametrize(("model", "prompt"), both, indirect=["model"], ids=names, scope="module")


@cases(FLOAT, SHORT, LONG)
def test_logits(model: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    (last,) = model.logits(golden.ids, last=1)
    error, apart = largest_error(last, golden.last_logits), divergence(last, golden.last_logits)
    report(f"last logits {error:.1e}, divergence {apart:.1e}")
    if model.precision == "f32":
        assert error < F32_LOGITS
    else:
        assert apart < {SHORT: F16_DIVERGENCE, LONG: F16_STORAGE_DIVERGENCE}[prompt]


@cases(FLOAT, SHORT, LONG)
def test_greedy(model: Gemma, prompt: str) -> None:
    assert greedy(model, GOLDEN[prompt].ids, TOKENS) == GOLDEN[prompt].greedy[:TOKENS]


@cases(OTHERS, SHORT)
def test_lanes(model: Gemma, prompt: str) -> None:
    assert greedy(model, GOLDEN[prompt].ids, TOKENS) == GOLDEN[prompt].greedy[:TOKENS]


@cases(INT8, SHORT)
def test_int8_logits(model: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    (last,) = model.logits(golden.ids, last=1)
    apart = divergence(last, golden.last_logits)
    report(f"divergence {apart:.1e}")
    assert 1e-5 < apart < INT8_DIVERGENCE  # less would mean that float was computed
