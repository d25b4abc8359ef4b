"""Tiny Gemma 3 models that read images: the text models of tests/tiny.py with a random tower beside them."""

import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.models.siglip import tensors
from gemma_wgpu.models.spec import Kind
from tests.broken_pictures import encoded, picture
from tests.checkpoints import write_hf
from tests.tiny import HF, PIECES, TYPES, Weights, random_weights
from tests.vocabulary import CONTROL, Vocabulary, tokenizer_json

IMAGE_TOKENS = 4
_MARKERS = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
_TEXT_PIECES = len(PIECES) - len(_MARKERS)

# 16 patches of 7 x 7 pixels become 4 tokens.
TOWER: dict[str, object] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}

RED = encoded(Image.new("RGB", (40, 30), "red"), "PNG")
NOISE = encoded(picture(), "PNG")


def sighted(hf: Mapping[str, object] = HF) -> dict[str, object]:
    """The configuration of a model that reads images, with the text model of another configuration."""
    begin, end, soft = range(_TEXT_PIECES, len(PIECES))
    return {
        "model_type": "gemma3",
        "text_config": dict(hf),
        "vision_config": TOWER,
        "boi_token_index": begin,
        "eoi_token_index": end,
        "image_token_index": soft,
        "mm_tokens_per_image": IMAGE_TOKENS,
    }


def data_uri(file: bytes) -> str:
    return "data:image/png;base64," + b64encode(file).decode()


def write_sighted(folder: Path, hf: Mapping[str, object] = HF, weights: Weights | None = None) -> Path:
    """A Hugging Face model folder in float32: a text model, with random weights if none are given, and a tower."""
    config = Gemma3Config.from_hf(sighted(hf))
    assert config.vision
    text = weights if weights is not None else random_weights(Gemma3Config.from_hf(hf))
    stored = {name: values - (values.ndim == 1) for name, values in text.items()}  # norms are less 1
    rng = np.random.default_rng(1)
    for spec in tensors(config.vision, config.hidden_size):
        noise = rng.standard_normal(spec.shape, np.float32)
        if spec.kind.is_matrix:
            rows = spec.shape[-1 if spec.transposed else 0]
            noise *= np.float32((spec.size / rows) ** -0.5)
        elif spec.kind is not Kind.TABLE:
            noise = (spec.kind is Kind.NORM) + np.float32(0.3) * noise
        stored[spec.name] = noise
    write_hf(folder, sighted(hf), {name: ("float32", values.astype(np.float32)) for name, values in stored.items()})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, size: int = 0) -> None:
    """Write a tokenizer.json that has the tokens of chats and of images, and `size` tokens at least."""
    types = [*TYPES[:_TEXT_PIECES], *[CONTROL] * len(_MARKERS)]
    pieces = [*PIECES[:_TEXT_PIECES], *_MARKERS]
    more = range(len(pieces), size)
    pieces, types = [*pieces, *(f"[{number}]" for number in more)], [*types, *(CONTROL for _ in more)]
    content = tokenizer_json(Vocabulary(pieces, -np.arange(len(pieces), dtype=np.float32), np.array(types, np.int32)))
    for entry in content["added_tokens"]:
        entry["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
