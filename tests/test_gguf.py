import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.models.spec import TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.encodings import Encoding
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.stored import MappedFile, StoredMatrix, StoredTensor
from tests.checkpoints import (
    CONFIG,
    Raw,
    blocks,
    description,
    gguf_metadata,
    gguf_tensors,
    patch,
    same_bits,
    write_gguf,
)
from tests.table import gguf_name, matrix_shapes, norm_shapes

Kind = GGMLQuantizationType

ENCODINGS = {
    Kind.F32: (encodings.F32, Layout.F32),
    Kind.F16: (encodings.F16, Layout.F16),
    Kind.BF16: (encodings.BF16, Layout.BF16),
    Kind.Q4_0: (encodings.Q4_0, Layout.INT4),
    Kind.Q4_1: (encodings.Q4_1, Layout.INT4_OFFSET),
    Kind.Q5_0: (encodings.Q5_0, Layout.INT8),
    Kind.Q8_0: (encodings.Q8_0, Layout.INT8),
    Kind.Q4_K: (encodings.Q4_K, Layout.INT4_SUPER),
    Kind.Q6_K: (encodings.Q6_K, Layout.INT8_SUPER),
}
# 640 and 1152 are the widths of the 270M and the 1B, and no multiples of 256; 6912 is the inner width of the 1B.
WIDTHS = {kind: (256, 768, 6912) if "K" in kind.name else (32, 640, 1152, 6912) for kind in ENCODINGS}


def stored(folder: Path, data: np.ndarray[Any, Any], encoding: Encoding, cols: int, offset: int = 0) -> StoredMatrix:
    """Return the rows of `data` as a matrix that lies `offset` bytes into a file."""
    path = folder / "weights"
    path.write_bytes(b"\xff" * offset + data.tobytes())
    shape = len(data), cols
    return StoredMatrix(TensorSpec("w", "w", shape), StoredTensor("w", shape, encoding, MappedFile(path), offset))


@pytest.mark.parametrize("kind", ENCODINGS, ids=lambda kind: kind.name)
def test_every_type_equals_ggufs_dequantiser(kind: Kind, tmp_path: Path) -> None:
    rng = np.random.default_rng(kind)
    encoding, layout = ENCODINGS[kind]
    for cols in WIDTHS[kind]:
        data = blocks(rng, kind, 5, cols)
        packed = stored(tmp_path, data, encoding, cols).pack()
        assert (packed.layout, packed.rows, packed.cols) == (layout, 5, cols)
        assert same_bits(packed.dequantize(), dequantize(data, kind).reshape(5, cols))


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(ENCODINGS)),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 40),
    st.integers(0, 2**32),
    st.data(),
)
def test_row_ranges(kind: Kind, rows: int, groups: int, offset: int, seed: int, data: st.DataObject) -> None:
    """Any range of rows, at any offset in the file, has the weights of these rows in the whole."""
    encoding, layout = ENCODINGS[kind]
    cols = groups * layout.group
    raw = blocks(np.random.default_rng(seed), kind, rows, cols)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    with tempfile.TemporaryDirectory() as folder:
        part = stored(Path(folder), raw, encoding, cols, offset).pack(start, stop)
    assert (part.rows, part.cols) == (stop - start, cols)
    assert part.quants.flags.aligned
    assert same_bits(part.dequantize(), dequantize(raw[start:stop], kind).reshape(part.rows, cols))


@pytest.mark.parametrize("kind", ENCODINGS, ids=lambda kind: kind.name)
def test_parts_split_at_even_rows_join_into_the_whole(kind: Kind, tmp_path: Path) -> None:
    encoding, layout = ENCODINGS[kind]
    cols = 3 * layout.group
    tensor = stored(tmp_path, blocks(np.random.default_rng(5), kind, 7, cols), encoding, cols)
    whole, parts = tensor.pack(), [tensor.pack(0, 2), tensor.pack(2, 6), tensor.pack(6)]
    assert np.array_equal(np.concatenate([part.quants for part in parts]), whole.quants)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)


def test_a_range_reads_no_other_rows(tmp_path: Path) -> None:
    """Rows of floats are read-only views: nothing is copied, let alone read from other rows."""
    data = blocks(np.random.default_rng(6), Kind.BF16, 4, 64)
    packed = stored(tmp_path, data, encodings.BF16, 64).pack(1, 2)
    assert not packed.quants.flags.owndata
    assert not packed.quants.flags.writeable
    assert packed.quants.tobytes() == data[1].tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5), (4, None)])
