"""`gemma-wgpu chat` in a terminal of its own and in a pipe."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pexpect  # type: ignore[import-untyped]
import pytest
import soundfile

from gemma_wgpu import Gemma, load
from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.apps.terminal import Chat, _split
from gemma_wgpu.engine.encoder import Encoding
from gemma_wgpu.engine.request import Request
from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.options import RANGES, Options
from tests.broken_pictures import encoded, picture
from tests.reference import multimodal
from tests.sounds import RATE, made
from tests.tiny import END_OF_TURN, HF, scripted_weights, token, write_folder
from tests.tiny_vision import IMAGE_TOKENS, NOISE, RED, write_sighted, write_tokenizer

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
def sighted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that reads images, and says " home again" in a chat."""
    hf = HF | {"max_position_embeddings": 4096}
    reply = [token("\n"), token("▁home"), token("▁again"), END_OF_TURN]
    scripts = scripted_weights(Gemma3Config.from_hf(hf), [reply])
    return str(write_sighted(tmp_path_factory.mktemp("chat") / "sighted", hf, scripts))


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
    for name in [
        "help",
        "image",
        "system",
        "reset",
        "stats",
        "context",
        "save",
        "load",
        "regenerate",
        "undo",
        "set",
        "exit",
    ]:
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


def test_an_image_in_the_terminal(sighted: str, tmp_path: Path) -> None:
    """The name of its file is completed by the tab key."""
    (tmp_path / "a picture.png").write_bytes(RED)
    chat = Terminal(tmp_path, sighted)
    chat.send(f"/image {tmp_path}/a pi\t")
    chat.wait_for("cture.png")
    chat.send("\r")
    assert "a picture.png, 40 x 30 pixels, goes with the next message." in chat.wait_for(PROMPT).replace("\n", "")
    said = chat.say("What is it?")
    assert "(reading the image: 1 of " in said
    assert "home again" in said
    assert re.search(r"(\d+) of 4,096", chat.say("/context"))
    assert "none.png: there is no such file" in chat.say(f"/image {tmp_path}/none.png").replace("\n", "")
    assert "home again" in chat.say("And now?")
    chat.send("\x04")
    assert chat.ends()


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


@dataclass
class Talk:
    """A chat without a terminal, and what it asks the model."""

    chat: Chat
    conversation: Conversation
    asked: list[Any]
    take: Callable[[str], str]  # returns what is printed


@contextmanager
def talk(
    gemma: Gemma, capsys: pytest.CaptureFixture[str], files: Sequence[Path] = (), *, pan_and_scan: bool = False
) -> Iterator[Talk]:
    asked: list[Any] = []
    conversation = Conversation()
    chat = Chat(gemma, conversation, Options(temperature=0, max_new_tokens=6), files, pan_and_scan=pan_and_scan)
    spoken = gemma.chat

    def spy(messages: Any, **options: Any) -> Any:
        generation = spoken(messages, **options)
        asked.append(generation.request)
        return generation

    def take(line: str) -> str:
        chat._take(line)
        told = capsys.readouterr()
        return told.out + told.err

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "chat", spy)
        capsys.readouterr()
        yield Talk(chat, conversation, asked, take)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    """Return a model that reads images, with random weights."""
    with load(write_sighted(tmp_path_factory.mktemp("chat") / "seeing"), precision="f32") as gemma:
        yield gemma


def part(image: object) -> dict[str, object]:
    return {"type": "image", "image": image}


