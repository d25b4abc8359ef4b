"""What `convert` writes, against the source and against `quantize` on whole matrices; and its interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType
from safetensors import safe_open

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights import convert as module
from gemma_wgpu.weights.checkpoint import EMBEDDING, Checkpoint, matrix_shapes, norm_shapes, open_checkpoint
from gemma_wgpu.weights.convert import convert, default_quant
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.quantize import quantize
from tests.checkpoints import (
    CONFIG,
    HF_CONFIG,
    gguf_metadata,
    gguf_tensors,
    hf_tensors,
    same_bits,
    write_gguf,
    write_hf,
)
from tests.vocabulary import rust_ids, small_tokenizer_json

WIDE = replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=128)
SHARD = 16_000  # small enough for the embedding to be split, and other matrices not
KINDS = [
    *(getattr(GGMLQuantizationType, kind) for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0")),
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q6_K,
]


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    folder = write_hf(tmp_path / "tiny-it", HF_CONFIG, hf_tensors(np.random.default_rng(1), "bfloat16"))
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return folder


def converted(source: Path, out: Path, **options: object) -> FolderCheckpoint:
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, out, **options)  # type: ignore[arg-type]
    opened = open_checkpoint(out)
    assert isinstance(opened, FolderCheckpoint)
    return opened


def check_norms(folder: Checkpoint, source: Checkpoint) -> None:
    for name, (size,) in norm_shapes(source.config).items():
        assert folder.norm(name).shape == (size,)
        assert same_bits(folder.norm(name), source.norm(name))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_keeps_every_encoding(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Word for word what loading the GGUF itself gives, in one file or in many."""
    config = WIDE if "K" in kind.name else CONFIG
    path = write_gguf(
        tmp_path / "tiny.gguf", gguf_metadata(config), gguf_tensors(np.random.default_rng(2), kind, config)
    )
    for shard_size in (20_000 if config is CONFIG else 400_000, 1 << 30):
        out = tmp_path / f"out{shard_size}"
        with converted(path, out, quant="keep", shard_size=shard_size) as folder, open_checkpoint(path) as source:
            assert (folder.config, folder.name, folder.quantization) == (source.config, "Tiny", source.quantization)
            assert all(size <= shard_size for file in out.iterdir() for size in [file.stat().st_size])
            for name, shape in matrix_shapes(config).items():
                expected, tensor = source.tensor(name).pack(), folder.tensor(name)
                assert (tensor.name, tensor.shape, tensor.layout) == (name, shape, expected.layout)
                assert np.array_equal(tensor.pack().quants, expected.quants)
                assert np.array_equal(tensor.pack().scales, expected.scales)
            check_norms(folder, source)


