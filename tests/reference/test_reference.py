"""A real Gemma 3 270M, quantised, against transformers on the same weights in float32."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gemma_wgpu import Gemma, load
from gemma_wgpu.weights.opening import open_checkpoint
from tests.reference import site_references
from tests.reference.golden import (
    F16_DIVERGENCE,
    F16_GREEDY,
    F16_LONG_DIVERGENCE,
    F32_LOGITS,
    F32_TOPS,
    FOLDER,
    INT8_DIVERGENCE,
    Logits,
    Tops,
    before_stop,
    common_start,
    divergence,
    greedy,
    largest_error,
)

PROMPTS: dict[str, str] = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))
Report = Callable[[str], None]


@dataclass(frozen=True)
class Golden:
    """What transformers makes of a prompt; see record_270m.py."""

    ids: list[int]
    greedy: list[int]
    last_logits: Logits
    tops: Tops


def read_golden() -> dict[str, Golden]:
    with np.load(FOLDER / "gemma3_270m_q4_k_m.npz") as recorded:
        return {
            name: Golden(
                recorded[f"{name}_ids"].tolist(),
                before_stop(recorded[f"{name}_greedy"]),
                recorded[f"{name}_last_logits"],
                Tops.read(recorded, f"{name}_"),
            )
            for name in PROMPTS
        }


GOLDEN = read_golden()
F16_DIVERGENCES = dict.fromkeys(PROMPTS, F16_DIVERGENCE) | {"long_700": F16_LONG_DIVERGENCE}
every_prompt = pytest.mark.parametrize("prompt", PROMPTS)


@pytest.fixture(scope="module")
def f32(demo_gguf: Path) -> Iterator[Gemma]:
    with load(demo_gguf, precision="f32", context_length=1024) as model:
        yield model


@pytest.fixture(scope="module")
def f16(demo_gguf: Path) -> Iterator[Gemma]:
    with load(demo_gguf, precision="f16", context_length=1024) as model:
        yield model


@pytest.fixture(scope="module", params=["f32", "f16"])
def int8(demo_gguf: Path, request: pytest.FixtureRequest) -> Iterator[Gemma]:
    with load(demo_gguf, precision=request.param, activations="int8", context_length=1024) as model:
        yield model


def test_ids(demo_gguf: Path) -> None:
    with open_checkpoint(demo_gguf) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    for prompt, text in PROMPTS.items():
        assert tokenizer.encode(text) == GOLDEN[prompt].ids, prompt


@every_prompt
def test_f32_logits(f32: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    logits = f32.logits(golden.ids, last=len(golden.tops.ids))
    last = largest_error(logits[-1], golden.last_logits)
    tops = golden.tops.error(logits)
    report(f"last logits {last:.1e}, top 32 and logsumexp {tops:.1e}")
    assert last < F32_LOGITS
    assert tops < F32_TOPS


@every_prompt
def test_f32_greedy(f32: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    ours = greedy(f32, golden.ids)
    report(f"{common_start(ours, golden.greedy)} of {len(golden.greedy)} tokens")
    assert ours == golden.greedy


@every_prompt
def test_f16_logits(f16: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    (last,) = f16.logits(golden.ids, last=1)
    apart = divergence(last, golden.last_logits)
    report(f"divergence {apart:.1e}, last logits {largest_error(last, golden.last_logits):.1e}")
    assert apart < F16_DIVERGENCES[prompt]


@every_prompt
def test_f16_greedy(f16: Gemma, prompt: str, report: Report) -> None:
    golden = GOLDEN[prompt]
    ours = greedy(f16, golden.ids)
    report(f"{common_start(ours, golden.greedy)} of {len(golden.greedy)} tokens")
    assert ours[:F16_GREEDY] == golden.greedy[:F16_GREEDY]


@every_prompt
def test_int8_logits(int8: Gemma, prompt: str, report: Report) -> None:
    assert int8.activations == "int8"
    golden = GOLDEN[prompt]
    (last,) = int8.logits(golden.ids, last=1)
    apart = divergence(last, golden.last_logits)
    report(f"divergence {apart:.1e}")
    assert 1e-5 < apart < INT8_DIVERGENCE  # less would mean that float was computed


def test_the_benchmark_page_compares_with_what_was_recorded() -> None:
    assert site_references.PATH.read_text(encoding="utf-8") == site_references.content()
