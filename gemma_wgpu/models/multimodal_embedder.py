"""What Gemma 3n puts behind its towers: it takes features into the space of the language model's embeddings.

Those are soft tokens. Some token ids of a kind of its own, the hard ones, have rows of a table beside it instead. The
formulas are those of transformers' Gemma3nMultimodalEmbedder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.keys import Keys
from gemma_wgpu.models.spec import Kind, Loader, TensorSpec, Tower
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm

VISION = "model.embed_vision."
AUDIO = "model.embed_audio."
_GGUF = {VISION: "mm.", AUDIO: "mm.a."}


@dataclass(frozen=True, eq=False)
class MultimodalEmbedder:
    """The weights of an embedder: a table of hard tokens, a norm for either kind of tokens, and one projection."""

    embedding: Operand  # float32 (vocab, multimodal hidden size)
    hard_norm: Norm
    soft_norm: Norm
    projection: Linear
    post_norm: Norm  # it has no weights of its own

    @staticmethod
    def tensors(prefix: str, vocab: int, multimodal_hidden: int, text_hidden: int) -> list[TensorSpec]:
        """Return the table of the embedder that is called `prefix`, VISION or AUDIO, in the order of use."""
        return [
            TensorSpec(f"{prefix}{name}.weight", f"{_GGUF[prefix]}{gguf}.weight", shape, kind, tower=True)
            for name, gguf, shape, kind in (
                ("embedding", "embedding", (vocab, multimodal_hidden), Kind.TABLE),
                ("hard_embedding_norm", "hard_emb_norm", (multimodal_hidden,), Kind.NORM),
                ("soft_embedding_norm", "soft_emb_norm", (multimodal_hidden,), Kind.NORM),
                ("embedding_projection", "input_projection", (text_hidden, multimodal_hidden), Kind.MATRIX),
            )
        ]

    @classmethod
    async def load(cls, loader: Loader, prefix: str, eps: float) -> MultimodalEmbedder:
        """Load the weights, in the order of the table; `eps` is that of all norms."""
        embedding = await loader.vectors(f"{prefix}embedding.weight")
        hard_norm = await loader.norm(f"{prefix}hard_embedding_norm.weight", eps)
        soft_norm = await loader.norm(f"{prefix}soft_embedding_norm.weight", eps)
        projection = await loader.linear(f"{prefix}embedding_projection.weight")
        post_norm = Norm(np.ones(projection.rows, np.float32), eps)
        return cls(embedding, hard_norm, soft_norm, projection, post_norm)

    def soft(self, step: EncoderStep, x: Value) -> Value:
        """Return the embeddings of features (count, hidden size), float32 (count, hidden size of the text)."""
        return self._projected(step, step.rms_norm(x, self.soft_norm))

    def hard(self, step: EncoderStep) -> Value:
        """Return the embeddings of all hard tokens, float32 (vocab, hidden size of the text)."""
        rows = self.embedding.nbytes if isinstance(self.embedding, Value) else self.embedding.size
        rows //= 4 * len(self.hard_norm.weight)
        return self._projected(step, step.rms_norm(self.embedding, self.hard_norm, rows=rows))

    def _projected(self, step: EncoderStep, x: Value) -> Value:
        return step.rms_norm(step.linear(self.projection, x), self.post_norm, half=False)


@dataclass(frozen=True)
class HardConfig:
    """An embedder whose tower is missing: its hard tokens can be in a prompt, and no images or sounds.

    `key` is what config.json calls it, "vision_config" or "audio_config", and `prefix` is VISION or AUDIO. The
    `vocab_size` ids from `vocab_offset` on are its hard tokens.
    """

    key: str
    prefix: str
    hidden_size: int
    vocab_size: int
    vocab_offset: int
    rms_norm_eps: float

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], key: str, prefix: str, defaults: tuple[int, int], source: str, family: str
    ) -> Self | None:
        """Read a part of a config.json; return None unless it says `"tower": false`.

        `defaults` are the hidden size and the first id. Raises ModelError, which names `source` and the key.
        """
        part = config.get(key)
        if not isinstance(part, Mapping) or part.get("tower") is not False:
            return None
        keys = Keys(config, source, family).inner(key)
        return cls(
            key=key,
            prefix=prefix,
            hidden_size=keys.size("hidden_size", defaults[0]),
            vocab_size=keys.count("vocab_size", 128),
            vocab_offset=keys.count("vocab_offset", defaults[1]),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        )

    def to_hf(self) -> dict[str, object]:
        """Return the part of a config.json that `from_hf` reads."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "vocab_size", "vocab_offset", "rms_norm_eps")}
        return {self.key: sizes | {"tower": False}}

    def summary(self) -> dict[str, str]:
        """Return nothing that people want to know."""
        return {}

    def tensors(self, text_hidden_size: int) -> list[TensorSpec]:
        """Return the table of the embedder, in the order of use."""
        return MultimodalEmbedder.tensors(self.prefix, self.vocab_size, self.hidden_size, text_hidden_size)


class HardTokens(Tower):
    """An embedder without its tower."""

    def __init__(self, config: HardConfig, embedder: MultimodalEmbedder) -> None:
        self.hard = range(config.vocab_offset, config.vocab_offset + config.vocab_size)
        self._embedder = embedder

    @classmethod
    async def load(cls, config: HardConfig, loader: Loader) -> HardTokens:
        """Load the weights, in the order of the table."""
        return cls(config, await MultimodalEmbedder.load(loader, config.prefix, config.rms_norm_eps))

    def patches(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raise NotImplementedError: there is no tower."""
        raise NotImplementedError

    def forward(self, step: EncoderStep) -> Value:
        """Raise NotImplementedError: there is no tower."""
        raise NotImplementedError

    def hard_rows(self, step: EncoderStep) -> Value:
        """Return the vectors of the hard tokens."""
        return self._embedder.hard(step)
