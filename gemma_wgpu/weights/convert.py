"""Writing model folders: any checkpoint, quantised on the way or as it is, in bounded memory."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.ops.layout import Layout, Packed
from gemma_wgpu.weights.checkpoint import EMBEDDING, Checkpoint, matrix_shapes
from gemma_wgpu.weights.folder import file_sha256
from gemma_wgpu.weights.manifest import CONFIG, MANIFEST, VOCABULARY, Entry, File, Manifest, Shard, plan, upload_order
from gemma_wgpu.weights.quantize import quantize

Quant = Literal["int4", "int4-offset", "int8", "f16", "keep"]
Progress = Callable[[int, int], None]

SHARD_SIZE = 95_000_000  # bytes; static hosts take files of up to 100 MB

_LAYOUTS = {"int4": Layout.INT4, "int4-offset": Layout.INT4_OFFSET, "int8": Layout.INT8, "f16": Layout.F16}
_FLOATS = (Layout.F32, Layout.F16, Layout.BF16)
_CHUNK = 1 << 22  # weights at a time
_RECORD = "progress.json"
_REVISION = 1  # to be raised when the same source and options give other bytes


def default_quant(source: Checkpoint) -> Quant:
    """What `convert` does unless told: "keep" for a source whose matrices are quantised, "int4" for floats."""
    return "int4" if source.tensor("model.layers.0.mlp.up_proj.weight").layout in _FLOATS else "keep"


def convert(
    source: Checkpoint,
    out: Path,
    *,
    quant: Quant | None = None,
    embedding: Literal["int8", "int4"] | None = None,
    shard_size: int = SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `source` as the model folder `out`.

    `quant` is for the matrices, `default_quant(source)` where None: int4 (4.5 bits a weight), int4-offset (5),
    int8 (8.5), f16, or keep, which leaves every matrix in the layout that it has. `embedding` is for the
    embedding, which is the head too and the most sensitive: int8 where None, or as `quant` for f16 and keep.
    Matrices that are in the wanted layout already are not touched. No shard is above `shard_size` bytes.
    `progress` is called with bytes done and bytes in all.

    The folder is made under the name OUT.partial and renamed when it is whole. A run that was interrupted is
    taken up where it stopped, given the same source and options, and ends with the same bytes. An existing
    model folder is replaced only with `force`.

    Raises RequestError for an option that cannot be, or when `out` exists; ModelError naming what in the source
    cannot be read or quantised, or why `out` cannot be written: finished shards are then kept for the next run.
    """
    out = out.expanduser().resolve()
    quant = quant or default_quant(source)
    if quant not in get_args(Quant) or embedding not in (None, "int8", "int4"):
        raise RequestError(f"no such quantisation: {quant!r} with the embedding as {embedding!r}")
    if shard_size < 1:
        raise RequestError(f"shards of {shard_size} bytes cannot be")
    _check_out(out, force)
    layouts = {name: source.tensor(name).layout for name in matrix_shapes(source.config)}
    if quant != "keep":
        layouts = dict.fromkeys(layouts, _LAYOUTS[quant])
    if embedding or quant in ("int4", "int4-offset"):
        layouts[EMBEDDING] = _LAYOUTS[embedding or "int8"]
    shards, tensors = plan(
        (Entry(name, layouts.get(name, Layout.F32), *shape) for name, shape in upload_order(source.config).items()),
        shard_size,
    )
    config = json.dumps(source.config.to_hf(), indent=1).encode() + b"\n"
    vocabulary = source.vocabulary().to_bytes()
    partial = out.with_name(f"{out.name}.partial")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = _write_shards(source, shards, partial, pool, progress)
    manifest = Manifest(
        name=source.name,
        quantization=source.quantization if quant == "keep" else quant,
        config=_write(partial / CONFIG, config),
        vocabulary=_write(partial / VOCABULARY, vocabulary),
        shards=tuple(written),
        tensors=tuple(tensors),
    )
    _write(partial / MANIFEST, manifest.to_json())
    _publish(partial, out)


def _check_out(out: Path, force: bool) -> None:
    replaced = _replaced(out)
    if replaced.is_dir():  # by a run that was killed at the very end
        if out.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(out)
    if not out.exists():
        return
    if not force:
        raise RequestError(f"{out}: exists already; choose another name, or force its replacement")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise RequestError(f"{out}: exists and is not a model folder, so it is not replaced; choose another name")


def _replaced(out: Path) -> Path:
    return out.with_name(f"{out.name}.replaced-by-convert")


def _publish(partial: Path, out: Path) -> None:
    replaced = _replaced(out)
    with _writing(out):
        (partial / _RECORD).unlink()
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        if replaced.exists():
            shutil.rmtree(replaced)


