"""Chats: messages become a prompt, just as the chat template that is published with a model renders them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.tokenizer import BOS, Tokenizer

Message = Mapping[str, object]
"""A message has a "role" ("system", only in front; "user"; "assistant" or "model") and a "content", which is a str or
a list of {"type": "text", "text": str}."""


class ChatTemplate(ABC):
    """Writes a chat down in the way that a family's models were trained on."""

    @abstractmethod
    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt as text, for people to read: a control token that a user typed looks like a real one.

        If `add_generation_prompt` is true, the prompt ends with the beginning of a reply. Raises RequestError, which
        names the index of the message at fault.
        """

    @abstractmethod
    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the prompt as ids: those of the rendered text, except that control tokens in a message are text.

        Raises RequestError as `render` does, and ModelError if the vocabulary has no tokens for chats.
        """


class Gemma3Chat(ChatTemplate):
    """The template of Gemma 3: turns of a user and the model, between <start_of_turn> and <end_of_turn>.

    The system's text goes in front of the first user's.
    """

    _start = "<start_of_turn>"
    _end = "<end_of_turn>\n"
    _reply = "model\n"

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt as text."""
        turns = [f"{self._start}{turn}{self._end}" for turn in _turns(messages)]
        return "".join([BOS, *turns, self._start + self._reply if add_generation_prompt else ""])

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the prompt as ids."""
        start, end = (tokenizer.encode(marker, bos=False) for marker in (self._start, self._end))
        if not {start[0], end[0]} <= tokenizer.control_ids:
            raise ModelError("the vocabulary has no <start_of_turn> and <end_of_turn>; this model cannot chat")
        ids = [tokenizer.bos_id]
        for turn in _turns(messages):
            ids += [*start, *tokenizer.encode(turn, bos=False, control=False), *end]
        if add_generation_prompt:
            ids += [*start, *tokenizer.encode(self._reply, bos=False)]
        return ids


GEMMA3 = Gemma3Chat()


def _turns(messages: Sequence[Message]) -> list[str]:
    """Return the texts between the control tokens of each turn: the role, a newline and the message."""
    if not isinstance(messages, Sequence):
        raise RequestError(f"a chat is a list of messages, not {type(messages).__name__}")
    roles = [_role(message, index) for index, message in enumerate(messages)]
    if roles in ([], ["system"]):
        raise RequestError(f"message {len(roles)} is missing; a chat needs a user message")
    first = int(roles[0] == "system")
    # The template strips every text but the system's.
    preface = "".join(_texts(messages[0], 0)) + "\n\n" if first else ""
    turns = []
    for index in range(first, len(roles)):
        expected = "assistant" if (index - first) % 2 else "user"
        if roles[index] != expected:
            raise RequestError(f"message {index} has role {roles[index]} where {expected} must stand")
        text = "".join(part.strip() for part in _texts(messages[index], index))
        turns.append(f"{'user' if expected == 'user' else 'model'}\n{preface}{text}")
        preface = ""
    return turns


def _role(message: Message, index: int) -> str:
    """Return "system", "user" or "assistant"."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role in ("system", "user", "assistant"):
        return str(role)
    if role == "model":
        return "assistant"
    raise RequestError(f"message {index} has role {role!r}; give it a role of system, user or assistant")


def _texts(message: Message, index: int) -> list[str]:
    """Return the texts that the content of a message is made of."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise RequestError(f"message {index} has content of type {type(content).__name__}; it must be text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(f'message {index} has a part that is not {{"type": "text", "text": ...}}')
        texts.append(text)
    return texts
