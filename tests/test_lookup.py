"""A table of per-layer inputs that stays off the GPU: what is read of it, and that a model's texts stay the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gemma_wgpu.gemma
from gemma_wgpu import Gemma, load, structured
from gemma_wgpu.engine.lookup import Lookup
from gemma_wgpu.errors import DeviceError, ModelError, RequestError
from gemma_wgpu.gpu.device import AdapterInfo
from gemma_wgpu.weights.convert import Quant, convert
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.hosted import HostedFolder
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.upload import Upload
from tests.disk import Disk
from tests.reference.families import CONFIGS, IDS, write
from tests.reference.random_1b import write_tokenizer

Rows = NDArray[np.float32]


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("lookup") / request.param, request.param)
    write_tokenizer(folder, 512)
    return folder


class Numbers:
    """A table whose row n is n, n + 0.5; it counts the rows that were read."""

    shape = (100, 2)

    def __init__(self) -> None:
        self.read: list[int] = []

    async def fetch(self, numbers: Sequence[int]) -> Rows:
        self.read += numbers
        return np.array([[number, number + 0.5] for number in numbers], np.float32)


def test_rows_are_fetched_once_and_the_oldest_are_forgotten() -> None:
    table = Numbers()
    lookup = Lookup(table, 3)

    def rows(*tokens: int) -> list[float]:
        missing = lookup.missing(tokens)
        if missing:
            lookup.keep(missing, asyncio.run(table.fetch(missing)))
        found = lookup.rows(tokens)
        assert (found[:, 1] == found[:, 0] + 0.5).all()
        return [float(row[0]) for row in found]

    assert rows(7, 8, 7) == [7, 8, 7]
    assert rows(7, 99) == [7, 99]
    assert table.read == [7, 8, 99]
    assert rows(100, -5, 0) == [0, 0, 0], "tokens without rows"
    assert rows(7, 99) == [7, 99]
    assert table.read == [7, 8, 99, 0], "8 was used longest ago"
    assert rows(8, 1, 2, 3, 4) == [8, 1, 2, 3, 4], "more than are remembered"


@pytest.mark.parametrize("quant", ["keep", "int8", "int4", "int4-offset"])
def test_rows_of_folders(quant: Quant, folder: Path, tmp_path: Path) -> None:
    """Shards of a few rows; the matrices with 96 columns have rows whose scales begin inside of a word."""
    out = tmp_path / "out"
    with open_checkpoint(folder) as checkpoint:
        convert(checkpoint, out, quant=quant, shard_size=20_000)
    numbers = [0, 5, 2, 31, 5]

    async def check() -> None:
        with FolderCheckpoint(out) as local, await HostedFolder.open(Disk(out), None) as hosted:
            matrices = [name for name, spec in local.table.items() if spec.kind.is_matrix]
            for name in matrices:
                expected = local.tensor(name).pack().dequantize()
                wanted = [*numbers, len(expected) - 1]
                await hosted.tensor(name).stay()
                for tensor in (local.tensor(name), hosted.tensor(name)):
                    reading = tensor.fetch(wanted)
                    assert np.array_equal(await reading, expected[wanted]), (name, tensor)
                    assert np.array_equal(await reading, expected[wanted]), "it may be awaited again"

    asyncio.run(check())


def both(folder: Path, **options: Any) -> tuple[Gemma, Gemma]:
    """The model with its table on the GPU, and off it."""
    on, off = (load(folder, context_length=128, per_layer_table=place, **options) for place in ("gpu", "host"))
    return on, off


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_texts_do_not_depend_on_the_place_of_the_table(folder: Path, precision: str) -> None:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 3.0, "top_k": 40, "seed": 7, "repetition_penalty": 1.1, "logprobs": 2},
        {"temperature": 1.0, "constraint": structured.regex("[a-z]{4,9}"), "seed": 3},
    ]
    on, off = both(folder, precision=precision, prefill_chunk=20)
    with on, off:
        assert off.runner.lookup and not on.runner.lookup
        assert np.array_equal(on.logits(IDS), off.logits(IDS))
        assert np.array_equal(on.attention(IDS[:20], 2), off.attention(IDS[:20], 2))
        for option in options:
            texts = [model.generate([IDS[:50], IDS[:7]], max_new_tokens=12, **option) for model in (on, off)]
            assert texts[0].result() == texts[1].result()
            assert texts[0].ids == texts[1].ids


def test_what_it_takes_of_the_gpu(folder: Path) -> None:
    on, off = both(folder)
    with on, off:
        config: Any = on.config
        table = 2 * config.vocab_size_per_layer_input * config.num_hidden_layers * config.hidden_size_per_layer_input
        assert on.gpu_bytes["weights"] - off.gpu_bytes["weights"] == table + 16  # for scales, which bf16 has none of
        assert on.gpu_bytes["cache"] == off.gpu_bytes["cache"]


def test_a_table_that_cannot_be_read_ends_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, context_length=128, per_layer_table="host") as model:
        lookup = model.runner.lookup
        assert lookup
        expected = model.generate(IDS[:5], temperature=0, max_new_tokens=4)
        expected.result()

        async def fetch(numbers: Sequence[int]) -> Rows:
            if len(numbers) < least:
                raise ModelError("the file is gone")
            return await Lookup.fetch(lookup, numbers)

        def forgetting(tokens: Sequence[int]) -> Rows:
            rows = Lookup.rows(lookup, tokens)
            lookup._kept.clear()
            return rows

        for least in (99, 2):  # it fails for the prompt, or for the token after it
            with monkeypatch.context() as broken:
                broken.setattr(lookup, "fetch", fetch)
                broken.setattr(lookup, "rows", forgetting)
                model.reset()
                lookup._kept.clear()
                text = model.generate(IDS[:5], temperature=0, max_new_tokens=4)
                with pytest.raises(ModelError, match="^the file is gone$"):
                    text.result()
                assert len(text.ids) == (least == 2)
        again = model.generate(IDS[:5], temperature=0, max_new_tokens=4)
        again.result()
        assert again.ids == expected.ids


def test_the_files_are_open_as_long_as_the_model(folder: Path) -> None:
    model = load(folder, context_length=128, per_layer_table="host")
    model.close()
    with pytest.raises(ModelError, match="the checkpoint is closed"):
        model._weights.tensor("model.language_model.embed_tokens_per_layer.weight").fetch([1])
    with (
        load(folder, context_length=128, per_layer_table="gpu") as model,
        pytest.raises(ModelError, match="is closed"),
    ):
        model._weights.tensor("model.language_model.embed_tokens_per_layer.weight").fetch([1])


def info(kind: str) -> AdapterInfo:
    return AdapterInfo("", "", "", "", "Vulkan", kind)


def test_where_the_table_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = gemma_wgpu.gemma._keeping
    assert list(keeping("auto", info("CPU"))) == [True]
    assert list(keeping("auto", info("DiscreteGPU"))) == [False, True]
    assert list(keeping("gpu", info("CPU"))) == [False]
    assert list(keeping("host", info("DiscreteGPU"))) == [True]
    with pytest.raises(RequestError, match="per_layer_table is 'disk'; it must be one of auto, gpu, host"):
        load(folder, per_layer_table="disk")

    linear = Upload.linear
    asked: list[str] = []

    async def short(self: Upload, *names: str, biases: Sequence[str] = ()) -> Any:
        asked.extend(names)
        if "per_layer_model_projection" in names[0] and len(asked) == 3:
            raise DeviceError("no memory is left")
        return await linear(self, *names, biases=biases)

    with load(folder, context_length=128, per_layer_table="host") as model:
        expected = model.device.allocated
    monkeypatch.setattr(Upload, "linear", short)
    monkeypatch.setattr(gemma_wgpu.gemma, "_keeping", lambda *_: keeping("auto", info("DiscreteGPU")))
    with load(folder, context_length=128) as model:
        assert model.runner.lookup, "the second try keeps the table off the GPU"
        assert model.device.allocated == expected
        assert len(model.generate(IDS[:5], max_new_tokens=2, ignore_eos=True).result()) >= 0
    monkeypatch.setattr(gemma_wgpu.gemma, "_keeping", lambda *_: [False])
    asked.clear()
    with pytest.raises(DeviceError, match=r"no memory is left \(.* has \d+ MB of weights to hold on the GPU\)"):
        load(folder, context_length=128)
