"""The scheduler: texts side by side, which join and leave between two steps.

Whoever waits for a piece of a text calls `advance`, from any thread and from any number of coroutines. It submits
what can be submitted, and takes in the result of the oldest step. So everybody's texts move on together, and each of
them has the pieces that it would have alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.encoder import Encoding
from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.engine.request import Request
from gemma_wgpu.engine.runner import Mask, Row, Runner
from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.ops.kv_cache import ROLLBACK, Lease

_LATENESS = 0.005  # seconds from a step's end on the GPU to the next one's submission by a host that waits for it
_MOST_UNREAD = 16  # pieces of a text that nobody takes, after which it waits
_PROMPT_STEPS = 2  # chunks of prompts on the way to the GPU

Bytes = NDArray[np.uint8]


@dataclass(eq=False)
class _Running:
    """A text whose prompt is through: its row, and how many of its tokens were asked for and have come."""

    request: Request
    row: Row
    submitted: int = 1
    received: int = 0

    @property
    def under_way(self) -> int:
        """Return how many of its tokens are on the way."""
        return self.submitted - self.received

    @property
    def rests(self) -> bool:
        """Say whether nobody takes its pieces, so that it goes no further."""
        return len(self.request.pieces) >= _MOST_UNREAD


@dataclass(eq=False)
class _Prompt:
    """A text whose prompt is on its way: first its images and sounds, one by one, and then the chunks of its tokens.

    `left` are those that have no `features` yet, and `encoding` is the one of them that is on its way.
    """

    request: Request
    lease: Lease
    left: deque[Medium] = field(default_factory=deque)
    features: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    encoding: Encoding | None = None

    def close(self) -> None:
        """Encode no further."""
        if self.encoding:
            self.encoding.close()


@dataclass(eq=False)
class _Step:
    """A step that was submitted: whom it is for, which texts get a token of it, and what there is to be read."""

    requests: list[Request]
    texts: list[_Running]
    reading: Awaitable[object]
    logits: dict[int, Awaitable[Bytes]] = field(default_factory=dict)
    encoding: Encoding | None = None  # if this is a step of it
    rows: list[int] | None = None  # of a table that stays off the GPU, if this fetches them


class Scheduler:
    """Generates texts on `runner`, `most` of them at a time and in the order in which they were added."""

    def __init__(self, runner: Runner, most: int = 8) -> None:
        self.runner = runner
        self.device = runner.device
        self.most = most
        self._closed: Exception | None = None
        self._waiting: deque[Request] = deque()
        self._prompt: _Prompt | None = None
        self._running: dict[Request, _Running] = {}
        self._steps: deque[_Step] = deque()

    @property
    def waiting(self) -> int:
        """Return how many texts have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return how many texts have begun and not ended."""
        return len(self._running) + (self._prompt is not None)

    @property
    def is_busy(self) -> bool:
        """Say whether there is anything for `advance` to do."""
        return bool(self._waiting or self._prompt or self._running or self._steps)

    def reserve(self, count: int) -> None:
        """Let `count` texts be generated side by side. Raises DeviceError if the GPU's memory is exhausted."""
        with self.device.lock:
            self.runner.reserve(count)
            self.most = max(self.most, count)

    def add(self, request: Request) -> None:
        """Generate a text, as soon as there is room for it. Raises DeviceError if the model was closed."""
        with self.device.lock:
            if self._closed is not None:
                raise self._closed
            self._waiting.append(request)

    def remove(self, request: Request, why: str = "interrupted") -> None:
        """Generate a text no further, which makes room for another one. Does nothing if it has ended."""
        with self.device.lock:
            request.end(why)
            self._let_go(request)

    def clear(self, error: Exception) -> None:
        """End all texts by an error, and forget what the cache holds."""
        with self.device.lock:
            for request in (*self._waiting, *self._running, *([self._prompt.request] if self._prompt else [])):
                request.fail(error)
            self._waiting.clear()
            self._running.clear()
            self._end_prompt()
            self.runner.cache.forget(str(error))

    def close(self, error: Exception) -> None:
        """End all texts by an error, and take no others."""
        with self.device.lock:
            self._closed = error
            self.clear(error)
            self._steps.clear()

    async def advance(self) -> None:
        """Submit what can be submitted, and take in the oldest step.

        What goes wrong is the `error` of the texts that it concerns: all of a step, if the GPU fails in it.
        """
        with self.device.lock:
            self._drop_abandoned()
            self._advance_prompts()
            self._submit_steps()
            step = self._steps[0] if self._steps else None
        if step is None:
            return
        try:
            data = await step.reading
            logits = {index: await reading for index, reading in step.logits.items()}
        except Exception as error:
            with self.device.lock:
                if self._taken(step):
                    for request in step.requests:
                        self._fail_alone(request, error)
            return
        with self.device.lock:
            if self._taken(step):
                self._receive(step, data, logits)

    def _taken(self, step: _Step) -> bool:
        """Take a step off the queue; False if another thread or coroutine has done so meanwhile."""
        if not self._steps or self._steps[0] is not step:
            return False
        self._steps.popleft()
        return True

    def _drop_abandoned(self) -> None:
        for request in [request for request in (*self._waiting, *self._running) if request.abandoned]:
            self.remove(request)
        if self._prompt and self._prompt.request.abandoned:
            self.remove(self._prompt.request)

    # Prompts.

    def _advance_prompts(self) -> None:
        """Submit a chunk of the prompt that is on its way, or of the next one if there is room for it."""
        if self._prompt is None:
            self._prompt = self._begun()
        prompt = self._prompt
        if prompt is None or sum(not step.texts for step in self._steps) >= _PROMPT_STEPS:
            return
        try:
            if prompt.left or prompt.encoding:
                self._encode(prompt)
            else:
                self._submit_chunk(prompt)
        except Exception as error:
            self._fail_alone(prompt.request, error)

    def _begun(self) -> _Prompt | None:
        active = self._active()
        if not self._waiting or len(active) >= self.most:
            return None
        request = self._waiting[0]
        try:
            lease = self.runner.begin(request.prompt, len(request.prompt) - 1)
        except Exception as error:
            # If the memory is exhausted, texts that are under way will end and leave room.
            if not (active and isinstance(error, DeviceError)):
                self._waiting.popleft()
                request.fail(error)
            return None
        self._waiting.popleft()
        request.begin()
        request.stats.reused_tokens = lease.reused
        keys = dict.fromkeys(token for token in request.prompt[lease.computed :] if token < 0)
        return _Prompt(request, lease, deque(request.media[key] for key in keys))

    def _encode(self, prompt: _Prompt) -> None:
        """Submit the next step of an image's or a sound's encoding, or begin with the next one."""
        encoding = prompt.encoding
        if encoding is None:
            medium = prompt.left.popleft()
            encoder = self.runner.encoders[medium.noun]
            features = encoder.features(medium)
            if features is not None:
                prompt.features[medium.key] = features
                return
            prompt.encoding = encoding = encoder.begin(medium)
            prompt.request.stats.encoded_images += 1
        if encoding.submitted < encoding.steps:
            self._steps.append(_Step([prompt.request], [], encoding.submit(), encoding=encoding))

    def _submit_chunk(self, prompt: _Prompt) -> None:
        runner, request, lease = self.runner, prompt.request, prompt.lease
        count = runner.next_count(lease)
        if self._fetches([request], lease.ids[lease.computed : lease.computed + count]):
            return
        if lease.computed + count < len(request.prompt):
            self._steps.append(_Step([request], [], runner.prefill(lease, count, prompt.features)))
            return
        reading = runner.finish(lease, count, request.draw, self._mask(request), prompt.features)
        running = _Running(request, Row(lease, len(request.prompt), request.draw))
        logits = {} if request.options.logprobs is None else {0: runner.read_logits()}
        self._steps.append(_Step([request], [running], reading, logits))
        if not request.ended:  # by its mask
            self._running[request] = running
            self._end_prompt()

    def _fetches(self, requests: list[Request], tokens: Sequence[int]) -> bool:
        """Fetch what a step of some tokens lacks of a table that stays off the GPU; say whether it has to wait."""
        numbers = self.runner.missing(tokens)
        if numbers and not any(step.rows is not None and step.requests == requests for step in self._steps):
            assert self.runner.lookup
            # It need not wait for the GPU.
            self._steps.appendleft(_Step(requests, [], self.runner.lookup.fetch(numbers), rows=numbers))
        return bool(numbers)

    # Steps of one token.

    def _active(self) -> list[_Running]:
        return [text for text in self._running.values() if not text.rests]

    def _submit_steps(self) -> None:
        """Submit steps until the GPU is as far ahead as a host may be late."""
        ahead = min((self._ahead(text.request) for text in self._active()), default=0)
        while texts := self._ready(ahead):
            try:
                tokens = self.runner.tokens_of([text.row for text in texts])
                if self._fetches([text.request for text in texts], tokens):
                    return
                self._submit_step(texts)
            except Exception as error:
                for text in texts:
                    self._fail_alone(text.request, error)

    def _submit_step(self, texts: list[_Running]) -> None:
        self.runner.set_rows([text.row for text in texts])
        reading = self.runner.step([self._mask(text.request) for text in texts])
        wanted = [index for index, text in enumerate(texts) if text.request.options.logprobs is not None]
        logits = {index: self.runner.read_logits(index) for index in wanted}
        self._steps.append(_Step([text.request for text in texts], texts, reading, logits))
        for text in texts:
            text.submitted += 1

    def _ahead(self, request: Request) -> int:
        """Return how many tokens more than one may be on the way: those past the end of a text are for nothing."""
        if request.mask or self.runner.lookup:  # what it allows, or its row, is known when the last token is
            return 0
        return min(1 + int(_LATENESS * request.stats.decode_tokens_per_second), ROLLBACK)

    def _ready(self, ahead: int) -> list[_Running]:
        """Return the texts that the next step is for: all that want a token, or none if one of them has to wait.

        If each went on when it could, they would go in several groups for good. One whose cache cannot grow ends by
        an error.
        """
        wanting = [text for text in self._active() if text.submitted < text.request.most]
        if any(text.under_way > ahead for text in wanting):
            return []
        found = []
        for text in wanting:
            try:
                text.row.lease.reserve(text.row.position + 1)
                found.append(text)
            except Exception as error:
                self._fail_alone(text.request, error)
        return found

    def _mask(self, request: Request) -> Mask | None:
        """Return the mask of a text; if it fails, all tokens are allowed and the text ends by the error."""
        mask = request.mask
        if mask is None:
            return None

        def guarded() -> NDArray[np.uint32]:
            try:
                return mask()
            except Exception as error:
                self._fail_alone(request, error)
                return np.full(-(-self.runner.vocab_size // 32), 0xFFFFFFFF, np.uint32)

        return guarded

    def _receive(self, step: _Step, data: object, logits: dict[int, Bytes]) -> None:
        assert isinstance(data, np.ndarray)
        if step.rows is not None and self.runner.lookup:
            self.runner.lookup.keep(step.rows, data)
        if step.encoding:
            self._receive_encoding(step.encoding, data)
        if not step.texts:
            return
        tokens = self.runner.tokens(data)
        for index, (text, token) in enumerate(zip(step.texts, tokens, strict=True)):
            text.received += 1
            request = text.request
            if request.ended:
                continue
            try:
                self.runner.check_token(token)
                text.row.lease.append(token)
                request.push(token, logits[index].view(np.float32) if index in logits else None)
            except Exception as error:
                self._fail_alone(request, error)
            if request.ended:
                self._let_go(request)

    def _receive_encoding(self, encoding: Encoding, data: Bytes) -> None:
        prompt = self._prompt
        if prompt is None or prompt.encoding is not encoding:  # it was interrupted
            return
        features = encoding.receive(data)
        if features is not None:
            prompt.features[encoding.medium.key] = features
            prompt.encoding = None
        if prompt.request.progress:
            prompt.request.progress(encoding.progress)

    # Ends.

    def _end_prompt(self) -> None:
        if self._prompt:
            self._prompt.close()
            self._prompt = None

    def _fail_alone(self, request: Request, error: Exception) -> None:
        request.fail(error)
        lease = self._found(request)
        self._let_go(request)
        if lease is not None:
            lease.end(str(error))

    def _found(self, request: Request) -> Lease | None:
        if self._prompt and self._prompt.request is request:
            return self._prompt.lease
        running = self._running.get(request)
        return running.row.lease if running else None

    def _let_go(self, request: Request) -> None:
        lease = self._found(request)
        if request in self._waiting:
            self._waiting.remove(request)
        if self._prompt and self._prompt.request is request:
            self._end_prompt()
        self._running.pop(request, None)
        if lease is not None:
            lease.release()


def ended_by(what: str) -> RequestError:
    """Return the error of the texts that something ended."""
    return RequestError(f"this text was ended by {what}; generate it again")
