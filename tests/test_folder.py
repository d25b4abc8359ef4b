"""Reading model folders: rows give the same words wherever they are cut, and all damage is found."""

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.manifest import Entry, Manifest, plan
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.summary import summarize
from tests.checkpoints import CONFIG, gguf_metadata, gguf_tensors, resident, same_bits, write_gguf
from tests.table import EMBEDDING, matrix_shapes

Q = GGMLQuantizationType
MATRICES = list(matrix_shapes(CONFIG))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write matrices in five layouts, with rows of 64 and 128 weights."""
    kinds = {name: kind for name, kind in zip(MATRICES, [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.BF16, Q.F32] * 9, strict=False)}
    tensors = gguf_tensors(np.random.default_rng(6), Q.Q8_0, kinds=kinds)
    return write_gguf(tmp_path_factory.mktemp("original") / "tiny.gguf", gguf_metadata(), tensors)


@pytest.fixture(scope="module")
def made(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tiny"
    with open_checkpoint(gguf) as original:
        convert(original, out, quant="keep", shard_size=4000)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy that may be damaged."""
    return Path(shutil.copytree(made, tmp_path / "tiny"))


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_rows(made: Path, gguf: Path, data: st.DataObject) -> None:
    """Rows that lie in one shard or in several are as the GGUF reader packs them."""
    with open_checkpoint(made) as opened, open_checkpoint(gguf) as original:
        name = data.draw(st.sampled_from(MATRICES))
        rows = opened.tensor(name).shape[0]
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        packed, expected = opened.tensor(name).pack(start, stop), original.tensor(name).pack(start, stop)
    assert (packed.layout, packed.rows, packed.cols) == (expected.layout, expected.rows, expected.cols)
    assert np.array_equal(packed.quants, expected.quants)
    assert np.array_equal(packed.scales, expected.scales)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_rows_of_one_block(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """The scales of two rows share a word, and rows that are cut anywhere give what the GGUF reader gives."""
    config = {**gguf_metadata(), "gemma3.embedding_length": 32}
    tensors = gguf_tensors(np.random.default_rng(6), kind, replace(CONFIG, hidden_size=32))
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    with open_checkpoint(path) as original:
        convert(original, tmp_path / "out", shard_size=1500)
        with open_checkpoint(tmp_path / "out") as opened:
            for start in range(96):
                for stop in (start + 1, start + 2, start + 7, 96):
                    if stop <= 96:
                        packed = opened.tensor(EMBEDDING).pack(start, stop)
                        expected = original.tensor(EMBEDDING).pack(start, stop)
                        assert np.array_equal(packed.quants, expected.quants)
                        assert np.array_equal(packed.scales, expected.scales)
                        assert packed.scales.flags.aligned


def test_rows_in_one_shard_are_views(made: Path) -> None:
    with open_checkpoint(made) as opened:
        packed = opened.tensor("model.layers.0.self_attn.q_proj.weight").pack(2, 10)
        assert packed.layout == Layout.INT4
        for words in (packed.quants, packed.scales):
            base: object = words
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base, memoryview)
            assert isinstance(base.obj, mmap.mmap)
            assert not words.flags.writeable


def test_wrong_rows_and_names(made: Path) -> None:
    with open_checkpoint(made) as opened:
        for rows in ((-1, 2), (3, 3), (0, 97)):
            with pytest.raises(RequestError, match=r"rows -?\d+ to \d+ of model.embed_tokens.weight do not exist"):
                opened.tensor(EMBEDDING).pack(*rows)
        with pytest.raises(ModelError, match=r"Gemma 3 has no matrix model.norm.weight"):
            opened.tensor("model.norm.weight")
        with pytest.raises(ModelError, match=r"Gemma 3 has no vector x"):
            opened.values("x")


