"""Model folders: what manifest.json says, and how tensors are laid out over the shards.

The folder has config.json, the vocabulary and shards. A shard is a valid safetensors file whose data are the words
that the GPU reads, all tensors one after the other in the order in which they are uploaded. The manifest says where
each tensor lies, in bytes from the start of the file, so a reader needs no more than ranges of bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.ops.layout import Layout

MANIFEST = "manifest.json"
CONFIG = "config.json"
VOCABULARY = "vocabulary.bin"

_FORMAT = 1
_NAME = re.compile(r"\w[\w.-]*")  # so a manifest cannot name a file outside of the folder
_SHA256 = re.compile("[0-9a-f]{64}")
_ALIGNMENT = 64


@dataclass(frozen=True)
class File:
    """A file of the folder, with its size in bytes and its SHA-256 in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ShardPart:
    """Rows [start, stop) of a matrix, in shard number `shard`: `quants` and then `scales`, each (offset, bytes).

    Offsets are in bytes from the start of the shard. `start` is even.
    """

    shard: int
    start: int
    stop: int
    quants: tuple[int, int]
    scales: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """A matrix in `layout`, or a vector, which is one row of F32.

    `name` is Hugging Face's; `parts` join into all rows.
    """

    name: str
    layout: Layout
    rows: int
    cols: int
    parts: tuple[ShardPart, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of quants and scales."""
        return sum(self.part_bytes(0, self.rows))

    def part_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes of the quants and of the scales of rows [start, stop)."""
        rows = stop - start
        if self.layout == Layout.F32:  # that of vectors, which need not have whole blocks
            return 4 * rows * self.cols, 0
        return 4 * self.layout.quant_words(rows, self.cols), 4 * self.layout.scale_words(rows, self.cols)

    def runs(self, start: int, stop: int) -> Iterator[ShardPart]:
        """Yield rows [start, stop) as parts, each of which lies in one shard. `start` is even."""
        for part in self.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                before, sizes = self.part_bytes(part.start, first), self.part_bytes(first, last)
                quants, scales = part.quants[0] + before[0], part.scales[0] + before[1]
                yield ShardPart(part.shard, first, last, (quants, sizes[0]), (scales, sizes[1]))


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `tensors` are in the order of their upload, which is that in the shards too."""

    name: str
    quantization: str
    config: File
    vocabulary: File
    shards: tuple[File, ...]
    tensors: tuple[Entry, ...]

    def to_json(self) -> bytes:
        """Return the bytes of the file, which are the same for the same content."""
        content = {"format": _FORMAT, **asdict(self)}
        for tensor in content["tensors"]:
            tensor["layout"] = tensor["layout"].name
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"

    @property
    def files(self) -> tuple[File, ...]:
        """Return all files of the folder but the manifest."""
        return self.config, self.vocabulary, *self.shards

    def shards_of(self, names: Container[str]) -> list[int]:
        """Return the numbers of the shards that have the tensors of these names, in their order."""
        return sorted({part.shard for tensor in self.tensors if tensor.name in names for part in tensor.parts})

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Self:
        """Read what `to_json` wrote.

        Raises ModelError, which names `source`, if it is of a newer format, is damaged, or contradicts itself:
        tensors must follow each other without gaps and fill their shards.
        """
        try:
            content = json.loads(data)
            version = _whole(content["format"])
            manifest = cls._read(content) if version <= _FORMAT else None
        except (ModelError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{source}: the manifest is damaged ({error!r}); download it again") from error
        if manifest is None:
            raise ModelError(
                f"{source}: the model folder has format {version}, and this gemma-wgpu reads {_FORMAT}; upgrade it"
            )
        return manifest

    @classmethod
    def from_web(cls, data: bytes, address: str) -> Self:
        """Do what `from_json` does, with a better message if the server sent something else than a manifest."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ModelError(
                f"{address}: this is not the manifest of a model folder; give the address of a folder that has one"
            )
        return cls.from_json(data, address)

    @classmethod
    def _read(cls, content: Any) -> Self:
        manifest = cls(
            name=_text(content["name"]),
            quantization=_text(content["quantization"]),
            config=_file(content["config"]),
            vocabulary=_file(content["vocabulary"]),
            shards=tuple(map(_file, content["shards"])),
            tensors=tuple(map(_entry, content["tensors"])),
        )
        manifest._check_places()
        return manifest

    def _check_places(self) -> None:
        """Raise ValueError unless the tensors follow each other without gaps."""
        shard, end = -1, 0
        for tensor in self.tensors:
            row = 0
            for part in tensor.parts:
                if part.shard != shard:
                    if part.shard != shard + 1 or (shard >= 0 and end != self.shards[shard].nbytes):
                        raise ValueError(f"{tensor.name} is not where the tensor before it ends")
                    shard, end = part.shard, part.quants[0]
                sizes = tensor.part_bytes(part.start, part.stop)
                if part.quants != (end, sizes[0]) or part.scales != (end + sizes[0], sizes[1]):
                    raise ValueError(f"{tensor.name} is not where the tensor before it ends")
                if part.start != row or row % 2 or part.stop <= row:
                    raise ValueError(f"{tensor.name} lacks rows")
                row, end = part.stop, end + sum(sizes)
            if row != tensor.rows:
                raise ValueError(f"{tensor.name} lacks rows")
        if shard != len(self.shards) - 1 or end != self.shards[shard].nbytes:
            raise ValueError("there are bytes that belong to no tensor")


