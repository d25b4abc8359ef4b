"""Gemma 3's chat format: messages to a prompt, as the chat template published with the model renders them."""

from collections.abc import Mapping, Sequence

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.tokenizer import BOS, Tokenizer

START = "<start_of_turn>"
END = "<end_of_turn>\n"
REPLY = "model\n"

Message = Mapping[str, object]


def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The prompt as text, for people to read: a control token that a user typed looks like a real one in it.

    A message has a "role" ("system", only in front; "user"; "assistant" or "model") and a "content": a str or
    a list of {"type": "text", "text": str}. Raises RequestError naming the index of the message at fault.
    """
    turns = [f"{START}{turn}{END}" for turn in _turns(messages)]
    return "".join([BOS, *turns, START + REPLY if add_generation_prompt else ""])


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """The prompt as ids; `messages` and errors as for `render`.

    The ids are those of the rendered text, save that control tokens within a message are plain text. Raises
    ModelError when the vocabulary has no tokens for turns.
    """
    start, end = (tokenizer.encode(marker, bos=False) for marker in (START, END))
    if not {start[0], end[0]} <= tokenizer.control_ids:
        raise ModelError("the vocabulary has no <start_of_turn> and <end_of_turn>; this model cannot chat")
    ids = [tokenizer.bos_id]
    for turn in _turns(messages):
        ids += [*start, *tokenizer.encode(turn, bos=False, control=False), *end]
    if add_generation_prompt:
        ids += [*start, *tokenizer.encode(REPLY, bos=False)]
    return ids


def _turns(messages: Sequence[Message]) -> list[str]:
    """What stands between the control tokens of each turn: the role, a newline and the text."""
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
    role = message.get("role") if isinstance(message, Mapping) else None
    if role in ("system", "user", "assistant"):
        return str(role)
    if role == "model":
        return "assistant"
    raise RequestError(f"message {index} has role {role!r}; give it a role of system, user or assistant")


def _texts(message: Message, index: int) -> list[str]:
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
