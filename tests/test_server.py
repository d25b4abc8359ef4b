"""The server, through OpenAI's own client, on models that were written to say certain things."""

import asyncio
import base64
import gc
import json
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import openai
import pytest
import soundfile
from click.testing import CliRunner
from openai import OpenAI
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from gemma_wgpu import DeviceError, Gemma, RequestError, load
from gemma_wgpu.apps.cli import main
from gemma_wgpu.apps.server import app as server_app
from gemma_wgpu.apps.server import images as server_images
from gemma_wgpu.apps.server.choices import TokenTexts
from gemma_wgpu.apps.server.engine import Engine
from gemma_wgpu.apps.server.images import MOST_TEXT
from gemma_wgpu.apps.server.metrics import Metrics
from gemma_wgpu.engine.encoder import Encoding
from gemma_wgpu.engine.request import Request
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.options import RANGES
from tests.broken_pictures import BROKEN, REFUSED_ADDRESSES, encoded, picture
from tests.reference import multimodal
from tests.sounds import RATE, made
from tests.tiny import (
    BOS,
    END_OF_TURN,
    EOS,
    HF,
    random_weights,
    reference_logits,
    scripted_weights,
    token,
    write_folder,
)
from tests.tiny_vision import IMAGE_TOKENS, NOISE, RED, data_uri, write_sighted, write_tokenizer

pytestmark = pytest.mark.slow

CLIENTS = 200
PATHS = ["/etc/passwd", "~/a.png", "README.md", __file__, "C:\\a.png"]  # that no client reaches
SECONDS = 60  # until something that hangs is given up
NAME = "tiny"


def tokens(*pieces: str | int) -> list[int]:
    return [token(piece) for piece in pieces]


SCRIPTS = [
    [*tokens("▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat"), EOS],
    [*tokens("x", "y", "z"), token("x")],
    [*tokens("m", 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, "n"), EOS],  # m€😀n
    [*tokens("\n", "▁home", "▁again"), END_OF_TURN],  # the answer
]
ENDLESS = HF | {"max_position_embeddings": 1 << 17, "sliding_window_pattern": 100}


@dataclass
class Served:
    gemma: Gemma
    engine: Engine
    url: str
    server: Any
    thread: threading.Thread

    @property
    def client(self) -> OpenAI:
        return self.client_with("none")

    def client_with(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=SECONDS, **options)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"gemma_wgpu_{name}[ {{]", line))


def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < SECONDS
        time.sleep(0.01)


@contextmanager
def serving(
    gemma: Gemma, *, batch_size: int = 4, waiting: int = 64, buffer: int | None = None, **options: Any
) -> Iterator[Served]:
    """Serve `gemma`, with a send buffer of `buffer` bytes for each connection if it is given."""
    metrics = Metrics()
    with server_app.bind("127.0.0.1", 0) as bound, Engine(gemma, batch_size, waiting, metrics.ended) as engine:
        if buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        app = server_app.create_app(gemma, engine, metrics, name=NAME, **options)
        server = server_app.Server(app, engine)
        thread = threading.Thread(target=server.run, args=([bound],))
        url = server_app.address(bound)
        thread.start()
        until(lambda: server.started)
        try:
            yield Served(gemma, engine, url, server, thread)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    weights = scripted_weights(Gemma3Config.from_hf(HF), SCRIPTS)
    with load(write_folder(tmp_path_factory.mktemp("scripted"), HF, weights), precision="f32") as gemma:
        yield gemma


@pytest.fixture(scope="module")
def served(scripted: Gemma) -> Iterator[Served]:
    with serving(scripted) as served:
        yield served


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model that reads images, with random weights."""
    folder = write_sighted(tmp_path_factory.mktemp("sighted"))
    with load(folder, precision="f32") as gemma, serving(gemma) as served:
        yield served


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that never stops."""
    weights = scripted_weights(Gemma3Config.from_hf(ENDLESS), SCRIPTS)
    return write_folder(tmp_path_factory.mktemp("endless") / "endless", ENDLESS, weights)


@pytest.fixture(scope="module")
def endless(endless_folder: Path) -> Iterator[Gemma]:
    with load(endless_folder, precision="f32", context_length=1 << 15) as gemma:
        yield gemma


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model with random weights."""
    folder = write_folder(tmp_path_factory.mktemp("guessing"), HF, random_weights(Gemma3Config.from_hf(HF)))
    with load(folder, precision="f32") as gemma, serving(gemma, waiting=2 * CLIENTS) as served:
        yield served


GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}
HELLO: dict[str, Any] = GREEDY | {"messages": [{"role": "user", "content": "so"}]}


def refused(call: Callable[[], object], status: int, *named: str, param: str | None = None) -> openai.APIStatusError:
    """Check that it is refused in OpenAI's shape, by a message that names the culprit."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    assert error.status_code == status
    body = json.loads(error.response.text)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert "\n" not in body["message"]
    for name in named:
        assert name in body["message"]
    assert body["param"] == param
    return error


# Answers.


def test_models(served: Served) -> None:
    listed = served.client.models.list()
    assert [model.id for model in listed] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    refused(lambda: served.client.models.retrieve("a/b"), 404, "'a/b'", NAME, param="model")


def test_chat(served: Served) -> None:
    said = served.client.chat.completions.create(**HELLO)
    choice = said.choices[0]
    assert (said.object, said.model) == ("chat.completion", NAME)
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", " home again", "stop")
    assert said.usage is not None
    assert said.usage.completion_tokens == 3
    assert said.usage.total_tokens == said.usage.prompt_tokens + 3
    prompt = served.gemma.tokenizer.encode("<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n")
    assert said.usage.prompt_tokens == len(prompt)


