"""The demo model in the browser: its text, and the memory that it takes on the way to the GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import gemma_wgpu
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.browser.conftest import Chromium

SHARD = 30_000_000
PROMPT = "The capital of France is"
TOKENS = 8


@pytest.fixture(scope="module")
def folder(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    with open_checkpoint(demo_gguf) as source:
        convert(source, folder, quant="keep", shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def native(folder: Path) -> list[int]:
    with gemma_wgpu.load(folder, precision="f32") as gemma:
        generation = gemma.generate(PROMPT, max_new_tokens=TOKENS, temperature=0.0)
        for _ in generation:
            pass
    return generation.ids


def test_the_text_is_the_native_one_and_weights_stay_out_of_pythons_memory(
    chromium: Chromium, url: str, native: list[int]
) -> None:
    chromium.reload()  # for a heap that has not grown yet
    chromium.run("from tests.browser.inside import heap", where="page")
    session = chromium.page.context.new_cdp_session(chromium.page)

    def buffers() -> int:
        """Bytes of the page's ArrayBuffers, without Python's memory; with what is not collected yet."""
        size: int = session.send("Runtime.getHeapUsage")["backingStorageSize"]
        return size

    before = buffers()
    chromium.page.evaluate(
        "code => { const show = (result) => { window.result = `${result}` }; inPage(code, true).then(show, show) }",
        f"from tests.browser.inside import generate_demo; await generate_demo({url!r}, {PROMPT!r}, {TOKENS})",
    )
    peak, result = before, None
    while not result:
        peak = max(peak, buffers())
        result = chromium.page.evaluate("() => window.result")
        time.sleep(0.01)
    found: dict[str, Any] = json.loads(result)
    print(found, (peak - before) / SHARD)
    assert found["ids"] == native
    assert found["growth"] < 64e6
    assert peak - before < 5 * SHARD
