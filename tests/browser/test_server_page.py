"""The chat page of `gemma-wgpu serve`, in Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from gemma_wgpu.config import Gemma3Config
from tests.browser.conftest import complaints_of
from tests.test_server import ENDLESS, command
from tests.tiny import END_OF_TURN, HF, scripted_weights, token, write_folder

WIDTHS = {"phone": 360, "desktop": 1280}


@pytest.fixture(autouse=True)
def no_complaints() -> None:
    """Of the page with Pyodide, which has no part in this."""


def write(folder: Path, hf: dict[str, object], *scripts: list[int]) -> str:
    return str(write_folder(folder, hf, scripted_weights(Gemma3Config.from_hf(hf), scripts)))


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a model is that answers " home again"."""
    reply = [*map(token, ("\n", "▁home", "▁again")), END_OF_TURN]
    with command("--model", write(tmp_path_factory.mktemp("brief"), HF, reply), "--name", "brief") as (_, url):
        yield url


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a model is that answers "xyzxyz..."; it wants a key."""
    folder = write(tmp_path_factory.mktemp("endless"), ENDLESS, [*map(token, "xyzx")], [*map(token, "\nx")])
    with command("--model", folder, "--context-length", "30000", "--api-key", "k") as (_, url):
        yield url


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    width = WIDTHS[request.param]
    scheme = "dark" if request.param == "phone" else "light"
    page = browser.new_context(viewport={"width": width, "height": 640}, color_scheme=scheme).new_page()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_a_chat(page: Page, brief: str) -> None:
    complaints = complaints_of(page, [brief])
    page.goto(brief)
    expect(page.get_by_role("heading")).to_have_text("brief")
    expect(page.get_by_label("Message")).to_be_focused()
    answers = page.locator(".assistant")
    for turn in (1, 2):
        ask(page, f"so <b>{turn}</b>")
        expect(answers).to_have_text(["home again"] * turn)
        expect(page.get_by_role("status")).to_have_text(re.compile("^Answer"))
    expect(page.locator(".user")).to_have_text(["so <b>1</b>", "so <b>2</b>"])
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answers).to_have_text(["home again"] * 2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#log li")).to_have_count(0)
    assert complaints == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(page: Page, endless: str, how: str) -> None:
    page.goto(endless)
    expect(page.get_by_role("listitem")).to_have_text([re.compile("key")])  # is needed
    page.get_by_label("API key").fill("k")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text(re.compile("^xyzxyz"))
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.").last).to_be_visible()
    ask(page, "so")  # the place was freed
    expect(page.locator(".assistant").last).to_have_text(re.compile("^xyzxyz"))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
