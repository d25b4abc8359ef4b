"""The command `gemma-wgpu chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.engine.request import Piece, Stats
from gemma_wgpu.errors import GemmaError, RequestError
from gemma_wgpu.files import reason
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.options import RANGES, Options

_QUOTES = '"""'
_FENCE = "```"


class Chat:
    """Reads lines, and shows what the model says to them. Lines that begin with a slash are commands.

    The contents of `files` go in front of the first message. Raises RequestError if one cannot be read as text.
    """

    def __init__(self, gemma: Gemma, conversation: Conversation, options: Options, files: Iterable[Path]) -> None:
        self._gemma = gemma
        self._conversation = conversation
        self._options = options
        self._files = [self._read(path) for path in files]
        self._console = Console(highlight=False)
        self._notes = self._console if self._console.is_terminal else Console(stderr=True, highlight=False)
        self._stats: Stats | None = None
        self._over = False

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
            if self._over:
                break

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in _COMMANDS:
                raise RequestError(f"there is no command /{name}; /help lists them")
            _COMMANDS[name](self, argument.strip())
        elif line:
            self._conversation.say(
                "\n\n".join([*self._files, line.removeprefix(_QUOTES).removesuffix(_QUOTES).strip()])
            )
            self._files.clear()
            self._answer()

    def _answer(self) -> None:
        """Reply to the last message. If that fails, the message is taken back."""
        try:
            dropped = self._conversation.fit(self._gemma.chat_ids, self._gemma.context_length)
            generation = self._gemma.chat(self._conversation.messages, options=self._options)
            if dropped:
                kept = " The system text stays." if self._conversation.system else ""
                self._note(f"The context is full: the oldest {dropped} messages were dropped.{kept}")
            self._stats = generation.stats
            try:
                self._show(generation)
            except KeyboardInterrupt:
                self._note("(interrupted)")
        except GemmaError:
            self._conversation.undo()
            raise
        self._conversation.reply(generation.text)
        if generation.stats.finish_reason in ("context", "length"):
            full = (
                "the context is full" if generation.stats.finish_reason == "context" else "max_new_tokens is reached"
            )
            self._note(f"(cut off: {full})")

    def _show(self, pieces: Iterator[Piece]) -> None:
        """Print the text as it comes: plain into a pipe, and as Markdown, paragraph by paragraph, in a terminal."""
        if not self._console.is_terminal:
            for piece in pieces:
                print(piece.text, end="", flush=True)
            print(flush=True)
            return
        paragraph = ""
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            try:
                for piece in pieces:
                    paragraph += piece.text
                    done, paragraph = _split(paragraph)
                    if done:
                        live.console.print(Markdown(done))
                    live.update(Markdown(paragraph), refresh=True)
            finally:
                live.update("", refresh=True)
                live.console.print(Markdown(paragraph))

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, soft_wrap=True)

    def _lines(self) -> Iterator[str]:
        open_quotes = Condition(lambda: _is_open(session.default_buffer.text))
        session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=open_quotes,
            completer=WordCompleter([f"/{name}" for name in _COMMANDS], sentence=True),
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
        return self._conversation.tokens(self._gemma.chat_ids)

    @staticmethod
    def _read(path: Path) -> str:
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {reason(error)}") from error
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: cannot be read as text: it is not UTF-8 ({error.reason})") from error
        return f"{path.name}:\n{_FENCE}\n{content.rstrip()}\n{_FENCE}"

    # The commands.

    def _help(self, _: str) -> None:
        """Show this list."""
        for name, command in _COMMANDS.items():
            self._console.print(f"/{name:<12}{command.__doc__}", markup=False)
        self._console.print('"""          begins and ends a message of several lines')
        self._console.print("Ctrl-C       interrupts the reply; Ctrl-D leaves")

    def _system(self, text: str) -> None:
        """Set how the model is to behave: /system TEXT. Without TEXT, nothing is asked of it."""
        self._conversation.system = text
        self._note("The system text is set." if text else "The system text is removed.")

    def _reset(self, _: str) -> None:
        """Begin anew, with the same system text."""
        self._conversation.turns.clear()
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
    "system": Chat._system,
    "reset": Chat._reset,
    "stats": Chat._statistics,
    "context": Chat._context,
    "save": Chat._save,
    "load": Chat._load,
    "regenerate": Chat._regenerate,
    "undo": Chat._undo,
    "set": Chat._set,
    "exit": Chat._exit,
}


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
