"""Write a model as transformers.js reads it on any WebGPU: int4 weights, float32 elsewhere, for adapters without f16.

    python -m benchmarks.make_onnx MODEL FOLDER --tokenizer TOKENIZER_JSON

MODEL is whatever gemma-wgpu opens. Needs onnx, transformers 4.57, torch, and onnxruntime-genai 0.13.2, whose model
builder does the work; later builders fail on Gemma 3.
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

from benchmarks.make_1b import CONFIG, bf16
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.weights.checkpoint import Checkpoint, matrix_shapes, norm_shapes, open_checkpoint
from tests.checkpoints import write_hf

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")


def write_source(checkpoint: Checkpoint, folder: Path, tokenizer: Path) -> None:
    """The model in bf16, as Hugging Face has it."""
    config = checkpoint.config
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {
        name: ("BF16", bf16(checkpoint.tensor(name).pack().dequantize())) for name in matrix_shapes(config)
    }
    tensors |= {name: ("BF16", bf16(checkpoint.norm(name) - 1)) for name in norm_shapes(config)}
    write_hf(folder, CONFIG | {name: getattr(config, name) for name in _SIZES}, tensors)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds | {"pad_token": "<pad>"}))


def rearrange(built: Path, source: Path, folder: Path) -> None:
    """What the builder wrote, under the names that transformers.js asks for."""
    import onnx

    (folder / "onnx").mkdir(parents=True)
    model = onnx.load(built / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model.onnx_data"
    onnx.save(model, folder / "onnx" / "model.onnx")
    shutil.move(built / "model.onnx.data", folder / "onnx" / "model.onnx_data")
    config = json.loads((source / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": True}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 1}))


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Gemma 3's tokenizer.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with open_checkpoint(find(options.model)) as checkpoint:
            write_source(checkpoint, work / "source", options.tokenizer)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(work / "source")]
        builder += ["-o", str(work / "built"), "-c", str(work / "cache"), "-p", "int4", "-e", "webgpu"]
        subprocess.run([*builder, "--extra_options", "use_webgpu_fp32=true"], check=True)
        rearrange(work / "built", work / "source", options.folder)


if __name__ == "__main__":
    main()
