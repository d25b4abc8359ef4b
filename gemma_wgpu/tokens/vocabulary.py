"""Gemma's vocabulary as a compact file, made from tokenizer.json or a GGUF, which loads quickly without `tokenizers`.

The file begins with 16 bytes: the magic, and as little-endian u32 the version, the number of pieces and the bytes of
their text. One zlib stream follows, of the length of each piece in characters (u16), the scores (float32; the first
bytes of all, then the second bytes of all, and so on, which compresses forty times better), the types (u8), and the
pieces one after the other in UTF-8.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.files import reason
from gemma_wgpu.tokens.bpe import SPACE
from gemma_wgpu.tokens.tokenizer import BPETokenizer, TokenType, control_tokens

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"GVOC"
_VERSION = 1
_MOST_PIECES = 1 << 22
_MOST_TEXT = 1 << 28


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The piece, the score (float32) and the TokenType of every id, which `BPETokenizer` is made of."""

    pieces: Sequence[str]
    scores: NDArray[np.float32]
    types: NDArray[np.integer]

    def tokenizer(self, source: str) -> BPETokenizer:
        """Return the tokenizer. Raises ModelError, which names `source`, if the vocabulary is not Gemma's."""
        return BPETokenizer(self.pieces, self.scores, self.types, source=source)

    def to_bytes(self) -> bytes:
        """Return the compact file, whose bytes are the same for the same vocabulary and version of zlib."""
        text = "".join(self.pieces).encode()
        lengths = np.array([len(piece) for piece in self.pieces], "<u2")
        planes = np.ascontiguousarray(self.scores.astype("<f4")).view(np.uint8).reshape(-1, 4).T
        body = lengths.tobytes() + planes.tobytes() + self.types.astype(np.uint8).tobytes() + text
        return _HEADER.pack(_MAGIC, _VERSION, len(self.pieces), len(text)) + zlib.compress(body, 9)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """Read what `to_bytes` wrote. Raises ModelError, which names `source`, if it is damaged or too new."""
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise ModelError(f"{source}: this is not a vocabulary file of gemma-wgpu; download it again")
        _, version, count, text_bytes = _HEADER.unpack_from(data)
        if version > _VERSION:
            raise ModelError(
                f"{source}: the vocabulary has format {version}, and this gemma-wgpu reads {_VERSION}; upgrade it"
            )
        try:
            if version != _VERSION or count > _MOST_PIECES or text_bytes > _MOST_TEXT:
                raise ValueError("impossible header")
            size = 7 * count + text_bytes
            stream = zlib.decompressobj()
            # One byte more is asked for than is right, to notice a stream that goes on.
            body = np.frombuffer(stream.decompress(data[_HEADER.size :], size + 1), np.uint8)
            if len(body) != size or not stream.eof:
                raise ValueError("wrong length")
            lengths, planes, types, encoded = np.split(body, np.cumsum([2 * count, 4 * count, count]))
            text = encoded.tobytes().decode()
            ends = np.cumsum(lengths.view("<u2"), dtype=np.uint32)
            if ends[-1:].tolist() != [len(text)]:
                raise ValueError("wrong length")
        except (ValueError, zlib.error) as error:
            raise ModelError(f"{source}: the vocabulary is damaged ({error}); download it again") from error
        scores = np.ascontiguousarray(planes.reshape(4, count).T).view("<f4").reshape(-1)
        types = types.copy()
        del body, lengths, planes, encoded  # so that the pieces can have the memory, which is scarce in browsers
        starts = np.concatenate((np.zeros(1, np.uint32), ends[:-1]))
        pieces = [text[start:end] for start, end in zip(starts.data, ends.data, strict=True)]
        return cls(pieces, scores, types)

    @classmethod
    def from_merges(
        cls, pieces: Sequence[str], merges: Sequence[str], types: NDArray[np.integer], source: str
    ) -> Self:
        """Return the vocabulary of a GGUF that has merges, "left right" each, the first one first, and no scores.

        Scores are made from the order of the merges. Raises ModelError, which names `source`, if they are damaged or
        do not go by byte pairs over all splits of the pieces.
        """
        ids = {piece: token for token, piece in enumerate(pieces)}
        try:
            scores = _scores(ids, [_pair(merge) for merge in merges], control_tokens(ids).all)
        except (ValueError, KeyError) as error:
            raise ModelError(f"{source}: the merges are damaged ({error!r}); convert the model again") from error
        if scores is None:
            raise ModelError(f"{source}: the merges do not split text as Gemma's do; use the model's original ones")
        return cls(pieces, _ranked(pieces, scores), types)

    @classmethod
    def from_tokenizer_json(cls, path: Path) -> Self:
        """Read the vocabulary in a tokenizer.json; its `tokenizer` gives the ids that `tokenizers` gives.

        Scores are made from the order of the merges. Raises ModelError, which names the file, if it is missing or
        damaged, or if it does not tokenize as Gemma's do, by byte pairs over all splits of its pieces.
        """
        try:
            content = json.loads(path.read_bytes())
            model, added, normalizer = content["model"], content["added_tokens"], content["normalizer"]
            ids: dict[str, int] = model["vocab"]
            merges = [_pair(merge) for merge in model["merges"]]
            pieces = _in_order({**ids, **{token["content"]: token["id"] for token in added}})
            control = control_tokens(pieces).all
            kinds = _added_types(added, control)
            is_gemmas = (model["type"], model["byte_fallback"], normalizer) == ("BPE", True, _NORMALIZER)
            scores = _scores(ids, merges, control)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: the file is damaged ({error!r}); download it again") from error
        # BPETokenizer takes the merges of user-defined tokens to be the first ones, which they are in Gemma's files.
        if not is_gemmas or kinds is None or scores is None or any(scores.get(pieces[token]) for token in kinds):
            raise ModelError(
                f"{path}: it does not split text as Gemma's tokenizer.json does; use the model's original one"
            )
        types = np.full(len(pieces), TokenType.NORMAL, np.uint8)
        for byte in range(256):
            if (piece := f"<0x{byte:02X}>") in ids:
                types[ids[piece]] = TokenType.BYTE
        for token, kind in kinds.items():
            types[token] = kind
        return cls(pieces, _ranked(pieces, scores), types)


