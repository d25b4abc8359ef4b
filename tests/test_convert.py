"""Checks what `convert` writes against the model and against `quantize` on whole matrices, and interrupts it."""

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
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.weights import convert as module
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.convert import convert, default_quant
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.opening import open_checkpoint
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
from tests.table import EMBEDDING, matrix_shapes, norm_shapes
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


def converted(original: Path, out: Path, **options: object) -> FolderCheckpoint:
    with open_checkpoint(original) as checkpoint:
        convert(checkpoint, out, **options)  # type: ignore[arg-type]
    opened = open_checkpoint(out)
    assert isinstance(opened, FolderCheckpoint)
    return opened


def check_norms(folder: Checkpoint, original: Checkpoint) -> None:
    for name, (size,) in norm_shapes(original.config).items():
        assert folder.values(name).shape == (size,)
        assert same_bits(folder.values(name), original.values(name))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_keeps_every_encoding(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """The folder has the words that loading the GGUF itself gives, in one file or in many."""
    config = WIDE if "K" in kind.name else CONFIG
    path = write_gguf(
        tmp_path / "tiny.gguf", gguf_metadata(config), gguf_tensors(np.random.default_rng(2), kind, config)
    )
    for shard_size in (20_000 if config is CONFIG else 400_000, 1 << 30):
        out = tmp_path / f"out{shard_size}"
        with converted(path, out, quant="keep", shard_size=shard_size) as folder, open_checkpoint(path) as original:
            assert folder.config == original.config
            assert (folder.name, folder.quantization) == ("Tiny", original.quantization)
            assert all(size <= shard_size for file in out.iterdir() for size in [file.stat().st_size])
            for name, shape in matrix_shapes(config).items():
                expected, tensor = original.tensor(name).pack(), folder.tensor(name)
                assert (tensor.name, tensor.shape, tensor.layout) == (name, shape, expected.layout)
                assert np.array_equal(tensor.pack().quants, expected.quants)
                assert np.array_equal(tensor.pack().scales, expected.scales)
            check_norms(folder, original)


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
    """The words are those that `quantize` makes of whole matrices, though rows are read and split apart."""
    monkeypatch.setattr(module, "_CHUNK", 640)
    options = {"quant": quant, "embedding": embedding, "shard_size": 4000}
    with converted(bf16, tmp_path / "out", **options) as folder, open_checkpoint(bf16) as original:
        for name in matrix_shapes(CONFIG):
            layout = layouts[name == EMBEDDING]
            packed = folder.tensor(name).pack()
            expected = original.tensor(name).pack()
            if layout != Layout.BF16:
                expected = quantize(expected.dequantize(), layout)
            assert packed.layout == layout
            assert np.array_equal(packed.quants, expected.quants)
            assert np.array_equal(packed.scales, expected.scales)
        check_norms(folder, original)
        assert folder.quantization == ("bf16" if quant == "keep" else quant or "int4")
        assert folder.name == "tiny-it"


def test_what_is_in_the_layout_already_is_not_touched(tmp_path: Path) -> None:
    kinds = {EMBEDDING: GGMLQuantizationType.Q4_0}
    tensors = gguf_tensors(np.random.default_rng(3), GGMLQuantizationType.Q5_0, kinds=kinds)
    path = write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors)
    options = {"quant": "int8", "embedding": "int4", "shard_size": SHARD}
    with converted(path, tmp_path / "out", **options) as folder, open_checkpoint(path) as original:
        for name in matrix_shapes(CONFIG):
            assert np.array_equal(folder.tensor(name).pack().quants, original.tensor(name).pack().quants)


def test_a_folder_of_ours_is_a_source(bf16: Path, tmp_path: Path) -> None:
    converted(bf16, tmp_path / "small", quant="int8", shard_size=SHARD).close()
    converted(bf16, tmp_path / "large", quant="int8").close()
    converted(tmp_path / "small", tmp_path / "again").close()
    again, large = content(tmp_path / "again"), content(tmp_path / "large")
    for manifest in (again, large):
        manifest["manifest.json"] = manifest["manifest.json"].replace(b'"small"', b'"tiny-it"')
    assert again == large


