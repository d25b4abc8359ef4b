"""A small Gemma 3 with a vision tower against transformers: features, logits at every position, greedy tokens."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from gemma_wgpu import Gemma, load
from gemma_wgpu.errors import RequestError
from tests.reference.golden import divergence, largest_error
from tests.vision import FOLDER, GOLDEN, PIXELS, TOKENS, Golden

Report = Callable[[str], None]

# F32 and F16_FEATURES bound an error, as a share of the largest logit or feature. Float32 alone comes to 1e-6.
F32 = 1e-5
F16_FEATURES = 2e-3
F16_DIVERGENCE = 2e-5  # nats at a position

every_prompt = pytest.mark.parametrize("name", list(GOLDEN))


@pytest.fixture(scope="module")
def f32() -> Iterator[Gemma]:
    with load(FOLDER, precision="f32", context_length=192) as model:
        yield model


@pytest.fixture(scope="module")
def f16() -> Iterator[Gemma]:
    with load(FOLDER, precision="f16", context_length=192) as model:
        yield model


def greedy(model: Gemma, golden: Golden) -> list[int]:
    generation = model.generate(golden.ids, images=golden.images, temperature=0, max_new_tokens=8)
    generation.result()
    return generation.ids


def test_features(f32: Gemma, report: Report) -> None:
    ours = np.stack([f32.image_features(pixels) for pixels in PIXELS])
    error = largest_error(ours, GOLDEN.features) / np.abs(GOLDEN.features).max()
    report(f"{error:.1e} of the largest")
    assert error < F32


def test_f16_features(f16: Gemma, report: Report) -> None:
    ours = np.stack([f16.image_features(pixels) for pixels in PIXELS])
    error = largest_error(ours, GOLDEN.features) / np.abs(GOLDEN.features).max()
    report(f"{error:.1e} of the largest")
    assert error < F16_FEATURES


@every_prompt
def test_logits(f32: Gemma, name: str, report: Report) -> None:
    golden = GOLDEN[name]
    f32.reset()
    error = largest_error(f32.logits(golden.ids, images=golden.images), golden.logits) / np.abs(golden.logits).max()
    report(f"{error:.1e} of the largest")
    assert error < F32
    assert greedy(f32, golden) == golden.greedy


@every_prompt
def test_f16_logits(f16: Gemma, name: str, report: Report) -> None:
    golden = GOLDEN[name]
    f16.reset()
    ours = f16.logits(golden.ids, images=golden.images)
    apart = max(map(divergence, ours, golden.logits))
    report(f"divergence {apart:.1e}")
    assert apart < F16_DIVERGENCE


@pytest.mark.parametrize("chunk", [12, 13, 17, 19, 31, 64])
def test_chunks_end_between_images(chunk: int) -> None:
    with load(FOLDER, precision="f32", context_length=192, prefill_chunk=chunk) as model:
        for name in GOLDEN:
            golden = GOLDEN[name]
            model.reset()
            ours = model.logits(golden.ids, images=golden.images)
            assert largest_error(ours, golden.logits) < F32 * np.abs(golden.logits).max(), name
            assert greedy(model, golden) == golden.greedy, name


def test_a_chunk_has_room_for_an_image() -> None:
    golden = GOLDEN["two"]
    with load(FOLDER, precision="f32", context_length=192, prefill_chunk=1) as model:
        ours = model.logits(golden.ids, images=golden.images)
        assert largest_error(ours, golden.logits) < F32 * np.abs(golden.logits).max()
        many = GOLDEN["side by side"]
        with pytest.raises(RequestError, match=r"12 tokens stand side by side, more than the prefill_chunk of 4"):
            model.logits(many.ids, images=many.images)


def test_side_by_side_with_texts(f32: Gemma) -> None:
    """Texts with and without images, in one batch: each as alone."""
    prompts = [GOLDEN[name] for name in GOLDEN]
    f32.reset()
    generations = f32.generate(
        [golden.ids for golden in prompts],
        images=[golden.images for golden in prompts],
        temperature=0,
        max_new_tokens=8,
    )
    generations.result()
    assert generations.ids == [golden.greedy for golden in prompts]


def test_the_attention_of_a_layer_goes_both_ways_within_an_image(f32: Gemma) -> None:
    golden = GOLDEN["side by side"]
    start = golden.ids.index(TOKENS.soft)
    for layer, kind in enumerate(f32.config.layer_types):  # type: ignore[attr-defined]
        shares = f32.attention(golden.ids, layer, images=golden.images)
        assert np.allclose(shares.sum(axis=-1), 1, atol=1e-5)
        seen = shares.max(axis=0) > 0
        query, key = np.indices(seen.shape)
        together = (np.minimum(query, key) >= start) & (np.maximum(query, key) < start + 12)
        allowed = (key <= query) | together
        if kind == "sliding_attention":
            allowed &= key > query - 8
        assert np.array_equal(seen, allowed), kind