def test_chat_streamed(served: Served) -> None:
    chunks = list(served.client.chat.completions.create(**HELLO, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert [delta.content for delta in deltas] == ["", " home", " again", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_events_of_a_stream(served: Served) -> None:
    answer = served.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        json.loads(event.removeprefix("data: "))


@pytest.mark.parametrize("stream", [False, True])
def test_completion(served: Served, stream: bool) -> None:
    options = {**GREEDY, "prompt": [BOS, token("▁the")], "stream": stream}
    assert texts(served.client.completions.create(**options)) == {0: (" cat sat on a mat", "stop")}


def texts(said: Any) -> dict[int, tuple[str, str | None]]:
    """Return the text of each choice and why it ended, by its index, of a completion or a stream of chunks."""
    found: dict[int, tuple[str, str | None]] = {}
    for chunk in [said] if hasattr(said, "choices") else said:
        for choice in chunk.choices:
            text, reason = found.get(choice.index, ("", None))
            assert reason is None
            found[choice.index] = text + choice.text, choice.finish_reason
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_usage(served: Served, stream: bool) -> None:
    options = {**GREEDY, "prompt": ["x", "so x"], "max_tokens": 4, "n": 2, "stream": stream}
    if stream:
        *before, last = served.client.completions.create(**options, stream_options={"include_usage": True})
        assert last.choices == []
        assert all(chunk.usage is None for chunk in before)
    else:
        last = served.client.completions.create(**options)
    prompt = sum(len(served.gemma.tokenizer.encode(text)) for text in ("x", "so x"))
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, 16)
    assert last.usage.total_tokens == prompt + 16


def test_what_the_cache_held_is_told(served: Served) -> None:
    options = {**GREEDY, "prompt": "so it went the", "max_tokens": 1}
    used = [served.client.completions.create(**options).usage for _ in range(2)]
    assert used[1] is not None and used[1].prompt_tokens_details is not None
    assert used[1].prompt_tokens_details.cached_tokens == used[1].prompt_tokens - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("z", "xy"), ([" never", "yz"], "x"), ("zz", "xyzxyzxyz"), ("zxy\n", "xyzxyzxyz")]
)
def test_stop(served: Served, stop: str | list[str], text: str, stream: bool) -> None:
    said = served.client.completions.create(**GREEDY, prompt="z", max_tokens=9, stop=stop, stream=stream)
    assert texts(said) == {0: (text, "length" if len(text) == 9 else "stop")}


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens(served: Served, stream: bool) -> None:
    answer = served.post("/v1/completions", json={**GREEDY, "prompt": "m", "stream": stream})
    assert "�" not in answer.text
    assert texts(served.client.completions.create(**GREEDY, prompt="m", stream=stream))[0][0] == "€😀n"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_most_tokens_of_a_reply(served: Served, name: str) -> None:
    options: dict[str, Any] = HELLO | {name: 1}
    said = served.client.chat.completions.create(**options)
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == (" home", "length")


def test_a_text_ends_where_the_context_does(served: Served) -> None:
    said = served.client.completions.create(**GREEDY, prompt="x", max_tokens=10**6)
    assert said.choices[0].finish_reason == "length"
    assert said.usage is not None
    assert said.usage.total_tokens == served.gemma.context_length + 1


def test_prompts_of_all_kinds(served: Served) -> None:
    x, m = served.gemma.tokenizer.encode("x"), served.gemma.tokenizer.encode("m")
    for prompt, expected in (
        ("x", ["y"]),
        (["x", "y"], ["y", "z"]),
        (x, ["y"]),
        ([x, m[:1] + x], ["y", "y"]),
    ):
        said = served.client.completions.create(**GREEDY, prompt=prompt, max_tokens=1)
        assert [choice.text for choice in said.choices] == expected


def test_seed(guessing: Served) -> None:
    def said(seed: int, **options: Any) -> dict[int, tuple[str, str | None]]:
        return texts(
            guessing.client.completions.create(
                model=NAME, prompt="so", max_tokens=12, temperature=1, top_p=1, seed=seed, **options
            )
        )

    one = said(5)
    assert one == said(5) == said(5, stream=True) == said(5 + (1 << 32))
    assert one != said(6)
    several = said(5, n=3)
    assert several == said(5, n=3, stream=True)
    assert several[0] == one[0]
    assert several[1] == said(6)[0]
    assert len(set(several.values())) == 3
    expected = "".join(map(str, guessing.gemma.generate("so", max_new_tokens=12, top_p=1, seed=5)))
    assert one[0][0] == expected


def test_temperature_and_top_p(guessing: Served) -> None:
    def said(**options: Any) -> str:
        return (
            guessing.client.completions.create(
                model=NAME, prompt="so", max_tokens=12, extra_body={"top_k": 0}, **options
            )
            .choices[0]
            .text
        )

    greedy = said(temperature=0)
    assert said(temperature=1, top_p=1e-6, seed=1) == greedy
    assert said(temperature=2, top_p=1, seed=1) != greedy


def test_our_own_options(guessing: Served) -> None:
    for options in ({"top_k": 1}, {"min_p": 1.0}):
        greedy = guessing.client.completions.create(**GREEDY, prompt="so").choices[0].text
        said = guessing.client.completions.create(model=NAME, prompt="so", temperature=2, extra_body=options)
        assert said.choices[0].text == greedy


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(guessing: Served, stream: bool) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": "so", "max_tokens": 5, "seed": 2, "logprobs": 3}
    said = guessing.client.completions.create(**options, stream=stream)
    parts = [part.choices[0] for part in ([said] if hasattr(said, "choices") else said)]
    logprobs = [part.logprobs for part in parts if part.logprobs]
    text = "".join(part.text for part in parts)
    names = [name for part in logprobs for name in part.tokens or []]
    offsets = [offset for part in logprobs for offset in part.text_offset or []]
    chosen = [value for part in logprobs for value in part.token_logprobs or []]
    tops = [top for part in logprobs for top in part.top_logprobs or []]
    ids = guessing.gemma.tokenizer.encode("so")
    generation = guessing.gemma.generate("so", max_new_tokens=5, seed=2)
    assert "".join(map(str, generation)) == text
    expected = reference_logprobs(ids, generation.ids)
    bytes_ = {token(byte): f"bytes:\\x{byte:02x}" for byte in range(0x80, 0x100)}
    assert names == [bytes_.get(token, guessing.gemma.tokenizer.decode([token])) for token in generation.ids]
    assert chosen == pytest.approx(
        [row[token] for row, token in zip(expected, generation.ids, strict=True)], abs=1e-3
    )
    for row, top in zip(expected, tops, strict=True):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-3)
        assert 1 < len(top) <= 3
    data = guessing.gemma.tokenizer.token_bytes()
    before = [b"".join(data[token] for token in generation.ids[:count]) for count in range(5)]
    assert offsets == [sum(byte & 0xC0 != 0x80 for byte in said) for said in before]  # bytes that begin a character
    assert offsets[-1] > 1