def test_rows_outside_the_matrix_are_refused(start: int, stop: int | None, tmp_path: Path) -> None:
    tensor = stored(tmp_path, blocks(np.random.default_rng(7), Kind.Q8_0, 4, 32), encodings.Q8_0, 32)
    with pytest.raises(RequestError, match=r"rows .* of w do not exist; it has 4"):
        tensor.pack(start, stop)


# The file as a whole.

MIXED = {
    "model.embed_tokens.weight": Kind.F16,
    "model.layers.0.self_attn.q_proj.weight": Kind.Q5_0,
    "model.layers.0.self_attn.v_proj.weight": Kind.Q8_0,
    "model.layers.0.mlp.gate_proj.weight": Kind.Q4_1,
    "model.layers.1.mlp.down_proj.weight": Kind.BF16,
    "model.layers.1.mlp.up_proj.weight": Kind.F32,
}


def mixed() -> dict[str, Raw]:
    return gguf_tensors(np.random.default_rng(8), Kind.Q4_0, kinds=MIXED)


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_a_whole_file(alignment: int | None, tmp_path: Path) -> None:
    tensors = mixed()
    path = write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors, alignment=alignment)
    with open_checkpoint(path) as checkpoint:
        assert replace(checkpoint.config, rms_norm_eps=1e-6) == CONFIG
        assert checkpoint.config.rms_norm_eps == np.float32(1e-6)  # all that a GGUF holds
        assert (checkpoint.path, checkpoint.name, checkpoint.quantization) == (path, "Tiny", "Q4_0")
        assert checkpoint.nbytes == sum(array.nbytes for array, _ in tensors.values())
        for name, shape in matrix_shapes(CONFIG).items():
            tensor, (array, kind) = checkpoint.tensor(name), tensors[gguf_name(name)]
            assert (tensor.name, tensor.shape, tensor.layout) == (name, shape, ENCODINGS[kind][1])
            assert same_bits(tensor.pack().dequantize(), dequantize(array, kind).reshape(shape))
        for name in norm_shapes(CONFIG):
            norm = np.asarray(tensors[gguf_name(name)][0], np.float32)  # the 1 is already added
            assert same_bits(checkpoint.values(name), norm)


def test_k_quants_in_a_whole_file(tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=128)
    kinds = {name: Kind.Q6_K for name in matrix_shapes(config) if "down_proj" in name or "embed" in name}
    tensors = gguf_tensors(np.random.default_rng(9), Kind.Q4_K, config, kinds=kinds)
    metadata = gguf_metadata(config) | {"general.file_type": 15}
    with open_checkpoint(write_gguf(tmp_path / "tiny.gguf", metadata, tensors)) as checkpoint:
        assert checkpoint.quantization == "Q4_K_M"
        for name, shape in matrix_shapes(config).items():
            array, kind = tensors[gguf_name(name)]
            assert same_bits(checkpoint.tensor(name).pack().dequantize(), dequantize(array, kind).reshape(shape))


