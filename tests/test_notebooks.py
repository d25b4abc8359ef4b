"""The site's notebooks run in a native Jupyter kernel, unchanged."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

import gemma_wgpu
from gemma_wgpu.weights.folder import FolderCheckpoint

pytestmark = pytest.mark.slow

CONTENT = Path(__file__).parents[1] / "site" / "content"
TINY_VISION = CONTENT / "models" / "tiny-vision"


def outputs(notebook: Path) -> list[str]:
    """Run a notebook; return the text that each code cell puts out."""
    content = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    place = {"metadata": {"path": str(notebook.parent)}}
    NotebookClient(content, timeout=300, kernel_name="python3", resources=place).execute()
    return ["".join(map(text, cell.outputs)) for cell in content.cells if cell.cell_type == "code"]


def text(output: Any) -> str:
    shown = output.get("data", {})
    return str(output.get("text") or shown.get("text/html") or shown.get("text/plain", ""))


def test_chat() -> None:
    _, said, generation, ids, pattern, chat = outputs(CONTENT / "01_chat.ipynb")
    prompt = "Why is the sky blue? The"
    with gemma_wgpu.load("demo") as gemma:
        expected = gemma.generate(prompt, max_new_tokens=16, temperature=0)
        expected.result()
    assert said == prompt + expected.text
    assert ast.literal_eval(ids) == expected.ids
    assert "16 new ones" in generation
    assert pattern.endswith("Japan: Tokyo")
    assert "VBox" in chat


def test_inside() -> None:
    loaded, chart, _, surprise, _ = outputs(CONTENT / "02_inside_gemma.ipynb")
    assert "Gemma 3 270m" in loaded
    assert chart.startswith("['<bos>', 'My', ' favourite', ' colour', ' is']")
    assert "cheese" in surprise


def test_kernel() -> None:
    device, gelu, wrong, matvec, speed, _ = outputs(CONTENT / "03_write_a_kernel.ipynb")
    assert "workgroup" in device
    for line, most in ((gelu, 1e-6), (matvec, 1e-3)):
        assert float(line.splitlines()[0].removeprefix("largest error against numpy: ")) < most
    assert "'wrong' does not compile" in wrong
    assert "tokens a second" in speed


def test_see() -> None:
    said = outputs(CONTENT / "04_see.ipynb")
    loaded, _, first, second, patches, features, _, panned, _, last = said
    assert "tiny-vision" in loaded
    *_, before, after = second.splitlines()
    assert before.startswith("1 pictures encoded, 0 of 82 tokens reused")
    assert after.startswith("0 pictures encoded, 71 of 81 tokens reused")
    answers = [first.partition(")")[2], second.splitlines()[0], last]
    assert len(set(answers)) == 3
    assert all(len(answer.split()) > 10 for answer in answers)
    assert "8 x 8 = 64 tokens" in patches
    assert "(64, 64)" in features
    assert "3 images, 270 tokens; 82 without" in panned


def test_the_tiny_model_is_made_by_its_script(tmp_path: Path) -> None:
    script = CONTENT.parent / "make_tiny_vision.py"
    subprocess.run([sys.executable, script, tmp_path / "tiny-vision"], check=True)
    ours, kept = (FolderCheckpoint(folder) for folder in (tmp_path / "tiny-vision", TINY_VISION))
    assert ours.config == kept.config
    assert ours.manifest.shards == kept.manifest.shards  # the numbers in them are those that were drawn
    assert ours.manifest.tensors == kept.manifest.tensors
    made, there = ours.vocabulary(), kept.vocabulary()
    assert made.pieces == there.pieces
    assert np.array_equal(made.scores, there.scores)
    assert np.array_equal(made.types, there.types)
    assert sum(file.stat().st_size for file in TINY_VISION.iterdir()) < 1_000_000


@pytest.fixture(scope="module")
def kernel() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> tuple[str, list[str]]:
    """Run a cell; return what it prints, and its traceback."""
    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        said.append(message["content"].get("text", ""))

    reply = client.execute_interactive(code, timeout=120, output_hook=hear)
    return "".join(said), reply["content"].get("traceback", [])


@pytest.mark.parametrize("way", ["for", "async for"])
def test_an_interrupt(kernel: tuple[KernelManager, BlockingKernelClient], way: str) -> None:
    manager, client = kernel
    run(client, "import gemma_wgpu; gemma = gemma_wgpu.load('demo')")
    client.execute(f"text = gemma.generate('One, two', seed=1)\n{way} piece in text: print(piece, flush=True)")
    while client.get_iopub_msg(timeout=120)["msg_type"] != "stream":
        pass
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=120)
    assert reply["content"]["status"] == "error"
    # It is not "length". If the interrupt comes between two pieces, the generation does not hear of it.
    assert run(client, "print(text.stats.finish_reason in ('interrupted', None))") == ("True\n", [])
    again = "for piece in gemma.generate('The sun rises in the', max_new_tokens=1, temperature=0): print(piece)"
    assert run(client, again) == (" east\n", [])


def test_an_error_is_a_sentence(kernel: tuple[KernelManager, BlockingKernelClient]) -> None:
    _, client = kernel
    _, lines = run(client, "import gemma_wgpu; gemma_wgpu.load('nowhere.gguf')")
    assert len(lines) == 1
    assert lines[0].startswith("ModelError: ")
    assert "nowhere.gguf" in lines[0]
