"""Loading and logits, against the architecture written once more in numpy."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

import gemma_wgpu.gemma
from gemma_wgpu import DeviceError, Gemma, ModelError, Options, Progress, RequestError, load, load_async
from gemma_wgpu.gemma import expected_bytes
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.gpu.device import Adapter, Buffer, Device, Dispatch
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.weights.opening import open_checkpoint
from tests.table import EMBEDDING
from tests.tiny import (
    DAMAGES,
    HF,
    PIECES,
    random_gguf,
    random_weights,
    reference_attention,
    reference_logits,
    write_damaged,
    write_folder,
)

CONFIG = Gemma3Config.from_hf(HF)
WEIGHTS = random_weights(CONFIG)
IDS = [2, *np.random.default_rng(7).integers(6, len(PIECES), 99).tolist()]  # the window is 8
EXPECTED = reference_logits(CONFIG, WEIGHTS, IDS)
F32, F16 = 1e-4, 1e-2  # of the largest logit


def error(logits: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """The largest error as a part of the largest logit; NaN if there is a NaN."""
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    return float(np.max(np.abs(logits - expected)) / np.max(np.abs(expected)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", HF, WEIGHTS)


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32") as gemma:
        yield gemma


def test_the_reference_notices() -> None:
    """Every part of the architecture that the tests below vouch for moves its logits."""
    for changes in (
        {"sliding_window": 9},
        {"sliding_window_pattern": 2},
        {"rope_theta": 2e6},
        {"rope_local_base_freq": 2e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"query_pre_attn_scalar": 40},
        {"rms_norm_eps": 1e-2},
    ):
        changed = reference_logits(Gemma3Config.from_hf(HF | changes), WEIGHTS, IDS)
        assert error(changed.astype(np.float32), EXPECTED) > 10 * F32, changes
    for name in WEIGHTS:
        other = WEIGHTS | {name: WEIGHTS[name][::-1]}
        assert error(reference_logits(CONFIG, other, IDS[:20]).astype(np.float32), EXPECTED[:20]) > 10 * F32, name


@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 17, 33, 100])
def test_logits_in_f32(gemma: Gemma, length: int) -> None:
    assert error(gemma.logits(IDS[:length]), EXPECTED[:length]) < F32


@pytest.mark.parametrize("chunk", [1, 5, 8, 50])
def test_logits_however_the_prompt_is_cut(folder: Path, chunk: int) -> None:
    with load(folder, precision="f32", prefill_chunk=chunk) as gemma:
        assert error(gemma.logits(IDS), EXPECTED) < F32
        assert error(gemma.logits(IDS, last=7), EXPECTED[-7:]) < F32


@pytest.mark.parametrize("chunk", [1, 512])
def test_logits_in_f16(folder: Path, chunk: int) -> None:
    with load(folder, precision="f16", prefill_chunk=chunk) as gemma:
        assert gemma.precision == "f16"
        away = error(gemma.logits(IDS), EXPECTED)
        assert F32 < away < F16
        text = gemma.generate(IDS[:40], temperature=0, max_new_tokens=8)
        assert len(list(text)) >= 8


@pytest.mark.parametrize("last", [1, 3, 99, 100])
def test_the_last_logits(gemma: Gemma, last: int) -> None:
    everything = gemma.logits(IDS)
    gemma.reset()
    assert np.array_equal(gemma.logits(IDS, last=last), everything[-last:])


@pytest.mark.parametrize("last", [0, -1, 6])
def test_more_logits_than_there_are(gemma: Gemma, last: int) -> None:
    with pytest.raises(RequestError, match=f"^last is {last}; it must be a whole number from 1 to 5$"):
        gemma.logits(IDS[:5], last=last)


def test_logits_of_what_was_generated(gemma: Gemma) -> None:
    """Decoding past 5 windows chooses what the reference does, its ties aside."""
    ids = IDS[:20]
    text = gemma.generate(ids, temperature=0, max_new_tokens=60)
    for _ in text:
        pass
    ids = [*ids, *text.ids]
    expected = reference_logits(CONFIG, WEIGHTS, ids)[19:-1]
    chosen = np.take_along_axis(expected, np.array(text.ids)[:, None], axis=1)[:, 0]
    assert np.all(chosen > expected.max(axis=1) - 1e-3)


def test_async_gives_the_same(folder: Path, gemma: Gemma) -> None:
    async def loaded() -> NDArray[np.float32]:
        with await load_async(folder, precision="f32") as other:
            return await other.logits_async(IDS[:17], last=3)

    assert np.array_equal(asyncio.run(loaded()), gemma.logits(IDS[:17], last=3))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33, 100])
def test_attention(gemma: Gemma, length: int) -> None:
    expected = reference_attention(CONFIG, WEIGHTS, IDS[:length])
    for layer in range(CONFIG.num_hidden_layers):
        shares = gemma.attention(IDS[:length], layer)
        assert shares.dtype == np.float32
        assert shares.shape == (4, length, length)
        assert np.max(np.abs(shares - expected[layer])) < 1e-5


def test_attention_in_f16(folder: Path) -> None:
    with load(folder, precision="f16") as gemma:
        away = np.max(np.abs(gemma.attention(IDS, 2) - reference_attention(CONFIG, WEIGHTS, IDS)[2]))
        assert 1e-5 < away < 5e-2


def test_wgsl_of_ones_own(gemma: Gemma) -> None:
    device = gemma.device
    source = """
        override AMOUNT: u32;
        @group(0) @binding(0) var<storage, read_write> numbers: array<u32>;
        @compute @workgroup_size(1)
        fn main(@builtin(global_invocation_id) id: vec3u) { numbers[id.x] += AMOUNT; }
    """
    numbers = device.upload(np.arange(4, dtype=np.uint32), "numbers")
    add = device.compile("add", source, {"AMOUNT": 7})
    device.submit([device.record([Dispatch(add, (numbers,), (4, 1, 1))])])
    assert device.wait(read_words(device, numbers)) == [7, 8, 9, 10]
    numbers.destroy()


async def read_words(device: Device, buffer: Buffer) -> list[int]:
    return [int(word) for word in (await device.read(buffer)).view(np.uint32)]


@pytest.mark.parametrize("layer", [-1, 3, 1.0, True])
def test_attention_of_a_layer_that_there_is_not(gemma: Gemma, layer: int) -> None:
    with pytest.raises(RequestError, match=f"^layer is {layer}; it must be a whole number from 0 to 2$"):
        gemma.attention(IDS, layer)


def test_attention_of_more_than_a_chunk(folder: Path) -> None:
    with load(folder, prefill_chunk=9) as gemma:
        assert gemma.attention(IDS[:9], 0).shape == (4, 9, 9)
        with pytest.raises(RequestError, match="10"):
            gemma.attention(IDS[:10], 0)


def test_generation_goes_on_after_attention(gemma: Gemma) -> None:
    before = gemma.logits(IDS[:17])
    gemma.attention(IDS[:40], 1)
    assert np.array_equal(gemma.logits(IDS[:17]), before)


def test_rope_scaling(tmp_path: Path) -> None:
    """Positions of global layers divided by 8, in both formats, which name it differently."""
    hf = HF | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = Gemma3Config.from_hf(hf)
    expected = reference_logits(config, WEIGHTS, IDS)
    assert error(expected.astype(np.float32), EXPECTED) > F16
    write_folder(tmp_path / "hf", hf, WEIGHTS)
    random_gguf(tmp_path / "tiny.gguf", config, {})
    for path in (tmp_path / "hf", tmp_path / "tiny.gguf"):
        with load(path, precision="f32") as gemma:
            assert error(gemma.logits(IDS), expected) < F32


def test_a_context_that_decode_shares_out(tmp_path: Path) -> None:
    """Over 512 positions of a global layer several workgroups attend to shares of them."""
    hf = HF | {"max_position_embeddings": 640}
    config = Gemma3Config.from_hf(hf)
    ids = [2, *np.random.default_rng(8).integers(6, len(PIECES), 599).tolist()]
    expected = reference_logits(config, WEIGHTS, ids)
    with load(write_folder(tmp_path / "long", hf, WEIGHTS), precision="f32", prefill_chunk=1) as gemma:
        assert any("attention_combine" in name for name in shaders(gemma))
        assert error(gemma.logits(ids), expected) < F32


def shaders(gemma: Gemma) -> list[str]:
    text = gemma.generate([2], max_new_tokens=1)
    assert len(list(text)) >= 1
    return [key[0] for key in gemma.device._pipelines]  # type: ignore[misc]


# Every kind that can be read; with two kinds to a stack (q, k, v and gate, up) it is in two parts and not fused.
_QUANTIZED = {
    EMBEDDING: Kind.Q8_0,
    "model.layers.0.self_attn.q_proj.weight": Kind.Q4_K,
    "model.layers.0.self_attn.k_proj.weight": Kind.Q5_0,
    "model.layers.0.self_attn.v_proj.weight": Kind.Q6_K,
    "model.layers.0.self_attn.o_proj.weight": Kind.Q4_0,
    "model.layers.0.mlp.gate_proj.weight": Kind.Q4_1,
    "model.layers.0.mlp.up_proj.weight": Kind.Q4_K,
    "model.layers.0.mlp.down_proj.weight": Kind.Q6_K,
    "model.layers.1.self_attn.q_proj.weight": Kind.Q4_0,
    "model.layers.1.self_attn.k_proj.weight": Kind.Q4_0,
    "model.layers.1.self_attn.v_proj.weight": Kind.Q4_0,
    "model.layers.1.self_attn.o_proj.weight": Kind.F16,
    "model.layers.1.mlp.gate_proj.weight": Kind.Q4_K,
    "model.layers.1.mlp.up_proj.weight": Kind.Q4_K,
    "model.layers.1.mlp.down_proj.weight": Kind.BF16,
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float64]]:
    changes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    config = Gemma3Config.from_hf(HF | changes | {"query_pre_attn_scalar": 64, "sliding_window_pattern": 2})
    path = tmp_path_factory.mktemp("quantized") / "quantized.gguf"
    return path, reference_logits(config, random_gguf(path, config, _QUANTIZED), IDS[:24])


@pytest.mark.parametrize("chunk", [1, 512])
def test_every_kind_of_weight(quantized: tuple[Path, NDArray[np.float64]], chunk: int) -> None:
    path, expected = quantized
    with load(path, precision="f32", prefill_chunk=chunk) as gemma:
        assert error(gemma.logits(IDS[:24]), expected) < F32


def test_what_a_model_says_of_itself(gemma: Gemma, quantized: tuple[Path, NDArray[np.float64]]) -> None:
    assert gemma.name == "tiny"
    assert gemma.quantization == "f32"
    assert gemma.precision == "f32"
    assert gemma.activations == "float"
    assert isinstance(gemma.config, Gemma3Config) and gemma.config == CONFIG
    assert gemma.context_length == 128
    assert repr(gemma) == f"<Gemma 'tiny', f32, f32, on {gemma.device.info}>"
    assert gemma.tokenizer.vocab_size == len(PIECES)
    with load(quantized[0], precision="auto", context_length=32) as other:
        on_cpu = other.device.info.type == "CPU"
        assert other.precision == ("f16" if "shader-f16" in other.device.features and not on_cpu else "f32")
        assert other.activations == "float"
        assert other.context_length == 32
        assert other.name == "Tiny"


def test_what_a_notebook_shows(gemma: Gemma) -> None:
    shown = gemma._repr_html_()
    assert "<b>tiny</b>" in shown
    assert str(gemma.device.info) in shown
    assert gemma.device.info.type in gemma.device._repr_html_()
    text = gemma.generate([2], max_new_tokens=3, seed=1)
    assert "Nothing has been generated yet" in text._repr_html_()
    text.request.text = "a < b"
    list(text)
    assert "a &lt; b" in text._repr_html_()
    assert "3 new ones" in text._repr_html_()


def fill(gemma: Gemma) -> None:
    """Generate until the context is full."""
    gemma.generate(IDS[:40], options=Options(temperature=0, ignore_eos=True)).result()


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_bytes_on_the_gpu(folder: Path, precision: str) -> None:
    """They are what was expected, and the cache is full only when the context is."""
    itemsize = 2 if precision == "f16" else 4
    with load(folder, precision=precision) as gemma, open_checkpoint(folder) as weights:
        adapter = Adapter(gemma.device.info, gemma.device.limits, gemma.device.features)
        expected = expected_bytes(adapter, weights, half=precision == "f16", context_length=128)
        stored = sum(values.nbytes for values in WEIGHTS.values())
        assert stored <= gemma.gpu_bytes["weights"] == expected["weights"] <= 1.01 * stored
        positions = 2 * (8 + 32) + 128  # two layers keep a window and what they can go back, one the context
        row = CONFIG.num_key_value_heads * CONFIG.head_dim * itemsize
        ropes = 2 * 128 * CONFIG.head_dim * 4
        assert expected["cache"] == 2 * row * positions + ropes
        fill(gemma)
        assert gemma.gpu_bytes == expected
        assert sum(gemma.gpu_bytes.values()) <= gemma.device.allocated <= sum(expected.values()) + 64


def test_the_cache_grows_with_need(tmp_path: Path) -> None:
    hf = HF | {"max_position_embeddings": 2048, "sliding_window": 512}
    with load(write_folder(tmp_path / "long", hf, WEIGHTS), precision="f32") as gemma:
        row = 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
        sizes = []
        for length in (20, 100, 300, 600, 1500):
            gemma.generate([2] + IDS[1:] * 15, max_new_tokens=1)  # begins nothing
            gemma.logits(([2] + IDS[1:] * 16)[:length], last=1)
            sizes.append(gemma.runner.cache.nbytes // row)
        # There is half as much again as the text needs, but at most a window of 512 and 32 to go back for two layers,
        # and the context for the third one.
        assert sizes == [3 * 192, 3 * 192, 2 * 544 + 768, 2 * 544 + 1536, 2 * 544 + 2048]


def test_logit_rows_from_nowhere(gemma: Gemma) -> None:
    async def rows(first: int) -> None:
        async for _ in gemma.logit_rows(IDS[:5], first=first):
            pass

    for first in (-1, 5):
        with pytest.raises(RequestError, match=f"^first is {first}; it must be a whole number from 0 to 4$"):
            asyncio.run(rows(first))


def test_progress_goes_to_the_end(folder: Path, quantized: tuple[Path, NDArray[np.float64]]) -> None:
    for path in (folder, quantized[0]):
        seen: list[Progress] = []
        load(path, precision="f32", progress=seen.append).close()
        done = [at.done for at in seen]
        assert done == sorted(done)
        assert len(done) > 4
        assert {(at.what, at.total, at.unit) for at in seen} == {("loading", done[-1], "bytes")}


def test_close(folder: Path) -> None:
    with load(folder, precision="f32") as gemma:
        text = gemma.generate(IDS[:4], temperature=0)
        next(text)
        device = gemma.device
    assert device.allocated == 0
    gemma.close()
    with pytest.raises(DeviceError):
        next(text)
    with pytest.raises(DeviceError):
        next(gemma.generate("a"))
    with pytest.raises(DeviceError):
        next(gemma.chat("a"))
    with pytest.raises(DeviceError):
        gemma.logits([2])
    with pytest.raises(DeviceError):
        asyncio.run(gemma.logits_async([2]))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("precision", "f64", "precision is 'f64'; it must be one of auto, f16, f32"),
        ("precision", None, "precision is None; it must be one of auto, f16, f32"),
        ("activations", "int4", "activations is 'int4'; it must be one of float, int8"),
        ("context_length", 0, "context_length is 0; it must be a whole number from 1 to 128"),
        ("context_length", 129, "context_length is 129; it must be a whole number from 1 to 128"),
        ("context_length", 64.0, "context_length is 64.0; it must be a whole number from 1 to 128"),
        ("context_length", True, "context_length is True; it must be a whole number from 1 to 128"),
        ("prefill_chunk", 0, "prefill_chunk is 0; it must be a whole number from 1 to 65,535"),
        ("prefill_chunk", 65_536, "prefill_chunk is 65536; it must be a whole number from 1 to 65,535"),
        ("prefill_chunk", "8", "prefill_chunk is '8'; it must be a whole number from 1 to 65,535"),
    ],
)
def test_options_that_are_wrong(folder: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        load(folder, **{option: value})  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_f16_of_a_gpu_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without() -> Device:
        device = open_device_sync()
        device.features -= {"shader-f16"}
        return device

    monkeypatch.setattr(gemma_wgpu.gemma, "open_device_sync", without)
    with pytest.raises(DeviceError, match="has no shader-f16; use precision='f32' or 'auto'$") as raised:
        load(folder, precision="f16")
    assert "\n" not in str(raised.value)
    with load(folder, precision="auto") as gemma:
        assert gemma.precision == "f32"


def test_a_gpu_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> Device:
        device = open_device_sync()
        device.limits = replace(device.limits, max_storage_buffer_binding_size=10_000)
        return device

    monkeypatch.setattr(gemma_wgpu.gemma, "open_device_sync", small)
    with pytest.raises(
        DeviceError, match=r"binds at most 10,000\..* model \(tiny has 1 MB of weights to hold on the GPU\)$"
    ) as raised:
        load(folder)
    assert raised.value._render_traceback_() == [f"DeviceError: {raised.value}"]


def test_a_device_is_closed_when_loading_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Device] = []

    def noted() -> Device:
        opened.append(open_device_sync())
        return opened[-1]

    monkeypatch.setattr(gemma_wgpu.gemma, "open_device_sync", noted)
    with pytest.raises(ModelError):
        load(tmp_path / "nothing.gguf")
    (device,) = opened
    with pytest.raises(DeviceError):
        device.upload(np.ones(4, np.float32), "late")


@pytest.mark.parametrize("damage", DAMAGES)
def test_models_that_are_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tiny.gguf"
    named = write_damaged(path, damage)
    with pytest.raises(ModelError) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert named in message
    assert "\n" not in message
