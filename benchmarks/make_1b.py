"""Write a Hugging Face folder of Gemma 3 1B's shape with seeded random bf16 weights, whose texts make no sense.

It is for measuring what only size decides: conversion, loading, GPU memory and speed. The folder takes about 2 GB.

    python benchmarks/make_1b.py FOLDER [--tokenizer TOKENIZER_JSON] [--seed 0]
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.gemma3 import Gemma3Config, tensors
from gemma_wgpu.models.spec import TensorSpec

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
_AT_ONCE = 1 << 22


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return bf16 numbers, rounded to nearest, ties to even: the bits as little-endian u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def write(folder: Path, seed: int) -> None:
    """Write weights that keep activations in range: of standard deviation 1 / sqrt(cols), and for norms near zero."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    table = tensors(Gemma3Config.from_hf(CONFIG))
    write_tensors(
        folder / "model.safetensors",
        table,
        seed,
        lambda spec: (0.0, spec.shape[-1] ** -0.5 if spec.kind.is_matrix else 0.1),
    )


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
    parser.add_argument("--tokenizer", type=Path, help="copy this tokenizer.json into the folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed)
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, options.folder / "tokenizer.json")


if __name__ == "__main__":
    main()
