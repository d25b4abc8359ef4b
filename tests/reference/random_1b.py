"""A random Gemma 3 with the shapes of the 1B, but three layers and 1024 tokens: 163 MB in bfloat16."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.checkpoints import bfloat16, write_hf
from tests.table import EMBEDDING, matrix_shapes, norm_shapes
from tests.vocabulary import CONTROL, Vocabulary, tokenizer_json

CONFIG: dict[str, object] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 1024,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
    "query_pre_attn_scalar": 256,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

STOPS = [1, 106]

# What a norm multiplies by, on average. Of queries and keys: attention scores then spread by 1.7, which is some
# hundred keys attended to. Of what a layer adds: it then outgrows the embedding, which the tied head would repeat.
_QUERY_KEY = 1.3
_GROWTH = 2.0


def write(folder: Path, shape: Mapping[str, object] = CONFIG) -> Path:
    """Write config.json, model.safetensors (the same bytes every time) and tokenizer.json; return `folder`."""
    rng = np.random.Generator(np.random.PCG64(3))
    config = Gemma3Config.from_hf(shape)
    tensors = {}
    for name, (rows, cols) in sorted(matrix_shapes(config).items()):
        matrix = rng.standard_normal((rows, cols), np.float32) * np.float32(0.06 if name == EMBEDDING else cols**-0.5)
        if name == EMBEDDING:
            matrix[STOPS] = 0  # so that they are never the most likely
        tensors[name] = "bfloat16", bfloat16(matrix)
    for name, (size,) in sorted(norm_shapes(config).items()):
        spread = 1 + np.float32(0.2) * rng.standard_normal(size, np.float32)
        tensors[name] = "bfloat16", bfloat16(np.float32(factor(name)) * spread - 1)
    write_hf(folder, shape, tensors)
    write_tokenizer(folder, config.vocab_size)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """Write the tokenizer.json of a vocabulary without sense."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary(size))))


def factor(name: str) -> float:
    """What the norm of this name multiplies by, on average."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return _QUERY_KEY
    if ".post_" in name:
        return 4 * _GROWTH ** (2 * int(name.split(".")[2]) + ("post_feedforward" in name))
    return 1.0


def vocabulary(size: int) -> Vocabulary:
    """The control tokens and bytes that every Gemma has, and otherwise no sense."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    types = [CONTROL] * len(pieces) + [1] * (size - len(pieces))
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [f"▁{token}" for token in range(len(pieces), size)]
    return Vocabulary(pieces, np.zeros(size, np.float32), np.array(types, np.int32))
