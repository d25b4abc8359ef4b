"""The site as it is built, opened in Chromium from a plain static server at some path: its notebooks, run."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from typing import Any

import nbformat
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, FilePayload, Locator, Page

import gemma_wgpu
from tests.browser.conftest import ROOT, SCREENSHOTS, SUB_PATH, TINY_VISION, complaints_of

STARTED = 120_000  # milliseconds: patience with Pyodide on a slow machine
RUN = 300_000  # and with a cell


class Notebook:
    """A notebook of the site, open in a page."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        page.goto(address)
        page.locator(".jp-Cell").last.wait_for(timeout=STARTED)
        # A cell that is run before would ask which kernel to take.
        page.locator(".jp-Toolbar-kernelName", has_text="Python (Pyodide)").wait_for(timeout=STARTED)
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=STARTED)

    @property
    def cells(self) -> Locator:
        """Those of code."""
        return self.page.locator(".jp-CodeCell")

    def run_all(self) -> None:
        self.page.get_by_text("Run", exact=True).first.click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        for index in range(self.cells.count()):
            self.wait_for(index)

    def wait_for(self, index: int) -> None:
        """Until the cell has run."""
        prompt = self.cells.nth(index).locator(".jp-InputPrompt").get_by_text(re.compile(r"\[\d+\]:"))
        prompt.wait_for(timeout=RUN)

    def output(self, index: int) -> str:
        return "\n".join(self.cells.nth(index).locator(".jp-OutputArea-output").all_inner_texts())

    def add(self, code: str) -> int:
        """A new cell at the end, which begins to run; its index."""
        index = self.cells.count()
        self.page.locator(".jp-Cell").last.click(position={"x": 5, "y": 5})
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("b")
        self.page.keyboard.press("y")
        self.page.keyboard.press("Enter")
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Control+Enter")
        return index

    def run(self, code: str) -> str:
        """The output of a new cell at the end."""
        index = self.add(code)
        self.wait_for(index)
        return self.output(index)

    def screenshot(self, name: str) -> None:
        """All of it, however long."""
        height = self.page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollHeight")
        self.page.set_viewport_size({"width": 1200, "height": height + 150})
        self.page.wait_for_timeout(1000)
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.fixture
def opened(browser: Browser, origin: str) -> Iterator[Callable[[str], Notebook]]:
    """Opens a notebook, in a browser that has not been here before."""
    page = browser.new_context(viewport={"width": 1200, "height": 1000}).new_page()
    complaints = complaints_of(page, [origin])
    yield lambda name: Notebook(page, f"{origin}/{SUB_PATH}/notebooks/index.html?path={name}.ipynb")
    page.context.close()
    assert complaints == []


def until(condition: Callable[[], bool], page: Page) -> None:
    deadline = time.monotonic() + RUN / 1000
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)


def test_chat(opened: Callable[[str], Notebook]) -> None:
    notebook = opened("01_chat")
    notebook.run_all()
    prompt = "Why is the sky blue? The"
    with gemma_wgpu.load("demo", precision="f32") as gemma:
        native = gemma.generate(prompt, max_new_tokens=16, temperature=0)
        for _ in native:
            pass
    assert "swiftshader" in notebook.output(0)
    assert notebook.output(1) == prompt + native.text
    assert "16 new ones" in notebook.output(2)
    assert ast.literal_eval(notebook.output(3)) == native.ids
    assert notebook.output(4) == "France: Paris\nItaly: Rome\nJapan: Tokyo"

    chat = notebook.cells.nth(5).locator(".jp-OutputArea-output")
    chat.get_by_placeholder("Write something").fill("Hello")
    chat.get_by_role("button", name="Send").click()
    said = chat.locator(".widget-html-content")
    until(lambda: len(said.inner_text()) > len("user\nHello\n\nassistant\n\n"), notebook.page)
    notebook.screenshot("01_chat")
    chat.get_by_role("button", name="Stop").click()
    assert notebook.run("await asyncio.wait([answering])\nprint(answering.cancelled())") == "True\n"

    def started(cell: int) -> bool:
        return notebook.output(cell) != ""

    for way in ("for", "async for"):
        cell = notebook.add(f"text = gemma.generate('One, two', seed=1)\n{way} piece in text: print(piece, end='')")
        until(partial(started, cell), notebook.page)
        notebook.page.get_by_title("Interrupt the kernel").click()
        notebook.wait_for(cell)
        assert "KeyboardInterrupt" in notebook.output(cell)
        assert notebook.run("print(text.stats.finish_reason, len(text.ids) < 20)") == "interrupted True\n"
    again = f"for piece in gemma.generate({prompt!r}, max_new_tokens=2, temperature=0): print(piece, end='')"
    assert notebook.run(again) == gemma.tokenizer.decode(native.ids[:2])
    assert notebook.run("import sys\nprint('PIL.Image' in sys.modules)") == "False\n"  # text needs no Pillow


