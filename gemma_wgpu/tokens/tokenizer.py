"""Text to token ids and back: through Hugging Face's `tokenizers`, or in pure Python."""

from __future__ import annotations

import operator
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.bpe import SPACE, PairMerger

BOS = "<bos>"


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a kind of vocabulary: `all` of them, and the `ends` of a text among them.

    `turn` begins a turn of a chat, and tells the kind: no other one has it.
    """

    turn: str
    ends: tuple[str, ...]
    all: frozenset[str]


# The tokenizer.json of the models marks these tokens special. The types in a GGUF file do not tell them: there, the
# <mask> and <unusedN> of Gemma 3 are control tokens too, and some of these are user-defined or normal tokens.
_COMMON = (BOS, "<eos>", "<pad>", "<unk>")
_KINDS = (
    ControlTokens(
        "<start_of_turn>",
        ("<eos>", "<end_of_turn>"),
        frozenset(
            {
                *_COMMON,
                "<start_of_turn>",
                "<end_of_turn>",
                "<start_of_image>",
                "<end_of_image>",
                "<image_soft_token>",
                # Gemma 3n's.
                "<start_of_audio>",
                "<end_of_audio>",
                "<audio_soft_token>",
            }
        ),
    ),
    # Gemma 4's. A reply that calls a tool ends where the tool's response begins.
    ControlTokens(
        "<|turn>",
        ("<eos>", "<turn|>", "<|tool_response>"),
        frozenset(
            {
                *_COMMON,
                "<mask>",
                *(
                    f"<|{name}>"
                    for name in ("turn", "channel", "tool", "tool_call", "tool_response", "image", "audio")
                ),
                *(
                    f"<{name}|>"
                    for name in ("turn", "channel", "tool", "tool_call", "tool_response", "image", "audio")
                ),
                *(f"<|{name}|>" for name in ("think", '"', "image", "audio", "video")),
            }
        ),
    ),
)


def control_tokens(pieces: Container[str]) -> ControlTokens:
    """Return the control tokens that a vocabulary with these pieces may have."""
    return next((kind for kind in _KINDS if kind.turn in pieces), _KINDS[0])


# No text is made of these tokens, though not every file says that they are control tokens.
_UNUSED = re.compile(r"<unused\d+>|<mask>|\[multimodal\]")
_FOREIGN = "this is not Gemma's tokenizer"


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type` in a GGUF file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Tokenizer(ABC):
    """Turns text into ids below `vocab_size` and back: `bos_id` begins a text, and any of `eos_ids` ends one.

    `control_ids` are those of the control tokens (<bos>, <end_of_turn>, ...), and `byte_ids` those that stand for a
    byte.
    """

    vocab_size: int
    bos_id: int
    eos_ids: frozenset[int]
    control_ids: frozenset[int]
    byte_ids: frozenset[int]

    def encode(self, text: str, *, bos: bool = True, control: bool = True) -> list[int]:
        """Return the ids of `text`.

        If `bos` is true, BOS is put in front unless the ids begin with it already. If `control` is false,
        "<end_of_turn>" and the other control tokens are ordinary text. A lone surrogate, which is no character, is
        read as U+FFFD. Raises RequestError if `text` is not a str.
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a str, not {type(text).__name__}")
        ids = self._encode(_without_surrogates(text), control)
        if bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, control: bool = True) -> str:
        """Return the text of `ids`, without the control tokens if `control` is false.

        In a run of byte tokens that is not valid UTF-8, every byte becomes U+FFFD. Raises RequestError for an id that
        is not an int in [0, vocab_size).
        """
        return self._decode([self.checked(token) for token in ids], control)

    def stream(self, *, control: bool = True) -> TokenStream:
        """Return a decoder for ids that come one at a time; `control` is that of `decode`."""
        return TokenStream(self, control)

    def checked(self, token: int) -> int:
        """Return `token` as a plain int. Raises RequestError unless it is an int in [0, vocab_size)."""
        try:
            checked = operator.index(token)
            if isinstance(token, bool):
                raise TypeError
        except TypeError:
            raise RequestError(f"token ids must be integers, not {type(token).__name__}") from None
        if not 0 <= checked < self.vocab_size:
            raise RequestError(f"token id {checked} is outside the vocabulary of {self.vocab_size}")
        return checked

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 that each id adds to a text: b"" for control tokens and those that no text is made of."""
        return [self._token_bytes(token) for token in range(self.vocab_size)]

    def _token_bytes(self, token: int) -> bytes:
        piece = self._piece(token)
        if token in self.byte_ids:
            return bytes([_byte_value(piece, "tokenizer")])
        if token in self.control_ids or _UNUSED.fullmatch(piece):
            return b""
        return piece.replace(SPACE, " ").encode()

    @abstractmethod
    def _piece(self, token: int) -> str: ...

    @abstractmethod
    def _encode(self, text: str, control: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], control: bool) -> str: ...


class TokenStream:
    """Decodes ids as they come: joined, the pieces are the text that `Tokenizer.decode` makes of all the ids.

    A run of byte tokens is held back until it ends, since only then is it known whether it is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, control: bool) -> None:
        self._tokenizer = tokenizer
        self._control = control
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that id `token` completes, which may be "". Raises RequestError as `decode` does."""
        token = self._tokenizer.checked(token)
        if not self._control and token in self._tokenizer.control_ids:
            return ""
        self._held.append(token)
        return "" if token in self._tokenizer.byte_ids else self.flush()

    def flush(self) -> str:
        """Return the text that is held back. The stream can be used again afterwards."""
        text = self._tokenizer.decode(self._held)
        self._held.clear()
        return text


class NoTokenizer(Tokenizer):
    """Stands in for a tokenizer that a model lacks: ids are ids, and text raises RequestError, which says `why`.

    No token ends a text, and the text of ids is empty.
    """

    def __init__(self, vocab_size: int, why: str) -> None:
        self.vocab_size, self.bos_id = vocab_size, -1
        self.eos_ids = self.control_ids = self.byte_ids = frozenset()
        self._why = why

    def _piece(self, token: int) -> str:
        return ""

    def _encode(self, text: str, control: bool) -> list[int]:
        raise RequestError(self._why)

    def _decode(self, ids: list[int], control: bool) -> str:
        return ""


class HFTokenizer(Tokenizer):
    """A tokenizer.json, through Hugging Face's `tokenizers`.

    Raises ModelError, which names `path`, if the file is missing, damaged, or not Gemma's.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Rust

        path = Path(path)
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file; a Hugging Face model folder has a tokenizer.json")
        try:
            self._rust = Rust.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ModelError(f"{path}: the file is damaged ({error}); download it again") from error
        self._rust.no_truncation()
        self._rust.no_padding()
        self._lock = threading.Lock()
        self.vocab_size = self._rust.get_vocab_size()
        self.bos_id = self._id(BOS, path)
        self.byte_ids = frozenset(self._id(f"<0x{byte:02X}>", path) for byte in range(256))
        added = self._rust.get_added_tokens_decoder()
        self.control_ids = frozenset(token for token, entry in added.items() if entry.special)
        ends = control_tokens({entry.content for entry in added.values()}).ends
        self.eos_ids = frozenset(token for token, entry in added.items() if entry.content in ends)

    def _id(self, piece: str, path: Path) -> int:
        token = self._rust.token_to_id(piece)
        if token is None:
            raise ModelError(f"{path}: there is no token {piece}; {_FOREIGN}")
        return token

    def _piece(self, token: int) -> str:
        return self._rust.id_to_token(token) or ""

    def _encode(self, text: str, control: bool) -> list[int]:
        with self._lock:  # since the mode belongs to the shared object
            self._rust.encode_special_tokens = not control
            return self._rust.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int], control: bool) -> str:
        return self._rust.decode(ids, skip_special_tokens=not control)


