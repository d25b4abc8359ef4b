"""A small random Gemma 3n that sees and hears against transformers: text, two images and a sound in one prompt."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import Gemma, load
from gemma_wgpu.errors import RequestError
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.reference.families import IDS
from tests.reference.golden import FOLDER, divergence, largest_error
from tests.reference.multimodal import CONFIG, IMAGES, PROMPT, SOUND, sound, write
from tests.reference.random_1b import write_tokenizer

Report = Callable[[str], None]

with np.load(FOLDER / "multimodal.npz") as recorded:
    LOGITS: NDArray[np.float32] = recorded["logits"]
    GREEDY: list[int] = recorded["greedy"].tolist()
LARGEST = np.abs(LOGITS).max()
SEEN, HEARD = list(IMAGES), [sound()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("multimodal") / "gemma3n")


@pytest.fixture(scope="module")
def f32(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32", context_length=128) as model:
        yield model


def greedy(model: Gemma) -> list[int]:
    text = model.generate(PROMPT, images=SEEN, audio=HEARD, max_new_tokens=8, temperature=0, ignore_eos=True)
    text.result()
    return text.ids


def test_logits(f32: Gemma, report: Report) -> None:
    error = largest_error(f32.logits(PROMPT, images=SEEN, audio=HEARD), LOGITS) / LARGEST
    report(f"{error:.1e} of the largest")
    assert error < 3e-5


def test_greedy(f32: Gemma) -> None:
    f32.reset()
    assert greedy(f32) == GREEDY
    assert greedy(f32) == GREEDY, "the cache has all of it now"


def test_beside_a_text(f32: Gemma) -> None:
    alone = f32.generate(IDS[:20], max_new_tokens=8, temperature=0, ignore_eos=True)
    alone.result()
    f32.reset()
    texts = f32.generate(
        [PROMPT, IDS[:20], PROMPT],
        images=[SEEN, [], SEEN],
        audio=[HEARD, [], HEARD],
        max_new_tokens=8,
        temperature=0,
        ignore_eos=True,
    )
    texts.result()
    assert texts.ids == [GREEDY, alone.ids, GREEDY]


@pytest.mark.parametrize("chunk", [1, 29])
def test_chunks(folder: Path, chunk: int) -> None:
    with load(folder, precision="f32", context_length=128, prefill_chunk=chunk) as model:
        assert model.runner.prefill_chunk == max(chunk, 12), "a sound is in one chunk"
        logits = model.logits(PROMPT, images=SEEN, audio=HEARD)
        assert largest_error(logits, LOGITS) < 3e-5 * LARGEST
        model.reset()
        assert greedy(model) == GREEDY


def test_f16(folder: Path, report: Report) -> None:
    with load(folder, precision="f16", context_length=128) as model:
        apart = max(map(divergence, model.logits(PROMPT, images=SEEN, audio=HEARD), LOGITS))
    report(f"divergence {apart:.1e}")
    assert apart < 1e-2


def test_what_is_seen_and_heard_matters(f32: Gemma) -> None:
    """Each image and the sound has its own place, and the cache is not taken for other images or sounds."""
    f32.reset()
    f32.logits(PROMPT, images=SEEN, audio=HEARD)
    for images, audio in ((SEEN[::-1], HEARD), (SEEN, [sound()[::-1].copy()])):
        other = f32.logits(PROMPT, images=images, audio=audio)
        assert largest_error(other, LOGITS) > 0.1
    assert largest_error(f32.logits(PROMPT, images=SEEN, audio=HEARD), LOGITS) < 3e-5 * LARGEST


def test_features_are_what_is_put_in_their_places(f32: Gemma) -> None:
    assert f32.image_features(SEEN[0]).shape == (4, 192)
    assert f32.audio_features(HEARD[0]).shape == (12, 192)


def test_a_model_folder(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(folder, 512)
    with open_checkpoint(folder) as checkpoint:
        convert(checkpoint, tmp_path / "out", quant="keep")
    (folder / "tokenizer.json").unlink()
    with load(tmp_path / "out", precision="f32", context_length=128) as model:
        assert model.config.to_hf() == CONFIG.to_hf()
        logits = model.logits(PROMPT, images=SEEN, audio=HEARD)
        assert largest_error(logits, LOGITS) < 3e-5 * LARGEST
    with load(tmp_path / "out", precision="f32", context_length=128, vision=False) as model:
        with pytest.raises(RequestError, match="gemma3n has no ears, and takes no sounds; load a model that hears"):
            model.audio_features(HEARD[0])
        with pytest.raises(RequestError, match="gemma3n reads text only, and takes no images"):
            model.image_features(SEEN[0])


def test_what_is_not_there_is_said(f32: Gemma) -> None:
    with pytest.raises(
        RequestError, match=r"12 soft tokens of sounds \(id 449\), and its 0 sounds have 0: each has 12"
    ):
        f32.logits(PROMPT, images=SEEN)
    with pytest.raises(RequestError, match="11 soft tokens of sounds stand side by side at index 1; a sound has 12"):
        f32.logits([2, *[SOUND] * 11, 3, SOUND], audio=HEARD)
    with pytest.raises(RequestError, match="audio is a list with a sound for each that the prompt has, not str"):
        f32.generate(PROMPT, audio="sound.wav")
