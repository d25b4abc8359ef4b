"""A benchmark of a tiny model: its report is whole and consistent. How fast it is does not matter here."""

import asyncio
import builtins
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from gemma_wgpu import Gemma, Progress, RequestError, load
from gemma_wgpu.apps.cli import main
from gemma_wgpu.bench import tables
from gemma_wgpu.bench.peers import PEERS
from gemma_wgpu.bench.run import (
    Engine,
    Match,
    Prompt,
    Reference,
    Report,
    Run,
    Shape,
    bench,
    model_hash,
    parse_depths,
    prompt_ids,
    read_bandwidth,
)
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.ops.tuner import candidates
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.table import matrix_shapes, norm_shapes
from tests.tiny import EOS, HF, random_weights, reference_logits, scripted_weights, token, write_folder

pytestmark = pytest.mark.slow

SHAPES = [Shape(12, 5), Shape(0, 6), Shape(7, 0), Shape(12, 5, 60), Shape(0, 6, 33)]
CONFIG = Gemma3Config.from_hf(HF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bench") / "tiny", HF, random_weights(CONFIG))


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32", prefill_chunk=32) as gemma:
        yield gemma


def measure(gemma: Gemma, shapes: Sequence[Shape], **options: Any) -> Report:
    return gemma.device.wait(bench(gemma, shapes, **options))


@pytest.fixture(scope="module")
def report(gemma: Gemma) -> Report:
    return measure(gemma, SHAPES, repetitions=2)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def refused(result: Result, *named: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    for name in named:
        assert name in line


def test_every_shape_is_run_as_often_as_asked(report: Report) -> None:
    assert [result.shape for result in report.results] == SHAPES
    for result in report.results:
        assert len(result.runs) == 2
        for run in (result.warm_up, *result.runs):
            assert len(run.ids) == result.shape.decode + 1
            assert run.prefill_seconds > 0
            assert (run.decode_seconds > 0) == (result.shape.decode > 0)


def test_the_depth_is_in_the_cache_and_the_prompt_is_not(report: Report) -> None:
    for result in report.results:
        assert {run.cached for run in result.runs} == {result.shape.depth}


def test_tokens_are_what_the_model_says_at_that_depth(gemma: Gemma, report: Report) -> None:
    weights = random_weights(CONFIG)
    for result in report.results:
        ids = prompt_ids(gemma.tokenizer, result.shape.depth + result.shape.prompt)
        new = result.warm_up.ids
        logits = reference_logits(CONFIG, weights, [*ids, *new[:-1]])[len(ids) - 1 :]
        assert logits.argmax(axis=1).tolist() == new
        assert all(run.ids == new for run in result.runs)


def test_rates_are_tokens_over_seconds(report: Report) -> None:
    for result in report.results:
        if result.shape.prefill:
            rates = [result.shape.prefill / run.prefill_seconds for run in result.runs]
            assert result.prefill is not None
            assert result.prefill.median == pytest.approx(np.median(rates))
            assert (result.prefill.smallest, result.prefill.largest) == (min(rates), max(rates))
        else:
            assert result.prefill is None
        if result.shape.decode:
            rates = [result.shape.decode / run.decode_seconds for run in result.runs]
            assert result.decode is not None
            assert result.decode.median == pytest.approx(np.median(rates))
        else:
            assert result.decode is None


def test_decode_reads_all_weights_and_what_each_layer_sees(gemma: Gemma, report: Report) -> None:
    floats = sum(rows * cols for rows, cols in matrix_shapes(CONFIG).values())
    # A layer's norm also lies beside the one that goes before it in the next layer.
    assert gemma.gpu_bytes["weights"] >= 4 * (floats + sum(size for (size,) in norm_shapes(CONFIG).values()))
    for result in report.results:
        shape = result.shape
        if not shape.decode:
            assert result.decode_bytes is None
            continue
        seen = shape.depth + max(shape.prefill, 1) + shape.decode // 2
        slots = 2 * min(8, seen) + seen  # two local layers of a window of 8, and a global one
        assert result.decode_bytes == gemma.gpu_bytes["weights"] + slots * 2 * 2 * 32 * 4


def test_kernels_are_those_of_a_prompt_and_of_a_token(gemma: Gemma, report: Report) -> None:
    assert "timestamp-query" in gemma.device.features
    for result in report.results:
        assert bool(result.prefill_kernels) == bool(result.shape.prefill)
        assert bool(result.decode_kernels) == bool(result.shape.decode)
        for kernels in (result.prefill_kernels, result.decode_kernels):
            seconds = [kernel.seconds for kernel in kernels]
            assert seconds == sorted(seconds, reverse=True)
            assert all(0 <= duration < 60 for duration in seconds)
        assert 0 <= sum(kernel.seconds for kernel in result.prefill_kernels) <= result.prefill_profiled
        assert 0 <= sum(kernel.seconds for kernel in result.decode_kernels) <= result.decode_profiled
        if result.shape.decode:
            assert sum(kernel.dispatches for kernel in result.decode_kernels) == report.dispatches_per_token
            assert "sample" in {kernel.shader for kernel in result.decode_kernels}
            assert "matmul" not in {kernel.shader for kernel in result.decode_kernels}
        if result.shape.prefill:
            assert {"matmul", "sample"} <= {kernel.shader for kernel in result.prefill_kernels}


def test_a_prompt_of_several_chunks_is_profiled_whole(gemma: Gemma) -> None:
    one, three = (measure(gemma, [Shape(length, 0)], repetitions=1).results[0] for length in (32, 80))
    attention = [
        sum(kernel.dispatches for kernel in result.prefill_kernels if kernel.shader == "attention_prefill")
        for result in (one, three)
    ]
    assert attention == [3, 9]
    heads = [sum(k.dispatches for k in r.prefill_kernels if k.shader == "sample") for r in (one, three)]
    assert heads == [1, 1]


def test_a_gpu_without_timestamps_leaves_the_kernels_out(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma.device, "features", gemma.device.features - {"timestamp-query"})
    found = measure(gemma, [Shape(4, 4)], repetitions=1)
    assert found.results[0].prefill_kernels == found.results[0].decode_kernels == []
    assert "| kernel |" not in tables.markdown(found)


def test_what_else_is_measured(gemma: Gemma, report: Report) -> None:
    assert report.gpu_bytes == gemma.gpu_bytes
    assert report.dispatches_per_token > 3 * 5
    assert report.bandwidth > 1e6
    for host in (report.host.alone, report.host.beside_shaders):
        assert 0 < host.smallest <= host.median <= host.largest < 10
    assert (report.model, report.quantization, report.precision) == ("tiny", "f32", "f32")
    assert report.adapter == gemma.device.info
    assert report.activations == gemma.activations
    assert report.tuning in candidates(gemma.device)


def test_a_text_goes_on_past_its_end(tmp_path: Path) -> None:
    """The tokens of a reference may do so too."""
    cat, sat = token("▁cat"), token("▁sat")
    with load(write_folder(tmp_path / "any", HF, random_weights(CONFIG))) as gemma:
        prompt = prompt_ids(gemma.tokenizer, 2)
    scripted = scripted_weights(CONFIG, [[prompt[-1], EOS, cat, sat]])
    reference = Reference("a script", [Prompt(prompt, [EOS, cat])])
    with load(write_folder(tmp_path / "scripted", HF, scripted), precision="f32") as gemma:
        found = measure(gemma, [Shape(2, 2)], repetitions=1, reference=reference)
    assert [run.ids for run in found.results[0].runs] == [[EOS, cat, sat]]
    assert found.match == Match("a script", 1, 2, 2)


class Watched:
    """A lock that knows whether somebody holds it."""

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self.lock, self.depth = lock, 0

    def __enter__(self) -> None:
        self.lock.__enter__()
        self.depth += 1

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        self.lock.__exit__(*error)


def test_the_lock_is_held_at_every_submission(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is in an event loop, in which `Device.wait` does not hold it for all of the benchmark."""
    device, reference = gemma.device, Reference("ours", [Prompt(prompt_ids(gemma.tokenizer, 5), [1, 2])])
    lock, called = Watched(device.lock), set()

    def watch(name: str) -> None:
        method = getattr(device, name)

        def checked(*arguments: Any, **options: Any) -> Any:
            assert lock.depth > 0, name
            called.add(name)
            return method(*arguments, **options)

        monkeypatch.setattr(device, name, checked)

    monkeypatch.setattr(device, "lock", lock)
    for name in ("write", "copy", "submit", "read", "_timestamps"):
        watch(name)
    asyncio.run(bench(gemma, [Shape(40, 3, 20), Shape(0, 2)], repetitions=1, reference=reference))
    assert {"write", "read", "_timestamps"} <= called
    assert lock.depth == 0


def test_the_model_can_be_used_afterwards(gemma: Gemma, report: Report) -> None:
    allocated = gemma.device.allocated
    again = measure(gemma, [SHAPES[0]], repetitions=1)
    assert again.results[0].warm_up.ids == report.results[0].warm_up.ids
    assert gemma.device.allocated == allocated
    generation = gemma.generate(prompt_ids(gemma.tokenizer, 12), temperature=0, max_new_tokens=3)
    list(generation)
    assert generation.stats.reused_tokens == 0
    assert generation.ids == report.results[0].warm_up.ids[:3]


def test_json_has_every_run(report: Report) -> None:
    content = json.loads(report.to_json())
    assert set(content) == {
        *("format", "date", "machine", "versions", "adapter", "model", "quantization", "precision", "sha256"),
        *(
            "activations",
            "tuning",
            "context_length",
            "gpu_bytes",
            "bandwidth",
            "dispatches_per_token",
            "host",
            "load",
            "results",
        ),
        *("features", "limits", "match", "model_bytes", "host_bytes"),
    }
    assert content["format"] == 2
    assert set(content["versions"]) == {"gemma-wgpu"}
    assert set(content["adapter"]) == {"vendor", "architecture", "device", "driver", "backend", "type"}
    assert set(content["host"]) == {"alone", "beside_shaders"}
    for result, found in zip(content["results"], report.results, strict=True):
        assert result["engine"] == "gemma-wgpu"
        assert result["shape"] == vars(found.shape)
        assert [run["ids"] for run in result["runs"]] == [run.ids for run in found.runs]
        for run in (result["warm_up"], *result["runs"]):
            assert set(run) == {"cached", "prefill_seconds", "decode_seconds", "ids", "token_seconds"}
            assert sum(run["token_seconds"]) == pytest.approx(run["decode_seconds"], rel=0.1, abs=1e-3)
        for kernel in result["prefill_kernels"] + result["decode_kernels"]:
            assert set(kernel) == {"shader", "workgroups", "dispatches", "seconds"}


def test_json_is_read_as_it_was_written(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("host"),
        lambda report: report.update(bandwidth="fast"),
        lambda report: report.update(bandwidth=float("nan")),
        lambda report: report.update(results=[]),
        lambda report: report["results"][0].update(runs=[]),
        lambda report: report["results"][0]["runs"][0].update(prefill_seconds=0),
        lambda report: report["results"][0]["runs"][0]["ids"].pop(),
        lambda report: report.update(format=1),
        lambda report: report.clear(),
    ],
)
def test_json_that_is_no_report(report: Report, change: Any) -> None:
    content = json.loads(report.to_json())
    change(content)
    with pytest.raises(RequestError, match="report"):
        Report.from_json(json.dumps(content))
    for text in ("", "[]", "[" * 100_000):
        with pytest.raises(RequestError, match="not a report"):
            Report.from_json(text)


def test_tokens_are_compared_with_a_reference(gemma: Gemma, report: Report) -> None:
    weights = random_weights(CONFIG)
    prompts = []
    for length in (5, 12, 90):
        ids = prompt_ids(gemma.tokenizer, length)
        tokens: list[int] = []
        for _ in range(4):
            tokens.append(int(reference_logits(CONFIG, weights, [*ids, *tokens])[-1].argmax()))
        prompts.append(Prompt(ids, tokens))
    for shapes, same in (([Shape(12, 2)], (2, 6)), ([Shape(3, 9)], (1, 4)), ([Shape(90, 0)], (3, 3))):
        found = measure(gemma, shapes, repetitions=1, reference=Reference("ours", prompts))
        assert found.match == Match("ours", same[0], same[1], same[1])
        assert found.valid
    prompts[0].tokens[1] ^= 1
    found = measure(gemma, [Shape(3, 9)], repetitions=1, reference=Reference("ours", prompts))
    assert found.match == Match("ours", 1, 4, 3)
    assert not found.valid
    assert report.match is None
    assert report.valid


def test_runs_that_differ_are_not_valid(report: Report) -> None:
    first, *others = report.results
    wrong = replace(first.runs[0], ids=[token ^ 1 for token in first.runs[0].ids])
    assert not replace(report, results=[replace(first, runs=[wrong, *first.runs[1:]]), *others]).valid
    assert replace(report, results=[*report.results, replace(first, engine="parrot", runs=[wrong])]).valid


def test_percentiles_of_tokens(report: Report) -> None:
    for result in report.results:
        seconds = [duration for run in result.runs for duration in run.token_seconds]
        if not result.shape.decode:
            assert result.token_percentiles is None
            continue
        assert len(seconds) == 2 * result.shape.decode
        assert result.token_percentiles == pytest.approx(np.percentile(seconds, [50, 95, 99]))


def test_csv_has_a_row_for_each_phase(report: Report) -> None:
    rows = list(csv.DictReader(tables.to_csv(report).splitlines()))
    assert [(row["phase"], row["depth"]) for row in rows] == [
        *(("prefill", "0"), ("decode", "0"), ("decode", "0"), ("prefill", "0")),
        *(("prefill", "60"), ("decode", "60"), ("decode", "33")),
    ]
    first = report.results[0]
    assert first.decode is not None
    assert float(rows[1]["tokens_per_second"]) == first.decode.median
    assert float(rows[1]["bytes_per_second"]) == first.decode_bandwidth
    assert float(rows[0]["first_token_seconds"]) == first.first_token.median
    assert all(float(row["min"]) <= float(row["tokens_per_second"]) <= float(row["max"]) for row in rows)


def test_markdown_has_every_shape_and_figure(report: Report) -> None:
    text = tables.markdown(report)
    for name in ("pp12+tg5, prefill", "tg6, decode", "pp7, prefill", "pp12+tg5 @ d60, decode", "tg6 @ d33, decode"):
        assert f"| {name} |" in text
    assert f"{report.dispatches_per_token} dispatches" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {3, 7}
    assert ": peer" not in text


class Parrot(Engine):
    """A peer that says what no model does, and notes what it is asked."""

    name = "parrot"

    def __init__(self) -> None:
        self.versions = {"parrot": "1"}
        self.asked: list[tuple[list[int], list[int]]] = []
        self.cache: list[int] = []

    async def fill(self, ids: Sequence[int]) -> None:
        self.cache = list(ids)

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        self.asked.append((self.cache, list(ids)))
        return Run(len(self.cache), 0.5, 0.25 * decode, [-1] * (decode + 1))

    def close(self) -> None:
        """Do nothing."""


def test_a_peer_makes_every_run_too_on_the_same_prompts(gemma: Gemma) -> None:
    parrot = Parrot()
    told: list[Progress] = []
    found = measure(
        gemma,
        [Shape(4, 2, 20), Shape(0, 3)],
        repetitions=2,
        peers=[parrot],
        progress=told.append,
    )
    doing = [
        *("gemma-wgpu, pp4+tg2 @ d20, run to warm up", "parrot, pp4+tg2 @ d20, run to warm up"),
        *("gemma-wgpu, pp4+tg2 @ d20, run 1 of 2", "parrot, pp4+tg2 @ d20, run 1 of 2"),
    ]
    assert [step.what for step in told[:4]] == doing
    assert [(step.done, step.total, step.unit) for step in told] == [(n, 16, "steps") for n in range(17)]
    ids = prompt_ids(gemma.tokenizer, 24)
    assert parrot.asked == [(ids[:20], ids[20:])] * 3 + [([], ids[:1])] * 3
    assert [result.engine for result in found.results] == ["gemma-wgpu", "parrot"] * 2
    assert found.versions["parrot"] == "1"
    ours, theirs = found.results[:2]
    assert theirs.decode is not None and theirs.decode.median == 4.0
    assert ours.decode is not None
    text = tables.markdown(found)
    assert f"| pp4+tg2 @ d20, decode | parrot | {ours.decode.median / 4:.2f} | 0 of 3 |" in text
    assert "| pp4+tg2 @ d20, prefill | parrot |" in text


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("pp512", Shape(512, 0)),
        ("tg128", Shape(0, 128)),
        ("pp8+tg4", Shape(8, 4)),
        ("litert", Shape(1024, 256)),
    ],
)
def test_shapes_by_name(text: str, shape: Shape) -> None:
    assert Shape.parse(text) == shape


@pytest.mark.parametrize("text", ["", "+", "pp", "512", "tg1+pp1", "pp0", "pp-1", "LITERT"])
def test_names_that_are_no_shape(text: str) -> None:
    with pytest.raises(RequestError, match="shape|nothing to time"):
        Shape.parse(text)


def test_shapes_that_are_too_long(gemma: Gemma) -> None:
    measure(gemma, [Shape(28, 100)], repetitions=1)
    with pytest.raises(RequestError, match="pp29\\+tg100 takes a context of 129 tokens, .* 128"):
        measure(gemma, [Shape(29, 100)])
    with pytest.raises(RequestError, match="pp1 @ d128 takes a context of 129"):
        measure(gemma, [Shape(1, 0, 128)])


def test_a_context_in_which_nothing_can_be_decoded(folder: Path) -> None:
    with load(folder, context_length=1) as gemma, pytest.raises(RequestError, match="context of 1 token"):
        measure(gemma, [Shape(1, 0)], repetitions=1)
    with load(folder, context_length=2) as gemma:
        assert len(measure(gemma, [Shape(1, 1)], repetitions=1).results[0].warm_up.ids) == 2


def test_no_repetitions(gemma: Gemma) -> None:
    with pytest.raises(RequestError, match="repetitions is 0"):
        measure(gemma, [Shape(1, 1)], repetitions=0)


def test_it_can_be_cancelled_at_every_step(gemma: Gemma, report: Report) -> None:
    """The model can be used afterwards."""
    allocated, shapes = gemma.device.allocated, [Shape(12, 5, 20)]
    reference = Reference("ours", [Prompt(prompt_ids(gemma.tokenizer, 5), [1, 2, 3])])

    async def cancel(at: int) -> str:
        def progress(step: Progress) -> None:
            reached.append(step.what)
            if step.done == at:
                task.cancel()

        reached: list[str] = []
        task = asyncio.ensure_future(bench(gemma, shapes, repetitions=1, reference=reference, progress=progress))
        with pytest.raises(asyncio.CancelledError):
            await task
        return reached[-1]

    ended = [asyncio.run(cancel(at)) for at in range(6)]
    assert ended == [
        *("gemma-wgpu, pp12+tg5 @ d20, run to warm up", "gemma-wgpu, pp12+tg5 @ d20, run 1 of 1"),
        *("timing kernels, pp12+tg5 @ d20", "comparing tokens with the reference", "measuring bandwidth"),
        "timing the host",
    ]
    again = measure(gemma, [SHAPES[0]], repetitions=1)
    assert again.results[0].warm_up.ids == report.results[0].warm_up.ids
    assert gemma.device.allocated == allocated


def test_in_an_event_loop(gemma: Gemma, report: Report) -> None:
    found = asyncio.run(bench(gemma, [SHAPES[3]], repetitions=1))
    assert found.results[0].warm_up.ids == report.results[3].warm_up.ids


def test_hashes(tmp_path: Path, folder: Path) -> None:
    one, two = tmp_path / "a.bin", tmp_path / "b.bin"
    one.write_bytes(b"a")
    two.write_bytes(b"b")
    assert model_hash([one]) == hashlib.sha256(b"a").hexdigest()
    assert model_hash([two, one]) == model_hash([one, two]) != model_hash([one])
    with open_checkpoint(folder) as checkpoint:
        convert(checkpoint, tmp_path / "ours")
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        manifest = (tmp_path / "ours" / "manifest.json").read_bytes()
        assert model_hash(checkpoint.files) == hashlib.sha256(manifest).hexdigest()


def test_the_command(folder: Path) -> None:
    result = run(str(folder), "--shape", "pp8+tg4", "--depth", "0,40", "-r", "1", "--format", "json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    shapes = [(r["shape"]["prefill"], r["shape"]["decode"], r["shape"]["depth"]) for r in content["results"]]
    assert shapes == [(8, 4, 0), (8, 4, 40)]
    assert content["context_length"] == 128
    assert content["load"]["cold"] > 0
    assert content["load"]["warm"] > 0
    assert len(content["sha256"]) == 64
    for form, first in (("csv", "engine,prefill,decode"), ("md", "tiny f32, ")):
        result = run(str(folder), "--prefill", "3", "-r", "1", "--format", form)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(first)


def test_depths_in_kibis() -> None:
    assert parse_depths("0, 1k,4K,300") == [0, 1024, 4096, 300]


def test_a_plot(folder: Path, tmp_path: Path, report: Report) -> None:
    path = tmp_path / "speed.png"
    tables.plot(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RequestError, match="cannot be written"):
        tables.plot(report, tmp_path / "missing" / "speed.png")
    with pytest.raises(RequestError, match="cannot be written"):
        tables.plot(report, tmp_path / "speed.xyz")


def test_what_the_command_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = str(folder)
    refused(run(tiny, "--peer", "ollama"), "no peer 'ollama'", "llama.cpp, transformers, onnxruntime")
    refused(run(tiny, "--shape", "pp"), "'pp' is not a shape")
    refused(run(tiny, "--decode", "-4"), "nothing to time")
    refused(run(tiny, "--depth", "1m"), "0,1k,4k,16k")
    refused(run(tiny, "--shape", "pp100", "--depth", "0,100"), "pp100 @ d100 takes a context of 200 tokens", "128")
    refused(run(tiny), "pp512 takes a context of 512 tokens")
    refused(run(tiny, "--shape", "pp4", "-r", "0"), "repetitions is 0")


@pytest.mark.parametrize(
    ("peer", "readable", "module", "package"),
    [
        ("llama.cpp", "model.gguf", "llama_cpp", "llama-cpp-python"),
        ("transformers", "config.json", "torch", "torch"),
        ("transformers", "config.json", "transformers", "transformers"),
        ("onnxruntime", "genai_config.json", "onnxruntime_genai", "onnxruntime-genai"),
    ],
)
def test_packages_of_peers_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str, readable: str, module: str, package: str
) -> None:
    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return ModuleType(name) if name == "torch" else real(name, *arguments, **options)

    path = tmp_path / readable
    path.touch()
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=f"pip install {package} "):
        PEERS[peer](path if path.suffix == ".gguf" else tmp_path, 16, None)


def test_models_that_peers_do_not_read(folder: Path, tmp_path: Path) -> None:
    refused(run(str(folder), "--shape", "pp4", "--peer", "llama.cpp"), str(folder), ".gguf", "--peer-model")
    refused(run(str(folder), "--shape", "pp4", "--peer", "onnxruntime"), "genai_config.json", "--peer-model")
    with open_checkpoint(folder) as checkpoint:
        convert(checkpoint, tmp_path / "ours")
    options = ["--shape", "pp4", "--peer", "transformers", "--peer-model", str(tmp_path / "ours")]
    refused(run(str(folder), *options), str(tmp_path / "ours"), "Hugging Face folders")


def test_a_plot_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(run(str(folder), "--shape", "pp4", "--plot", "x.png"), "pip install 'gemma-wgpu[bench]'")


def test_bandwidth_within_an_odd_limit() -> None:
    device = open_device_sync()
    device.limits = replace(device.limits, max_storage_buffer_binding_size=(128 << 20) - 4)
    assert device.wait(read_bandwidth(device)) > 1e6
    assert device.allocated == 0
    device.close()
