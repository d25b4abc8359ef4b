"""Requests of a file, and their results in another one, where each is once however often the run was ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gemma_wgpu.engine import structured
from gemma_wgpu.engine.generation import Generation
from gemma_wgpu.engine.request import Text
from gemma_wgpu.errors import RequestError
from gemma_wgpu.files import lock
from gemma_wgpu.gemma import Gemma

Result = dict[str, object]

_OPTIONS = {
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "response_format",
}


@dataclass(frozen=True)
class Request:
    """A line of the input: its name, "prompt" or "messages" with what it says, and options of `Gemma.generate`."""

    custom_id: str
    kind: str
    content: Any
    options: Mapping[str, Any]

    def id(self, gemma: Gemma) -> str:
        """Tells apart all requests to all models that may get another answer."""
        model = [gemma.fingerprint, gemma.precision, gemma.activations, gemma.context_length]
        request = [self.custom_id, self.kind, self.content, self.options]
        return hashlib.sha256(json.dumps([model, request], sort_keys=True).encode()).hexdigest()[:32]

    def text(self, gemma: Gemma) -> Text:
        """The text that is to be generated. Raises RequestError."""
        if isinstance(self.content, list) and any(isinstance(each, str | list) for each in self.content):
            raise RequestError(f"the {self.kind} of a line are one; give each of several a line of its own")
        method = gemma.chat if self.kind == "messages" else gemma.generate
        options = dict(self.options)
        if form := options.pop("response_format", None):
            options["constraint"] = structured.from_response_format(form)
        generation: Generation = method(self.content, **options)
        return generation.draft


def read_requests(path: Path, options: Mapping[str, Any], seed: int) -> list[Request]:
    """The requests of a file of JSON lines. Raises RequestError naming the line that is none.

    `options` are for those that do not say; nor need they say a seed, which is `seed` for the first one and one more
    for each that follows.
    """
    requests: list[Request] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                own = {**options, "seed": (seed + len(requests)) % (1 << 32)}
                request = _parsed(line, f"{path}: line {number}", own)
                if before := lines.get(request.custom_id):
                    raise RequestError(
                        f"{path}: line {number} has the custom_id {request.custom_id!r} of line {before}; "
                        "each must have its own"
                    )
                lines[request.custom_id] = number
                requests.append(request)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error
    return requests


def _parsed(line: str, where: str, options: Mapping[str, Any]) -> Request:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str):
        raise RequestError(f'{where} is not an object with a "custom_id" that is a text')
    kinds = [kind for kind in ("prompt", "messages") if kind in fields]
    if len(kinds) != 1:
        raise RequestError(f'{where} has {" and ".join(kinds) or "neither"}; give it a "prompt" or "messages"')
    custom_id, content = fields.pop("custom_id"), fields.pop(kinds[0])
    if unknown := sorted(fields.keys() - _OPTIONS):
        raise RequestError(f"{where} has an option {unknown[0]!r}; there are {', '.join(sorted(_OPTIONS))}")
    return Request(custom_id, kinds[0], content, {**options, **fields})


def answers(gemma: Gemma, requests: Iterable[Request], batch_size: int) -> Iterator[Result]:
    """The result of each request as it is done: its text, or why it was refused; `batch_size` go side by side."""
    scheduler, waiting = gemma.scheduler(batch_size), iter(requests)
    running: dict[Text, Request] = {}
    while True:
        while len(running) < batch_size and (request := next(waiting, None)):
            try:
                text = request.text(gemma)
            except RequestError as error:
                yield {"id": request.id(gemma), "custom_id": request.custom_id, "error": str(error)}
            else:
                running[text] = request
                scheduler.add(text)
        if not running:
            return
        gemma.device.wait(scheduler.step())
        for text in [text for text in running if text.stats.finish_reason]:
            request = running.pop(text)
            yield {
                "id": request.id(gemma),
                "custom_id": request.custom_id,
                "text": text.text,
                "seed": text.sampling.seed,
                "prompt_tokens": text.stats.prompt_tokens,
                "new_tokens": text.stats.new_tokens,
                "finish_reason": text.stats.finish_reason,
            }


class Results:
    """The file with the results. As a context manager it is this process's alone, without a line that was torn.

    Raises RequestError where the file cannot be written, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}  # that are there, by the id of their request

    def __enter__(self) -> Self:
        with self._writing(), ExitStack() as stack:
            self._file = stack.enter_context(self._path.open("a+b"))
            if not lock(self._file):
                raise RequestError(f"{self._path}: another process is writing it; end that one, or name another file")
            self._read()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _read(self) -> None:
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # a run was ended while it wrote it
                self._file.truncate(end)
                return
            end += len(line)
            try:
                self._lines[json.loads(line)["id"]] = number
            except (ValueError, KeyError, TypeError):
                raise RequestError(f"{self._path}: line {number} is no result; name another output file") from None

    def missing(self, gemma: Gemma, requests: Iterable[Request]) -> list[Request]:
        """The requests whose results are not there. Raises RequestError where one is there that is of no request."""
        by_id = {request.id(gemma): request for request in requests}
        for id_, number in self._lines.items():
            if id_ not in by_id:
                raise RequestError(
                    f"{self._path}: line {number} is of another input, model, or options than this run's; "
                    "name another output file, or delete this one"
                )
        return [request for id_, request in by_id.items() if id_ not in self._lines]

    def append(self, result: Result) -> None:
        """Write a result, so that it is on the disk. Raises RequestError."""
        line = json.dumps(result, ensure_ascii=False) + "\n"
        with self._writing():
            self._file.write(line.encode(errors="backslashreplace"))  # half a character is then as JSON writes it
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self._path}: cannot be written: {error.strerror or error}; what is in it is kept, and gone on with"
            ) from error
