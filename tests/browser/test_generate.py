"""A random model in the browser: its text is what it is natively in F32 mode, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gemma_wgpu
from gemma_wgpu.weights.checkpoint import open_checkpoint
from gemma_wgpu.weights.convert import convert
from tests.browser.conftest import SUB_PATH, Chromium
from tests.reference import random_1b

SHAPE = random_1b.CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "max_position_embeddings": 256,
}
PROMPT = [2, *range(300, 340)]  # longer than the window
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 60, "temperature": 0.0},
    {"max_new_tokens": 60, "temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 7},
]


@pytest.fixture(scope="module")
def model(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, which the server serves as model.zip."""
    work = tmp_path_factory.mktemp("model")
    with open_checkpoint(random_1b.write(work / "source", SHAPE)) as source:
        convert(source, work / "model", quant="int4", shard_size=200_000)
    shutil.make_archive(str(site / SUB_PATH / "model"), "zip", work / "model")
    return work / "model"


@pytest.fixture(scope="module")
def native(model: Path) -> list[list[int]]:
    with gemma_wgpu.load(model, precision="f32") as gemma:
        generations = [gemma.generate(PROMPT, **options) for options in OPTIONS]
        for generation in generations:
            for _ in generation:
                pass
    return [generation.ids for generation in generations]


@pytest.mark.parametrize("function", ["generate", "generate_blocking"])
def test_tokens_are_the_native_ones(chromium: Chromium, native: list[list[int]], function: str) -> None:
    code = f"from tests.browser.inside import {function}; await {function}({PROMPT!r}, {OPTIONS!r})"
    ids = json.loads(chromium.run(code))
    assert ids == native
    assert all(len(set(tokens)) > 20 for tokens in ids)