def test_needs_no_package_but_numpy(made: Path) -> None:
    """Browsers have no `tokenizers` and no `safetensors`."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tokenizers', 'safetensors', 'wgpu', 'click', 'tqdm']))\n"
        "from gemma_wgpu.weights.opening import open_checkpoint\n"
        "opened = open_checkpoint(sys.argv[1])\n"
        "print(opened.tensor(sys.argv[2]).pack().rows, len(opened.vocabulary().pieces))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made), EMBEDDING],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (done.stdout, done.stderr) == ("96 96\n", "")


def test_what_was_packed_outlives_release_and_close(made: Path, gguf: Path) -> None:
    with open_checkpoint(gguf) as original:
        expected = original.tensor(EMBEDDING).pack(0, 10).quants.copy()
    opened = open_checkpoint(made)
    tensor = opened.tensor(EMBEDDING)
    packed = tensor.pack(0, 10)
    opened.release()
    assert np.array_equal(packed.quants, expected)
    opened.close()
    assert np.array_equal(packed.quants, expected)
    with pytest.raises(ModelError, match=r"safetensors: the checkpoint is closed"):
        tensor.pack()


def test_release_gives_memory_back(made: Path) -> None:
    with open_checkpoint(made) as opened:
        assert isinstance(opened, FolderCheckpoint)
        path = made / opened.manifest.shards[0].name
        packed = opened.tensor(EMBEDDING).pack(0, 10)
        assert resident(path) <= 0  # checking the hash has not mapped it
        packed.quants.sum()
        assert resident(path) > 0
        opened.release()
        assert resident(path) == 0


def test_summary(made: Path, gguf: Path) -> None:
    with open_checkpoint(made) as opened, open_checkpoint(gguf) as original:
        ours, theirs = summarize(opened), summarize(original)
    assert ours.embedding == theirs.embedding
    assert ours.matrices == theirs.matrices
    assert ours.vector_bytes == theirs.vector_bytes == 4 * (64 * 9 + 32 * 4)
    assert ours.nbytes == ours.file_bytes == opened.nbytes
    assert ours.parameters == sum(r * c for r, c in matrix_shapes(CONFIG).values()) + 64 * 9 + 32 * 4
    assert (ours.embedding.layout, ours.embedding.bits_per_weight) == (Layout.INT8, 8.5)
    assert {use.layout: use.bits_per_weight for use in ours.matrices} == {
        Layout.F32: 32,
        Layout.BF16: 16,
        Layout.INT8: 8.5,
        Layout.INT4: 4.5,
        Layout.INT4_OFFSET: 5,
    }
    assert sum(use.tensors for use in ours.matrices) == 14
    weights = sum(use.weights for use in ours.matrices)
    assert ours.bits_per_weight * weights == sum(use.bits_per_weight * use.weights for use in ours.matrices)


# What is wrong with a folder is said in one line that names the file, before any weight is seen.


def refused(folder: Path, file: str) -> str:
    """Open the folder and read all of it; return the message after the name of `file`."""
    with pytest.raises(ModelError) as caught, open_checkpoint(folder) as opened:
        for name in MATRICES:
            opened.tensor(name).pack()
        opened.tokenizer()
    start = f"{folder / file}: "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_flipped_byte(number: int, at: int, folder: Path) -> None:
    shard = shards(folder)[number]
    flip(shard, at)
    assert refused(folder, shard.name) == (
        "its SHA-256 is not the one in manifest.json: the file is damaged, delete it and download it again"
    )


def test_only_a_damaged_shard_is_refused(folder: Path) -> None:
    flip(shards(folder)[-1], -1)
    with open_checkpoint(folder) as opened:
        opened.tensor(EMBEDDING).pack()
        with pytest.raises(ModelError, match=shards(folder)[-1].name):
            opened.values("model.norm.weight")


def test_a_shard_cut_short(folder: Path) -> None:
    shard = shards(folder)[1]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-4])
    assert refused(folder, shard.name).startswith(
        f"it has {size - 4:,} bytes where manifest.json says {size:,}: it is cut short"
    )
    shard.write_bytes(b"")
    assert refused(folder, shard.name) == "the file is empty; download it again"


def test_a_missing_shard(folder: Path) -> None:
    shard = shards(folder)[3]
    shard.unlink()
    assert refused(folder, shard.name) == "there is no such file, but manifest.json lists it; download this shard"


@pytest.mark.parametrize("name", ["config.json", "vocabulary.bin"])
def test_damaged_small_files(name: str, folder: Path) -> None:
    flip(folder / name, 40)
    assert refused(folder, name).startswith("its SHA-256 is not the one in manifest.json")
    (folder / name).unlink()
    assert refused(folder, name) == "cannot be read: No such file or directory; download the folder again"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_newer_format(folder: Path) -> None:
    """The error is the same whatever else has changed in the manifest."""
    edit(folder, lambda content: (content.update(format=2), content.pop("tensors")))
    assert refused(folder, "manifest.json") == (
        "the model folder has format 2, and this gemma-wgpu reads 1; upgrade it"
    )


def test_a_manifest_cut_anywhere(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 131):
        path.write_bytes(whole[:length])
        assert refused(folder, "manifest.json").startswith("the manifest is damaged (")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tensors": lambda content: content.pop("tensors"),
    "a list": lambda content: content.update(shards={}),
    "format a text": lambda content: content.update(format="1"),
    "name a number": lambda content: content.update(name=3),
    "unknown layout": lambda content: content["tensors"][0].update(layout="INT3"),
    "another layout": lambda content: content["tensors"][0].update(layout="INT4"),
    "a size below zero": lambda content: content["shards"][0].update(nbytes=-1),
    "a hash that is none": lambda content: content["shards"][0].update(sha256="abc"),
    "a path": lambda content: content["shards"][0].update(name="../tiny/x.safetensors"),
    "a path to the config": lambda content: content["config"].update(name="/etc/passwd"),
    "offset": lambda content: content["tensors"][3]["parts"][0]["quants"].__setitem__(0, 64),
    "scales elsewhere": lambda content: content["tensors"][0]["parts"][0]["scales"].__setitem__(0, 64),
    "rows gone": lambda content: content["tensors"][0]["parts"].pop(),
    "rows swapped": lambda content: content["tensors"][0]["parts"].reverse(),
    "a tensor gone": lambda content: content["tensors"].pop(),
    "a shard gone": lambda content: content["shards"].pop(),
    "a shard more": lambda content: content["shards"].append(content["shards"][0]),
    "fewer columns": lambda content: content["tensors"][0].update(cols=48),
    "more rows": lambda content: content["tensors"][0].update(rows=98),
    "a bool": lambda content: content["tensors"][0].update(rows=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_at_odds_with_itself(change: str, folder: Path) -> None:
    edit(folder, CHANGES[change])
    assert refused(folder, "manifest.json").startswith("the manifest is damaged (")


def test_a_manifest_of_another_model(folder: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["tensors"][0]["name"] = "model.wte.weight"

    edit(folder, rename)
    assert refused(folder, "manifest.json").startswith("its tensors are not those of the model in config.json")


def test_a_config_of_another_model(folder: Path) -> None:
    """Its hash is right."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG.to_hf() | {"hidden_size": 96}))
    data = config.read_bytes()
    edit(
        folder,
        lambda content: content["config"].update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
    )
    assert refused(folder, "manifest.json").startswith("its tensors are not those of the model in config.json")


