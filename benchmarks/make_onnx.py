"""Write a model as transformers.js reads it on any WebGPU: int4 weights, float32 elsewhere, for adapters without f16.

    python -m benchmarks.make_onnx MODEL FOLDER --tokenizer TOKENIZER_JSON

MODEL is any Gemma 3 that gemma-wgpu opens. This needs onnx, transformers 4.57, torch, and onnxruntime-genai 0.13.2,
whose model builder does the work; later builders fail on Gemma 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.make_random import CONFIG, bf16
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.models.spec import Kind
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.opening import open_checkpoint
from tests.checkpoints import write_hf

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")


def write_original(checkpoint: Checkpoint, folder: Path, tokenizer: Path) -> None:
    """Write the model in bf16 as a Hugging Face folder."""
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {}
    for name, spec in checkpoint.table.items():
        if spec.kind.is_matrix:
            values = checkpoint.tensor(name).pack().dequantize()[:, : spec.shape[1]]
        else:
            values = checkpoint.values(name) - (spec.kind == Kind.NORM_PLUS_ONE)
        tensors[name] = "bfloat16", bf16(np.ascontiguousarray(values))
    write_hf(folder, CONFIG | {name: getattr(checkpoint.config, name) for name in _SIZES}, tensors)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds | {"pad_token": "<pad>"}))


def rearrange(built: Path, original: Path, folder: Path) -> None:
    """Give what the builder wrote the names that transformers.js asks for."""
    import onnx

    (folder / "onnx").mkdir(parents=True)
    model = onnx.load(built / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model.onnx_data"
    onnx.save(model, folder / "onnx" / "model.onnx")
    shutil.move(built / "model.onnx.data", folder / "onnx" / "model.onnx_data")
    config = json.loads((original / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": True}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 1}))


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer.json of Gemma 3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with open_checkpoint(find(options.model)) as checkpoint:
            write_original(checkpoint, work / "original", options.tokenizer)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(work / "original")]
        builder += ["-o", str(work / "built"), "-c", str(work / "cache"), "-p", "int4", "-e", "webgpu"]
        subprocess.run([*builder, "--extra_options", "use_webgpu_fp32=true"], check=True)
        rearrange(work / "built", work / "original", options.folder)


if __name__ == "__main__":
    main()