def test_every_tensor_name_is_llama_cpps() -> None:
    """The table of the `gguf` package, which its converter uses, has the same names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH.GEMMA3, CONFIG.num_hidden_layers)
    for name in (*matrix_shapes(CONFIG), *norm_shapes(CONFIG), "lm_head.weight"):
        assert table.get_name(name, try_suffixes=(".weight",)) == gguf_name(name)


def test_f16_norms_are_widened(tmp_path: Path) -> None:
    tensors = mixed()
    half = np.arange(64, dtype=np.float16) / 7
    tensors["output_norm.weight"] = half, Kind.F16
    with open_checkpoint(write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors)) as checkpoint:
        assert same_bits(checkpoint.values("model.norm.weight"), half.astype(np.float32))


def test_a_head_that_repeats_the_embedding_is_taken(tmp_path: Path) -> None:
    tensors = mixed()
    tensors["output.weight"] = tensors["token_embd.weight"]
    with open_checkpoint(write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors)) as checkpoint:
        assert checkpoint.nbytes == sum(array.nbytes for array, _ in mixed().values())


def test_closed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), mixed())
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensor("model.embed_tokens.weight")
        packed = tensor.pack()
        before = packed.dequantize()
    assert same_bits(packed.dequantize(), before)
    with pytest.raises(ModelError, match=r"tiny\.gguf: the checkpoint is closed"):
        tensor.pack()
    with pytest.raises(ModelError, match=r"tiny\.gguf: the checkpoint is closed"):
        checkpoint.values("model.norm.weight")
    checkpoint.close()


def test_names_that_gemma_does_not_have(tmp_path: Path) -> None:
    with open_checkpoint(write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), mixed())) as checkpoint:
        with pytest.raises(ModelError, match=r"no matrix model\.norm\.weight"):
            checkpoint.tensor("model.norm.weight")
        with pytest.raises(ModelError, match=r"no vector lm_head\.weight"):
            checkpoint.values("lm_head.weight")


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        gguf_metadata() | {"x.flag": True, "x.texts": ["a", "", "ß\n"], "x.numbers": [1, -2], "x.floats": [0.5]},
        mixed(),
    )
    values = {
        0: ("B", 200),
        1: ("b", -100),
        2: ("H", 60000),
        3: ("h", -30000),
        10: ("Q", 2**63),
        11: ("q", -(2**62)),
    }
    entries = [(f"x.kind{kind}", kind, struct.pack(f"<{code}", value)) for kind, (code, value) in values.items()]
    entries += [("x.kind12", 12, struct.pack("<d", 0.1)), ("x.empty", 9, struct.pack("<IQ", 5, 0))]
    insert_metadata(path, entries)
    metadata = open_checkpoint(path).metadata  # type: ignore[attr-defined]
    assert metadata["x.flag"] is True
    assert metadata["x.texts"] == ["a", "", "ß\n"]
    assert metadata["x.numbers"].tolist() == [1, -2]
    assert metadata["x.floats"].tolist() == [0.5]
    assert {kind: metadata[f"x.kind{kind}"] for kind in values} == {
        kind: value for kind, (_, value) in values.items()
    }
    assert metadata["x.kind12"] == 0.1
    assert metadata["x.empty"].tolist() == []


def insert_metadata(path: Path, entries: list[tuple[str, int, bytes]]) -> None:
    """Put raw entries in front of the others; the data move by a multiple of the alignment."""
    content = path.read_bytes()
    raw = b"".join(
        struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value for key, kind, value in entries
    )
    (count,) = struct.unpack_from("<Q", content, 16)
    filler = -(len(raw) + 8 + 8 + 4 + 8) % 32
    raw += struct.pack("<Q", 8) + b"x.filler" + struct.pack("<IQ", 8, filler) + b" " * filler
    path.write_bytes(content[:16] + struct.pack("<Q", count + len(entries) + 1) + raw + content[24:])


# What is wrong with a file is said in one line that names it.


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.gguf").startswith("there is no such file or folder; give a .gguf file")


@pytest.mark.parametrize(
    ("head", "likeness"),
    [
        (b"", "the file is empty"),
        (b"GG", "this is not a GGUF file: it begins with b'GG'"),
        (b"\x7fELF\x02\x01\x01\x00\x00", r"this is not a GGUF file: it begins with b'\x7fELF\x02\x01\x01\x00'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is not a GGUF file: it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "this is not a GGUF file: it looks like a web page"),
        (b"PK\x03\x04 archive", "this is not a GGUF file: it looks like a PyTorch file"),
        (b"\x40\0\0\0\0\0\0\0{}", "this is not a GGUF file: it looks like safetensors"),
        (b"tjgg\x03\0\0\0", "this is not a GGUF file: it is a GGML file"),
    ],
)
def test_wrong_magic(head: bytes, likeness: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head)
    assert refused(path).startswith(likeness)


@pytest.mark.parametrize(
    ("version", "what"),
    [
        (b"\2\0\0\0", "version 2"),
        (b"\4\0\0\0", "version 4"),
        (b"\0\0\0\3", "big-endian"),
        (b"\0\0\0\0", "version 0"),
    ],
)
def test_wrong_version(version: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + version + bytes(16))
    assert refused(path).startswith(f"GGUF is {what}; only little-endian version 3")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny file with other metadata and tensors; None removes one."""

    def write(
        metadata: dict[str, object] | None = None,
        tensors: dict[str, Raw | None] | None = None,
        **options: Any,
    ) -> Path:
        keys = {key: value for key, value in (gguf_metadata() | (metadata or {})).items() if value is not None}
        raw = {name: value for name, value in (mixed() | (tensors or {})).items() if value is not None}
        return write_gguf(tmp_path / "tiny.gguf", keys, raw, **options)

    return write


def test_header_cut_short(tiny: Callable[..., Path]) -> None:
    path = tiny()
    whole = path.read_bytes()
    data = whole.index(b"blk.0.attn_k.weight")
    for size in (4, 7, 23, 24, 31, 60, 1000, data, data + 60):
        path.write_bytes(whole[:size])
        assert refused(path) == f"ends inside its header, after {size} bytes; download it again"