@pytest.mark.parametrize(
    ("quant", "embedding", "layouts"),
    [
        ("int4", None, (Layout.INT4, Layout.INT8)),
        ("int4", "int4", (Layout.INT4, Layout.INT4)),
        ("int4-offset", None, (Layout.INT4_OFFSET, Layout.INT8)),
        ("int8", None, (Layout.INT8, Layout.INT8)),
        ("int8", "int4", (Layout.INT8, Layout.INT4)),
        ("f16", None, (Layout.F16, Layout.F16)),
        ("f16", "int8", (Layout.F16, Layout.INT8)),
        ("keep", None, (Layout.BF16, Layout.BF16)),
        ("keep", "int8", (Layout.BF16, Layout.INT8)),
        (None, None, (Layout.INT4, Layout.INT8)),
    ],
)
def test_quantises(
    quant: str | None,
    embedding: str | None,
    layouts: tuple[Layout, Layout],
    bf16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `quantize` does whole matrices, though read in parts and split over shards."""
    monkeypatch.setattr(module, "_CHUNK", 640)
    options = {"quant": quant, "embedding": embedding, "shard_size": 4000}
    with converted(bf16, tmp_path / "out", **options) as folder, open_checkpoint(bf16) as source:
        for name in matrix_shapes(CONFIG):
            layout = layouts[name == EMBEDDING]
            packed = folder.tensor(name).pack()
            expected = source.tensor(name).pack()
            if layout != Layout.BF16:
                expected = quantize(expected.dequantize(), layout)
            assert packed.layout == layout
            assert np.array_equal(packed.quants, expected.quants)
            assert np.array_equal(packed.scales, expected.scales)
        check_norms(folder, source)
        assert folder.quantization == ("bf16" if quant == "keep" else quant or "int4")
        assert folder.name == "tiny-it"


def test_what_is_in_the_layout_already_is_not_touched(tmp_path: Path) -> None:
    kinds = {EMBEDDING: GGMLQuantizationType.Q4_0}
    tensors = gguf_tensors(np.random.default_rng(3), GGMLQuantizationType.Q5_0, kinds=kinds)
    path = write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors)
    options = {"quant": "int8", "embedding": "int4", "shard_size": SHARD}
    with converted(path, tmp_path / "out", **options) as folder, open_checkpoint(path) as source:
        for name in matrix_shapes(CONFIG):
            assert np.array_equal(folder.tensor(name).pack().quants, source.tensor(name).pack().quants)


def test_a_folder_of_ours_is_a_source(bf16: Path, tmp_path: Path) -> None:
    converted(bf16, tmp_path / "small", quant="int8", shard_size=SHARD).close()
    converted(bf16, tmp_path / "large", quant="int8").close()
    converted(tmp_path / "small", tmp_path / "again").close()
    again, large = content(tmp_path / "again"), content(tmp_path / "large")
    for manifest in (again, large):
        manifest["manifest.json"] = manifest["manifest.json"].replace(b'"small"', b'"tiny-it"')
    assert again == large


def test_what_is_kept_unless_told(bf16: Path, tmp_path: Path) -> None:
    with open_checkpoint(bf16) as source:
        assert default_quant(source) == "int4"
    path = write_gguf(
        tmp_path / "tiny.gguf", gguf_metadata(), gguf_tensors(np.random.default_rng(3), GGMLQuantizationType.Q8_0)
    )
    with open_checkpoint(path) as source:
        assert default_quant(source) == "keep"


def test_the_tokenizer(bf16: Path, tmp_path: Path) -> None:
    rust = tokenizers.Tokenizer.from_file(str(bf16 / "tokenizer.json"))
    with converted(bf16, tmp_path / "out") as folder:
        tokenizer = folder.tokenizer()
    for text in ("abab ba", "  ab<b>a", "<eos>c aba"):
        assert tokenizer.encode(text, bos=False) == rust_ids(rust, text)


def test_shards_are_safetensors(bf16: Path, tmp_path: Path) -> None:
    """Read by the `safetensors` package: the words at the manifest's offsets, in upload order, nothing else."""
    with converted(bf16, tmp_path / "out", quant="int4", shard_size=6000) as folder:
        manifest = folder.manifest
    assert len(manifest.shards) > 5
    uploaded = []
    for number, shard in enumerate(manifest.shards):
        data = (tmp_path / "out" / shard.name).read_bytes()
        expected = [
            data[offset : offset + nbytes]
            for tensor in manifest.tensors
            for part in tensor.parts
            for offset, nbytes in (part.quants, part.scales)
            if part.shard == number and nbytes
        ]
        with safe_open(tmp_path / "out" / shard.name, framework="numpy") as file:
            names = list(file.offset_keys())
            assert [file.get_tensor(name).tobytes() for name in names] == expected
        uploaded += [name.split(".rows.")[0].removesuffix(".quants") for name in names if not name.endswith("scales")]
    order = list(dict.fromkeys(uploaded))
    assert sorted(order) == sorted({**matrix_shapes(CONFIG), **norm_shapes(CONFIG)})
    assert (order[0], order[-1]) == (EMBEDDING, "model.norm.weight")
    layers = [int(name.split(".")[2]) for name in order[1:-1]]
    assert layers == sorted(layers)
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.split(".")[-2] for name in order if name.startswith("model.layers.1.") and "proj" in name] == parts


