"""Models are judged as the same sums in float64 over the logits of `tests.tiny` judge them, by the commands too."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import Gemma, Progress, RequestError, load
from gemma_wgpu.bench.evaluate import Evaluation, evaluate
from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.test_cli import refused, run
from tests.tiny import BOS, HF, PIECES, random_weights, reference_logits, write_folder

CONFIG = Gemma3Config.from_hf(HF)
MODEL, OTHER = random_weights(CONFIG, 0), random_weights(CONFIG, 1)
TEXT = "the cat sat on a mat and so it went home again " * 6 + "<eos> is no control token here\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("judged") / "judged", HF, MODEL)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("other") / "other", HF, OTHER)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32") as gemma:
        yield gemma


@pytest.fixture(scope="module")
def other(other_folder: Path) -> Iterator[Gemma]:
    with load(other_folder, precision="f32") as gemma:
        yield gemma


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def expected(ids: list[int], segment: int) -> Evaluation:
    """Evaluate token by token, from the definitions."""
    losses, divergences, agreements = [], [], []
    for start in range(0, len(ids), segment - 1):
        targets = ids[start : start + segment - 1]
        inputs = [BOS, *targets[:-1]]
        p = log_softmax(reference_logits(CONFIG, OTHER, inputs))
        q = log_softmax(reference_logits(CONFIG, MODEL, inputs))
        for position, target in enumerate(targets):
            losses.append(-q[position, target])
            divergences.append(float(np.sum(np.exp(p[position]) * (p[position] - q[position]))))
            agreements.append(np.argmax(p[position]) == np.argmax(q[position]))
    return Evaluation(
        tokens=len(ids),
        perplexity=float(np.exp(np.mean(losses))),
        divergence=float(np.mean(divergences)),
        divergence_error=float(np.std(divergences) / len(ids) ** 0.5),
        agreement=float(np.mean(agreements)),
    )


def close(actual: Evaluation, reference: Evaluation) -> bool:
    return actual.tokens == reference.tokens and all(
        getattr(actual, name) == pytest.approx(getattr(reference, name), rel=1e-4)
        for name in ("perplexity", "divergence", "divergence_error", "agreement")
    )


def ids_of(model: Gemma, text: str = TEXT) -> list[int]:
    ids = model.tokenizer.encode(text, bos=False, control=False)
    assert BOS not in ids
    assert PIECES.index("<eos>") not in ids
    return ids


@pytest.mark.parametrize("segment", [2, 7, 64, 128])
def test_figures(model: Gemma, other: Gemma, segment: int) -> None:
    ids = ids_of(model)
    if segment > 2:
        assert len(ids) % (segment - 1)  # the last segment is a shorter one
    assert close(evaluate(model, TEXT, against=other, segment=segment), expected(ids, segment))


def test_the_reference_notices(model: Gemma) -> None:
    ids = ids_of(model)
    agreement = expected(ids, 64).agreement
    assert agreement is not None
    assert 0 < agreement < 1
    assert not close(expected(ids, 64), expected(ids, 63))
    assert not close(expected(ids, 64), expected(ids[:-1], 64))


def test_without_another_model(model: Gemma) -> None:
    result = evaluate(model, TEXT, segment=64)
    assert result.perplexity == pytest.approx(expected(ids_of(model), 64).perplexity, rel=1e-4)
    assert result.divergence is result.divergence_error is result.agreement is None


@pytest.mark.parametrize("count", [1, 20, 63, 64, 10**6])
def test_the_beginning_of_the_text(model: Gemma, other: Gemma, count: int) -> None:
    result = evaluate(model, TEXT, against=other, segment=64, max_tokens=count)
    assert close(result, expected(ids_of(model)[:count], 64))


def test_a_model_is_no_distance_from_itself(model: Gemma, folder: Path) -> None:
    with load(folder, precision="f32") as same:
        result = evaluate(model, TEXT, against=same, segment=64)
    assert result.divergence == result.divergence_error == 0
    assert result.agreement == 1


@pytest.mark.parametrize("chunk", [1, 5])
def test_however_the_text_is_cut(model: Gemma, other_folder: Path, chunk: int) -> None:
    with load(other_folder, precision="f32", prefill_chunk=chunk) as other:
        assert close(evaluate(model, TEXT, against=other, segment=64), expected(ids_of(model), 64))


def test_f16_is_near_f32(model: Gemma, folder: Path) -> None:
    with load(folder, precision="f16") as half:
        result = evaluate(half, TEXT, against=model, segment=64)
    assert result.divergence is not None
    assert 0 < result.divergence < 1e-3


def test_progress(model: Gemma) -> None:
    told: list[Progress] = []
    evaluate(model, TEXT, segment=64, progress=told.append)
    total = len(ids_of(model))
    assert {(step.total, step.unit) for step in told} == {(total, "tokens")}
    done = [step.done for step in told]
    assert done == sorted(set(done))
    assert done[-1] == total


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": ""}, "empty"),
        ({"segment": 1}, "segment is 1"),
        ({"segment": 129}, "segment is 129"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_options_that_are_wrong(model: Gemma, options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        evaluate(model, **({"text": TEXT, "segment": 64} | options))  # type: ignore[arg-type]


def test_a_segment_beyond_the_other_context(model: Gemma, other_folder: Path) -> None:
    with load(other_folder, context_length=32) as short, pytest.raises(RequestError, match="segment is 64"):
        evaluate(model, TEXT, against=short, segment=64)


def test_models_of_two_vocabularies(model: Gemma, tmp_path: Path) -> None:
    hf = HF | {"vocab_size": len(PIECES) + 32}
    folder = write_folder(tmp_path / "wider", hf, random_weights(Gemma3Config.from_hf(hf)))
    with load(folder) as wider, pytest.raises(RequestError, match=f"{len(PIECES)} and {len(PIECES) + 32}"):
        evaluate(model, TEXT, against=wider, segment=64)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_evaluate_command(folder: Path, other_folder: Path, text: str) -> None:
    options = ["--text", text, "--segment", "64", "--max-tokens", "100", "--precision", "f32"]
    result = run("evaluate", str(folder), *options, "--against", str(other_folder), "--against-precision", "f32")
    assert result.exit_code == 0, result.output
    with load(folder) as model:
        reference = expected(ids_of(model)[:100], 64)
    shown = dict(re.findall(r"^ {3}(\w[\w ]*?) {2,}(.+)$", result.stdout, re.MULTILINE))
    assert shown["tokens"] == "100"
    assert float(shown["perplexity"]) == pytest.approx(reference.perplexity, abs=1e-3)
    assert float(shown["divergence"].split()[0]) == pytest.approx(reference.divergence, rel=0.01)
    assert shown["same top token"] == f"{reference.agreement:.2%}"
    assert "judged" in result.stdout.splitlines()[0]
    assert "other" in result.stdout.splitlines()[0]
    alone = run("evaluate", str(folder), *options)
    assert alone.exit_code == 0, alone.output
    assert f"perplexity       {shown['perplexity']}\n" in alone.stdout
    assert "divergence" not in alone.stdout


def test_evaluate_command_refuses(folder: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    refused(run("evaluate", str(folder), "--text", text, "--segment", "1"), "segment is 1")
    refused(run("evaluate", str(folder), "--text", text, "--segment", "999"), "999")
    refused(run("evaluate", str(folder), "--text", str(tmp_path / "empty.txt"), "--segment", "64"), "empty")
    refused(run("evaluate", str(folder), "--text", str(tmp_path / "latin.txt"), "--segment", "64"), "UTF-8", code=2)
    refused(run("evaluate", str(folder), "--text", str(tmp_path / "none.txt")), "none.txt", code=2)
    refused(run("evaluate", str(tmp_path / "none"), "--text", text), "none")
    refused(run("evaluate", str(folder)), "--text", code=2)


def test_convert_and_inspect_commands(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", str(folder), str(out), "--quant", "int4", "--shard-size", "20kB")
    assert result.exit_code == 0, result.output
    shards = sorted(out.glob("weights-*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) <= 20_000
    shown = run("inspect", str(out), "--context-length", "100")
    assert shown.exit_code == 0, shown.output
    rows = dict(re.findall(r"^ {3}(\w[\w ]*?) {2,}(.+)$", shown.stdout, re.MULTILINE))
    assert rows["parameters"] == f"{sum(weights.size for weights in MODEL.values()):,}"
    assert rows["embedding"].startswith("INT8, 8.50 bits a weight")
    assert rows["21 matrices"].startswith("INT4, 4.50 bits a weight")
    for precision in ("f16", "f32"):
        with load(out, precision=precision, context_length=100) as gemma:
            sizes = gemma.gpu_bytes
        told = {name: int(size.replace(",", "")) for name, size in re.findall(r"(\w+) ([\d,]+)\b", rows[precision])}
        assert told == sizes  # so short a context has its whole cache from the beginning


def test_convert_command_replaces_by_force_only(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", str(folder), str(out), "--quant", "f16").exit_code == 0
    before = (out / "manifest.json").read_bytes()
    refused(run("convert", str(folder), str(out), "--quant", "int8"), str(out), "exists")
    assert (out / "manifest.json").read_bytes() == before
    result = run("convert", str(folder), str(out), "--quant", "int8", "--force")
    assert result.exit_code == 0, result.output
    assert "INT8, 8.50 bits a weight" in run("inspect", str(out)).stdout


def test_convert_command_refuses(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for size in ("", "much", "95 apples", "-1MB", "1e6"):
        refused(run("convert", str(folder), out, "--shard-size", size), "--shard-size", code=2)
    refused(run("convert", str(folder), out, "--shard-size", "0"), "0 bytes")
    refused(run("convert", str(folder), out, "--quant", "int3"), "int3", code=2)
    refused(run("convert", str(folder), out, "--embedding", "f16"), "f16", code=2)
    refused(run("convert", str(tmp_path / "none"), out), "none")
    refused(run("convert", str(folder)), "OUT", code=2)
    assert list(tmp_path.iterdir()) == []


def test_inspect_command_refuses(folder: Path, tmp_path: Path) -> None:
    refused(run("inspect", str(tmp_path / "none")), "none")
    refused(run("inspect", str(folder), "--context-length", "0"), "context")
    refused(run("inspect", str(folder), "--context-length", "129"), "context")
