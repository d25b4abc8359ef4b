"""How long the audio encoder of Gemma 3n takes for one sound, and how far its features are from transformers'.

The encoder has the full shape (a conformer of 12 layers of 1536, 681 million parameters) and seeded random bf16
weights. The sound is 30 seconds of log-mel frames, which become 188 tokens. A shorter one goes before, for which the
shaders are compiled. transformers runs on the CPU in float32, with as many threads as there are cores. It needs torch
and transformers besides, unless --no-peer is given, and 5 GB of memory.

    python -m benchmarks.hearing [--layers 12] [--seconds 30] [--precision f32] [--kernels] [--no-peer]
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from benchmarks.make_random import bf16
from gemma_wgpu.engine.encoder import Encoder
from gemma_wgpu.engine.prompt import Medium
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.gpu.native import open_native
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.models.usm import FRAMES_PER_SECOND, Usm, UsmConfig, tensors
from gemma_wgpu.ops.kernels import Kernels
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.step import Norms
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.checkpoint import LocalTensor, Weights
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.upload import Upload

TEXT_HIDDEN = 2048


def config(layers: int) -> dict[str, object]:
    """Return the config.json of the encoder, in which all else is as by default."""
    return {"audio_config": {"model_type": "gemma3n_audio", "conf_num_hidden_layers": layers}}


def drawn(spec: TensorSpec) -> NDArray[np.uint16]:
    """Return random weights as the bits of bf16 numbers, which keep activations in range: the same at each call."""
    rng = np.random.default_rng(list(spec.name.encode()))
    noise = rng.standard_normal(spec.shape, np.float32)
    if spec.name.endswith("per_dim_scale"):
        return bf16(noise)
    if spec.kind == Kind.NORM:
        return bf16(np.float32(1) + np.float32(0.2) * noise)
    sharper = 1.5 if "q_proj" in spec.name or "k_proj" in spec.name else 1.0
    return bf16(noise * np.float32(sharper * np.prod(spec.shape[1:]) ** -0.5))


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bf16 numbers as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Drawn(Weights):
    """The random weights of a table."""

    name, quantization, reports_progress, config = "random", "bf16", False, None

    def __init__(self, table: Sequence[TensorSpec]) -> None:
        self.family = SimpleNamespace(name="tower", tensors=lambda config: table)  # type: ignore[assignment]

    @property
    def place(self) -> str:
        """Say where they are."""
        return "memory"

    def tensor(self, name: str) -> "DrawnMatrix":
        """Return a matrix of the table."""
        return DrawnMatrix(self.spec(name, matrix=True))

    async def vector(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix."""
        return widened(drawn(self.spec(name, matrix=False)))

    def tokenizer(self) -> Tokenizer:
        """Return nothing: there is none."""
        raise NotImplementedError

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class DrawnMatrix(LocalTensor):
    """A random matrix, in whole blocks of columns."""

    layout = Layout.BF16

    def __init__(self, spec: TensorSpec) -> None:
        self.name, self.shape = spec.name, spec.stored_shape
        self._bits = drawn(spec)

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default."""
        start, stop = self._checked(start, stop)
        rows = self._bits[start:stop].reshape(stop - start, -1)
        words = np.pad(rows, ((0, 0), (0, self.shape[1] - rows.shape[1]))).reshape(-1).view(np.uint32)
        return Packed(self.layout, stop - start, self.shape[1], words, np.empty(0, np.uint32))


def sound(frames: int, bands: int) -> NDArray[np.float32]:
    """Return log-mel frames of waves that get louder, with noise."""
    t, band = np.indices((frames, bands))
    waves = 2 * np.sin(t / 7 + band / 11) + 1.5 * np.sin(t / 2.3 - band / 19)
    noise = np.random.default_rng(0).standard_normal(t.shape)
    return (-8 + 4 * t / frames + waves + noise).astype(np.float32)


def theirs(layers: int, table: Sequence[TensorSpec], mel: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Return transformers' features of a sound, its own tokens alone, and the seconds that they take."""
    import torch
    from transformers import Gemma3nAudioConfig, Gemma3nTextConfig
    from transformers.models.gemma3n import modeling_gemma3n as source

    shape, specs = Gemma3nAudioConfig(conf_num_hidden_layers=layers), {spec.name: spec for spec in table}
    tower = source.Gemma3nAudioEncoder(shape).eval()
    embedder = source.Gemma3nMultimodalEmbedder(shape, Gemma3nTextConfig(hidden_size=TEXT_HIDDEN)).eval()
    for module, prefix in ((tower, "model.audio_tower."), (embedder, "model.embed_audio.")):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(widened(drawn(specs[prefix + name]))))
    with torch.inference_mode():
        start = time.perf_counter()
        frames = torch.from_numpy(mel)[None]
        encoded = tower(frames, torch.zeros(frames.shape[:2], dtype=torch.bool), return_dict=True).last_hidden_state
        features = embedder(inputs_embeds=encoded)[0].numpy()
    return features, time.perf_counter() - start


def report_kernels(device: Device, encoder: Encoder, medium: Medium) -> None:
    """Print the seconds of the encoder's kernels on the GPU."""
    encoding = encoder.begin(medium)
    times = device.wait(device.profile(encoding.programs))
    totals: dict[str, float] = defaultdict(float)
    for launch, seconds in zip(encoding.launches, times, strict=True):
        totals[f"{launch.shader} {launch.workgroups}"] += float(seconds)
    encoding.close()
    for name, seconds in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{name:40}{seconds:8.3f} s")


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--precision", choices=("f32", "f16"), default="f32")
    parser.add_argument("--kernels", action="store_true", help="time the kernels one by one too")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    shape = UsmConfig.from_hf(config(options.layers), "config.json", "Gemma 3n")
    assert shape is not None
    table = tensors(shape, TEXT_HIDDEN)
    # A frame is 33 milliseconds long, and begins 10 milliseconds after the one before.
    mel = sound(round(options.seconds * FRAMES_PER_SECOND) - 3, shape.input_feat_size)
    medium = Medium(mel, -1, "sound")
    device = open_native()
    try:
        tower = device.wait(Usm.load(shape, Upload(device, Drawn(table), lambda _: None)))
        weights = device.allocated
        encoder = Encoder(device, Kernels(device, half=options.precision == "f16"), Norms(device), tower)
        device.wait(encoder.encode(Medium(mel[:160], -2, "sound")))
        start = time.perf_counter()
        features = device.wait(encoder.encode(medium, lambda p: print(f"\r{p.done}/{p.total}", end="")))
        seconds = time.perf_counter() - start
        encoding = encoder.begin(medium)
        print(
            f"\r{device.info}, {options.precision}: {len(mel)} frames in {seconds:.1f} s, "
            f"{len(encoding.launches)} dispatches, {encoding.scratch_bytes / 1e6:.0f} MB beside the "
            f"{weights / 1e6:.0f} MB of weights"
        )
        encoding.close()
        if options.kernels:
            report_kernels(device, encoder, medium)
    finally:
        device.close()
    if not options.no_peer:
        expected, seconds = theirs(options.layers, table, mel)
        error = np.abs(features[: len(expected)] - expected).max() / np.abs(expected).max()
        print(f"transformers on the CPU, float32: {seconds:.1f} s; largest difference {error:.1e} of the largest")


if __name__ == "__main__":
    main()
