"""How long a tower takes for one image, and how far its features are from those of the libraries it comes from.

The tower of Gemma 3 has the full shape (SigLIP-so400m: 27 layers of 1152, 4096 patches of an image of 896 x 896) and
seeded random bf16 weights, on a language model of one layer; its peer is transformers. That of Gemma 3n has the full
shape, too (MobileNetV5: 84 blocks, an image of 768 x 768), and is run alone, after a first time in which the shaders
are compiled; its peer is timm. Peers run on the CPU in float32, with as many threads as there are cores. They need
torch, transformers and timm besides, unless --no-peer is given, and SigLIP needs 1 GB of disk.

    python -m benchmarks.vision [--tower siglip] [--precision f32] [--kernels] [--no-peer]
                                [--folder FOLDER] [--layers 27]     (of SigLIP)
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.hearing import TEXT_HIDDEN, Drawn, drawn, report_kernels, widened
from benchmarks.make_random import write_tensors
from gemma_wgpu import load
from gemma_wgpu.engine.encoder import Encoder
from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.gpu.native import open_native
from gemma_wgpu.models import mobilenet_v5
from gemma_wgpu.models.gemma3 import Gemma3Config, tensors
from gemma_wgpu.models.mobilenet_v5 import MobileNetV5, MobileNetV5Config
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.step import Norms
from gemma_wgpu.weights.upload import Upload

PIXELS = 896


def config(layers: int) -> dict[str, object]:
    """Return the config.json of the tower on a small language model."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 509,
        "eoi_token_index": 510,
        "image_token_index": 511,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "vocab_size": 512,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "image_size": PIXELS,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def _spread(spec: TensorSpec) -> tuple[float, float]:
    """Return the mean and the standard deviation of a tensor's weights, which keep activations in range."""
    if spec.kind == Kind.TABLE:
        return 0.0, 0.5
    if spec.kind == Kind.NORM:
        return 1.0, 0.2
    if spec.kind.is_matrix:
        inputs = spec.shape[0] if spec.transposed else spec.size // spec.shape[0]
        return 0.0, (1.5 if "q_proj" in spec.name or "k_proj" in spec.name else 1.0) * inputs**-0.5
    return 0.0, 0.2


def write(folder: Path, layers: int) -> Path:
    """Write the model's folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    write_tensors(folder / "model.safetensors", tensors(Gemma3Config.from_hf(config(layers))), 0, _spread)
    return folder


def picture(side: int = PIXELS) -> NDArray[np.float32]:
    """Return the pixels of a picture of waves, (3, side, side) from -1 to 1."""
    y, x = np.indices((side, side), dtype=np.float32) / side
    waves = [np.sin(40 * x + 9 * y), np.sin(7 * x - 60 * y), np.sin(25 * x * y + 3)]
    return np.stack(waves).astype(np.float32)


def theirs(folder: Path, pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Return transformers' features of an image, and the seconds that they take."""
    import torch
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        start = time.perf_counter()
        features = model.model.get_image_features(torch.from_numpy(pixels)[None], return_dict=True).pooler_output
        return features[0].numpy(), time.perf_counter() - start


def mobilenet(precision: str, *, kernels: bool, peer: bool) -> None:
    """Measure the tower of Gemma 3n, and print."""
    config = MobileNetV5Config.from_hf({"vision_config": {}}, "config.json", "Gemma 3n")
    assert config
    table, pixels = (
        mobilenet_v5.tensors(config, TEXT_HIDDEN),
        np.float32(0.5) + picture(config.image_size) / np.float32(2),
    )
    device = open_native()
    try:
        tower = device.wait(MobileNetV5.load(config, Upload(device, Drawn(table), lambda nbytes: None)))
        encoder = Encoder(device, Kernels(device, half=precision == "f16"), Norms(device), tower)
        for _ in range(2):
            encoder.forget()
            start = time.perf_counter()
            features = device.wait(
                encoder.encode(Medium(pixels, -1), lambda p: print(f"\r{p.done}/{p.total}", end=""))
            )
            seconds = time.perf_counter() - start
        encoding = encoder.begin(Medium(pixels, -1))
        print(
            f"\r{device.info}, {precision}: {seconds:.1f} s, {len(encoding.launches)} dispatches, "
            f"{encoding.scratch_bytes / 1e6:.0f} MB beside the weights"
        )
        encoding.close()
        if kernels:
            report_kernels(device, encoder, Medium(pixels, -1))
    finally:
        device.close()
    if peer:
        expected, seconds = timms(table, config, pixels)
        error = np.abs(features - expected).max() / np.abs(expected).max()
        print(f"timm on the CPU, float32: {seconds:.1f} s; largest difference {error:.1e} of the largest")


def timms(
    table: Sequence[TensorSpec], config: MobileNetV5Config, pixels: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float]:
    """Return the features that timm's encoder and transformers' embedder make of an image, and timm's seconds."""
    import timm
    import torch
    from transformers import Gemma3nTextConfig, Gemma3nVisionConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

    specs = {spec.name: spec for spec in table}
    tower = timm.create_model(mobilenet_v5.ARCHITECTURE).eval()
    embedder = Gemma3nMultimodalEmbedder(Gemma3nVisionConfig(), Gemma3nTextConfig(hidden_size=TEXT_HIDDEN)).eval()
    for module, prefix in ((tower, mobilenet_v5.TOWER), (embedder, "model.embed_vision.")):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(widened(drawn(specs[prefix + name]))))
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            encoded = tower(torch.from_numpy(pixels)[None])
            seconds = time.perf_counter() - start
        tokens = encoded.flatten(2).permute(0, 2, 1) * config.hidden_size**0.5
        return embedder(inputs_embeds=tokens)[0].numpy(), seconds


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=("siglip", "mobilenet"), default="siglip")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--kernels", action="store_true", help="time the kernels one by one too")
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    options = parser.parse_args()
    if options.tower == "mobilenet":
        mobilenet(options.precision, kernels=options.kernels, peer=not options.no_peer)
        return
    pixels = picture()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(options.folder or Path(temporary), options.layers)
        with load(folder, precision=options.precision, context_length=512) as gemma:
            start = time.perf_counter()
            features = gemma.image_features(pixels, progress=lambda p: print(f"\r{p.done}/{p.total}", end=""))
            seconds = time.perf_counter() - start
            encoder = gemma.runner.encoders["image"]
            assert encoder is not None
            encoding = encoder.begin(Medium(pixels, -1))
            print(
                f"\r{gemma.device.info}, {gemma.precision}: {seconds:.1f} s, {len(encoding.launches)} dispatches, "
                f"{encoding.scratch_bytes / 1e6:.0f} MB beside the weights"
            )
            encoding.close()
            if options.kernels:
                report_kernels(gemma.device, encoder, Medium(pixels, -1))
        if not options.no_peer:
            expected, seconds = theirs(folder, pixels)
            error = np.abs(features - expected).max() / np.abs(expected).max()
            print(f"transformers on the CPU, float32: {seconds:.1f} s; largest difference {error:.1e} of the largest")


if __name__ == "__main__":
    main()
