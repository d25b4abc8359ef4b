"""A conversation that goes on: on what the cache still holds, and on what a file kept of it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import DeviceError, Gemma, Options, RequestError, load
from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.tiny import HF, PIECES, random_weights, reference_logits, write_folder

CONFIG = Gemma3Config.from_hf(HF)
WEIGHTS = random_weights(CONFIG)
IDS = [2, *np.random.default_rng(3).integers(6, len(PIECES), 110).tolist()]  # the window is 8, a ring has 40 slots
F32 = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", HF, WEIGHTS)


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32", prefill_chunk=32) as gemma:
        yield gemma


@pytest.fixture
def kept(gemma: Gemma, tmp_path: Path) -> Path:
    """A session of 70 tokens."""
    gemma.reset()
    gemma.logits(IDS[:70], last=1)
    gemma.save_session(tmp_path / "kept")
    gemma.reset()
    return tmp_path / "kept"


def check(gemma: Gemma, ids: list[int]) -> None:
    logits = gemma.logits(ids, last=1)
    expected: NDArray[np.float64] = reference_logits(CONFIG, WEIGHTS, ids)[-1:]
    assert np.abs(logits - expected).max() < F32 * np.abs(expected).max()


def reused(gemma: Gemma, ids: list[int], count: int = 5) -> tuple[int, list[int]]:
    """How many of `ids` the cache held, and the tokens that follow."""
    generation = gemma.generate(ids, temperature=0, max_new_tokens=count)
    for _ in generation:
        pass
    return generation.stats.reused_tokens, generation.ids


def test_what_the_cache_holds_is_not_computed_again(gemma: Gemma) -> None:
    gemma.reset()
    assert reused(gemma, IDS[:30], 10)[0] == 0
    assert reused(gemma, IDS[:30], 10)[0] == 29
    _, reply = reused(gemma, IDS[:60], 20)
    told = [*IDS[:60], *reply]
    assert reused(gemma, told)[0] == 79
    check(gemma, [*told, *IDS[:5]])
    gemma.reset()
    assert reused(gemma, told)[0] == 0


@pytest.mark.parametrize("ahead", [0, 1e9])
def test_after_any_history_the_logits_are_those_of_a_fresh_start(
    gemma: Gemma, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_wgpu.engine.scheduler._LATENESS", ahead)
    gemma.reset()
    for length, common, count in ((20, 0, 9), (50, 20, 30), (90, 84, 12), (91, 60, 3), (70, 62, 40), (30, 29, 1)):
        reused(gemma, [*IDS[:common], *IDS[common + 3 : length]], count)
        check(gemma, [*IDS[:common], *IDS[common + 3 : length - 2], 7])


def test_attention_leaves_nothing_wrong_in_the_cache(folder: Path) -> None:
    with load(folder, precision="f32", prefill_chunk=128) as gemma:
        gemma.logits(IDS[:50], last=1)
        gemma.attention(IDS[:110], 2)
        check(gemma, IDS[:52])


def test_logits_of_tokens_that_the_cache_holds(gemma: Gemma) -> None:
    gemma.reset()
    expected = reference_logits(CONFIG, WEIGHTS, IDS[:90])
    for last in (1, 5, 20, 60, 90, 3):
        logits = gemma.logits(IDS[:90], last=last)
        assert np.abs(logits - expected[-last:]).max() < F32 * np.abs(expected).max(), last


def test_a_prompt_that_is_interrupted(gemma: Gemma) -> None:
    """What was computed of it counts; what was not does not."""
    gemma.reset()
    generation = gemma.generate(IDS[:100], temperature=0)
    next(generation)
    gemma.scheduler.remove(generation.request)
    assert len(list(generation)) <= 1  # half a character that was held back
    check(gemma, IDS[:101])
    request = gemma.request(IDS[:110], Options(temperature=0))
    gemma.reset()
    gemma.scheduler.add(request)
    gemma.device.wait(gemma.scheduler.advance())  # the first of four chunks
    gemma.scheduler.remove(request)
    assert request.ids == []
    assert 0 < reused(gemma, IDS[:110])[0] < 109
    check(gemma, IDS[:111])


def test_a_session_goes_on(gemma: Gemma, kept: Path) -> None:
    gemma.logits(IDS[20:60])
    assert gemma.load_session(kept) == IDS[:70]
    assert reused(gemma, IDS[:90])[0] == 70
    assert gemma.load_session(str(kept)) == IDS[:70]
    check(gemma, IDS[:90])
    gemma.load_session(kept)
    check(gemma, [*IDS[:50], 7])
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_a_session_of_a_generation(gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps ran past its end, and round the ring."""
    monkeypatch.setattr("gemma_wgpu.engine.scheduler._LATENESS", 1e9)
    for length in (10, 50):
        generation = gemma.generate(IDS[:length], temperature=0)
        for _ in range(12):
            next(generation)
        gemma.save_session(tmp_path / "session")
        gemma.reset()
        ids = gemma.load_session(tmp_path / "session")
        assert ids == [*IDS[:length], *generation.ids][: len(ids)]
        assert len(ids) >= length + 11
        check(gemma, [*ids, 7])


