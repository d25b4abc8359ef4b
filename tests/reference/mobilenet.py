"""A small random MobileNetV5 with blocks of all kinds, in which every part shows in the features."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.mobilenet_v5 import MobileNetV5Config, tensors

# Many matrices have the shapes of others, since each shape takes a second or two to compile on a CPU adapter.
STAGES = [
    ["er_r1_k3_s2_e2_c64", "er_r1_k3_s1_e2_c64"],
    ["uir_r1_a3_k5_s2_e2_c64", "uir_r1_a5_k0_s1_e2_c64", "uir_r1_a3_k0_s1_e2_c64"],
    [
        "uir_r1_a5_k3_s2_e2_c96",
        "uir_r1_a0_k0_s1_e1_c96",
        "mqa_r1_k3_h3_v2_s1_d32_c96",
        "uir_r1_a0_k0_s1_e2_c96",
    ],
    ["uir_r1_a5_k5_s2_e2_c96", "mqa_r1_k3_h2_s1_d96_c96", "uir_r1_a0_k0_s1_e2_c96"],
]
TEXT_HIDDEN = 96
# Images of 96 x 96 become 6 x 6 and 3 x 3 pixels in the last stages, and those become 2 x 2 tokens.
HF: dict[str, Any] = {
    "vision_config": {
        "model_type": "gemma3n_vision",
        "architecture": "mobilenetv5_300m_enc",
        "hidden_size": 2048,
        "vocab_size": 5,
        "vocab_offset": 500,
        "rms_norm_eps": 1e-6,
        "blocks": STAGES,
        "stem_size": 64,
        "image_size": 96,
    },
    "boi_token_id": 490,
    "eoi_token_id": 500,
    "image_token_id": 501,
    "vision_soft_tokens_per_image": 4,
}
_config = MobileNetV5Config.from_hf(HF, "config.json", "Gemma 3n")
assert _config
CONFIG = _config
TABLE = tensors(CONFIG, TEXT_HIDDEN)


def weights() -> dict[str, NDArray[np.float32]]:
    """The tensors of the table, by their names on the hub."""
    rng = np.random.Generator(np.random.PCG64(11))
    return {spec.name: drawn(rng, spec.name, spec.shape) for spec in sorted(TABLE, key=lambda spec: spec.name)}


def drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("gamma"):
        return np.float32(0.6) + np.float32(0.3) * noise
    if name.endswith("bias"):
        return np.float32(0.2) * noise
    if len(shape) == 1:
        # What a norm's weight is must show, that of the keys' image too, which the softmax hides.
        spread = 0.8 if ".key.norm." in name else 0.3
        return np.float32(1) + np.float32(spread) * noise
    sharper = 3.0 if ".query." in name or ".key.proj" in name else 1.0
    return noise * np.float32(sharper * np.prod(shape[1:]) ** -0.5)


def pixels() -> NDArray[np.float32]:
    """Two images (2, 3, 96, 96) from 0 to 1: waves of all sizes, with noise on one of them."""
    rng = np.random.Generator(np.random.PCG64(12))
    y, x = np.indices((96, 96)) / 96
    out = np.zeros((2, 3, 96, 96))
    for image in out:
        for _ in range(10):
            fy, fx, phase = rng.uniform((-40, -40, 0), (40, 40, 6.28))
            image += rng.standard_normal((3, 1, 1)) * np.sin(fy * y + fx * x + phase)
    out[1] += rng.standard_normal((3, 96, 96))
    return np.clip(0.5 + 0.15 * out, 0, 1).astype(np.float32)
