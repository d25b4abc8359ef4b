"""Batch files: requests in lines of JSON, and their results in lines of another file.

Each result is there once, however often the run was ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click

from gemma_wgpu.engine import structured
from gemma_wgpu.engine.request import Request
from gemma_wgpu.errors import DeviceError, GemmaError, RequestError
from gemma_wgpu.files import lock, reason, sync
from gemma_wgpu.gemma import Gemma
from gemma_wgpu.options import RANGES, Options

STANDARD = "-"  # the name of the standard input or output

Result = dict[str, object]

_FIELDS = {*RANGES, "stop", "response_format", "thinking", "pan_and_scan"}


@dataclass(frozen=True)
class Line:
    """A line of the input.

    - custom_id: its name, which no other line has.
    - kind: "prompt" or "messages". content: what the line gives under this name.
    - fields: those of Options, as the line or else the command gives them, and response_format, thinking and
      pan_and_scan.
    """

    custom_id: str
    kind: str
    content: Any
    fields: Mapping[str, Any]

    def id(self, gemma: Gemma) -> str:
        """Return what tells it apart from all lines, and all models, that may give another result."""
        model = [gemma.fingerprint, gemma.precision, gemma.activations, gemma.context_length]
        asked = [self.custom_id, self.kind, self.content, self.fields]
        return hashlib.sha256(json.dumps([model, asked], sort_keys=True).encode()).hexdigest()[:32]

    @property
    def shows_thoughts(self) -> bool:
        """Say whether its result has what the model thought."""
        return self.kind == "messages" and self.fields.get("thinking") == "show"

    def request(self, gemma: Gemma) -> Request:
        """Return the text that it asks for. Raises RequestError if it asks for something impossible."""
        if isinstance(self.content, list) and any(isinstance(each, str | list) for each in self.content):
            several = "chats" if self.kind == "messages" else "prompts"
            raise RequestError(f"this line has several {several}; give each of them a line of its own")
        fields = dict(self.fields)
        form, pan_and_scan = fields.pop("response_format", None), fields.pop("pan_and_scan", False)
        thinking = fields.pop("thinking", "off")
        if not isinstance(pan_and_scan, bool):
            raise RequestError(f"pan_and_scan is {pan_and_scan!r}; it must be true or false", option="pan_and_scan")
        options = Options(**fields, constraint=structured.from_response_format(form) if form else None)
        if self.kind == "messages":
            prompt = gemma.chat_prompt(self.content, thinking=thinking, pan_and_scan=pan_and_scan)
            return gemma.request(prompt, options)
        return gemma.request(self.content, options)


def read_lines(name: str, fields: Mapping[str, Any], seed: int) -> list[Line]:
    """Read the file `name`, or the standard input if it is "-". Empty lines are skipped.

    `fields` are those of Options for the lines that do not give them. The seed of the first line is `seed`, and that
    of each other line is one more than the seed of the line above it. Raises RequestError for a file that cannot be
    read, and for a line that is no request.
    """
    where = "standard input" if name == STANDARD else name
    lines: list[Line] = []
    numbers: dict[str, int] = {}
    try:
        with click.open_file(name, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                own = {**fields, "seed": (seed + len(lines)) % (1 << 32)}
                line = _parsed(text, f"{where}: line {number}", own)
                if before := numbers.get(line.custom_id):
                    raise RequestError(
                        f"{where}: line {number} has the custom_id {line.custom_id!r} of line {before}; "
                        "give each line its own"
                    )
                numbers[line.custom_id] = number
                lines.append(line)
    except OSError as error:
        raise RequestError(f"{where}: cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: cannot be read: it is not UTF-8 text ({error.reason})") from error
    return lines


def _parsed(text: str, where: str, defaults: Mapping[str, Any]) -> Line:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str):
        raise RequestError(f'{where} is not an object with a "custom_id" that is a text')
    kinds = [kind for kind in ("prompt", "messages") if kind in fields]
    if len(kinds) != 1:
        raise RequestError(f'{where} has {" and ".join(kinds) or "neither"}; give it a "prompt" or "messages"')
    custom_id, content = fields.pop("custom_id"), fields.pop(kinds[0])
    if unknown := sorted(fields.keys() - _FIELDS):
        raise RequestError(f"{where} has an option {unknown[0]!r}; the options are {', '.join(sorted(_FIELDS))}")
    return Line(custom_id, kinds[0], content, {**defaults, **fields})


def answers(gemma: Gemma, lines: Iterable[Line], batch_size: int) -> Iterator[Result]:
    """Yield the result of each line as it is done: its text, or why there is none.

    `batch_size` texts are generated side by side. Raises DeviceError if the GPU fails, which is no line's fault.
    """
    scheduler, waiting = gemma.scheduler, iter(lines)
    scheduler.reserve(batch_size)
    running: dict[Request, Line] = {}
    try:
        while True:
            while len(running) < batch_size and (line := next(waiting, None)):
                try:
                    request = line.request(gemma)
                except RequestError as error:
                    yield _failure(gemma, line, error)
                else:
                    running[request] = line
                    scheduler.add(request)
            if not running:
                return
            gemma.device.wait(scheduler.advance())
            for request in list(running):
                request.pieces.clear()  # they are in its text, too
                if not request.ended:
                    continue
                line = running.pop(request)
                if isinstance(request.error, DeviceError):
                    raise request.error
                yield _failure(gemma, line, request.error) if request.error else _success(gemma, line, request)
    finally:
        for request in running:
            scheduler.remove(request)


def _success(gemma: Gemma, line: Line, request: Request) -> Result:
    return {
        "id": line.id(gemma),
        "custom_id": line.custom_id,
        "text": request.answer,
        **({"thought": request.thought} if line.shows_thoughts else {}),
        "seed": request.seed,
        "prompt_tokens": request.stats.prompt_tokens,
        "new_tokens": request.stats.new_tokens,
        "finish_reason": request.stats.finish_reason,
    }


def _failure(gemma: Gemma, line: Line, error: Exception) -> Result:
    message = str(error) if isinstance(error, GemmaError) else f"{type(error).__name__}: {error}"
    return {"id": line.id(gemma), "custom_id": line.custom_id, "error": message}


def _encoded(result: Result) -> bytes:
    """Return a result as a line. Half a character, which UTF-8 cannot write, is written as JSON does it."""
    return (json.dumps(result, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class Results(ABC):
    """The place for the results. It is a context manager. `failed` counts the lines that have an error."""

    def __init__(self) -> None:
        self.failed = 0

    @abstractmethod
    def missing(self, gemma: Gemma, lines: Sequence[Line]) -> list[Line]:
        """Return the lines whose results are not there. Raises RequestError if other things are there."""

    @abstractmethod
    def append(self, result: Result) -> None:
        """Write a result. Raises RequestError if that fails."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Let go of the place."""


