"""Weights as files store them, made into words on the GPU: what numpy makes of them on the host, to the bit."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.gpu import device as seam
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.gpu.device import Adapter, Data, Device
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.gpu.shader import load_shader
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.kernels import IMPORTED
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights import encodings, upload
from gemma_wgpu.weights.checkpoint import Tensor
from gemma_wgpu.weights.encodings import DENSE, Encoding
from gemma_wgpu.weights.packed import Packed, unpack_nibbles
from gemma_wgpu.weights.staging import Staging
from gemma_wgpu.weights.stored import MappedFile, StoredCheckpoint, StoredMatrix, StoredTensor
from gemma_wgpu.weights.upload import Upload
from tests import bf16
from tests.checkpoints import blocks
from tests.kernels import import_quantize

Types = GGMLQuantizationType

# Names, shapes and types. With three blocks a row, a tensor of an odd number of rows ends in the middle of a word of
# scales, so that the next one begins a part.
MATRICES = {
    "a": ((200, 96), Types.Q5_0),
    "b": ((3, 96), Types.Q8_0),
    "c": ((130, 96), Types.Q8_0),
    "d": ((131, 96), Types.Q4_0),
    "e": ((1, 96), Types.Q4_1),
    "f": ((67, 768), Types.Q4_K),
    "g": ((129, 768), Types.Q6_K),
    "h": ((70, 96), Types.BF16),
    "i": ((5, 96), Types.F16),
    "j": ((64, 96), Types.F32),
    "k": ((2, 768), Types.Q4_K),
    "padded": ((9, 44), Types.BF16),
    "transposed": ((96, 70), Types.F32),
}
STACKS = (
    ("a", "b", "c"),
    ("d",),
    ("e",),
    ("f", "k"),
    ("g",),
    ("a", "d", "h"),
    ("i",),
    ("j",),
    ("padded",),
    ("transposed",),
)


class Stored(StoredCheckpoint):
    """The matrices in a file, of no family."""

    def __init__(
        self, path: Path, matrices: Mapping[str, tuple[tuple[int, int], NDArray[np.uint8], Encoding]]
    ) -> None:
        path.write_bytes(b"".join(data.tobytes() for _, data, _ in matrices.values()))
        file, at = MappedFile(path), 0
        specs: list[TensorSpec] = []
        stored: dict[str, StoredTensor] = {}
        for name, (shape, data, encoding) in matrices.items():
            specs.append(TensorSpec(name, name, shape, Kind.MATRIX, transposed=name == "transposed"))
            stored[name] = StoredTensor(name, shape, encoding, file, at)
            at += data.nbytes
        family: Any = SimpleNamespace(name="none", tensors=lambda config: specs)
        super().__init__(path, "stored", family, None, [file], stored, plus_one=False)

    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def vocabulary(self) -> Vocabulary:
        raise NotImplementedError


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with closing(open_device_sync()) as device:
        yield device


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Stored]:
    rng = np.random.default_rng(30)
    with Stored(
        tmp_path / "weights",
        {
            name: (shape, blocks(rng, kind, *shape), getattr(encodings, kind.name))
            for name, (shape, kind) in MATRICES.items()
        },
    ) as stored:
        yield stored


def loaded(device: Device, loader: Upload, *names: str) -> list[Packed]:
    """What lies on the GPU after matrices were loaded, and nothing else does. It is freed then."""

    async def read() -> list[Packed]:
        before = device.allocated
        linear = await loader.linear(*names)
        buffers = [buffer for part in linear.parts for buffer in (part.quants, part.scales)]
        assert device.allocated - before == sum(buffer.size for buffer in buffers)
        words = iter([(await device.read(buffer)).view(np.uint32) for buffer in buffers])
        for buffer in buffers:
            buffer.destroy()
        return [
            Packed(
                part.layout,
                part.rows,
                part.cols,
                next(words)[: part.layout.quant_words(part.rows, part.cols)],
                next(words)[: part.layout.scale_words(part.rows, part.cols)],
            )
            for part in linear.parts
        ]

    return device.wait(read())


def same(ours: Sequence[Packed], theirs: Sequence[Packed]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert (our.layout, our.rows, our.cols) == (their.layout, their.rows, their.cols)
        assert np.array_equal(our.quants, their.quants)
        assert np.array_equal(our.scales, their.scales)


def test_everything_that_is_read_can_be_imported() -> None:
    known = [encoding for encoding in vars(encodings).values() if isinstance(encoding, Encoding)]
    assert {encoding.name for encoding in known if not encoding.dense} == set(IMPORTED)
    for encoding in known:
        if encoding.dense:
            assert DENSE[encoding.layout] is encoding
        else:
            nbytes, _ = IMPORTED[encoding.name]
            assert nbytes % 4 == nbytes % encoding.group_bytes == 0


@pytest.mark.parametrize(
    ("transfer", "binding"), [(1 << 24, 1 << 27), (6911, 1 << 27), (1, 1 << 27), (8192, 12288), (1, 12288)]
)
def test_the_gpu_makes_what_the_host_makes(
    transfer: int, binding: int, device: Device, weights: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_TRANSFER", transfer)
    monkeypatch.setattr(device, "limits", replace(device.limits, max_storage_buffer_binding_size=binding))
    told: dict[bool, list[int]] = {True: [], False: []}
    loaders = {repack: Upload(device, weights, told[repack].append, repack=repack) for repack in told}
    for names in STACKS:
        if binding < 4 * Layout.F32.quant_words(64, 96) and names in (("f", "k"), ("g",), ("j",), ("transposed",)):
            continue  # a part has 64 rows at least
        on_gpu, on_host = (loaded(device, loaders[repack], *names) for repack in (True, False))
        same(on_gpu, on_host)
        assert sum(told[True]) == sum(told[False])


def test_who_makes_the_words(device: Device, weights: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks do not pass through numpy unless that is asked for. Plain floats are there to be copied."""
    monkeypatch.delattr(StoredMatrix, "pack")
    for names in (("a", "b", "c"), ("d",), ("e",), ("f",), ("g",)):
        loaded(device, Upload(device, weights, lambda _: None), *names)
    monkeypatch.undo()
    monkeypatch.delattr(StoredMatrix, "raw")
    loaded(device, Upload(device, weights, lambda _: None), "h")
    loaded(device, Upload(device, weights, lambda _: None, repack=False), "a")