def reference_logprobs(ids: list[int], new: list[int]) -> Any:
    config = Gemma3Config.from_hf(HF)
    logits = reference_logits(config, random_weights(config), ids + new)[len(ids) - 1 : -1]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(served: Served, stream: bool) -> None:
    said: Any = served.client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2, stream=stream)
    parts = [part.choices[0] for part in ([said] if hasattr(said, "choices") else said)]
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [entry.token for entry in entries] == [" home", " again"]
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob > entry.top_logprobs[1].logprob
    said = served.client.chat.completions.create(**HELLO, logprobs=True)
    assert [entry.top_logprobs for entry in said.choices[0].logprobs.content] == [[], []]
    assert served.client.chat.completions.create(**HELLO).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_of_the_text_that_is_told(served: Served, stream: bool) -> None:
    """There are none of a stop string, and one of every byte of a character."""
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("z", {"stop": "zx", "max_tokens": 9}, ["x", "y"]),
        ("z", {"stop": "zxx", "max_tokens": 4}, ["x", "y", "z", "x"]),
        ("m", {}, [f"bytes:\\x{byte:02x}" for byte in "€😀".encode()] + ["n"]),
    ]
    for prompt, options, expected in cases:
        said: Any = served.client.completions.create(**GREEDY, prompt=prompt, logprobs=0, stream=stream, **options)
        parts = [part.choices[0].logprobs for part in ([said] if hasattr(said, "choices") else said)]
        assert [name for part in parts for name in part.tokens] == expected


class Animal(BaseModel, extra="forbid"):
    kind: Literal["cat", "mat", "🐈"]
    age: Annotated[int, Field(ge=0, le=20)]


def test_response_format(guessing: Served) -> None:
    """Without it, the model says nothing that is JSON."""
    chat: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "so"}]}
    for seed in range(4):
        said = guessing.client.chat.completions.parse(**chat, seed=seed, response_format=Animal)
        assert isinstance(said.choices[0].message.parsed, Animal)
    schema = {"name": "animal", "schema": Animal.model_json_schema()}
    form: Any = {"type": "json_schema", "json_schema": schema}
    streams = [guessing.client.chat.completions.create(**chat, stream=True, response_format=form) for _ in range(2)]
    free = guessing.client.chat.completions.create(**chat, stream=True, max_tokens=40)
    told = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in [*streams, free]]
    for text in told[:2]:
        Animal.model_validate_json(text)
    with pytest.raises(ValidationError):
        Animal.model_validate_json(told[2])


def test_bytes_of_tokens(served: Served) -> None:
    entries = TokenTexts(served.gemma.tokenizer)
    assert entries.rival(token(0xE2), -1.0).bytes == [0xE2]
    assert entries.rival(token("▁cat"), -1.0).bytes == list(b" cat")


# Images.


def seen(*images: str | bytes, text: str = "so", **options: Any) -> dict[str, Any]:
    """Return the body of a question about images, which are files or URLs."""
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return GREEDY | {"max_tokens": 8, "messages": messages} | options


def expected(gemma: Gemma, *images: bytes, pan_and_scan: bool = False) -> tuple[str, int]:
    """Return what Python says to the same, and how many tokens the prompt has."""
    parts: list[Any] = [{"type": "image", "image": image} for image in images]
    chat: list[Any] = [{"role": "user", "content": [*parts, {"type": "text", "text": "so"}]}]
    generation = gemma.chat(chat, pan_and_scan=pan_and_scan, temperature=0, max_new_tokens=8)
    return generation.result(), generation.stats.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_is_seen(sighted: Served, stream: bool) -> None:
    said = {}
    for image in (RED, NOISE):
        made: Any = sighted.client.chat.completions.create(**seen(image, stream=stream, n=2))
        parts = list(made) if stream else [made]
        texts = ["", ""]
        for part in parts:
            for choice in part.choices:
                texts[choice.index] += (choice.delta if stream else choice.message).content or ""
        said[image] = texts
        assert texts == [expected(sighted.gemma, image)[0]] * 2
    assert said[RED] != said[NOISE]


def test_images_in_several_turns(sighted: Served) -> None:
    content = [{"type": "text", "text": "so"}]
    images = [{"type": "image_url", "image_url": {"url": data_uri(image), "detail": "low"}} for image in (RED, NOISE)]
    messages: Any = [
        {"role": "user", "content": [images[0], *content, images[1]]},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": [*content, images[0]]},
    ]
    said = sighted.client.chat.completions.create(**GREEDY, messages=messages, max_tokens=8)
    sources = [{"type": "image", "image": image} for image in (RED, NOISE)]
    same: list[Any] = [
        {"role": "user", "content": [sources[0], *content, sources[1]]},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": [*content, sources[0]]},
    ]
    assert said.choices[0].message.content == sighted.gemma.chat(same, temperature=0, max_new_tokens=8).result()


