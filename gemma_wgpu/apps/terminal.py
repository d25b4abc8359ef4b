"""The command `gemma-wgpu chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from gemma_wgpu import pictures, sounds
from gemma_wgpu.apps.conversation import Conversation, spoken
from gemma_wgpu.engine.request import Piece, Stats
from gemma_wgpu.engine.thoughts import wants
from gemma_wgpu.errors import GemmaError, RequestError
from gemma_wgpu.files import reason
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.options import RANGES, Options
from gemma_wgpu.progress import Progress
from gemma_wgpu.tokens.messages import Message

if TYPE_CHECKING:
    from PIL.Image import Image

_QUOTES = '"""'
_FENCE = "```"


@dataclass(frozen=True)
class _Opened:
    """An image of the conversation, and how many crops of it the model sees beside it."""

    image: Image
    crops: int


class Chat:
    """Reads lines, and shows what the model says to them. Lines that begin with a slash are commands.

    The contents of `files` go in front of the first message. `thinking` is what the model is asked for at first: see
    `Gemma.chat`. With `pan_and_scan`, long images are followed by crops of them. Raises RequestError if a file can be
    read neither as text nor as an image, if it is an image and the model reads text only, and if the model is to
    think but does not.
    """

    def __init__(
        self,
        gemma: Gemma,
        conversation: Conversation,
        options: Options,
        files: Iterable[Path],
        *,
        thinking: str = "off",
        pan_and_scan: bool = False,
    ) -> None:
        self._gemma = gemma
        self._thinking = self._checked_thinking(thinking)
        self._conversation = conversation
        self._options = options
        self._pan_and_scan = pan_and_scan
        self._console = Console(highlight=False)
        self._notes = self._console if self._console.is_terminal else Console(stderr=True, highlight=False)
        self._stats: Stats | None = None
        self._over = False
        self._live: Live | None = None  # while a reply comes
        # Images and sounds stay as they were when they were opened, whatever becomes of the files.
        self._opened: dict[Path, _Opened] = {}
        self._heard: dict[Path, NDArray[np.float32]] = {}
        self._images: list[Path] = []  # for the next message, as these sounds and texts are
        self._sounds: list[Path] = []
        self._files = [text for path in files if (text := self._read(path)) is not None]

    def run(self) -> None:
        """Talk until /exit, or the end of the input. Raises OSError if the standard output cannot be written."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._note(f"{self._gemma.name}, {self._gemma.quantization}. /help lists the commands, Ctrl-D leaves.")
        for line in self._lines() if interactive else _piped():
            try:
                self._take(line.strip())
            except GemmaError as error:
                self._notes.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
            except KeyboardInterrupt:
                self._note("(interrupted)")
            if self._over:
                break

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in _COMMANDS:
                raise RequestError(f"there is no command /{name}; /help lists them")
            _COMMANDS[name](self, argument.strip())
        elif line:
            text = line.removeprefix(_QUOTES).removesuffix(_QUOTES).strip()
            self._conversation.say("\n\n".join([*self._files, text]), self._images, self._sounds)
            self._files.clear()
            self._images.clear()
            self._sounds.clear()
            self._answer()

    def _answer(self) -> None:
        """Reply to the last message. If that fails, or is interrupted before there is text, it is taken back."""
        try:
            self._opened = {path: self._open(path) for path in self._conversation.images}  # the others have gone
            self._heard = {path: self._hear(path) for path in self._conversation.sounds}
            dropped = self._conversation.fit(self._encode, self._gemma.context_length)
            generation = self._gemma.chat(
                [self._with_media(message) for message in self._conversation.messages],
                thinking=self._thinking,
                pan_and_scan=self._pan_and_scan,
                progress=self._show_progress,
                options=self._options,
            )
            if dropped:
                kept = " The system text stays." if self._conversation.system else ""
                self._note(f"The context is full: the oldest {dropped} messages were dropped.{kept}")
            self._stats = generation.stats
            try:
                self._show(generation)
            except KeyboardInterrupt:
                if not generation.answer:
                    raise
                self._note("(interrupted)")
        except KeyboardInterrupt:
            self._conversation.undo()
            self._note("(interrupted; the message is taken back)")
            return
        except GemmaError:
            self._conversation.undo()
            raise
        self._conversation.reply(generation.answer)
        if generation.stats.finish_reason in ("context", "length"):
            full = (
                "the context is full" if generation.stats.finish_reason == "context" else "max_new_tokens is reached"
            )
            self._note(f"(cut off: {full})")

    def _show(self, pieces: Iterator[Piece]) -> None:
        """Print the text as it comes: plain into a pipe, and as Markdown, paragraph by paragraph, in a terminal.

        In a terminal a thought is dim. If it is hidden, its tokens are counted while it comes.
        """
        if not self._console.is_terminal:
            for text, _ in spoken(pieces):
                print(text, end="", flush=True)
            print(flush=True)
            return
        paragraph, is_thought, thought = "", False, 0
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                for piece in pieces:
                    if piece.is_thought and self._thinking != "show":
                        thought += 1
                        live.update(Text(f"(thinking: {thought:,} tokens)", style="dim"), refresh=True)
                        continue
                    if piece.is_thought != is_thought:
                        if paragraph:
                            live.console.print(_printed(paragraph, is_thought))
                        paragraph, is_thought = "", piece.is_thought
                    paragraph += piece.text
                    done, paragraph = _split(paragraph)
                    if done:
                        live.console.print(_printed(done, is_thought))
                    live.update(_printed(paragraph, is_thought), refresh=True)
            finally:
                self._live = None
                live.update("", refresh=True)
                live.console.print(_printed(paragraph, is_thought))

    def _show_progress(self, progress: Progress) -> None:
        """Show how far the encoding of an image is, in the place where the reply will stand."""
        if self._live:
            what = f"{progress.what}: {progress.done} of {progress.total} {progress.unit}"
            self._live.update(Text(f"({what})", style="dim"), refresh=True)

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, soft_wrap=True)

    def _lines(self) -> Iterator[str]:
        open_quotes = Condition(lambda: _is_open(session.default_buffer.text))
        session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=open_quotes,
            completer=_Completer(),
            complete_while_typing=False,
            rprompt=self._left,
        )
        while True:
            try:
                yield session.prompt(">>> ", prompt_continuation="... ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def _left(self) -> str:
        if get_app().is_done:  # the line was entered, and stays in the terminal
            return ""
        most = self._gemma.context_length
        return f"{max(0, most - self._used):,} of {most:,} tokens left"

    @property
    def _used(self) -> int:
        return self._conversation.tokens(self._encode)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the prompt of the conversation's messages, without a look at the pixels of images."""
        gemma = self._gemma
        crops = [self._open(path).crops for path in self._conversation.images]
        return gemma.family.chat.encode(
            gemma.tokenizer, messages, thinking=wants(self._thinking), media=gemma.media_tokens, crops=crops
        )

    def _with_media(self, message: Message) -> Message:
        """Return a message of the conversation with its images and sounds in the place of their paths."""
        content = message["content"]
        if not isinstance(content, list):
            return message
        return {**message, "content": [self._with_medium(part) for part in content]}

    def _with_medium(self, part: Mapping[str, str]) -> Mapping[str, object]:
        if part["type"] == "image":
            return {"type": "image", "image": self._open(Path(part["path"])).image}
        if part["type"] == "audio":
            return {"type": "audio", "audio": self._hear(Path(part["path"]))}
        return part

    def _open(self, path: Path) -> _Opened:
        """Return an image. Raises RequestError if it cannot be read."""
        if path not in self._opened:
            image = pictures.opened(path)
            self._opened[path] = _Opened(image, len(pictures.crops(image)) if self._pan_and_scan else 0)
        return self._opened[path]

    def _hear(self, path: Path) -> NDArray[np.float32]:
        """Return the features of a sound. Raises RequestError if it cannot be read."""
        if path not in self._heard:
            self._heard[path] = sounds.features_of(path)
        return self._heard[path]

    def _attach(self, path: Path) -> None:
        """Put an image in front of the next message. Raises RequestError if it cannot be read, or not seen."""
        if self._gemma.vision is None:
            raise RequestError(f"{path}: {self._gemma.name} reads text only; load a model that reads images")
        path = path.absolute()
        self._opened.pop(path, None)  # the file may have changed
        width, height = self._open(path).image.size
        self._images.append(path)
        self._note(f"{path.name}, {width:,} x {height:,} pixels, goes with the next message.")

    def _read(self, path: Path) -> str | None:
        """Return a text that goes in front of the next message, or attach an image."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {reason(error)}") from error
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if self._gemma.vision is None:
                raise RequestError(
                    f"{path}: cannot be read as text: it is not UTF-8 ({error.reason}), and {self._gemma.name} reads "
                    "no images"
                ) from error
            try:
                self._attach(path)
            except RequestError as refusal:
                raise RequestError(f"{refusal}; if it is a text, save it as UTF-8") from refusal
            return None
        return f"{path.name}:\n{_FENCE}\n{text.rstrip()}\n{_FENCE}"

    # The commands.

    def _help(self, _: str) -> None:
        """Show this list."""
        for name, command in _COMMANDS.items():
            self._console.print(f"/{name:<12}{command.__doc__}", markup=False)
        self._console.print('"""          begins and ends a message of several lines')
        self._console.print("Ctrl-C       interrupts the reply; Ctrl-D leaves")

    def _image(self, path: str) -> None:
        """Show an image with the next message: /image FILE. Without FILE, none is shown."""
        if path:
            self._attach(_path(path.strip("'\"")))  # terminals quote what is dropped on them
        else:
            self._images.clear()
            self._note("No image goes with the next message.")

    def _audio(self, path: str) -> None:
        """Let a sound be heard with the next message: /audio FILE. Without FILE, none is heard."""
        if not path:
            self._sounds.clear()
            self._note("No sound goes with the next message.")
            return
        file = _path(path.strip("'\""))
        if "sound" not in self._gemma.media_tokens:
            raise RequestError(f"{file}: {self._gemma.name} has no ears; load a model that hears, as Gemma 3n does")
        file = file.absolute()
        self._heard.pop(file, None)  # the file may have changed
        seconds = len(self._hear(file)) / 100
        self._sounds.append(file)
        self._note(f"{file.name}, {seconds:,.1f} seconds, goes with the next message.")

    def _system(self, text: str) -> None:
        """Set how the model is to behave: /system TEXT. Without TEXT, nothing is asked of it."""
        self._conversation.system = text
        self._note("The system text is set." if text else "The system text is removed.")

    def _reset(self, _: str) -> None:
        """Begin anew, with the same system text."""
        self._conversation.turns.clear()
        self._images.clear()
        self._sounds.clear()
        self._opened.clear()
        self._heard.clear()
        self._note("The conversation is forgotten.")

    def _statistics(self, _: str) -> None:
        """Show the figures of the last reply."""
        if self._stats is None:
            raise RequestError("there is no reply yet")
        stats = self._stats
        self._console.print(
            f"prompt   {stats.prompt_tokens:,} tokens, {stats.reused_tokens:,} of them known already, "
            f"in {stats.prefill_seconds:.2f} s ({stats.prefill_tokens_per_second:.1f} a second)\n"
            f"reply    {stats.new_tokens:,} tokens, {stats.decode_tokens_per_second:.1f} a second "
            f"({stats.finish_reason})\n"
            f"memory   {sum(self._gemma.gpu_bytes.values()) / 1e6:,.0f} MB on {self._gemma.device.info}"
        )

    def _think(self, thinking: str) -> None:
        """Let the model think before it answers: /think show, /think hide or /think off."""
        self._thinking = self._checked_thinking(thinking)
        what = {
            "show": "thinks before it answers",
            "hide": "thinks, unseen, before it answers",
            "off": "answers at once",
        }
        self._note(f"The model {what[thinking]}.")

    def _checked_thinking(self, thinking: str) -> str:
        """Return what the model is asked for. Raises RequestError if it cannot do so."""
        if wants(thinking) and self._gemma.family.chat.thoughts is None:
            raise RequestError(f"{self._gemma.name} does not think before it answers; load a Gemma 4")
        return thinking

    def _context(self, _: str) -> None:
        """Show how full the context is."""
        self._console.print(f"{self._used:,} of {self._gemma.context_length:,} tokens of context used")

    def _save(self, path: str) -> None:
        """Write the conversation to a file: /save FILE."""
        self._conversation.save(_path(path), self._settings)
        self._note(f"Saved to {path}.")

    def _load(self, path: str) -> None:
        """Go on with a conversation that was saved: /load FILE."""
        conversation, settings = Conversation.load(_path(path))
        try:
            for name in settings:
                _check_setting(name)
            self._options = Options(**settings)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error
        if conversation.images and self._gemma.vision is None:
            raise RequestError(
                f"{path}: there are images in it, and {self._gemma.name} reads text only; load a model that reads "
                "images"
            )
        if conversation.sounds and "sound" not in self._gemma.media_tokens:
            raise RequestError(
                f"{path}: there are sounds in it, and {self._gemma.name} has no ears; load a model that hears"
            )
        for image in conversation.images:
            self._open(image)
        for sound in conversation.sounds:
            self._hear(sound)
        self._conversation = conversation
        self._note(f"{len(conversation.turns)} messages.")

    def _regenerate(self, _: str) -> None:
        """Generate another reply to the last message."""
        if not self._conversation.take_back_reply():
            raise RequestError("there is no reply yet")
        self._answer()

    def _undo(self, _: str) -> None:
        """Take back the last message and its reply."""
        if not self._conversation.undo():
            raise RequestError("there is nothing to take back")
        self._note("The last message is taken back.")

    def _set(self, argument: str) -> None:
        """Change a setting, for example /set temperature 0.7. Without a name, list all of them."""
        if argument:
            name, _, text = argument.partition(" ")
            _check_setting(name)
            changed: dict[str, Any] = {name: _number(name, text.strip())}
            self._options = replace(self._options, **changed)
        for name, value in self._settings.items():
            self._console.print(f"{name:<20}{'none' if value is None else value}")

    @property
    def _settings(self) -> dict[str, Any]:
        """Return the options that `/set` can change, by name."""
        return {name: getattr(self._options, name) for name in RANGES}

    def _exit(self, _: str) -> None:
        """Leave the chat."""
        self._over = True


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat._help,
    "image": Chat._image,
    "audio": Chat._audio,
    "system": Chat._system,
    "reset": Chat._reset,
    "think": Chat._think,
    "stats": Chat._statistics,
    "context": Chat._context,
    "save": Chat._save,
    "load": Chat._load,
    "regenerate": Chat._regenerate,
    "undo": Chat._undo,
    "set": Chat._set,
    "exit": Chat._exit,
}


