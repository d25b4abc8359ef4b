"""A vision tower on its way from every format, with the language model or without it."""

import asyncio
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import deserialize

from gemma_wgpu.apps import cli
from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.fetch import hub
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.ops.layout import BLOCK, Layout
from gemma_wgpu.progress import Progress
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.convert import convert, default_quant
from gemma_wgpu.weights.folder import FolderCheckpoint
from gemma_wgpu.weights.gguf import GGUFCheckpoint
from gemma_wgpu.weights.hosted import HostedFolder
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.quantize import quantize
from gemma_wgpu.weights.summary import summarize
from tests.checkpoints import (
    CONFIG,
    HF_SEEING,
    SEEING,
    Raw,
    bfloat16,
    gguf_metadata,
    gguf_tensors,
    hf_tensors,
    mmproj_metadata,
    mmproj_tensors,
    same_bits,
    tower_values,
    write_gguf,
    write_hf,
)
from tests.disk import Bytes, Disk
from tests.vision import FOLDER
from tests.vocabulary import small_tokenizer_json

Kind = GGMLQuantizationType
Values = dict[str, NDArray[np.float32]]
Stored = dict[str, tuple[str, NDArray[np.generic]]]

TOWER = "vision_tower.vision_model."
PATCH = f"{TOWER}embeddings.patch_embedding.weight"
POSITION = f"{TOWER}embeddings.position_embedding.weight"
FC1, FC2 = (f"{TOWER}encoder.layers.1.mlp.{name}.weight" for name in ("fc1", "fc2"))
PROJECTION = "multi_modal_projector.mm_input_projection_weight"
SOFT_NORM = "multi_modal_projector.mm_soft_emb_norm.weight"


