"""A random Gemma 3 with the shapes of the 1B, but three layers and 1024 tokens: 181 MB in bfloat16."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.config import Gemma3Config
from gemma_wgpu.weights.checkpoint import EMBEDDING, matrix_shapes, norm_shapes
from tests.checkpoints import write_hf

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

# What a norm multiplies by, on average. Queries and keys: attention scores spread by 2, so that a query attends
# to a dozen keys. Post-norms: each step doubles the residual stream, or the tied head would only repeat its input.
_QUERY_KEY = 1.6
_GROWTH = 2.0


def write(folder: Path) -> Path:
    """Write config.json and model.safetensors, the same bytes every time, and return `folder`."""
    rng = np.random.Generator(np.random.PCG64(3))
    config = Gemma3Config.from_hf(CONFIG)
    tensors = {}
    for name, (rows, cols) in matrix_shapes(config).items():
        matrix = rng.standard_normal((rows, cols), np.float32) * np.float32(0.06 if name == EMBEDDING else cols**-0.5)
        if name == EMBEDDING:
            matrix[STOPS] = 0  # so they are never the most likely
        tensors[name] = _bfloat16(matrix)
    for name, (size,) in norm_shapes(config).items():
        factor = _factor(name)
        w = factor * (1 + 0.2 * rng.standard_normal(size, np.float32)) - 1
        tensors[name] = _bfloat16(w.astype(np.float32))
    return write_hf(folder, CONFIG, tensors)


def _factor(name: str) -> float:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return _QUERY_KEY
    if ".post_" in name:
        layer = int(name.split(".")[2])
        step = 2 * layer + ("post_feedforward" in name)
        return 2.0 * _GROWTH ** (step + 1)
    return 1.0


def _bfloat16(values: NDArray[np.float32]) -> tuple[str, NDArray[np.uint16]]:
    return "bfloat16", (values.view(np.uint32) >> 16).astype(np.uint16)