def test_inside(opened: Callable[[str], Notebook]) -> None:
    notebook = opened("02_inside_gemma")
    notebook.run_all()
    assert notebook.output(1).startswith("['<bos>', 'My', ' favourite', ' colour', ' is']")
    assert notebook.page.locator(".jp-RenderedImage img").count() == 3
    notebook.screenshot("02_inside_gemma")
    assert notebook.run("print(words[:3])") == "[\"' blue'\", \"' red'\", \"' the'\"]\n"


def test_kernel(opened: Callable[[str], Notebook]) -> None:
    notebook = opened("03_write_a_kernel")
    notebook.run_all()
    for cell, most in ((1, 1e-6), (3, 1e-3)):
        line = notebook.output(cell).splitlines()[0]
        assert float(line.removeprefix("largest error against numpy: ")) < most
    assert "'wrong'" in notebook.output(2)
    assert "tokens a second" in notebook.output(4)
    notebook.screenshot("03_write_a_kernel")


def test_see(opened: Callable[[str], Notebook]) -> None:
    notebook = opened("04_see")
    notebook.run_all()
    picture = drawn()
    with gemma_wgpu.load(TINY_VISION, precision="f32") as gemma:

        def answer(question: str, of: object = picture) -> str:
            content = [{"type": "image", "image": of}, {"type": "text", "text": question}]
            return gemma.chat([{"role": "user", "content": content}], max_new_tokens=12, temperature=0).result()

        assert notebook.output(2).removeprefix("Looking\n").strip() == answer("What colour is the roof?").strip()
        second, *stats = notebook.output(3).strip().splitlines()
        assert second.strip() == answer("Where is the tree?").strip()
        assert [re.sub(r", [\d.]+ s$", "", line) for line in stats] == [
            "1 pictures encoded, 0 of 82 tokens reused",
            "0 pictures encoded, 71 of 81 tokens reused",
        ]
        assert "16 x 16 = 256 patches of 14 x 14, 8 x 8 = 64 tokens" in notebook.output(4)
        assert "features: (64, 64)" in notebook.output(5)
        assert "3 images, 270 tokens; 82 without pan and scan" in notebook.output(7)
        assert notebook.page.locator(".jp-RenderedImage img").count() == 5
        notebook.screenshot("04_see")

        question, other = "What is in this picture?", picture.rotate(180)
        assert notebook.output(9).strip() == answer(question).strip()
        expected = answer(question, other).strip()
        assert expected != answer(question).strip()

    photo = FilePayload(name="photo.png", mimeType="image/png", buffer=png(other))
    with notebook.page.expect_file_chooser() as chooser:
        notebook.page.locator(".widget-upload").click()
    chooser.value.set_files([photo])
    until(lambda: "(1)" in notebook.page.locator(".widget-upload").inner_text(), notebook.page)
    notebook.cells.nth(9).click()
    notebook.page.keyboard.press("Control+Enter")
    until(lambda: notebook.output(9).strip() == expected, notebook.page)

    files = notebook.page.context.new_page()
    files.goto(notebook.page.url.partition("/notebooks/")[0] + "/tree/index.html")
    with files.expect_file_chooser() as chooser:
        files.get_by_title("Upload").click()
    chooser.value.set_files([photo])
    files.locator(".jp-DirListing-item", has_text="photo.png").wait_for()
    content = f"[{{'type': 'image', 'path': 'photo.png'}}, {{'type': 'text', 'text': {question!r}}}]"
    code = f"print(await gemma.chat([{{'role': 'user', 'content': {content}}}], max_new_tokens=12, temperature=0))"
    assert notebook.run(code).strip() == expected


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def drawn() -> Image.Image:
    """The picture that the notebook draws."""
    cells = nbformat.read(ROOT / "site" / "content" / "04_see.ipynb", as_version=4).cells  # type: ignore[no-untyped-call]
    [drawing] = [cell.source for cell in cells if cell.source.startswith("def landscape")]
    names: dict[str, Any] = {"Image": Image, "ImageDraw": ImageDraw}
    exec(drawing, names)
    picture: Image.Image = names["picture"]
    return picture


def test_without_webgpu(opened: Callable[[str], Notebook]) -> None:
    notebook = opened("01_chat")
    notebook.run(
        "from pyodide.code import run_js\n"
        "run_js(\"Object.defineProperty(navigator, 'gpu', { value: undefined })\")\n"
        "None"
    )
    notebook.cells.first.click()
    notebook.page.keyboard.press("Control+Enter")
    notebook.wait_for(0)
    said = notebook.output(0).splitlines()
    assert re.match("DeviceError: no WebGPU here. Use Chrome .*Safari .*Firefox", said[-1])
    assert said[:-1] in ([], ["Loading"])


def test_the_front_page(browser: Browser, origin: str) -> None:
    page = browser.new_page()
    complaints = complaints_of(page, [origin])
    page.goto(f"{origin}/{SUB_PATH}/")
    page.get_by_text("This browser has WebGPU").wait_for()
    *notebooks, bench = [link.get_attribute("href") or "" for link in page.locator("ol a").all()]
    for link in notebooks:
        path = re.search(r"path=(\w+\.ipynb)", link)
        assert path
        assert (ROOT / "site" / "content" / path[1]).is_file()
    assert (ROOT / "site" / bench).is_file()
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "front.png")
    assert complaints == []
    page.close()
