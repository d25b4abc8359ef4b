"""A conversation: what was said, and how much of it fits the context."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_wgpu.engine.request import Piece
from gemma_wgpu.errors import RequestError
from gemma_wgpu.files import reason, replacing
from gemma_wgpu.tokens.messages import Message

Turn = dict[str, Any]
"""A message. Its content is a text or, if it is the user's, a list of texts and of paths of images and sounds."""

Encode = Callable[[Sequence[Message]], Sequence[int]]
"""This returns the prompt that messages make, as token ids; `Gemma.chat_ids` is one."""


def spoken(pieces: Iterable[Piece]) -> Iterator[tuple[str, bool]]:
    """Yield the text of a reply's pieces, each with whether it is of a thought.

    An empty line stands between a thought that is shown and the answer.
    """
    shown = ""
    for piece in pieces:
        if shown and not piece.is_thought:
            yield ("\n" if shown.endswith("\n") else "\n\n"), True
            shown = ""
        elif piece.is_thought:
            shown = piece.text or shown
        yield piece.text, piece.is_thought


@dataclass
class Conversation:
    """A system text, and the turns of user and assistant."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """Return all of it, as `Gemma.chat` takes it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    @property
    def images(self) -> list[Path]:
        """Return the paths of the images in all turns, in order."""
        return self._paths("image")

    @property
    def sounds(self) -> list[Path]:
        """Return the paths of the sounds in all turns, in order."""
        return self._paths("audio")

    def _paths(self, kind: str) -> list[Path]:
        parts = [part for turn in self.turns if isinstance(turn["content"], list) for part in turn["content"]]
        return [Path(part["path"]) for part in parts if part["type"] == kind]

    def say(self, text: str, images: Sequence[Path] = (), sounds: Sequence[Path] = ()) -> None:
        """Add a turn of the user; images and sounds, which are named by their paths, stand in front of the text."""
        parts = [{"type": "image", "path": str(path)} for path in images]
        parts += [{"type": "audio", "path": str(path)} for path in sounds]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        self.turns.append({"role": "user", "content": content})

    def reply(self, text: str) -> None:
        """Add a turn of the assistant."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back_reply(self) -> bool:
        """Drop the last reply, so that the user's turn is the last one. Return False if there is none."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            return False
        del self.turns[-1]
        return True

    def undo(self) -> bool:
        """Drop the last turn of the user, and the reply to it. Return False if there is none."""
        self.take_back_reply()
        if not self.turns:
            return False
        del self.turns[-1]
        return True

    def tokens(self, encode: Encode) -> int:
        """Return how many tokens all of it has; 0 before the first turn."""
        return len(encode(self.messages)) if self.turns else 0

    def fit(self, encode: Encode, context_length: int) -> int:
        """Make room for a reply in a context that is nearly full: drop the oldest turns, never the system text.

        A quarter of the context is kept free. An eighth is enough as long as no turn must be dropped for it: after a
        drop the rest has to be computed again, which should be seldom. Returns the number of turns that were dropped.
        Raises RequestError if the last turn alone is too long.
        """
        if self.tokens(encode) <= context_length * 7 // 8:
            return 0
        dropped = 0
        while (count := self.tokens(encode)) > context_length * 3 // 4:
            if len(self.turns) == 1:
                if count < context_length:
                    return dropped
                raise RequestError(
                    f"this message, with the system text, has {count:,} tokens; the context has {context_length:,}. "
                    "Shorten it, or start with a longer --context-length"
                )
            del self.turns[:2]
            dropped += 2
        return dropped

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write it as JSON, with the settings that it has. Raises RequestError if that fails."""
        content = {"system": self.system, "messages": self.turns, "settings": settings}
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        try:
            with replacing(path) as file:
                file.write(text.encode(errors="backslashreplace"))  # JSON writes half a character in this way
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {reason(error)}") from error

    @classmethod
    def load(cls, path: Path) -> tuple[Conversation, dict[str, Any]]:
        """Read what `save` wrote; its images and sounds are not opened.

        Raises RequestError for a file that is missing or holds something else.
        """
        foreign = RequestError(f"{path}: this is no conversation that was saved here; name another file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in content["messages"]]
            conversation, settings = cls(content["system"], turns), dict(content["settings"])
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise foreign from error
        expected = ["user", "assistant"] * len(turns)
        if (
            not isinstance(conversation.system, str)
            or [turn["role"] for turn in turns] != expected[: len(turns)]
            or not all(_is_content(turn["content"], of_user=turn["role"] == "user") for turn in turns)
        ):
            raise foreign
        return conversation, settings


def _is_content(content: object, *, of_user: bool) -> bool:
    """Say whether it is the content of a turn."""
    if isinstance(content, str):
        return True
    return of_user and isinstance(content, list) and all(_is_part(part) for part in content)


def _is_part(part: object) -> bool:
    """Say whether it is a text, or the path of an image or a sound."""
    if not isinstance(part, dict):
        return False
    named = {"text": "text", "image": "path", "audio": "path"}.get(str(part.get("type")), "")
    return part.keys() == {"type", named} and isinstance(part[named], str)