class _Completer(Completer):
    """Completes the names of commands, and of the files that some of them take."""

    _names = WordCompleter([f"/{name}" for name in _COMMANDS], sentence=True)
    _paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Return what the line before the cursor can become."""
        name, space, path = document.text_before_cursor.partition(" ")
        if space and name in ("/image", "/audio", "/load", "/save"):
            return self._paths.get_completions(Document(path), complete_event)
        return self._names.get_completions(document, complete_event)


def _is_open(text: str) -> bool:
    """Say whether `text` begins with three quotes and has not ended with three others yet."""
    text = text.strip()
    return text.startswith(_QUOTES) and (len(text) < 6 or not text.endswith(_QUOTES))


def _piped() -> Iterator[str]:
    """Yield the lines of the standard input. Lines between three quotes are one."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    held = ""
    for line in sys.stdin:
        held += line
        if not _is_open(held):
            yield held
            held = ""
    if held:
        yield held


def _printed(text: str, is_thought: bool) -> Markdown | Text:
    return Text(text, style="dim") if is_thought else Markdown(text)


def _split(text: str) -> tuple[str, str]:
    """Return the paragraphs that are whole, and the rest. A paragraph that begins a block of code ends with it."""
    end = text.rfind("\n\n")
    while end >= 0 and text.count(_FENCE, 0, end) % 2:
        end = text.rfind("\n\n", 0, end)
    return ("", text) if end < 0 else (text[:end], text[end + 2 :])


def _check_setting(name: str) -> None:
    if name not in RANGES:
        raise RequestError(f"there is no setting {name!r}; the settings are {', '.join(RANGES)}")


def _number(name: str, text: str) -> float | None:
    """Read the value of a setting, which is a number or "none"."""
    if text == "none":
        return None
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise RequestError(f"{name} is {text!r}; it must be a number") from None


def _path(text: str) -> Path:
    if not Path(text).name:
        raise RequestError("give the name of a file")
    return Path(text).expanduser()


def _history() -> FileHistory | InMemoryHistory:
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "gemma_wgpu"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(home / "history"))
