"""Constraints: what a text is made of under them, on models that would rather say something else."""

import asyncio
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from gemma_wgpu import Gemma, Generation, RequestError, load, structured
from gemma_wgpu.engine.structured import Grammars, Matcher
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.options import Constraint, Options
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.opening import open_checkpoint
from tests.schemas import Schema, random_schema
from tests.table import EMBEDDING
from tests.tiny import BOS, END_OF_TURN, EOS, HF, PIECES, random_weights, scripted_weights, token, write_folder

pytestmark = pytest.mark.slow

LONG = HF | {"max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    weights = random_weights(Gemma3Config.from_hf(LONG))
    with load(write_folder(tmp_path_factory.mktemp("random"), LONG, weights), precision="f32") as gemma:
        yield gemma


@pytest.fixture(scope="module")
def demo() -> Iterator[Gemma]:
    with load("demo", context_length=512) as gemma:
        yield gemma


def told(gemma: Gemma, generation: Generation, reason: str = "eos") -> str:
    """Return the text. Its ids have no control tokens among them, and stand for it."""
    assert "".join(generation) == generation.text
    assert generation.stats.finish_reason == reason, generation.text
    tokenizer = gemma.tokenizer
    assert not tokenizer.control_ids.intersection(generation.ids)
    assert tokenizer.decode(generation.ids) == generation.text
    return generation.text


def check_json(text: str, schema: Schema) -> None:
    Draft202012Validator(schema).validate(json.loads(text))


SAMPLINGS = [
    Options(temperature=0),
    Options(temperature=0, repetition_penalty=1.5),
    Options(temperature=1.0),
    Options(temperature=2.0, top_k=0, top_p=1.0),
    Options(temperature=1.0, top_k=3, min_p=0.1, repetition_penalty=1.3),
]


@pytest.mark.parametrize("options", SAMPLINGS)
def test_json_by_random_schemas(gemma: Gemma, options: Options) -> None:
    for seed in range(20):
        random = Random(f"{options} {seed}")
        schema = random_schema(random)
        prompt = [BOS, *random.choices(range(6, len(PIECES)), k=random.randint(1, 20))]
        constraint = structured.json_schema(schema)
        check_json(told(gemma, gemma.generate(prompt, options=options, constraint=constraint, seed=seed)), schema)


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_real_model(demo: Gemma, seed: int) -> None:
    schema = random_schema(Random(seed), depth=1)
    prompt = f"An example that is valid by the JSON schema {json.dumps(schema)}:\n"
    check_json(told(demo, demo.generate(prompt, constraint=structured.json_schema(schema), seed=seed)), schema)


def test_a_chat_with_a_real_model(demo: Gemma) -> None:
    schema: Schema = {
        "type": "object",
        "properties": {
            "sentiment": {"enum": ["good", "bad"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
            "why": {"type": "string", "maxLength": 30},
        },
        "required": ["sentiment", "stars", "why"],
        "additionalProperties": False,
    }
    text = told(demo, demo.chat("I loved this film!", constraint=structured.json_schema(schema), seed=0))
    check_json(text, schema)
    assert text == json.dumps(json.loads(text), ensure_ascii=False)


PATTERNS = [
    "[a-f]{3}",
    "yes|no",
    "[0-9]{4}-[0-9]{2}",
    "(the |cat ){2,5}end",
    "é{3}",
    "😀|€",
    "\n\n?",
    r"^\W$",
    "(?i)AbC",
]


@pytest.mark.parametrize("pattern", [*PATTERNS, " a ", "a*b?c{0,2}"])
def test_regular_expressions(gemma: Gemma, pattern: str) -> None:
    constraint = structured.regex(pattern)
    for seed in range(3):
        text = told(gemma, gemma.generate("so x", constraint=constraint, seed=seed, max_new_tokens=300))
        assert re.fullmatch(pattern, text), text


def test_choices(gemma: Gemma) -> None:
    options = ["cat", "a cat", "(", 'a"b\\', "/x/", "\x00\t", "é😀", " ", "x\ny", "<eos>", "<unused0>", "▁", "\u2028"]
    found = set()
    for seed in range(40):
        generation = gemma.generate("so", constraint=structured.choice(options), temperature=9.0, seed=seed)
        found.add(told(gemma, generation))
        assert generation.text in options
    assert len(found) > 5
    for option in options:
        assert told(gemma, gemma.generate("so", constraint=structured.choice([option]))) == option


def test_the_likeliest_of_what_is_allowed(gemma: Gemma) -> None:
    """With and without a penalty, step by step: the highest logit in the mask."""
    constraint = structured.regex("(the |[a-z]{2} ){6}")
    for penalty in (1.0, 1.7):
        ids = [BOS, *range(270, 290)]
        text = gemma.generate(ids, constraint=constraint, temperature=0, repetition_penalty=penalty)
        assert len(told(gemma, text)) >= 18
        matcher = Grammars(gemma.tokenizer, len(PIECES)).matcher(constraint)
        refused = 0
        for count, chosen in enumerate(text.ids):
            before = [*ids, *text.ids[:count]]
            (logits,) = gemma.logits(before, last=1)
            seen = sorted(set(before))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            refused += logits.argmax() != chosen
            logits[sorted(set(range(len(PIECES))) - set(left(matcher)))] = -np.inf
            assert logits.argmax() == chosen
            matcher.accept(chosen)
        assert refused > 3


def test_where_the_form_allows_it_the_model_decides_when_to_end(tmp_path: Path) -> None:
    said = [token(piece) for piece in ("x", "y", "z")]
    for number, end in enumerate((EOS, END_OF_TURN)):
        weights = scripted_weights(Gemma3Config.from_hf(HF), [[*said, end]])
        with load(write_folder(tmp_path / f"{number}", HF, weights), precision="f32") as gemma:

            def text(pattern: str, gemma: Gemma = gemma) -> str:
                return told(gemma, gemma.generate(said[:1], constraint=structured.regex(pattern), temperature=0))

            assert text("[a-z]*") == "yz"
            assert text("[a-z]{5}")[:2] == "yz"
            assert text("[a-z]{1}") == "y"
            generation = gemma.generate(said[:1], constraint=structured.regex("[a-z]*"), temperature=0)
            generation.result()
            stored = gemma.runner.cache.newest()
            assert stored is not None and stored.ids[-1] == end


def test_cut_short(gemma: Gemma) -> None:
    constraint = structured.regex("a{40}")
    generation = gemma.generate("so", constraint=constraint, max_new_tokens=5)
    assert re.fullmatch("a+", told(gemma, generation, "length"))
    assert generation.stats.new_tokens == 5
    generation = gemma.generate("so", constraint=constraint, stop="aaa")
    assert "".join(generation) == ""
    assert generation.stats.finish_reason == "stop"
    ids = [BOS] * (gemma.context_length - 3)
    assert told(gemma, gemma.generate(ids, constraint=constraint), "context") == "aaaa"


def test_async_gives_the_same(gemma: Gemma) -> None:
    constraint = structured.json_schema({"type": "array", "items": {"type": "integer"}, "maxItems": 3})

    async def text() -> str:
        return "".join([piece.text async for piece in gemma.generate("so", constraint=constraint, seed=4)])

    assert asyncio.run(text()) == told(gemma, gemma.generate("so", constraint=constraint, seed=4))


def test_a_constraint_that_fails(gemma: Gemma) -> None:
    """llguidance does this if a grammar takes more memory or time than it allows."""
    generation = gemma.generate("so", constraint=structured.regex("[a-c]{9}"))
    first = next(generation)
    assert generation.request._matcher
    generation.request._matcher.accept(token("x"))
    assert re.fullmatch("[a-c]{1,2}", first + "".join(generation))
    assert generation.stats.finish_reason == "constraint"


def test_batches(gemma: Gemma) -> None:
    """Side by side, each text is what it is alone; those without a constraint too."""
    prompts = ["so", "the cat", "a mat on the mat", "it went home again", "x"]
    constraint = structured.regex("([a-z]{3} ){2,9}")
    for options in SAMPLINGS:
        alone = []
        for seed, prompt in enumerate(prompts):
            generation = gemma.generate(prompt, options=options, constraint=constraint, seed=seed)
            alone.append(told(gemma, generation))
        texts = gemma.generate(prompts, options=options, constraint=constraint, seed=0, batch_size=3)
        assert texts.result() == alone
        assert {stats.finish_reason for stats in texts.stats} == {"eos"}


def test_a_batch_of_texts_with_and_without_a_constraint(gemma: Gemma) -> None:
    constraints = [
        None,
        structured.regex("(a|b){7,9}"),
        structured.choice(["cat mat"]),
        None,
        structured.regex("q{20}"),
    ]

    def generations() -> list[Generation]:
        return [
            gemma.generate(f"so {seed}", constraint=constraint, seed=seed, max_new_tokens=25)
            for seed, constraint in enumerate(constraints)
        ]

    alone = generations()
    for generation in alone:
        list(generation)
    together = generations()

    async def generate_together() -> None:
        await asyncio.gather(*(generation._all() for generation in together))

    asyncio.run(generate_together())
    assert [generation.ids for generation in together] == [generation.ids for generation in alone]
    reasons = [generation.stats.finish_reason for generation in together]
    assert reasons == ["length", "eos", "eos", "length", "eos"]


def test_log_probabilities_are_of_what_is_allowed(gemma: Gemma) -> None:
    generation = gemma.generate("so", constraint=structured.regex("[ab]c"), logprobs=5, temperature=0.7, seed=1)
    first, second, *_ = generation
    assert first.logprobs
    assert second.logprobs
    assert len(first.logprobs.top) == 4  # two letters, and the bytes that stand for them
    assert np.isclose(sum(np.exp(logprob) for _, logprob in first.logprobs.top), 1)
    assert [logprob for _, logprob in second.logprobs.top] == [0.0]
    (logits,) = gemma.logits(gemma.tokenizer.encode("so"), last=1)
    ids = [i for i, _ in first.logprobs.top]
    expected = logits[ids] - np.log(np.exp(logits[ids]).sum())
    assert np.allclose([logprob for _, logprob in first.logprobs.top], expected, atol=1e-4)


def test_each_text_has_its_own_state(gemma: Gemma) -> None:
    constraint = structured.regex("abc")
    first, second = (gemma.generate("so", constraint=constraint) for _ in range(2))
    next(first)
    assert told(gemma, second) == "abc"
    assert first.result() == "abc"


def test_without_a_constraint_nothing_is_masked(gemma: Gemma) -> None:
    free = list(gemma.generate("so", temperature=0, max_new_tokens=9))
    assert told(gemma, gemma.generate("so", constraint=structured.regex("abc"))) == "abc"
    assert list(gemma.generate("so", temperature=0, max_new_tokens=9)) == free


def test_tokens_without_a_text_are_never_drawn(tmp_path: Path) -> None:
    hf = HF | {"vocab_size": len(PIECES) + 32}
    weights = random_weights(Gemma3Config.from_hf(hf))
    weights[EMBEDDING][len(PIECES) :] *= 50
    with load(write_folder(tmp_path / "wide", hf, weights), precision="f32") as gemma:
        assert len(told(gemma, gemma.generate("so", constraint=structured.regex("[^q]{9}"), seed=1))) == 9


def left(matcher: Matcher) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()
    return found


def test_masks_are_what_the_choices_have_in_common(gemma: Gemma) -> None:
    """On random walks: the tokens that continue one of the choices, and the ends where one is complete."""
    random = Random(0)
    data = gemma.tokenizer.token_bytes()
    ends = 0
    for _ in range(60):
        choices = ["".join(random.choices("ab cé", k=random.randint(1, 5))) for _ in range(6)]
        matcher = Grammars(gemma.tokenizer, len(PIECES)).matcher(structured.choice(choices))
        said = b""
        while True:
            rests = [text.encode()[len(said) :] for text in choices if text.encode().startswith(said)]
            expected = {i for i, piece in enumerate(data) if piece and any(rest.startswith(piece) for rest in rests)}
            if b"" in rests:
                expected |= {EOS, END_OF_TURN}
                ends += 1
            allowed = left(matcher)
            # A byte that must come next comes as the tokenizer would write it, and in no other way.
            forced = b"" not in rests and len({rest[0] for rest in rests}) == 1
            assert allowed
            assert set(allowed) <= expected if forced else set(allowed) == expected
            chosen = random.choice(allowed)
            matcher.accept(chosen)
            if chosen in (EOS, END_OF_TURN):
                break
            said += data[chosen]
    assert ends > 60


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return open_checkpoint(find("demo")).tokenizer()


@pytest.fixture(scope="module")
def grammars(vocabulary: Tokenizer) -> Grammars:
    return Grammars(vocabulary, vocabulary.vocab_size)


def test_the_whole_vocabulary(vocabulary: Tokenizer, grammars: Grammars) -> None:
    """Inside of a JSON string: every token whose text may be there."""
    matcher = grammars.matcher(structured.json_schema({"type": "string"}))
    matcher.accept(vocabulary.encode('"', bos=False)[0])
    allowed = set(left(matcher))
    for count, piece in enumerate(vocabulary.token_bytes()):
        if count in vocabulary.byte_ids:
            continue
        text = piece.decode()
        if text and '"' not in text and "\\" not in text:
            assert (count in allowed) == (min(text) >= " " and text != "\x7f"), text
        assert text or count not in allowed
    assert {EOS, 106} & allowed == set()
    assert len(allowed) > 250_000


@pytest.mark.parametrize(
    "text", ["<unused5> <end_of_turn>", "▁▁ <mask>", "a  b\n\n\tc", "[multimodal]<bos>", "日本語"]
)
def test_any_text_can_be_written(vocabulary: Tokenizer, grammars: Grammars, text: str) -> None:
    matcher = grammars.matcher(structured.choice([text]))
    data, said = vocabulary.token_bytes(), b""
    for _ in range(100):
        allowed = left(matcher)
        if 106 in allowed:
            break
        matcher.accept(allowed[0])
        said += data[allowed[0]]
    assert said == text.encode()
    assert allowed == sorted(vocabulary.eos_ids)


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}, {"enum": [1]}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {}}}, {}),
    ],
)
def test_response_formats(response_format: dict[str, object], schema: Schema) -> None:
    assert structured.from_response_format(response_format) == structured.json_schema(schema)


