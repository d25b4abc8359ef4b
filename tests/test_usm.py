"""The configuration and the table of Gemma 3n's audio encoder, and what is derived from its weights at loading."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import MODEL_ARCH, get_tensor_name_map
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.gpu.device import Adapter, AdapterInfo, Buffer, Data, Held, Limits
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.models.usm import TOWER, Usm, UsmConfig, tensors
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.quantize import quantize
from gemma_wgpu.weights.upload import Upload

# This is published with google/gemma-3n-E2B-it: the keys that matter, and some that do not.
HF: dict[str, Any] = {
    "model_type": "gemma3n",
    "audio_soft_tokens_per_image": 188,
    "audio_token_id": 262_273,
    "boa_token_id": 256_000,
    "eoa_token_id": 262_272,
    "audio_config": {
        "model_type": "gemma3n_audio",
        "conf_attention_chunk_size": 12,
        "conf_attention_context_left": 13,
        "conf_attention_context_right": 0,
        "conf_attention_logit_cap": 50.0,
        "conf_conv_kernel_size": 5,
        "conf_num_attention_heads": 8,
        "conf_num_hidden_layers": 12,
        "conf_positional_bias_size": 256,
        "conf_reduction_factor": 4,
        "conf_residual_weight": 0.5,
        "gradient_clipping": 10_000_000_000.0,
        "hidden_size": 1536,
        "input_feat_size": 128,
        "rms_norm_eps": 1e-06,
        "sscp_conv_channel_size": [128, 32],
        "sscp_conv_eps": 0.001,
        "sscp_conv_group_norm_eps": 0.001,
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        "vocab_offset": 262_272,
        "vocab_size": 128,
    },
}


def config(**changes: object) -> UsmConfig:
    built = UsmConfig.from_hf({"audio_config": changes}, "config.json", "Gemma 3n")
    assert built is not None
    return built


def test_what_is_left_out_is_as_in_the_published_model() -> None:
    published = UsmConfig.from_hf(HF, "config.json", "Gemma 3n")
    assert config() == published
    assert published is not None and published.tokens.ids == [256_000, *[262_273] * 188, 262_272]
    assert UsmConfig.from_hf(published.to_hf(), "config.json", "Gemma 3n") == published
    assert published.summary() == {"sounds": "up to 30 seconds become 188 tokens, in 12 layers of 1536"}


def test_a_model_without_ears() -> None:
    assert UsmConfig.from_hf({"audio_config": None}, "config.json", "Gemma 3n") is None
    assert UsmConfig.from_hf({}, "config.json", "Gemma 3n") is None


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model_type", "gemma4_audio", "is 'gemma4_audio'; only gemma3n_audio can be run"),
        ("sscp_conv_kernel_size", [[3, 3], [5, 3]], "only .* can be run"),
        ("sscp_conv_stride_size", [[2, 2], [1, 2]], "only .* can be run"),
        ("rms_norm_eps", 1e-5, "only 1e-06 can be run"),
        ("gradient_clipping", 100.0, "is 100.0; nothing is clipped here"),
        ("hidden_size", 1540, "only multiples of 32"),
        ("hidden_size", 4096, "at most 3584"),
        ("input_feat_size", 80, "only multiples of 32"),
        ("conf_num_attention_heads", 5, "does not make heads"),
        ("conf_attention_context_left", 0, "not a whole number from 1"),
        ("sscp_conv_channel_size", [128, 30], "cannot be run"),
        ("sscp_conv_channel_size", [128], "not a list of 2"),
        ("conf_residual_weight", -1, "not a positive number"),
    ],
)
def test_what_cannot_be_run(key: str, value: object, problem: str) -> None:
    with pytest.raises(ModelError, match=rf"^config\.json: audio_config\.{key} .*{problem}"):
        config(**{key: value})


def test_the_table_has_all_parameters() -> None:
    table = tensors(config(), 2048)
    assert sum(spec.size for spec in table if spec.name.startswith(TOWER)) == 681_348_640
    assert len({spec.name for spec in table}) == len({spec.gguf for spec in table}) == len(table)
    assert all(spec.tower for spec in table)


def test_gguf_names_are_those_of_its_converter() -> None:
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, 64)
    found = 0
    for spec in tensors(config(), 2048):
        stem = spec.name.removesuffix(".weight").replace(f"{TOWER}conformer.", "conformer.layers.")
        if (name := names.get_name(stem)) is not None:
            assert spec.gguf == f"{name}.weight", spec.name
            found += 1
    assert found == 12 * 22 + 3 + 4  # all but the norms of the two convolutions


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (16, 1), (17, 2), (97, 7), (2997, 188), (3008, 188)])
def test_frames_become_tokens(frames: int, tokens: int) -> None:
    assert config().tokens_of(frames) == tokens


def test_sounds_that_cannot_be_read() -> None:
    usm = Usm(config())
    assert usm.patches(np.zeros((3008, 128), np.float32)).shape == (3008, 128)
    with pytest.raises(RequestError, match="has 3,009 log-mel frames, and the model reads 1 to 3,008"):
        usm.patches(np.zeros((3009, 128), np.float32))
    with pytest.raises(RequestError, match="has 0 log-mel frames"):
        usm.patches(np.zeros((0, 128), np.float32))
    with pytest.raises(RequestError, match=r"shape \(5, 80\); the model reads log-mel frames of 128 bands"):
        usm.patches(np.zeros((5, 80), np.float32))


class _Outside(Held):
    """Bytes outside of Python's memory."""

    def __init__(self, data: NDArray[np.uint32]) -> None:
        self._data, self.nbytes = data, data.nbytes

    def slice(self, offset: int, nbytes: int) -> Held:
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        return self._data.tobytes()

    def free(self) -> None:
        pass


