"""What Gemma 3n and Gemma 4 have in common: inputs by layer, layers that share a cache, and the names of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_wgpu.models.keys import GLOBAL
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.kv_cache import CacheSpec

HF_TEXT = "model.language_model."
HF_TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
# A language model alone has its tensors under "model.", and a multimodal one has towers beside it.
HF_PREFIXES = {HF_TEXT: HF_TEXT, **{tower: tower for tower in HF_TOWERS}, "model.": HF_TEXT}

EMBEDDING = f"{HF_TEXT}embed_tokens.weight"
PER_LAYER_TABLE = f"{HF_TEXT}embed_tokens_per_layer.weight"
PER_LAYER_PROJECTION = f"{HF_TEXT}per_layer_model_projection.weight"
PER_LAYER_NORM = f"{HF_TEXT}per_layer_projection_norm.weight"
FINAL_NORM = f"{HF_TEXT}norm.weight"

_OWN = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def tensors_before_layers(
    *, vocab_size: int, vocab_size_per_layer_input: int, hidden_size: int, per_layer_size: int, layers: int
) -> list[TensorSpec]:
    """Return the table of the embedding, and of what makes the inputs of `per_layer_size` that each layer has."""
    inputs = layers * per_layer_size
    return [
        TensorSpec(
            EMBEDDING,
            "token_embd.weight",
            (vocab_size, hidden_size),
            Kind.EMBEDDING,
            copies=("lm_head.weight", "output.weight"),
        ),
        TensorSpec(PER_LAYER_TABLE, "per_layer_token_embd.weight", (vocab_size_per_layer_input, inputs), Kind.LOOKUP),
        TensorSpec(PER_LAYER_PROJECTION, "per_layer_model_proj.weight", (inputs, hidden_size)),
        TensorSpec(PER_LAYER_NORM, "per_layer_proj_norm.weight", (per_layer_size,), Kind.NORM),
    ]


def is_unread(name: str, own: int) -> bool:
    """Say whether a tensor is of the keys and values of a layer that reads others': one from number `own` on.

    Files hold such tensors. `name` is that of Hugging Face.
    """
    layer, _, rest = name.removeprefix(f"{HF_TEXT}layers.").partition(".")
    return rest in _OWN and int(layer) >= own


def has_sources(layer_types: Sequence[str], shared: int) -> bool:
    """Say whether each kind of layers has keys and values, though the last `shared` layers have none of their own."""
    return set(layer_types) == set(layer_types[: len(layer_types) - shared])


def sources(layer_types: Sequence[str], shared: int) -> list[int]:
    """Return whose keys and values each layer reads: its own, or those of the last layer of its kind that has some.

    The last `shared` layers have none of their own.
    """
    own = len(layer_types) - shared
    last = {kind: index for index, kind in enumerate(layer_types[:own])}
    return [index if index < own else last[kind] for index, kind in enumerate(layer_types)]


def caches(
    layer_types: Sequence[str], shared: int, *, kv_heads: int, head_dims: Sequence[int], window: int
) -> list[CacheSpec]:
    """Return the caches, one for each layer that has keys and values of its own, in order."""
    read = sources(layer_types, shared)
    return [
        CacheSpec(kv_heads, head_dims[index], None if layer_types[index] == GLOBAL else window, read.count(index))
        for index in range(len(layer_types) - shared)
    ]