@dataclass(frozen=True)
class Shard:
    """A shard that is to be written: its header, and then the rows of `parts`, (tensor, rows), in their order."""

    name: str
    header: bytes
    parts: tuple[tuple[Entry, ShardPart], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole file."""
        _, last = self.parts[-1]
        return sum(last.scales)


_Rows = tuple[Entry, int, int]  # a tensor, and its rows from start to stop


def plan(tensors: Iterable[Entry], shard_size: int, *, apart: str | None = None) -> tuple[list[Shard], list[Entry]]:
    """Return the shards that `tensors` fill in their order, and the tensors with the parts that they have there.

    No shard is above `shard_size` bytes, and only tensors larger than a shard are split. The tensor `apart` begins a
    shard, so that those before it can be had alone. Raises RequestError if not even two rows fit.
    """
    shards: list[list[_Rows]] = [[]]
    for tensor in tensors:
        start = 0
        if tensor.name == apart and shards[-1]:
            shards.append([])
        while start < tensor.rows:
            stop = tensor.rows
            if shards[-1] and not _fits([*shards[-1], (tensor, start, stop)], shard_size):
                shards.append([])
            if not _fits([(tensor, start, stop)], shard_size):
                stop = start + _rows_that_fit(tensor, start, shard_size)
            shards[-1].append((tensor, start, stop))
            start = stop
    planned: list[Shard] = []
    for number, rows in enumerate(shards):
        header, data = _header(rows)
        parts = []
        for tensor, start, stop in rows:
            quants, scales = tensor.part_bytes(start, stop)
            parts.append((tensor, ShardPart(number, start, stop, (data, quants), (data + quants, scales))))
            data += quants + scales
        planned.append(Shard(f"weights-{number + 1:05}-of-{len(shards):05}.safetensors", header, tuple(parts)))
    return planned, list(_with_parts(planned))


def _fits(rows: Sequence[_Rows], shard_size: int) -> bool:
    return (
        len(_header(rows)[0]) + sum(sum(tensor.part_bytes(start, stop)) for tensor, start, stop in rows) <= shard_size
    )


def _rows_that_fit(tensor: Entry, start: int, shard_size: int) -> int:
    header, _ = _header([(tensor, start, tensor.rows)])
    pairs = (shard_size - len(header)) // sum(tensor.part_bytes(0, 2))
    if pairs < 1:
        raise RequestError(
            f"a shard of {shard_size:,} bytes cannot hold two rows of {tensor.name}; ask for larger shards"
        )
    return 2 * pairs


def _with_parts(shards: Iterable[Shard]) -> Iterator[Entry]:
    parts: dict[Entry, list[ShardPart]] = {}
    for shard in shards:
        for tensor, part in shard.parts:
            parts.setdefault(tensor, []).append(part)
    for tensor, found in parts.items():
        yield Entry(tensor.name, tensor.layout, tensor.rows, tensor.cols, tuple(found))


def _header(rows: Sequence[_Rows]) -> tuple[bytes, int]:
    """Return the header of a safetensors file with these tensors, and its length, where their data begin."""
    entries: dict[str, object] = {}
    offset = 0
    for tensor, start, stop in rows:
        label = tensor.name if (start, stop) == (0, tensor.rows) else f"{tensor.name}.rows.{start}-{stop}"
        quants, scales = tensor.part_bytes(start, stop)
        if scales:
            entries[f"{label}.quants"] = _described("U32", [quants // 4], offset)
            entries[f"{label}.scales"] = _described("U32", [scales // 4], offset + quants)
        else:  # plain floats
            entries[label] = _described(tensor.layout.name, [stop - start, tensor.cols], offset)
        offset += quants + scales
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _described(dtype: str, shape: list[int], offset: int) -> dict[str, object]:
    nbytes = math.prod(shape) * (2 if dtype in ("F16", "BF16") else 4)
    return {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _file(content: Any) -> File:
    file = File(_text(content["name"]), _whole(content["nbytes"]), _text(content["sha256"]))
    if not _NAME.fullmatch(file.name) or not _SHA256.fullmatch(file.sha256):
        raise ValueError(f"{file.name!r} is not the name of a file, or its SHA-256 is none")
    return file


def _span(content: Any) -> tuple[int, int]:
    offset, nbytes = map(_whole, content)
    return offset, nbytes


def _part(content: Any) -> ShardPart:
    shard, start, stop = (_whole(content[key]) for key in ("shard", "start", "stop"))
    return ShardPart(shard, start, stop, _span(content["quants"]), _span(content["scales"]))


def _entry(content: Any) -> Entry:
    rows, cols = _whole(content["rows"]), _whole(content["cols"])
    return Entry(_text(content["name"]), Layout[content["layout"]], rows, cols, tuple(map(_part, content["parts"])))