def test_data_cut_short(tiny: Callable[..., Path]) -> None:
    path = tiny()
    whole = path.read_bytes()
    last = GGUFReader(path).tensors[-1]
    start = last.data_offset
    for present in (0, 1, last.n_bytes - 1):
        path.write_bytes(whole[: start + present])
        assert refused(path) == (
            f"tensor {last.name!r} lacks {last.n_bytes - present} of its {last.n_bytes} bytes: "
            "the file is cut short, download it again"
        )
    path.write_bytes(whole[: start + last.n_bytes])  # the padding after the last tensor is not missed
    open_checkpoint(path).close()
    path.write_bytes(whole[: GGUFReader(path).tensors[0].data_offset])
    assert refused(path).startswith("tensor 'token_embd.weight' lacks 12288 of its 12288 bytes")


def test_wrong_architecture(tiny: Callable[..., Path]) -> None:
    assert refused(tiny(architecture="llama")).startswith("general.architecture is 'llama'; only gemma3")


def test_missing_metadata(tiny: Callable[..., Path]) -> None:
    assert refused(tiny({"gemma3.block_count": None})).startswith("gemma3.block_count is missing")


def test_missing_tensor(tiny: Callable[..., Path]) -> None:
    message = refused(tiny(tensors={"blk.1.ffn_up.weight": None}))
    assert message.startswith("tensor 'blk.1.ffn_up.weight' is missing")


def test_missing_norm(tiny: Callable[..., Path]) -> None:
    message = refused(tiny(tensors={"blk.0.attn_q_norm.weight": None}))
    assert message.startswith("tensor 'blk.0.attn_q_norm.weight' is missing")


def test_unknown_tensor(tiny: Callable[..., Path]) -> None:
    bias = np.zeros(64, np.float32), Kind.F32
    assert refused(tiny(tensors={"blk.0.attn_q.bias": bias})).startswith(
        "tensor 'blk.0.attn_q.bias' is not one that Gemma 3 has"
    )


def test_wrong_shape(tiny: Callable[..., Path]) -> None:
    wide = blocks(np.random.default_rng(0), Kind.Q4_0, 32, 128), Kind.Q4_0
    message = refused(tiny(tensors={"blk.0.attn_k.weight": wide}))
    assert message == "tensor 'blk.0.attn_k.weight' is 32 x 128 where the configuration makes it 32 x 64"


def test_vocabulary_of_another_size(tiny: Callable[..., Path]) -> None:
    message = refused(tiny({"tokenizer.ggml.tokens": ["x"] * 95}))
    assert message == "tensor 'token_embd.weight' is 96 x 64 where the configuration makes it 95 x 64"


def test_unsupported_type(tiny: Callable[..., Path]) -> None:
    other = np.zeros((32, 64 // 32 * 24), np.uint8), Kind.Q5_1
    message = refused(tiny(tensors={"blk.0.attn_k.weight": other}))
    assert message.startswith("tensor 'blk.0.attn_k.weight' is Q5_1; use a GGUF with F32, F16, Q4_0,")


def test_unheard_of_type(tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, description(path, "blk.0.attn_k.weight") + 20, struct.pack("<I", 77))
    assert refused(path).startswith("tensor 'blk.0.attn_k.weight' is of unknown type 77; use a GGUF with")


def test_quantised_norm(tiny: Callable[..., Path]) -> None:
    norm = blocks(np.random.default_rng(0), Kind.Q8_0, 1, 64).ravel(), Kind.Q8_0
    message = refused(tiny(tensors={"blk.0.ffn_norm.weight": norm}))
    name = "model.layers.0.pre_feedforward_layernorm.weight"
    assert message == f"tensor 'blk.0.ffn_norm.weight' is Q8_0; {name} must be plain floats"


def test_separate_head(tiny: Callable[..., Path]) -> None:
    embedding = mixed()["token_embd.weight"][0].copy()
    embedding.view(np.uint8)[-1, -1] ^= 1
    message = refused(tiny(tensors={"output.weight": (embedding, Kind.F16)}))
    assert message.startswith("tensor 'output.weight' is a head apart from the embedding")


def test_rows_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=48)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        gguf_metadata(config),
        gguf_tensors(np.random.default_rng(0), Kind.F32, config),
    )
    assert refused(path) == "gemma3.embedding_length is 48; only multiples of 32 can be run"


