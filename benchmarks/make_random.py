"""Write a Hugging Face folder of a Gemma's shape with seeded random bf16 weights, whose texts make no sense.

It is for measuring what only size decides: conversion, loading, GPU memory and speed. The folder takes about 2 GB for
Gemma 3 1B, and 9 GB for the E2B of Gemma 3n or Gemma 4.

    python -m benchmarks.make_random FOLDER [--model 1b] [--tokenizer TOKENIZER_JSON] [--seed 0]
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.registry import family_of_hf
from gemma_wgpu.models.spec import Kind, TensorSpec

CONFIG: dict[str, object] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}
MODELS: dict[str, dict[str, object]] = {
    "1b": CONFIG,
    "3n-e2b": {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "num_hidden_layers": 30,
        "intermediate_size": 8192,
        "num_kv_shared_layers": 10,
    },
    "4-e2b": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "final_logit_softcapping": 30.0,
    },
}
_AT_ONCE = 1 << 22


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return bf16 numbers, rounded to nearest, ties to even: the bits as little-endian u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def write(folder: Path, seed: int, config: dict[str, object] = CONFIG) -> None:
    """Write weights that keep activations in range: of standard deviation 1 / sqrt(cols), and for norms near one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    family = family_of_hf(config, "config.json")
    write_tensors(folder / "model.safetensors", family.tensors(family.config.from_hf(config)), seed, _spread)


def _spread(spec: TensorSpec) -> tuple[float, float]:
    if spec.kind.is_matrix or spec.kind == Kind.TABLE:
        return 0.0, spec.shape[-1] ** -0.5
    return float(spec.kind == Kind.NORM), 0.1


def write_tensors(
    path: Path, table: Sequence[TensorSpec], seed: int, spread: Callable[[TensorSpec], tuple[float, float]]
) -> None:
    """Write a safetensors file of bf16 numbers, whose mean and standard deviation `spread` gives for each tensor."""
    entries: dict[str, object] = {}
    at = 0
    for spec in table:
        nbytes = 2 * spec.size
        entries[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for spec in table:
            left, (mean, deviation) = spec.size, map(np.float32, spread(spec))
            while left:
                count = min(left, _AT_ONCE)
                file.write(bf16(mean + deviation * rng.standard_normal(count, np.float32)).data)
                left -= count


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="1b")
    parser.add_argument("--tokenizer", type=Path, help="copy this tokenizer.json into the folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed, MODELS[options.model])
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, options.folder / "tokenizer.json")


if __name__ == "__main__":
    main()