def test_a_response_format_of_text() -> None:
    assert structured.from_response_format({"type": "text"}) is None


@pytest.mark.parametrize(
    "response_format",
    [{}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}, None, "text"],
)
def test_response_formats_that_are_wrong(response_format: dict[str, object]) -> None:
    refused("response_format must be ", structured.from_response_format, response_format)


def refused(message: str, make: object, *arguments: object) -> None:
    with pytest.raises(RequestError) as raised:
        make(*arguments)  # type: ignore[operator]
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "the JSON schema cannot be used: Invalid type: strin"),
        ({"not": {}}, 'the JSON schema cannot be used: Unimplemented keys: ["not"]'),
        ({"type": "string", "format": "rhyme"}, "the JSON schema cannot be used: Unknown format: rhyme"),
        ({"minimum": 2, "maximum": 1, "type": "integer"}, "the JSON schema cannot be used: Unsatisfiable schema: "),
        ({"type": "string", "pattern": "("}, "the JSON schema cannot be used: unclosed group"),
        ({"$ref": "#/nowhere"}, "the JSON schema cannot be used: "),
        (False, "a JSON schema is a dict, not bool"),
        (None, "a JSON schema is a dict, not NoneType"),
        ({"const": {1}}, "the JSON schema cannot be used: Object of type set is not JSON serializable"),
        ({"const": float("nan")}, "the JSON schema cannot be used: "),
        ({"x-guidance": {"tabs": 1}}, "the JSON schema cannot be used: unknown field `tabs`, "),
    ],
)
def test_schemas_that_are_wrong(schema: object, message: str) -> None:
    refused(message, structured.json_schema, schema)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "the regular expression '(' cannot be used: unclosed group"),
        (
            "(?=a)",
            "the regular expression '(?=a)' cannot be used: look-around, including look-ahead and look-behind,",
        ),
        (r"\bword", r"the regular expression '\\bword' cannot be used: "),
        (3, "a regular expression is a str, not int"),
    ],
)
def test_patterns_that_are_wrong(pattern: str, message: str) -> None:
    refused(message, structured.regex, pattern)


@pytest.mark.parametrize("options", [[], "yes", ["a", ""], [1], None])
def test_choices_that_are_wrong(options: Sequence[str]) -> None:
    refused(f"choices are {options!r}; they must be a list of texts, none of them empty", structured.choice, options)


def test_what_is_no_constraint(gemma: Gemma) -> None:
    message = "constraint is a dict; make one by gemma_wgpu.structured.json_schema"
    refused(message, lambda: gemma.generate("a", constraint={"type": "object"}))  # type: ignore[call-overload]
    refused(message, lambda: gemma.chat("a", constraint={}))  # type: ignore[call-overload]
    refused("the constraint cannot be kept: ", lambda: gemma.generate("a", constraint=Constraint("{")))


def test_without_llguidance(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make, argument in ((structured.regex, "a"), (structured.choice, ["a"]), (structured.json_schema, {})):
        refused(
            "constraints take llguidance, which is not installed; pip install 'gemma-wgpu[structured]'",
            make,
            argument,
        )
    assert list(gemma.generate("a", max_new_tokens=1))