def used(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a tensor of Hugging Face's as the model uses it: a norm of Gemma's has a 1 more, matrices are rows of
    outputs with whole blocks of columns."""
    if value.ndim == 1:
        gemmas = "vision_tower" not in name and "norm" in name
        return value + np.float32(1) if gemmas else value
    if name == POSITION:
        return value
    rows = value.T if name == PROJECTION else value.reshape(len(value), -1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))


def check(model: Checkpoint, expected: Mapping[str, NDArray[np.float32]], *, within: float = 0) -> None:
    """The model has these tensors and no others, as close to what is `expected` as `within` says."""
    assert list(model.table) == sorted(expected, key=list(model.table).index)
    for name, value in expected.items():
        matrix = model.table[name].kind.is_matrix
        found = model.tensor(name).pack().dequantize() if matrix else model.values(name)
        if within:
            assert found.shape == used(name, value).shape
            np.testing.assert_allclose(found, used(name, value), rtol=within, atol=within * 1e-3, err_msg=name)
        else:
            assert same_bits(found, used(name, value)), name


def widened(bits: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return bfloat16, given as 16-bit numbers, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# The small model of transformers' own making.


@pytest.fixture(scope="module")
def original() -> Values:
    """Return the tensors in its file, by the names of the table, as the `safetensors` package reads them."""
    entries = deserialize((FOLDER / "model.safetensors").read_bytes())  # type: ignore[no-untyped-call]
    return {
        name.removeprefix("language_model."): widened(np.frombuffer(entry["data"], "<u2")).reshape(entry["shape"])
        for name, entry in entries
    }


def split(values: Values) -> tuple[Values, Values]:
    """Return the language model and the tower."""
    text = {name: value for name, value in values.items() if name.startswith("model.")}
    return text, {name: value for name, value in values.items() if name not in text}


def write_text(path: Path, config: Gemma3Config, values: Values) -> Path:
    """Write the language model in F32, as llama.cpp's converter does."""
    table = get_tensor_name_map(MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    raw: dict[str, Raw] = {}
    for name, value in values.items():
        stem = table.get_name(name.removesuffix(".weight"))
        raw[f"{stem}.weight"] = value + np.float32(1) if value.ndim == 1 else value, Kind.F32
    return write_gguf(path, gguf_metadata(config), raw)


@pytest.fixture(scope="module")
def text_gguf(original: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with open_checkpoint(FOLDER, vision=False) as model:
        return write_text(tmp_path_factory.mktemp("gguf") / "text.gguf", model.config, split(original)[0])


def test_hugging_face_folder(original: Values) -> None:
    with open_checkpoint(FOLDER) as model:
        assert model.config.vision.hidden_size == 288
        assert model.quantization == "bf16"
        assert model.nbytes == sum(2 * value.size for value in original.values())
        check(model, original)


def test_hugging_face_folder_without_its_tower(original: Values) -> None:
    text, _ = split(original)
    with open_checkpoint(FOLDER, vision=False) as model:
        assert model.config.vision is None
        assert model.nbytes == sum(2 * value.size for value in text.values())
        check(model, text)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("beside", [True, False])
def test_gguf_and_mmproj_equal_the_folder(
    kind: Kind, beside: bool, original: Values, text_gguf: Path, tmp_path: Path
) -> None:
    _, tower = split(original)
    with open_checkpoint(FOLDER) as folder:
        config = folder.config
    path = tmp_path / ("tiny-MMPROJ.gguf" if beside else "other.gguf")
    write_gguf(path, mmproj_metadata(config), mmproj_tensors(tower, kind), architecture="clip")
    (tmp_path / "text.gguf").symlink_to(text_gguf)
    with open_checkpoint(tmp_path / "text.gguf", vision=True if beside else str(path)) as model:
        ours, theirs = model.config.vision, config.vision
        # A GGUF says nothing about the tokens, so these are Gemma 3's; it has its eps in float32.
        assert replace(ours, tokens=theirs.tokens, layer_norm_eps=1e-6) == theirs
        assert ours.tokens.count == theirs.tokens.count
        assert model.files == (tmp_path / "text.gguf", path)
        assert model.quantization == "F32"  # that of the language model
        assert model.tensor(FC1).layout == {Kind.F32: Layout.F32, Kind.BF16: Layout.BF16, Kind.F16: Layout.F16}[kind]
        check(model, original, within=2**-11 if kind == Kind.F16 else 0)


def test_every_range_of_rows(original: Values) -> None:
    """Rows of a convolution and of a matrix that is stored the other way round are those of the whole."""
    with open_checkpoint(FOLDER) as model:
        for name in (PATCH, PROJECTION, FC1):
            whole = used(name, original[name])
            for start, stop in ((0, 2), (3, 8), (len(whole) - 1, len(whole))):
                assert same_bits(model.tensor(name).pack(start, stop).dequantize(), whole[start:stop])
            with pytest.raises(RequestError, match="do not exist"):
                model.tensor(name).pack(0, len(whole) + 1)


# Smaller ones, which can be changed in many ways.


@pytest.fixture
def values() -> Values:
    """Return weights that bfloat16 holds, in the table's order."""
    bits = {name: stored[1] for name, stored in hf_tensors(np.random.default_rng(30), "bfloat16").items()}
    text = {name: widened(value) for name, value in bits.items()}
    tower = tower_values(np.random.default_rng(31))
    return text | {name: (value.view(np.uint32) >> 16 << 16).view(np.float32) for name, value in tower.items()}


def stored(values: Values, rename: Callable[[str], str] = lambda name: name) -> Stored:
    return {rename(name): ("bfloat16", bfloat16(value)) for name, value in values.items()}


def hugging_face(folder: Path, values: Values, config: Mapping[str, object] = HF_SEEING) -> Path:
    write_hf(folder, config, stored(values))
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return folder


def write_mmproj(
    path: Path,
    values: Values,
    metadata: Mapping[str, object] | None = None,
    tensors: Mapping[str, Raw | None] | None = None,
    *,
    architecture: str = "clip",
) -> Path:
    """Write the tower with other metadata and tensors; None removes one."""
    keys = {key: value for key, value in (mmproj_metadata() | dict(metadata or {})).items() if value is not None}
    raw = {**mmproj_tensors(split(values)[1]), **(tensors or {})}
    return write_gguf(path, keys, {k: v for k, v in raw.items() if v is not None}, architecture=architecture)


@pytest.fixture
def gguf(values: Values, tmp_path: Path) -> Path:
    """Return a language model by itself."""
    return write_text(tmp_path / "tiny.gguf", CONFIG, split(values)[0])


def plain(name: str) -> str:
    return name


def of_the_hub(name: str) -> str:
    return f"language_model.{name}" if name.startswith("model.") else name


def of_transformers_5(name: str) -> str:
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{name.replace('vision_tower.vision_model.', 'vision_tower.')}"


def of_transformers_4(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


def without_the_inner_model(name: str) -> str:
    return of_the_hub(name).replace("vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize("rename", [plain, of_the_hub, of_transformers_5, of_transformers_4, without_the_inner_model])
def test_names_in_a_folder(rename: Callable[[str], str], values: Values, tmp_path: Path) -> None:
    write_hf(tmp_path, HF_SEEING, stored(values, rename), shards=2)
    with open_checkpoint(tmp_path) as model:
        check(model, values)
    with open_checkpoint(tmp_path, vision=False) as model:
        assert model.config == CONFIG
        check(model, split(values)[0])


def test_names_in_an_mmproj_are_llama_cpps(values: Values) -> None:
    """The table of the `gguf` package has the same names."""
    with_names = {spec.gguf: spec.shape for spec in _table(SEEING) if spec.tower}
    assert with_names == {name: array.shape for name, (array, _) in mmproj_tensors(split(values)[1]).items()}


def _table(config: Gemma3Config) -> list[Any]:
    from gemma_wgpu.models.gemma3 import tensors

    return tensors(config)


def test_an_mmproj_of_an_old_converter(values: Values, gguf: Path, tmp_path: Path) -> None:
    """It has the two matrices of the MLP, and their biases, by each other's names."""
    raw = mmproj_tensors(split(values)[1])
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    swapped = {re.sub("ffn_up|ffn_down", lambda match: other[match[0]], name): found for name, found in raw.items()}
    assert swapped["v.blk.1.ffn_down.weight"][0].shape == (52, 32)
    write_gguf(tmp_path / "mmproj-model-f16.gguf", mmproj_metadata(), swapped, architecture="clip")
    with open_checkpoint(gguf) as model:
        check(model, values)


def test_without_the_tower_beside_it(values: Values, gguf: Path, tmp_path: Path) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", values)
    with open_checkpoint(gguf, vision=False) as model:
        assert model.config.vision is None
        assert model.files == (gguf,)
        check(model, split(values)[0])
    mmproj.rename(tmp_path / "elsewhere.gguf")
    with open_checkpoint(gguf) as model:
        assert model.files == (gguf,)


def test_of_several_that_fit_the_first_is_taken(values: Values, gguf: Path, tmp_path: Path) -> None:
    for name in ("mmproj-b.gguf", "a-mmproj.gguf", "mmproj-a.gguf"):
        write_mmproj(tmp_path / name, values)
    (tmp_path / "a-mmproj.txt").write_text("x")
    with open_checkpoint(gguf) as model:
        assert model.files == (gguf, tmp_path / "a-mmproj.gguf")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a language model": (
        {"architecture": "gemma3"},
        "general.architecture is 'gemma3'; a file with a tower has clip",
    ),
    "a tower that hears": (
        {"metadata": {"clip.has_vision_encoder": False}},
        "clip.has_vision_encoder is false; the tower in this file does not read images",
    ),
    "another projector": (
        {"metadata": {"clip.projector_type": "mlp"}},
        "clip.projector_type is 'mlp'; that is no tower for a Gemma 3 model",
    ),
    "another projector by its new key": (
        {"metadata": {"clip.projector_type": None, "clip.vision.projector_type": "gemma3nv"}},
        "clip.vision.projector_type is 'gemma3nv'; that is no tower for a Gemma 3 model",
    ),
    "no projector": ({"metadata": {"clip.projector_type": None}}, "clip.projector_type is missing"),
    "a projector that is no text": ({"metadata": {"clip.projector_type": [1, 2]}}, "clip.projector_type is array"),
    "another model's": (
        {"metadata": {"clip.vision.projection_dim": 96}},
        "clip.vision.projection_dim is 96 where the language model has 64; take its own mmproj",
    ),
    "another model's by its projection": (
        {
            "metadata": {"clip.vision.projection_dim": None},
            "tensors": {"mm.input_projection.weight": (np.zeros((32, 96), np.float32), Kind.F32)},
        },
        "tensor 'mm.input_projection.weight' is 32 x 96 where the configuration makes it 32 x 64",
    ),
    "a projection the other way round": (
        {"tensors": {"mm.input_projection.weight": (np.zeros((64, 32), np.float32), Kind.F32)}},
        "tensor 'mm.input_projection.weight' is 64 x 32 where the configuration makes it 32 x 64",
    ),
    "no size": ({"metadata": {"clip.vision.embedding_length": None}}, "clip.vision.embedding_length is missing"),
    "an odd size": (
        {"metadata": {"clip.vision.attention.head_count": 5}},
        "clip.vision.attention.head_count is 5, which does not make heads that can be run",
    ),
    "patches that do not average": (
        {"metadata": {"clip.vision.projector.scale_factor": 5}},
        "clip.vision.projector.scale_factor is 5, which does not divide 12 patches",
    ),
    "a tensor less": (
        {"tensors": {"v.post_ln.bias": None}},
        "tensor 'v.post_ln.bias' is missing; the tower that reads images is not complete, and vision=False leaves it",
    ),
    "a tensor more": (
        {"tensors": {"v.blk.2.ln1.bias": (np.zeros(32, np.float32), Kind.F32)}},
        "tensor 'v.blk.2.ln1.bias' is not one that Gemma 3 has",
    ),
    "a flat patch": (
        {"tensors": {"v.patch_embd.weight": (np.zeros((32, 147), np.float32), Kind.F32)}},
        "tensor 'v.patch_embd.weight' is 32 x 147 where the configuration makes it 32 x 3 x 7 x 7",
    ),
    "fewer positions": (
        {"tensors": {"v.position_embd.weight": (np.zeros((143, 32), np.float32), Kind.F32)}},
        "tensor 'v.position_embd.weight' is 143 x 32 where the configuration makes it 144 x 32",
    ),
    "quantised positions": (
        {"tensors": {"v.position_embd.weight": (np.zeros((144, 34), np.uint8), Kind.Q8_0)}},
        f"tensor 'v.position_embd.weight' is Q8_0; {POSITION} must be plain floats",
    ),
    "a quantised projection": (
        {"tensors": {"mm.input_projection.weight": (np.zeros((32, 68), np.uint8), Kind.Q8_0)}},
        f"tensor 'mm.input_projection.weight' is Q8_0; {PROJECTION} must be plain floats",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tower_that_does_not_fit(wrong: str, values: Values, gguf: Path, tmp_path: Path) -> None:
    """If it was given, the error says why; if it was found, it is passed over, and the next one is taken."""
    changed, message = WRONG[wrong]
    given = write_mmproj(tmp_path / "a-mmproj.gguf", values, **changed)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(gguf, vision=given)
    assert str(caught.value).startswith(f"{given}: {message}")
    assert "\n" not in str(caught.value)
    with open_checkpoint(gguf) as model:
        assert (model.config.vision, model.files) == (None, (gguf,))
    fitting = write_mmproj(tmp_path / "b-mmproj.gguf", values)
    with open_checkpoint(gguf) as model:
        assert model.files == (gguf, fitting)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a GGUF file", None], ids=["empty", "cut", "text", "a folder"]
)
def test_a_tower_that_is_no_gguf(content: bytes | None, gguf: Path, tmp_path: Path) -> None:
    given = tmp_path / "mmproj.gguf"
    if content is None:
        given.mkdir()
    else:
        given.write_bytes(content)
    with pytest.raises(ModelError, match=f"^{given}: "):
        open_checkpoint(gguf, vision=given)
    with open_checkpoint(gguf) as model:
        assert model.files == (gguf,)


def test_a_tower_that_is_not_there(gguf: Path) -> None:
    with pytest.raises(ModelError, match=r"^none\.gguf: there is no such file; vision takes an mmproj file"):
        open_checkpoint(gguf, vision="none.gguf")


def test_a_tower_in_the_place_of_the_model(values: Values, tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "mmproj.gguf", values)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (f"{path}: this file has a tower only; give the file of the language model beside it")


def test_a_folder_takes_no_other_tower(values: Values, tmp_path: Path) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", values)
    folder = hugging_face(tmp_path / "hf", values)
    with open_checkpoint(folder) as model:
        convert(model, tmp_path / "ours")
    for path in (folder, tmp_path / "ours"):
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path, vision=mmproj)
        assert str(caught.value) == (
            f"{path}: vision is {mmproj}, but only a .gguf file takes its tower from another file"
        )


def test_the_quantisation_is_that_of_the_language_model(values: Values, tmp_path: Path) -> None:
    """The tower has more matrices of a kind than the language model has."""
    kinds = {spec.name: Kind.Q4_0 for spec in _table(CONFIG) if "mlp" in spec.name}
    tensors = gguf_tensors(np.random.default_rng(35), Kind.Q8_0, kinds=kinds)
    path = write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), tensors)
    write_gguf(
        tmp_path / "mmproj.gguf",
        mmproj_metadata(),
        mmproj_tensors(split(values)[1], Kind.F16),
        architecture="clip",
    )
    with open_checkpoint(path) as model:
        assert model.tensor(FC1).layout == Layout.F16
        assert model.quantization == "Q8_0"


def test_closing_lets_go_of_both_files(values: Values, gguf: Path, tmp_path: Path) -> None:
    write_mmproj(tmp_path / "mmproj.gguf", values)
    with open_checkpoint(gguf) as model:
        tensor = model.tensor(FC1)
    with pytest.raises(ModelError, match=r"mmproj\.gguf: the checkpoint is closed"):
        tensor.pack()


WORDS = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\0" * 7 + b"\x80", b"\0\0\0\x80"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a language model, and the bytes of a tower for it."""
    folder = tmp_path_factory.mktemp("fuzz")
    raw = gguf_tensors(np.random.default_rng(32), Kind.Q8_0)
    text = write_gguf(folder / "tiny.gguf", gguf_metadata(), raw)
    return text, write_mmproj(folder / "other.gguf", tower_values(np.random.default_rng(33))).read_bytes()


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage(pair: tuple[Path, bytes], data: st.DataObject) -> None:
    """Damage of any kind is found, or does no harm."""
    text, whole = pair
    content = bytearray(whole)
    at = st.integers(0, whole.rindex(b"mm.input_projection.weight") + 64)
    for place, value in data.draw(st.lists(st.tuples(at, st.binary(min_size=1, max_size=1) | WORDS), max_size=4)):
        content[place : place + len(value)] = value
    size = data.draw(st.none() | st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mmproj.gguf"
        path.write_bytes(content[:size])
        try:
            with open_checkpoint(text, vision=path) as model:
                for name, spec in model.table.items():
                    model.tensor(name).pack() if spec.kind.is_matrix else model.values(name)
        except ModelError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


# Folders of Hugging Face whose towers are damaged.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (POSITION, np.zeros((143, 32), np.float32), "is 143 x 32 where the configuration makes it 144 x 32"),
        (
            PATCH,
            np.zeros((32, 3, 7, 8), np.float32),
            "is 32 x 3 x 7 x 8 where the configuration makes it 32 x 3 x 7 x 7",
        ),
        (PROJECTION, np.zeros((64, 32), np.float32), "is 64 x 32 where the configuration makes it 32 x 64"),
        (FC2, np.zeros((52, 32), np.float32), "is 52 x 32 where the configuration makes it 32 x 52"),
        (SOFT_NORM, np.zeros(64, np.float32), "is 64 where the configuration makes it 32"),
        (FC1, np.zeros((52, 32), np.int8), "is I8; only F32, F16, BF16 can be read"),
        (f"{TOWER}encoder.layers.2.mlp.fc1.bias", np.zeros(52, np.float32), "is not one that Gemma 3 has"),
        (f"{TOWER}head.probe", np.zeros(32, np.float32), "is not one that Gemma 3 has"),
    ],
)
def test_a_damaged_tower_in_a_folder(
    name: str, value: NDArray[np.generic], message: str, values: Values, tmp_path: Path
) -> None:
    write_hf(tmp_path, HF_SEEING, stored(values) | {name: (str(value.dtype), value)})
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors'}: tensor '{name}' {message}")
    with open_checkpoint(tmp_path, vision=False) as model:
        check(model, split(values)[0])


