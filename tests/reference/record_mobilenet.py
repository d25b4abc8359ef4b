"""Records what timm and transformers make of the small MobileNetV5 of mobilenet.py, in float32.

python -m pip install --editable . --group test --group reference
python -m pip install timm
python -m tests.reference.record_mobilenet

Writes mobilenet.npz next to this file, of two images: `last`, the last stage's image float32 (2, 9, 96),
`features` float32 (2, 4, 96), and `hard` float32 (5, 96), the embeddings of the tower's own ids. The encoder is the
one that timm makes, with other blocks. It prints how much each trap shows in the features.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.layers
import timm.models.mobilenetv5 as source
import torch
from transformers import Gemma3nTextConfig, Gemma3nVisionConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

from tests.reference.mobilenet import CONFIG, HF, STAGES, TEXT_HIDDEN, pixels, weights

SIDE = 2


def encoder() -> Any:
    """timm's encoder with the blocks of mobilenet.py: all else is as it is in mobilenetv5_300m_enc."""
    decode = source.decode_arch_def
    source.decode_arch_def = lambda _, **keywords: decode(STAGES, **keywords)
    try:
        return timm.create_model(
            "mobilenetv5_300m_enc", stem_size=CONFIG.stem_size, fix_stem=True, msfa_output_resolution=SIDE
        ).eval()
    finally:
        source.decode_arch_def = decode


def embedder() -> Any:
    vision = {key: HF["vision_config"][key] for key in ("hidden_size", "vocab_size", "vocab_offset", "rms_norm_eps")}
    text = Gemma3nTextConfig(hidden_size=TEXT_HIDDEN, num_attention_heads=2)
    return Gemma3nMultimodalEmbedder(Gemma3nVisionConfig(**vision), text).eval()


@torch.inference_mode()
def main() -> None:
    tower, embed = encoder(), embedder()
    tensors = {name: torch.from_numpy(values) for name, values in weights().items()}
    for module, prefix in ((tower, "model.vision_tower.timm_model."), (embed, "model.embed_vision.")):
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
    images = torch.from_numpy(pixels())
    lasts: list[torch.Tensor] = []
    tower.blocks[-1].register_forward_hook(lambda module, inputs, out: lasts.append(out))

    def features() -> torch.Tensor:
        encoded = tower(images).flatten(2).permute(0, 2, 1) * CONFIG.hidden_size**0.5
        return embed(inputs_embeds=encoded)

    recorded = {"features": features().numpy(), "last": lasts[0].flatten(2).permute(0, 2, 1).numpy()}
    ids = torch.arange(CONFIG.vocab_offset, CONFIG.vocab_offset + CONFIG.vocab_size)
    recorded["hard"] = embed(input_ids=ids).numpy()
    np.savez_compressed(Path(__file__).with_name("mobilenet.npz"), **recorded)
    print("features", recorded["features"].std(), "last", recorded["last"].std())
    for name, undo in traps(tower):
        difference = np.abs(features().numpy() - recorded["features"]).max()
        undo()
        print(f"without {name}: {difference:.3f}")
    assert np.array_equal(features().numpy(), recorded["features"])


def traps(tower: Any) -> Iterable[tuple[str, Callable[[], object]]]:
    """Leave one thing after the other out of an encoder; each comes with what puts it back."""
    same = timm.layers.Conv2dSame
    forward = same.forward
    same.forward = lambda self, x: torch.nn.functional.conv2d(
        x, self.weight, self.bias, self.stride, tuple(size // 2 for size in self.kernel_size), 1, self.groups
    )
    yield "the padding of strided convolutions", lambda: setattr(same, "forward", forward)
    attentions = [module for module in tower.modules() if type(module).__name__ == "MultiQueryAttention2d"]
    for attention in attentions:
        attention.fused_attn, attention.scale = False, 1.0

    def scale_again() -> None:
        for attention in attentions:
            attention.fused_attn = True

    yield "the scale of queries", scale_again
    norms = [module.key.norm for module in attentions if hasattr(module.key, "norm")]
    kept = [norm.weight.clone() for norm in norms]
    for norm in norms:
        norm.weight.fill_(1)
    yield "the norm of the keys' image", lambda: [a.weight.copy_(b) for a, b in zip(norms, kept, strict=True)]


if __name__ == "__main__":
    main()
