"""Gemma 3, the language model (Gemma 3 report, arXiv 2503.19786); siglip.py has the tower of those that see.

The residual stream is float32 in every precision: it passes the range of float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models import siglip
from gemma_wgpu.models.keys import (
    GLOBAL,
    LOCAL,
    MOST_LAYERS,
    gguf_keys,
    gguf_rope_factor,
    hf_layer_types,
    hf_rope,
    pattern,
    text_keys,
)
from gemma_wgpu.models.siglip import SiglipConfig
from gemma_wgpu.models.spec import Family, Kind, LanguageModel, Loader, TensorSpec
from gemma_wgpu.ops.kv_cache import CacheSpec
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Attention, Norm, Normed, Step, Sum
from gemma_wgpu.tokens.chat import GEMMA3

NAME = "Gemma 3"
MODEL_TYPES = ("gemma3", "gemma3_text")
ARCHITECTURE = "gemma3"

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"

_EVERY = 6  # every sixth layer is global
_LOCAL_THETA = 10_000.0
_THETA = 1_000_000.0


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of a Gemma 3. Names, meanings and defaults are those of Hugging Face's Gemma3TextConfig.

    `rope_theta` and `rope_scaling_factor` are of the global layers, whose positions are divided by the factor;
    `rope_local_base_freq` is of the local ones. `sliding_window` counts the query itself. Attention scores are scaled
    by `query_pre_attn_scalar ** -0.5`. `vision` is the tower that reads images, or None
    if the model reads text only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_local_base_freq: float
    rope_scaling_factor: float
    sliding_window: int
    max_position_embeddings: int
    query_pre_attn_scalar: float
    layer_types: tuple[str, ...]
    vision: SiglipConfig | None = None

    def is_global(self, layer: int) -> bool:
        """Say whether `layer` (from 0) attends to the whole context, rather than to the sliding window."""
        return self.layer_types[layer] == GLOBAL

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        """Read a config.json. Raises ModelError, which names `source` and the key."""
        keys = text_keys(config, source, NAME, MODEL_TYPES)
        keys.refuse("attention_bias", "use_bidirectional_attention")
        keys.refuse("attn_logit_softcapping", "final_logit_softcapping")
        layers = keys.count("num_hidden_layers", most=MOST_LAYERS)
        theta, factor, local_theta = hf_rope(keys, _THETA, _LOCAL_THETA)
        # Published files leave out what equals transformers' defaults; the tensors' shapes show a wrong one.
        built = cls(
            vocab_size=keys.count("vocab_size", 262_208),
            hidden_size=keys.size("hidden_size"),
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=keys.count("num_attention_heads", 8),
            num_key_value_heads=keys.count("num_key_value_heads", 4),
            head_dim=keys.count("head_dim", 256),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_local_base_freq=local_theta,
            rope_scaling_factor=factor,
            sliding_window=keys.count("sliding_window", 4096),
            max_position_embeddings=keys.count("max_position_embeddings", 131_072),
            query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256),
            layer_types=hf_layer_types(keys, layers, _EVERY),
            vision=SiglipConfig.from_hf(config, source, NAME),
        )
        keys.check_heads(
            ("num_attention_heads", built.num_attention_heads),
            ("num_key_value_heads", built.num_key_value_heads),
            ("head_dim", built.head_dim),
        )
        return built

    def to_hf(self) -> dict[str, object]:
        """Return a config.json that `from_hf` and transformers read."""
        config: dict[str, object] = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
        config |= asdict(self)
        del config["vision"]
        config["layer_types"] = list(self.layer_types)
        factor = config.pop("rope_scaling_factor")
        config["rope_scaling"] = None if factor == 1 else {"rope_type": "linear", "factor": factor}
        config |= {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
        if self.vision is None:
            return config
        outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
        return outer | self.vision.to_hf(config)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        """Read the metadata of a GGUF file. Raises ModelError, which names `source` and the key.

        What the format leaves out is as in llama.cpp: the pattern of layers, local theta and attention scale.
        """
        keys, vocab_size = gguf_keys(metadata, source, NAME, ARCHITECTURE)
        keys.refuse("gemma3.final_logit_softcapping")
        layers = keys.count("gemma3.block_count", most=MOST_LAYERS)
        hidden = keys.size("gemma3.embedding_length")
        heads = keys.count("gemma3.attention.head_count")
        head_dim = keys.count("gemma3.attention.key_length")
        built = cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=keys.size("gemma3.feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys.count("gemma3.attention.head_count_kv"),
            head_dim=head_dim,
            rms_norm_eps=keys.number("gemma3.attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("gemma3.rope.freq_base", _THETA),
            rope_local_base_freq=keys.number("gemma3.rope.freq_base_swa", _LOCAL_THETA),
            rope_scaling_factor=gguf_rope_factor(keys, ARCHITECTURE),
            sliding_window=keys.count("gemma3.attention.sliding_window"),
            max_position_embeddings=keys.count("gemma3.context_length"),
            # Only the 27B, which alone has 62 layers, does not scale by its head size.
            query_pre_attn_scalar=hidden / heads if layers == 62 else float(head_dim),
            layer_types=pattern(keys.count("gemma3.attention.sliding_window_pattern", _EVERY), layers),
        )
        if keys.count("gemma3.attention.value_length", head_dim) != head_dim:
            raise keys.error("gemma3.attention.value_length", f"is not the key length, {head_dim}")
        keys.check_heads(
            ("gemma3.attention.head_count", heads),
            ("gemma3.attention.head_count_kv", built.num_key_value_heads),
            ("gemma3.attention.key_length", head_dim),
        )
        return built

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        local = self.layer_types.count(LOCAL)
        shape = {
            "layers": f"{self.num_hidden_layers}, {local} of them with a window of {self.sliding_window}",
            "sizes": f"hidden {self.hidden_size}, intermediate {self.intermediate_size}, "
            f"vocabulary {self.vocab_size:,}",
            "heads": f"{self.num_attention_heads} of {self.head_dim}, {self.num_key_value_heads} for keys and values",
            "context": f"{self.max_position_embeddings:,} tokens",
        }
        return shape | (self.vision.summary() if self.vision else {})


def tensors(config: Gemma3Config) -> list[TensorSpec]:
    """Return the table of tensors, in the order in which they are used."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    table = [
        TensorSpec(
            EMBEDDING,
            "token_embd.weight",
            (config.vocab_size, hidden),
            Kind.EMBEDDING,
            copies=("lm_head.weight", "output.weight"),
        )
    ]
    for layer in range(config.num_hidden_layers):
        table += [
            TensorSpec(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{gguf}.weight", shape, kind)
            for name, gguf, shape, kind in (
                ("input_layernorm", "attn_norm", (hidden,), Kind.NORM_PLUS_ONE),
                ("post_attention_layernorm", "post_attention_norm", (hidden,), Kind.NORM_PLUS_ONE),
                ("pre_feedforward_layernorm", "ffn_norm", (hidden,), Kind.NORM_PLUS_ONE),
                ("post_feedforward_layernorm", "post_ffw_norm", (hidden,), Kind.NORM_PLUS_ONE),
                ("self_attn.q_norm", "attn_q_norm", (head_dim,), Kind.NORM_PLUS_ONE),
                ("self_attn.k_norm", "attn_k_norm", (head_dim,), Kind.NORM_PLUS_ONE),
                ("self_attn.q_proj", "attn_q", (query, hidden), Kind.MATRIX),
                ("self_attn.k_proj", "attn_k", (key, hidden), Kind.MATRIX),
                ("self_attn.v_proj", "attn_v", (key, hidden), Kind.MATRIX),
                ("self_attn.o_proj", "attn_output", (hidden, query), Kind.MATRIX),
                ("mlp.gate_proj", "ffn_gate", (inner, hidden), Kind.MATRIX),
                ("mlp.up_proj", "ffn_up", (inner, hidden), Kind.MATRIX),
                ("mlp.down_proj", "ffn_down", (hidden, inner), Kind.MATRIX),
            )
        ]
    table.append(TensorSpec(FINAL_NORM, "output_norm.weight", (hidden,), Kind.NORM_PLUS_ONE))
    return table + siglip.tensors(config.vision, hidden) if config.vision else table


@dataclass(frozen=True)
class Layer:
    """One transformer block: four norms, an attention and a feed-forward network."""

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm
    attention: Attention
    qkv_proj: Linear
    o_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear


class Gemma3(LanguageModel):
    """A Gemma 3 with its weights. Raises ModelError for a shape that the kernels cannot run."""

    def __init__(self, config: Gemma3Config) -> None:
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads > 4 * kv_heads or head_dim % 32:
            raise ModelError(
                f"{heads} query heads on {kv_heads} key/value heads of {head_dim}: at most 4 on each, of a multiple "
                "of 32, can be run"
            )
        self.config = config
        self.caches = [
            CacheSpec(kv_heads, head_dim, None if kind == GLOBAL else config.sliding_window)
            for kind in config.layer_types
        ]
        self._global_rope = Rope(config.rope_theta, head_dim, config.rope_scaling_factor)
        self._local_rope = Rope(config.rope_local_base_freq, head_dim)
        self.ropes = (self._local_rope, self._global_rope)

    @classmethod
    async def load(cls, config: Gemma3Config, loader: Loader) -> Gemma3:
        """Load the weights, in the order of the table."""
        model = cls(config)
        model.head = await loader.linear(EMBEDDING)
        model.layers = [await model._load_layer(loader, index) for index in range(config.num_hidden_layers)]
        model.norm = await loader.norm(FINAL_NORM, config.rms_norm_eps)
        if config.vision:
            model.vision = await siglip.Siglip.load(config.vision, loader, eps=config.rms_norm_eps)
        return model

    layers: list[Layer]
    norm: Norm

    async def _load_layer(self, loader: Loader, index: int) -> Layer:
        config = self.config

        async def norm(name: str) -> Norm:
            return await loader.norm(f"model.layers.{index}.{name}.weight", config.rms_norm_eps)

        async def linear(*names: str) -> Linear:
            return await loader.linear(*(f"model.layers.{index}.{name}.weight" for name in names))

        return Layer(
            input_layernorm=await norm("input_layernorm"),
            post_attention_layernorm=await norm("post_attention_layernorm"),
            pre_feedforward_layernorm=await norm("pre_feedforward_layernorm"),
            post_feedforward_layernorm=await norm("post_feedforward_layernorm"),
            attention=Attention(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                scale=config.query_pre_attn_scalar**-0.5,
                window=self.caches[index].window,
                q_norm=await norm("self_attn.q_norm"),
                k_norm=await norm("self_attn.k_norm"),
                rope=self._global_rope if config.is_global(index) else self._local_rope,
                cache=index,
                two_way=True,
            ),
            qkv_proj=await linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o_proj=await linear("self_attn.o_proj"),
            gate_up_proj=await linear("mlp.gate_proj", "mlp.up_proj"),
            down_proj=await linear("mlp.down_proj"),
        )

    def forward(self, step: Step) -> Normed:
        """Take the tokens of a step through the layers (section 2 of the report)."""
        x: Value | Sum = step.embed(self.head, scale=self.config.hidden_size**0.5)
        for layer in self.layers:
            h = step.linear(layer.qkv_proj, step.norm(x, layer.input_layernorm), "qkv")
            h = step.linear(layer.o_proj, step.attention(layer.attention, h))
            x = step.add(x, step.norm(h, layer.post_attention_layernorm))
            h = step.linear(layer.gate_up_proj, step.norm(x, layer.pre_feedforward_layernorm), "gate_up")
            h = step.linear(layer.down_proj, step.geglu(h))
            x = step.add(x, step.norm(h, layer.post_feedforward_layernorm))
        return step.norm(x, self.norm)


FAMILY = Family(
    name=NAME,
    model_types=MODEL_TYPES,
    architectures=(ARCHITECTURE,),
    config=Gemma3Config,
    tensors=tensors,
    load=Gemma3.load,
    chat=GEMMA3,
    # transformers 4 and 5 name the tensors of a multimodal checkpoint in two ways. The first that fits is taken.
    prefixes={
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.multi_modal_projector.": siglip.PROJECTOR,
        "model.vision_tower.vision_model.": siglip.TOWER,
        "model.vision_tower.": siglip.TOWER,
        siglip.TOWER: siglip.TOWER,
        "vision_tower.": siglip.TOWER,
    },
    ignored=(siglip.TOWER, siglip.PROJECTOR),
    text_only=lambda config: replace(config, vision=None),
    with_projector=lambda config, metadata, source: replace(
        config, vision=SiglipConfig.from_gguf(metadata, source, NAME)
    ),
)