def test_a_vector_in_another_layout(folder: Path) -> None:
    """The manifest agrees with itself: it says that the last norm is half as long."""
    shard = shards(folder)[-1]
    shard.write_bytes(shard.read_bytes()[:-128])

    def halve(content: dict[str, Any]) -> None:
        norm = content["tensors"][-1]
        norm["layout"] = "BF16"
        [part] = norm["parts"]
        part["quants"][1] -= 128
        part["scales"][0] -= 128
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        content["shards"][-1].update(nbytes=shard.stat().st_size, sha256=digest)

    edit(folder, halve)
    assert refused(folder, "manifest.json") == "model.norm.weight is BF16; it must be F32"


@settings(max_examples=150)
@given(data=st.data())
def test_any_byte_of_the_manifest(made: Path, data: st.DataObject) -> None:
    """A manifest in which a byte has changed is refused, or has no more than another name in it."""
    whole = (made / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    try:
        manifest = Manifest.from_json(changed, "manifest.json")
    except ModelError as error:
        assert str(error).startswith("manifest.json: ")
    else:
        unchanged = Manifest.from_json(whole, "manifest.json")
        assert [tensor.parts for tensor in manifest.tensors] == [tensor.parts for tensor in unchanged.tensors]


def test_written_and_read(made: Path) -> None:
    data = (made / "manifest.json").read_bytes()
    assert Manifest.from_json(data, "manifest.json").to_json() == data


# The plan of shards.


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from([32, 64, 96]), st.sampled_from(Layout)), min_size=1
    ),
    shard_size=st.integers(2000, 20_000),
)
def test_any_plan(
    sizes: list[tuple[int, int, Layout]], shard_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every shard is a safetensors file within the limit, and only tensors that must be are split, at even rows."""
    tensors = [
        Entry(f"tensor.{number}", layout, rows, cols if layout.group == 32 else 256)
        for number, (rows, cols, layout) in enumerate(sizes)
    ]
    planned, placed = plan(tensors, shard_size)
    assert [(tensor.name, tensor.layout, tensor.rows, tensor.cols) for tensor in placed] == [
        (tensor.name, tensor.layout, tensor.rows, tensor.cols) for tensor in tensors
    ]
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    for shard in planned:
        assert shard.nbytes <= shard_size
        path.write_bytes(shard.header + bytes(shard.nbytes - len(shard.header)))
        with safe_open(path, framework="numpy") as file:
            assert len(file.keys()) >= len(shard.parts)
    for tensor in placed:
        spans = [(part.start, part.stop) for part in tensor.parts]
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == tensor.rows
        assert all(start % 2 == 0 for start, _ in spans)
        if len(spans) > 1:
            assert tensor.nbytes > shard_size - 1000  # the header takes some of the shard


def test_real_model(demo_gguf: Path, tmp_path: Path) -> None:
    """The 270M is repacked into shards that static hosts take, with the words that loading the GGUF gives."""
    with open_checkpoint(demo_gguf) as original:
        convert(original, tmp_path / "out")
        assert resident(demo_gguf) < 10_000
        with open_checkpoint(tmp_path / "out") as opened:
            assert isinstance(opened, FolderCheckpoint)
            assert opened.quantization == "Q4_K_M"
            assert all(shard.nbytes <= 95_000_000 for shard in opened.manifest.shards)
            for name, (rows, _) in matrix_shapes(original.config).items():
                for start in range(0, rows, 1 << 14):
                    stop = min(rows, start + (1 << 14))
                    packed, expected = opened.tensor(name).pack(start, stop), original.tensor(name).pack(start, stop)
                    assert packed.layout == expected.layout
                    assert np.array_equal(packed.quants, expected.quants)
                    assert np.array_equal(packed.scales, expected.scales)
            for name in ("model.norm.weight", "model.layers.17.self_attn.k_norm.weight"):
                assert same_bits(opened.values(name), original.values(name))
            ids = opened.tokenizer().encode("Why the sky is blue?")
    assert ids == [2, 11355, 506, 7217, 563, 3730, 236881]
