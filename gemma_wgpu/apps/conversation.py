"""A conversation: what was said by turns, and how much of it fits the context."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import RequestError
from gemma_wgpu.tokens.chat import Message, encode_chat
from gemma_wgpu.tokens.tokenizer import Tokenizer


@dataclass
class Conversation:
    """A system text, and the turns of user and assistant."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All of it, as `Gemma.chat` takes it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> None:
        """The user's turn."""
        self.turns.append({"role": "user", "content": text})

    def reply(self, text: str) -> None:
        """The assistant's turn."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back_reply(self) -> bool:
        """Drop the last reply, so that the user's turn is the last one. False where there is none."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            return False
        del self.turns[-1]
        return True

    def undo(self) -> bool:
        """Drop the last turn of the user, and the reply to it. False where there is none."""
        self.take_back_reply()
        if not self.turns:
            return False
        del self.turns[-1]
        return True

    def tokens(self, tokenizer: Tokenizer) -> int:
        """Tokens that all of it has; 0 before the first turn."""
        return len(encode_chat(tokenizer, self.messages)) if self.turns else 0

    def fit(self, tokenizer: Tokenizer, context_length: int) -> int:
        """Make room for a reply in a context that is nearly full: drop the oldest turns, never the system text.

        A quarter of the context is kept free, or an eighth while that spares dropping any: dropping means to compute
        the rest again, which should be seldom. Returns the number of turns dropped. Raises RequestError where the
        last turn alone is too long.
        """
        if self.tokens(tokenizer) <= context_length * 7 // 8:
            return 0
        dropped = 0
        while self.tokens(tokenizer) > context_length * 3 // 4:
            if len(self.turns) == 1:
                if self.tokens(tokenizer) < context_length:
                    return dropped
                raise RequestError(
                    f"this message, with the system text, has {self.tokens(tokenizer):,} tokens; the context has "
                    f"{context_length:,}. Shorten it, or start with a longer --context-length"
                )
            del self.turns[:2]
            dropped += 2
        return dropped

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write it as JSON, with the settings it went on under. Raises RequestError where that fails."""
        content = {"system": self.system, "messages": self.turns, "settings": settings}
        try:
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> tuple[Conversation, dict[str, Any]]:
        """What `save` wrote. Raises RequestError for a file that is missing or something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in content["messages"]]
            conversation, settings = cls(content["system"], turns), dict(content["settings"])
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path}: not a conversation that was saved here") from error
        expected = ["user", "assistant"] * len(turns)
        texts = [conversation.system, *(turn["content"] for turn in turns)]
        if [turn["role"] for turn in turns] != expected[: len(turns)] or not all(isinstance(t, str) for t in texts):
            raise RequestError(f"{path}: not a conversation that was saved here")
        return conversation, settings