@pytest.mark.parametrize("gone", [TOWER, "multi_modal_projector.", f"{TOWER}post_layernorm.bias"])
def test_a_folder_that_lacks_its_tower(gone: str, values: Values, tmp_path: Path) -> None:
    rest = {name: value for name, value in values.items() if not name.startswith(gone)}
    first = next(spec.name for spec in _table(SEEING) if spec.name.startswith(gone))
    write_hf(tmp_path, HF_SEEING, stored(rest))
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: tensor '{first}' is missing; the tower that reads images is not complete, and vision=False "
        "leaves it out"
    )
    with open_checkpoint(tmp_path, vision=False) as model:
        check(model, split(values)[0])


# Model folders.

SHARD = 6000  # small enough for the table of positions to be split


@pytest.fixture
def hf(values: Values, tmp_path: Path) -> Path:
    return hugging_face(tmp_path / "tiny-it", values)


def converted(original: Path, out: Path, *, vision: bool = True, **options: Any) -> FolderCheckpoint:
    with open_checkpoint(original, vision=vision) as model:
        convert(model, out, **options)
    opened = open_checkpoint(out)
    assert isinstance(opened, FolderCheckpoint)
    return opened


@pytest.mark.parametrize("shard_size", [SHARD, 1 << 30])
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_keeps_every_bit(suffix: str, shard_size: int, values: Values, hf: Path, gguf: Path, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "mmproj.gguf",
        mmproj_metadata(),
        mmproj_tensors(split(values)[1], Kind.BF16),
        architecture="clip",
    )
    path = hf if suffix == "safetensors" else gguf
    with (
        converted(path, tmp_path / "out", quant="keep", shard_size=shard_size) as folder,
        open_checkpoint(path) as model,
    ):
        assert folder.config == model.config
        for name, spec in folder.table.items():
            if spec.kind.is_matrix:
                packed, expected = folder.tensor(name).pack(), model.tensor(name).pack()
                assert (packed.layout, packed.rows, packed.cols) == (expected.layout, expected.rows, expected.cols)
                assert np.array_equal(packed.quants, expected.quants)
                assert np.array_equal(packed.scales, expected.scales)
        check(folder, values)
        positions = next(entry for entry in folder.manifest.tensors if entry.name == POSITION)
        assert (len(positions.parts) > 1) == (shard_size == SHARD)
        converted(tmp_path / "out", tmp_path / "again", quant="keep", shard_size=shard_size).close()
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "again")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.parametrize(
    ("quant", "tower", "layers", "rest"),
    [
        (None, None, Layout.INT8, Layout.F16),
        ("int4", None, Layout.INT8, Layout.F16),
        ("int4", "f16", Layout.F16, Layout.F16),
        ("int4-offset", None, Layout.INT8, Layout.F16),
        ("int8", None, Layout.INT8, Layout.F16),
        ("f16", None, Layout.F16, Layout.F16),
        ("f16", "int8", Layout.INT8, Layout.F16),
        ("keep", None, Layout.BF16, Layout.BF16),
        ("keep", "int8", Layout.INT8, Layout.BF16),
        ("keep", "f16", Layout.F16, Layout.BF16),
    ],
)
def test_quantises(
    quant: Any, tower: Any, layers: Layout, rest: Layout, values: Values, hf: Path, tmp_path: Path
) -> None:
    with converted(hf, tmp_path / "out", quant=quant, tower=tower, shard_size=SHARD) as folder:
        for name, spec in folder.table.items():
            if not spec.tower:
                continue
            if not spec.kind.is_matrix:
                assert same_bits(folder.values(name), used(name, values[name]))
                continue
            packed, layout = folder.tensor(name).pack(), rest if name in (PATCH, PROJECTION) else layers
            assert packed.layout == layout, name
            if layout == Layout.BF16:
                assert same_bits(packed.dequantize(), used(name, values[name]))
            else:
                expected = quantize(used(name, values[name]), layout)
                assert np.array_equal(packed.quants, expected.quants)
                assert np.array_equal(packed.scales, expected.scales)


