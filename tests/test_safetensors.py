import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.opening import open_checkpoint
from tests.checkpoints import CONFIG, HF_CONFIG, hf_tensors, same_bits, write_hf, write_safetensors
from tests.table import matrix_shapes, norm_shapes

Tensors = dict[str, tuple[str, NDArray[np.generic]]]

LAYOUTS = {"float32": Layout.F32, "float16": Layout.F16, "bfloat16": Layout.BF16}
QUANTIZATIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def tensors(dtype: str = "bfloat16") -> Tensors:
    return hf_tensors(np.random.default_rng(12), dtype)


def widened(dtype: str, bits: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the values as float32; a bfloat16 is the upper half of one."""
    if dtype != "bfloat16":
        return bits.astype(np.float32)
    halves = np.zeros((*bits.shape, 2), "<u2")
    halves[..., 1] = bits
    return halves.view("<f4")[..., 0]


def check(folder: Path, expected: Tensors, *, prefix: str = "model.", vision: bool = True) -> None:
    """An opened folder has the tensors that were written under names that begin with `prefix`."""
    with open_checkpoint(folder, vision=vision) as checkpoint:
        for name, shape in matrix_shapes(CONFIG).items():
            dtype, bits = expected[name.replace("model.", prefix)]
            tensor = checkpoint.tensor(name)
            assert (tensor.name, tensor.shape, tensor.layout) == (name, shape, LAYOUTS[dtype])
            assert same_bits(tensor.pack().dequantize(), widened(dtype, bits))
            assert same_bits(tensor.pack(3, 6).dequantize(), widened(dtype, bits)[3:6])
        for name in norm_shapes(CONFIG):
            factor = np.float32(1) + widened(*expected[name.replace("model.", prefix)])
            assert same_bits(checkpoint.values(name), factor)


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    written = tensors(dtype)
    folder = write_hf(tmp_path / "tiny-it", HF_CONFIG, written)
    check(folder, written)
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.path, checkpoint.name, checkpoint.config) == (folder, "tiny-it", CONFIG)
        assert checkpoint.quantization == QUANTIZATIONS[dtype]
        assert checkpoint.nbytes == sum(bits.nbytes for _, bits in written.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_as_the_safetensors_package_reads_it(dtype: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors(dtype))
    theirs = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        for name in matrix_shapes(CONFIG):
            assert same_bits(checkpoint.tensor(name).pack().dequantize(), theirs[name].astype(np.float32))


def test_shards(tmp_path: Path) -> None:
    written = tensors()
    check(write_hf(tmp_path, HF_CONFIG, written, shards=3), written)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_hf(tmp_path, HF_CONFIG, hf_tensors(np.random.default_rng(13), "float32"), shards=2)
    written = tensors()
    check(write_hf(tmp_path, HF_CONFIG, written), written)


@pytest.mark.parametrize(
    ("prefix", "vision", "head"),
    [
        ("language_model.model.", "vision_tower.", "language_model.lm_head.weight"),
        ("model.language_model.", "model.vision_tower.", "lm_head.weight"),
    ],
)
def test_multimodal(prefix: str, vision: str, head: str, tmp_path: Path) -> None:
    """Text tensors have a prefix in their names, the head is there, and a tower of any kind can be left out."""
    config = {"model_type": "gemma3", "text_config": HF_CONFIG, "vision_config": {"model_type": "other"}}
    written = {name.replace("model.", prefix): value for name, value in tensors().items()}
    written[vision + "encoder.weight"] = "int64", np.zeros((3, 5), np.int64)
    written[vision.replace("vision_tower", "multi_modal_projector") + "scale"] = "float32", np.ones(2, np.float32)
    written[head] = written[prefix + "embed_tokens.weight"]
    check(write_hf(tmp_path, config, written), written, prefix=prefix, vision=False)
    with open_checkpoint(tmp_path, vision=False) as checkpoint:
        assert checkpoint.nbytes == sum(bits.nbytes for _, bits in tensors().values())
    assert refused(tmp_path, "config.json").startswith("vision_config.model_type is 'other'")


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    """The format does not align the data: here they begin at a byte that is no multiple of four."""
    written = tensors()
    folder = write_hf(tmp_path, HF_CONFIG, written)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for spaces in (1, 2, 3):
        path.write_bytes(
            (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces + content[8 + length :]
        )
        check(folder, written)
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.tensor("model.embed_tokens.weight").pack(1, 3).quants.flags.aligned


def test_a_range_is_a_view_of_the_file(tmp_path: Path) -> None:
    with open_checkpoint(write_hf(tmp_path, HF_CONFIG, tensors())) as checkpoint:
        packed = checkpoint.tensor("model.embed_tokens.weight").pack(2, 4)
    assert not packed.quants.flags.owndata
    assert not packed.quants.flags.writeable
    assert packed.scales.size == 0


def test_closed(tmp_path: Path) -> None:
    with open_checkpoint(write_hf(tmp_path, HF_CONFIG, tensors(), shards=2)) as checkpoint:
        tensor = checkpoint.tensor("model.embed_tokens.weight")
    with pytest.raises(ModelError, match=r"\.safetensors: the checkpoint is closed"):
        tensor.pack()


def test_a_relative_path_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_hf(tmp_path / "tiny-it", HF_CONFIG, tensors()))
    with open_checkpoint(".") as checkpoint:
        assert checkpoint.name == "tiny-it"


def test_tokenizer_is_the_folders(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors())
    with open_checkpoint(folder) as checkpoint:
        with pytest.raises(RequestError, match=r"tokenizer\.json: there is no such file"):
            checkpoint.tokenizer().encode("text")
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match=r"tokenizer\.json: "):
            checkpoint.tokenizer()


# What is wrong with a folder is said in one line that names the file.


def refused(folder: Path, file: str = "") -> str:
    """Return the message after the name of `file` in the folder, or of the folder itself."""
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    start = f"{folder / file}: "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


def test_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith("there is no such file or folder")


def test_missing_config(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors())
    (folder / "config.json").unlink()
    assert refused(folder).startswith(
        "there is no config.json in this folder; give a Hugging Face model folder, or a .gguf"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this is not valid JSON"),
        (b'{"model_type": ', "this is not valid JSON"),
        (b"\xff\xfe\xfd", "this is not valid JSON"),
        (b"[" * 100_000, "this is not valid JSON"),
        (b"[1, 2]", "this is not a JSON object"),
        (b'{"model_type": "llama"}', "model_type is 'llama'; only gemma3, gemma3_text, gemma3n,"),
        (
            json.dumps(HF_CONFIG | {"quantization_config": {"quant_method": "awq"}}).encode(),
            "quantization_config is set",
        ),
    ],
)
def test_bad_config(content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors())
    (folder / "config.json").write_bytes(content)
    assert refused(folder, "config.json").startswith(message)


def test_no_weights(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors())
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith(
        "there is neither model.safetensors nor model.safetensors.index.json in this folder"
    )


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors(), shards=2)
    (folder / SECOND).unlink()
    assert refused(folder, SECOND) == f"there is no such file, but {INDEX} lists it; download this shard"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "it has no weight_map"),
        ({"weight_map": {}}, "it has no weight_map"),
        ({"weight_map": [FIRST]}, "it has no weight_map"),
        ({"weight_map": {"a": 3}}, "3 in weight_map is not the name of a safetensors file"),
        ({"weight_map": {"a": ["x"]}}, "['x'] in weight_map is not the name of a safetensors file"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "'../other/model.safetensors' in weight_map"),
        ({"weight_map": {"a": ""}}, "'' in weight_map is not the name of a safetensors file"),
        ({"weight_map": {"a": ".."}}, "'..' in weight_map is not the name of a safetensors file"),
        ({"weight_map": {"a": "x\0"}}, r"'x\x00' in weight_map is not the name of a safetensors file"),
        ([], "this is not a JSON object"),
    ],
)
def test_bad_index(index: object, message: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors(), shards=2)
    (folder / INDEX).write_text(json.dumps(index))
    assert refused(folder, INDEX).startswith(message)


@pytest.mark.parametrize("cut", [1, 2**13])
def test_shard_cut_short(cut: int, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors(), shards=2)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - cut)
    message = refused(folder, SECOND)
    assert message.startswith("this is not a whole safetensors file (")
    assert message.endswith("; download it again")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_header_cut_short(size: int, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors())
    os.truncate(folder / "model.safetensors", size)
    message = refused(folder, "model.safetensors")
    assert message.startswith("the file is empty" if size == 0 else "this is not a whole safetensors file (")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, HF_CONFIG, tensors(), shards=2)
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())
    message = refused(folder, SECOND)
    assert message.endswith(f"is in {FIRST} too; these shards are not of one model")


def changed(folder: Path, name: str, value: tuple[str, NDArray[np.generic]] | None) -> Path:
    """Write a folder of one file in which a tensor is another one, or is missing if `value` is None."""
    written = tensors() | ({} if value is None else {name: value})
    if value is None:
        del written[name]
    return write_hf(folder, HF_CONFIG, written)


def test_missing_tensor(tmp_path: Path) -> None:
    folder = changed(tmp_path, "model.layers.1.mlp.up_proj.weight", None)
    assert refused(folder).startswith("tensor 'model.layers.1.mlp.up_proj.weight' is missing")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model.layers.0.self_attn.k_proj.weight",
            ("float16", np.zeros((64, 32), np.float16)),
            "is 64 x 32 where the configuration makes it 32 x 64",
        ),
        ("model.norm.weight", ("float32", np.zeros((), np.float32)), "has the impossible shape a scalar"),
        (
            "model.layers.0.mlp.up_proj.weight",
            ("int8", np.zeros((128, 64), np.int8)),
            "is I8; only F32, F16, BF16 can be read",
        ),
        ("model.layers.0.mlp.up_proj.scale", ("float32", np.ones(1, np.float32)), "is not one that Gemma 3 has"),
        ("lm_head.weight", ("float32", np.zeros((96, 64), np.float32)), "is a head apart from the embedding"),
        ("lm_head.weight", ("bfloat16", np.zeros((96, 64), np.uint16)), "is a head apart from the embedding"),
    ],
)
def test_tensors_that_cannot_be_used(
    name: str, value: tuple[str, NDArray[np.generic]], message: str, tmp_path: Path
) -> None:
    assert refused(changed(tmp_path, name, value), "model.safetensors").startswith(f"tensor '{name}' {message}")


def test_errors_name_tensors_as_the_file_does(tmp_path: Path) -> None:
    written: Tensors = {name.replace("model.", "language_model.model."): value for name, value in tensors().items()}
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    written[name] = "bfloat16", np.zeros((127, 64), np.uint16)
    folder = write_hf(tmp_path, {"model_type": "gemma3", "text_config": HF_CONFIG}, written)
    assert refused(folder, "model.safetensors").startswith(f"tensor '{name}' is 127 x 64")


def test_rows_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=48)
    folder = write_hf(
        tmp_path, HF_CONFIG | {"hidden_size": 48}, hf_tensors(np.random.default_rng(0), "float16", config)
    )
    assert refused(folder, "config.json") == "hidden_size is 48; only multiples of 32 can be run"


def test_a_safetensors_file_by_itself(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", tensors())
    assert refused(path) == "this is not a GGUF file: it looks like safetensors; give the folder that it is in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("fuzz"), HF_CONFIG, tensors())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage(folder: Path, data: st.DataObject) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    at = st.integers(0, header)
    for place, byte in data.draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=4)):
        content[place] = byte
    size = data.draw(st.none() | st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as name:
        damaged = Path(name)
        (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
        (damaged / "model.safetensors").write_bytes(content[:size])
        use(damaged)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_config(folder: Path, data: st.DataObject) -> None:
    content = bytearray((folder / "config.json").read_bytes())
    places = st.integers(0, len(content) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)):
        content[place] = byte
    with tempfile.TemporaryDirectory() as name:
        damaged = Path(name)
        (damaged / "config.json").write_bytes(content)
        (damaged / "model.safetensors").symlink_to(folder / "model.safetensors")
        use(damaged)


def use(path: Path) -> None:
    try:
        with open_checkpoint(path) as checkpoint:
            for name in matrix_shapes(checkpoint.config):
                checkpoint.tensor(name).pack()
            for name in norm_shapes(checkpoint.config):
                checkpoint.values(name)
    except ModelError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
