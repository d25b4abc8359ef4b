import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models import registry
from gemma_wgpu.models.gemma3 import FAMILY, Gemma3Config, tensors
from gemma_wgpu.models.registry import family_of_gguf, family_of_hf
from tests.checkpoints import gguf_metadata

# This is published with google/gemma-3-1b-it (the keys that matter).
HF_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# This is published with google/gemma-3-4b-it, which leaves out what equals transformers' defaults.
HF_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GLOBAL_1B = (5, 11, 17, 23)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_hf_1b() -> None:
    config = Gemma3Config.from_hf(HF_1B)
    assert config == Gemma3Config(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling_factor=1.0,
        sliding_window=512,
        max_position_embeddings=32768,
        query_pre_attn_scalar=256.0,
        layer_types=tuple("full_attention" if layer in GLOBAL_1B else "sliding_attention" for layer in range(26)),
    )
    assert [layer for layer in range(26) if config.is_global(layer)] == list(GLOBAL_1B)
    shapes = {spec.name.removeprefix("model.layers.25."): spec.shape for spec in tensors(config)}
    assert shapes["self_attn.q_proj.weight"] == (1024, 1152)
    assert shapes["self_attn.v_proj.weight"] == (256, 1152)
    assert shapes["self_attn.o_proj.weight"] == (1152, 1024)


@pytest.mark.parametrize("config", ["1b", "4b"])
def test_hf_written_and_read(config: str) -> None:
    read = Gemma3Config.from_hf({"1b": HF_1B, "4b": HF_4B}[config])
    written = json.loads(json.dumps(read.to_hf()))
    assert Gemma3Config.from_hf(written) == read
    assert written["model_type"] == ("gemma3_text" if config == "1b" else "gemma3")
    text = written if config == "1b" else written["text_config"]
    for key, value in {"1b": HF_1B, "4b": HF_4B["text_config"]}[config].items():
        if key in text and key != "model_type":
            assert text[key] == value, key


def test_hf_4b_has_a_tower() -> None:
    tower = Gemma3Config.from_hf(HF_4B).vision
    assert tower is not None
    written = Gemma3Config.from_hf(HF_4B).to_hf()
    assert written["vision_config"] == HF_4B["vision_config"] | {"layer_norm_eps": 1e-6}
    assert (tower.patches, tower.head_dim, tower.tokens.count, tower.tokens.soft) == (4096, 72, 256, 262_144)


def test_hf_4b_is_nested_and_leaves_defaults_out() -> None:
    config = Gemma3Config.from_hf(HF_4B)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (2560, 10240, 34)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    assert (config.rope_theta, config.rope_scaling_factor, config.rope_local_base_freq) == (1e6, 8.0, 1e4)
    assert config.sliding_window == 1024
    assert config.query_pre_attn_scalar == 256


