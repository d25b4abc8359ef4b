"""Layers of the 1B's shape with random weights against transformers, around the window and however prefilled."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma_wgpu import Gemma, load
from tests.reference.golden import (
    F16_DIVERGENCE,
    F16_GREEDY,
    F32_LOGITS,
    F32_TOPS,
    FOLDER,
    Tops,
    common_start,
    divergence,
    greedy,
    largest_error,
)
from tests.reference.random_1b import write

Report = Callable[[str], None]

with np.load(FOLDER / "random_1b.npz") as recorded:
    IDS: list[int] = recorded["ids"].tolist()
    TOPS = Tops.read(recorded)
    WHOLE = dict(zip(recorded["positions"].tolist(), recorded["whole_logits"], strict=True))
    GREEDY: dict[int, list[int]] = {length: recorded[f"greedy_{length}"].tolist() for length in (1, 513)}

LENGTHS = [1, 511, 512, 513, 1100]
AT_ONCE = 2048
# (prefill_chunk, prompt length). Token by token every prompt is the beginning of the longest, so that one will do.
F32 = [(AT_ONCE, length) for length in LENGTHS] + [(256, 513), (256, 1100), (100, 1100), (1, 1100)]
F16 = [(AT_ONCE, length) for length in LENGTHS] + [(256, 1100)]
GREEDY_CASES = [(AT_ONCE, 1), (AT_ONCE, 513), (256, 513)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("random") / "random-1b")


@pytest.fixture(scope="module")
def f32(folder: Path, chunk: int) -> Iterator[Gemma]:
    with load(folder, precision="f32", context_length=1152, prefill_chunk=chunk) as model:
        yield model


@pytest.fixture(scope="module")
def f16(folder: Path, chunk: int) -> Iterator[Gemma]:
    with load(folder, precision="f16", context_length=1152, prefill_chunk=chunk) as model:
        yield model


def cases(chunks_and_lengths: list[tuple[int, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("chunk", "length"), chunks_and_lengths, scope="module")


@cases(F32)
def test_f32_logits(f32: Gemma, length: int, report: Report) -> None:
    logits = f32.logits(IDS[:length])
    assert logits.shape == (length, 1024)
    checked = [at for at in WHOLE if at < length]
    whole = largest_error(logits[checked], np.stack([WHOLE[at] for at in checked]))
    tops = TOPS.error(logits)
    report(f"logits {whole:.1e}, top 32 and logsumexp {tops:.1e}")
    assert whole < F32_LOGITS
    assert tops < F32_TOPS


@cases(GREEDY_CASES)
def test_f32_greedy(f32: Gemma, length: int, report: Report) -> None:
    ours = greedy(f32, IDS[:length])
    report(f"{common_start(ours, GREEDY[length])} of {len(GREEDY[length])} tokens")
    assert ours == GREEDY[length]


@cases(F16)
def test_f16_logits(f16: Gemma, length: int, report: Report) -> None:
    logits = f16.logits(IDS[:length])
    assert logits.shape == (length, 1024)
    apart = np.array([divergence(logits[at], expected) for at, expected in WHOLE.items() if at < length])
    report(f"divergence {apart.max():.1e}")
    assert np.all(apart < F16_DIVERGENCE)


@cases(GREEDY_CASES)
def test_f16_greedy(f16: Gemma, length: int, report: Report) -> None:
    ours = greedy(f16, IDS[:length])
    report(f"{common_start(ours, GREEDY[length])} of {len(GREEDY[length])} tokens")
    assert ours[:F16_GREEDY] == GREEDY[length][:F16_GREEDY]
