"""Checks Gemma 4's vocabulary, from a tokenizer.json and from a GGUF, against `tokenizers` itself."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tokenizers

from gemma_wgpu.errors import ModelError
from gemma_wgpu.tokens import vocabulary as own
from gemma_wgpu.tokens.tokenizer import BPETokenizer, HFTokenizer, Tokenizer
from tests.data.record_tokens import TEXTS
from tests.vocabulary import Vocabulary, merges, random_text, read_vocabulary, rust_ids, tokenizer_json
from tests.vocabulary4 import CONTROL_IDS, gemma4, gguf_types, small

MORE_TEXTS = [
    "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\nHm.\n<channel|>Hello<turn|>\n",
    '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><|tool_response>',
    '<|"|><|"><"|>|>',
    "<mask><|think|><|image|><|video|>",
    "<start_of_turn>user\n<end_of_turn>",
    "<unused7><unused46><unused99>",
]


@pytest.fixture(scope="module")
def vocabulary(demo_gguf: Path) -> Vocabulary:
    return gemma4(read_vocabulary(demo_gguf))


@pytest.fixture(scope="module")
def ordered(vocabulary: Vocabulary) -> list[str]:
    """Return the merges as a GGUF has them."""
    return [f"{left} {right}" for left, right in merges(vocabulary)]


@pytest.fixture(scope="module")
def json_path(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(vocabulary, CONTROL_IDS)))
    return path


@pytest.fixture(scope="module")
def rust(json_path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(json_path))


@pytest.fixture(scope="module")
def of_gguf(vocabulary: Vocabulary, ordered: list[str]) -> BPETokenizer:
    types = np.array(gguf_types(vocabulary), np.int32)
    types[1] = 1  # a file may call <eos> normal, if it names <turn|> as the end
    return own.Vocabulary.from_merges(vocabulary.pieces, ordered, types, "model.gguf").tokenizer("model.gguf")


@pytest.fixture(scope="module")
def of_json(json_path: Path) -> BPETokenizer:
    """Return the vocabulary as it comes out of the file that a model folder has."""
    data = own.Vocabulary.from_tokenizer_json(json_path).to_bytes()
    return own.Vocabulary.from_bytes(data, "vocabulary").tokenizer("vocabulary")


@pytest.fixture(params=["of_gguf", "of_json", "hf"])
def tokenizer(request: pytest.FixtureRequest, json_path: Path) -> Tokenizer:
    if request.param == "hf":
        return HFTokenizer(json_path)
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.mark.slow
def test_there_are_as_many_merges_as_gemma_4_has(ordered: list[str]) -> None:
    assert len(ordered) == 514_906
    assert ordered[0] == "\n" * 30 + " \n"


@pytest.mark.slow
def test_encodes_as_tokenizers_does(
    of_gguf: BPETokenizer, of_json: BPETokenizer, rust: tokenizers.Tokenizer, vocabulary: Vocabulary
) -> None:
    rng = Random(11)
    for text in (*TEXTS, *MORE_TEXTS, *(random_text(rng, vocabulary.pieces) for _ in range(1500))):
        for control in (True, False):
            expected = rust_ids(rust, text, control)
            assert of_gguf.encode(text, bos=False, control=control) == expected, (text, control)
            assert of_json.encode(text, bos=False, control=control) == expected, (text, control)


@pytest.mark.slow
def test_knows_the_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.control_ids == set(CONTROL_IDS.values())
    assert tokenizer.eos_ids == {1, 50, 106}
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (262144, 2)
    assert tokenizer.byte_ids == set(range(238, 494))
    ids = [105, 4368, 107, 100, 45518, 107, 101, 9259, 106]
    assert tokenizer.decode(ids, control=False) == "model\nthought\nHello"
    assert tokenizer.decode(ids) == "<|turn>model\n<|channel>thought\n<channel|>Hello<turn|>"
    silent = {token for token, data in enumerate(tokenizer.token_bytes()) if not data}
    assert silent >= set(CONTROL_IDS.values())


def test_a_tokenizer_json_of_gemma_3_marks_other_tokens(tmp_path: Path) -> None:
    """<mask> is a control token of Gemma 4 alone."""
    path = tmp_path / "tokenizer.json"
    vocabulary = small(["ab"])
    path.write_text(json.dumps(tokenizer_json(vocabulary, CONTROL_IDS)))
    assert len(own.Vocabulary.from_tokenizer_json(path).tokenizer("small").control_ids) == len(CONTROL_IDS)
    path.write_text(json.dumps(tokenizer_json(vocabulary, CONTROL_IDS.keys() - {"<mask>"})))
    with pytest.raises(ModelError, match="it does not split text as Gemma's tokenizer"):
        own.Vocabulary.from_tokenizer_json(path)


def test_merges_that_make_control_tokens_do_not_count(tmp_path: Path) -> None:
    """No text becomes a control token, even if a file has merges that would make one of text."""
    vocabulary = small(["<|", '"|>', "|>", '<|"', "<|t", "urn>"])
    content = tokenizer_json(vocabulary, CONTROL_IDS)
    assert [left for left, right in content["model"]["merges"] if left + right == "<|turn>"] == ["<|t"]
    path = tmp_path / "tokenizer.json"
    for kept in (True, False):
        pairs = [pair for pair in content["model"]["merges"] if kept or "".join(pair) not in CONTROL_IDS]
        path.write_text(json.dumps({**content, "model": {**content["model"], "merges": pairs}}))
        tokenizer = own.Vocabulary.from_tokenizer_json(path).tokenizer("small")
        ids = tokenizer.encode('<|turn><|"|>', bos=False, control=False)
        assert not tokenizer.control_ids & set(ids)
        assert tokenizer.decode(ids) == '<|turn><|"|>'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: [*made, "Z Z"], r"model.gguf: the merges are damaged \(KeyError\('ZZ'\)\)"),
        (lambda made: [*made, "ab"], r"model.gguf: the merges are damaged \(ValueError"),
        (lambda made: [*made, "a b c"], r"model.gguf: the merges are damaged \(ValueError"),
        (lambda made: made[:-1], "the merges do not split text as Gemma's do"),
        (lambda made: [made[0], *made], "the merges do not split text as Gemma's do"),
    ],
)
def test_damaged_merges(change: Callable[[list[str]], list[str]], message: str) -> None:
    pieces, _, types = small(["ab", "abc", "bc"])
    made = [f"{left} {right}" for left, right in merges(small(["ab", "abc", "bc"]))]
    assert own.Vocabulary.from_merges(pieces, made, types, "model.gguf").tokenizer("x").encode("abc", bos=False)
    with pytest.raises(ModelError, match=message):
        own.Vocabulary.from_merges(pieces, change(made), types, "model.gguf")
