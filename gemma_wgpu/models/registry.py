"""The families that there are, and which of them a file belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from gemma_wgpu.models import gemma3, gemma3n, gemma4
from gemma_wgpu.models.keys import Keys, listed, shown
from gemma_wgpu.models.spec import Family

FAMILIES: list[Family] = [gemma3.FAMILY, gemma3n.FAMILY, gemma4.FAMILY]


def family_of_hf(config: Mapping[str, object], source: str) -> Family:
    """Return the family of a config.json. Raises ModelError, which names `source`, if it is none of ours."""
    return _family(config, source, "model_type", {kind: f for f in FAMILIES for kind in f.model_types})


def family_of_gguf(metadata: Mapping[str, object], source: str) -> Family:
    """Return the family of a GGUF file. Raises ModelError, which names `source`, if it is none of ours."""
    return _family(metadata, source, "general.architecture", {kind: f for f in FAMILIES for kind in f.architectures})


def _family(content: Mapping[str, object], source: str, key: str, families: Mapping[str, Family]) -> Family:
    keys = Keys(content, source, "language")
    kind = keys.text(key)
    if kind not in families:
        raise keys.error(key, f"is {shown(kind)}; only {listed(list(families))} can be run")
    return families[kind]
