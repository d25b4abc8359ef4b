"""Writing any checkpoint as a model folder, quantised on the way or as it is, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.files import is_full, reason, replacing, sha256, sync
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.manifest import CONFIG, MANIFEST, VOCABULARY, Entry, File, Manifest, Shard, plan
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.quantize import quantize

Quant = Literal["int4", "int4-offset", "int8", "f16", "keep"]
TowerQuant = Literal["int8", "f16"]

SHARD_SIZE = 95_000_000  # bytes; static hosts take files of up to 100 MB

_LAYOUTS = {"int4": Layout.INT4, "int4-offset": Layout.INT4_OFFSET, "int8": Layout.INT8, "f16": Layout.F16}
_FLOATS = (Layout.F32, Layout.F16, Layout.BF16)
_CHUNK = 1 << 22  # weights at a time
_RECORD = "progress.json"
_TEMPORARY = f".{_RECORD}.*"  # a run that is killed while it writes its record leaves one
_UNFINISHED = (_RECORD, _TEMPORARY, CONFIG, VOCABULARY, MANIFEST, "weights-*-of-*.safetensors")
_REVISION = 1  # to be raised when the same model and options give other bytes


def default_quant(model: Checkpoint) -> Quant:
    """Return what `convert` does unless told: "keep" if the language model is quantised, "int4" for floats."""
    floats = all(matrix.layout in _FLOATS for matrix in model.matrices(Kind.MATRIX))
    return "int4" if floats else "keep"


def convert(
    model: Checkpoint,
    out: Path,
    *,
    quant: Quant | None = None,
    embedding: Literal["int8", "int4"] | None = None,
    tower: TowerQuant | None = None,
    shard_size: int = SHARD_SIZE,
    force: bool = False,
    progress: OnProgress | None = None,
) -> None:
    """Write `model` as the model folder `out`.

    `quant` is for the matrices, and `default_quant(model)` if it is None: int4 (4.5 bits a weight), int4-offset (5),
    int8 (8.5), f16, or keep, which leaves every matrix in the layout that it has. `embedding` is for the embedding,
    which is the head too and the most sensitive: if it is None, it is int8, or as `quant` for f16 and keep.

    `tower` is for the layers of the tower that reads images: if it is None, they are int8, or as `quant` for f16 and
    keep. The tower's patches and its projection are small; they are f16, or as they are if `quant` is keep.

    Matrices that are in the wanted layout already are not touched. No shard is above `shard_size` bytes, and none has
    weights of the language model and of the tower.

    The folder is made under the name OUT.partial and renamed when it is whole. A run that was interrupted is taken up
    where it stopped, given the same model and options, and ends with the same bytes. With `force`, a model folder is
    replaced if nothing else is in it.

    Raises RequestError for an option that cannot be, or if `out` exists and is not replaced; ModelError, which names
    what in the model cannot be read or quantised, or why `out` cannot be written: finished shards are then kept for
    the next run.
    """
    out = out.expanduser().resolve()
    quant = quant or default_quant(model)
    if quant not in get_args(Quant) or embedding not in (None, "int8", "int4"):
        raise RequestError(f"there is no such quantisation: {quant!r} with the embedding as {embedding!r}")
    if tower not in (None, *get_args(TowerQuant)):
        raise RequestError(f"there is no such quantisation of a tower: {tower!r}; choose int8 or f16")
    first_of_tower = next((spec.name for spec in model.table.values() if spec.tower), None)
    if tower and first_of_tower is None:
        raise RequestError(f"{model.path}: the model has no tower, so tower={tower!r} cannot be; leave it out")
    if shard_size < 1:
        raise RequestError(f"shards of {shard_size} bytes cannot be")
    _check_out(out, force)
    entries = [
        Entry(spec.name, _layout(model, spec, quant, embedding, tower), *spec.stored_shape)
        for spec in model.table.values()
    ]
    shards, tensors = plan(entries, shard_size, apart=first_of_tower)
    config = json.dumps(model.config.to_hf(), indent=1).encode() + b"\n"
    vocabulary = model.vocabulary().to_bytes()
    partial = out.with_name(f"{out.name}.partial")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = _write_shards(model, shards, partial, pool, progress)
    manifest = Manifest(
        name=model.name,
        quantization=model.quantization if quant == "keep" else quant,
        config=_write(partial / CONFIG, config),
        vocabulary=_write(partial / VOCABULARY, vocabulary),
        shards=tuple(written),
        tensors=tuple(tensors),
    )
    _write(partial / MANIFEST, manifest.to_json())
    _check_out(out, force)  # somebody may have made or changed it meanwhile
    _publish(partial, out)


def _layout(
    model: Checkpoint, spec: TensorSpec, quant: Quant, embedding: str | None, tower: TowerQuant | None
) -> Layout:
    """Return the layout that a tensor gets."""
    if not spec.kind.is_matrix:
        return Layout.F32
    chosen: str = quant
    if spec.kind == Kind.EMBEDDING:
        chosen = embedding or ("int8" if quant in ("int4", "int4-offset") else quant)
    elif spec.kind == Kind.CONVOLUTION or spec.transposed:
        chosen = "keep" if quant == "keep" else "f16"
    elif spec.tower:
        chosen = tower or (quant if quant in ("f16", "keep") else "int8")
    return model.tensor(spec.name).layout if chosen == "keep" else _LAYOUTS[chosen]


def _check_out(out: Path, force: bool) -> None:
    """Raise RequestError if `out` exists and may not be replaced."""
    replaced = _replaced(out)
    with _writing(out):
        if replaced.is_dir():  # a run was killed at the very end
            if out.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(out)
        if not out.exists():
            return
        if not force:
            raise RequestError(f"{out}: exists already; choose another name, or force its replacement")
        if problem := _foreign(out):
            raise RequestError(f"{out}: {problem}, so it is not replaced; choose another name")


def _foreign(out: Path) -> str | None:
    """Say what a path has or is beside a model folder of ours; None if it is just that, or an empty folder."""
    if not out.is_dir():
        return "exists and is not a model folder"
    there = {path.name for path in out.iterdir()}
    if not there:
        return None
    if MANIFEST not in there:
        return "exists and is not a model folder"
    try:
        manifest = Manifest.from_json((out / MANIFEST).read_bytes(), MANIFEST)
    except (OSError, ModelError):
        return f"exists, and its {MANIFEST} is damaged or not that of a model folder which this version can read"
    others = sorted(there - {MANIFEST, *(file.name for file in manifest.files)})
    return f"exists and has {others[0]} in it, which is not of the model" if others else None


def _replaced(out: Path) -> Path:
    return out.with_name(f"{out.name}.replaced-by-convert")


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name, and remove the folder that had it."""
    replaced = _replaced(out)
    with _writing(out):
        for path in (*partial.glob(_TEMPORARY), partial / _RECORD):
            path.unlink()
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        if replaced.exists():
            shutil.rmtree(replaced)