def test_what_is_kept_unless_told(bf16: Path, tmp_path: Path) -> None:
    with open_checkpoint(bf16) as original:
        assert default_quant(original) == "int4"
    path = write_gguf(
        tmp_path / "tiny.gguf", gguf_metadata(), gguf_tensors(np.random.default_rng(3), GGMLQuantizationType.Q8_0)
    )
    with open_checkpoint(path) as original:
        assert default_quant(original) == "keep"


def test_the_tokenizer(bf16: Path, tmp_path: Path) -> None:
    rust = tokenizers.Tokenizer.from_file(str(bf16 / "tokenizer.json"))
    with converted(bf16, tmp_path / "out") as folder:
        tokenizer = folder.tokenizer()
    for text in ("abab ba", "  ab<b>a", "<eos>c aba"):
        assert tokenizer.encode(text, bos=False) == rust_ids(rust, text)


def test_shards_are_safetensors(bf16: Path, tmp_path: Path) -> None:
    """The `safetensors` package finds the words at the manifest's offsets, in upload order, and nothing else."""
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
    seen: list[Progress] = []
    converted(bf16, tmp_path / "out", shard_size=SHARD, progress=seen.append).close()
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert {(step.what, step.total, step.unit) for step in seen} == {("converting", written, "bytes")}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[0].done, seen[-1].done) == (0, written)


# Options and names that cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int3"}, "there is no such quantisation: 'int3'"),
        ({"embedding": "f16"}, "there is no such quantisation: 'int4' with the embedding as 'f16'"),
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


def web_app(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()
    (out / "manifest.json").write_text('{"name": "A web app", "icons": [], "start_url": "/"}')
    (out / "index.html").write_text("<html></html>")


def newer(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_bytes())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))