class _Split:
    """An int8 matrix that comes in two runs, of which one is outside."""

    def __init__(self, packed: Packed) -> None:
        self.layout, self.shape, self._packed = packed.layout, (packed.rows, packed.cols), packed

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        quants, scales = np.split(self._packed.quants, 2), np.split(self._packed.scales, 2)
        yield start, quants[0], scales[0]
        yield stop // 2, _Outside(quants[1]), _Outside(scales[1])


class _Kept(Ledger):
    """A device that keeps what is written."""

    def __init__(self) -> None:
        limits = Limits(1 << 30, 1 << 30, 8, 1 << 14, 256, 65_535)
        super().__init__(Adapter(AdapterInfo("", "", "", "", "", ""), limits, frozenset()))
        self.written: dict[Buffer, NDArray[np.float32]] = {}

    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        self.written[buffer] = data.view(np.float32).ravel()


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_derived_from_tensors(empty: bool) -> None:
    rng = np.random.default_rng(0)
    packed = quantize(rng.standard_normal((8, 64), np.float32), Layout.INT8)
    vector = rng.standard_normal((2, 3, 4), np.float32)

    async def read(name: str) -> NDArray[np.float32]:
        return vector

    weights: Any = SimpleNamespace(
        table={
            "matrix": TensorSpec("matrix", "", (8, 64)),
            "vector": TensorSpec("vector", "", (2, 3, 4), Kind.TABLE),
        },
        tensor=lambda name: _Split(packed),
        vector=read,
        release=lambda: None,
        config=None,
        quantization="",
    )
    device, told = _Kept(), [0]

    def make(matrix: NDArray[np.float32], vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate((matrix.T.ravel(), vector.transpose(2, 0, 1).ravel()))

    loader = Upload(device, weights, lambda nbytes: told.append(nbytes), empty=empty)
    buffer = asyncio.run(loader.derived(make, "matrix", "vector"))
    matrix = np.zeros((8, 64), np.float32) if empty else packed.dequantize()
    assert isinstance(buffer, Buffer) and np.array_equal(device.written[buffer], make(matrix, vector))
    assert sum(told) == (0 if empty else packed.nbytes)
