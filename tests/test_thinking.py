"""Thoughts of a model: told from its answer, shown or hidden, in Python, on the command line and by the server."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from gemma_wgpu import Gemma, Piece, RequestError, load, structured
from gemma_wgpu.apps.cli import main
from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.apps.terminal import Chat
from gemma_wgpu.engine.request import Request
from gemma_wgpu.engine.thoughts import Thoughts
from gemma_wgpu.models import registry
from gemma_wgpu.models.gemma3 import FAMILY, Gemma3Config
from gemma_wgpu.options import Options
from gemma_wgpu.tokens.gemma4_chat import GEMMA4
from gemma_wgpu.tokens.tokenizer import BPETokenizer
from tests.test_server import NAME, serving
from tests.tiny import HF, scripted_weights, write_folder
from tests.vocabulary4 import CONTROL_IDS, small

VOCABULARY = small(
    ["th", "tho", "thou", "gh", "ght", "ght\n", "thought\n", "▁hm", "▁so\n", "▁yes", "▁no", "▁the", "▁end"]
)
PIECES = VOCABULARY.pieces
CONFIG = HF | {"vocab_size": len(PIECES), "max_position_embeddings": 256}
BEGIN, END, TURN_END = (PIECES.index(piece) for piece in ("<|channel>", "<channel|>", "<turn|>"))


def token(piece: str | int) -> int:
    return PIECES.index(f"<0x{piece:02X}>" if isinstance(piece, int) else piece)


def tokens(*pieces: str | int) -> list[int]:
    return [token(piece) for piece in pieces]


REPLY = tokens("<|channel>", "thought\n", "▁hm", 0xE2, 0x82, 0xAC, "▁so\n", "<channel|>", "▁yes", "▁the", "▁end")
THOUGHT, ANSWER = " hm€ so\n", " yes the end"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
CALLED: list[dict[str, Any]] = [
    *ASKED,
    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "tool_call_id": "1", "content": "y"},
]


# One text, without a model.


TOKENIZER = BPETokenizer(*VOCABULARY)


def told(ids: Sequence[int], *, shown: bool = True, prompt: Sequence[int] = (2,), **options: Any) -> Request:
    """Return a text of which these tokens have come, with all of its pieces."""
    thoughts = Thoughts(BEGIN, END, wanted=True, shown=shown)
    request = Request(TOKENIZER, prompt, Options(**options), 100, thoughts=thoughts)
    request.begin()
    for each in ids:
        if not request.ended:
            request.push(each)
    request.end("interrupted")
    return request


def parted(request: Request) -> tuple[str, str]:
    """Return the text of the pieces of thoughts, and that of the others."""
    return tuple("".join(piece for piece in request.pieces if piece.is_thought == which) for which in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("shown", [True, False])
def test_a_thought_is_told_from_the_answer(shown: bool) -> None:
    request = told([*REPLY, TURN_END], shown=shown)
    assert (request.thought, request.answer) == (THOUGHT, ANSWER)
    assert request.text == (THOUGHT + ANSWER if shown else ANSWER)
    assert parted(request) == (THOUGHT if shown else "", ANSWER)
    assert request.ids == REPLY
    assert [piece.ids for piece in request.pieces] == [(each,) for each in REPLY]
    assert request.stats.finish_reason == "eos"


def test_a_name_of_several_tokens_is_left_out() -> None:
    named = tokens("<|channel>", "thou", "g", "h", "t", "\n", "▁hm", "\n", "a", "<channel|>", "▁yes")
    assert told(named).thought == " hm\na"
    assert told(tokens("<|channel>", "thou", "ght\n", "<channel|>", "▁yes")).text == " yes"


def test_an_answer_without_a_thought() -> None:
    assert told(tokens("▁yes", "\n", "▁the")).answer == " yes\n the"


def test_an_end_without_a_beginning_is_nothing() -> None:
    request = told(tokens("▁yes", "<channel|>", "▁the"))
    assert (request.thought, request.answer) == ("", " yes the")


def test_a_thought_that_the_prompt_began() -> None:
    prompt = tokens("<bos>", "<|channel>", "thought\n", "<channel|>", "a", "<|channel>", "thought\n")
    request = told(tokens("▁hm", "\n", "<channel|>", "▁yes"), prompt=prompt)
    assert (request.thought, request.answer) == (" hm\n", " yes")
    assert told(tokens("▁hm"), prompt=prompt[:-2]).answer == " hm"


def test_half_a_character_does_not_cross_over() -> None:
    request = told(tokens("a", 0xE2, "<|channel>", "thought\n", 0xE2, 0x82, "<channel|>", 0xAC, "b"))
    assert (request.answer, request.thought) == ("a\ufffd\ufffdb", "\ufffd\ufffd")


def test_stop_strings_are_of_the_answer() -> None:
    request = told(REPLY, stop=" hm")
    assert (request.thought, request.answer, request.stats.finish_reason) == (THOUGHT, ANSWER, "interrupted")
    request = told(REPLY, stop=["s the", " so"])
    assert (request.answer, request.stats.finish_reason) == (" ye", "stop")
    # What might be the beginning of one comes out where a thought begins.
    request = told([*tokens("a", "b"), *REPLY], stop="bc")
    assert request.answer == f"ab{ANSWER}"
    assert parted(request) == (THOUGHT, f"ab{ANSWER}")
    request = told([*tokens(0xC3, "<|channel>", "a")], stop="\ufffd")
    assert (request.text, request.stats.finish_reason) == ("", "stop")


def test_the_most_tokens_are_of_thought_and_answer() -> None:
    request = told(REPLY, max_new_tokens=4)
    assert (request.thought, request.answer, request.stats.finish_reason) == (" hm\ufffd", "", "length")
    request = told(REPLY, max_new_tokens=9)
    assert (request.thought, request.answer, request.stats.finish_reason) == (THOUGHT, " yes", "length")


# A model that was written to think, with Gemma 4's chats.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a Gemma 3 that answers as a Gemma 4 does, which loads as one while this fixture lasts."""
    scripts = [[token("\n"), *REPLY, TURN_END]]
    weights = scripted_weights(Gemma3Config.from_hf(CONFIG), scripts)
    path = write_folder(tmp_path_factory.mktemp("thinking"), CONFIG, weights, VOCABULARY, CONTROL_IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", [replace(FAMILY, chat=GEMMA4)])
        yield path


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32") as gemma:
        yield gemma


@pytest.mark.parametrize(
    ("thinking", "text"),
    [("show", THOUGHT + ANSWER), ("hide", ANSWER), ("off", ANSWER)],
    ids=lambda each: each.strip(),
)
def test_a_chat(gemma: Gemma, thinking: str, text: str) -> None:
    generation = gemma.chat("x", thinking=thinking, temperature=0)
    pieces = list(generation)
    assert "".join(pieces) == generation.text == text
    assert (generation.thought, generation.answer) == (THOUGHT, ANSWER)
    assert generation.ids == REPLY
    assert [piece.is_thought for piece in pieces] == [True] * 8 + [False] * 3
    prompt = gemma.tokenizer.decode(gemma.chat_ids("x", thinking=thinking))
    assert prompt.startswith("<bos><|turn>user" if thinking == "off" else "<bos><|turn>system\n<|think|>\n<turn|>")


def test_chats_side_by_side(gemma: Gemma) -> None:
    generations = gemma.chat(["x", "y"], thinking="hide", temperature=0)
    assert generations.result() == generations.answers == [ANSWER, ANSWER]
    assert generations.thoughts == [THOUGHT, THOUGHT]


def test_a_reply_to_what_a_tool_returned(gemma: Gemma) -> None:
    """The prompt begins the thought, and the script goes on in it."""
    assert gemma.tokenizer.decode(gemma.chat_ids(CALLED, thinking="show")).endswith("<|channel>thought\n")
    generation = gemma.chat(CALLED, thinking="show", temperature=0)
    assert str(generation) == THOUGHT + ANSWER
    assert generation.thought == THOUGHT
    assert generation.ids == REPLY[2:]


@pytest.mark.parametrize("messages", [ASKED, CALLED])
def test_a_constraint_is_for_the_answer(gemma: Gemma, messages: list[Any]) -> None:
    form = structured.choice([" no", " the end"])
    generation = gemma.chat(messages, thinking="hide", temperature=0, constraint=form)
    assert str(generation) in (" no", " the end")
    assert generation.thought == THOUGHT
    assert generation.stats.finish_reason == "eos"
    generation = gemma.chat(ASKED, temperature=0, constraint=form)
    assert str(generation) in (" no", " the end")
    assert generation.thought == ""


def test_a_thought_under_a_constraint_does_not_end_the_text(gemma: Gemma) -> None:
    thoughts = Thoughts(BEGIN, END, wanted=True, shown=True)
    matcher = gemma._grammars.matcher(structured.choice(["no"]))
    request = Request(gemma.tokenizer, [2], Options(), 100, matcher, thoughts=thoughts)
    assert request.mask is not None

    def allowed() -> set[int]:
        mask = request.mask() if request.mask else np.zeros(0, np.uint32)
        return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    request.begin()
    first = allowed()
    assert BEGIN in first and token("n") in first and token("a") not in first
    request.push(BEGIN)
    assert allowed() >= set(range(len(PIECES))) - gemma.tokenizer.eos_ids
    assert not allowed() & gemma.tokenizer.eos_ids
    request.push(END)
    assert allowed() == first - {BEGIN}


def test_what_cannot_be_asked_for(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="thinking is 'on'; it must be one of show, hide, off") as caught:
        gemma.chat("x", thinking="on")
    assert caught.value.option == "thinking"
    monkeypatch.setattr(gemma, "family", FAMILY)
    for thinking in ("show", "hide"):
        with pytest.raises(RequestError, match="this model was not trained to think before it answers"):
            gemma.chat("x", thinking=thinking)
    with pytest.raises(RequestError, match="does not think before it answers; load a Gemma 4"):
        Chat(gemma, Conversation(), Options(), [], thinking="show")


# The command line.


def run(folder: Path, *command: str) -> str:
    result = CliRunner().invoke(main, [*command, "--model", str(folder), "--precision", "f32", "--temperature", "0"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("thinking", "text"), [("show", f"{THOUGHT}\n{ANSWER}\n"), ("hide", f"{ANSWER}\n")])
def test_generate(folder: Path, thinking: str, text: str) -> None:
    assert run(folder, "generate", "x", "--chat", "-q", "--thinking", thinking) == text
    result = json.loads(run(folder, "generate", "x", "--chat", "--json", "--thinking", thinking))
    assert (result["text"], result.get("thought")) == (ANSWER, THOUGHT if thinking == "show" else None)


def test_generate_thinks_in_chats_alone(folder: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "x", "--thinking", "show", "--model", str(folder)])
    assert result.exit_code == 2
    assert "--thinking is for chats; add --chat" in result.output


def test_batch(folder: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"custom_id": "shown", "messages": ASKED},
        {"custom_id": "off", "messages": ASKED, "thinking": "off"},
        {"custom_id": "prompt", "prompt": "\n"},
        {"custom_id": "wrong", "messages": ASKED, "thinking": True},
    ]
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(source), str(out), "--model", str(folder), "--temperature", "0", "--thinking", "show"]
    assert CliRunner().invoke(main, command).exit_code == 1
    results = {result["custom_id"]: result for result in map(json.loads, out.read_text().splitlines())}
    assert (results["shown"]["text"], results["shown"]["thought"]) == (ANSWER, THOUGHT)
    assert results["off"]["text"] == ANSWER and "thought" not in results["off"]
    assert results["prompt"]["text"].endswith(ANSWER) and "thought" not in results["prompt"]
    assert results["wrong"]["error"] == "thinking is True; it must be one of show, hide, off"