_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _in_order(ids: Mapping[str, int]) -> list[str]:
    """Return the pieces in the order of their ids. Raises ValueError if ids are missing."""
    pieces = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("the ids have gaps")
    return pieces


def _added_types(added: Sequence[Mapping[str, Any]], control: Container[str]) -> dict[int, TokenType] | None:
    """Return the types of added tokens by id; None if one is matched or treated otherwise than Gemma's are."""
    types = {}
    for token in added:
        if any(token[key] for key in ("single_word", "lstrip", "rstrip", "normalized")):
            return None
        if token["special"] != (token["content"] in control):
            return None
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return types


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two sides of a merge, which may be one text with a space between. Raises ValueError for another."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _ranked(pieces: Iterable[str], scores: Mapping[str, float]) -> NDArray[np.float32]:
    """Return the score of each piece; what no merge makes has 0."""
    return np.array([scores.get(piece, 0) for piece in pieces], np.float32)


def _scores(
    ids: Mapping[str, int], merges: Sequence[tuple[str, str]], control: Container[str]
) -> dict[str, float] | None:
    """Return scores that put the possible merges in the order of `merges`; None if no scores do.

    No text becomes one of the `control` tokens, so their merges do not count.

    `PairMerger` goes by score, then by the longer left side, the longer right side and the lower id. So merges that
    follow each other in this order may share a score, and each merge that does not begins the next lower score.
    """
    scores: dict[str, float] = {}
    score = 0.0
    last = (0, 0, 0)
    made = [(left, right) for left, right in merges if left + right not in control]
    for left, right in made:
        merged = left + right
        place = (-len(left), -len(right), ids[merged])
        if place < last and scores:
            score -= 1
        last = place
        if scores.setdefault(merged, score) != score:
            return None
    # PairMerger can make every piece from every split of it into two pieces.
    splits = sum(
        1
        for piece in ids
        if piece not in control
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    )
    return scores if splits == len(made) == len(set(made)) else None