def test_sessions_of_other_models(gemma: Gemma, folder: Path, kept: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", HF, random_weights(CONFIG, seed=9))
    with load(other, precision="f32") as model, pytest.raises(RequestError, match="kept: .*belongs to another model"):
        model.load_session(kept)
    with load(folder, precision="f16") as model, pytest.raises(RequestError, match="kept: .*another precision"):
        model.load_session(kept)
    with (
        load(folder, precision="f32", context_length=60) as model,
        pytest.raises(RequestError, match="kept: the session has 70 tokens, more than the context_length of 60"),
    ):
        model.load_session(kept)
    with load(folder, precision="f32", context_length=80) as model:
        model.load_session(kept)
        check(model, IDS[:80])


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut", "text", "array", "no ids", "no keys", "short keys", "oldest", "no format"]
)
def test_sessions_that_are_none(gemma: Gemma, kept: Path, damage: str) -> None:
    content = kept.read_bytes()
    kept.unlink()
    if damage == "array":
        with kept.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage in ("no ids", "no keys", "short keys", "oldest", "no format"):
        with np.load(io.BytesIO(content)) as file:
            arrays = dict(file)
        if damage == "short keys":
            arrays["01.keys"] = arrays["01.keys"][:-4]
        elif damage == "oldest":
            arrays["oldest"] = np.array(71)
        else:
            del arrays[{"no ids": "ids", "no keys": "02.keys", "no format": "format"}[damage]]
        with kept.open("wb") as file:
            np.savez(file, **arrays)
    elif damage != "missing":
        kept.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"hello"}[damage])
    gemma.reset()
    with pytest.raises(RequestError, match="kept: "):
        gemma.load_session(kept)
    assert reused(gemma, IDS[:90])[0] == 0
    check(gemma, IDS[:90])


def test_a_session_beside_a_text_that_is_under_way(gemma: Gemma, kept: Path) -> None:
    """The text goes on with its own cache, and the session is there beside it."""
    expected = reused(gemma, IDS[:9], 40)[1]
    gemma.reset()
    generation = gemma.generate(IDS[:9], temperature=0, max_new_tokens=40)
    for _ in range(20):
        next(generation)
    assert gemma.load_session(kept) == IDS[:70]
    assert reused(gemma, IDS[:90])[0] == 70
    check(gemma, IDS[:90])
    generation.result()
    assert generation.ids == expected


def test_a_session_of_nothing(gemma: Gemma, tmp_path: Path) -> None:
    gemma.reset()
    gemma.save_session(tmp_path / "nothing")
    assert gemma.load_session(tmp_path / "nothing") == []
    check(gemma, IDS[:9])


def test_a_session_that_cannot_be_written(gemma: Gemma, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder/session: the session cannot be written: No such file"):
        gemma.save_session(tmp_path / "no such folder/session")


def test_a_closed_model_has_no_sessions(folder: Path, kept: Path) -> None:
    model = load(folder, precision="f32")
    model.close()
    for use in (model.save_session, model.load_session):
        with pytest.raises(DeviceError, match="closed"):
            use(kept)