def test_the_tokens_of_images_are_the_prompts(sighted: Served) -> None:
    several: list[tuple[bytes, ...]] = [(), (RED,), (RED, NOISE)]
    used = [sighted.client.chat.completions.create(**seen(*images)).usage for images in several]
    counts = [usage.prompt_tokens for usage in used if usage]
    assert counts[1] > counts[0] + IMAGE_TOKENS
    assert counts == [expected(sighted.gemma, *images)[1] for images in several]


def test_images_that_were_encoded_are_counted(sighted: Served) -> None:
    image = encoded(Image.new("RGB", (9, 7), "green"), "JPEG")
    before = sighted.metric("encoded_images_total")
    for _ in range(2):
        sighted.client.chat.completions.create(**seen(image, n=2))
    assert sighted.metric("encoded_images_total") == before + 1


def test_crops_of_long_images(sighted: Served) -> None:
    image = encoded(picture(width=600, height=300), "PNG")
    with serving(sighted.gemma, pan_and_scan=True) as other:
        said = other.client.chat.completions.create(**seen(image))
    assert said.usage is not None
    told = said.choices[0].message.content, said.usage.prompt_tokens
    assert told == expected(sighted.gemma, image, pan_and_scan=True) != expected(sighted.gemma, image)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """Return the addresses that anybody connects to, as they come."""
    made: set[object] = set()
    connected = socket.create_connection

    def create_connection(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        made.add(address)
        return connected(address, *rest, **options)

    monkeypatch.setattr(socket, "create_connection", create_connection)
    return made


@pytest.mark.parametrize("remote", [False, True])
def test_images_that_are_none(sighted: Served, connections: set[object], remote: bool) -> None:
    """Each is refused by a sentence, nothing is fetched, and then an image is seen again."""
    assert len(BROKEN) > 20
    none: list[str | bytes] = [*BROKEN.values(), *REFUSED_ADDRESSES, *PATHS]
    with serving(sighted.gemma, remote_images=remote) as other:
        for source in [*none, "data:", "data:image/png;base64,?", ""]:
            body = seen(source) | {"stream": True}
            refused(
                lambda body=body: other.client.chat.completions.create(**body),  # type: ignore[misc]
                400,
                "messages[0].content: ",
                param="messages[0].content",
            )
        assert (
            other.client.chat.completions.create(**seen(RED)).choices[0].message.content
            == expected(sighted.gemma, RED)[0]
        )
        assert connections == {other.server.servers[0].sockets[0].getsockname()}


def test_images_on_the_web_are_not_fetched_unasked(sighted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetched(url: str) -> bytes:
        asked.append(url)
        return RED

    monkeypatch.setattr(server_images, "fetch_picture", fetched)
    body = seen("https://somewhere.example/a.png")
    refused(
        lambda: sighted.client.chat.completions.create(**body),
        400,
        "--allow-remote-images",
        param="messages[0].content",
    )
    assert asked == []
    with serving(sighted.gemma, remote_images=True) as other:
        said = other.client.chat.completions.create(**body)
    assert asked == ["https://somewhere.example/a.png"]
    assert said.choices[0].message.content == expected(sighted.gemma, RED)[0]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image", "path": "/etc/passwd"}, "'image'"),
        ({"type": "image", "image": "/etc/passwd"}, "'image'"),
        ({"type": "input_audio"}, "an input_audio is not of the form"),
        ({"type": "input_audio", "input_audio": {"data": 5, "format": "wav"}}, "an input_audio is not of the form"),
        ({"type": "video_url"}, "'video_url'"),
        ({}, "None"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": data_uri(RED)}, "image_url"),
        ({"type": "image_url", "image_url": {"url": 5}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": data_uri(RED), "detail": "huge"}}, "detail"),
    ],
)
def test_parts_that_are_none(sighted: Served, part: dict[str, Any], named: str) -> None:
    chat: Any = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "so"}]
    chat.append({"role": "user", "content": [part]})
    refused(
        lambda: sighted.client.chat.completions.create(**HELLO | {"messages": chat}),
        400,
        named,
        param="messages[2].content",
    )


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model that sees and hears, with random weights."""
    folder = multimodal.write(tmp_path_factory.mktemp("hearing"))
    write_tokenizer(folder, 512)
    with load(folder, precision="f32", context_length=128) as gemma, serving(gemma) as served:
        yield served


def test_a_sound_is_heard(hearing: Served, served: Served) -> None:
    file = BytesIO()
    soundfile.write(file, made()["tone"], RATE, format="WAV")
    data = file.getvalue()
    sound: dict[str, Any] = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }
    messages: Any = [{"role": "user", "content": [sound]}]
    said = hearing.client.chat.completions.create(**GREEDY, messages=messages, max_tokens=8)
    same: Any = [{"role": "user", "content": [{"type": "audio", "audio": data}]}]
    generation = hearing.gemma.chat(same, temperature=0, max_new_tokens=8)
    assert said.choices[0].message.content == generation.result()
    assert said.usage and said.usage.prompt_tokens == generation.stats.prompt_tokens > multimodal.SOUND_TOKENS
    refused(
        lambda: served.client.chat.completions.create(**GREEDY, messages=messages),
        400,
        "message 0 has a sound, but this model has no ears",
        param="messages",
    )
    sound["input_audio"]["data"] = base64.b64encode(b"no sound").decode()
    refused(
        lambda: hearing.client.chat.completions.create(**GREEDY, messages=messages),
        400,
        "the sound: this is no sound of a kind that can be read",
        param="messages[0].content",
    )


def test_images_where_none_may_be(sighted: Served, served: Served) -> None:
    create = sighted.client.chat.completions.create
    refused(lambda: served.client.chat.completions.create(**seen(RED)), 400, "reads text only", param="messages")
    image = seen(RED)["messages"][0]
    refused(
        lambda: create(**HELLO | {"messages": [image | {"role": "system"}, image]}),
        400,
        "message 0",
        param="messages",
    )
    refused(lambda: create(**seen(*[RED] * 65)), 400, "65 images", param="messages")
    error = refused(lambda: create(**seen(*[RED] * 13)), 400, "context_length")
    assert error.code == "context_length_exceeded"


def test_an_image_that_is_larger_than_a_text_may_be(sighted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = encoded(picture(width=800, height=600), "PNG")
    assert len(noise) > server_app.MOST_BODY
    said = sighted.client.chat.completions.create(**seen(noise))
    assert said.choices[0].message.content == expected(sighted.gemma, noise)[0]
    monkeypatch.setattr(server_app, "MOST_CHAT", len(noise))
    refused(lambda: sighted.client.chat.completions.create(**seen(noise)), 413, "limit")


def test_what_a_model_reads_is_told(sighted: Served, served: Served) -> None:
    for other, expected in ((sighted, IMAGE_TOKENS), (served, None)):
        assert httpx.get(f"{other.url}/v1/models").json()["data"][0]["image_tokens"] == expected


def test_a_client_that_hangs_up_amid_an_image(sighted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    began, gone, steps = threading.Event(), threading.Event(), []
    submit = Encoding.submit

    def held(encoding: Encoding) -> Any:
        reading = submit(encoding)
        steps.append(encoding)
        began.set()
        assert gone.wait(SECONDS)
        return reading

    monkeypatch.setattr(Encoding, "submit", held)
    stream = sighted.client.chat.completions.create(**seen(encoded(picture(width=61), "PNG"), stream=True))
    assert began.wait(SECONDS)
    job = sighted.engine._jobs[0]
    stream.close()
    until(lambda: job.cancelled)
    gone.set()
    until(lambda: idle(sighted))
    assert len(steps) == 1 < steps[0].steps
    assert sighted.client.chat.completions.create(**HELLO, max_tokens=1).choices


def test_a_client_that_hangs_up_while_an_image_is_fetched(sighted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    began, gone = threading.Event(), threading.Event()

    def fetched(url: str) -> bytes:
        began.set()
        assert gone.wait(SECONDS)
        return RED

    monkeypatch.setattr(server_images, "fetch_picture", fetched)
    with serving(sighted.gemma, remote_images=True) as other, ThreadPoolExecutor() as pool:
        body = seen("https://somewhere.example/a.png")
        asking = pool.submit(httpx.post, f"{other.url}/v1/chat/completions", json=body, timeout=0.5)
        assert began.wait(SECONDS)
        with pytest.raises(httpx.ReadTimeout):
            asking.result(SECONDS)
        until(lambda: 'status="499"' in httpx.get(f"{other.url}/metrics").text)
        gone.set()


# Refusals.


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 0.5}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": (1 << 24) + 1}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": [""]}, "stop"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": "so"}, "messages"),
    ({"messages": [{"role": "tool", "content": "so"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"no_such": 1}, "no_such"),
]


@pytest.mark.parametrize(("options", "param"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_options(served: Served, options: dict[str, Any], param: str, stream: bool) -> None:
    if "stream_options" in options and stream:
        options = {"stream_options": 5}
    body = HELLO | options | {"stream": stream}
    error = served.post("/v1/chat/completions", json=body)
    assert error.status_code == 400
    content = error.json()["error"]
    assert content["type"] == "invalid_request_error"
    assert content["param"] == param
    assert param in content["message"]


def test_options_that_ask_for_nothing(served: Served) -> None:
    options = {"frequency_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
    message = {"role": "user", "content": [{"type": "text", "text": "so"}], "name": None}
    said = served.client.chat.completions.create(**HELLO | options | {"user": "me", "messages": [message]})
    assert said.choices[0].message.content == " home again"


def test_a_reply_can_be_sent_back(served: Served) -> None:
    reply = served.client.chat.completions.create(**HELLO).choices[0].message
    system = {"role": "developer", "content": "so"}
    messages = [system, *HELLO["messages"], reply, *HELLO["messages"]]
    assert served.client.chat.completions.create(**HELLO | {"messages": messages}).choices[0].message.content


def test_bad_requests(served: Served) -> None:
    client = served.client
    chat, complete = client.chat.completions.create, client.completions.create
    refused(lambda: chat(**HELLO | {"model": "gpt"}), 404, "'gpt'", NAME, param="model")
    refused(lambda: chat(**HELLO | {"messages": []}), 400, "user message", param="messages")
    refused(
        lambda: chat(**HELLO | {"messages": HELLO["messages"] * 2}), 400, "message 1", "assistant", param="messages"
    )
    refused(lambda: complete(**GREEDY, prompt=[]), 400, "prompt", param="prompt")
    refused(lambda: complete(**GREEDY, prompt=["a"] * 33, n=2), 400, "prompt", param="prompt")
    refused(lambda: complete(**GREEDY, prompt=[len(SCRIPTS) + 10**6]), 400, "vocabulary")
    refused(lambda: complete(**GREEDY, prompt=[[]]), 400, "empty")
    refused(lambda: complete(**GREEDY, prompt="a", echo=True), 400, "echo", param="echo")
    error = refused(lambda: complete(**GREEDY, prompt="a" * 500), 400, "context")
    assert error.code == "context_length_exceeded"


def test_bodies_that_are_none(served: Served) -> None:
    for content, kind in ((b"{", "application/json"), (b"[" * 10**5, "application/json"), (b"", "application/json")):
        error = served.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert error.status_code == 400
        assert error.json()["error"]["message"]
    # A web page may send this to anywhere without being asked whether it may.
    body = json.dumps({**GREEDY, "prompt": "x"})
    assert served.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    for path, status in (("/v1/embeddings", 404), ("/v1/models", 405)):
        error = served.post(path, json={})
        assert error.status_code == status
        assert error.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large(served: Served) -> None:
    body = json.dumps({**GREEDY, "prompt": "x" * server_app.MOST_BODY}).encode()
    chat = json.dumps(seen(RED, text="x" * MOST_TEXT)).encode()
    error = served.post("/v1/chat/completions", content=chat, headers={"Content-Type": "application/json"})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "messages")
    for content in (body, iter([body[:1000], body[1000:]])):  # the first has a length in front, the second has not
        error = served.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert error.status_code == 413
        assert error.json()["error"]["type"] == "invalid_request_error"


def test_api_key(endless: Gemma) -> None:
    with serving(endless, api_key="secret") as served:
        assert served.client_with("secret").models.list().data
        for key in ("wrong", "secre"):
            error = refused(lambda key=key: served.client_with(key).models.list(), 401, "key")  # type: ignore[misc]
            assert error.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(served.url + path)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/health", "/"):
            assert httpx.get(served.url + path).status_code == 200
        assert httpx.get(served.url + "/health", headers={"Host": "model.example"}).status_code == 200


def test_names_of_others(served: Served) -> None:
    """A page elsewhere can give this machine's address a name of its own, to pass for the page of the server."""
    for host, status in (("model.example", 403), ("localhost:80", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert httpx.get(served.url + "/health", headers={"Host": host}).status_code == status


def test_cross_origin(served: Served, endless: Gemma) -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with serving(endless, origins=["https://page.example"]) as other:
        answer = httpx.options(other.url + "/v1/completions", headers=ask)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
        answer = httpx.options(other.url + "/v1/completions", headers=ask | {"Origin": "https://else.example"})
        assert "Access-Control-Allow-Origin" not in answer.headers
    answer = httpx.options(served.url + "/v1/completions", headers=ask)
    assert "Access-Control-Allow-Origin" not in answer.headers


# Figures of the server, and its page.


def test_openapi(served: Served) -> None:
    api = httpx.get(f"{served.url}/openapi.json").json()
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics"} <= set(api["paths"])
    schemas = api["components"]["schemas"]
    assert "temperature" in schemas["ChatBody"]["properties"]
    for name in ("top_k", "min_p", "repetition_penalty"):
        kind, _ = schemas["CompletionBody"]["properties"][name]["anyOf"]
        assert (kind["minimum"], kind["maximum"]) == (RANGES[name].low, RANGES[name].high)
    assert "choices" in schemas["ChatCompletion"]["properties"]


def test_health(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "detail": None, "running": 0, "waiting": 0}


def test_metrics(served: Served) -> None:
    before = {name: served.metric(name) for name in ("generated_tokens_total", "requests_total", "generations_total")}
    served.client.completions.create(**GREEDY, prompt="x", max_tokens=7, n=2)
    assert served.metric("generated_tokens_total") == before["generated_tokens_total"] + 14
    assert served.metric("generations_total") == before["generations_total"] + 2
    assert served.metric("requests_total") > before["requests_total"]
    assert served.metric("gpu_bytes") == sum(served.gemma.gpu_bytes.values())
    httpx.get(f"{served.url}/a/path/of/somebody")
    assert "somebody" not in httpx.get(f"{served.url}/metrics").text


def test_page(served: Served) -> None:
    page = httpx.get(served.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(?!#|data:)", page.text)


# Jobs.


def idle(served: Served) -> bool:
    return served.engine.running == served.engine.waiting == 0


LONG: dict[str, Any] = {**GREEDY, "prompt": "x", "max_tokens": 10**6, "stream": True}


def test_a_client_that_hangs_up_frees_its_place(endless: Gemma) -> None:
    with serving(endless, batch_size=1) as served:
        stream = served.client.completions.create(**LONG)
        assert [next(stream).choices[0].text for _ in range(3)] == ["y", "z", "x"]
        waiting = served.client.completions.create(**LONG)  # its head comes, but no text
        until(lambda: (served.engine.running, served.engine.waiting) == (1, 1))
        waiting.close()
        until(lambda: (served.engine.running, served.engine.waiting) == (1, 0))
        stream.close()
        until(lambda: idle(served))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=LONG | {"stream": False}, timeout=0.5)
        until(lambda: idle(served))
        said = served.client.completions.create(**GREEDY, prompt="x", max_tokens=2)
        assert said.choices[0].text == "yz"
        counted = httpx.get(f"{served.url}/metrics").text
        assert 'generations_total{reason="cancelled"} 2.0' in counted
        assert 'generations_total{reason="length"} 1.0' in counted
        assert 'requests_total{path="/v1/completions",status="499"} 1.0' in counted
        assert 'status="503"' not in counted


def test_a_client_that_hangs_up_amid_its_prompt(endless: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    began, gone, chunks = threading.Event(), threading.Event(), []
    prefill = endless.runner.prefill

    def held(*chunk: Any) -> Any:
        reading = prefill(*chunk)
        chunks.append(chunk)
        began.set()
        assert gone.wait(SECONDS)
        return reading

    endless.reset()
    with serving(endless) as served:
        monkeypatch.setattr(endless.runner, "prefill", held)
        stream = served.client.completions.create(**LONG | {"prompt": [BOS, *[token("x")] * 5000]})
        assert began.wait(SECONDS)
        job = served.engine._jobs[0]
        stream.close()
        until(lambda: job.cancelled)
        gone.set()
        until(lambda: idle(served))
        assert len(chunks) == 1


def test_requests_go_side_by_side(endless: Gemma) -> None:
    """Each is answered as if it were alone, also when another one comes, ends or is hung up on."""
    with serving(endless, batch_size=3) as served:
        streams = [served.client.completions.create(**LONG | {"prompt": prompt}) for prompt in "xyz"]
        for stream, expected in zip(streams, ("yzx", "zxy", "xyz"), strict=True):
            assert "".join(next(stream).choices[0].text for _ in range(3)) == expected
        assert (served.engine.running, served.engine.waiting) == (3, 0)
        streams[1].close()
        until(lambda: served.engine.running == 2)
        said = served.client.completions.create(**GREEDY, prompt="x", max_tokens=5)
        assert said.choices[0].text == "yzxyz"
        for stream, expected in ((streams[0], "yzx"), (streams[2], "xyz")):
            assert "".join(next(stream).choices[0].text for _ in range(3)) == expected
            stream.close()
        until(lambda: idle(served))


def test_the_queue_overflows(endless: Gemma) -> None:
    with serving(endless, batch_size=1, waiting=1) as served, ExitStack() as stack:
        for count in (1, 2):
            stack.callback(served.client.completions.create(**LONG).close)
            until(lambda count=count: served.engine.running + served.engine.waiting == count)  # type: ignore[misc]
        for stream in (True, False):
            options = LONG | {"stream": stream}
            error = refused(lambda options=options: served.client.completions.create(**options), 429, "1 requests")  # type: ignore[misc]
            assert 1 <= int(error.response.headers["Retry-After"]) <= 60
            assert error.type == "rate_limit_error"
        assert httpx.get(f"{served.url}/health").json()["waiting"] == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_requests_take_turns(endless: Gemma, batch_size: int) -> None:
    with serving(endless, batch_size=batch_size) as served:
        answers: list[str] = []

        def ask() -> None:
            answers.append(served.client.completions.create(**GREEDY, prompt="x", max_tokens=5).choices[0].text)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert answers == ["yzxyz"] * 8


MEMORY = 8 << 10  # KiB that a second round may add to the peak
ROUNDS = 2


def test_many_clients_of_which_a_third_hangs_up(guessing: Served) -> None:
    """It hangs up at any time: while it waits, before the first token, in the middle. The others get their own."""
    served, gemma, rng = guessing, guessing.gemma, random.Random(0)
    bodies: list[dict[str, Any]] = []
    expected: list[list[str]] = []
    for number in range(CLIENTS):
        options: dict[str, Any] = {"prompt": f"so {number}", "seed": number, "n": 1 + number % 2}
        most = rng.randrange(1, 16)
        bodies.append({"model": NAME, **options, "max_tokens": most, "stream": rng.random() < 0.5})
        seeds = range(number, number + bodies[-1]["n"])
        told = [gemma.generate(options["prompt"], seed=seed, max_new_tokens=most) for seed in seeds]
        expected.append(["".join(map(str, generation)) for generation in told])

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        said = await client.completions.create(**bodies[number])
        chunks = [chunk async for chunk in said] if bodies[number]["stream"] else [said]
        assert {index: text for index, (text, _) in texts(chunks).items()} == dict(enumerate(expected[number]))

    async def hang_up(client: openai.AsyncOpenAI, number: int) -> None:
        body = bodies[number] | {"max_tokens": 100}
        if body["stream"]:
            stream = await client.completions.create(**body)
            for _ in range(rng.randrange(6)):
                await anext(stream)
            await stream.close()
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 4):
                    await client.completions.create(**body)

    async def ask_all(url: str) -> None:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        async with client, asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task((ask if number % 3 else hang_up)(client, number))

    peaks = []
    for _ in range(ROUNDS):
        asyncio.run(ask_all(served.url))
        until(lambda: idle(served))
        gc.collect()
        unknown = gemma.device.allocated - sum(gemma.gpu_bytes.values())
        peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, unknown))
    assert served.metric("active_requests") == 0
    counted = httpx.get(f"{served.url}/metrics").text
    assert 'generations_total{reason="cancelled"}' in counted
    assert set(re.findall(r'requests_total{path="/v1/completions",status="(\d+)"', counted)) == {"200", "499"}
    assert {unknown for _, unknown in peaks} == {0}
    assert peaks[-1][0] < peaks[0][0] + MEMORY


# The end.


def stopped(response: httpx.Response) -> None:
    """Check that a response that is not streamed says that the server stopped."""
    assert response.status_code == 503
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "stopped")
    assert "stopped" in error["message"]


def stopped_amid(events: list[str]) -> None:
    """Check that the events of a stream end by an error that says that the server stopped."""
    assert len(events) > 1
    assert "[DONE]" not in "".join(events)
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "stopped")
    assert "stopped" in error["message"]


