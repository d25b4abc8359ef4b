"""A family whose rows are not whole blocks, and which has biases: its tensors on their way to the GPU."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.models import registry
from gemma_wgpu.models.keys import Keys
from gemma_wgpu.models.spec import Family, Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.chat import GEMMA3
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.hosted import HostedFolder
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.quantize import quantize
from gemma_wgpu.weights.summary import summarize
from gemma_wgpu.weights.upload import Upload
from tests.checkpoints import Raw, bfloat16, blocks, description, patch, same_bits, write_gguf, write_hf
from tests.disk import Bytes, Disk
from tests.vocabulary import small_tokenizer_json

Kinds = GGMLQuantizationType
HIDDEN, PADDED, INNER = 44, 64, 70
EMBEDDING, MATRIX, BIAS, NORM = "embed.weight", "layer.weight", "layer.bias", "norm.weight"
VECTORS = {BIAS: INNER, NORM: HIDDEN, "other_norm.weight": HIDDEN}


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int = 1
    max_position_embeddings: int = 128

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        keys = Keys(config, source, "Padded")
        return cls(keys.count("vocab_size"), keys.count("hidden_size"))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        keys = Keys(metadata, source, "Padded")
        return cls(keys.count("padded.vocab_size"), keys.count("padded.embedding_length"))

    def to_hf(self) -> dict[str, object]:
        return {"model_type": "padded", **asdict(self)}

    def summary(self) -> dict[str, str]:
        return {}


def tensors(config: Config) -> list[TensorSpec]:
    return [
        TensorSpec(EMBEDDING, "token_embd.weight", (config.vocab_size, config.hidden_size), Kind.EMBEDDING),
        TensorSpec(MATRIX, "layer.weight", (INNER, config.hidden_size)),
        TensorSpec(BIAS, "layer.bias", (INNER,), Kind.BIAS),
        TensorSpec(NORM, "norm.weight", (config.hidden_size,), Kind.NORM),
        TensorSpec("other_norm.weight", "other_norm.weight", (config.hidden_size,), Kind.NORM_PLUS_ONE),
    ]


@pytest.fixture(autouse=True)
def padded(monkeypatch: pytest.MonkeyPatch) -> Family:
    async def load(*_: object) -> Any:
        raise NotImplementedError

    family = Family("Padded", ("padded",), ("padded",), Config, tensors, load, GEMMA3)
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, family])
    return family


def values(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Return weights that bfloat16 and float16 can both hold."""
    shapes = {EMBEDDING: (96, HIDDEN), MATRIX: (INNER, HIDDEN), **{name: (size,) for name, size in VECTORS.items()}}
    return {name: (rng.integers(-128, 128, shape) / 64).astype(np.float32) for name, shape in shapes.items()}


def hugging_face(folder: Path, weights: Mapping[str, NDArray[np.float32]]) -> Path:
    """Write the matrices in bf16 and the vectors in the three types."""
    bits = {name: bfloat16(array) for name, array in weights.items()}
    stored: dict[str, tuple[str, NDArray[np.generic]]] = {name: ("bfloat16", array) for name, array in bits.items()}
    stored[NORM] = "float32", weights[NORM]
    stored[BIAS] = "float16", weights[BIAS].astype(np.float16)
    write_hf(folder, Config(96, HIDDEN).to_hf(), stored)
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return folder


METADATA: dict[str, object] = {
    "general.name": "Padded",
    "padded.vocab_size": 96,
    "padded.embedding_length": HIDDEN,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"▁{token}" for token in range(96)],
    "tokenizer.ggml.scores": [-float(token) for token in range(96)],
    "tokenizer.ggml.token_type": [1] * 96,
}


def gguf(path: Path, weights: Mapping[str, NDArray[np.float32]], **changed: Raw) -> Path:
    """Write the matrices in F16; a GGUF has the 1 of a norm in it."""
    raw: dict[str, Raw] = {
        "token_embd.weight": (weights[EMBEDDING].astype(np.float16), Kinds.F16),
        "layer.weight": (weights[MATRIX].astype(np.float16), Kinds.F16),
        "layer.bias": (weights[BIAS].astype(np.float16), Kinds.F16),
        "norm.weight": (weights[NORM], Kinds.F32),
        "other_norm.weight": (weights["other_norm.weight"] + np.float32(1), Kinds.F32),
    }
    return write_gguf(path, METADATA, raw | changed, architecture="padded")


