"""Gemma 4's vocabulary, as far as it can be made of Gemma 3's: the pieces with the control tokens of the other.

Gemma 4's tokenizer.json has as many merges, and of the same kind. It marks the control tokens special and adds no
others: HTML tags and runs of newlines are made by merges.
"""

import numpy as np

from tests.vocabulary import CONTROL, USER_DEFINED, Vocabulary, spaced

# The ids of Gemma 4's control tokens; those of Gemma 3 at most of these ids are unused.
CONTROL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255999,
    "<|audio>": 256000,
    "<|image|>": 258880,
    "<|audio|>": 258881,
    "<image|>": 258882,
    "<audio|>": 258883,
    "<|video|>": 258884,
}
# llama.cpp's converter calls these user-defined, so that their text is not left out.
VISIBLE = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    '<|"|>',
)


def gemma4(vocabulary: Vocabulary) -> Vocabulary:
    """Return Gemma 4's vocabulary, made of Gemma 3's; the types are those of a tokenizer.json."""
    scores = np.where(vocabulary.types == USER_DEFINED, np.float32(0), vocabulary.scores)
    types = np.where(np.isin(vocabulary.types, (CONTROL, USER_DEFINED)), 1, vocabulary.types)
    pieces = spaced(vocabulary)
    for piece, token in CONTROL_IDS.items():
        pieces[token], types[token] = piece, CONTROL
    return Vocabulary(pieces, scores, types)


def small(words: list[str]) -> Vocabulary:
    """Return a vocabulary with the control tokens, the bytes, the letters and `words`; the first merges first."""
    pieces = [*CONTROL_IDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [CONTROL] * len(CONTROL_IDS) + [6] * 256
    pieces += ["▁", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1)), *words]
    types += [1] * (len(pieces) - len(types))
    return Vocabulary(pieces, -np.arange(len(pieces), dtype=np.float32), np.array(types, np.int32))


def words(size: int) -> list[str]:
    """Return the words with which `small` has `size` pieces; some merge of others."""
    made = ["▁the", "the", "he", "th", "ou", "ght", "thou", "thought", "us", "er", "user", "mo", "del", "model"]
    return made + [f"▁{number}" for number in range(size - len(small(made).pieces))]


def gguf_types(vocabulary: Vocabulary) -> list[int]:
    """Return the types that a GGUF has."""
    return [
        USER_DEFINED if piece in VISIBLE else kind
        for piece, kind in zip(vocabulary.pieces, vocabulary.types.tolist(), strict=True)
    ]