def test_progress_comes_to_all_the_bytes(bf16: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    converted(bf16, tmp_path / "out", shard_size=SHARD, progress=lambda *at: seen.append(at)).close()
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert {total for _, total in seen} == {written}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (seen[0][0], seen[-1][0]) == (0, written)


# Options and names that cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int3"}, "no such quantisation: 'int3'"),
        ({"embedding": "f16"}, "no such quantisation: 'int4' with the embedding as 'f16'"),
        ({"shard_size": 0}, "shards of 0 bytes cannot be"),
        ({"shard_size": 300}, "a shard of 300 bytes cannot hold two rows of model.embed_tokens.weight"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        converted(bf16, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == [bf16]


def test_never_overwrites(bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(bf16, out, quant="int8").close()
    before = content(out)
    with pytest.raises(RequestError, match="out: exists already; choose another name, or force its replacement"):
        converted(bf16, out)
    assert content(out) == before
    converted(bf16, out, quant="int4", force=True).close()
    assert content(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny-it"]


def test_force_replaces_model_folders_only(bf16: Path, tmp_path: Path) -> None:
    for out, name in ((tmp_path / "photos", "holiday.png"), (tmp_path, "")):
        if name:
            out.mkdir()
            (out / name).write_text("x")
        with pytest.raises(RequestError, match="exists and is not a model folder, so it is not replaced"):
            converted(bf16, out, force=True)
    with pytest.raises(RequestError, match="exists and is not a model folder"):
        converted(bf16, tmp_path / "photos" / "holiday.png", force=True)
    assert (tmp_path / "photos" / "holiday.png").read_text() == "x"


def test_a_folder_in_the_way_of_the_partial_one(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "holiday.png").write_text("x")
    with pytest.raises(RequestError, match="holiday.png: is not of an interrupted conversion; move it"):
        converted(bf16, tmp_path / "out")
    assert (tmp_path / "out.partial" / "holiday.png").read_text() == "x"


def test_weights_that_cannot_be_quantised(tmp_path: Path) -> None:
    tensors = hf_tensors(np.random.default_rng(1), "bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    np.asarray(tensors[name][1])[3, 4] = 0x7F80  # infinity
    folder = write_hf(tmp_path / "tiny-it", HF_CONFIG, tensors)
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    with pytest.raises(ModelError, match=f"tiny-it: tensor '{name}': there are weights that are not finite"):
        converted(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Interruptions. A subprocess kills itself, by a signal that nothing can catch, at its nth touch of the disk.

_RUN = """
import os, signal, sys
from pathlib import Path
from gemma_wgpu.weights.checkpoint import open_checkpoint
from gemma_wgpu.weights.convert import convert

source, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
count = 0

def step(*_):
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def touched(event, arguments):
    ours = event == "open" and str(out.parent) in str(arguments[0])
    if ours or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        step()

with open_checkpoint(source) as checkpoint:
    sys.addaudithook(touched)
    convert(checkpoint, out, quant="int4", shard_size=16000, force=True, progress=step)
print(count)
"""


def run(source: Path, out: Path, kill_at: int) -> int:
    """The touches there were; the run must have died at `kill_at` unless that is 0."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(source), str(out), str(kill_at)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return 0 if kill_at else int(done.stdout)


def test_killed_and_run_again(bf16: Path, tmp_path: Path) -> None:
    """At five points by chance, and at the last few, where the names change: the same bytes in the end."""
    touches = run(bf16, tmp_path / "undisturbed", 0)
    expected = content(tmp_path / "undisturbed")
    assert len(expected) > 5
    points = [*Random(os.urandom(8)).sample(range(1, touches - 2), 5), touches - 2, touches - 1, touches]
    for point in points:
        out = tmp_path / f"killed-at-{point}" / "out"
        run(bf16, out, point)
        assert not out.exists() or content(out) == expected, point
        run(bf16, out, 0)
        assert content(out) == expected, point
        assert [path.name for path in out.parent.iterdir()] == ["out"], point


def test_killed_again_and_again(bf16: Path, tmp_path: Path) -> None:
    run(bf16, tmp_path / "undisturbed", 0)
    out = tmp_path / "killed" / "out"
    for point in (3, 17, 11, 14, 9):
        run(bf16, out, point)
        assert not out.exists()
    run(bf16, out, 0)
    assert content(out) == content(tmp_path / "undisturbed")


def test_killed_while_replacing(bf16: Path, tmp_path: Path) -> None:
    """Under the final name there is the old model, the new one, or for a moment none; never a mixture."""
    converted(bf16, tmp_path / "old", quant="f16").close()
    old = content(tmp_path / "old")

    def replace_in(folder: str, kill_at: int) -> tuple[int, Path]:
        out = tmp_path / folder / "out"
        shutil.copytree(tmp_path / "old", out)
        return run(bf16, out, kill_at), out

    touches, out = replace_in("undisturbed", 0)
    expected = content(out)
    assert expected != old
    seen = set()
    for point in range(touches - 10, touches + 1):
        _, out = replace_in(f"killed-at-{point}", point)
        assert not out.exists() or content(out) in (old, expected), point
        seen.add(content(out) == old if out.exists() else None)
        run(bf16, out, 0)
        assert content(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert seen == {True, False, None}


def test_the_old_model_comes_back(bf16: Path, tmp_path: Path) -> None:
    """Of a run that was killed after it moved the old model away, and before the new one had its name."""
    out = tmp_path / "out"
    converted(bf16, out).close()
    before = content(out)
    out.rename(tmp_path / "out.replaced-by-convert")
    with pytest.raises(RequestError, match="exists already"):
        converted(bf16, out, quant="f16")
    assert content(out) == before


class StopError(Exception):
    pass


def stop_after(shards: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > shards * SHARD:
            raise StopError

    return progress


def interrupted(source: Path, out: Path, **options: object) -> Path:
    """The partial folder of a conversion that stopped after some shards."""
    with pytest.raises(StopError):
        converted(source, out, shard_size=SHARD, progress=stop_after(2), **options)
    partial = out.with_name(out.name + ".partial")
    assert (partial / "progress.json").is_file()
    return partial


def first_shard(folder: Path) -> Path:
    return min(folder.glob("weights-*.safetensors"))


def test_finished_shards_are_kept(bf16: Path, tmp_path: Path) -> None:
    partial = interrupted(bf16, tmp_path / "out")
    before = first_shard(partial).stat()
    converted(bf16, tmp_path / "out", shard_size=SHARD).close()
    after = first_shard(tmp_path / "out").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("change", ["options", "source", "shard", "cut", "record", "half a record"])
def test_nothing_is_kept_of_another_conversion(change: str, bf16: Path, tmp_path: Path) -> None:
    """Other options, a source that was written to, a shard that was damaged, a record that was."""
    partial = interrupted(bf16, tmp_path / "out", quant="int8" if change == "options" else "int4")
    shard, record = first_shard(partial), partial / "progress.json"
    match change:
        case "source":
            os.utime(bf16 / "model.safetensors", ns=(1, 1))
        case "shard":
            damaged = bytearray(shard.read_bytes())
            damaged[-1] ^= 1
            shard.write_bytes(damaged)
        case "cut":
            os.truncate(shard, 100)
        case "record":
            record.unlink()
        case "half a record":
            os.truncate(record, 30)
    before = shard.stat().st_mtime_ns
    converted(bf16, tmp_path / "out", quant="int4", shard_size=SHARD).close()
    assert first_shard(tmp_path / "out").stat().st_mtime_ns != before
    converted(bf16, tmp_path / "undisturbed", quant="int4", shard_size=SHARD).close()
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_full_disk(bf16: Path, tmp_path: Path) -> None:
    """/dev/full takes the place of a shard: every write to it fails as on a full disk."""
    partial = interrupted(bf16, tmp_path / "out")
    full = partial / first_shard(partial).name.replace("00001-of", "00004-of")
    full.symlink_to("/dev/full")
    with pytest.raises(
        ModelError, match="safetensors: the disk is full; make room and run the same conversion again"
    ):
        converted(bf16, tmp_path / "out", shard_size=SHARD)
    assert not (tmp_path / "out").exists()
    full.unlink()
    converted(bf16, tmp_path / "out", shard_size=SHARD).close()
    converted(bf16, tmp_path / "undisturbed", shard_size=SHARD).close()
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_place_that_cannot_be_written(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"out\.partial: cannot be written: Not a directory"):
        converted(bf16, tmp_path / "file" / "out")
