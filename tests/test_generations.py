"""Many texts side by side: each is what its prompt alone would have yielded."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_wgpu import DeviceError, Gemma, Generation, Generations, Options, RequestError, load
from gemma_wgpu.engine.request import Request
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.ops.tuning import Tuning
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


def alone(gemma: Gemma, prompt: list[int], **options: Any) -> Generation:
    generation = gemma.generate(prompt, options=Options(**options))
    generation.result()
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
def test_each_text_is_that_of_its_prompt_alone(random: Gemma, options: dict[str, Any], batch_size: int) -> None:
    many = prompts()
    singles = [
        alone(random, prompt, max_new_tokens=20, seed=(2**32 - 3 + i) % 2**32, **options)
        for i, prompt in enumerate(many)
    ]
    common = Options(max_new_tokens=20, seed=2**32 - 3, **options)
    generations = random.generate(many, options=common, batch_size=batch_size)
    expect_same(generations, singles)
    assert {single.stats.finish_reason for single in singles} >= {"length", "context"}


def test_with_the_kernels_of_other_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tuned(_: Device) -> Tuning:
        return Tuning(16, cpu=False)

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
    texts = ["x", "hello", "y"]
    for chats in (texts, [[{"role": "user", "content": text}] for text in texts]):
        generations = scripted.chat(chats, temperature=0, batch_size=2)  # type: ignore[arg-type]
        assert generations.result() == [" home"] * 3
        assert [stats.finish_reason for stats in generations.stats] == ["eos"] * 3


def test_in_an_event_loop(random: Gemma) -> None:
    many = prompts((5, 9))
    expected = [alone(random, prompt, max_new_tokens=6, temperature=0).text for prompt in many]

    async def tell() -> list[str]:
        return await random.generate(many, max_new_tokens=6, temperature=0)

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


def test_short_texts_side_by_side_take_little_memory(tmp_path: Path) -> None:
    """They take what they need of the cache, and not a whole context each."""
    hf = HF | {"max_position_embeddings": 2048, "sliding_window": 512}
    write(tmp_path / "long", hf, random_weights(Gemma3Config.from_hf(hf)))
    with load(tmp_path / "long", precision="f32") as gemma:
        cache = gemma.runner.cache
        one = sum(2 * cache.row_bytes(index) * cache.capacity(cache.ring_of(index)) for index in range(3))
        gemma.generate(prompts((3, 5, 20, 9, 4, 7, 30, 2)), max_new_tokens=20).result()
        assert 8 * 128 * 3 * 2 * cache.row_bytes(0) <= cache.nbytes < 8 * one / 4
        device = gemma.device
        before = device.allocated
        gemma.generate(prompts((3, 5)), max_new_tokens=20).result()
        assert device.allocated == before
    assert device.allocated == 0


def test_they_go_on_beside_others(random: Gemma) -> None:
    """Lists and single texts, begun one after the other, all of them by turns."""
    many, more = prompts((3, 5, 60)), prompts((40, 6))
    singles = [alone(random, prompt, max_new_tokens=20, temperature=0) for prompt in (*many, *more, [BOS, 9])]
    first = random.generate(many, max_new_tokens=20, temperature=0, batch_size=2)
    second = random.generate(more, max_new_tokens=20, temperature=0)
    third = random.generate([BOS, 9], max_new_tokens=20, temperature=0)
    running: list[Iterator[object]] = [iter(first), iter(second), iter(third)]
    while running:
        running = [stream for stream in running if next(stream, None) is not None]
    assert [*first.ids, *second.ids, third.ids] == [single.ids for single in singles]


def request(gemma: Gemma, prompt: list[int], count: int = 20) -> Request:
    return gemma.request(prompt, Options(max_new_tokens=count, temperature=0))


def drive(gemma: Gemma, requests: list[Request]) -> None:
    """Take the pieces of all, and let the scheduler do one thing more."""
    for each in requests:
        each.pieces.clear()
    gemma.device.wait(gemma.scheduler.advance())


def test_texts_that_are_removed_leave_the_others_alone(random: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait, are amid the prompt, or are under way; each makes room."""
    many = prompts((4, 6, 9, 100, 11, 13))
    expected = [alone(random, prompt, max_new_tokens=20, temperature=0).ids for prompt in many]
    scheduler = random.scheduler
    monkeypatch.setattr(scheduler, "most", 2)
    requests = [request(random, prompt) for prompt in many]
    for each in requests:
        scheduler.add(each)
    while len(requests[1].ids) < 3:
        drive(random, requests)
    scheduler.remove(requests[0])
    scheduler.remove(requests[4])
    while scheduler.waiting > 1:
        drive(random, requests)
    scheduler.remove(requests[3])
    assert requests[3].ids == []
    while scheduler.is_busy:
        drive(random, requests)
    reasons = [each.stats.finish_reason for each in requests]
    assert reasons == ["interrupted", "length", "length", "interrupted", "interrupted", "length"]
    for each, whole in zip(requests, expected, strict=True):
        assert each.ids == (whole if each.stats.finish_reason == "length" else whole[: len(each.ids)])
    assert (scheduler.waiting, scheduler.running) == (0, 0)


