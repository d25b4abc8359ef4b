"""Many texts side by side: each is what its prompt alone would have yielded."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma_wgpu import DeviceError, Gemma, Generation, Generations, RequestError, load
from gemma_wgpu.engine.request import Text
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.kernels import Tuning
from tests.tiny import BOS, END_OF_TURN, EOS, HF, PIECES, random_weights, reference_logits, scripted_weights, token
from tests.tiny import write_folder as write

CONTEXT = 128
LENGTHS = (1, 70, 7, 8, 9, 31, 33, 100, 2, 128, 127)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("random"), HF, random_weights(Gemma3Config.from_hf(HF)))


@pytest.fixture(scope="module")
def random(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32", prefill_chunk=32) as gemma:
        yield gemma


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    scripts = [[*ids("▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat"), EOS], [*ids("x", "y", "z"), token("x")]]
    replies = [[*ids("\n", "▁home"), END_OF_TURN]]
    weights = scripted_weights(Gemma3Config.from_hf(HF), scripts + replies)
    with load(write(tmp_path_factory.mktemp("scripted"), HF, weights), precision="f32") as gemma:
        yield gemma


def ids(*pieces: str) -> list[int]:
    return [token(piece) for piece in pieces]


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [[BOS, *rng.integers(6, len(PIECES), length - 1).tolist()] for length in lengths]


def alone(gemma: Gemma, prompt: list[int], **options: object) -> Generation:
    generation = gemma.generate(prompt, **options)  # type: ignore[arg-type]
    list(generation)
    return generation


def expect_same(generations: Generations, singles: list[Generation]) -> None:
    """The texts, the reasons why they ended, and the pieces that made them up."""
    pieces: list[list[str]] = [[] for _ in singles]
    for index, piece in generations:
        pieces[index].append(piece.text)
    assert generations.ids == [single.ids for single in singles]
    assert generations.texts == ["".join(each) for each in pieces] == [single.text for single in singles]
    for ours, theirs in zip(generations.stats, singles, strict=True):
        assert ours.finish_reason == theirs.stats.finish_reason
        assert (ours.prompt_tokens, ours.new_tokens) == (theirs.stats.prompt_tokens, theirs.stats.new_tokens)
        assert ours.prefill_seconds > 0
        assert ours.decode_seconds >= 0


GREEDY = {"temperature": 0}
FILTERED = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.3}
UNFILTERED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("options", "batch_size"), [(GREEDY, 8), (FILTERED, 1), (FILTERED, 3), (FILTERED, 20), (UNFILTERED, 3)]
)
def test_each_text_is_that_of_its_prompt_alone(random: Gemma, options: dict[str, float], batch_size: int) -> None:
    many = prompts()
    singles = [
        alone(random, prompt, max_new_tokens=20, seed=(2**32 - 3 + i) % 2**32, **options)
        for i, prompt in enumerate(many)
    ]
    generations = random.generate(
        many,
        max_new_tokens=20,
        seed=2**32 - 3,
        batch_size=batch_size,
        **options,  # type: ignore[arg-type]
    )
    expect_same(generations, singles)
    assert {single.stats.finish_reason for single in singles} >= {"length", "context"}


def test_with_the_kernels_of_other_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tuned(_: Device) -> Tuning:
        return Tuning(16, subgroups=False)

    monkeypatch.setattr("gemma_wgpu.gemma.tuned", tuned)
    many = prompts((5, 12, 40))
    with load(folder, precision="f32") as gemma:
        singles = [alone(gemma, prompt, max_new_tokens=20, temperature=0) for prompt in many]
        expect_same(gemma.generate(many, max_new_tokens=20, temperature=0), singles)


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-3), ("f16", 5e-2)])
def test_logprobs_are_those_of_the_model(folder: Path, precision: str, tolerance: float) -> None:
    """Against the reference in numpy."""
    config, many = Gemma3Config.from_hf(HF), prompts((6, 30, 11))
    weights = random_weights(config)
    with load(folder, precision=precision) as gemma:
        generations = gemma.generate(many, max_new_tokens=8, logprobs=3, seed=1)
        found: list[list[float]] = [[] for _ in many]
        for index, piece in generations:
            if piece.logprobs is not None:  # text that was held back has none
                assert len(piece.logprobs.top) == 3
                found[index].append(piece.logprobs.logprob)
    for prompt, new, logprobs in zip(many, generations.ids, found, strict=True):
        logits = reference_logits(config, weights, prompt + new)[len(prompt) - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert logprobs == pytest.approx(expected[np.arange(len(new)), new], abs=tolerance)


def test_texts_that_end_make_room(scripted: Gemma) -> None:
    story, loop = token("▁the"), token("x")
    many = [[BOS, story], [loop], [BOS, token("▁on")], [token("y")], [token("▁mat")]]
    singles = [alone(scripted, prompt, temperature=0, max_new_tokens=9, stop="yzxy") for prompt in many]
    assert [single.stats.finish_reason for single in singles] == ["eos", "stop", "eos", "stop", "eos"]
    for batch_size in (1, 2, 5):
        expect_same(
            scripted.generate(many, temperature=0, max_new_tokens=9, stop="yzxy", batch_size=batch_size), singles
        )


def test_texts(scripted: Gemma) -> None:
    assert scripted.generate(["so x", "x"], temperature=0, max_new_tokens=4).result() == ["yzxy", "yzxy"]
    assert scripted.generate(["so x"], temperature=0, max_new_tokens=1).result() == ["y"]


def test_chats(scripted: Gemma) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("x", "hello", "y")]
    generations = scripted.chat(chats, temperature=0, batch_size=2)  # type: ignore[arg-type]
    assert generations.result() == [" home"] * 3
    assert [stats.finish_reason for stats in generations.stats] == ["eos"] * 3


def test_in_an_event_loop(random: Gemma) -> None:
    many = prompts((5, 9))
    expected = [alone(random, prompt, max_new_tokens=6, temperature=0).text for prompt in many]

    async def tell() -> list[str]:
        return await random.generate(many, max_new_tokens=6, temperature=0).result_async()

    assert asyncio.run(tell()) == expected


def test_a_prompt_that_others_begin_with_is_computed_once(random: Gemma) -> None:
    random.reset()
    (shared,) = prompts((60,))
    generations = random.generate([[*shared, 7], [*shared, 8], shared], max_new_tokens=2, temperature=0)
    generations.result()
    assert [stats.reused_tokens for stats in generations.stats] == [0, 60, 59]


def test_the_next_prompt_waits_for_no_text(random: Gemma) -> None:
    """A long one comes in chunks, between which the others go on."""
    generations = random.generate(prompts((4, 128)), max_new_tokens=30, temperature=0)
    order = [index for index, _ in generations]
    assert 0 in order[: order.index(1)]
    assert order.index(1) > 3


def test_memory_is_that_of_the_largest_batch(folder: Path) -> None:
    with load(folder, precision="f32") as gemma:
        device = gemma.device
        before = device.allocated
        assert "batch" not in gemma.gpu_bytes
        gemma.generate(prompts((3, 3)), max_new_tokens=2).result()
        two = device.allocated
        assert gemma.gpu_bytes["batch"] == two - before > 0
        gemma.generate(prompts((3,)), max_new_tokens=2).result()
        assert device.allocated == two
        gemma.generate(prompts((3, 3, 3, 3)), max_new_tokens=2, batch_size=4).result()
        assert gemma.gpu_bytes["batch"] == device.allocated - before > two - before
    assert device.allocated == 0


def test_others_end_those_that_are_under_way(random: Gemma) -> None:
    first = random.generate(prompts((3, 5)), max_new_tokens=20)
    next(first)
    random.generate(prompts((3,)), max_new_tokens=2).result()
    with pytest.raises(RequestError, match="ended when the model was given others"):
        list(first)
    assert [stats.finish_reason for stats in first.stats] == ["interrupted"] * 2


def test_a_single_one_goes_on_beside_them(random: Gemma) -> None:
    """It has a cache of its own, once their prompts are through."""
    many = prompts((3, 5))
    singles = [alone(random, prompt, max_new_tokens=20, temperature=0) for prompt in (*many, [BOS, 9])]
    generations, beside = random.generate(many, max_new_tokens=20, temperature=0), []
    seen: set[int] = set()
    for index, _ in generations:
        seen.add(index)
        if seen == {0, 1} and not beside:
            beside = alone(random, [BOS, 9], max_new_tokens=20, temperature=0).ids
    assert [*generations.ids, beside] == [single.ids for single in singles]


def text(gemma: Gemma, prompt: list[int], count: int = 20) -> Text:
    return gemma.generate(prompt, max_new_tokens=count, temperature=0).draft


def test_texts_that_are_removed_leave_the_others_alone(random: Gemma) -> None:
    """Waiting, amid the prompt, and under way; each makes room."""
    many = prompts((4, 6, 9, 100, 11, 13))
    expected = [alone(random, prompt, max_new_tokens=20, temperature=0).ids for prompt in many]
    scheduler = random.scheduler(2)
    texts = [text(random, prompt) for prompt in many]
    for each in texts:
        scheduler.add(each)
    wait = random.device.wait
    while len(texts[1].ids) < 3:
        wait(scheduler.step())
    scheduler.remove(texts[0])
    scheduler.remove(texts[4])
    while scheduler.waiting > 1:
        wait(scheduler.step())
    scheduler.remove(texts[3])
    assert texts[3].ids == []
    while scheduler.is_busy:
        wait(scheduler.step())
    reasons = [each.stats.finish_reason for each in texts]
    assert reasons == ["interrupted", "length", "length", "interrupted", "interrupted", "length"]
    for each, whole in zip(texts, expected, strict=True):
        assert each.ids == (whole if each.stats.finish_reason == "length" else whole[: len(each.ids)])
    assert (scheduler.waiting, scheduler.running) == (0, 0)


def test_a_closed_model(folder: Path) -> None:
    gemma = load(folder, precision="f32")
    generations = gemma.generate(prompts((3, 5)))
    next(generations)
    gemma.close()
    with pytest.raises(DeviceError):
        list(generations)
    with pytest.raises(DeviceError, match="closed"):
        gemma.generate(prompts((3, 5)))


@pytest.mark.parametrize("size", [0, -1, 257, 1.5, True])
def test_a_batch_cannot_have_that_size(random: Gemma, size: int) -> None:
    with pytest.raises(RequestError, match="^batch_size is"):
        random.generate(prompts((3,)), batch_size=size)


@pytest.mark.parametrize(("many", "message"), [([[BOS], []], "empty"), ([[BOS], [1 << 20]], "vocabulary")])
def test_a_prompt_among_others_that_is_wrong(random: Gemma, many: list[list[int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        random.generate(many)