def test_clients_are_told_that_the_server_stops(endless: Gemma) -> None:
    """One has a stream, another one waits for the whole text, and the others have not begun."""
    with serving(endless, batch_size=2) as served, ThreadPoolExecutor() as pool:

        def streamed() -> list[str]:
            with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=SECONDS) as response:
                return [line for line in response.iter_lines() if line]

        def whole() -> httpx.Response:
            return served.post("/v1/completions", json=LONG | {"stream": False})

        first = pool.submit(streamed)
        until(lambda: served.engine.running == 1)
        second = pool.submit(whole)
        until(lambda: served.engine.running == 2)
        others = [pool.submit(whole) for _ in range(2)]
        until(lambda: served.engine.waiting == 2)
        until(lambda: len(served.engine._jobs[0].requests[0].ids) > 1)
        served.server.should_exit = True
        stopped_amid(first.result(SECONDS))
        for future in (second, *others):
            stopped(future.result(SECONDS))
        served.thread.join(SECONDS)
        assert not served.thread.is_alive()
        until(lambda: idle(served))
        with pytest.raises(openai.APIConnectionError):
            served.client.models.list()


def test_a_client_that_does_not_read_is_cut_off(endless: Gemma, caplog: pytest.LogCaptureFixture) -> None:
    with serving(endless, buffer=4096) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(served.server.servers[0].sockets[0].getsockname())
        body = json.dumps(LONG | {"logprobs": 20, "n": 4}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        connections = served.server.server_state.connections
        until(lambda: any(connection.flow.write_paused for connection in list(connections)))
        served.server.should_exit = True
        served.thread.join(SECONDS)
        assert not served.thread.is_alive()
        until(lambda: idle(served))
    assert caplog.records == []


def test_half_a_request_does_not_hold_up_the_end(endless: Gemma, caplog: pytest.LogCaptureFixture) -> None:
    with serving(endless) as served, socket.create_connection(served.server.servers[0].sockets[0].getsockname()) as c:
        c.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n")
        c.sendall(b"Content-Type: application/json\r\n\r\n{")
        until(lambda: bool(served.server.server_state.tasks))
        served.server.should_exit = True
        served.thread.join(SECONDS)
        assert not served.thread.is_alive()
    assert caplog.records == []


def test_close_stops_what_runs_and_what_waits(endless: Gemma) -> None:
    with serving(endless, batch_size=1) as served:
        streams = [served.client.completions.create(**LONG) for _ in range(2)]
        next(streams[0])
        until(lambda: (served.engine.running, served.engine.waiting) == (1, 1))
        served.engine.close()
        for stream in streams:
            with pytest.raises(openai.APIError, match="stopped"):
                list(stream)
        refused(lambda: served.client.completions.create(**LONG), 503, "stopped")


def test_a_failure_is_told(endless: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("the GPU is gone")

    with serving(endless) as served:
        with monkeypatch.context() as patch:
            patch.setattr(endless.runner, "begin", fail)
            refused(lambda: served.client.completions.create(**GREEDY, prompt="x"), 500, "the GPU is gone")
            with pytest.raises(openai.APIError, match="the GPU is gone"):
                list(served.client.completions.create(**LONG))
            answer = httpx.get(f"{served.url}/health")
            assert (answer.status_code, answer.json()["detail"]) == (503, "the GPU is gone")
            patch.setattr(endless.runner, "begin", lambda *_: 1 / 0)
            refused(lambda: served.client.completions.create(**GREEDY, prompt="x"), 500, "log")
        assert served.client.completions.create(**GREEDY, prompt="x", max_tokens=1).choices[0].text == "y"
        assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize("error", [DeviceError("the GPU is gone"), ZeroDivisionError("a mistake")])
def test_a_text_that_fails_ends_alone(endless: Gemma, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The other jobs go on, and so does the engine."""
    failing, push = threading.Event(), Request.push

    def push_or_fail(request: Request, *arguments: Any) -> None:
        if failing.is_set() and len(request.prompt) == 3:
            raise error
        push(request, *arguments)

    monkeypatch.setattr(Request, "push", push_or_fail)
    message = "the GPU is gone" if isinstance(error, DeviceError) else "its log says why"
    with serving(endless) as served:
        stream = served.client.completions.create(**LONG)
        assert next(stream).choices[0].text == "y"
        at_fault = served.client.completions.create(**LONG | {"prompt": [BOS, token("y"), token("x")], "n": 2})
        next(at_fault)
        failing.set()
        with pytest.raises(openai.APIError, match=message):
            list(at_fault)
        assert "".join(next(stream).choices[0].text for _ in range(3000))[-3:] in ("yzx", "zxy", "xyz")
        stream.close()
        until(lambda: idle(served))
        assert httpx.get(f"{served.url}/health").status_code == 200
        counted = httpx.get(f"{served.url}/metrics").text
        found = {
            reason: float(count) for reason, count in re.findall(r'generations_total{reason="(\w+)"} (\S+)', counted)
        }
        assert found["failed"] >= 1
        assert sum(found.values()) == 3


def test_a_model_that_was_closed(endless_folder: Path) -> None:
    with load(endless_folder, precision="f32", context_length=1000) as gemma, serving(gemma) as served:
        gemma.close()
        refused(lambda: served.client.completions.create(**GREEDY, prompt="x"), 500, "closed")
        assert httpx.get(f"{served.url}/v1/models").status_code == 200


# The command.


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `gemma-wgpu serve`; yield the process, and the address that it says."""
    line = [sys.executable, "-c", "from gemma_wgpu.apps.cli import main; main()", "serve", "--port", "0", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.search(r"http://\S+", first)
            assert found, process.stderr and process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_stops_the_command(endless_folder: Path, numbers: list[int]) -> None:
    """Another one changes nothing."""
    with command("--model", str(endless_folder), "--name", "it") as (process, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        assert [model.id for model in client.models.list()] == ["it"]
        body = LONG | {"model": "it"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
            lines = (line for line in response.iter_lines() if line)
            events = [next(lines)]
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.05)  # two at once would be one
            stopped_amid([*events, *lines])
        _, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_ports_that_do_not_exist(port: int) -> None:
    """They are found before the model is loaded."""
    result = CliRunner().invoke(main, ["serve", "--model", "no such model", "--port", str(port)])
    assert result.exit_code == 1
    assert result.output == f"Error: port is {port}; it must be a whole number from 0 to 65,535\n"


def test_a_server_for_everybody_warns(endless_folder: Path) -> None:
    with command("--model", str(endless_folder), "--host", "0.0.0.0") as (process, url):
        assert httpx.get(f"{url}/health", timeout=SECONDS).status_code == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert "--api-key" in errors


def test_a_port_that_is_taken() -> None:
    with server_app.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"127.0.0.1 port {port}.*--port"):
            server_app.bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "." * 80, "a" * 80):
        with pytest.raises(RequestError, match="--host"):
            server_app.bind(host, 0)


def test_a_port_that_is_taken_meanwhile() -> None:
    with server_app.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with server_app.bind("127.0.0.1", port) as second:
            server_app.listen(first)
            with pytest.raises(RequestError, match=f"127.0.0.1 port {port}.*--port"):
                server_app.listen(second)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_who_can_reach_it(host: str, local: bool) -> None:
    with server_app.bind(host, 0) as bound:
        assert server_app.is_local(bound) is local
