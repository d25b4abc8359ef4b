"""Reading GGUF version 3: a header with typed metadata and the tensors' descriptions, and then the tensors' data.

The format is described in ggml's docs/gguf.md. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from gemma_wgpu.errors import ModelError
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.stored import MappedFile, StoredTensor

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32  # bytes, unless the metadata say otherwise

# These are far above any real file, and low enough that a damaged count is refused before it is believed.
_MOST_ENTRIES = 1 << 16
_MOST_ITEMS = 1 << 22
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 10
_LONGEST_TEXT = 1 << 20

# These are the types of metadata values.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT = 8
_ARRAY = 9

# These ggml tensor types can be read, and files in circulation have the others too.
_ENCODINGS = {
    0: encodings.F32,
    1: encodings.F16,
    2: encodings.Q4_0,
    3: encodings.Q4_1,
    6: encodings.Q5_0,
    8: encodings.Q8_0,
    12: encodings.Q4_K,
    14: encodings.Q6_K,
    30: encodings.BF16,
}
_UNREADABLE = {
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class GGUFHeader:
    """Reads a file in order, up to its tensors' data: `metadata` at once, and then `tensors()`, one time.

    Raises ModelError, which names the file, if it is not a GGUF file or its header is damaged.
    """

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._at = 0
        head = file.map[:256]
        if head[:4] != _MAGIC:
            raise ModelError(f"{file.path}: this is not a GGUF file: {_likeness(head)}")
        self._at = len(_MAGIC)
        version = self._scalar("I")
        if version != _VERSION:
            swapped = 0 < int.from_bytes(head[4:8], "big") <= _VERSION
            what = "big-endian" if swapped else f"version {version}"
            raise self._error(f"GGUF is {what}; only little-endian version {_VERSION} can be read, convert it again")
        self._tensors = self._count("Q", "tensors", _MOST_ENTRIES)
        entries = self._count("Q", "metadata entries", _MOST_ENTRIES)
        self.metadata: dict[str, object] = {}
        for _ in range(entries):
            key = self._name()
            if key in self.metadata:
                raise self._error(f"metadata key {key!r} appears twice; the file is damaged")
            self.metadata[key] = self._value(key)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors by their GGUF names. Raises ModelError, which names a tensor that cannot be read."""
        described = [self._description() for _ in range(self._tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error("general.alignment is not a positive integer; the file is damaged")
        start = _aligned(self._at, alignment)
        expected = 0
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                raise self._error(f"tensor {name!r} appears twice; the file is damaged")
            encoding = _ENCODINGS.get(kind)
            if encoding is None:
                what = _UNREADABLE.get(kind, f"of unknown type {kind}")
                known = ", ".join(known.name for known in _ENCODINGS.values())
                raise self._error(f"tensor {name!r} is {what}; use a GGUF with {known} only")
            tensor = StoredTensor(name, shape, encoding, self._file, start + offset)
            if offset != expected:  # the format leaves no gaps, so this finds most of the damage to types and shapes
                raise tensor.error(f"is at offset {offset} where {expected} is due; the file is damaged")
            expected = _aligned(offset + tensor.nbytes, alignment)
            tensors[name] = tensor
        return tensors

    def _description(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, the shape, the ggml type and the offset of the next tensor."""
        name = self._name()
        dimensions = self._count("I", f"dimensions of tensor {name!r}", _MOST_DIMENSIONS)
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]  # the innermost is first
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, key: str) -> object:
        kind = self._scalar("I")
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._error(f"metadata key {key!r} is of unknown type {kind}; the file is damaged")
        kind = self._scalar("I")
        count = self._count("Q", f"items of metadata key {key!r}", _MOST_ITEMS)
        if kind == _TEXT:
            return self._texts(count)
        if kind not in _SCALARS:
            raise self._error(f"metadata key {key!r} is a list of type {kind}, which cannot be read")
        item = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * item.itemsize), item)

    def _name(self) -> str:
        return self._decoded(self._take(self._count("Q", "bytes of a name", _LONGEST_NAME)))

    def _text(self) -> str:
        return self._decoded(self._take(self._count("Q", "bytes of text", _LONGEST_TEXT)))

    def _texts(self, count: int) -> list[str]:
        # This does what _text does, but quickly, since a vocabulary has 262144 of them.
        buffer, at, size = self._file.map, self._at, self._file.size
        length_at = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            start = at + 8
            if start > size:
                raise self._cut_short()
            length = length_at(buffer, at)[0]
            at = start + length
            if length > _LONGEST_TEXT:
                raise self._implausible(length, "bytes of text", _LONGEST_TEXT)
            if at > size:
                raise self._cut_short()
            texts.append(buffer[start:at])
        self._at = at
        return [self._decoded(text) for text in texts]

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._error(f"{text[:40]!r} in the header is not UTF-8; the file is damaged") from None

    def _count(self, code: str, what: str, most: int) -> int:
        count: int = self._scalar(code)
        if count > most:
            raise self._implausible(count, what, most)
        return count

    def _scalar(self, code: str) -> Any:
        form = struct.Struct(f"<{code}")
        return form.unpack(self._take(form.size))[0]

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > self._file.size:
            raise self._cut_short()
        taken = self._file.map[self._at : end]
        self._at = end
        return taken

    def _implausible(self, count: int, what: str, most: int) -> ModelError:
        return self._error(f"claims {count} {what}, at most {most} is plausible; the file is damaged")

    def _cut_short(self) -> ModelError:
        return self._error(f"ends inside its header, after {self._file.size} bytes; download it again")

    def _error(self, problem: str) -> ModelError:
        return ModelError(f"{self._file.path}: {problem}")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _likeness(head: bytes) -> str:
    """Say what a file that begins with `head` seems to be instead, and what to do about it."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "it looks like a web page; the download went wrong, repeat it"
    if head.startswith((b"PK", b"\x80\x02")):
        return "it looks like a PyTorch file; use the model's safetensors folder or a GGUF"
    if head[8:9] == b"{":
        return "it looks like safetensors; give the folder that it is in"
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg"):
        return "it is a GGML file from before GGUF; convert the original again"
    return f"it begins with {head[:8]!r}"
