"""Checks the compact vocabulary, and the one made from tokenizer.json, against `tokenizers` itself."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gemma_wgpu.errors import ModelError
from gemma_wgpu.tokens.tokenizer import BPETokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from tests.vocabulary import random_text, read_vocabulary, rust_ids, rust_tokenizer, small_tokenizer_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rust(demo_gguf: Path) -> tokenizers.Tokenizer:
    return rust_tokenizer(demo_gguf)


@pytest.fixture(scope="module")
def json_path(rust: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return Gemma 3's tokenizer.json: test_tokenizer.py shows that the vocabulary makes it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    rust.save(str(path))
    return path


@pytest.fixture(scope="module")
def ranked(json_path: Path) -> Vocabulary:
    return Vocabulary.from_tokenizer_json(json_path)


@pytest.fixture(scope="module")
def bpe(ranked: Vocabulary) -> BPETokenizer:
    """Return the vocabulary as it comes out of the file that a model folder has."""
    return Vocabulary.from_bytes(ranked.to_bytes(), "vocabulary").tokenizer("vocabulary")


def test_restores_what_a_gguf_has(demo_gguf: Path) -> None:
    pieces, scores, types = read_vocabulary(demo_gguf)
    restored = Vocabulary.from_bytes(Vocabulary(pieces, scores, types).to_bytes(), "vocabulary")
    assert restored.pieces == pieces
    assert restored.scores.dtype == np.float32
    assert np.array_equal(restored.scores, scores)
    assert np.array_equal(restored.types, types)


def test_encodes_random_text_as_tokenizers_does(
    bpe: BPETokenizer, rust: tokenizers.Tokenizer, ranked: Vocabulary
) -> None:
    rng = Random(7)
    for _ in range(3000):
        text = random_text(rng, list(ranked.pieces))
        for control in (True, False):
            assert bpe.encode(text, bos=False, control=control) == rust_ids(rust, text, control), (text, control)


def test_encodes_every_piece_as_tokenizers_does(
    bpe: BPETokenizer, rust: tokenizers.Tokenizer, ranked: Vocabulary
) -> None:
    texts = [piece.replace("▁", " ") for piece in ranked.pieces]
    rust.encode_special_tokens = False
    for text, encoding in zip(texts, rust.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        assert bpe.encode(text, bos=False) == encoding.ids, text


def test_knows_the_special_ids(bpe: BPETokenizer, rust: tokenizers.Tokenizer) -> None:
    added = rust.get_added_tokens_decoder()
    assert bpe.control_ids == {token for token, entry in added.items() if entry.special}
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_ids) == (262144, 2, frozenset({1, 106}))
    assert bpe.byte_ids == set(range(238, 494))


PIECES = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20)


@given(pieces=PIECES, seed=st.integers(0, 1 << 32))
def test_any_vocabulary(pieces: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 1 << 32, len(pieces), np.uint32).view(np.float32)
    types = rng.integers(1, 7, len(pieces), np.int32)
    restored = Vocabulary.from_bytes(Vocabulary(pieces, scores, types).to_bytes(), "vocabulary")
    assert restored.pieces == pieces
    assert restored.scores.tobytes() == scores.tobytes()
    assert restored.types.tolist() == types.tolist()


# A small tokenizer.json, which is made in the same way, is damaged.


def read(folder: Path, content: object) -> Vocabulary:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return Vocabulary.from_tokenizer_json(path)


@given(st.text("ab ▁<>", max_size=40))
def test_small(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    content = small_tokenizer_json()
    ours = read(tmp_path_factory.getbasetemp(), content).tokenizer("small")
    assert ours.encode(text, bos=False) == rust_ids(tokenizers.Tokenizer.from_str(json.dumps(content)), text)


def test_merges_as_one_text(tmp_path: Path) -> None:
    """Older versions of `tokenizers` write them so."""
    content = small_tokenizer_json()
    expected = read(tmp_path, content)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    assert np.array_equal(read(tmp_path, content).scores, expected.scores)


def part(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]  # aba is made in two ways, which the merge between them now parts
    parted = [["ab", "a"], ["a", "b"], ["a", "ba"]]
    content["model"]["merges"] = parted + [merge for merge in merges if merge not in parted]


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a merge less": lambda content: content["model"]["merges"].pop(),
    "a merge twice": lambda content: content["model"]["merges"].__setitem__(1, content["model"]["merges"][0]),
    "merges of one piece apart": part,
    "another model": lambda content: content["model"].update(type="Unigram"),
    "no bytes": lambda content: content["model"].update(byte_fallback=False),
    "no normalizer": lambda content: content.update(normalizer=None),
    "an unknown special token": lambda content: content["added_tokens"][4].update(special=True),
    "a control token that is none": lambda content: content["added_tokens"][1].update(special=False),
    "a token that eats spaces": lambda content: content["added_tokens"][4].update(lstrip=True),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_tokenizer_json(change: str, tmp_path: Path) -> None:
    content = small_tokenizer_json()
    FOREIGN[change](content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: it does not split text as Gemma's"):
        read(tmp_path, content)


DAMAGED: dict[str, Any] = {
    "no model": lambda content: content.pop("model"),
    "vocabulary a list": lambda content: content["model"].update(vocab=[]),
    "a merge of unknown pieces": lambda content: content["model"]["merges"].append(["b", "b"]),
    "a gap": lambda content: content["model"]["vocab"].update(x=9999),
    "added tokens null": lambda content: content.update(added_tokens=None),
}


@pytest.mark.parametrize("change", DAMAGED)
def test_damaged_tokenizer_json(change: str, tmp_path: Path) -> None:
    content = small_tokenizer_json()
    DAMAGED[change](content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: the file is damaged \("):
        read(tmp_path, content)


def test_missing_and_unparsable_tokenizer_json(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read: No such file"):
        Vocabulary.from_tokenizer_json(path)
    for content in (b"", b'{"model"', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"tokenizer\.json: the file is damaged \("):
            Vocabulary.from_tokenizer_json(path)


def file() -> bytes:
    return Vocabulary(["one", "zwei", "trois"], np.array([0, -1, -2], np.float32), np.array([1, 3, 4])).to_bytes()


def test_every_cut_is_noticed() -> None:
    whole = file()
    for length in range(len(whole)):
        with pytest.raises(ModelError, match="vocabulary: "):
            Vocabulary.from_bytes(whole[:length], "vocabulary")


def test_every_flipped_bit_is_noticed() -> None:
    whole = file()
    for at in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            with pytest.raises(ModelError, match="vocabulary: "):
                Vocabulary.from_bytes(bytes(flipped), "vocabulary")


def test_a_newer_version() -> None:
    whole = file()
    with pytest.raises(ModelError, match=r"the vocabulary has format 2, and this gemma-wgpu reads 1; upgrade it"):
        Vocabulary.from_bytes(whole[:4] + struct.pack("<I", 2) + whole[8:], "vocabulary")


def test_a_stream_that_goes_on() -> None:
    whole = file()
    body = zlib.decompress(whole[16:]) + b"more"
    with pytest.raises(ModelError, match="the vocabulary is damaged"):
        Vocabulary.from_bytes(whole[:16] + zlib.compress(body), "vocabulary")
