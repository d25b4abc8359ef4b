"""A random model in the browser: its text is what it is natively in F32 mode, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gemma_wgpu
from tests.browser.conftest import Chromium
from tests.host import Host

PROMPT = [2, *range(300, 340)]  # longer than the window
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 60, "temperature": 0.0},
    {"max_new_tokens": 60, "temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 7},
]


@pytest.fixture(scope="module")
def native(small_model: Path) -> list[list[int]]:
    with gemma_wgpu.load(small_model, precision="f32") as gemma:
        generations = [gemma.generate(PROMPT, **options) for options in OPTIONS]
        for generation in generations:
            for _ in generation:
                pass
    return [generation.ids for generation in generations]


@pytest.mark.parametrize("where", ["page", "worker"])
@pytest.mark.parametrize("function", ["generate", "generate_blocking", "generate_after_a_loss"])
def test_tokens_are_the_native_ones(
    chromium: Chromium, host: Host, native: list[list[int]], function: str, where: str
) -> None:
    code = f"from tests.browser.inside import {function}; await {function}({host.url!r}, {PROMPT!r}, {OPTIONS!r})"
    ids = json.loads(chromium.run(code, where=where))
    assert ids == native
    assert all(len(set(tokens)) > 20 for tokens in ids)
