"""`gemma-wgpu chat` in a terminal of its own and in a pipe."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect  # type: ignore[import-untyped]
import pytest

from gemma_wgpu import load
from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.apps.terminal import Chat, _split
from gemma_wgpu.engine.request import Request
from gemma_wgpu.errors import DeviceError
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.options import RANGES, Options
from tests.tiny import END_OF_TURN, HF, scripted_weights, token, write_folder

pytestmark = pytest.mark.slow

COMMAND = str(Path(sys.executable).with_name("gemma-wgpu"))
PROMPT = "tokens lef"  # at the right of the prompt; the last letter comes apart, at the edge
# These characters tell the terminal about colours, the cursor and the like.
CONTROL = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[()][0-9A-Z]|[=>])|[\r\x07]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that says " home again" in a chat."""
    hf = HF | {"max_position_embeddings": 4096}
    reply = [token("\n"), token("▁home"), token("▁again"), END_OF_TURN]
    scripts = scripted_weights(Gemma3Config.from_hf(hf), [reply])
    return str(write_folder(tmp_path_factory.mktemp("chat") / "homing", hf, scripts))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that never stops."""
    hf = HF | {"max_position_embeddings": 1 << 17, "sliding_window_pattern": 100}
    script = [token("\n"), *map(token, "xyzx")]
    return str(
        write_folder(
            tmp_path_factory.mktemp("chat") / "endless", hf, scripted_weights(Gemma3Config.from_hf(hf), [script])
        )
    )


class Terminal:
    """A chat in a terminal of 100 columns."""

    def __init__(self, home: Path, model: str, *arguments: str) -> None:
        environment = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = ["chat", "--model", model, "--temperature", "0", *arguments]
        self._child = pexpect.spawn(
            COMMAND, command, env=environment, encoding="utf-8", dimensions=(30, 100), timeout=30
        )
        self.wait_for(PROMPT)

    def wait_for(self, text: str) -> str:
        """Return what is shown until `text` is."""
        self._child.expect_exact(text)
        return CONTROL.sub("", self._child.before)

    def say(self, line: str) -> str:
        """Enter a line; return what is shown until the next prompt."""
        self._child.send(line + "\r")
        return self.wait_for(PROMPT)

    def send(self, keys: str) -> None:
        self._child.send(keys)

    def ends(self) -> bool:
        self._child.expect(pexpect.EOF)
        self._child.close()
        return self._child.exitstatus == 0


@pytest.fixture
def terminal(model: str, tmp_path: Path) -> Iterator[Terminal]:
    chat = Terminal(tmp_path, model)
    yield chat
    chat._child.close(force=True)


def test_every_command(terminal: Terminal, tmp_path: Path) -> None:
    assert "home again" in terminal.say("Where do you go?")
    help_text = terminal.say("/help")
    for name in ["help", "system", "reset", "stats", "context", "save", "load", "regenerate", "undo", "set", "exit"]:
        assert f"/{name} " in help_text
    assert re.search(r"reply +3 tokens, .* a second \(eos\)", terminal.say("/stats"))
    used = re.search(r"(\d+) of 4,096 tokens of context used", terminal.say("/context"))
    assert used and 20 < int(used[1]) < 60
    assert "The system text is set." in terminal.say("/system Be brief.")
    assert "home again" in terminal.say("And then?")
    assert "home again" in terminal.say("/regenerate")
    assert "taken back" in terminal.say("/undo")
    assert re.search(r"temperature +0.7", terminal.say("/set temperature 0.7"))
    assert "it must be a number from 0 to 100" in terminal.say("/set temperature 101")
    assert "there is no setting 'heat'" in terminal.say("/set heat 1")
    assert "there is no setting 'stop'" in terminal.say("/set stop x")
    assert "it must be a number" in terminal.say("/set top_p much")
    assert "it must be a whole number" in terminal.say("/set top_k 0.5")
    assert re.search(r"seed +5\b", terminal.say("/set seed 5"))
    listed = terminal.say("/set")
    for name, value in {"max_new_tokens": "none", "temperature": "0.7", "top_k": "64", "seed": "5"}.items():
        assert re.search(rf"{name} +{value}", listed)
    assert re.search(r"seed +none", terminal.say("/set seed none"))
    assert "Saved" in terminal.say(f"/save {tmp_path}/c.json")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved["system"] == "Be brief."
    assert saved["messages"] == [
        {"role": "user", "content": "Where do you go?"},
        {"role": "assistant", "content": " home again"},
    ]
    assert set(saved["settings"]) == set(RANGES)
    assert saved["settings"]["temperature"] == 0.7
    assert "forgotten" in terminal.say("/reset")
    assert "there is nothing to take back" in terminal.say("/undo")
    assert "there is no reply yet" in terminal.say("/regenerate")
    terminal.say("/set temperature 0.1")
    assert "2 messages" in terminal.say(f"/load {tmp_path}/c.json")
    assert re.search(r"temperature +0.7", terminal.say("/set"))
    for settings, message in (({"stop": "x"}, "there is no setting 'stop'"), ({"top_p": 3}, "top_p is 3")):
        (tmp_path / "wrong.json").write_text(json.dumps(saved | {"settings": settings}))
        assert message in terminal.say(f"/load {tmp_path}/wrong.json").replace("\n", "")
    assert "cannot be read" in terminal.say(f"/load {tmp_path}/none.json")
    assert "there is no command /dance; /help lists them" in terminal.say("/dance")
    terminal.send("/exit\r")
    assert terminal.ends()


def test_keys(terminal: Terminal) -> None:
    """Type several lines between quotes, a line that is edited, the history, Ctrl-C at the prompt, and Ctrl-D."""
    terminal.send('"""one\r')
    terminal.wait_for("...")
    terminal.send('two"""\r')
    assert "home again" in terminal.wait_for(PROMPT)
    terminal.send("/stXts\x1b[D\x1b[D\x7fa\r")
    assert "prompt" in terminal.wait_for(PROMPT)
    terminal.send("\x1b[A\r")
    assert "prompt" in terminal.wait_for("reply")
    terminal.wait_for(PROMPT)
    terminal.send("rubbish\x03")
    terminal.wait_for(PROMPT)
    assert "4,096" in terminal.say("/context")
    terminal.send("\x04")
    assert terminal.ends()


