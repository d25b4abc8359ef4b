"""Random layers with the shapes of Gemma 3 4B, 12B and 27B: two layers each, one of either kind, and 1024 tokens."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.checkpoints import bfloat16, write_hf
from tests.reference.random_1b import factor
from tests.table import EMBEDDING, matrix_shapes, norm_shapes

# What the published files say, in which the rest is left to the defaults.
_PUBLISHED: dict[str, dict[str, object]] = {
    "4b": {"hidden_size": 2560, "intermediate_size": 10_240},
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "27b": {
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    },
}
SIZES = tuple(_PUBLISHED)
LENGTHS = {"4b": 1060, "12b": 40, "27b": 40}  # of the prompts; the window has 1024 tokens
_POOL = 1 << 22  # numbers that are drawn; every matrix has its own stretch of them, again and again


def text_config(size: str) -> dict[str, object]:
    """The language model's part of a config.json of one of SIZES."""
    return {
        "model_type": "gemma3_text",
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        **_PUBLISHED[size],
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size": 1024,
    }


def _config(size: str) -> dict[str, object]:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    return outer | {"text_config": text_config(size)}


def ids(count: int) -> NDArray[np.int32]:
    """Token ids, the same ones every time."""
    return np.random.Generator(np.random.PCG64(6)).integers(107, 1024, count).astype(np.int32)


def write(folder: Path, size: str) -> Path:
    """Write config.json and model.safetensors, the same bytes every time; return `folder`."""
    rng = np.random.Generator(np.random.PCG64(7))
    pool = rng.standard_normal(_POOL, np.float32)
    config = Gemma3Config.from_hf(_config(size))
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {}
    for index, (name, (rows, cols)) in enumerate(sorted(matrix_shapes(config).items())):
        deviation = np.float32(0.03 if name == EMBEDDING else cols**-0.5)
        stretch = bfloat16(np.roll(pool, 104_729 * index) * deviation)
        tensors[f"language_model.{name}"] = "bfloat16", np.resize(stretch, (rows, cols))
    for name, (count,) in sorted(norm_shapes(config).items()):
        norm = np.float32(factor(name)) * (1 + np.float32(0.2) * rng.standard_normal(count, np.float32)) - 1
        tensors[f"language_model.{name}"] = "bfloat16", bfloat16(norm)
    write_hf(folder, _config(size), tensors)
    return folder