class PrintedResults(Results):
    """The standard output, on which there is no result before."""

    def __exit__(self, *_: object) -> None:
        """Do nothing: the standard output stays open."""

    def missing(self, gemma: Gemma, lines: Sequence[Line]) -> list[Line]:
        """Return all lines."""
        return list(lines)

    def append(self, result: Result) -> None:
        """Print a result. Raises OSError if the standard output cannot be written."""
        self.failed += "error" in result
        click.echo(_encoded(result), nl=False)


class ResultFile(Results):
    """The file with the results. Inside of `with`, no other process can write it.

    Raises RequestError if it cannot be written, and if another process writes it. It is not changed before it is
    known that all of it was written by an earlier run for the same lines.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lines: dict[str, int] = {}  # the ids of the results that are there, and their lines
        self._torn = 0, b""  # the number of a line that was not written to its end, and what there is of it

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
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._torn = number, line
                return
            try:
                result = json.loads(line)
                self._lines[result["id"]] = number
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._foreign(number) from None
            self.failed += "error" in result

    def missing(self, gemma: Gemma, lines: Sequence[Line]) -> list[Line]:
        """Return the lines whose results are not there, and remove a result that was not written to its end.

        Raises RequestError for a file with anything else than results of these lines.
        """
        by_id = {line.id(gemma): line for line in lines}
        for id_, number in self._lines.items():
            if id_ not in by_id:
                raise RequestError(
                    f"{self._path}: line {number} is of another input, model, or options than this run's; "
                    "name another output file, or delete this one"
                )
        number, torn = self._torn
        if torn:
            beginnings = (_encoded({"id": id_, "custom_id": line.custom_id})[:-2] for id_, line in by_id.items())
            if not any(torn.startswith(each) or each.startswith(torn) for each in beginnings):
                raise self._foreign(number)
            with self._writing():
                self._file.truncate(self._file.seek(0, os.SEEK_END) - len(torn))
        return [line for id_, line in by_id.items() if id_ not in self._lines]

    def append(self, result: Result) -> None:
        """Write a result, so that it is on the disk. Raises RequestError if that fails."""
        self.failed += "error" in result
        with self._writing():
            self._file.write(_encoded(result))
            sync(self._file)

    def _foreign(self, number: int) -> RequestError:
        return RequestError(f"{self._path}: line {number} is no result; name another output file")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self._path}: cannot be written: {reason(error)}; the results in it are kept, and the same command "
                "goes on from there"
            ) from error


def open_results(name: str) -> Results:
    """Return the place for results: the file `name`, or the standard output if it is "-"."""
    return PrintedResults() if name == STANDARD else ResultFile(Path(name))