class Remote(Tensor):
    """A matrix that is not in Python's memory, and comes as a file stores it, some rows at a time."""

    def __init__(self, tensor: StoredMatrix) -> None:
        self.name, self.shape, self._tensor = tensor.name, tensor.shape, tensor

    @property
    def layout(self) -> Layout:
        return self._tensor.layout

    @property
    def encoding(self) -> Encoding | None:
        return self._tensor.encoding

    async def raw(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data]]:
        for row in range(start, stop, 10):
            async for run in self._tensor.raw(row, min(row + 10, stop)):
                yield run

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        raise AssertionError("there are none")
        yield

    async def stay(self) -> None:
        raise AssertionError("it cannot")

    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        raise AssertionError("it cannot")


@pytest.mark.parametrize("names", [("a", "b", "c"), ("g",), ("h",)])
def test_what_comes_in_runs(
    names: tuple[str, ...], device: Device, weights: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU makes the words even if the host is to make them and cannot."""
    expected = loaded(device, Upload(device, weights, lambda _: None, repack=False), *names)
    monkeypatch.setattr(Stored, "tensor", lambda self, name: Remote(StoredCheckpoint.tensor(self, name)))
    same(loaded(device, Upload(device, weights, lambda _: None, repack=False), *names), expected)


def test_a_run_begins_at_an_even_block(device: Device, weights: Stored) -> None:
    async def start(staging: Staging) -> None:
        linear = await Upload(device, weights, lambda _: None).linear("a")
        staging.fill(linear.parts[0], 3, 1, np.zeros(66, np.uint8), encodings.Q5_0)

    with closing(Staging(device, 1024)) as staging, pytest.raises(ValueError, match="row 3 of 96 weights"):
        device.wait(start(staging))


FLOATS = ("h", "i", "j", "padded", "transposed")


@pytest.mark.parametrize("layout", [Layout.INT8, Layout.INT4])
def test_floats_are_rounded_while_they_load(
    layout: Layout, device: Device, weights: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_TRANSFER", 1)
    told: list[int] = []
    loader = Upload(device, weights, told.append, rounded=dict.fromkeys(FLOATS, layout))
    for names in (("h", "i"), ("j",), ("padded",), ("transposed",)):
        floats = np.concatenate([weights.tensor(name).pack().dequantize() for name in names])
        numbers, scales = import_quantize.rounded(floats.astype(np.float64).reshape(-1, 32), layout)
        rows, cols = floats.shape
        expected = Packed(layout, rows, cols, numbers, scales)
        same(loaded(device, loader, *names), [expected])
        assert sum(told) == expected.nbytes
        told.clear()
    [kept, _] = loaded(device, loader, "d", "h")
    same([kept], [weights.tensor("d").pack()])


def test_rounded_weights_are_counted(device: Device, weights: Stored) -> None:
    ledger = Ledger(Adapter(device.info, device.limits, device.features))
    ledger.wait(Upload(ledger, weights, lambda _: None, empty=True, rounded={"h": Layout.INT4}).linear("h"))
    assert ledger.allocated == Layout.INT4.nbytes(70, 96) + -Layout.INT4.scale_words(70, 96) * 4 % 16


def test_what_cannot_be_rounded(device: Device, tmp_path: Path) -> None:
    values = np.zeros((8, 64), np.float32)
    values[5, 3] = np.inf
    bad = values.view(np.uint8), encodings.F32
    quantised = np.zeros(8 * 68, np.uint8), encodings.Q8_0
    with Stored(tmp_path / "weights", {"bad": ((8, 64), *bad), "quantised": ((8, 64), *quantised)}) as stored:
        loader = Upload(device, stored, lambda _: None, rounded={"bad": Layout.INT8, "quantised": Layout.INT4})
        where = re.escape(str(tmp_path / "weights"))
        problem = "has weights that are not finite, or too large for float16"
        with pytest.raises(ModelError, match=f"^{where}: tensor 'bad' {problem}$"):
            device.wait(loader.linear("bad"))
        with pytest.raises(ModelError, match=f"^{where}: tensor 'quantised' is INT8 and cannot be rounded to INT4; "):
            device.wait(loader.linear("quantised"))


@pytest.mark.parametrize("layout", [Layout.INT8, Layout.INT4])
def test_rounding_is_that_of_gguf(layout: Layout) -> None:
    """Scales are the same. A number differs by one at most, where gguf divides by the scale before it is rounded."""
    weights = np.random.default_rng(31).standard_normal((256, 1152), np.float32)
    theirs = bf16.nearest(weights, layout)
    words, scales = import_quantize.rounded(weights.astype(np.float64).reshape(-1, 32), layout)
    assert np.array_equal(scales, theirs.scales)
    numbers = [
        quants.view(np.int8) if layout == Layout.INT8 else unpack_nibbles(quants) for quants in (words, theirs.quants)
    ]
    difference = np.abs(numbers[0].astype(int) - numbers[1])
    assert difference.max() == 1
    assert difference.mean() < 0.02
    rows, cols = weights.shape
    ours = Packed(layout, rows, cols, words, scales)
    errors = [np.square(packed.dequantize() - weights).sum() for packed in (ours, theirs)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("factor", [1 - 3e-7, 1 + 3e-7])
def test_a_quotient_that_is_a_little_off_changes_nothing(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """WGSL lets a division be 2.5 units in the last place off (section 15.7.4)."""

    def off(name: str, **options: bool) -> str:
        source = load_shader(name, **options)
        for quotient in ("= 1.0 / d;", "= x / levels;"):
            assert source.count(quotient) == 1
            source = source.replace(quotient, f"{quotient[:-1]} * {factor!r};")
        return source

    monkeypatch.setattr(seam, "load_shader", off)
    with closing(open_device_sync()) as device:
        for case in import_quantize.CASES[:4]:
            device.wait(import_quantize.check(device, case))
