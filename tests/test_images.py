"""Images in prompts: what is reused of them, what they cost, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from gemma_wgpu import Gemma, load
from gemma_wgpu.engine.encoder import Encoder
from gemma_wgpu.engine.prompt import Medium, Prompt, runs
from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.models.spec import VisionModel
from gemma_wgpu.ops.kv_cache import Ring, Stored
from gemma_wgpu.progress import Progress
from tests.vision import FOLDER, GOLDEN, PIXELS, TOKENS

BLOCK = [TOKENS.begin, *[TOKENS.soft] * TOKENS.count, TOKENS.end]
TEXT = GOLDEN["text"].ids
A, B = PIXELS
LEAD = TEXT[:17]  # fewer tokens would be computed again, rather than copied from another sequence


@pytest.fixture(scope="module")
def model() -> Iterator[Gemma]:
    with load(FOLDER, precision="f32", context_length=256) as model:
        yield model


@pytest.fixture
def gemma(model: Gemma) -> Gemma:
    """A model that has seen nothing."""
    model.reset()
    encoder = model.runner.encoders["image"]
    assert encoder is not None
    encoder.forget()
    return model


@dataclass(frozen=True)
class Answer:
    """The logprobs after a prompt, how many of its tokens were reused, and how many images were encoded."""

    logprobs: NDArray[np.float64]
    reused: int
    encoded: int

    def is_like(self, other: Answer) -> bool:
        return float(np.abs(self.logprobs - other.logprobs).max()) < 1e-4


def answer(gemma: Gemma, ids: list[int], images: Sequence[object]) -> Answer:
    generation = gemma.generate(ids, images=images, temperature=0, max_new_tokens=1, logprobs=575)
    [piece] = generation
    assert piece.logprobs is not None
    logprobs = np.full(576, -100.0)
    for token, logprob in piece.logprobs.top:
        logprobs[token] = logprob
    return Answer(np.maximum(logprobs, -20), generation.stats.reused_tokens, generation.stats.encoded_images)


def beside_the_cache(gemma: Gemma) -> int:
    """The bytes on the GPU but those of the cache, which grows."""
    return gemma.device.allocated - gemma.gpu_bytes["cache"]


# What is reused.


def test_a_second_question_about_an_image_does_not_encode_it_again(gemma: Gemma) -> None:
    first, second = [*LEAD, *BLOCK, *TEXT[20:24]], [*LEAD, *BLOCK, *TEXT[30:35]]
    assert answer(gemma, first, [A]).encoded == 1
    warm = answer(gemma, second, [A])
    assert (warm.reused, warm.encoded) == (len(LEAD + BLOCK), 0)
    gemma.reset()
    cold = answer(gemma, second, [A])
    assert cold.is_like(warm)
    assert (cold.reused, cold.encoded) == (0, 0)  # the features are still known


def test_another_image_in_the_same_place_is_not_taken_for_it(gemma: Gemma) -> None:
    ids = [*LEAD, *BLOCK, *TEXT[20:25]]
    with_a = answer(gemma, ids, [A])
    with_b = answer(gemma, ids, [B])
    assert (with_b.reused, with_b.encoded) == (len(LEAD) + 1, 1)  # as far as <start_of_image>
    assert not with_b.is_like(with_a)
    gemma.reset()
    assert answer(gemma, ids, [B]).is_like(with_b)
    gemma.reset()
    assert answer(gemma, ids, [A]).is_like(with_a)


def test_images_that_stand_side_by_side_are_reused_together(gemma: Gemma) -> None:
    """What an image's tokens are depends on an image that follows it at once."""
    soft = [TOKENS.soft] * TOKENS.count
    one, two = [*LEAD, *soft, 7, 8], [*LEAD, *soft, *soft, 7, 8]
    for first, images, second, others in (
        (one, [A], two, [A, B]),
        (two, [A, B], one, [A]),
        (two, [A, B], two, [A, A]),
    ):
        gemma.reset()
        answer(gemma, first, images)
        warm = answer(gemma, second, others)
        assert warm.reused == len(LEAD)
        gemma.reset()
        assert answer(gemma, second, others).is_like(warm)


def test_a_cut_is_never_inside_an_image() -> None:
    def common(stored: list[int], ids: list[int], most: int | None = None) -> int:
        sequence = Stored([Ring(0, 0)] * 2, stored, computed=len(stored))
        return sequence.common(ids, len(ids) if most is None else most, 8)

    assert common([1, -5, -5, 2, 3], [1, -5, -5, 2, 4]) == 4
    assert common([1, -5, -5, 2], [1, -5, -5, -6, -6]) == 1
    assert common([1, -5, -5, -6, -6, 2], [1, -5, -5, 2]) == 1
    assert common([1, -5, -5, 2], [1, -6, -6, 2]) == 1
    assert common([1, -5, -5, 2], [1, -5, -5, 2], most=2) == 1
    assert common([1, -5, -5], [1, -5, -5, 2]) == 3
    assert common([-5, -5, -6, -6], [-5, -5, -7, -7]) == 0


