"""A small random Gemma 3n that sees and hears, and a prompt with two images and a sound for it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.gemma3n import FAMILY, Gemma3nConfig
from gemma_wgpu.models.spec import TensorSpec
from tests.checkpoints import bfloat16, write_hf
from tests.reference import families, mobilenet, usm

BEGIN_IMAGE, BEGIN_SOUND = 380, 381
END_IMAGE, IMAGE, IMAGE_TOKENS = 384, 385, 4
END_SOUND, SOUND, SOUND_TOKENS = 448, 449, 12

HF: dict[str, Any] = {
    "architectures": ["Gemma3nForConditionalGeneration"],
    "model_type": "gemma3n",
    "text_config": families.CONFIGS["gemma3n"],
    "vision_config": mobilenet.HF["vision_config"] | {"vocab_size": 64, "vocab_offset": 384},
    "audio_config": usm.HF["audio_config"] | {"input_feat_size": 128, "vocab_size": 64, "vocab_offset": 448},
    "boi_token_id": BEGIN_IMAGE,
    "eoi_token_id": END_IMAGE,
    "image_token_id": IMAGE,
    "vision_soft_tokens_per_image": IMAGE_TOKENS,
    "boa_token_id": BEGIN_SOUND,
    "eoa_token_id": END_SOUND,
    "audio_token_id": SOUND,
    "audio_soft_tokens_per_image": SOUND_TOKENS,
}
CONFIG = Gemma3nConfig.from_hf(HF)

_IMAGE_IDS = [BEGIN_IMAGE, *[IMAGE] * IMAGE_TOKENS, END_IMAGE]
_SOUND_IDS = [BEGIN_SOUND, *[SOUND] * SOUND_TOKENS, END_SOUND]
_TEXT = families.IDS[1:]
PROMPT = [2, *_TEXT[:9], *_IMAGE_IDS, *_TEXT[9:12], *_SOUND_IDS, *_TEXT[12:24], *_IMAGE_IDS, *_TEXT[24:33]]
IMAGES = mobilenet.pixels()


def sound() -> NDArray[np.float32]:
    """Log-mel frames (90, 128), which become 6 tokens."""
    rng = np.random.Generator(np.random.PCG64(31))
    t, band = np.indices((90, 128))
    waves = 2 * np.sin(t / 7 + band / 9) + 1.5 * np.sin(t / 2.3 - band / 20)
    return (-5 + t / 30 + waves + rng.standard_normal(t.shape)).astype(np.float32)


def write(folder: Path) -> Path:
    """Write config.json and model.safetensors, the same bytes every time; return `folder`."""
    rng = np.random.Generator(np.random.PCG64(32))
    specs = sorted((*FAMILY.tensors(CONFIG), *FAMILY.unread(CONFIG)), key=lambda spec: spec.name)
    write_hf(folder, HF, {spec.name: ("bfloat16", bfloat16(_drawn(spec, rng))) for spec in specs})
    return folder


def _drawn(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    if not spec.tower:
        return families.weights(spec, rng)
    of = usm if "audio" in spec.name else mobilenet
    return of.drawn(rng, spec.name, spec.shape)
