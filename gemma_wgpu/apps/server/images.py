"""The images and sounds in the messages of a chat: from the parts that OpenAI's API has for them to a prompt.

A client gives a sound's data, and an image's data or its address on the web. No part of a message reaches a file of
this machine.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import sounds
from gemma_wgpu.engine.prompt import Prompt
from gemma_wgpu.engine.thoughts import Thoughts
from gemma_wgpu.errors import ContextError, RequestError
from gemma_wgpu.fetch.pictures import fetch_picture
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.models.keys import shown

MOST_TEXT = 1 << 20  # characters of all messages together
MOST_MEDIA = 64  # images and sounds of all messages together

_DETAILS = (None, "auto", "low", "high")  # the model reads all of them alike
_GIVE = "give the image's data, as data:image/png;base64,..."
_WEB = re.compile(r"https?:", re.IGNORECASE)
_DATA = re.compile(r"data:", re.IGNORECASE)
_FETCHES = 8  # that go on at a time, whoever asks for them

Messages = Sequence[Mapping[str, Any]]


class Images:
    """Makes prompts of chats with images and sounds.

    Pictures are decoded one at a time, so that they take little memory however many clients there are. Those on the
    web are fetched if `remote` is true. With `pan_and_scan`, long ones are followed by crops of them.
    """

    def __init__(self, gemma: Gemma, *, remote: bool, pan_and_scan: bool) -> None:
        self._gemma = gemma
        self._remote = remote
        self._pan_and_scan = pan_and_scan
        self._decoding = asyncio.Lock()
        self._fetching = asyncio.Semaphore(_FETCHES)

    async def prompt(self, messages: Messages, *, thinking: str) -> Prompt:
        """Return the prompt that `Gemma.chat` makes of messages; `thinking` is its option.

        Raises RequestError, whose `option` is what is at fault, and ContextError. What is wrong with the messages is
        said before a picture is fetched or decoded.
        """
        media, ids = await asyncio.to_thread(self._checked, messages, thinking)
        views: list[list[NDArray[np.float32]]] = []
        heard: list[NDArray[np.float32]] = []
        for param, noun, url in media:
            with _about(param):
                source = url if _DATA.match(url) else await self._fetched(url)
                async with self._decoding:
                    if noun == "sound":
                        heard.append(await asyncio.to_thread(sounds.features_of, source, files=False))
                    else:
                        views.append(await asyncio.to_thread(self._views, source))
        return await asyncio.to_thread(self._placed, messages, thinking, ids, views, heard)

    def _checked(self, messages: Messages, thinking: str) -> tuple[list[tuple[str, str, str]], list[int]]:
        """Return the images and sounds, and the ids of the prompt.

        Each has the name of the content that it is in, "image" or "sound", and its URL.
        """
        media = []
        text = 0
        for index, message in enumerate(messages):
            param, content = f"messages[{index}].content", message["content"]
            text += len(message.get("reasoning_content") or "")
            if isinstance(content, str):
                text += len(content)
                continue
            with _about(param):
                media += [(param, *found) for part in content if (found := self._medium(part)) is not None]
            text += sum(len(part["text"]) for part in content if isinstance(part.get("text"), str))
        if text > MOST_TEXT:
            raise RequestError(
                f"the messages have {text:,} characters of text, and {MOST_TEXT:,} are the limit; shorten them",
                option="messages",
            )
        if len(media) > MOST_MEDIA:
            raise RequestError(
                f"the messages have {len(media)} images and sounds, and {MOST_MEDIA} are the limit; send fewer",
                option="messages",
            )
        try:
            ids = self._gemma.chat_ids(messages, thinking=thinking)
        except RequestError as error:
            raise RequestError(str(error), option="messages") from error
        if media and len(ids) > self._gemma.context_length:
            raise ContextError(
                f"the prompt has {len(ids):,} tokens, more than the context_length of "
                f"{self._gemma.context_length:,}; send fewer images and sounds or less text"
            )
        return media, ids

    def _medium(self, part: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return what a part is, "image" or "sound", and its URL, or None for a text."""
        kind = part.get("type")
        if kind == "text":
            return None
        if kind == "input_audio":
            sound = part.get("input_audio")
            data = sound.get("data") if isinstance(sound, Mapping) else None
            if not isinstance(data, str):
                raise RequestError('an input_audio is not of the form {"data": "base64", "format": "wav"}')
            return "sound", f"data:;base64,{data}"
        if kind != "image_url":
            raise RequestError(f"a part has the type {shown(kind)}; it must be text, image_url or input_audio")
        return "image", self._url(part)

    def _url(self, part: Mapping[str, Any]) -> str:
        """Return the URL of an image."""
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else None
        if not isinstance(image, Mapping) or not isinstance(url, str):
            raise RequestError('an image_url is not of the form {"url": "data:image/png;base64,..."}')
        if image.get("detail") not in _DETAILS:
            raise RequestError(f"detail is {shown(image['detail'])}; it must be auto, low or high")
        if _DATA.match(url):
            return url
        if not _WEB.match(url):
            raise RequestError(f"the url {shown(url)} is neither an image's data nor on the web; {_GIVE}")
        if not self._remote:
            raise RequestError(
                f"this server fetches no images from the web unless it is started with --allow-remote-images; {_GIVE}"
            )
        return url

    async def _fetched(self, url: str) -> bytes:
        """Return the bytes at an address on the web. Nobody has to wait for a thread that fetches."""
        future: Future[bytes] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(fetch_picture(url))
            except BaseException as error:  # it is raised where the result is awaited
                future.set_exception(error)

        async with self._fetching:
            Thread(target=run, daemon=True).start()
            return await asyncio.wrap_future(future)

    def _views(self, source: str | bytes) -> list[NDArray[np.float32]]:
        """Return the pixels of a picture, and those of its crops."""
        vision = self._gemma.vision
        assert vision is not None  # else an image was refused
        return vision.views(source, pan_and_scan=self._pan_and_scan, files=False)

    def _placed(
        self,
        messages: Messages,
        thinking: str,
        ids: list[int],
        views: Sequence[Sequence[NDArray[np.float32]]],
        heard: Sequence[NDArray[np.float32]],
    ) -> Prompt:
        """Return the prompt with the images and sounds in it, and with crops of images, which `ids` lack."""
        gemma, crops = self._gemma, [len(each) - 1 for each in views]
        prompt = gemma.prompt(
            gemma.chat_ids(messages, thinking=thinking, crops=crops) if any(crops) else ids,
            [pixels for each in views for pixels in each],
            heard,
        )
        return replace(prompt, thoughts=Thoughts.of(gemma.family.chat, gemma.tokenizer, thinking))


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Say what a RequestError is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{param}: {error}", option=param) from error