def test_rows_that_are_no_multiple_of_the_block(tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, description(path, "blk.0.attn_k.weight") + 4, struct.pack("<Q", 63))
    assert refused(path) == "tensor 'blk.0.attn_k.weight' has rows of 63, not a multiple of 32 as Q4_0 needs"


def entry(path: Path, key: str) -> int:
    """Return where a metadata value begins: its u32 type is first, and then the value."""
    return path.read_bytes().index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)


HUGE = [2**22 + 1, 2**32, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", [2**16 + 1, *HUGE])
def test_implausible_counts(count: int, tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, 8, struct.pack("<Q", count))
    assert refused(path).startswith(f"claims {count} tensors, at most 65536 is plausible")
    path = tiny()
    patch(path, 16, struct.pack("<Q", count))
    assert refused(path).startswith(f"claims {count} metadata entries, at most 65536 is plausible")


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.scores"])
def test_implausible_lists(key: str, count: int, tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, entry(path, key) + 8, struct.pack("<Q", count))
    assert refused(path).startswith(f"claims {count} items of metadata key '{key}'")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tokenizer.ggml.tokens", "claims "),  # what follows the last token is read as a length
        ("tokenizer.ggml.scores", "ends inside its header"),
    ],
)
def test_lists_longer_than_the_file(key: str, message: str, tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, entry(path, key) + 8, struct.pack("<Q", 2**22))
    assert refused(path).startswith(message)


@pytest.mark.parametrize("length", [2**20 + 1, 2**32, 2**64 - 1])
def test_implausible_lengths(length: int, tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, 24, struct.pack("<Q", length))  # this is the length of the first key
    assert refused(path).startswith(f"claims {length} bytes of a name")
    for key, at in ("general.name", 4), ("tokenizer.ggml.tokens", 16):
        path = tiny()
        patch(path, entry(path, key) + at, struct.pack("<Q", length))
        assert refused(path).startswith(f"claims {length} bytes of text, at most 1048576 is plausible")


def test_texts_longer_than_the_file(tiny: Callable[..., Path]) -> None:
    for key, at in ("general.name", 4), ("tokenizer.ggml.tokens", 16):
        path = tiny()
        patch(path, entry(path, key) + at, struct.pack("<Q", 2**20))
        assert refused(path).startswith("ends inside its header")


def test_implausible_dimensions(tiny: Callable[..., Path]) -> None:
    path = tiny()
    at = description(path, "blk.0.attn_k.weight")
    patch(path, at, struct.pack("<I", 2**31))
    assert refused(path).startswith("claims 2147483648 dimensions of tensor 'blk.0.attn_k.weight'")
    path = tiny()
    patch(path, at + 12, struct.pack("<Q", 0))
    assert refused(path) == "tensor 'blk.0.attn_k.weight' has the impossible shape 0 x 64"
    path = tiny()
    patch(path, at + 12, struct.pack("<Q", 2**60))
    assert refused(path).startswith("tensor 'blk.0.attn_k.weight' lacks ")


def test_tensor_off_its_place(tiny: Callable[..., Path]) -> None:
    path = tiny()
    at = description(path, "blk.0.attn_k.weight") + 24
    (offset,) = struct.unpack_from("<Q", path.read_bytes(), at)
    patch(path, at, struct.pack("<Q", offset - 32))
    message = refused(path)
    assert message == (
        f"tensor 'blk.0.attn_k.weight' is at offset {offset - 32} where {offset} is due; the file is damaged"
    )


def test_duplicates(tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, path.read_bytes().index(b"blk.0.attn_k.weight"), b"blk.0.attn_q.weight")
    assert refused(path) == "tensor 'blk.0.attn_q.weight' appears twice; the file is damaged"
    path = tiny()
    patch(path, path.read_bytes().index(b"tokenizer.ggml.scores"), b"tokenizer.ggml.tokens")
    assert refused(path) == "metadata key 'tokenizer.ggml.tokens' appears twice; the file is damaged"


def test_text_that_is_not_utf8(tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, path.read_bytes().index(b"general.name"), b"\xff")
    assert refused(path).startswith(r"b'\xffeneral.name' in the header is not UTF-8")


def test_unknown_metadata_type(tiny: Callable[..., Path]) -> None:
    path = tiny()
    patch(path, entry(path, "general.name"), struct.pack("<I", 99))
    assert refused(path).startswith("metadata key 'general.name' is of unknown type 99")
    path = tiny()
    patch(path, entry(path, "tokenizer.ggml.tokens") + 4, struct.pack("<I", 9))
    assert refused(path).startswith("metadata key 'tokenizer.ggml.tokens' is a list of type 9")