MANIFEST = "exists, and its manifest.json is damaged or not that of a model folder which this version can read"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (web_app, MANIFEST),
        (newer, MANIFEST),
        (lambda out: os.truncate(out / "manifest.json", 1000), MANIFEST),
        (lambda out: (out / "manifest.json").write_bytes(b""), MANIFEST),
        (lambda out: (out / "manifest.json").unlink(), "exists and is not a model folder"),
        (
            lambda out: (out / "notes.txt").write_text("x"),
            "exists and has notes.txt in it, which is not of the model",
        ),
        (lambda out: (out / ".git").mkdir(), "exists and has .git in it, which is not of the model"),
    ],
    ids=[
        "a web app",
        "a newer format",
        "half a manifest",
        "no content",
        "no manifest",
        "a file more",
        "a folder more",
    ],
)
def test_force_leaves_other_folders_alone(
    change: Callable[[Path], object], problem: str, bf16: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    converted(bf16, out, quant="int8").close()
    change(out)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in out.iterdir())
    with pytest.raises(RequestError) as caught:
        converted(bf16, out, quant="int4", force=True)
    assert str(caught.value) == f"{out}: {problem}, so it is not replaced; choose another name"
    assert sorted((path, path.is_file() and path.read_bytes()) for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny-it"]


@pytest.mark.parametrize("missing", [[], ["config.json"]], ids=["whole", "in part"])
def test_force_replaces_a_folder_of_ours(missing: list[str], bf16: Path, tmp_path: Path) -> None:
    """A file that is missing is no loss."""
    out = tmp_path / "out"
    converted(bf16, out, quant="int8").close()
    for name in missing:
        (out / name).unlink()
    converted(bf16, out, quant="int4", force=True).close()
    converted(bf16, tmp_path / "undisturbed", quant="int4").close()
    assert content(out) == content(tmp_path / "undisturbed")


def test_force_fills_an_empty_folder(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="out: exists already"):
        converted(bf16, tmp_path / "out")
    converted(bf16, tmp_path / "out", force=True).close()


def at_the_end(do: Callable[[], object]) -> OnProgress:
    def progress(step: Progress) -> None:
        if step.done == step.total:
            do()

    return progress


@pytest.mark.parametrize("force", [False, True])
def test_what_comes_while_it_converts_is_not_replaced(force: bool, bf16: Path, tmp_path: Path) -> None:
    """The conversion is finished as soon as the name is free."""
    out = tmp_path / "out"
    if force:
        converted(bf16, out).close()

    def come() -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("x")

    problem = "has notes.txt in it" if force else "exists already"
    with pytest.raises(RequestError, match=problem):
        converted(bf16, out, quant="int8", force=force, progress=at_the_end(come))
    assert (out / "notes.txt").read_text() == "x"
    out.rename(tmp_path / "elsewhere")
    steps: list[Progress] = []
    converted(bf16, out, quant="int8", force=force, progress=steps.append).close()
    assert [step.done for step in steps] == [0, steps[0].total]  # no shard was written again


def test_a_folder_in_the_way_of_the_partial_one(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "holiday.png").write_text("x")
    with pytest.raises(RequestError, match="holiday.png: is not of an interrupted conversion; move it"):
        converted(bf16, tmp_path / "out")
    assert (tmp_path / "out.partial" / "holiday.png").read_text() == "x"


def test_a_file_in_the_way_of_the_partial_folder(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("x")
    with pytest.raises(RequestError, match="out.partial: is in the way; move it or choose another name"):
        converted(bf16, tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "x"


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
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.convert import convert

original, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
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

with open_checkpoint(original) as checkpoint:
    sys.addaudithook(touched)
    convert(checkpoint, out, quant="int4", shard_size=16000, force=True, progress=step)
print(count)
"""


def run(original: Path, out: Path, kill_at: int) -> int:
    """Return the number of touches; the run must have died at `kill_at` unless that is 0."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(original), str(out), str(kill_at)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return 0 if kill_at else int(done.stdout)


def test_killed_and_run_again(bf16: Path, tmp_path: Path) -> None:
    """Killed at five points by chance, or at the last few, which change names, it ends with the same bytes."""
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
    """The final name stands for the old model, for the new one, or for a moment for none, but never for a mixture."""
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
    """A run was killed after it had moved the old model away, and before the new one had its name."""
    out = tmp_path / "out"
    converted(bf16, out).close()
    before = content(out)
    out.rename(tmp_path / "out.replaced-by-convert")
    with pytest.raises(RequestError, match="exists already"):
        converted(bf16, out, quant="f16")
    assert content(out) == before


class StopError(Exception):
    pass


def stop_after(shards: int) -> OnProgress:
    def stop(progress: Progress) -> None:
        if progress.done > shards * SHARD:
            raise StopError

    return stop


def interrupted(original: Path, out: Path, **options: object) -> Path:
    """Return the partial folder of a conversion that stopped after some shards."""
    with pytest.raises(StopError):
        converted(original, out, shard_size=SHARD, progress=stop_after(2), **options)
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


@pytest.mark.parametrize("record", [None, b"", b"{}", b"[1]", b"[" * 100_000])
def test_what_is_not_of_a_conversion_is_kept(record: bytes | None, bf16: Path, tmp_path: Path) -> None:
    """Another conversion would begin anew, and remove the folder of the first one."""
    partial = interrupted(bf16, tmp_path / "out", quant="int8")
    (partial / "notes.txt").write_text("x")
    if record is not None:
        (partial / "progress.json").write_bytes(record)
    with pytest.raises(RequestError, match="notes.txt: is not of an interrupted conversion; move it"):
        converted(bf16, tmp_path / "out", quant="int4", shard_size=SHARD)
    assert (partial / "notes.txt").read_text() == "x"
    (partial / "notes.txt").unlink()
    converted(bf16, tmp_path / "out", quant="int4", shard_size=SHARD).close()


def test_half_a_record_is_not_published(bf16: Path, tmp_path: Path) -> None:
    """A process that is killed while it writes its record leaves it under another name."""
    partial = interrupted(bf16, tmp_path / "out")
    (partial / ".progress.json.123").write_bytes(b"{")
    with converted(bf16, tmp_path / "out", shard_size=SHARD) as folder:
        names = {path.name for path in folder.files}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("change", ["options", "original", "shard", "cut", "record", "half a record"])
def test_nothing_is_kept_of_another_conversion(change: str, bf16: Path, tmp_path: Path) -> None:
    """Other options, another model, a damaged shard and a damaged record each make a shard anew."""
    partial = interrupted(bf16, tmp_path / "out", quant="int8" if change == "options" else "int4")
    shard, record = first_shard(partial), partial / "progress.json"
    match change:
        case "original":
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
