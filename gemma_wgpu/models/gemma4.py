"""Gemma 4, the text model of E2B and E4B (model card, April 2026; transformers' modeling_gemma4).

Each layer has an input of its own besides the residual stream, the later layers share the keys and values of earlier
ones, and layers with a view of the whole context have heads of another size. The residual stream is float32 in every
precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models import sharing
from gemma_wgpu.models.keys import GLOBAL, LOCAL, MOST_LAYERS, Keys, gguf_keys, hf_layer_types, shown, text_keys
from gemma_wgpu.models.spec import Family, Kind, LanguageModel, Loader, TensorSpec
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import HostTable, Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Attention, Norm, Normed, Step, Sum
from gemma_wgpu.tokens.gemma4_chat import GEMMA4

NAME = "Gemma 4"
MODEL_TYPES = ("gemma4", "gemma4_text")
ARCHITECTURE = "gemma4"

_TEXT = sharing.HF_TEXT

_EVERY = 6  # every sixth layer is global
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_TURNED = 0.25  # of a head of the global layers


@dataclass(frozen=True)
class Gemma4Config:
    """The shape of a Gemma 4. Names, meanings and defaults are those of Hugging Face's Gemma4TextConfig.

    `rope_theta` and `partial_rotary_factor` are of the global layers, whose heads have `global_head_dim`;
    `rope_local_base_freq` is of the local ones. `sliding_window` counts the query itself. The last
    `num_kv_shared_layers` have no keys and values of their own, and feed-forward networks twice as wide if
    `use_double_wide_mlp`. A token id of `vocab_size_per_layer_input` or above has the inputs of token 0.
    """

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    rope_local_base_freq: float
    sliding_window: int
    max_position_embeddings: int
    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    final_logit_softcapping: float
    layer_types: tuple[str, ...]

    def is_global(self, layer: int) -> bool:
        """Say whether `layer` (from 0) attends to the whole context, rather than to the sliding window."""
        return self.layer_types[layer] == GLOBAL

    @property
    def own_layers(self) -> int:
        """Return how many layers, the first ones, have keys and values of their own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def head_dim_of(self, layer: int) -> int:
        """Return the size of the heads of `layer` (from 0)."""
        return self.global_head_dim if self.is_global(layer) else self.head_dim

    @property
    def turned_pairs(self) -> int:
        """Return how many of the pairs of a global layer's head are turned; they are the first ones."""
        return int(self.partial_rotary_factor * self.global_head_dim // 2)

    def intermediate_size_of(self, layer: int) -> int:
        """Return the width of the feed-forward network of `layer` (from 0)."""
        return self.intermediate_size * (2 if self.use_double_wide_mlp and layer >= self.own_layers else 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        """Read a config.json. Raises ModelError, which names `source` and the key."""
        keys = text_keys(config, source, NAME, MODEL_TYPES)
        keys.refuse("attention_bias", "attention_k_eq_v", "enable_moe_block", "per_layer_config")
        if keys.get("use_bidirectional_attention") == "all":
            raise keys.error("use_bidirectional_attention", f"is 'all', which {NAME} language models do not do")
        layers = keys.count("num_hidden_layers", most=MOST_LAYERS)
        theta, partial, local_theta = _rope(keys)
        types = hf_layer_types(keys, layers, _EVERY)
        built = cls(
            vocab_size=keys.count("vocab_size", 262_144),
            vocab_size_per_layer_input=keys.count("vocab_size_per_layer_input", 262_144),
            hidden_size=keys.size("hidden_size"),
            hidden_size_per_layer_input=keys.size("hidden_size_per_layer_input"),
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=keys.count("num_attention_heads", 8),
            num_key_value_heads=keys.count("num_key_value_heads", 4),
            head_dim=keys.count("head_dim", 256),
            global_head_dim=keys.count("global_head_dim", 512),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            partial_rotary_factor=partial,
            rope_local_base_freq=local_theta,
            sliding_window=keys.count("sliding_window", 512),
            max_position_embeddings=keys.count("max_position_embeddings", 131_072),
            num_kv_shared_layers=keys.count("num_kv_shared_layers", 0, least=0, most=layers - 1),
            use_double_wide_mlp=keys.get("use_double_wide_mlp", False) is True,
            final_logit_softcapping=keys.number("final_logit_softcapping"),
            layer_types=(*types[:-1], GLOBAL),  # transformers has the last layer global, whatever the file says
        )
        for head_dim in (("head_dim", built.head_dim), ("global_head_dim", built.global_head_dim)):
            keys.check_heads(
                ("num_attention_heads", built.num_attention_heads),
                ("num_key_value_heads", built.num_key_value_heads),
                head_dim,
            )
        if not sharing.has_sources(types, built.num_kv_shared_layers):
            raise keys.error("num_kv_shared_layers", "leaves a kind of layers without keys and values")
        return built

    def to_hf(self) -> dict[str, object]:
        """Return a config.json that `from_hf` and transformers read."""
        config: dict[str, object] = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
        config |= asdict(self)
        config["layer_types"] = list(self.layer_types)
        local, full = config.pop("rope_local_base_freq"), config.pop("rope_theta")
        config["rope_parameters"] = {
            LOCAL: {"rope_type": "default", "rope_theta": local},
            GLOBAL: {
                "rope_type": "proportional",
                "rope_theta": full,
                "partial_rotary_factor": config.pop("partial_rotary_factor"),
            },
        }
        return config | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        """Read the metadata of a GGUF file. Raises ModelError, which names `source` and the key.

        The format says neither whether the networks of the last layers are twice as wide, which their widths tell,
        nor which part of the heads of global layers is turned: see `constants`.
        """
        keys, vocab_size = gguf_keys(metadata, source, NAME, ARCHITECTURE)
        keys.refuse("gemma4.expert_count", "gemma4.expert_feed_forward_length")
        layers = keys.count("gemma4.block_count", most=MOST_LAYERS)
        shared = keys.count("gemma4.attention.shared_kv_layers", 0, least=0, most=layers - 1)
        sliding = keys.numbers("gemma4.attention.sliding_window_pattern", layers)
        types = tuple(LOCAL if each else GLOBAL for each in sliding)
        if types[-1] != GLOBAL:
            raise keys.error("gemma4.attention.sliding_window_pattern", f"ends in a window, which no {NAME} does")
        if not sharing.has_sources(types, shared):
            raise keys.error("gemma4.attention.shared_kv_layers", "leaves a kind of layers without keys and values")
        size, double_wide = _gguf_sizes(keys, layers, layers - shared)
        heads, *others = keys.counts("gemma4.attention.head_count_kv", layers)
        if any(other != heads for other in others):
            raise keys.error("gemma4.attention.head_count_kv", f"differs by layer, which only larger {NAME} do")
        built = cls(
            vocab_size=vocab_size,
            vocab_size_per_layer_input=vocab_size,
            hidden_size=keys.size("gemma4.embedding_length"),
            hidden_size_per_layer_input=keys.size("gemma4.embedding_length_per_layer_input"),
            intermediate_size=size,
            num_hidden_layers=layers,
            num_attention_heads=keys.count("gemma4.attention.head_count"),
            num_key_value_heads=heads,
            head_dim=keys.count("gemma4.attention.key_length_swa"),
            global_head_dim=keys.count("gemma4.attention.key_length"),
            rms_norm_eps=keys.number("gemma4.attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("gemma4.rope.freq_base", _THETA),
            partial_rotary_factor=_TURNED,
            rope_local_base_freq=keys.number("gemma4.rope.freq_base_swa", _LOCAL_THETA),
            sliding_window=keys.count("gemma4.attention.sliding_window"),
            max_position_embeddings=keys.count("gemma4.context_length"),
            num_kv_shared_layers=shared,
            use_double_wide_mlp=double_wide,
            final_logit_softcapping=keys.number("gemma4.final_logit_softcapping"),
            layer_types=types,
        )
        for kind, head_dim in (("key_length_swa", built.head_dim), ("key_length", built.global_head_dim)):
            keys.check_heads(
                ("gemma4.attention.head_count", built.num_attention_heads),
                ("gemma4.attention.head_count_kv", built.num_key_value_heads),
                (f"gemma4.attention.{kind}", head_dim),
            )
        for kind, head_dim in (("dimension_count_swa", built.head_dim), ("dimension_count", built.global_head_dim)):
            if keys.count(f"gemma4.rope.{kind}", head_dim) != head_dim:
                raise keys.error(f"gemma4.rope.{kind}", f"is not {head_dim}, the size of these layers' heads")
        return built

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        local = self.layer_types.count(LOCAL)
        return {
            "layers": f"{self.num_hidden_layers}, {local} of them with a window of {self.sliding_window}, "
            f"{self.num_kv_shared_layers} without keys and values of their own",
            "sizes": f"hidden {self.hidden_size}, intermediate {self.intermediate_size}, per layer "
            f"{self.hidden_size_per_layer_input}, vocabulary {self.vocab_size:,}",
            "heads": f"{self.num_attention_heads} of {self.head_dim} and {self.global_head_dim}, "
            f"{self.num_key_value_heads} for keys and values",
            "context": f"{self.max_position_embeddings:,} tokens",
        }


def _rope(keys: Keys) -> tuple[float, float, float]:
    """Return theta and the part that is turned of the global layers, and theta of the local ones."""
    if keys.get("rope_parameters") is None:
        return _THETA, _TURNED, _LOCAL_THETA
    parameters = keys.inner("rope_parameters")
    full, local = parameters.inner(GLOBAL), parameters.inner(LOCAL)
    for inner, kind in ((full, "proportional"), (local, "default")):
        if inner.get("rope_type", kind) != kind:
            raise inner.error("rope_type", f"is {shown(inner.get('rope_type'))}; {NAME} has {kind} there")
    partial = full.number("partial_rotary_factor", _TURNED)
    if partial > 1:
        raise full.error("partial_rotary_factor", f"is {partial}, more than the whole")
    return full.number("rope_theta", _THETA), partial, local.number("rope_theta", _LOCAL_THETA)


def _gguf_sizes(keys: Keys, layers: int, own: int) -> tuple[int, bool]:
    """Return the width of a network, and whether it is twice that in the layers without keys and values of their own.

    Those are the layers from number `own` on.
    """
    key = "gemma4.feed_forward_length"
    sizes = keys.counts(key, layers)
    size, last = sizes[0], sizes[-1]
    if size % BLOCK:
        raise keys.error(key, f"has {size}; only multiples of {BLOCK} can be run")
    if last not in (size, 2 * size) or sizes != [size] * own + [last] * (layers - own):
        raise keys.error(key, f"is {shown(keys.get(key))}, not one width and perhaps twice that in the last layers")
    return size, last != size


def constants(config: Gemma4Config) -> dict[str, NDArray[np.float32]]:
    """Return what `rope_freqs` is in GGUF files: by how much the angles of a global layer's pairs are divided.

    Pairs that are not turned have 1e30 there.
    """
    pairs = config.global_head_dim // 2
    turned = np.arange(pairs) < config.turned_pairs
    return {"rope_freqs.weight": np.where(turned, 1, 1e30).astype(np.float32)}


def tensors(config: Gemma4Config) -> list[TensorSpec]:
    """Return the table of tensors, in the order in which they are used."""
    return [spec for spec in _all_tensors(config) if not sharing.is_unread(spec.name, config.own_layers)]


def unread(config: Gemma4Config) -> list[TensorSpec]:
    """Return the tensors that files hold though nobody reads them: keys and values of layers that share others'."""
    return [spec for spec in _all_tensors(config) if sharing.is_unread(spec.name, config.own_layers)]


def _all_tensors(config: Gemma4Config) -> list[TensorSpec]:
    hidden, per_layer = config.hidden_size, config.hidden_size_per_layer_input
    table = sharing.tensors_before_layers(
        vocab_size=config.vocab_size,
        vocab_size_per_layer_input=config.vocab_size_per_layer_input,
        hidden_size=hidden,
        per_layer_size=per_layer,
        layers=config.num_hidden_layers,
    )
    for layer in range(config.num_hidden_layers):
        head_dim, inner = config.head_dim_of(layer), config.intermediate_size_of(layer)
        query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        table += [
            TensorSpec(f"{_TEXT}layers.{layer}.{name}", f"blk.{layer}.{gguf}.weight", shape, kind)
            for name, gguf, shape, kind in (
                ("input_layernorm.weight", "attn_norm", (hidden,), Kind.NORM),
                ("post_attention_layernorm.weight", "post_attention_norm", (hidden,), Kind.NORM),
                ("pre_feedforward_layernorm.weight", "ffn_norm", (hidden,), Kind.NORM),
                ("post_feedforward_layernorm.weight", "post_ffw_norm", (hidden,), Kind.NORM),
                ("post_per_layer_input_norm.weight", "post_norm", (hidden,), Kind.NORM),
                ("layer_scalar", "layer_output_scale", (1,), Kind.NORM),
                ("self_attn.q_norm.weight", "attn_q_norm", (head_dim,), Kind.NORM),
                ("self_attn.k_norm.weight", "attn_k_norm", (head_dim,), Kind.NORM),
                ("self_attn.q_proj.weight", "attn_q", (query, hidden), Kind.MATRIX),
                ("self_attn.k_proj.weight", "attn_k", (key, hidden), Kind.MATRIX),
                ("self_attn.v_proj.weight", "attn_v", (key, hidden), Kind.MATRIX),
                ("self_attn.o_proj.weight", "attn_output", (hidden, query), Kind.MATRIX),
                ("mlp.gate_proj.weight", "ffn_gate", (inner, hidden), Kind.MATRIX),
                ("mlp.up_proj.weight", "ffn_up", (inner, hidden), Kind.MATRIX),
                ("mlp.down_proj.weight", "ffn_down", (hidden, inner), Kind.MATRIX),
                ("per_layer_input_gate.weight", "inp_gate", (per_layer, hidden), Kind.MATRIX),
                ("per_layer_projection.weight", "proj", (hidden, per_layer), Kind.MATRIX),
            )
        ]
    return [*table, TensorSpec(sharing.FINAL_NORM, "output_norm.weight", (hidden,), Kind.NORM)]


@dataclass(frozen=True)
class Layer:
    """One transformer block: an attention, a feed-forward network and the layer's own input, each between norms."""

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm
    post_per_layer_input_norm: Norm
    scalar: float
    attention: Attention
    qkv_proj: Linear
    o_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear
    input_gate: Linear
    input_projection: Linear


class Gemma4(LanguageModel):
    """A Gemma 4 with its weights."""

    per_layer_table: Linear | HostTable
    per_layer_projection: Linear
    per_layer_norm: Norm
    layers: list[Layer]
    norm: Norm

    def __init__(self, config: Gemma4Config) -> None:
        self.config = config
        self.softcap = config.final_logit_softcapping
        self.caches = sharing.caches(
            config.layer_types,
            config.num_kv_shared_layers,
            kv_heads=config.num_key_value_heads,
            head_dims=[config.head_dim_of(layer) for layer in range(config.num_hidden_layers)],
            window=config.sliding_window,
        )
        self._global_rope = Rope(config.rope_theta, config.global_head_dim, turned=config.turned_pairs)
        self._local_rope = Rope(config.rope_local_base_freq, config.head_dim)
        self.ropes = (self._local_rope, self._global_rope)

    @classmethod
    async def load(cls, config: Gemma4Config, loader: Loader) -> Gemma4:
        """Load the weights, in the order of the table."""
        model = cls(config)
        model.head = await loader.linear(sharing.EMBEDDING)
        model.per_layer_table = await loader.table(sharing.PER_LAYER_TABLE)
        model.per_layer_projection = await loader.linear(sharing.PER_LAYER_PROJECTION)
        # The projection is meant times hidden_size^-0.5, which its norm takes back: only eps feels it.
        model.per_layer_norm = await loader.norm(sharing.PER_LAYER_NORM, config.rms_norm_eps * config.hidden_size)
        model.layers = [await model._load_layer(loader, index) for index in range(config.num_hidden_layers)]
        model.norm = await loader.norm(sharing.FINAL_NORM, config.rms_norm_eps)
        return model

    async def _load_layer(self, loader: Loader, index: int) -> Layer:
        config, shared = self.config, index >= self.config.own_layers
        prefix = f"{_TEXT}layers.{index}."

        async def norm(name: str) -> Norm:
            return await loader.norm(f"{prefix}{name}", config.rms_norm_eps)

        async def linear(*names: str) -> Linear:
            return await loader.linear(*(f"{prefix}{name}.weight" for name in names))

        return Layer(
            input_layernorm=await norm("input_layernorm.weight"),
            post_attention_layernorm=await norm("post_attention_layernorm.weight"),
            pre_feedforward_layernorm=await norm("pre_feedforward_layernorm.weight"),
            post_feedforward_layernorm=await norm("post_feedforward_layernorm.weight"),
            post_per_layer_input_norm=await norm("post_per_layer_input_norm.weight"),
            scalar=float((await norm("layer_scalar")).weight[0]),
            attention=Attention(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim_of(index),
                scale=1.0,
                window=None if config.is_global(index) else config.sliding_window,
                q_norm=await norm("self_attn.q_norm.weight"),
                k_norm=None if shared else await norm("self_attn.k_norm.weight"),
                rope=self._global_rope if config.is_global(index) else self._local_rope,
                cache=sharing.sources(config.layer_types, config.num_kv_shared_layers)[index],
                value_norm=True,
            ),
            qkv_proj=await linear(*(f"self_attn.{which}_proj" for which in ("q" if shared else "qkv"))),
            o_proj=await linear("self_attn.o_proj"),
            gate_up_proj=await linear("mlp.gate_proj", "mlp.up_proj"),
            down_proj=await linear("mlp.down_proj"),
            input_gate=await linear("per_layer_input_gate"),
            input_projection=await linear("per_layer_projection"),
        )

    def forward(self, step: Step) -> Normed:
        """Take the tokens of a step through the layers."""
        config = self.config
        x: Value | Sum = step.embed(self.head, scale=config.hidden_size**0.5)
        context, rows = step.linear(self.per_layer_projection, x), step.lookup(self.per_layer_table)
        scale = config.hidden_size_per_layer_input**0.5
        inputs = step.per_layer_inputs(context, rows, self.per_layer_norm, scale=scale)
        for index, layer in enumerate(self.layers):
            if index == config.own_layers:
                step, x, inputs = step.last_tokens(x, inputs)
            h = step.linear(layer.qkv_proj, step.norm(x, layer.input_layernorm), "qkv")
            h = step.linear(layer.o_proj, step.attention(layer.attention, h))
            x = step.add(x, step.norm(h, layer.post_attention_layernorm))
            h = step.linear(layer.gate_up_proj, step.norm(x, layer.pre_feedforward_layernorm), "gate_up")
            h = step.linear(layer.down_proj, step.geglu(h))
            x = step.add(x, step.norm(h, layer.post_feedforward_layernorm))
            h = step.gated_input(step.linear(layer.input_gate, x), inputs, index)
            h = step.linear(layer.input_projection, h)
            x = step.add(x, step.norm(h, layer.post_per_layer_input_norm), factor=layer.scalar)
        return step.norm(x, self.norm)


FAMILY = Family(
    name=NAME,
    model_types=MODEL_TYPES,
    architectures=(ARCHITECTURE,),
    config=Gemma4Config,
    tensors=tensors,
    unread=unread,
    load=Gemma4.load,
    chat=GEMMA4,
    prefixes=sharing.HF_PREFIXES,
    ignored=sharing.HF_TOWERS,
    constants=constants,
)