@pytest.mark.parametrize("alignment", [0, 2**32 - 1])
def test_impossible_alignment(alignment: int, tiny: Callable[..., Path]) -> None:
    path = tiny(alignment=64)
    patch(path, entry(path, "general.alignment") + 4, struct.pack("<I", alignment))
    message = refused(path)
    assert message.startswith("general.alignment is not a positive integer" if alignment == 0 else "tensor ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer.ggml.model": "gpt2"},
            "tokenizer.ggml.model is 'gpt2'; Gemma's vocabularies are llama and gemma4",
        ),
        ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores or token_type is missing"),
        ({"tokenizer.ggml.token_type": "abc"}, "tokenizer.ggml.scores or token_type is missing"),
        ({"tokenizer.ggml.scores": [0.5]}, "there are 96 tokens, 1 scores"),
        ({}, "<bos> or some of the 256 byte tokens are missing"),
    ],
)
def test_tokenizer_that_is_not_gemmas(change: dict[str, object], message: str, tiny: Callable[..., Path]) -> None:
    path = tiny(change)
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelError) as caught:
        checkpoint.tokenizer()
    assert str(caught.value).startswith(f"{path}: {message}")


# Damage of any kind is found, or does no harm.


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = replace(CONFIG, vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=32)
    rng = np.random.default_rng(10)
    path = tmp_path_factory.mktemp("fuzz") / "tiny.gguf"
    return write_gguf(path, gguf_metadata(config), gguf_tensors(rng, Kind.Q4_0, config)).read_bytes()


WORDS = st.sampled_from(
    [b"\0" * 8, b"\xff" * 8, b"\0" * 7 + b"\x80", b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\t\0\0\0"]
)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage(smallest: bytes, data: st.DataObject) -> None:
    content = bytearray(smallest)
    header = content.rindex(b"blk.0.post_ffw_norm") + 64
    at = st.integers(0, header)
    for place, value in data.draw(st.lists(st.tuples(at, st.binary(min_size=1, max_size=1) | WORDS), max_size=4)):
        content[place : place + len(value)] = value
    size = data.draw(st.none() | st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        path.write_bytes(content[:size])
        try:
            with open_checkpoint(path) as checkpoint:
                for name in matrix_shapes(checkpoint.config):
                    checkpoint.tensor(name).pack()
                for name in norm_shapes(checkpoint.config):
                    checkpoint.values(name)
                checkpoint.tokenizer()
        except ModelError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


# The real thing.


def test_real_model_equals_ggufs_reader(demo_gguf: Path) -> None:
    reader = GGUFReader(demo_gguf)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(demo_gguf) as checkpoint:
        assert checkpoint.nbytes == sum(tensor.n_bytes for tensor in reader.tensors)
        rng = np.random.default_rng(11)
        for name, (rows, _) in matrix_shapes(checkpoint.config).items():
            tensor = theirs.pop(gguf_name(name))
            for row in {0, rows - 2, *rng.integers(0, rows - 1, 3).tolist()}:
                part = checkpoint.tensor(name).pack(row, row + 2)
                expected = dequantize(tensor.data[row : row + 2], tensor.tensor_type)
                assert same_bits(part.dequantize(), expected), name
        for name in norm_shapes(checkpoint.config):
            assert same_bits(checkpoint.values(name), theirs.pop(gguf_name(name)).data), name
    assert not theirs


def test_real_model_as_described(demo_gguf: Path) -> None:
    with open_checkpoint(demo_gguf) as checkpoint:
        assert (checkpoint.name, checkpoint.quantization) == ("Gemma 3 270m", "Q4_K_M")
        assert checkpoint.config == Gemma3Config(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            rms_norm_eps=float(np.float32(1e-6)),
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling_factor=1.0,
            sliding_window=512,
            max_position_embeddings=32768,
            query_pre_attn_scalar=256.0,
            layer_types=(*["sliding_attention"] * 5, "full_attention") * 3,
        )


def test_real_tokenizer(demo_gguf: Path) -> None:
    with open_checkpoint(demo_gguf) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer.vocab_size == 262144
    # Gemma 3's own tokenizer.json gives these ids.
    assert tokenizer.encode("You are a helpful assistant") == [2, 3048, 659, 496, 11045, 16326]
    assert tokenizer.encode("Why the sky is blue?") == [2, 11355, 506, 7217, 563, 3730, 236881]
