"""The chat page of `gemma-wgpu serve`, in Chromium."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect

from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.broken_pictures import encoded
from tests.browser.conftest import complaints_of
from tests.test_server import ENDLESS, command
from tests.tiny import END_OF_TURN, HF, scripted_weights, token, write_folder
from tests.tiny_vision import write_sighted

expect.set_options(timeout=30_000)  # a busy machine is to fail no test
WIDTHS = {"phone": 360, "desktop": 1280}


@pytest.fixture(autouse=True)
def no_complaints() -> None:
    """Replace the fixture for the page with Pyodide, which is not used here."""


def write(folder: Path, hf: dict[str, object], *scripts: list[int]) -> str:
    return str(write_folder(folder, hf, scripted_weights(Gemma3Config.from_hf(hf), scripts)))


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a model that answers " home again"."""
    reply = [*map(token, ("\n", "▁home", "▁again")), END_OF_TURN]
    with command("--model", write(tmp_path_factory.mktemp("brief"), HF, reply), "--name", "brief") as (_, url):
        yield url


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a model that answers "xyzxyz..."; it wants a key."""
    folder = write(tmp_path_factory.mktemp("endless"), ENDLESS, [*map(token, "xyzx")], [*map(token, "\nx")])
    with command("--model", folder, "--context-length", "30000", "--api-key", "k") as (_, url):
        yield url


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a model that reads images, and answers " home again"."""
    reply = [*map(token, ("\n", "▁home", "▁again")), END_OF_TURN]
    weights = scripted_weights(Gemma3Config.from_hf(HF), [reply])
    folder = write_sighted(tmp_path_factory.mktemp("sighted"), HF, weights)
    with command("--model", str(folder), "--name", "sighted") as (_, url):
        yield url


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    width, phone = WIDTHS[request.param], request.param == "phone"
    scheme: Literal["dark", "light"] = "dark" if phone else "light"
    page = browser.new_context(
        viewport={"width": width, "height": 640}, color_scheme=scheme, has_touch=phone, is_mobile=phone
    ).new_page()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.scrollHeight") <= 640
    page.context.close()


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def assert_accessible(page: Page) -> None:
    assert [violation["help"] for violation in Axe().run(page).response["violations"]] == []


def asked(page: Page) -> list[list[dict[str, Any]]]:
    """Return a list that gets the messages of each request which the page makes from now on."""
    found: list[Any] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            found.append(json.loads(request.post_data or "")["messages"])

    page.on("request", note)
    return found


def test_a_chat(page: Page, brief: str) -> None:
    complaints = complaints_of(page, [brief])
    page.goto(brief)
    expect(page.get_by_role("heading")).to_have_text("brief")
    expect(page.get_by_label("Message")).to_be_focused()
    assert_accessible(page)
    answers = page.locator(".assistant")
    for turn in (1, 2):
        ask(page, f"so <b>{turn}</b>")
        expect(answers).to_have_text(["home again"] * turn)
        expect(page.get_by_role("status")).to_have_text(re.compile("^Answer"))
    expect(page.locator(".user")).to_have_text(["so <b>1</b>", "so <b>2</b>"])
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answers).to_have_text(["home again"] * 2)
    assert_accessible(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#log li")).to_have_count(0)
    assert complaints == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(page: Page, endless: str, how: str) -> None:
    page.goto(endless)
    expect(page.get_by_role("listitem")).to_have_text([re.compile("key")])  # it says that a key is needed
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
    ask(page, "so")  # there is room again
    expect(page.locator(".assistant").last).to_have_text(re.compile("^xyzxyz"))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant").last).to_have_text(re.compile("^xyzxyz"))
    expect(page.locator(".assistant")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_enter_key(page: Page, brief: str, request: pytest.FixtureRequest) -> None:
    """It sends the message. On a phone, which has no other key for that, it begins a line."""
    page.goto(brief)
    expect(page.get_by_role("heading")).to_have_text("brief")
    page.get_by_label("Message").fill("so")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    if "phone" in request.node.name:
        expect(page.get_by_label("Message")).to_have_value("so\n\n")
    else:
        expect(page.locator(".user")).to_have_text("so")
        expect(page.locator(".assistant")).to_have_text("home again")
        expect(page.get_by_label("Message")).to_be_focused()


def test_a_conversation_that_outgrows_the_context(page: Page, brief: str) -> None:
    """The context has 128 tokens. The oldest messages go, by the count in the answer before; instructions stay."""
    requests = asked(page)
    page.goto(brief)
    page.get_by_text("Instructions").click()
    page.get_by_label("Instructions").fill("so it")
    for turn in range(1, 9):
        ask(page, f"the cat sat on mat {turn}")
        expect(page.locator(".assistant")).to_have_text(["home again"] * turn)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert len(requests) == 8
    assert all(messages[0] == {"role": "system", "content": "so it"} for messages in requests)
    assert all(messages[-1]["content"] == f"the cat sat on mat {turn}" for turn, messages in enumerate(requests, 1))
    sizes = [len(messages) for messages in requests]
    assert sizes[:2] == [2, 4]
    assert sizes[-1] < 2 * 8
    dropped = page.locator(".dropped")
    expect(dropped).to_have_count(2 * 8 - sizes[-1])
    expect(page.locator(".dropped + .note")).to_have_text(re.compile("^The context is full.*instructions"))
    expect(page.get_by_role("alert")).to_have_count(0)
    assert_accessible(page)


def test_what_the_server_finds_too_long(page: Page, brief: str) -> None:
    requests = asked(page)
    page.goto(brief)
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text("home again")
    ask(page, "😀" * 26)
    expect(page.locator(".assistant")).to_have_text(["home again"] * 2)
    assert [len(messages) for messages in requests] == [1, 3, 1]
    expect(page.locator(".dropped")).to_have_count(2)
    ask(page, "😀" * 100)
    expect(page.get_by_role("alert")).to_have_text(re.compile("the prompt has"))
    ask(page, "so")
    expect(page.locator(".assistant").last).to_have_text("home again")
    expect(page.get_by_role("alert")).to_have_count(0)


def photo(colour: str, width: int, height: int) -> dict[str, Any]:
    """A file that somebody chooses."""
    data = encoded(Image.new("RGB", (width, height), colour), "PNG")
    return {"name": f"{colour}.png", "mimeType": "image/png", "buffer": data}


def choose(page: Page, *files: Any) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add images").click()
    chooser.value.set_files(list(files))
    expect(page.get_by_role("status")).to_have_text(re.compile("added$"))


def sent_image(part: Any) -> Image.Image:
    """The image in a part of a message, which is a JPEG."""
    assert part["type"] == "image_url"
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(b64decode(data)))


def test_images_are_sent_and_shown(page: Page, sighted: str) -> None:
    complaints, requests = complaints_of(page, [sighted]), asked(page)
    page.goto(sighted)
    choose(page, photo("red", 3000, 1500), photo("blue", 30, 40))
    waiting = page.get_by_label("Images to send").get_by_role("img")
    expect(waiting).to_have_count(2)
    assert_accessible(page)
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text("home again")
    expect(waiting).to_have_count(0)
    shown = page.locator(".user").get_by_role("img")
    expect(shown).to_have_count(2)
    assert [image.get_attribute("alt") for image in shown.all()] == ["red.png", "blue.png"]
    assert all(image.evaluate("image => image.naturalWidth") > 0 for image in shown.all())
    expect(page.locator(".user")).to_have_text("so")
    assert_accessible(page)
    ask(page, "it")
    expect(page.locator(".assistant")).to_have_text(["home again"] * 2)
    [[first], [again, _, last]] = requests
    assert first == again and last == {"role": "user", "content": "it"}
    *images, text = first["content"]
    assert text == {"type": "text", "text": "so"}
    red, blue = map(sent_image, images)
    assert (red.size, blue.size) == ((2000, 1000), (30, 40))
    assert red.getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3)
    assert blue.getpixel((9, 9)) == pytest.approx((0, 0, 255), abs=3)
    page.get_by_role("button", name="New chat").click()
    expect(shown).to_have_count(0)
    assert complaints == []