def test_the_tower_has_shards_of_its_own(hf: Path, tmp_path: Path) -> None:
    with converted(hf, tmp_path / "out", quant="int8") as folder:
        shards = {entry.name: {part.shard for part in entry.parts} for entry in folder.manifest.tensors}
        assert {shard for name, found in shards.items() if not folder.table[name].tower for shard in found} == {0}
        assert {shard for name, found in shards.items() if folder.table[name].tower for shard in found} == {1}


def test_a_folder_without_its_tower(values: Values, hf: Path, tmp_path: Path) -> None:
    """The tower's shards may be missing."""
    out = tmp_path / "out"
    converted(hf, out, quant="keep").close()
    first, second = sorted(out.glob("*.safetensors"))
    second.unlink()
    with open_checkpoint(out, vision=False) as model:
        assert model.config == CONFIG
        assert set(model.files) == {out / "manifest.json", out / "config.json", out / "vocabulary.bin", first}
        assert model.nbytes == sum(entry.nbytes for entry in model.manifest.tensors if entry.name in model.table)  # type: ignore[attr-defined]
        check(model, split(values)[0])
        with pytest.raises(ModelError, match="Gemma 3 has no matrix"):
            model.tensor(FC1)
    with pytest.raises(ModelError, match=f"^{second}: there is no such file"):
        open_checkpoint(out)


