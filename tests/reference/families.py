"""Small random checkpoints of Gemma 3n and Gemma 4 in which every part of the architecture shows in the logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from gemma_wgpu.models import gemma3n, gemma4
from gemma_wgpu.models.spec import Family, TensorSpec
from tests import vocabulary4
from tests.checkpoints import Raw, bfloat16, write_gguf, write_hf
from tests.reference import random_1b
from tests.vocabulary import merges

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Three layers share caches: one of each kind has several readers, and neither source is the first of its kind.
_TYPES = [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL]
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "hidden_size_per_layer_input": 64,
    "num_hidden_layers": 8,
    "layer_types": _TYPES,
    "num_kv_shared_layers": 3,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3n": _COMMON
    | {
        "model_type": "gemma3n_text",
        "vocab_size_per_layer_input": 384,
        "intermediate_size": [384] * 5 + [512] * 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 5,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    # Eight heads on one, as the E2B has them.
    "gemma4": _COMMON
    | {
        "model_type": "gemma4_text",
        "vocab_size_per_layer_input": 512,
        "intermediate_size": 256,
        "use_double_wide_mlp": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "rope_parameters": {
            LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
            GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        },
    },
}
# A slice of the Gemma 3n: a layer of either kind is left out, one of them a source of keys and values.
WITHOUT = (1, 4, 6)
WIDTH = 256
FAMILIES: dict[str, Family] = {"gemma3n": gemma3n.FAMILY, "gemma4": gemma4.FAMILY}
# Gemma 3n's table of per-layer inputs lacks the row of one of these.
IDS: list[int] = [2, *np.random.Generator(np.random.PCG64(10)).integers(3, 384, 97).tolist(), 400, 17]


def write(folder: Path, name: str) -> Path:
    """Write config.json and model.safetensors, the same bytes every time; return `folder`."""
    family, config = FAMILIES[name], FAMILIES[name].config.from_hf(CONFIGS[name])
    rng = np.random.Generator(np.random.PCG64(9))
    specs = sorted((*family.tensors(config), *family.unread(config)), key=lambda spec: spec.name)
    tensors = {
        spec.name.replace("model.language_model.", "model."): ("bfloat16", bfloat16(weights(spec, rng)))
        for spec in specs
    }
    write_hf(folder, CONFIGS[name], tensors)
    return folder


def write_gguf_of(path: Path, name: str, change: Mapping[str, object] | None = None) -> Path:
    """Write a model as llama.cpp's converter does, in F32, with a vocabulary without sense; return `path`.

    `change` has other metadata than the converter's; what is None is left out.
    """
    family, config = FAMILIES[name], FAMILIES[name].config.from_hf(CONFIGS[name])
    rng = np.random.Generator(np.random.PCG64(9))
    specs = sorted((*family.tensors(config), *family.unread(config)), key=lambda spec: spec.name)
    tensors: dict[str, Raw] = {}
    for spec in specs:
        values = (bfloat16(weights(spec, rng)).astype(np.uint32) << 16).view(np.float32)
        if spec.name.endswith("embed_tokens_per_layer.weight"):
            values = np.pad(values, ((0, config.vocab_size - len(values)), (0, 0)))
        if spec.slot:
            before = tensors[spec.gguf][0] if spec.gguf in tensors else np.zeros((0, *spec.shape), np.float32)
            values = np.concatenate((before, values[None]))
        tensors[spec.gguf] = values, GGMLQuantizationType.F32
    metadata: dict[str, object] = {
        "general.name": "Tiny",
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.attention.sliding_window": config.sliding_window,
        f"{name}.attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types],
        f"{name}.attention.shared_kv_layers": config.num_kv_shared_layers,
        f"{name}.rope.freq_base": config.rope_theta,
        **(_of_gemma3n(config) if name == "gemma3n" else _of_gemma4(config)),
        **(change or {}),
    }
    if name == "gemma4":  # 16 of the 64 pairs of a global layer's head are turned
        tensors["rope_freqs.weight"] = np.array([1] * 16 + [1e30] * 48, np.float32), GGMLQuantizationType.F32
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, kept, tensors, architecture=name)


def _of_gemma3n(config: Any) -> dict[str, object]:
    vocabulary = random_1b.vocabulary(config.vocab_size)
    return {
        "gemma3n.feed_forward_length": list(config.intermediate_size),
        "gemma3n.attention.key_length": config.head_dim,
        "gemma3n.attention.value_length": config.head_dim,
        "gemma3n.altup.num_inputs": 4,
        "gemma3n.altup.active_idx": 0,
        "gemma3n.activation_sparsity_scale": [1.6448536] * 3 + [-np.inf] * 5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.scores": vocabulary.scores.tolist(),
        "tokenizer.ggml.token_type": [3] * 4 + [6] * 256 + [1] * (config.vocab_size - 260),
    }


def _of_gemma4(config: Any) -> dict[str, object]:
    vocabulary = vocabulary4.small(vocabulary4.words(config.vocab_size))
    return {
        "gemma4.feed_forward_length": [config.intermediate_size] * 5 + [2 * config.intermediate_size] * 3,
        "gemma4.attention.key_length": config.global_head_dim,
        "gemma4.attention.value_length": config.global_head_dim,
        "gemma4.attention.key_length_swa": config.head_dim,
        "gemma4.attention.value_length_swa": config.head_dim,
        "gemma4.rope.freq_base_swa": config.rope_local_base_freq,
        "gemma4.rope.dimension_count": config.global_head_dim,
        "gemma4.rope.dimension_count_swa": config.head_dim,
        "gemma4.final_logit_softcapping": config.final_logit_softcapping,
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.scores": [-1000.0] * config.vocab_size,
        "tokenizer.ggml.token_type": vocabulary4.gguf_types(vocabulary),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges(vocabulary)],
    }


def weights(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    mean, deviation = _spread(spec)
    return (mean + deviation * rng.standard_normal(spec.shape, np.float32)).astype(np.float32)


def _spread(spec: TensorSpec) -> tuple[float, float]:
    """The mean and the standard deviation of a tensor."""
    part = spec.name.removesuffix(".weight").rpartition(".")[2]
    if part == "norm":
        return 8.0, 1.5
    if part in ("q_norm", "k_norm"):  # the attention's scale is 1
        return 0.5, 0.1
    if part.startswith("post_"):  # what a layer adds is smaller than what it adds it to
        return 0.5, 0.1
    if part == "layer_scalar":
        return 0.8, 0.2
    if part == "correct_output_scale":
        return 1.0, 0.3
    if part == "modality_router":  # its inputs are divided by the hidden size
        return 0.0, spec.shape[1] ** 0.5
    if part == "prediction_coefs":
        return 0.0, 0.15
    if part == "correction_coefs":
        return 0.0, 0.3
    if part == "embed_tokens_per_layer":
        return 0.0, 64**-0.5
    return (1.0, 0.2) if len(spec.shape) == 1 else (0.0, spec.shape[1] ** -0.5)
