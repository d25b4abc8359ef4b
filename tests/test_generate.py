"""Generation, on models that were written to say certain things, and on random ones."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import Gemma, Generation, Piece, RequestError, load
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.options import Options
from gemma_wgpu.tokens.messages import Message
from tests.table import EMBEDDING
from tests.tiny import (
    BOS,
    END_OF_TURN,
    EOS,
    HF,
    PIECES,
    random_weights,
    reference_logits,
    scripted_weights,
    token,
    write_folder,
)

CONTEXT = 128


def tokens(*pieces: str | int) -> list[int]:
    return [token(piece) for piece in pieces]


STORY = tokens("▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat")
LOOP = tokens("x", "y", "z")
EURO = tokens("m", 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, "n")  # m€😀n
ACCENT = tokens("o", "p", 0xC3, 0xA9)  # opé
HALF = tokens("q", 0xE3, 0x81)  # and the third byte never comes
REPLY = tokens("\n", "▁home", "▁again")
TURN = tokens("r", "<start_of_turn>", "s")
SCRIPTS = [
    [*STORY, EOS],
    [*LOOP, LOOP[0]],
    [*EURO, EOS],
    [*ACCENT, EOS],
    [*HALF, EOS],
    [*REPLY, END_OF_TURN],
    [*TURN, EOS],
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    weights = scripted_weights(Gemma3Config.from_hf(HF), SCRIPTS)
    with load(write_folder(tmp_path_factory.mktemp("scripted"), HF, weights), precision="f32") as gemma:
        yield gemma


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("random"), HF, random_weights(Gemma3Config.from_hf(HF)))


@pytest.fixture(scope="module")
def random(random_folder: Path) -> Iterator[Gemma]:
    with load(random_folder, precision="f32", prefill_chunk=32) as gemma:
        yield gemma


@dataclass(frozen=True)
class Told:
    """A generation that has ended, and its pieces."""

    generation: Generation
    pieces: list[Piece]
    text: str
    ids: list[int]
    reason: str | None


def told(generation: Generation, pieces: list[Piece]) -> Told:
    text, ids, stats = generation.text, generation.ids, generation.stats
    assert "".join(pieces) == "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.ids] == ids
    # The end token was computed too, though it is not part of the text.
    beyond = stats.new_tokens - len(ids)
    assert beyond in {"eos": (1,), "stop": (0, 1)}.get(stats.finish_reason or "", (0,))
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds >= 0
    assert next(generation, None) is None
    return Told(generation, pieces, text, ids, stats.finish_reason)


def tell(gemma: Gemma, prompt: str | Sequence[int], **options: Any) -> Told:
    generation = gemma.generate(prompt, options=Options(**{"temperature": 0, **options}))
    assert (generation.text, generation.ids, generation.stats.finish_reason) == ("", [], None)
    return told(generation, list(generation))


async def tell_async(gemma: Gemma, prompt: Sequence[int], **options: Any) -> Told:
    generation = gemma.generate(prompt, options=Options(**{"temperature": 0, **options}))
    return told(generation, [piece async for piece in generation])


def prompt(length: int, seed: int = 1) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(6, len(PIECES), length - 1).tolist()]


def test_a_text_until_the_model_ends_it(scripted: Gemma) -> None:
    story = tell(scripted, [BOS, STORY[0]])
    assert story.ids == STORY[1:]
    assert story.text == " cat sat on a mat"
    assert [piece.text for piece in story.pieces] == [" cat", " sat", " on", " a", " mat"]
    assert story.reason == "eos"
    assert story.generation.stats.prompt_tokens == 2


def test_a_prompt_of_text(scripted: Gemma) -> None:
    loop = tell(scripted, "so x", max_new_tokens=4)
    assert loop.text == "yzxy"
    assert loop.generation.stats.prompt_tokens == len([BOS, *"so x"])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_as_many_tokens_as_were_asked_for(scripted: Gemma, count: int) -> None:
    loop = tell(scripted, [LOOP[0]], max_new_tokens=count)
    assert loop.text == ("yzx" * 3)[:count]
    assert loop.reason == "length"
    assert loop.generation.stats.new_tokens == count


def test_the_last_token_asked_for_may_be_the_end(scripted: Gemma) -> None:
    assert tell(scripted, STORY[:1], max_new_tokens=6).reason == "eos"
    assert tell(scripted, STORY[:1], max_new_tokens=5).reason == "length"


@pytest.mark.parametrize(("length", "most"), [(CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT - 30, 31), (1, CONTEXT)])
def test_until_the_context_is_full(scripted: Gemma, length: int, most: int) -> None:
    assert scripted.context_length == CONTEXT
    ids = [*prompt(length)[1:], LOOP[0]]
    loop = tell(scripted, ids)
    assert loop.text == ("yzx" * CONTEXT)[:most]
    assert loop.reason == "context"
    assert tell(scripted, ids, max_new_tokens=most).reason == "length"
    assert tell(scripted, ids, max_new_tokens=most + 1).reason == "context"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (" sat", " cat"),
        ("cat", " "),
        (" cat", ""),
        ("at sat o", " c"),  # over three pieces
        ("t", " ca"),
        (["mat", "on"], " cat sat "),
        (("sat on", "at"), " c"),
        ([" sat on a mouse", " on"], " cat sat"),  # one begins, but another comes first
    ],
)
def test_stop_strings(scripted: Gemma, stop: str | list[str], text: str) -> None:
    story = tell(scripted, STORY[:1], stop=stop)
    assert story.text == text
    assert story.reason == "stop"
    assert all(PIECES[token] in "▁cat▁sat▁on▁a▁mat" for token in story.ids)


@pytest.mark.parametrize("stop", ["cat sat in", "matter", " mat.", ["on a m!", "mat.", "dog"]])
def test_a_stop_string_that_only_begins(scripted: Gemma, stop: str | list[str]) -> None:
    story = tell(scripted, STORY[:1], stop=stop)
    assert story.text == " cat sat on a mat"
    assert story.reason == "eos"
    assert tell(scripted, STORY[:1], stop=stop, max_new_tokens=5).text == story.text
    assert tell(scripted, STORY[:1], stop=stop, max_new_tokens=5).reason == "length"


def test_text_is_held_back_while_it_may_become_a_stop_string(scripted: Gemma) -> None:
    story = tell(scripted, STORY[:1], stop="at sat in")
    assert [piece.text for piece in story.pieces] == [" c", "", "at sat on", " ", "a m", "at"]
    assert story.pieces[-1].ids == ()


def test_characters_come_whole(scripted: Gemma) -> None:
    euro = tell(scripted, EURO[:1])
    assert euro.text == "€😀n"
    assert [piece.text for piece in euro.pieces if piece.text] == ["€😀n"]
    accent = tell(scripted, ACCENT[:1])
    assert accent.text == "pé"
    assert [piece.text for piece in accent.pieces] == ["p", "", "", "é"]


@pytest.mark.parametrize("count", range(1, 9))
def test_text_cut_within_a_character(scripted: Gemma, count: int) -> None:
    euro = tell(scripted, EURO[:1], max_new_tokens=count)
    assert euro.ids == EURO[1 : 1 + count]
    assert euro.text == scripted.tokenizer.decode(euro.ids)
    whole = {3: "€", 7: "€😀", 8: "€😀n"}
    assert euro.text == whole.get(count, "\ufffd" * count)


def test_half_a_character_before_the_end(scripted: Gemma) -> None:
    assert tell(scripted, HALF[:1]).text == "\ufffd\ufffd"


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3}])
@pytest.mark.parametrize(("stop", "text"), [("é", "p"), ("pé", ""), (["x", "é"], "p")])
def test_a_stop_string_that_the_last_character_completes(
    scripted: Gemma, options: dict[str, int], stop: str | list[str], text: str
) -> None:
    accent = tell(scripted, ACCENT[:1], stop=stop, **options)
    assert accent.text == text
    assert accent.reason == "stop"


def test_control_tokens_are_no_text(scripted: Gemma) -> None:
    assert tell(scripted, [EOS, END_OF_TURN, LOOP[0]], max_new_tokens=3).text == "yzx"
    turn = tell(scripted, TURN[:1])
    assert (turn.ids, turn.text) == (TURN[1:], "s")


def test_a_chat_ends_with_its_turn(scripted: Gemma) -> None:
    generation = scripted.chat("so", temperature=0)
    reply = told(generation, list(generation))
    assert (reply.ids, reply.text, reply.reason) == (REPLY[1:], " home again", "eos")
    messages: list[Message] = [
        {"role": "system", "content": "sit"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": [{"type": "text", "text": "went"}]},
    ]
    generation = scripted.chat(messages, temperature=0, stop="again")
    assert told(generation, list(generation)).text == " home "
    assert generation.stats.prompt_tokens > reply.generation.stats.prompt_tokens


def test_greedy_takes_the_likeliest(random: Gemma) -> None:
    ids = prompt(11)
    text = tell(random, ids, max_new_tokens=24)
    assert len(set(text.ids)) > 8
    for count, chosen in enumerate(text.ids):
        (logits,) = random.logits([*ids, *text.ids[:count]], last=1)
        assert logits.argmax() == chosen
    assert tell(random, ids, max_new_tokens=24).ids == text.ids


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 0, "top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}, {"temperature": 1e-3}],
)
def test_options_that_leave_only_the_likeliest(random: Gemma, options: dict[str, float]) -> None:
    ids = prompt(5)
    assert tell(random, ids, max_new_tokens=16, **{"temperature": 1.0, "seed": 3} | options).ids == (
        tell(random, ids, max_new_tokens=16).ids
    )


def test_the_repetition_penalty(random: Gemma) -> None:
    ids = prompt(5)
    penalized = tell(random, ids, max_new_tokens=24, repetition_penalty=1.7).ids
    assert penalized != tell(random, ids, max_new_tokens=24).ids
    for count, chosen in enumerate(penalized):
        before = [*ids, *penalized[:count]]
        (logits,) = random.logits(before, last=1)
        seen = sorted(set(before))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        assert logits.argmax() == chosen


def test_draws_are_among_the_likeliest(random: Gemma) -> None:
    ids = prompt(7)
    drawn = tell(random, ids, max_new_tokens=40, temperature=1.5, top_k=4, top_p=1.0, seed=5).ids
    ranks = []
    for count, chosen in enumerate(drawn):
        (logits,) = random.logits([*ids, *drawn[:count]], last=1)
        ranks.append(int((logits > logits[chosen]).sum()))
    assert set(ranks) == {0, 1, 2, 3}


def test_a_seed_makes_a_text(random: Gemma) -> None:
    ids = prompt(7)

    def drawn(seed: int) -> list[int]:
        return tell(random, ids, max_new_tokens=16, temperature=1.0, top_k=20, seed=seed).ids

    texts = [drawn(seed) for seed in range(4)]
    assert len({tuple(text) for text in texts}) == 4
    assert [drawn(seed) for seed in range(4)] == texts


def test_a_seed_that_was_drawn_can_be_given_again(random: Gemma) -> None:
    ids = prompt(7)
    first = tell(random, ids, max_new_tokens=16, temperature=1.0)
    seed = first.generation.seed
    assert tell(random, ids, max_new_tokens=16, temperature=1.0, seed=seed).ids == first.ids
    assert tell(random, ids, max_new_tokens=1).generation.seed != seed


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    {"top_k": 5},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.05},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_however_far_ahead_the_gpu_is(
    random: Gemma, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for lateness in (0, 1e9):
        monkeypatch.setattr("gemma_wgpu.engine.scheduler._LATENESS", lateness)
        texts.append(tell(random, prompt(5), seed=11, max_new_tokens=40, **options).ids)
    assert texts[0] == texts[1]


def test_steps_past_the_end_leave_nothing_behind(scripted: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_wgpu.engine.scheduler._LATENESS", 1e9)
    assert tell(scripted, [LOOP[0]], stop="xy").text == "yz"
    assert tell(scripted, STORY[:1]).text == " cat sat on a mat"
    for _ in islice(scripted.generate([LOOP[0]], temperature=0), 2):
        pass
    assert tell(scripted, STORY[:1]).text == " cat sat on a mat"


def test_tokens_without_a_text_are_never_drawn(tmp_path: Path) -> None:
    """Multimodal checkpoints have more rows in their embedding than the tokenizer has tokens."""
    hf = HF | {"vocab_size": len(PIECES) + 32}
    weights = random_weights(Gemma3Config.from_hf(hf))
    weights[EMBEDDING][len(PIECES) :] *= 50
    with load(write_folder(tmp_path / "wide", hf, weights), precision="f32") as gemma:
        assert gemma.logits(prompt(5), last=1).argmax() >= len(PIECES)
        for options in SAMPLINGS:
            assert max(tell(gemma, prompt(5), max_new_tokens=20, **options).ids) < len(PIECES)


def test_a_loop_that_is_left_early(random: Gemma) -> None:
    whole = tell(random, prompt(9), max_new_tokens=12)
    for count in (0, 1, 5):
        generation = random.generate(prompt(9, seed=4), temperature=0)
        assert len(list(islice(generation, count))) == count
        assert generation.stats.finish_reason is None
        assert tell(random, prompt(9), max_new_tokens=12).ids == whole.ids


def test_a_loop_that_is_taken_up_again(random: Gemma) -> None:
    whole = tell(random, prompt(9), max_new_tokens=12)
    generation = random.generate(prompt(9), temperature=0, max_new_tokens=12)
    pieces = [*islice(generation, 5)]
    pieces += generation
    assert told(generation, pieces).ids == whole.ids


@pytest.mark.parametrize("other", ["generate", "chat", "logits", "attention"])
def test_a_generation_goes_on_beside_others(random: Gemma, other: str) -> None:
    """Whatever else the model does between two tokens, the text is the one that it would be alone."""
    whole = tell(random, prompt(9), max_new_tokens=20)
    first = random.generate(prompt(9), temperature=0, max_new_tokens=20)
    pieces = [next(first)]
    for step, piece in enumerate(first):
        pieces.append(piece)
        if other == "logits":
            random.logits(prompt(30, seed=step), last=1)
        elif other == "attention":
            random.attention(prompt(12, seed=step), 1)
        elif other == "generate":
            next(random.generate(prompt(5, seed=step), temperature=0))
        elif step == 0:
            list(random.chat("so", max_new_tokens=30))
    assert told(first, pieces).ids == whole.ids


def test_texts_that_are_begun_and_left_hold_nobody_up(random: Gemma) -> None:
    """There are more of them than are generated side by side, each with pieces that nobody takes."""
    expected = tell(random, prompt(9), max_new_tokens=30).ids
    left = [random.generate(prompt(5, seed=seed), temperature=0) for seed in range(random.scheduler.most + 3)]
    for generation in left:
        next(generation)
    assert tell(random, prompt(9), max_new_tokens=30).ids == expected
    for seed, generation in enumerate(left):
        assert generation.result() == tell(random, prompt(5, seed=seed)).text


def test_texts_in_several_threads(random: Gemma) -> None:
    prompts = [prompt(length, seed=length) for length in (100, 3, 40, 9, 70, 20)]
    expected = [tell(random, ids, max_new_tokens=25).ids for ids in prompts]
    random.reset()
    begin = threading.Barrier(len(prompts))
    found: dict[int, list[int]] = {}

    def run(index: int) -> None:
        begin.wait()
        generation = random.generate(prompts[index], temperature=0, max_new_tokens=25)
        generation.result()
        found[index] = generation.ids

    threads = [threading.Thread(target=run, args=[index]) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(index) for index in range(len(prompts))] == expected
    assert [tell(random, ids, max_new_tokens=25).ids for ids in prompts] == expected  # nothing is left behind


def test_an_event_loop_in_one_thread_and_a_plain_loop_in_another(random: Gemma) -> None:
    first, second = prompt(60, seed=5), prompt(12, seed=6)
    expected = [tell(random, ids, max_new_tokens=25).ids for ids in (first, second)]
    found: list[list[int]] = []

    def plain() -> None:
        for _ in range(3):
            found.append(tell(random, second, max_new_tokens=25).ids)

    async def looped() -> list[int]:
        return (await tell_async(random, first, max_new_tokens=25)).ids

    thread = threading.Thread(target=plain)
    thread.start()
    for _ in range(3):
        assert asyncio.run(looped()) == expected[0]
    thread.join()
    assert found == [expected[1]] * 3


def test_a_plain_loop_beside_a_coroutine_that_waits(random: Gemma) -> None:
    """Both are in one thread: the plain loop takes in what the coroutine waits for."""
    first, second = prompt(60, seed=5), prompt(12, seed=6)
    expected = [tell(random, ids, max_new_tokens=25).ids for ids in (first, second)]

    async def both() -> list[list[int]]:
        task = asyncio.create_task(tell_async(random, first, max_new_tokens=25))
        found = []
        for _ in range(4):
            await asyncio.sleep(0)
            found.append(tell(random, second, max_new_tokens=25).ids)
        return [(await task).ids, *found]

    assert asyncio.run(both()) == [expected[0], *[expected[1]] * 4]


def test_texts_outgrow_their_rings(tmp_path: Path) -> None:
    """They do in a cache that is enlarged with them, and in one that had room for more from the beginning."""
    hf = HF | {"max_position_embeddings": 1024}
    config = Gemma3Config.from_hf(hf)
    weights = random_weights(config)
    with load(write_folder(tmp_path / "long", hf, weights), precision="f32") as gemma:
        for _ in range(2):
            new = tell(gemma, prompt(100), max_new_tokens=200).ids
            logits = reference_logits(config, weights, prompt(100) + new)[99:-1]
            assert np.allclose(logits[np.arange(200), new], logits.max(axis=1), rtol=0, atol=1e-3)
            gemma.reset()


def test_a_text_that_nobody_reads_waits(random: Gemma) -> None:
    first, second = (random.generate(prompt(9), temperature=0, max_new_tokens=100) for _ in range(2))
    next(first)
    second.result()
    assert len(first.ids) < 50
    assert first.result() == second.result()


def test_reset_ends_what_is_under_way(random: Gemma) -> None:
    logits = random.logits(prompt(9), last=1)
    generation, *others = (random.generate(prompt(9), temperature=0) for _ in range(10))
    next(generation)
    for other in others:
        random.scheduler.add(other.request)
    assert (random.scheduler.running, random.scheduler.waiting) == (1, 9)
    random.reset()
    assert (random.scheduler.running, random.scheduler.waiting) == (0, 0)
    assert all(other.request.error for other in others)
    with pytest.raises(RequestError, match=r"^this text was ended by reset\(\); generate it again$"):
        for _ in generation:
            pass
    assert next(generation, None) is None
    assert generation.stats.finish_reason == "interrupted"
    assert np.array_equal(random.logits(prompt(9), last=1), logits)
    assert random.generate(prompt(9), temperature=0, max_new_tokens=2).result()


def test_the_whole_text_at_once(scripted: Gemma) -> None:
    def story() -> Generation:
        return scripted.generate(STORY[:1], temperature=0)

    async def awaited() -> str:
        return await story()

    assert story().result() == str(story()) == "".join(story()) == asyncio.run(awaited()) == " cat sat on a mat"
    generation = story()
    next(generation)
    assert f"{generation}" == generation.text == " cat sat on a mat"  # from where it is
    assert generation.result() == " cat sat on a mat"


def test_a_generation_begins_when_it_is_iterated(scripted: Gemma) -> None:
    first, second = scripted.generate(LOOP[:1], temperature=0), scripted.generate(STORY[:1], temperature=0)
    assert "".join(map(str, second)) == " cat sat on a mat"
    assert next(first).text == "y"


def test_interrupts_are_heard_at_any_moment(scripted: Gemma) -> None:
    heard = threading.Event()
    sent = 0

    def interrupt(after: float) -> None:
        nonlocal sent
        while not heard.wait(after):
            sent += 1
            os.kill(os.getpid(), signal.SIGINT)
            after = 30  # one that is lost would leave this waiting

    rounds = 25
    for moment in np.random.default_rng(0).uniform(0.005, 0.05, rounds):
        heard.clear()
        thread = threading.Thread(target=interrupt, args=[moment])
        generation = scripted.generate(LOOP[:1], temperature=0)
        try:
            thread.start()
            while True:
                generation = scripted.generate(LOOP[:1], temperature=0)
                for _ in generation:
                    pass
        except KeyboardInterrupt:
            heard.set()
        thread.join()
        assert generation.stats.finish_reason in ("interrupted", "context", None)  # None: outside of its steps
    assert sent == rounds
    assert tell(scripted, STORY[:1]).text == " cat sat on a mat"


def test_async_for_gives_the_same(random: Gemma, scripted: Gemma) -> None:
    async def both() -> tuple[Told, Told]:
        return (
            await tell_async(random, prompt(40), max_new_tokens=12),
            await tell_async(scripted, STORY[:1], stop="mat"),
        )

    drawn, story = asyncio.run(both())
    expected = tell(random, prompt(40), max_new_tokens=12)
    assert (drawn.ids, drawn.reason, drawn.pieces) == (expected.ids, expected.reason, expected.pieces)
    assert (story.text, story.reason) == (" cat sat on a ", "stop")


def test_what_runs_at_once_is_right(random: Gemma) -> None:
    first, second = prompt(100, seed=2), prompt(90, seed=3)  # several chunks each
    logits = [random.logits(ids) for ids in (first, second)]
    texts = [tell(random, ids, max_new_tokens=8).ids for ids in (first, second)]

    async def text(ids: Sequence[int]) -> list[int]:
        return (await tell_async(random, ids, max_new_tokens=8)).ids

    async def at_once() -> tuple[NDArray[np.float32], list[int], NDArray[np.float32], list[int]]:
        return await asyncio.gather(
            random.logits_async(first), text(first), random.logits_async(second), text(second)
        )

    for _ in range(2):
        found = asyncio.run(at_once())
        assert np.array_equal(found[0], logits[0])
        assert np.array_equal(found[2], logits[1])
        assert [found[1], found[3]] == texts
        random.reset()


def test_an_async_loop_that_is_left_early(scripted: Gemma) -> None:
    async def left() -> Told:
        async for piece in scripted.generate(LOOP[:1], temperature=0):
            if piece.text == "x":
                break
        return await tell_async(scripted, STORY[:1])

    assert asyncio.run(left()).text == " cat sat on a mat"


def test_async_lets_other_tasks_run(scripted: Gemma) -> None:
    async def ticks() -> int:
        count = 0

        async def tick() -> None:
            nonlocal count
            while True:
                await asyncio.sleep(0)
                count += 1

        task = asyncio.create_task(tick())
        await tell_async(scripted, LOOP[:1], max_new_tokens=20)
        task.cancel()
        return count

    assert asyncio.run(ticks()) >= 15


def test_an_async_task_that_is_cancelled(scripted: Gemma) -> None:
    async def cancelled() -> Told:
        task = asyncio.create_task(tell_async(scripted, LOOP[:1]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await tell_async(scripted, STORY[:1])

    assert asyncio.run(cancelled()).text == " cat sat on a mat"


def test_a_plain_loop_inside_an_event_loop(scripted: Gemma) -> None:
    async def plain() -> str:
        return tell(scripted, STORY[:1]).text

    assert asyncio.run(plain()) == " cat sat on a mat"


def test_prompts_that_are_wrong(scripted: Gemma) -> None:
    vocab = len(PIECES)
    wrong: list[tuple[Any, str]] = [
        ([], "the prompt is empty"),
        ([5, -1], "token id -1 "),
        ([5, vocab], f"token id {vocab} is outside the vocabulary of {vocab}"),
        ([1 << 40], f"token id {1 << 40} "),
        ([2.0], "token ids must be integers, not float"),
        ([5, "a"], "token ids must be integers, not str"),
        ([None], "token ids must be integers, not NoneType"),
        (prompt(CONTEXT + 1), "the prompt has 129 tokens, more than the context_length of 128"),
        ("ab" * CONTEXT, "the prompt has 257 tokens, more than the context_length of 128"),
    ]
    for ids, message in wrong:
        with pytest.raises(RequestError, match=f"^{message}") as raised:
            scripted.generate(ids)
        assert "\n" not in str(raised.value)


def test_ids_of_numpy(scripted: Gemma) -> None:
    assert tell(scripted, np.array([BOS, STORY[0]])).text == " cat sat on a mat"  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_counts_that_are_wrong(scripted: Gemma, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^max_new_tokens is {value!r}; it must be a whole number above 0$"):
        scripted.generate("a", max_new_tokens=value)


@pytest.mark.parametrize("value", ["", [""], ["a", ""], [3]])
def test_stop_strings_that_are_wrong(scripted: Gemma, value: Any) -> None:
    with pytest.raises(RequestError, match="^stop is .*; it must be a text or a list of texts, none of them empty$"):
        scripted.generate("a", stop=value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "message 0 "),
        ([{"role": "assistant", "content": "a"}], "message 0 "),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "message 1 "),
        ([{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}], "message 1 "),
        ([{"role": "user", "content": 3}], "message 0 "),
        (("a",), "message 0 "),
    ],
)
def test_chats_that_are_wrong(scripted: Gemma, messages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        scripted.chat(messages)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5, "seed": 3}])
def test_logprobs_are_those_of_the_model(random: Gemma, options: dict[str, Any]) -> None:
    """Of the model itself, whatever was made of them to sample; against the reference in numpy."""
    ids = prompt(6)
    pieces = list(random.generate(ids, options=Options(max_new_tokens=8, logprobs=4, **options)))
    found = [piece.logprobs for piece in pieces if piece.ids]
    new = [token for piece in pieces for token in piece.ids]
    config = Gemma3Config.from_hf(HF)
    logits = reference_logits(config, random_weights(config), ids + new)[len(ids) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, token_, at in zip(expected, new, found, strict=True):
        assert at is not None
        assert at.token == token_
        assert at.logprob == pytest.approx(row[token_], abs=1e-3)
        ranked = np.argsort(-row)[:4].tolist()
        assert [token for token, _ in at.top] == ranked
        assert [logprob for _, logprob in at.top] == pytest.approx(row[ranked], abs=1e-3)


def test_logprobs_of_the_token_alone(random: Gemma) -> None:
    first, *_ = random.generate(prompt(6), max_new_tokens=2, logprobs=0)
    assert first.logprobs is not None
    assert first.logprobs.top == ()
    first, *_ = random.generate(prompt(6), max_new_tokens=2)
    assert first.logprobs is None


@pytest.mark.parametrize("count", [-1, len(PIECES), 1.5, True])
def test_so_many_logprobs_there_are_not(random: Gemma, count: int) -> None:
    with pytest.raises(RequestError, match="^logprobs is"):
        random.generate(prompt(6), logprobs=count)