def test_images_are_removed_with_the_keyboard(page: Page, sighted: str) -> None:
    requests = asked(page)
    page.goto(sighted)
    choose(page, *(photo(colour, 9, 9) for colour in ("red", "lime", "blue")))
    page.get_by_role("button", name="Remove lime.png").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("lime.png is removed")
    expect(page.get_by_role("button", name="Remove blue.png")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Remove red.png")).to_be_focused()
    page.get_by_role("button", name="Send").click()  # an image alone is a message, too
    expect(page.locator(".assistant")).to_have_text("home again")
    [[message]] = requests
    assert [sent_image(part).getpixel((4, 4)) for part in message["content"]] == [pytest.approx((255, 0, 0), abs=3)]
    choose(page, photo("red", 9, 9))
    page.get_by_role("button", name="Remove red.png").press("Enter")
    expect(page.get_by_label("Images to send")).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()


HANDED_OVER = """([kind, data, type]) => {
  const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], "it.png", {type}));
  const event = kind === "paste"
    ? new ClipboardEvent(kind, {clipboardData: carried, bubbles: true, cancelable: true})
    : new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true});
  document.getElementById("text").dispatchEvent(event);
  return event.defaultPrevented;
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_images_are_pasted_and_dropped(page: Page, sighted: str, brief: str, kind: str) -> None:
    requests = asked(page)
    data = b64encode(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG")).decode()
    page.goto(sighted)
    expect(page.get_by_role("button", name="Add images")).to_be_visible()
    assert page.evaluate(HANDED_OVER, [kind, data, "image/png"])
    expect(page.get_by_role("button", name="Remove it.png")).to_be_visible()
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text("home again")
    assert sent_image(requests[0][0]["content"][0]).getpixel((4, 4)) == (255, 255, 255)
    page.goto(brief)  # a model that reads text only
    expect(page.get_by_role("heading")).to_have_text("brief")
    expect(page.get_by_role("button", name="Add images")).to_be_hidden()
    page.evaluate(HANDED_OVER, [kind, data, "image/png"])
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text("home again")
    assert requests[-1] == [{"role": "user", "content": "so"}]


def test_files_that_are_no_images(page: Page, sighted: str) -> None:
    page.goto(sighted)
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"so"}
    choose(page, text, photo("red", 9, 9))
    expect(page.get_by_role("alert")).to_have_text(re.compile("^notes.txt is no image"))
    expect(page.get_by_label("Images to send").get_by_role("img")).to_have_count(1)
    ask(page, "so")
    expect(page.locator(".assistant")).to_have_text("home again")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_images_that_outgrow_the_context(page: Page, sighted: str) -> None:
    """The context has 128 tokens, and an image with its newlines 10 of them."""
    requests = asked(page)
    page.goto(sighted)
    for turn in range(1, 8):
        choose(page, photo("red", 9, 9))
        ask(page, "so")
        expect(page.locator(".assistant")).to_have_text(["home again"] * turn)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    sizes = [len(messages) for messages in requests]
    assert len(requests) == 7 and sizes[:2] == [1, 3] and sizes[-1] < 13
    expect(page.locator(".dropped")).to_have_count(14 - 1 - sizes[-1])
    assert_accessible(page)
