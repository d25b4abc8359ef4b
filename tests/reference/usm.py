"""A small random audio encoder of Gemma 3n, in which every part of it shows in the features."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.usm import UsmConfig, tensors

TEXT_HIDDEN = 96
# Sounds of 32 bands, which become 8: a head has 24 numbers, and 16 frames become a token.
HF: dict[str, Any] = {
    "audio_config": {
        "model_type": "gemma3n_audio",
        "hidden_size": 96,
        "input_feat_size": 32,
        "conf_num_hidden_layers": 3,
        "conf_num_attention_heads": 4,
        "sscp_conv_channel_size": [8, 12],
        "vocab_size": 5,
        "vocab_offset": 500,
    },
    "boa_token_id": 490,
    "eoa_token_id": 500,
    "audio_token_id": 501,
    "audio_soft_tokens_per_image": 12,
}
_config = UsmConfig.from_hf(HF, "config.json", "Gemma 3n")
assert _config
CONFIG = _config
TABLE = tensors(CONFIG, TEXT_HIDDEN)

# The layers see chunks of 12 frames, of which each stands for four: less than one, one and a frame, and nearly four,
# which fill all tokens.
LENGTHS = (5, 50, 187)


def weights() -> dict[str, NDArray[np.float32]]:
    """The tensors of the table, by their names on the hub."""
    rng = np.random.Generator(np.random.PCG64(21))
    return {spec.name: drawn(rng, spec.name, spec.shape) for spec in sorted(TABLE, key=lambda spec: spec.name)}


def drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("per_dim_scale"):
        return noise
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.3) * noise
    if name.endswith("embed_audio.embedding.weight"):
        return noise
    # Scores of attentions are to reach their cap.
    sharper = 5.0 if "q_proj" in name or "k_proj" in name or "pos_proj" in name else 1.0
    return noise * np.float32(sharper * np.prod(shape[1:]) ** -0.5)


def sound(frames: int) -> NDArray[np.float32]:
    """Log-mel frames (frames, 32): bands that rise and fall, ever louder, so that the running moments change."""
    rng = np.random.Generator(np.random.PCG64(frames))
    t, band = np.indices((frames, CONFIG.input_feat_size))
    loudness = -9 + 8 * t / LENGTHS[-1]
    waves = 2 * np.sin(t / 7 + band / 3) + 1.5 * np.sin(t / 2.3 - band / 5)
    return (loudness + waves + rng.standard_normal(t.shape)).astype(np.float32)