def test_images_go_with_the_next_message(seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They are seen in each later turn, too, as they were, though they are not encoded again."""
    red, noise = tmp_path / "red.png", tmp_path / "noise.png"
    red.write_bytes(RED)
    noise.write_bytes(NOISE)
    with talk(seeing, capsys) as talking:
        assert "red.png, 40 x 30 pixels" in talking.take(f"/image '{red}'")
        assert "noise.png, 60 x 40 pixels" in talking.take(f"/image {noise}")
        first = talking.take("so")
        messages: list[Any] = [{"role": "user", "content": [part(RED), part(NOISE), {"type": "text", "text": "so"}]}]
        text = seeing.chat(messages, temperature=0, max_new_tokens=6).result()
        assert first == f"{text}\n(cut off: max_new_tokens is reached)\n"
        assert talking.asked[0].stats.encoded_images == 2
        red.unlink()
        noise.write_bytes(RED)
        talking.take("it")
        assert [message["content"] for message in talking.conversation.turns[2::2]] == ["it"]
        assert talking.asked[-1].stats.encoded_images == 0
        assert talking.asked[-1].stats.reused_tokens >= talking.asked[0].stats.prompt_tokens
        assert talking.conversation.tokens(talking.chat._encode) > talking.asked[-1].stats.prompt_tokens
        assert "forgotten" in talking.take("/reset")
        with pytest.raises(RequestError, match="red.png: there is no such file"):
            talking.take(f"/image {red}")


def test_images_are_taken_back(seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "broken.png").write_bytes(RED[:40])
    with talk(seeing, capsys) as talking:
        with pytest.raises(RequestError, match="broken.png"):
            talking.take(f"/image {tmp_path}/broken.png")
        talking.take(f"/image {tmp_path}/red.png")
        assert "No image" in talking.take("/image")
        talking.take("so")
        assert talking.conversation.turns[0]["content"] == "so"
        talking.take(f"/image {tmp_path}/red.png")
        talking.take("so")
        assert len(talking.conversation.images) == 1
        talking.take("/regenerate")
        assert len(talking.conversation.images) == 1
        talking.take("/undo")
        assert talking.conversation.images == []


def test_a_conversation_with_images_is_kept(
    model: str, seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has the paths of the images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red.png").write_bytes(RED)
    with talk(seeing, capsys) as talking:
        talking.take("/image red.png")
        talking.take("so")
        talking.take("/save c.json")
        saved = json.loads((tmp_path / "c.json").read_text())["messages"]
        assert saved[0]["content"][0] == {"type": "image", "path": str(tmp_path / "red.png")}
        talking.take("it")
        told = talking.asked[-1].text
    with talk(seeing, capsys) as talking:
        assert "2 messages" in talking.take("/load c.json")
        talking.take("it")
        assert talking.asked[-1].text == told
    (tmp_path / "red.png").unlink()
    with talk(seeing, capsys) as talking:
        with pytest.raises(RequestError, match="red.png: there is no such file"):
            talking.take("/load c.json")
        assert talking.conversation.turns == []
    with load(model) as gemma, talk(gemma, capsys) as talking:
        with pytest.raises(RequestError, match="c.json: .* reads text only"):
            talking.take("/load c.json")
        with pytest.raises(RequestError, match="reads text only"):
            talking.take("/image red.png")
        assert "home again" in talking.take("so")


def test_crops_of_images_count(seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "long.png").write_bytes(encoded(picture(width=600, height=300), "PNG"))
    counts = []
    for cut in (False, True):
        with talk(seeing, capsys, [tmp_path / "long.png"], pan_and_scan=cut) as talking:
            talking.take("so")
            counts.append(talking.asked[0].stats.prompt_tokens)
            talking.chat._conversation.take_back_reply()
            assert talking.conversation.tokens(talking.chat._encode) == counts[-1]
    assert counts[1] > counts[0] + 2 * IMAGE_TOKENS


def test_files_in_front_of_the_first_message(
    seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "a.txt").write_text("it\n")
    (tmp_path / "latin").write_bytes(b"\xe4")
    with talk(seeing, capsys, [tmp_path / "red.png", tmp_path / "a.txt"]) as talking:
        talking.take("so")
    image, text = talking.conversation.turns[0]["content"]
    assert image == {"type": "image", "path": str(tmp_path / "red.png")}
    assert text == {"type": "text", "text": "a.txt:\n```\nit\n```\n\nso"}
    with pytest.raises(RequestError, match="latin.*UTF-8"), talk(seeing, capsys, [tmp_path / "latin"]):
        pass


def test_ctrl_c_while_an_image_is_read(
    seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is taken back, and the chat goes on."""
    (tmp_path / "new.png").write_bytes(encoded(picture(width=50), "PNG"))
    submit = Encoding.submit

    def interrupted(encoding: Encoding) -> Any:
        signal.raise_signal(signal.SIGINT)
        return submit(encoding)

    with talk(seeing, capsys) as talking:
        talking.take(f"/image {tmp_path}/new.png")
        with monkeypatch.context() as patch:
            patch.setattr(Encoding, "submit", interrupted)
            assert talking.take("so") == "(interrupted; the message is taken back)\n"
        assert talking.conversation.turns == []
        talking.take(f"/image {tmp_path}/new.png")
        talking.take("so")
        assert len(talking.conversation.turns) == 2
        assert talking.asked[-1].stats.encoded_images == 1


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


def test_a_sound_goes_with_the_next_message(
    seeing: Gemma, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is heard as it was, and a conversation that is kept has its path."""
    folder = multimodal.write(tmp_path / "hearing")
    write_tokenizer(folder, 512)
    tone = tmp_path / "tone.wav"
    soundfile.write(tone, made()["tone"], RATE)
    with load(folder, precision="f32", context_length=256) as gemma:
        with talk(gemma, capsys) as talking:
            with pytest.raises(RequestError, match="none.wav: there is no such file"):
                talking.take(f"/audio {tmp_path}/none.wav")
            assert "tone.wav, 1.0 seconds, goes with the next message." in talking.take(f"/audio '{tone}'")
            assert "No sound goes with the next message." in talking.take("/audio")
            talking.take(f"/audio {tone}")
            said = talking.take("so")
            parts: list[Any] = [{"type": "audio", "path": tone}, {"type": "text", "text": "so"}]
            text = gemma.chat([{"role": "user", "content": parts}], temperature=0, max_new_tokens=6).result()
            assert said.startswith(text)
            talking.take(f"/save {tmp_path}/kept.json")
            tone.write_bytes(b"")
            talking.take("it")
            assert talking.asked[-1].stats.encoded_images == 0
        tone.unlink()
        with talk(gemma, capsys) as talking, pytest.raises(RequestError, match="tone.wav: there is no such file"):
            talking.take(f"/load {tmp_path}/kept.json")
    with talk(seeing, capsys) as talking:
        with pytest.raises(RequestError, match="there are sounds in it, and seeing has no ears; load a model that h"):
            talking.take(f"/load {tmp_path}/kept.json")
        with pytest.raises(RequestError, match="tone.wav: seeing has no ears; load a model that hears"):
            talking.take(f"/audio {tone}")
