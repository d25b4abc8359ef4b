"""What Gemma 3n puts behind its towers: it takes features into the space of the language model's embeddings.

Those are soft tokens. Some token ids of a kind of its own, the hard ones, have rows of a table beside it instead. The
formulas are those of transformers' Gemma3nMultimodalEmbedder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.models.spec import Kind, Loader, TensorSpec
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