# The terminal.


def talk(gemma: Gemma, thinking: str) -> tuple[Chat, Conversation]:
    conversation = Conversation()
    return Chat(gemma, conversation, Options(temperature=0), [], thinking=thinking), conversation


def test_a_conversation_keeps_answers(gemma: Gemma, capsys: pytest.CaptureFixture[str]) -> None:
    chat, conversation = talk(gemma, "show")
    chat._take("x")
    assert capsys.readouterr().out == f"{THOUGHT}\n{ANSWER}\n"
    assert conversation.turns[1] == {"role": "assistant", "content": ANSWER}
    assert "<|think|>" in gemma.tokenizer.decode(chat._encode(conversation.messages))
    chat._take("/think hide")
    chat._take("x")
    told = capsys.readouterr()
    assert told.out == f"{ANSWER}\n"
    assert "The model thinks, unseen, before it answers." in told.err
    chat._take("/think off")
    assert "<|think|>" not in gemma.tokenizer.decode(chat._encode(conversation.messages))
    with pytest.raises(RequestError, match="thinking is ''; it must be one of show, hide, off"):
        chat._take("/think")


@pytest.mark.parametrize("thinking", ["show", "hide"])
def test_thoughts_in_a_terminal(gemma: Gemma, thinking: str) -> None:
    chat, _ = talk(gemma, thinking)
    chat._console = Console(force_terminal=True, width=80, record=True)
    chat._take("x")
    shown = chat._console.export_text(styles=True)
    assert "yes the end" in shown
    assert ("\x1b[2m hm€ so" in shown) == (thinking == "show")
    assert ("(thinking: 8 tokens)" in shown) == (thinking == "hide")