class BPETokenizer(Tokenizer):
    """A GGUF vocabulary, in pure Python: it gives the ids that `tokenizers` gives with Gemma's tokenizer.json.

    `pieces`, `scores` (float32) and `types` (TokenType) have one entry for each id. `source` names them in errors.
    Raises ModelError if they differ in length or are not Gemma's.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: NDArray[np.float32],
        types: NDArray[np.integer],
        *,
        source: str = "tokenizer",
    ) -> None:
        if not len(pieces) == len(scores) == len(types):
            raise ModelError(
                f"{source}: there are {len(pieces)} tokens, {len(scores)} scores and {len(types)} token types; "
                "each token must have one of each"
            )
        if "" in pieces:
            raise ModelError(f"{source}: token {pieces.index('')} is empty; {_FOREIGN}")
        kinds = types.tolist()
        # llama.cpp's converter writes the user-defined runs of SPACE with plain spaces and with the lowest of all
        # scores, but in tokenizer.json their merges come first.
        self._pieces = [
            piece.replace(" ", SPACE) if kind == TokenType.USER_DEFINED else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ]
        merge_scores = np.where(types == TokenType.USER_DEFINED, np.float32(0), scores)
        controls = control_tokens(self._pieces)
        added: dict[str, int] = {}
        ordinary: dict[str, int] = {}
        self._bytes: dict[int, int] = {}
        for token, (piece, kind) in enumerate(zip(self._pieces, kinds, strict=True)):
            if kind == TokenType.BYTE:
                self._bytes[token] = _byte_value(piece, source)
                continue
            if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED) or piece in controls.all:
                added[piece] = token
            if kind in (TokenType.NORMAL, TokenType.USER_DEFINED) and piece not in controls.all:
                ordinary[piece] = token
        token_of = {byte: token for token, byte in self._bytes.items()}
        if len(token_of) != 256 or BOS not in added:
            raise ModelError(f"{source}: {BOS} or some of the 256 byte tokens are missing; {_FOREIGN}")
        self._merger = PairMerger(ordinary, merge_scores, [token_of[byte] for byte in range(256)])
        self._added = _AddedTokens(added)
        self.vocab_size = len(pieces)
        self.bos_id = added[BOS]
        self.byte_ids = frozenset(self._bytes)
        self.control_ids = frozenset(added[piece] for piece in controls.all & added.keys())
        self.eos_ids = frozenset(added[piece] for piece in controls.ends if piece in added)

    def _piece(self, token: int) -> str:
        return self._pieces[token]

    def _encode(self, text: str, control: bool) -> list[int]:
        ids: list[int] = []
        start = 0
        for at, end, token in self._added.find(text):
            if token in self.control_ids and not control:
                continue
            ids += self._merger.encode(text[start:at])
            ids.append(token)
            start = end
        return ids + self._merger.encode(text[start:])

    def _decode(self, ids: list[int], control: bool) -> str:
        text: list[str] = []
        run = bytearray()
        for token in ids:
            if not control and token in self.control_ids:
                continue
            if token in self._bytes:
                run.append(self._bytes[token])
                continue
            text.append(_utf8(run))
            run.clear()
            text.append(self._pieces[token].replace(SPACE, " "))
        return "".join(text) + _utf8(run)


class _AddedTokens:
    """The tokens that are looked for before any merging: control tokens, HTML tags, runs of newlines and tabs."""

    def __init__(self, ids: dict[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for piece in ids:
            lengths.setdefault(piece[0], set()).add(len(piece))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]")

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, id) of each one in `text`, from the left; the longest one if several start together."""
        at = 0
        while match := self._first.search(text, at):
            start = match.start()
            at = start + 1
            for length in self._lengths[match.group()]:
                token = self._ids.get(text[start : start + length])
                if token is not None:
                    at = start + length
                    yield start, at, token
                    break


def _byte_value(piece: str, source: str) -> int:
    """Return the byte that a piece like "<0xFF>" stands for. Raises ModelError for another piece."""
    match = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if match is None:
        raise ModelError(f"{source}: byte token {piece!r} is not of the form <0xFF>; {_FOREIGN}")
    return int(match[1], 16)


def _utf8(run: bytearray) -> str:
    """Return the text of a run of bytes; if it is not valid UTF-8, U+FFFD for every byte."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _without_surrogates(text: str) -> str:
    """Return `text` with its surrogate pairs, which JavaScript's strings have, joined, and lone ones made U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