def _write_shards(
    source: Checkpoint, shards: list[Shard], partial: Path, pool: Executor, progress: Progress | None
) -> list[File]:
    """Write those shards that an interrupted run of the same conversion has not left."""
    record = _Record(partial, _fingerprint(source, shards))
    meter = _Meter(sum(shard.nbytes for shard in shards), progress)
    files = []
    for shard in shards:
        file = record.finished(shard)
        if file:
            meter.add(shard.nbytes)
        else:
            file = _write_shard(source, shard, partial / shard.name, pool, meter)
            record.add(file)
        files.append(file)
    return files


class _Meter:
    """Counts the bytes that are done, and reports them to `progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._total)


def _fingerprint(source: Checkpoint, shards: list[Shard]) -> str:
    """What the bytes of the shards depend on: the source's files, as far as names, sizes and dates tell; the
    layouts and their places; and how this version quantises.
    """
    files = [(path.name, stat.st_size, stat.st_mtime_ns) for path in source.files for stat in [path.stat()]]
    return hashlib.sha256(repr((_REVISION, str(source.path.resolve()), files, shards)).encode()).hexdigest()


class _Record:
    """Which shards in the folder `partial` are finished, for the conversion with this `fingerprint`."""

    def __init__(self, partial: Path, fingerprint: str) -> None:
        self._partial = partial
        self._fingerprint = fingerprint
        self._hashes: dict[str, str] = {}
        try:
            content = json.loads((partial / _RECORD).read_bytes())
            if content["fingerprint"] == fingerprint:
                self._hashes = dict(content["shards"])
                return
        except FileNotFoundError:
            self._check_leftovers()
        except (OSError, ValueError, LookupError, TypeError):
            pass  # not one that can be gone on from
        with _writing(partial):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            self._save()

    def finished(self, shard: Shard) -> File | None:
        """The shard's file if it is there, whole and undamaged."""
        path = self._partial / shard.name
        expected = self._hashes.get(shard.name)
        if expected is None or not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        return File(shard.name, shard.nbytes, expected) if file_sha256(path) == expected else None

    def add(self, file: File) -> None:
        """Note that a shard is finished."""
        self._hashes[file.name] = file.sha256
        with _writing(self._partial):
            self._save()

    def _save(self) -> None:
        temporary = self._partial / f"{_RECORD}.new"
        _write(temporary, json.dumps({"fingerprint": self._fingerprint, "shards": self._hashes}).encode())
        temporary.replace(self._partial / _RECORD)

    def _check_leftovers(self) -> None:
        """Without a record, the folder is removed only if it is one of ours: killed as it began, or ended."""
        ours = (CONFIG, VOCABULARY, MANIFEST, f"{_RECORD}.new")
        if self._partial.exists():
            if not self._partial.is_dir():
                raise RequestError(f"{self._partial}: is in the way; move it or choose another name")
            for path in self._partial.iterdir():
                if path.name not in ours and not path.match("weights-*-of-*.safetensors"):
                    raise RequestError(f"{path}: is not of an interrupted conversion; move it or choose another name")


def _write_shard(source: Checkpoint, shard: Shard, path: Path, pool: Executor, meter: _Meter) -> File:
    digest = hashlib.sha256()
    with _writing(path), path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)
            meter.add(len(data))

        put(shard.header)
        for tensor, part in shard.parts:
            scales = []
            for packed in _packed(source, tensor, part.start, part.stop, pool):
                put(_bytes(packed.quants))
                scales.append(packed.scales)
            for words in scales:
                put(_bytes(words))
        _flush(file)
    if path.stat().st_size != shard.nbytes:
        raise ModelError(f"{path}: not written in full; run the conversion again")
    return File(path.name, shard.nbytes, digest.hexdigest())


def _packed(source: Checkpoint, tensor: Entry, start: int, stop: int, pool: Executor) -> Iterator[Packed]:
    """Rows [start, stop) of a tensor in its layout, some at a time, split at even rows."""
    if tensor.name not in matrix_shapes(source.config):
        norm = source.norm(tensor.name)
        yield Packed(Layout.F32, 1, tensor.cols, norm.view(np.uint32), np.empty(0, np.uint32))
        return
    matrix = source.tensor(tensor.name)
    rows = max(2, _CHUNK // tensor.cols // 2 * 2)
    for first in range(start, stop, rows):
        packed = matrix.pack(first, min(first + rows, stop))
        if matrix.layout != tensor.layout:
            try:
                packed = quantize(packed.dequantize(), tensor.layout, pool)
            except ModelError as error:
                raise ModelError(f"{source.path}: tensor {tensor.name!r}: {error}") from error
        yield packed
        source.release()


def _bytes(words: NDArray[np.uint32]) -> memoryview:
    return words.astype("<u4", copy=False).view(np.uint8).data


def _write(path: Path, data: bytes) -> File:
    with _writing(path), path.open("wb") as file:
        file.write(data)
        _flush(file)
    return File(path.name, len(data), hashlib.sha256(data).hexdigest())


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())  # a record of finished shards must not outlive them in a power cut


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"{path}: the disk is full; make room and run the same conversion again, it goes on where it stopped"
            ) from error
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