def test_a_language_model_alone_is_the_same_folder(values: Values, hf: Path, tmp_path: Path) -> None:
    """It makes no difference whether the tower was left out, or was never there."""
    config = {"model_type": "gemma3", "text_config": HF_SEEING["text_config"]}
    text = hugging_face(tmp_path / "text" / "tiny-it", split(values)[0], config)
    converted(hf, tmp_path / "left-out", vision=False, shard_size=SHARD).close()
    converted(text, tmp_path / "text-only", shard_size=SHARD).close()
    folders = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("left-out", "text-only")
    ]
    assert folders[0] == folders[1]


def test_what_is_kept_unless_told_goes_by_the_language_model(values: Values, hf: Path, tmp_path: Path) -> None:
    with open_checkpoint(hf) as model:
        assert default_quant(model) == "int4"
    raw = gguf_tensors(np.random.default_rng(34), Kind.Q8_0)
    path = write_gguf(tmp_path / "quantised.gguf", gguf_metadata(), raw)
    write_mmproj(tmp_path / "mmproj.gguf", values)
    with open_checkpoint(path) as model:
        assert model.config.vision
        assert default_quant(model) == "keep"
    with converted(path, tmp_path / "out") as folder:
        assert folder.tensor(FC1).layout == Layout.F32
    text = write_text(tmp_path / "floats.gguf", CONFIG, split(values)[0])
    write_gguf(
        tmp_path / "mmproj.gguf",
        mmproj_metadata(),
        mmproj_tensors(split(values)[1]) | {"v.blk.0.attn_q.weight": (np.zeros((32, 34), np.uint8), Kind.Q8_0)},
        architecture="clip",
    )
    with open_checkpoint(text) as model:
        assert model.config.vision
        assert default_quant(model) == "int4"


