"""Small random Gemma 3n and Gemma 4 against transformers: whole, in chunks, side by side, past the window."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from gemma_wgpu import Gemma, load
from gemma_wgpu.apps.cli import main
from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.spec import MatFormerSlice
from gemma_wgpu.weights.convert import Quant, convert
from gemma_wgpu.weights.matformer import SlicedCheckpoint
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.summary import summarize
from tests.reference.families import CONFIGS, IDS, WIDTH, write, write_gguf_of
from tests.reference.golden import FOLDER, divergence, greedy, largest_error
from tests.reference.random_1b import write_tokenizer

Report = Callable[[str], None]

with np.load(FOLDER / "families.npz") as recorded:
    LOGITS: dict[str, NDArray[np.float32]] = {name: recorded[f"{name}_logits"] for name in CONFIGS}
    SLICE: NDArray[np.float32] = recorded["slice_logits"]
    GREEDY: dict[str, list[int]] = {name: recorded[f"{name}_greedy"].tolist() for name in CONFIGS}

F32 = 3e-5  # of the largest logit
F16_DIVERGENCE = (
    2e-3  # nats at a position: the attention's scale is 1, so scores are large, and float16 keys round them
)

every_family = pytest.mark.parametrize("name", list(CONFIGS), scope="module")


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("families") / name, name)


@pytest.fixture(scope="module", params=["gpu", "host"])
def f32(folder: Path, request: pytest.FixtureRequest) -> Iterator[Gemma]:
    with load(folder, precision="f32", context_length=128, per_layer_table=request.param) as model:
        yield model


@every_family
def test_logits(name: str, f32: Gemma, report: Report) -> None:
    error = largest_error(f32.logits(IDS), LOGITS[name]) / np.abs(LOGITS[name]).max()
    report(f"{error:.1e} of the largest, {f32.runner.decode_dispatches} dispatches a token")
    assert error < F32


@every_family
def test_greedy(name: str, f32: Gemma) -> None:
    f32.reset()
    assert greedy(f32, IDS, most=8) == GREEDY[name]


@every_family
def test_side_by_side(name: str, f32: Gemma) -> None:
    f32.reset()
    prompts = [IDS, IDS[:9], IDS[:30], IDS]
    texts = f32.generate(prompts, temperature=0, max_new_tokens=8)
    texts.result()
    assert texts.ids[0] == texts.ids[3] == GREEDY[name]
    for prompt, ids in zip(prompts, texts.ids, strict=True):
        f32.reset()
        assert greedy(f32, prompt, most=8) == ids


@every_family
@pytest.mark.parametrize("chunk", [1, 7, 48])  # the last one is longer than a ring
def test_chunks(name: str, folder: Path, chunk: int) -> None:
    with load(folder, precision="f32", context_length=128, prefill_chunk=chunk) as model:
        assert largest_error(model.logits(IDS), LOGITS[name]) < F32 * np.abs(LOGITS[name]).max()
        model.reset()
        assert greedy(model, IDS, most=8) == GREEDY[name]


@every_family
@pytest.mark.parametrize(("precision", "most"), [("f32", 1e-3), ("f16", 0.2)])
def test_decode_gives_the_logits_of_a_prompt(name: str, folder: Path, precision: str, most: float) -> None:
    with load(folder, precision=precision, context_length=128) as model:
        texts = model.generate([IDS[:20], IDS[:30]], temperature=0, max_new_tokens=30, logprobs=0)
        ours: list[list[float]] = [[], []]
        for index, piece in texts:
            ours[index] += [piece.logprobs.logprob] if piece.logprobs else []
        for prompt, ids, logprobs in zip((IDS[:20], IDS[:30]), texts.ids, ours, strict=True):
            model.reset()
            logits = model.logits([*prompt, *ids])[len(prompt) - 1 : -1].astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            assert np.abs(np.array(logprobs) - logits[np.arange(len(ids)), ids]).max() < most


@every_family
def test_f16(name: str, folder: Path, report: Report) -> None:
    with load(folder, precision="f16", context_length=128) as model:
        apart = max(map(divergence, model.logits(IDS), LOGITS[name]))
        model.reset()
        one_by_one = [divergence(row, LOGITS[name][at]) for at, row in enumerate(_token_by_token(model, IDS[:40]))]
    report(f"divergence {apart:.1e} of a prompt, {max(one_by_one):.1e} token by token")
    assert max(apart, *one_by_one) < F16_DIVERGENCE


def _token_by_token(model: Gemma, ids: list[int]) -> list[NDArray[np.float32]]:
    """The logits after each of `ids`, each of which the model computes by itself."""
    return [model.logits(ids[: count + 1], last=1)[0] for count in range(len(ids))]


@every_family
def test_model_folders(name: str, folder: Path, f32: Gemma, tmp_path: Path) -> None:
    """A folder of ours has the same weights to the bit if it keeps them, and nearly the same in int8."""
    write_tokenizer(folder, 512)
    f32.reset()
    expected = f32.logits(IDS)
    cases: list[tuple[Quant, float]] = [("keep", 0.0), ("int8", 0.1)]
    for quant, most in cases:
        convert(open_checkpoint(folder), tmp_path / quant, quant=quant)
        with load(tmp_path / quant, precision="f32", context_length=128) as model:
            assert np.mean([*map(divergence, model.logits(IDS), expected)]) <= most


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("whole") / "gemma3n", "gemma3n")
    write_tokenizer(folder, 512)
    return folder


@pytest.mark.parametrize("layers", ["1,4,6", "1,4-4,6-6"])
def test_a_slice_is_that_of_transformers(whole: Path, tmp_path: Path, layers: str) -> None:
    out = tmp_path / "slice"
    command = ["convert", str(whole), str(out), "--quant", "keep", "--without-layers", layers, "--width", str(WIDTH)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with load(out, precision="f32", context_length=128) as model:
        assert model.config.num_hidden_layers == 5
        logits = model.logits(IDS)
    assert largest_error(logits, SLICE) < F32 * np.abs(SLICE).max()


@pytest.mark.parametrize(
    ("skipped", "sizes", "message"),
    [
        ((8,), (256,), r"layers \[8\] cannot be left out of 8 layers"),
        ((1,), (256, 256), "there are 2 widths for 7 layers"),
        ((), (512,), "layer 0 has a width of 384, which cannot be cut to 512"),
        ((), (100,), "cannot be cut to 100; give a smaller multiple of 32"),
        ((2, 4), (256,), r"without layers \[2, 4\], a kind of layers has no keys and values"),
    ],
)
def test_slices_that_cannot_be(whole: Path, skipped: tuple[int, ...], sizes: tuple[int, ...], message: str) -> None:
    with open_checkpoint(whole) as checkpoint, pytest.raises(ModelError, match=message):
        SlicedCheckpoint(checkpoint, MatFormerSlice(skipped, sizes))


def test_only_gemma_3n_is_sliced(tmp_path: Path) -> None:
    folder = write(tmp_path / "gemma4", "gemma4")
    result = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out"), "--width", "128"])
    assert result.exit_code == 1
    assert "Gemma 4 was not trained to be sliced; only Gemma 3n was" in result.output


@every_family
def test_inspection_counts_all_weights(name: str, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        summary = summarize(checkpoint)
        vectors = summary.vector_bytes
        assert summary.nbytes - vectors == summary.file_bytes - vectors // 2  # floats of the files have 2 bytes
        assert summary.parameters == sum(spec.size for spec in checkpoint.table.values())
        assert summary.lookup is not None


@every_family
def test_gguf(name: str, tmp_path: Path) -> None:
    """The file has rows of zeros where Gemma 3n's table of per-layer inputs ends sooner than the vocabulary."""
    with load(write_gguf_of(tmp_path / "tiny.gguf", name), precision="f32", context_length=128) as model:
        logits = model.logits(IDS[:98])
    assert largest_error(logits, LOGITS[name][:98]) < F32 * np.abs(LOGITS[name]).max()


@every_family
def test_the_window_is_passed(name: str) -> None:
    assert len(IDS) > 2 * int(CONFIGS[name]["sliding_window"])
