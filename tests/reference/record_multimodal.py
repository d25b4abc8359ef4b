"""Records what transformers makes of the Gemma 3n of multimodal.py, in float32.

python -m pip install --editable . --group test --group reference
python -m pip install timm
python -m tests.reference.record_multimodal

Writes multimodal.npz next to this file: `logits` float32 (ids, 512) of the prompt, and `greedy`, the 8 likeliest ids
that follow, one after the other.
"""

import tempfile
from pathlib import Path

import numpy as np
import timm.models.mobilenetv5 as source
import torch
from safetensors.torch import load_file
from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

from gemma_wgpu.models.gemma3n import FAMILY
from tests.reference.mobilenet import STAGES
from tests.reference.multimodal import CONFIG, HF, IMAGES, PROMPT, sound, write


def model() -> Gemma3nForConditionalGeneration:
    """Return the model with its weights. The vision tower is the one that timm makes, with other blocks."""
    decode = source.decode_arch_def
    source.decode_arch_def = lambda _, **keywords: decode(STAGES, **keywords)
    vision = {
        key: value for key, value in HF["vision_config"].items() if key not in ("blocks", "stem_size", "image_size")
    }
    vision["model_args"] = {
        "stem_size": HF["vision_config"]["stem_size"],
        "fix_stem": True,
        "msfa_output_resolution": 2,
    }
    config = Gemma3nConfig(**HF | {"vision_config": vision}, attn_implementation="eager")
    try:
        built = Gemma3nForConditionalGeneration(config).eval()
    finally:
        source.decode_arch_def = decode
    with tempfile.TemporaryDirectory() as folder:
        weights = load_file(write(Path(folder)) / "model.safetensors")
    missing, unexpected = built.load_state_dict(
        {name: tensor.float() for name, tensor in weights.items()}, strict=False
    )
    assert set(unexpected) == {spec.name for spec in FAMILY.unread(CONFIG)}, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    built.tie_weights()
    return built


@torch.inference_mode()
def main() -> None:
    reference = model()
    ids, mel = torch.tensor([PROMPT]), torch.from_numpy(sound())[None]
    given = {
        "pixel_values": torch.from_numpy(IMAGES),
        "input_features": mel,
        "input_features_mask": torch.ones(mel.shape[:2], dtype=torch.bool),
        "attention_mask": torch.ones_like(ids),
    }
    logits = reference(ids, use_cache=False, **given).logits[0].numpy()
    text, following = ids, []
    for _ in range(8):
        last = reference(text, use_cache=False, **given | {"attention_mask": torch.ones_like(text)}).logits[0, -1]
        top = last.topk(2)
        print("margin", (top.values[0] - top.values[1]).item())
        following.append(int(top.indices[0]))
        text = torch.cat((text, top.indices[:1][None]), dim=1)
    print("deviation", logits.std(), following)
    recorded = {"logits": logits, "greedy": np.array(following)}
    np.savez_compressed(Path(__file__).with_name("multimodal.npz"), **recorded)


if __name__ == "__main__":
    main()