def _write_shards(
    model: Checkpoint, shards: list[Shard], partial: Path, pool: Executor, progress: OnProgress | None
) -> list[File]:
    """Write the shards, but not those that an interrupted run of the same conversion has left."""
    record = _Record(partial, _fingerprint(model, shards))
    meter = _Meter(sum(shard.nbytes for shard in shards), progress)
    files = []
    for shard in shards:
        file = record.finished(shard)
        if file:
            meter.add(shard.nbytes)
        else:
            file = _write_shard(model, shard, partial / shard.name, pool, meter)
            record.add(file)
        files.append(file)
    return files


class _Meter:
    """Counts the bytes that are done, and tells `progress`."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self._done += nbytes
        if self._progress:
            self._progress(Progress("converting", self._done, self._total))


def _fingerprint(model: Checkpoint, shards: list[Shard]) -> str:
    """Return a hash of what the bytes of the shards depend on.

    That is the model's files, as far as names, sizes and dates tell, what is taken of them, the layouts and their
    places, and how this version quantises.
    """
    files = [(path.name, stat.st_size, stat.st_mtime_ns) for path in model.files for stat in [path.stat()]]
    return hashlib.sha256(
        repr((_REVISION, str(model.path.resolve()), model.name, files, shards)).encode()
    ).hexdigest()


class _Record:
    """Remembers which shards in the folder `partial` are finished, for the conversion with this `fingerprint`."""

    def __init__(self, partial: Path, fingerprint: str) -> None:
        self._partial = partial
        self._fingerprint = fingerprint
        self._hashes: dict[str, str] = {}
        try:
            content = json.loads((partial / _RECORD).read_bytes())
            if content["fingerprint"] == fingerprint:
                self._hashes = dict(content["shards"])
                return
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass  # there is no record, or it is damaged
        with _writing(partial):
            if partial.exists():
                self._check_leftovers()
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            self._save()

    def finished(self, shard: Shard) -> File | None:
        """Return the shard's file if it is there, whole and undamaged."""
        path = self._partial / shard.name
        expected = self._hashes.get(shard.name)
        if expected is None or not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        return File(shard.name, shard.nbytes, expected) if sha256(path) == expected else None

    def add(self, file: File) -> None:
        """Note that a shard is finished."""
        self._hashes[file.name] = file.sha256
        with _writing(self._partial):
            self._save()

    def _save(self) -> None:
        with replacing(self._partial / _RECORD) as file:
            file.write(json.dumps({"fingerprint": self._fingerprint, "shards": self._hashes}).encode())

    def _check_leftovers(self) -> None:
        """Raise RequestError unless all that there is comes from a conversion."""
        if not self._partial.is_dir():
            raise RequestError(f"{self._partial}: is in the way; move it or choose another name")
        for path in self._partial.iterdir():
            if not any(path.match(pattern) for pattern in _UNFINISHED):
                raise RequestError(f"{path}: is not of an interrupted conversion; move it or choose another name")