def test_ctrl_c_ends_the_reply_alone(endless: str, tmp_path: Path) -> None:
    chat = Terminal(tmp_path, endless)
    chat.send("hello\r")
    chat.wait_for("xyzxyz")
    chat.send("\x03")
    assert "(interrupted)" in chat.wait_for(PROMPT)
    assert "(cut off: max_new_tokens is reached)" in chat.say("/set max_new_tokens 3") + chat.say("hello again")
    chat.send("\x04")
    assert chat.ends()


def test_a_full_context(model: str, tmp_path: Path) -> None:
    chat = Terminal(tmp_path, model, "--context-length", "160", "-p", "Be brief.")
    replies = [chat.say("tell me more about that") for _ in range(8)]
    assert all("home again" in reply for reply in replies)
    said = r"The context is full: the oldest \d+ messages were dropped. The system text stays."
    assert re.search(said, "".join(replies))
    assert "Shorten it" in chat.say("x" * 200)
    assert "home again" in chat.say("and now?")


def piped(model: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "chat", "--model", model, "--temperature", "0", *arguments]
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=60)


def test_in_a_pipe(model: str, tmp_path: Path) -> None:
    """The replies alone go to the standard output, all else goes to the standard error."""
    (tmp_path / "notes.txt").write_text("some notes\n")
    chat = piped(
        model, f'hello\n"""two\nlines"""\n/nonsense\n/save {tmp_path}/c.json\n', "-f", f"{tmp_path}/notes.txt"
    )
    assert chat.returncode == 0
    assert chat.stdout == " home again\n home again\n"
    assert "there is no command /nonsense" in chat.stderr
    messages = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert messages[0]["content"] == "notes.txt:\n```\nsome notes\n```\n\nhello"
    assert messages[2]["content"] == "two\nlines"


def test_text_that_is_no_utf_8(model: str) -> None:
    command = [COMMAND, "chat", "--model", model, "--temperature", "0"]
    chat = subprocess.run(command, input=b"\xff\nhello\n", capture_output=True, timeout=60)
    assert (chat.returncode, chat.stdout, chat.stderr) == (0, b" home again\n home again\n", b"")


def test_a_message_whose_reply_fails_is_taken_back(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next message can be answered."""

    def fail(*_: object) -> None:
        raise DeviceError("the GPU is gone")

    with load(model) as gemma:
        conversation = Conversation()
        chat = Chat(gemma, conversation, Options(temperature=0), ())
        with monkeypatch.context() as patch, pytest.raises(DeviceError):
            patch.setattr(Request, "push", fail)
            chat._take("hello")
        assert conversation.turns == []
        chat._take("hello again")
    assert capsys.readouterr().out.endswith(" home again\n")


def test_options_that_are_wrong(model: str, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    for arguments, message in (
        (["--top-p", "3"], "top_p is 3.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["-f", f"{tmp_path}/binary"], "cannot be read as text"),
    ):
        chat = piped(model, "hello\n", *arguments)
        assert chat.returncode == 1
        assert chat.stderr.startswith("Error: ")
        assert message in chat.stderr


@pytest.mark.parametrize(
    ("text", "done", "rest"),
    [
        ("a\n\nb\n\nc", "a\n\nb", "c"),
        ("a", "", "a"),
        ("```\na\n\nb", "", "```\na\n\nb"),
        ("a\n\n```\na\n\nb\n```\n\nc", "a\n\n```\na\n\nb\n```", "c"),
        ("a\n\n```\na\n\nb", "a", "```\na\n\nb"),
    ],
)
def test_paragraphs_are_shown_when_they_are_whole(text: str, done: str, rest: str) -> None:
    assert _split(text) == (done, rest)