def test_runs() -> None:
    assert runs(np.array([False, True, True, False, True])) == [(1, 3), (4, 5)]
    assert runs(np.zeros(0, np.bool_)) == runs(np.zeros(2, np.bool_)) == []


def test_sessions_keep_images(gemma: Gemma, tmp_path: Path) -> None:
    ids, path = [*LEAD, *BLOCK, *TEXT[20:25]], tmp_path / "session"
    cold = answer(gemma, ids, [A])
    gemma.save_session(path)
    gemma.reset()
    encoder = gemma.runner.encoders["image"]
    assert encoder is not None
    encoder.forget()
    restored = gemma.load_session(path)
    key = restored[len(LEAD) + 1]
    assert key < 0
    assert restored[: len(ids)] == [*LEAD, 509, *[key] * 4, 510, *TEXT[20:25]]
    same, other = answer(gemma, ids, [A]), answer(gemma, ids, [B])
    assert same.is_like(cold)
    assert not other.is_like(cold)
    assert (same.reused, same.encoded) == (len(ids) - 1, 0)
    assert (other.reused, other.encoded) == (len(LEAD) + 1, 1)


# What they cost.


def test_features_are_kept_as_long_as_there_is_room(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = gemma.runner.encoders["image"]
    assert isinstance(encoder, Encoder)
    features = GOLDEN.features[0]
    images = [Medium(A, -number) for number in range(1, 5)]
    monkeypatch.setattr("gemma_wgpu.engine.encoder.KEPT_BYTES", 2 * features.nbytes)
    encoder.keep(images[0], features)
    encoder.keep(images[1], features)
    assert encoder.features(images[0]) is not None  # now the other one was used longest ago
    encoder.keep(images[2], features)
    assert [encoder.features(image) is not None for image in images] == [True, False, True, False]


def test_the_memory_of_an_encoding_is_freed(gemma: Gemma) -> None:
    gemma.image_features(A)
    before = gemma.device.allocated
    encoder = gemma.runner.encoders["image"]
    assert encoder is not None
    encoding = encoder.begin(Medium(B, -1))
    assert gemma.device.allocated - before >= encoding.scratch_bytes > 0
    encoding.close()
    encoding.close()
    gemma.image_features(B)
    assert gemma.device.allocated == before
    answer(gemma, [*LEAD, *BLOCK], [A])
    encoder.forget()
    before = beside_the_cache(gemma)
    assert answer(gemma, [*LEAD, *BLOCK], [B]).encoded == 1
    assert beside_the_cache(gemma) == before


def test_without_the_tower_text_costs_what_it_did() -> None:
    sizes, logits = {}, {}
    for vision in (True, False):
        with load(FOLDER, precision="f32", context_length=256, vision=vision) as model:
            logits[vision] = model.logits(TEXT)
            sizes[vision] = model.gpu_bytes
    assert np.array_equal(logits[True], logits[False])
    tower = sizes[True]["weights"] - sizes[False]["weights"]
    assert tower > 1_000_000
    assert sizes[True]["cache"] == sizes[False]["cache"]
    assert sizes[True]["scratch"] - sizes[False]["scratch"] == 4 * 256  # which tokens see each other


# What goes on while an image is encoded.


def test_progress(gemma: Gemma) -> None:
    heard: list[Progress] = []
    gemma.image_features(A, progress=heard.append)
    assert [(progress.done, progress.total) for progress in heard] == [(1, 3), (2, 3), (3, 3)]
    heard.clear()
    gemma.generate([2, *BLOCK, 5], images=[B], max_new_tokens=1, progress=heard.append).result()
    assert [(progress.done, progress.total) for progress in heard] == [(1, 3), (2, 3), (3, 3)]


def test_an_encoding_can_be_cancelled(gemma: Gemma) -> None:
    ids = [2, *BLOCK, *TEXT[1:6]]
    answer(gemma, ids, [B])
    before = beside_the_cache(gemma)
    generation = gemma.generate(ids, images=[A], temperature=0, max_new_tokens=4)

    def stop(progress: Progress) -> None:
        gemma.scheduler.remove(generation.request)

    generation.request.progress = stop
    assert generation.result() == ""
    assert generation.stats.finish_reason == "interrupted"
    assert gemma.scheduler.running == 0
    assert beside_the_cache(gemma) == before
    assert answer(gemma, ids, [A]).encoded == 1


def test_a_task_that_waits_for_an_image_can_be_cancelled(gemma: Gemma) -> None:
    async def main() -> None:
        def cancel(progress: Progress) -> None:
            task.cancel()

        task = asyncio.create_task(gemma.image_features_async(A, progress=cancel))
        with pytest.raises(asyncio.CancelledError):
            await task

    before = gemma.device.allocated
    asyncio.run(main())
    assert gemma.device.allocated == before
    assert gemma.image_features(A).shape == (4, 192)


def test_texts_go_on_while_an_image_is_encoded(gemma: Gemma) -> None:
    text = gemma.generate(TEXT[:10], temperature=0, max_new_tokens=40)
    next(text)
    seen: list[int] = []
    image = gemma.generate(
        [2, *BLOCK, 5], images=[A], max_new_tokens=2, temperature=0, progress=lambda _: seen.append(len(text.ids))
    )
    for _ in image:
        pass
    assert len(text.ids) > 1  # it moved while somebody else waited
    text.result()
    gemma.reset()
    alone = gemma.generate(TEXT[:10], temperature=0, max_new_tokens=40)
    alone.result()
    assert text.ids == alone.ids


# What can be given.


def test_pictures_of_all_kinds(gemma: Gemma, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    picture, path = PILImage.fromarray(array), tmp_path / "picture.png"
    picture.save(path)
    expected = gemma.image_features(picture)
    for source in (array, path, str(path), path.read_bytes()):
        assert np.array_equal(gemma.image_features(source), expected)


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([2, *BLOCK], [], r"4 soft tokens of images \(id 512\), and its 0 images have 0"),
        ([2, 3], [A], r"0 soft tokens of images \(id 512\), and its 1 images have 4"),
        ([2, *BLOCK], [A, B], r"4 soft tokens of images \(id 512\), and its 2 images have 8"),
        ([2, *[512] * 3, 5, 512], [A], r"3 soft tokens of images stand side by side at index 1; an image has 4"),
        ([2, 576, *BLOCK], [A], r"token id 576 is outside the"),
        ([2, 512.0], [], r"integers"),
        ([2, *BLOCK], [A[:, :100]], r"\(3, 112, 112\)"),
        ([2, *BLOCK], ["no such file.png"], r"no such file\.png"),
        ([2, *BLOCK], [3], r"int"),
    ],
)
def test_prompts_that_are_wrong(gemma: Gemma, ids: list[int], images: list[object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gemma.generate(ids, images=images, max_new_tokens=1)
    with pytest.raises(RequestError, match=message):
        gemma.logits(ids, images=images)


def test_lists_of_images_for_lists_of_prompts(gemma: Gemma) -> None:
    with pytest.raises(RequestError, match="1 lists of images for 2 prompts"):
        gemma.generate([[2, *BLOCK], [2, 3]], images=[[A]], max_new_tokens=1)


def test_images_are_a_list(gemma: Gemma) -> None:
    golden = GOLDEN["two"]
    assert np.array_equal(gemma.logits(golden.ids, images=PIXELS), gemma.logits(golden.ids, images=list(PIXELS)))
    for images in ("picture.png", b"", PILImage.new("RGB", (9, 9)), 3, None):
        with pytest.raises(RequestError, match="images is a list with an image for each"):
            gemma.generate(golden.ids, images=images)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="images is a list with an image for each"):
            gemma.logits(golden.ids, images=images)  # type: ignore[arg-type]


def test_a_model_that_reads_text_only_says_so() -> None:
    with load(FOLDER, precision="f32", context_length=64, vision=False) as model:
        for ask in (model.image_features, lambda image: model.generate([2, *BLOCK], images=[image])):
            with pytest.raises(RequestError, match="reads text only, and takes no images"):
                ask(A)


def test_a_folder_without_a_tokenizer_takes_ids_only(gemma: Gemma) -> None:
    for ask in (gemma.generate, gemma.chat):
        with pytest.raises(
            RequestError, match=r"tokenizer\.json: there is no such file, so this model takes token ids"
        ):
            ask("What is the password?")


def test_a_tower_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mmproj"):
        load(FOLDER, vision=tmp_path / "mmproj.gguf")


def test_prompts_made_before(gemma: Gemma) -> None:
    prompt = gemma.prompt(GOLDEN["two"].ids, [A, B])
    assert isinstance(prompt, Prompt)
    assert isinstance(gemma.vision, VisionModel)
    generation = gemma.generate(prompt, temperature=0, max_new_tokens=8)
    generation.result()
    assert generation.ids == GOLDEN["two"].greedy