@pytest.mark.parametrize("fault", ["push", "mask", "cache", "logits"])
def test_only_the_one_at_fault_ends(random: Gemma, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    many = prompts((4, 150 % 128, 9))
    expected = [alone(random, prompt, max_new_tokens=30, temperature=0).ids for prompt in many]
    requests = [request(random, prompt, 30) for prompt in many]
    bad = requests[1]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("it was built to fail")

    for each in requests:
        random.scheduler.add(each)
    while len(bad.ids) < 3:
        drive(random, requests)
    if fault == "push":
        monkeypatch.setattr(bad, "push", fail)
    elif fault == "mask":
        monkeypatch.setattr(bad, "mask", fail)
    elif fault == "cache":
        (lease,) = [lease for lease in random.runner.cache._leases if lease.ids[: len(bad.prompt)] == bad.prompt]
        monkeypatch.setattr(lease, "reserve", fail)
    else:
        check = random.runner.check_token
        chosen = iter([False, True, *[False] * 200])
        monkeypatch.setattr(random.runner, "check_token", lambda token: fail() if next(chosen) else check(token))
    while random.scheduler.is_busy:
        drive(random, requests)
    assert isinstance(bad.error, ZeroDivisionError)
    assert [requests[0].ids, requests[2].ids] == [expected[0], expected[2]]
    assert bad.ids == expected[1][: len(bad.ids)] != expected[1]
    monkeypatch.undo()
    assert [alone(random, prompt, max_new_tokens=30, temperature=0).ids for prompt in many] == expected


def test_a_list_whose_text_fails(random: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list ends, and says why; others go on."""
    expected = alone(random, [BOS, 9], max_new_tokens=20, temperature=0).ids
    single = random.generate([BOS, 9], max_new_tokens=20, temperature=0)
    next(single)
    generations = random.generate(prompts((3, 5, 4)), max_new_tokens=20, temperature=0)
    next(generations)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("it was built to fail")

    monkeypatch.setattr(generations._requests[1], "push", fail)
    with pytest.raises(ZeroDivisionError):
        generations.result()
    assert next(generations, None) is None
    assert {stats.finish_reason for stats in generations.stats} == {"interrupted", None}
    single.result()
    assert single.ids == expected


def test_texts_that_nobody_has_any_more_are_dropped(random: Gemma) -> None:
    generation = random.generate(prompts((3, 5)), max_new_tokens=100, temperature=0)
    next(generation)
    assert random.scheduler.running >= 1
    del generation
    random.generate([BOS, 9], max_new_tokens=2).result()
    assert random.scheduler.running == 0


def test_a_closed_model(folder: Path) -> None:
    gemma = load(folder, precision="f32")
    generations = gemma.generate(prompts((3, 5)))
    next(generations)
    waiting = gemma.generate(prompts((3, 5)))
    gemma.close()
    for stream in (generations, waiting):
        with pytest.raises(DeviceError, match="^this model was closed; load it again$"):
            list(stream)
    for use in (lambda: gemma.generate(prompts((3, 5))), gemma.reset, lambda: gemma.logits([BOS])):
        with pytest.raises(DeviceError, match="^this model was closed; load it again$"):
            use()


@pytest.mark.parametrize("size", [0, -1, 257, 1.5, True])
def test_a_batch_cannot_have_that_size(random: Gemma, size: int) -> None:
    with pytest.raises(RequestError, match="^batch_size is"):
        random.generate(prompts((3,)), batch_size=size)


@pytest.mark.parametrize(("many", "message"), [([[BOS], []], "empty"), ([[BOS], [1 << 20]], "vocabulary")])
def test_a_prompt_among_others_that_is_wrong(random: Gemma, many: list[list[int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        random.generate(many)
