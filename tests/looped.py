"""A throw-away family, which proves that one file adds one: a transformer that goes through its layers twice.

It has no sliding window, its norms are stored as they are, and each pass has caches of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from gemma_wgpu.models.keys import Keys, gguf_keys, text_keys
from gemma_wgpu.models.spec import Family, Kind, LanguageModel, Loader, TensorSpec
from gemma_wgpu.ops.kv_cache import CacheSpec
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Attention, Norm, Normed, Step, Sum
from gemma_wgpu.tokens.chat import GEMMA3

PASSES, EPS = 2, 1e-5


@dataclass(frozen=True)
class LoopedConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int

    @classmethod
    def _read(cls, keys: Keys, prefix: str, vocab_size: int) -> Self:
        names = [name for name in cls.__dataclass_fields__ if name != "vocab_size"]
        return cls(vocab_size, **{name: keys.count(prefix + name) for name in names})

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        keys = text_keys(config, source, "Looped", ("looped",))
        return cls._read(keys, "", keys.count("vocab_size"))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        keys, vocab_size = gguf_keys(metadata, source, "Looped", "looped")
        return cls._read(keys, "looped.", vocab_size)

    def to_hf(self) -> dict[str, object]:
        return {"model_type": "looped", **asdict(self)}

    def summary(self) -> dict[str, str]:
        return {"layers": f"{self.num_hidden_layers}, each of them {PASSES} times"}


def tensors(config: LoopedConfig) -> list[TensorSpec]:
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    table = [TensorSpec("embed.weight", "token_embd.weight", (config.vocab_size, hidden), Kind.EMBEDDING)]
    for layer in range(config.num_hidden_layers):
        vectors = {"norm_in": hidden, "norm_attn": hidden, "norm_ff": hidden, "norm_out": hidden}
        vectors |= {"norm_q": config.head_dim, "norm_k": config.head_dim}
        matrices = {"qkv": (3 * heads, hidden), "o": (hidden, heads), "gate_up": (2 * inner, hidden)}
        matrices["down"] = (hidden, inner)
        table += [
            TensorSpec(f"layers.{layer}.{name}", f"blk.{layer}.{name}", (size,), Kind.NORM)
            for name, size in vectors.items()
        ]
        table += [
            TensorSpec(f"layers.{layer}.{name}", f"blk.{layer}.{name}", shape) for name, shape in matrices.items()
        ]
    return [*table, TensorSpec("norm.weight", "output_norm.weight", (hidden,), Kind.NORM)]


class Looped(LanguageModel):
    norm: Norm

    def __init__(self, config: LoopedConfig) -> None:
        self.config = config
        self.ropes = (Rope(5000.0, config.head_dim),)
        count = PASSES * config.num_hidden_layers
        self.layers: list[tuple[list[Norm], list[Linear]]] = []
        self.caches = [CacheSpec(config.num_attention_heads, config.head_dim, None)] * count

    @classmethod
    async def load(cls, config: LoopedConfig, loader: Loader) -> Looped:
        model = cls(config)
        model.head = await loader.linear("embed.weight")
        names = ("norm_in", "norm_attn", "norm_ff", "norm_out", "norm_q", "norm_k")
        for index in range(config.num_hidden_layers):
            norms = [await loader.norm(f"layers.{index}.{name}", EPS) for name in names]
            matrices = [await loader.linear(f"layers.{index}.{name}") for name in ("qkv", "o", "gate_up", "down")]
            model.layers.append((norms, matrices))
        model.norm = await loader.norm("norm.weight", EPS)
        return model

    def forward(self, step: Step) -> Normed:
        config, heads = self.config, self.config.num_attention_heads
        x: Value | Sum = step.embed(self.head, scale=1.0)
        for pass_ in range(PASSES):
            for index, (norms, (qkv, o, gate_up, down)) in enumerate(self.layers):
                n_in, n_attn, n_ff, n_out, n_q, n_k = norms
                cache = pass_ * config.num_hidden_layers + index
                attention = Attention(
                    heads, heads, config.head_dim, 0.3, None, q_norm=n_q, k_norm=n_k, rope=self.ropes[0], cache=cache
                )
                h = step.attention(attention, step.linear(qkv, step.norm(x, n_in), "qkv"))
                x = step.add(x, step.norm(step.linear(o, h), n_attn))
                h = step.geglu(step.linear(gate_up, step.norm(x, n_ff), "gate_up"))
                x = step.add(x, step.norm(step.linear(down, h), n_out))
        return step.norm(x, self.norm)


FAMILY = Family("Looped", ("looped",), ("looped",), LoopedConfig, tensors, Looped.load, GEMMA3)