def _write_shard(model: Checkpoint, shard: Shard, path: Path, pool: Executor, meter: _Meter) -> File:
    """Write a shard and wait until it is on the disk, so that a record of it never outlives it."""
    digest = hashlib.sha256()
    with _writing(path), path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)
            meter.add(len(data))

        put(shard.header)
        for tensor, part in shard.parts:
            if not model.table[tensor.name].kind.is_matrix:
                values = model.values(tensor.name).reshape(tensor.rows, tensor.cols)
                put(_bytes(values[part.start : part.stop].reshape(-1)))
                continue
            scales = []
            for packed in _packed(model, tensor, part.start, part.stop, pool):
                put(_bytes(packed.quants))
                scales.append(packed.scales)
            for words in scales:
                put(_bytes(words))
        sync(file)
    if path.stat().st_size != shard.nbytes:
        raise ModelError(f"{path}: it was not written in full; run the conversion again")
    return File(path.name, shard.nbytes, digest.hexdigest())


def _packed(model: Checkpoint, tensor: Entry, start: int, stop: int, pool: Executor) -> Iterator[Packed]:
    """Yield rows [start, stop) of a matrix in the layout of `tensor`, some at a time, split at even rows."""
    matrix = model.tensor(tensor.name)
    rows = max(2, _CHUNK // tensor.cols // 2 * 2)
    for first in range(start, stop, rows):
        packed = matrix.pack(first, min(first + rows, stop))
        if matrix.layout != tensor.layout:
            try:
                packed = quantize(packed.dequantize(), tensor.layout, pool)
            except ModelError as error:
                raise ModelError(f"{model.path}: tensor {tensor.name!r}: {error}") from error
        yield packed
        model.release()


def _bytes(words: NDArray[np.uint32] | NDArray[np.float32]) -> memoryview:
    """Return the bytes of 32-bit words, the lowest first."""
    return words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _write(path: Path, data: bytes) -> File:
    """Write a small file and wait until it is on the disk."""
    with _writing(path), path.open("wb") as file:
        file.write(data)
        sync(file)
    return File(path.name, len(data), hashlib.sha256(data).hexdigest())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make a ModelError, which names `path`, of an OSError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ModelError(
                f"{path}: the disk is full; make room and run the same conversion again, it goes on where it stopped"
            ) from error
        raise ModelError(f"{path}: cannot be written: {reason(error)}") from error
