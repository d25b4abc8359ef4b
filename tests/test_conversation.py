"""Conversations: their turns, the turns that are dropped when the context is full, and their files."""

import errno
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.errors import RequestError
from gemma_wgpu.tokens.chat import GEMMA3, MediumTokens
from gemma_wgpu.tokens.tokenizer import BPETokenizer
from tests.tiny import PIECES, TYPES

TOKENIZER = BPETokenizer(PIECES, -np.arange(len(PIECES), dtype=np.float32), np.array(TYPES, np.int32))
ENCODE = partial(GEMMA3.encode, TOKENIZER)
IMAGE = MediumTokens(begin=7, soft=len(PIECES), end=8, count=20)
SEEING = partial(GEMMA3.encode, TOKENIZER, media={"image": IMAGE})
CONTEXT = 400


def told(count: int, system: str = "") -> Conversation:
    """Return a conversation of `count` exchanges that waits for a reply."""
    conversation = Conversation(system)
    for number in range(count):
        conversation.say(f"question {number}")
        conversation.reply(f"answer {number}")
    conversation.say("last question")
    return conversation


def contents(conversation: Conversation) -> list[object]:
    return [message["content"] for message in conversation.messages]


def test_turns() -> None:
    conversation = Conversation("be kind")
    assert conversation.tokens(ENCODE) == 0
    conversation.say("a")
    conversation.reply("b")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.tokens(ENCODE) == len(ENCODE(conversation.messages))
    assert conversation.take_back_reply()
    assert not conversation.take_back_reply()
    assert contents(conversation) == ["be kind", "a"]
    assert conversation.undo()
    assert not conversation.undo()
    conversation.system = ""
    assert conversation.messages == []


def test_undo_takes_back_a_whole_exchange() -> None:
    conversation = told(1)
    assert conversation.undo()
    assert contents(conversation) == ["question 0", "answer 0"]
    assert conversation.undo()
    assert contents(conversation) == []


def test_nothing_is_dropped_while_there_is_room() -> None:
    conversation = told(3)
    before = contents(conversation)
    assert conversation.fit(ENCODE, conversation.tokens(ENCODE) * 8 // 7 + 1) == 0
    assert contents(conversation) == before


@pytest.mark.parametrize("system", ["", "be kind"])
def test_the_oldest_are_dropped_and_the_system_text_stays(system: str) -> None:
    conversation = told(30, system)
    dropped = conversation.fit(ENCODE, CONTEXT)
    assert dropped % 2 == 0
    number = dropped // 2
    assert contents(conversation) == [*([system] if system else []), *contents(told(30))[dropped:]]
    assert conversation.tokens(ENCODE) <= CONTEXT * 3 // 4
    longer = told(30, system)
    del longer.turns[: 2 * (number - 1)]
    assert longer.tokens(ENCODE) > CONTEXT * 3 // 4
    assert conversation.fit(ENCODE, CONTEXT) == 0


def test_images_stand_in_front_of_the_text() -> None:
    """They count as tokens, though nobody opens them."""
    conversation = Conversation()
    conversation.say("a", [Path("no/such.png"), Path("other.png")])
    parts = [{"type": "image", "path": "no/such.png"}, {"type": "image", "path": "other.png"}]
    assert contents(conversation) == [[*parts, {"type": "text", "text": "a"}]]
    conversation.reply("b")
    conversation.say("c")
    assert conversation.images == [Path("no/such.png"), Path("other.png")]
    without = told(0)
    without.turns = [{"role": "user", "content": "a"}, *conversation.turns[1:]]
    ids = SEEING(conversation.messages)
    assert ids.count(IMAGE.soft) == 2 * IMAGE.count
    assert conversation.tokens(SEEING) == len(ids) > without.tokens(SEEING) + 2 * IMAGE.count
    assert conversation.undo() and conversation.undo()
    assert conversation.images == []


def test_images_are_dropped_with_their_messages() -> None:
    conversation = Conversation()
    for number in range(4):
        conversation.say("a", [Path(f"{number}.png")])
        conversation.reply("b")
    conversation.say("c", [Path("last.png")])
    each = len(SEEING(conversation.messages)) // 5
    assert conversation.fit(SEEING, 5 * each) == 4
    assert conversation.images == [Path("2.png"), Path("3.png"), Path("last.png")]


def test_a_message_that_is_nearly_too_long() -> None:
    conversation = told(2)
    conversation.turns[-1]["content"] = "x" * 360
    assert conversation.fit(ENCODE, CONTEXT) == 4
    conversation.turns[-1]["content"] = "x" * 400
    with pytest.raises(RequestError, match=r"has 4\d\d tokens; the context has 400. Shorten it"):
        conversation.fit(ENCODE, CONTEXT)


def test_files(tmp_path: Path) -> None:
    conversation = told(2, "söy")
    conversation.reply("answer 2")
    conversation.say("a", [Path("ä b.png")])
    conversation.save(tmp_path / "c.json", {"temperature": 0.5, "seed": None})
    again, settings = Conversation.load(tmp_path / "c.json")
    assert again == conversation
    assert settings == {"temperature": 0.5, "seed": None}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"system": "", "messages": [{"role": "assistant", "content": "a"}], "settings": {}}',
        '{"system": "", "messages": [{"role": "user", "content": 3}], "settings": {}}',
        '{"system": 3, "messages": [], "settings": {}}',
        *(
            f'{{"system": "", "messages": [{{"role": "user", "content": [{part}]}}], "settings": {{}}}}'
            for part in (
                "5",
                "{}",
                '{"type": "text"}',
                '{"type": "image", "path": 5}',
                '{"type": "image", "url": "https://somewhere.example/a.png"}',
                '{"type": "image", "path": "a", "url": "b"}',
                '{"type": ["text"], "text": "a"}',
            )
        ),
        '{"system": "", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
        '[{"type": "image", "path": "a.png"}]}], "settings": {}}',
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(RequestError, match=r"c\.json: this is no conversation that was saved here"):
        Conversation.load(tmp_path / "c.json")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none: cannot be read: No such file"):
        Conversation.load(tmp_path / "none")
    with pytest.raises(RequestError, match="none/c: cannot be written: No such file"):
        Conversation().save(tmp_path / "none/c", {})


def test_a_file_is_kept_if_a_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told(1).save(tmp_path / "c.json", {})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RequestError, match=r"c\.json: cannot be written: the disk is full"):
        told(2).save(tmp_path / "c.json", {})
    assert Conversation.load(tmp_path / "c.json")[0] == told(1)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_half_a_character(tmp_path: Path) -> None:
    """JSON can write it, but UTF-8 cannot."""
    told(1, "\ud83d").save(tmp_path / "c.json", {})
    assert Conversation.load(tmp_path / "c.json")[0] == told(1, "\ud83d")
