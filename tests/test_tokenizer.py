"""Checks both tokenizers against `tokenizers` itself, and that against what Gemma 3's own tokenizer.json gave."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import tokenizers

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.tokens.tokenizer import BPETokenizer, HFTokenizer, Tokenizer
from tests.data.record_tokens import fingerprint
from tests.vocabulary import Vocabulary, golden, random_text, read_vocabulary, rust_ids, rust_tokenizer

GOLDEN = golden()
BYTES = range(238, 494)


@pytest.fixture(scope="module")
def vocabulary(demo_gguf: Path) -> Vocabulary:
    return read_vocabulary(demo_gguf)


@pytest.fixture(scope="module")
def json_path(rust: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    rust.save(str(path))
    return path


@pytest.fixture(scope="module")
def rust(demo_gguf: Path) -> tokenizers.Tokenizer:
    return rust_tokenizer(demo_gguf)


@pytest.fixture(scope="module")
def bpe(vocabulary: Vocabulary) -> BPETokenizer:
    return BPETokenizer(*vocabulary)


@pytest.fixture(scope="module")
def hf(json_path: Path) -> HFTokenizer:
    return HFTokenizer(json_path)


@pytest.fixture(params=["bpe", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_the_vocabulary_makes_gemmas_own_tokenizer_json(json_path: Path) -> None:
    made = fingerprint(json.loads(json_path.read_text(encoding="utf-8")), 262144)
    assert made == GOLDEN["tokenizer"][0]


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"][:20]))
def test_encodes_as_recorded(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["text"], bos=False) == case["ids"]
    assert tokenizer.encode(case["text"], bos=False, control=False) == case["plain_ids"]


@pytest.mark.parametrize("case", GOLDEN["decoded"], ids=lambda case: str(case["ids"][:6]))
def test_decodes_as_recorded(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode(case["ids"], control=False) == case["plain_text"]


def test_encodes_random_text_as_tokenizers_does(
    bpe: BPETokenizer, hf: HFTokenizer, rust: tokenizers.Tokenizer, vocabulary: Vocabulary
) -> None:
    rng = Random(1)
    for _ in range(6000):
        text = random_text(rng, vocabulary.pieces)
        for control in (True, False):
            expected = rust_ids(rust, text, control)
            assert bpe.encode(text, bos=False, control=control) == expected, (text, control)
            assert hf.encode(text, bos=False, control=control) == expected, (text, control)


def test_encodes_every_piece_as_tokenizers_does(
    bpe: BPETokenizer, rust: tokenizers.Tokenizer, vocabulary: Vocabulary
) -> None:
    texts = [piece.replace("▁", " ") for piece in vocabulary.pieces]
    rust.encode_special_tokens = False
    expected = rust.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        assert bpe.encode(text, bos=False) == encoding.ids, text


def test_the_bytes_of_every_token(tokenizer: Tokenizer, rust: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    silent = {0, 1, 2, 3, 4, 5, 105, 106, 255999, 256000}  # control tokens, <mask> and [multimodal]
    silent |= {token for token, piece in enumerate(vocabulary.pieces) if piece.startswith("<unused")}
    assert len(silent) == 10 + 6242
    texts = rust.decode_batch([[token] for token in range(len(vocabulary.pieces))], skip_special_tokens=False)
    expected = [b"" if token in silent else text.encode() for token, text in enumerate(texts)]
    expected[BYTES.start : BYTES.stop] = [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes() == expected


@pytest.mark.parametrize("letters", ["a", "etaoinshrdlu", "的一是在不了有和人这", " ", "\u0378", "> </", "<"])
def test_encodes_a_word_of_100_000_letters(bpe: BPETokenizer, rust: tokenizers.Tokenizer, letters: str) -> None:
    word = "".join(Random(2).choices(letters, k=100_000))
    assert bpe.encode(word, bos=False) == rust_ids(rust, word)


def test_words_remembered_past_the_limit_stay_right(
    bpe: BPETokenizer, rust: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_wgpu.tokens.bpe._CACHED_WORDS", 3)
    text = "one two three four five six one two three " * 3
    assert bpe.encode(text, bos=False) == rust_ids(rust, text)


def test_decodes_and_streams_random_ids_as_tokenizers_does(
    bpe: BPETokenizer, hf: HFTokenizer, rust: tokenizers.Tokenizer
) -> None:
    rng = Random(3)
    for _ in range(5000):
        ids: list[int] = []
        while rng.random() < 0.9:
            ids += rng.choice(
                [
                    [rng.randrange(262144)],
                    [rng.randrange(120)],
                    rng.choices(BYTES, k=rng.randint(1, 5)),
                    [BYTES[byte] for byte in rng.choice("é€😀א").encode()],
                ]
            )
        for control in (True, False):
            expected = rust.decode(ids, skip_special_tokens=not control)
            for tokenizer in (bpe, hf):
                assert tokenizer.decode(ids, control=control) == expected
                stream = tokenizer.stream(control=control)
                assert "".join(map(stream.push, ids)) + stream.flush() == expected


def test_a_stream_gives_whole_characters_as_soon_as_they_are_certain(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    hello, newline = tokenizer.encode("Hello\n", bos=False)
    euro = [BYTES[byte] for byte in "€".encode()]
    assert [stream.push(token) for token in [hello, *euro, newline]] == ["Hello", "", "", "", "€\n"]
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    assert stream.flush() == "\ufffd\ufffd"
    assert stream.flush() == ""


def test_what_was_encoded_decodes_to_itself(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    rng = Random(4)
    for _ in range(500):
        text = random_text(rng, vocabulary.pieces).replace("▁", " ")
        for control in (True, False):
            assert tokenizer.decode(tokenizer.encode(text, bos=False, control=control)) == text


def test_bos_stands_in_front_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("Hi") == [2, *tokenizer.encode("Hi", bos=False)]
    assert tokenizer.encode("<bos>Hi") == tokenizer.encode("Hi")
    assert tokenizer.encode("<bos>Hi", bos=False) == tokenizer.encode("Hi")
    plain = tokenizer.encode("<bos>Hi", control=False)
    assert plain.count(2) == 1
    assert tokenizer.decode(plain[1:]) == "<bos>Hi"


def test_knows_its_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 262144
    assert tokenizer.bos_id == 2
    assert tokenizer.eos_ids == {1, 106}
    assert tokenizer.control_ids == {0, 1, 2, 3, 105, 106, 255999, 256000}
    assert tokenizer.byte_ids == set(BYTES)


@pytest.mark.parametrize("token", [-1, 262144, 1 << 40, 1.0, "1", None])
def test_refuses_an_id_outside_the_vocabulary(tokenizer: Tokenizer, token: Any) -> None:
    with pytest.raises(RequestError, match="token id"):
        tokenizer.decode([2, token])
    with pytest.raises(RequestError, match="token id"):
        tokenizer.stream().push(token)


def test_takes_ids_from_arrays(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("Hello, world! \U0001fae9"), np.uint32)
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == "".join(map(stream.push, ids)) + stream.flush() == "<bos>Hello, world! \U0001fae9"


@pytest.mark.parametrize("text", [None, 1, b"Hi", ["Hi"]])
def test_refuses_what_is_not_text(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError, match=f"must be a str, not {type(text).__name__}"):
        tokenizer.encode(text)


def test_reads_lone_surrogates_as_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud83db\ude00\udc80") == tokenizer.encode("a\ufffdb\ufffd\ufffd")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe"])
def test_names_a_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: the file is damaged"):
        HFTokenizer(path)


def test_names_a_missing_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: there is no such file"):
        HFTokenizer(tmp_path / "tokenizer.json")


def test_names_a_tokenizer_json_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(path))
    with pytest.raises(ModelError, match=r"tokenizer\.json: there is no token <bos>"):
        HFTokenizer(path)


def test_ignores_truncation_and_padding_set_in_tokenizer_json(
    rust: tokenizers.Tokenizer, bpe: BPETokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    cut = tokenizers.Tokenizer.from_str(rust.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=8)
    cut.save(str(path))
    text = "one two three four five six seven eight nine ten"
    hf = HFTokenizer(path)
    assert hf.encode(text) == bpe.encode(text)
    assert hf.encode("a") == bpe.encode("a")


def test_names_a_vocabulary_that_is_not_gemmas(vocabulary: Vocabulary) -> None:
    pieces = list(vocabulary.pieces)
    cases: dict[str, dict[str, Any]] = {
        "a.gguf: there are 262144 tokens, 262143 scores and 262144 token types": {"scores": vocabulary.scores[1:]},
        "a.gguf: token 2 is empty": {"pieces": [*pieces[:2], "", *pieces[3:]]},
        "a.gguf: byte token '<0xzz>' is not": {"pieces": [*pieces[:238], "<0xzz>", *pieces[239:]]},
        "a.gguf: <bos> or some of the 256 byte tokens are missing": {
            "pieces": ["x" + piece for piece in pieces[:200]] + pieces[200:]
        },
    }
    for message, changes in cases.items():
        with pytest.raises(ModelError, match=message):
            BPETokenizer(*vocabulary._replace(**changes), source="a.gguf")
    few = Vocabulary(pieces[:300], vocabulary.scores[:300], vocabulary.types[:300])
    with pytest.raises(ModelError, match="some of the 256 byte tokens are missing"):
        BPETokenizer(*few, source="a.gguf")


def test_a_character_without_a_piece_is_bytes_even_where_longer_pieces_have_it(vocabulary: Vocabulary) -> None:
    pieces = ["<no q>" if piece == "q" else piece for piece in vocabulary.pieces]
    ids = BPETokenizer(pieces, vocabulary.scores, vocabulary.types).encode("quorum", bos=False)
    assert ids[0] == BYTES[ord("q")]
    assert "".join(pieces[token] for token in ids[1:]) == "uorum"


def test_control_tokens_are_known_by_name_whatever_the_file_types_them(
    vocabulary: Vocabulary, bpe: BPETokenizer
) -> None:
    types = vocabulary.types.copy()
    types[[2, 105, 106]] = 1
    tokenizer = BPETokenizer(vocabulary.pieces, vocabulary.scores, types)
    text = "<start_of_turn>user\nHi<end_of_turn>\n"
    assert tokenizer.encode(text) == bpe.encode(text)
    assert tokenizer.encode(text, control=False) == bpe.encode(text, control=False)


def test_threads_do_not_change_each_others_control_mode(hf: HFTokenizer) -> None:
    def encode(control: bool) -> list[int]:
        return hf.encode("<eos>" * 200, bos=False, control=control)

    modes = [True, False] * 500
    expected = {control: encode(control) for control in (True, False)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within encode
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(encode, modes)) == [expected[control] for control in modes]
    finally:
        sys.setswitchinterval(interval)


def test_time_of_10_000_tokens(vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]) -> None:
    rng = Random(5)
    words = [piece[1:] for piece in vocabulary.pieces if piece[0] == "▁" and piece[1:].isascii()]
    words = [word for word in words if word.isalpha()]
    ranks = np.arange(1, len(words) + 1)
    text = " ".join(rng.choices(words, weights=(1 / ranks).tolist(), k=10_000))
    started = perf_counter()
    tokenizer = BPETokenizer(*vocabulary)
    built = perf_counter()
    ids = tokenizer.encode(text)
    encoded = perf_counter()
    assert tokenizer.decode(ids, control=False) == text
    with capsys.disabled():
        print(
            f"\nBPETokenizer: built in {1e3 * (built - started):.0f} ms, "
            f"{len(ids)} tokens encoded in {1e3 * (encoded - built):.1f} ms"
        )