@pytest.fixture(params=["safetensors", "gguf"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    weights = values(np.random.default_rng(20))
    if request.param == "gguf":
        return gguf(tmp_path / "model.gguf", weights), weights
    return hugging_face(tmp_path / "model", weights), weights


def wide(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.pad(matrix, ((0, 0), (0, PADDED - HIDDEN)))


def used(name: str, weights: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return weights[name] + np.float32(1) if name == "other_norm.weight" else weights[name]


def test_rows_are_filled_up_with_zeros(written: tuple[Path, dict[str, NDArray[np.float32]]]) -> None:
    path, weights = written
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.family.name == "Padded"
        for name in (EMBEDDING, MATRIX):
            tensor = checkpoint.tensor(name)
            assert tensor.shape == (len(weights[name]), PADDED)
            assert tensor.layout == (Layout.F16 if path.suffix else Layout.BF16)
            assert same_bits(tensor.pack().dequantize(), wide(weights[name]))
            for start, stop in ((0, 2), (3, 8), (len(weights[name]) - 1, len(weights[name]))):
                assert same_bits(tensor.pack(start, stop).dequantize(), wide(weights[name])[start:stop])
        for name in VECTORS:
            assert same_bits(checkpoint.values(name), used(name, weights))
        summary = summarize(checkpoint)
    assert summary.parameters == sum(array.size for array in weights.values())
    assert summary.vector_bytes == 4 * (INNER + 2 * HIDDEN)
    assert summary.embedding.nbytes == 2 * 96 * PADDED


@pytest.mark.parametrize("shard_size", [2000, 1 << 30])
@pytest.mark.parametrize("quant", ["int8", "int4", "f16", "keep"])
def test_converted(
    quant: Any, shard_size: int, written: tuple[Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    path, weights = written
    with open_checkpoint(path) as checkpoint:
        convert(checkpoint, tmp_path / "out", quant=quant, shard_size=shard_size)
        kept = checkpoint.tensor(MATRIX).layout
    layouts = {"int8": Layout.INT8, "int4": Layout.INT4, "f16": Layout.F16, "keep": kept}
    with open_checkpoint(tmp_path / "out") as folder:
        assert folder.config == Config(96, HIDDEN)
        tensor, packed = folder.tensor(MATRIX), folder.tensor(MATRIX).pack()
        assert (tensor.shape, tensor.layout) == ((INNER, PADDED), layouts[quant])
        if quant in ("int8", "int4"):
            expected = quantize(wide(weights[MATRIX]), layouts[quant])
            assert np.array_equal(packed.quants, expected.quants)
            assert np.array_equal(packed.scales, expected.scales)
        else:
            assert same_bits(packed.dequantize(), wide(weights[MATRIX]))
        assert not packed.dequantize()[:, HIDDEN:].any()
        for name in VECTORS:
            assert same_bits(folder.values(name), used(name, weights))
        convert(folder, tmp_path / "again", quant="keep", shard_size=shard_size)
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "again")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_shards_are_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights = values(np.random.default_rng(21))
    with open_checkpoint(gguf(tmp_path / "model.gguf", weights)) as checkpoint:
        convert(checkpoint, tmp_path / "out", quant="keep")
    [shard] = (tmp_path / "out").glob("*.safetensors")
    theirs = load_file(shard)
    assert same_bits(theirs[BIAS], weights[BIAS][None])
    assert same_bits(theirs[MATRIX].astype(np.float32), wide(weights[MATRIX]))


def quantised(path: Path, tensor: str, rows: int) -> Path:
    """Write a GGUF whose tensor is Q8_0 and has rows of 44 weights, which no writer makes."""
    rng = np.random.default_rng(22)
    raw = blocks(rng, Kinds.Q8_0, rows, PADDED), Kinds.Q8_0
    gguf(path, values(rng), **{tensor: raw})
    patch(path, description(path, tensor) + 4, struct.pack("<Q", HIDDEN))
    return path


@pytest.mark.parametrize(("tensor", "rows"), [("token_embd.weight", 96), ("layer.weight", INNER)])
def test_quantised_rows_cannot_be_filled_up(tensor: str, rows: int, tmp_path: Path) -> None:
    path = quantised(tmp_path / "model.gguf", tensor, rows)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: tensor {tensor!r} has rows of 44, not a multiple of 32 as Q8_0 needs"


def test_on_the_gpu(written: tuple[Path, dict[str, NDArray[np.float32]]]) -> None:
    path, weights = written
    with closing(open_device_sync()) as device, open_checkpoint(path) as checkpoint:

        async def check() -> None:
            linear = await Upload(device, checkpoint, lambda _: None).linear(MATRIX, biases=[BIAS])
            [part] = linear.parts
            assert (linear.rows, linear.cols, part.rows, part.cols) == (INNER, PADDED, INNER, PADDED)
            words = await device.read(part.quants)
            assert words.tobytes() == checkpoint.tensor(MATRIX).pack().quants.tobytes()
            assert linear.bias is not None
            bias = (await device.read(linear.bias)).view(np.float32)
            assert same_bits(bias[:INNER], weights[BIAS])

        device.wait(check())


def test_on_the_web(tmp_path: Path) -> None:
    weights = values(np.random.default_rng(25))
    with open_checkpoint(gguf(tmp_path / "model.gguf", weights)) as checkpoint:
        convert(checkpoint, tmp_path / "out", quant="keep", shard_size=2000)

    async def check() -> None:
        with await HostedFolder.open(Disk(tmp_path / "out"), None) as hosted:
            for name in VECTORS:
                assert same_bits(await hosted.vector(name), used(name, weights))
            tensor = hosted.tensor(MATRIX)
            assert tensor.shape == (INNER, PADDED)
            found = b""
            async for _, quants, scales in tensor.words(0, INNER):
                assert isinstance(quants, Bytes) and scales.nbytes == 0
                found += quants.data
            assert found == wide(weights[MATRIX]).astype(np.float16).tobytes()

    asyncio.run(check())
