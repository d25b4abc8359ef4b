"""What Gemma 3n and Gemma 4 have in common: layers that share a cache, and how files name tensors."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_wgpu.models.keys import GLOBAL
from gemma_wgpu.ops.kv_cache import CacheSpec

HF_TEXT = "model.language_model."
HF_TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
# A language model alone has its tensors under "model.", and a multimodal one has towers beside it.
HF_PREFIXES = {HF_TEXT: HF_TEXT, **{tower: tower for tower in HF_TOWERS}, "model.": HF_TEXT}

_OWN = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def is_unread(name: str, own: int) -> bool:
    """Say whether a tensor is of the keys and values of a layer that reads others': one from number `own` on.

    Files hold such tensors. `name` is that of Hugging Face.
    """
    layer, _, rest = name.removeprefix(f"{HF_TEXT}layers.").partition(".")
    return rest in _OWN and int(layer) >= own


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
