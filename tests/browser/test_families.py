"""Small random Gemma 3n and Gemma 4 in the browser: their texts are what they are natively in F32 mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gemma_wgpu
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.browser.conftest import Chromium
from tests.browser.test_store import HIDE_CACHES, HIDE_FILES, without
from tests.reference.families import CONFIGS, IDS, write
from tests.reference.random_1b import write_tokenizer

PROMPT = IDS[:50]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 16, "temperature": 0.0},
    {"max_new_tokens": 16, "temperature": 3.0, "top_k": 40, "seed": 7},
]


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp(request.param)
    source = write(work / "source", request.param)
    write_tokenizer(source, 512)
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, work / "model", quant="keep")
    return work / "model"


@pytest.mark.parametrize("table", ["gpu", "host"])
def test_tokens_are_the_native_ones(chromium: Chromium, url: str, folder: Path, table: str) -> None:
    code = f"from tests.browser.inside import generate; await generate({url!r}, {PROMPT!r}, {OPTIONS!r}, {table!r})"
    found = json.loads(chromium.run(code))
    with gemma_wgpu.load(folder, precision="f32") as gemma:
        generations = [gemma.generate(PROMPT, **options) for options in OPTIONS]
        for generation in generations:
            generation.result()
    assert found == [generation.ids for generation in generations]
    assert len({token for ids in found for token in ids}) > 4


@pytest.mark.parametrize("hidden", [(HIDE_FILES,), (HIDE_FILES, HIDE_CACHES)], ids=["in a cache", "in memory"])
def test_rows_of_shards_that_are_no_files(
    chromium: Chromium, url: str, folder: Path, hidden: tuple[str, ...]
) -> None:
    call = f"await generate({url!r}, {PROMPT!r}, {OPTIONS[:1]!r}, 'host')"
    with without(chromium, *hidden):
        found = json.loads(chromium.run(f"from tests.browser.inside import generate; {call}"))
    with gemma_wgpu.load(folder, precision="f32") as gemma:
        expected = gemma.generate(PROMPT, **OPTIONS[0])
        expected.result()
    assert found == [expected.ids]