def test_options_for_a_tower_that_cannot_be(values: Values, hf: Path, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^there is no such quantisation of a tower: 'int4'; choose int8 or f16$"):
        converted(hf, tmp_path / "out", tower="int4")
    with pytest.raises(
        RequestError, match=rf"^{gguf}: the model has no tower, so tower='int8' cannot be; leave it out$"
    ):
        converted(gguf, tmp_path / "out", tower="int8")
    assert not (tmp_path / "out").exists()


# Model folders on the web.


@pytest.mark.parametrize("vision", [True, False])
def test_on_the_web(vision: bool, values: Values, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tower, the shards that only it has are neither asked for nor counted."""
    out = tmp_path / "out"
    with converted(hf, out, quant="keep", shard_size=SHARD) as folder:
        manifest, language = folder.manifest, {name for name, spec in folder.table.items() if not spec.tower}
    numbers = range(len(manifest.shards)) if vision else manifest.shards_of(language)
    needed = [manifest.shards[number] for number in numbers]
    assert vision or len(needed) < len(manifest.shards)
    disk, seen = Disk(out), list[Progress]()
    monkeypatch.setattr(hub, "hosted", lambda name: disk)

    async def read() -> None:
        with await hub.open_model("https://somewhere", seen.append, vision=vision) as model:
            assert isinstance(model, HostedFolder)
            assert (model.config.vision is not None) == vision
            for name, spec in model.table.items():
                expected = used(name, values[name])
                if not spec.kind.is_matrix:
                    assert same_bits(await model.vector(name), expected)
                    continue
                found = b""
                async for _, quants, _ in model.tensor(name).words(0, len(expected)):
                    assert isinstance(quants, Bytes)
                    found += quants.data
                assert same_bits(widened(np.frombuffer(found, "<u2")).reshape(expected.shape), expected)

    asyncio.run(read())
    assert disk.loaded == ["config.json", "vocabulary.bin", *(shard.name for shard in needed)]
    total = sum(shard.nbytes for shard in needed)
    assert {step.total for step in seen} == {total}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[0].done, seen[-1].done) == (0, total)


def test_a_tower_from_elsewhere_on_the_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hosted", lambda name: Disk(tmp_path))
    with pytest.raises(ModelError, match="but only a .gguf file takes its tower from another file$"):
        asyncio.run(hub.open_model("https://somewhere", vision="mmproj.gguf"))


def test_opening_by_name(values: Values, gguf: Path, tmp_path: Path) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", values)

    async def files(vision: Any) -> tuple[Path, ...]:
        with await hub.open_model(gguf, vision=vision) as model:
            assert isinstance(model, GGUFCheckpoint)
            return model.files

    assert asyncio.run(files(True)) == asyncio.run(files(str(mmproj))) == (gguf, mmproj)
    assert asyncio.run(files(False)) == (gguf,)


# What it is made of.


def test_summary(original: Values) -> None:
    with open_checkpoint(FOLDER) as model, open_checkpoint(FOLDER, vision=False) as text:
        ours, theirs = summarize(model), summarize(text)
    assert ours.tower is not None
    assert theirs.tower is None
    tower = split(original)[1]
    assert ours.tower.parameters == sum(value.size for value in tower.values())
    [use] = ours.tower.matrices
    matrices = {name: used(name, value) for name, value in tower.items() if value.ndim > 1 and name != POSITION}
    assert (use.layout, use.tensors, use.nbytes) == (
        Layout.BF16,
        len(matrices),
        sum(2 * value.size for value in matrices.values()),
    )
    assert ours.tower.vector_bytes == sum(4 * value.size for name, value in tower.items() if name not in matrices)
    assert ours.nbytes == theirs.nbytes + ours.tower.nbytes
    assert ours.file_bytes == theirs.file_bytes + sum(2 * value.size for value in tower.values())
    figures = ("parameters", "embedding", "matrices", "vector_bytes", "bits_per_weight", "quantization")
    assert all(getattr(ours, figure) == getattr(theirs, figure) for figure in figures)


def test_inspect(original: Values) -> None:
    result = CliRunner().invoke(cli.main, ["inspect", str(FOLDER)])
    assert result.exit_code == 0, result.output
    text, tower = split(original)
    lines = dict(re.findall(r"^ {3}(.{16}) (.*)$", result.output, re.MULTILINE))
    lines = {name.strip(): value for name, value in lines.items()}
    assert lines["parameters"] == f"{sum(value.size for value in text.values()):,}"
    assert lines["tower"].startswith(
        f"{sum(value.size for value in tower.values()):,} parameters, 14 matrices in BF16, "
    )
