"""Gemma 3's tokenizer.json made again from the vocabulary in a GGUF file, and text to try tokenizers on."""

import json
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gemma_wgpu.weights.gguf import GGUFCheckpoint

SPECIAL = {
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
}
CONTROL, USER_DEFINED = 3, 4


class Vocabulary(NamedTuple):
    """The pieces, the scores and the types of all ids that a GGUF file has."""

    pieces: list[str]
    scores: NDArray[np.float32]
    types: NDArray[np.int32]


@cache
def read_vocabulary(path: Path) -> Vocabulary:
    metadata: dict[str, Any] = dict(GGUFCheckpoint(path).metadata)
    return Vocabulary(*(metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")))


@cache
def rust_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return `tokenizers` itself on the vocabulary of the GGUF file at `path`."""
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(read_vocabulary(path))))


def rust_ids(rust: tokenizers.Tokenizer, text: str, control: bool = True) -> list[int]:
    rust.encode_special_tokens = not control
    ids: list[int] = rust.encode(text, add_special_tokens=False).ids
    return ids


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges that Hugging Face's conversion makes.

    They are all splits of a piece into two pieces, sorted by score, left length and right length, the highest first.
    """
    pieces = spaced(vocabulary)
    scores = [
        0.0 if kind == USER_DEFINED else score
        for score, kind in zip(vocabulary.scores.tolist(), vocabulary.types.tolist(), strict=True)
    ]
    ids = {piece: token for token, piece in enumerate(pieces)}
    splits = [
        (score, at, len(piece) - at, piece[:at], piece[at:])
        for piece, score in zip(pieces, scores, strict=True)
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    splits.sort(key=lambda split: split[:3], reverse=True)
    return [(left, right) for *_, left, right in splits]


def spaced(vocabulary: Vocabulary) -> list[str]:
    """Return the pieces with U+2581 for a space: a GGUF has plain spaces in those that are user-defined."""
    return [
        piece.replace(" ", "▁") if kind == USER_DEFINED else piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.types.tolist(), strict=True)
    ]


def tokenizer_json(vocabulary: Vocabulary, special: Container[str] = SPECIAL) -> dict[str, Any]:
    """Return the tokenizer.json that Hugging Face's conversion makes, in which these tokens are `special`."""
    pieces = spaced(vocabulary)
    added = [
        {
            "id": token,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece in special,
        }
        for token, piece in enumerate(pieces)
        if vocabulary.types[token] in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": merges(vocabulary),
        },
    }


def small_tokenizer_json() -> dict[str, Any]:
    """Return a tokenizer.json that is made in the same way, with a dozen pieces."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<b>", "▁▁", "▁", "a", "b", "ab", "aba", "ba", "▁a"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    types = np.array([CONTROL] * 4 + [USER_DEFINED] * 2 + [1] * 7 + [6] * 256, np.int32)
    return tokenizer_json(Vocabulary(pieces, -np.arange(len(pieces), dtype=np.float32), types))


def golden() -> dict[str, Any]:
    """Return what data/record_tokens.py has recorded from Gemma 3's own tokenizer.json."""
    loaded: dict[str, Any] = json.loads(Path(__file__).with_name("data").joinpath("tokens.json").read_text())
    return loaded


_SCRIPTS = [
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x530, 0x700),
    (0x900, 0xE00),
    (0xE00, 0x1100),
    (0x1100, 0x1400),
    (0x2000, 0x2C00),
    (0x3000, 0x3200),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xE000, 0xF900),
    (0xF900, 0x10000),
    (0x10000, 0x13000),
    (0x1F000, 0x1FB00),
    (0xE0000, 0xE0200),
]
_EMOJI = ["👨", "👩", "👧", "💻", "🏳", "🌈", "🏽", "\u200d", "\ufe0f", "🇩", "🇪", "❤", "🫨"]
_TAGS = [
    "<b>",
    "</b>",
    "<td>",
    "</h1>",
    "<html>",
    "<B>",
    "<p>",
    "</",
    "> </",
    ">  </",
    "<unused7>",
    "[multimodal]",
]
_NEAR = [
    "<end_of_turn",
    "end_of_turn>",
    "<start_of_",
    "turn>",
    "<eos",
    "<EOS>",
    "< bos>",
    "<0x41>",
    "<unused",
    "<<",
]


def random_text(rng: Random, pieces: list[str], control: bool = True) -> str:
    """Return a text of up to thirty snippets of many kinds; if `control` is true, some are control tokens."""

    def script() -> str:
        low, high = rng.choice(_SCRIPTS)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 12)))

    def white() -> str:
        return "".join(
            rng.choice(" \t\n\r▁\u00a0") * rng.choice([1, 2, 3, 31, 32, 70]) for _ in range(rng.randint(1, 3))
        )

    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(pieces).replace("▁", " "),
        lambda: rng.choice(pieces).replace("▁", " ")[::-1],
        lambda: " " + rng.choice(pieces).strip("▁"),
        script,
        white,
        lambda: "".join(rng.choices(_EMOJI, k=rng.randint(1, 9))),
        lambda: rng.randbytes(rng.randint(1, 12)).decode("latin-1"),
        lambda: rng.choice(_TAGS),
        lambda: rng.choice(_NEAR),
        lambda: str(rng.randrange(10 ** rng.randint(1, 20))),
        lambda: "".join(rng.choices("etaoinshr", k=rng.choice([3, 30, 300]))),
        lambda: rng.choice(sorted(SPECIAL)),
    ]
    chosen = kinds if control else kinds[:-1]
    text = "".join(rng.choice(chosen)() for _ in range(rng.randint(1, 30)))
    while not control and any(token in text for token in SPECIAL):
        for token in SPECIAL:
            text = text.replace(token, "")
    return text