def test_hf_transformers_5_form() -> None:
    old = Gemma3Config.from_hf(HF_1B)
    renamed = without(HF_1B, "rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern") | {
        "layer_types": list(old.layer_types),
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    assert Gemma3Config.from_hf(renamed) == old
    renamed["rope_parameters"] = {
        "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
    }
    new = Gemma3Config.from_hf(renamed)
    assert (new.rope_theta, new.rope_scaling_factor, new.rope_local_base_freq) == (2e6, 8.0, 3e4)


def test_hf_older_spellings() -> None:
    by_type = HF_1B | {"rope_scaling": {"type": "linear", "factor": 4}}
    assert Gemma3Config.from_hf(by_type).rope_scaling_factor == 4
    by_underscore = without(HF_1B, "sliding_window_pattern") | {"_sliding_window_pattern": 13}
    assert [layer for layer in range(26) if Gemma3Config.from_hf(by_underscore).is_global(layer)] == [12, 25]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gemma2", "model_type is 'gemma2'"),
        ("model_type", None, "model_type is missing"),
        ("model_type", ["gemma3"], "model_type"),
        ("hidden_size", None, "hidden_size is missing"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("hidden_size", -1152, "hidden_size is -1152"),
        ("hidden_size", 1152.0, "hidden_size is 1152.0"),
        ("hidden_size", "1152", "hidden_size is '1152'"),
        ("hidden_size", True, "hidden_size is True"),
        ("hidden_size", 1136, "hidden_size is 1136; only multiples of 32 can be run"),
        ("intermediate_size", 6928, "intermediate_size is 6928; only multiples of 32 can be run"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("intermediate_size", 10**400, "intermediate_size is 1000"),
        ("sliding_window", None, "sliding_window is None"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("rope_theta", float("inf"), "rope_theta is inf"),
        ("rope_theta", 10**400, "rope_theta is 1000"),
        ("query_pre_attn_scalar", -1, "query_pre_attn_scalar is -1"),
        ("num_key_value_heads", 3, "num_attention_heads is 4, not a multiple of num_key_value_heads 3"),
        ("head_dim", 255, "head_dim is 255"),
        ("layer_types", ["full_attention"], "layer_types has 1 entries for 26 layers"),
        ("layer_types", ["chunked_attention"] * 26, "layer_types may hold"),
        ("layer_types", 6, "layer_types may hold"),
        ("sliding_window_pattern", 0, "sliding_window_pattern is 0"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8}, "rope_scaling.rope_type is 'yarn'"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling.factor is missing"),
        ("rope_scaling", 8.0, "rope_scaling is 8.0, not an object"),
        ("rope_parameters", {"rope_theta": 1e6}, "rope_parameters.full_attention is None"),
        (
            "rope_parameters",
            {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.sliding_attention.rope_type scales",
        ),
        ("attention_bias", True, "attention_bias is set"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is set"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is set"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is set"),
        ("hidden_activation", "silu", "hidden_activation is 'silu'"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantization_config is set"),
        ("text_config", [], r"text_config is \[\], not an object"),
    ],
)
def test_hf_errors_name_the_source_and_the_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=f"^a/config.json: {message}") as caught:
        Gemma3Config.from_hf(HF_1B | {key: value}, source="a/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "big", "text_config.hidden_size is 'big'"),
        ("rope_scaling", {"rope_type": "yarn"}, "text_config.rope_scaling.rope_type is 'yarn'"),
        ("quantization_config", {}, "text_config.quantization_config is set"),
    ],
)
def test_hf_errors_name_nested_keys(key: str, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Gemma3Config.from_hf(HF_4B | {"text_config": HF_4B["text_config"] | {key: value}})


def test_hf_outer_quantization_is_found() -> None:
    with pytest.raises(ModelError, match=r"config\.json: quantization_config is set"):
        Gemma3Config.from_hf(HF_4B | {"quantization_config": {"bits": 4}})


GGUF_1B: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 1152,
    "gemma3.block_count": 26,
    "gemma3.feed_forward_length": 6912,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1000000.0,
    "tokenizer.ggml.tokens": ["x"] * 262144,
}


def test_gguf_and_hf_agree_on_the_1b() -> None:
    assert Gemma3Config.from_gguf(GGUF_1B) == Gemma3Config.from_hf(HF_1B)


def test_gguf_of_larger_models() -> None:
    scaled = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = Gemma3Config.from_gguf(GGUF_1B | scaled)
    assert (config.rope_scaling_factor, config.query_pre_attn_scalar) == (8.0, 256)
    config = Gemma3Config.from_gguf(
        GGUF_1B
        | scaled
        | {
            "gemma3.embedding_length": 5376,
            "gemma3.block_count": 62,
            "gemma3.attention.head_count": 32,
            "gemma3.attention.head_count_kv": 16,
            "gemma3.attention.key_length": 128,
            "gemma3.attention.value_length": 128,
        }
    )
    assert (config.head_dim, config.query_pre_attn_scalar) == (128, 168)


def test_gguf_optional_keys() -> None:
    given = {"gemma3.rope.freq_base_swa": 20000.0, "gemma3.attention.sliding_window_pattern": 2}
    config = Gemma3Config.from_gguf(GGUF_1B | given)
    assert config.rope_local_base_freq == 20000
    assert [config.is_global(layer) for layer in range(4)] == [False, True, False, True]
    unscaled = {"gemma3.rope.scaling.type": "none", "gemma3.rope.scaling.factor": 8.0}
    assert Gemma3Config.from_gguf(GGUF_1B | unscaled).rope_scaling_factor == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gemma2", "general.architecture is 'gemma2'; only gemma3"),
        ("general.architecture", None, "general.architecture is missing"),
        ("general.architecture", 3, "general.architecture is 3"),
        ("gemma3.block_count", None, "gemma3.block_count is missing"),
        ("gemma3.block_count", 2**31, "gemma3.block_count is 2147483648"),
        ("gemma3.embedding_length", 1136, "gemma3.embedding_length is 1136; only multiples of 32 can be run"),
        ("gemma3.feed_forward_length", 16, "gemma3.feed_forward_length is 16; only multiples of 32 can be run"),
        ("gemma3.attention.head_count_kv", 3, "gemma3.attention.head_count is 4, not a multiple"),
        ("gemma3.attention.key_length", 0, "gemma3.attention.key_length is 0"),
        ("gemma3.attention.value_length", 128, "gemma3.attention.value_length is not the key length"),
        ("gemma3.attention.sliding_window_pattern", [True], "gemma3.attention.sliding_window_pattern"),
        ("gemma3.rope.freq_base", float("nan"), "gemma3.rope.freq_base is nan"),
        ("gemma3.rope.scaling.type", "yarn", "gemma3.rope.scaling.type is 'yarn'"),
        ("gemma3.final_logit_softcapping", 30.0, "gemma3.final_logit_softcapping is set"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens has no tokens"),
        ("tokenizer.ggml.tokens", [], "tokenizer.ggml.tokens has no tokens"),
        ("tokenizer.ggml.tokens", "abc", "tokenizer.ggml.tokens has no tokens"),
    ],
)
def test_gguf_errors_name_the_source_and_the_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=f"^model.gguf: {message}"):
        Gemma3Config.from_gguf(GGUF_1B | {key: value}, source="model.gguf")


def test_files_of_a_family_are_known_by_their_keys() -> None:
    for model_type in ("gemma3", "gemma3_text"):
        assert family_of_hf({"model_type": model_type}, "config.json") is FAMILY
    assert family_of_gguf({"general.architecture": "gemma3"}, "model.gguf") is FAMILY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "{} is missing; this is not a complete language model"),
        ({"model_type": None, "general.architecture": None}, "{} is missing; this is not a complete language model"),
        ({"model_type": ["gemma3"], "general.architecture": ["gemma3"]}, "{} is ['gemma3'], not a text"),
        ({"model_type": "llama", "general.architecture": "llama"}, "{} is 'llama'; only {} can be run"),
    ],
)
def test_files_of_no_family(content: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lists what can be run, of all families."""
    other = replace(FAMILY, model_types=("other",), architectures=("other",))
    monkeypatch.setattr(registry, "FAMILIES", [FAMILY, other])
    for family_of, key, known in (
        (family_of_hf, "model_type", "gemma3, gemma3_text and other"),
        (family_of_gguf, "general.architecture", "gemma3 and other"),
    ):
        with pytest.raises(ModelError) as caught:
            family_of(content, "a/model")
        assert str(caught.value) == f"a/model: {message.format(key, known)}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*HF_1B, "rope_parameters", "layer_types", "text_config"]), JSON))
def test_hf_is_read_or_refused(damage: dict[str, Any]) -> None:
    try:
        config = Gemma3Config.from_hf(HF_1B | damage)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert len(config.layer_types) == config.num_hidden_layers


@given(st.dictionaries(st.sampled_from([*gguf_metadata(), "gemma3.rope.scaling.type"]), JSON))
def test_gguf_is_read_or_refused(damage: dict[str, Any]) -> None:
    metadata = {"general.architecture": "gemma3", **gguf_metadata()}
    try:
        config = Gemma3Config.from_gguf(metadata | damage)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert len(config.layer_types) == config.num_hidden_layers