def test_an_interrupted_thought_is_taken_back(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, conversation = talk(gemma, "show")

    def show(pieces: Iterator[Piece]) -> None:
        next(pieces), next(pieces), next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_show", show)
    chat._take("x")
    assert conversation.turns == []


# The server.


@pytest.fixture(scope="module")
def url(gemma: Gemma) -> Iterator[str]:
    with serving(gemma) as served:
        yield f"{served.url}/v1/chat/completions"


def ask(url: str, messages: list[Any] = ASKED, **options: Any) -> httpx.Response:
    body = {"model": NAME, "messages": messages, "temperature": 0, **options}
    return httpx.post(url, json=body, timeout=60)


@pytest.mark.parametrize(
    ("options", "thought"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, None),
        ({"reasoning_effort": "low"}, THOUGHT),
        ({"reasoning_effort": "high", "include_reasoning": False}, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, THOUGHT),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
    ],
)
def test_replies_of_the_server(url: str, gemma: Gemma, options: dict[str, Any], thought: str | None) -> None:
    reply = ask(url, logprobs=True, **options).json()
    choice = reply["choices"][0]
    thinking = "hide" if "include_reasoning" in options else "off" if thought is None else "show"
    assert reply["usage"]["prompt_tokens"] == len(gemma.chat_ids(ASKED, thinking=thinking))
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["message"] == (message if thought is None else message | {"reasoning_content": thought})
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [" yes", " the", " end"]
    events = ask(url, stream=True, **options).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thought or "")
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert sum("reasoning_content" in delta for delta in deltas) == (
        0 if thought is None else 2
    )  # € comes with the token after it


def test_a_reply_can_be_sent_back(url: str, gemma: Gemma) -> None:
    reply = ask(url, reasoning_effort="low").json()["choices"][0]["message"]
    again = ask(url, [*ASKED, reply, *ASKED]).json()
    expected = [*ASKED, {"role": "assistant", "content": ANSWER}, *ASKED]
    assert again["usage"]["prompt_tokens"] == len(gemma.chat_ids(expected))


def test_what_the_server_refuses(url: str, gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(url, reasoning_effort="much").status_code == 400
    assert ask(url, chat_template_kwargs={"other": True}).status_code == 400
    monkeypatch.setattr(gemma, "family", FAMILY)
    asked: dict[str, Any] = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}}
    for param in asked:
        answer = ask(url, **{param: asked[param]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert error["message"] == f"{NAME} does not think before it answers; leave {param} out"
