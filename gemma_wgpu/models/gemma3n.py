"""Gemma 3n, the text model of E2B and E4B (model card, June 2025; transformers' modeling_gemma3n).

The residual stream is four streams (AltUp), each layer has an input of its own besides them, its attention goes
beside a learned augmented residual (LAuReL), the first layers let only few gates through, and the later layers share
the keys and values of earlier ones. The streams are float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Self

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models import mobilenet_v5, multimodal_embedder, sharing, usm
from gemma_wgpu.models.keys import (
    GLOBAL,
    LOCAL,
    MOST_LAYERS,
    Keys,
    gguf_keys,
    hf_layer_types,
    hf_rope,
    shown,
    text_keys,
)
from gemma_wgpu.models.mobilenet_v5 import MobileNetV5, MobileNetV5Config
from gemma_wgpu.models.multimodal_embedder import HardConfig, HardTokens
from gemma_wgpu.models.spec import Cut, Family, Kind, LanguageModel, Loader, MatFormerSlice, TensorSpec, Tower
from gemma_wgpu.models.usm import Usm, UsmConfig
from gemma_wgpu.ops import altup
from gemma_wgpu.ops.altup import STREAMS, AltUp
from gemma_wgpu.ops.linear import HostTable, Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Attention, Norm, Normed, Step
from gemma_wgpu.tokens.chat import GEMMA3

NAME = "Gemma 3n"
MODEL_TYPES = ("gemma3n", "gemma3n_text")
ARCHITECTURE = "gemma3n"

_TEXT = sharing.HF_TEXT
_PROJECTIONS = [f"{_TEXT}altup_projections.{index}.weight" for index in range(STREAMS - 1)]
_UNEMBED_PROJECTIONS = [f"{_TEXT}altup_unembed_projections.{index}.weight" for index in range(STREAMS - 1)]

_EVERY = 5  # every fifth layer is global
_SPARSE_LAYERS = 10
_GGUF_LAUREL_RANK = 64


@dataclass(frozen=True)
class Gemma3nConfig:
    """The shape of a Gemma 3n. Names, meanings and defaults are those of Hugging Face's Gemma3nTextConfig.

    `rope_theta` is of the global layers and `rope_local_base_freq` of the local ones. `sliding_window` counts the
    query itself. The last `num_kv_shared_layers` have no keys and values of their own. `intermediate_size` and
    `activation_sparsity_pattern`, the share of gates that a layer does not let through, are lists by layer. A token
    id of `vocab_size_per_layer_input` or above has the inputs of token 0. `vision` is the tower that reads images,
    and `audio` the one that hears sounds, or None.
    """

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_local_base_freq: float
    sliding_window: int
    max_position_embeddings: int
    num_kv_shared_layers: int
    laurel_rank: int
    activation_sparsity_pattern: tuple[float, ...]
    final_logit_softcapping: float
    layer_types: tuple[str, ...]
    vision: MobileNetV5Config | HardConfig | None = None
    audio: UsmConfig | HardConfig | None = None

    def is_global(self, layer: int) -> bool:
        """Say whether `layer` (from 0) attends to the whole context, rather than to the sliding window."""
        return self.layer_types[layer] == GLOBAL

    @property
    def own_layers(self) -> int:
        """Return how many layers, the first ones, have keys and values of their own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        """Read a config.json. Raises ModelError, which names `source` and the key."""
        keys = text_keys(config, source, NAME, MODEL_TYPES)
        keys.refuse("attention_bias", "altup_active_idx")
        if keys.count("altup_num_inputs", STREAMS) != STREAMS:
            raise keys.error("altup_num_inputs", f"is not {STREAMS}")
        if keys.get("altup_correct_scale", True) is not True:
            raise keys.error("altup_correct_scale", f"is not set, and {NAME} language models have it")
        layers = keys.count("num_hidden_layers", 35, most=MOST_LAYERS)
        theta, factor, local_theta = hf_rope(keys, 1_000_000.0, 10_000.0)
        if factor != 1:
            raise keys.error("rope_scaling", f"is set, which {NAME} language models do not do")
        shared = keys.count("num_kv_shared_layers", 15, least=0, most=layers - 1)
        types = hf_layer_types(keys, layers, _EVERY)
        if not sharing.has_sources(types, shared):
            raise keys.error("num_kv_shared_layers", "leaves a kind of layers without keys and values")
        built = cls(
            vocab_size=keys.count("vocab_size", 262_400),
            vocab_size_per_layer_input=keys.count("vocab_size_per_layer_input", 262_144),
            hidden_size=keys.size("hidden_size", 2048),
            hidden_size_per_layer_input=keys.size("hidden_size_per_layer_input", 256),
            intermediate_size=_sizes(keys, layers),
            num_hidden_layers=layers,
            num_attention_heads=keys.count("num_attention_heads", 8),
            num_key_value_heads=keys.count("num_key_value_heads", 2),
            head_dim=keys.count("head_dim", 256),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_local_base_freq=local_theta,
            sliding_window=keys.count("sliding_window", 512),
            max_position_embeddings=keys.count("max_position_embeddings", 32_768),
            num_kv_shared_layers=shared,
            laurel_rank=keys.size("laurel_rank", 64),
            activation_sparsity_pattern=_sparsity(keys, layers),
            final_logit_softcapping=keys.number("final_logit_softcapping", 30.0),
            layer_types=types,
            vision=HardConfig.from_hf(
                config, "vision_config", multimodal_embedder.VISION, (2048, 262_144), source, NAME
            )
            or MobileNetV5Config.from_hf(config, source, NAME),
            audio=HardConfig.from_hf(config, "audio_config", multimodal_embedder.AUDIO, (1536, 262_272), source, NAME)
            or UsmConfig.from_hf(config, source, NAME),
        )
        keys.check_heads(
            ("num_attention_heads", built.num_attention_heads),
            ("num_key_value_heads", built.num_key_value_heads),
            ("head_dim", built.head_dim),
        )
        return built

    def to_hf(self) -> dict[str, object]:
        """Return a config.json that `from_hf` and transformers read."""
        config: dict[str, object] = {"architectures": ["Gemma3nForCausalLM"], "model_type": "gemma3n_text"}
        config |= {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        del config["vision"], config["audio"]
        local, full = config.pop("rope_local_base_freq"), config.pop("rope_theta")
        config["rope_parameters"] = {
            LOCAL: {"rope_type": "default", "rope_theta": local},
            GLOBAL: {"rope_type": "default", "rope_theta": full},
        }
        config |= {
            "altup_num_inputs": STREAMS,
            "altup_active_idx": 0,
            "altup_correct_scale": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        }
        towers = [tower.to_hf() for tower in (self.vision, self.audio) if tower]
        if not towers:
            return config
        outer: dict[str, object] = {
            "architectures": ["Gemma3nForConditionalGeneration"],
            "model_type": "gemma3n",
            "text_config": config,
        }
        for tower in towers:
            outer |= tower
        return outer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        """Read the metadata of a GGUF file. Raises ModelError, which names `source` and the key.

        The format says how far above the mean a gate must be, and not the share of gates. What it leaves out is as in
        llama.cpp: the rank of LAuReL and the local theta.
        """
        keys, vocab_size = gguf_keys(metadata, source, NAME, ARCHITECTURE)
        layers = keys.count("gemma3n.block_count", most=MOST_LAYERS)
        if keys.count("gemma3n.altup.num_inputs", STREAMS) != STREAMS:
            raise keys.error("gemma3n.altup.num_inputs", f"is not {STREAMS}")
        keys.refuse("gemma3n.altup.active_idx")
        scales = keys.numbers("gemma3n.activation_sparsity_scale", layers)
        local = keys.numbers("gemma3n.attention.sliding_window_pattern", layers)
        shared = keys.count("gemma3n.attention.shared_kv_layers", least=0, most=layers - 1)
        types = tuple(LOCAL if sliding else GLOBAL for sliding in local)
        if not sharing.has_sources(types, shared):
            raise keys.error("gemma3n.attention.shared_kv_layers", "leaves a kind of layers without keys and values")
        sizes = keys.numbers("gemma3n.feed_forward_length", layers)
        if any(size < 1 or size % 32 for size in sizes):
            raise keys.error("gemma3n.feed_forward_length", "has sizes that are not multiples of 32")
        return cls(
            vocab_size=vocab_size,
            vocab_size_per_layer_input=vocab_size,
            hidden_size=keys.size("gemma3n.embedding_length"),
            hidden_size_per_layer_input=keys.size("gemma3n.embedding_length_per_layer_input"),
            intermediate_size=tuple(map(int, sizes)),
            num_hidden_layers=layers,
            num_attention_heads=keys.count("gemma3n.attention.head_count"),
            num_key_value_heads=keys.count("gemma3n.attention.head_count_kv"),
            head_dim=keys.count("gemma3n.attention.key_length"),
            rms_norm_eps=keys.number("gemma3n.attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("gemma3n.rope.freq_base", 1_000_000.0),
            rope_local_base_freq=keys.number("gemma3n.rope.freq_base_swa", 10_000.0),
            sliding_window=keys.count("gemma3n.attention.sliding_window"),
            max_position_embeddings=keys.count("gemma3n.context_length"),
            num_kv_shared_layers=shared,
            laurel_rank=_GGUF_LAUREL_RANK,
            activation_sparsity_pattern=tuple(
                round(NormalDist().cdf(scale), 6) if scale > 0 else 0.0 for scale in scales
            ),
            final_logit_softcapping=keys.number("gemma3n.final_logit_softcapping", 30.0),
            layer_types=types,
        )

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        local, sizes = self.layer_types.count(LOCAL), sorted(set(self.intermediate_size))
        shape = {
            "layers": f"{self.num_hidden_layers}, {local} of them with a window of {self.sliding_window}, "
            f"{self.num_kv_shared_layers} without keys and values of their own",
            "sizes": f"hidden {STREAMS} x {self.hidden_size}, intermediate {' and '.join(map(str, sizes))}, "
            f"per layer {self.hidden_size_per_layer_input}, vocabulary {self.vocab_size:,}",
            "heads": f"{self.num_attention_heads} of {self.head_dim}, {self.num_key_value_heads} for keys and values",
            "context": f"{self.max_position_embeddings:,} tokens",
        }
        for tower in (self.vision, self.audio):
            shape |= tower.summary() if tower else {}
        return shape


def _sizes(keys: Keys, layers: int) -> tuple[int, ...]:
    """Return the width of each layer's feed-forward network, which the file may give once for all."""
    sizes = keys.get("intermediate_size", 16_384)
    sizes = sizes if isinstance(sizes, Sequence) else [sizes] * layers
    if len(sizes) != layers:
        raise keys.error("intermediate_size", f"has {len(sizes)} entries for {layers} layers")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 32:
            raise keys.error("intermediate_size", f"has {shown(size)}; only multiples of 32 can be run")
    return tuple(sizes)


def _sparsity(keys: Keys, layers: int) -> tuple[float, ...]:
    """Return the share of gates that each layer does not let through."""
    default = [0.95] * min(_SPARSE_LAYERS, layers) + [0.0] * (layers - _SPARSE_LAYERS)
    shares = keys.get("activation_sparsity_pattern")
    shares = default if shares is None else shares
    shares = shares if isinstance(shares, Sequence) else [shares] * layers
    if len(shares) != layers:
        raise keys.error("activation_sparsity_pattern", f"has {len(shares)} entries for {layers} layers")
    for share in shares:
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise keys.error("activation_sparsity_pattern", f"has {shown(share)}, not a share from 0 to 1")
    return tuple(map(float, shares))


def tensors(config: Gemma3nConfig) -> list[TensorSpec]:
    """Return the table of tensors, in the order in which they are used."""
    return [spec for spec in _all_tensors(config) if not sharing.is_unread(spec.name, config.own_layers)]


def unread(config: Gemma3nConfig) -> list[TensorSpec]:
    """Return the tensors that files hold though nobody reads them: keys and values of layers that share others'."""
    return [spec for spec in _all_tensors(config) if sharing.is_unread(spec.name, config.own_layers)]


def _all_tensors(config: Gemma3nConfig) -> list[TensorSpec]:
    hidden, per_layer, head_dim = config.hidden_size, config.hidden_size_per_layer_input, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    rank = config.laurel_rank
    table = [
        *sharing.tensors_before_layers(
            vocab_size=config.vocab_size,
            vocab_size_per_layer_input=config.vocab_size_per_layer_input,
            hidden_size=hidden,
            per_layer_size=per_layer,
            layers=config.num_hidden_layers,
        ),
        *_stacked(_PROJECTIONS, "altup_proj.weight", hidden),
    ]
    for layer in range(config.num_hidden_layers):
        inner = config.intermediate_size[layer]
        table += [
            TensorSpec(f"{_TEXT}layers.{layer}.{name}", f"blk.{layer}.{gguf}.weight", shape, kind)
            for name, gguf, shape, kind in (
                ("altup.router_norm.weight", "altup_router_norm", (hidden,), Kind.NORM),
                ("altup.modality_router.weight", "altup_router", (STREAMS, hidden), Kind.TABLE),
                ("altup.prediction_coefs.weight", "altup_predict_coef", (STREAMS**2, STREAMS), Kind.TABLE),
                ("altup.correction_coefs.weight", "altup_correct_coef", (STREAMS, STREAMS), Kind.TABLE),
                ("post_feedforward_layernorm.weight", "post_ffw_norm", (hidden,), Kind.NORM),
                ("altup.correct_output_scale", "altup_correct_scale", (hidden,), Kind.NORM),
                ("input_layernorm.weight", "attn_norm", (hidden,), Kind.NORM),
                ("post_attention_layernorm.weight", "post_attention_norm", (hidden,), Kind.NORM),
                ("laurel.post_laurel_norm.weight", "laurel_post_norm", (hidden,), Kind.NORM),
                ("pre_feedforward_layernorm.weight", "ffn_norm", (hidden,), Kind.NORM),
                ("post_per_layer_input_norm.weight", "post_norm", (hidden,), Kind.NORM),
                ("self_attn.q_norm.weight", "attn_q_norm", (head_dim,), Kind.NORM),
                ("self_attn.k_norm.weight", "attn_k_norm", (head_dim,), Kind.NORM),
                ("self_attn.q_proj.weight", "attn_q", (query, hidden), Kind.MATRIX),
                ("self_attn.k_proj.weight", "attn_k", (key, hidden), Kind.MATRIX),
                ("self_attn.v_proj.weight", "attn_v", (key, hidden), Kind.MATRIX),
                ("self_attn.o_proj.weight", "attn_output", (hidden, query), Kind.MATRIX),
                ("laurel.linear_left.weight", "laurel_l", (rank, hidden), Kind.MATRIX),
                ("laurel.linear_right.weight", "laurel_r", (hidden, rank), Kind.MATRIX),
                ("mlp.gate_proj.weight", "ffn_gate", (inner, hidden), Kind.MATRIX),
                ("mlp.up_proj.weight", "ffn_up", (inner, hidden), Kind.MATRIX),
                ("mlp.down_proj.weight", "ffn_down", (hidden, inner), Kind.MATRIX),
                ("per_layer_input_gate.weight", "inp_gate", (per_layer, hidden), Kind.MATRIX),
                ("per_layer_projection.weight", "proj", (hidden, per_layer), Kind.MATRIX),
            )
        ]
    table += _stacked(_UNEMBED_PROJECTIONS, "altup_unembd_proj.weight", hidden)
    table.append(TensorSpec(sharing.FINAL_NORM, "output_norm.weight", (hidden,), Kind.NORM))
    for tower in (config.vision, config.audio):
        if isinstance(tower, HardConfig):
            table += tower.tensors(hidden)
        elif isinstance(tower, MobileNetV5Config):
            table += mobilenet_v5.tensors(tower, hidden)
        elif tower:
            table += usm.tensors(tower, hidden)
    return table


def _stacked(names: Sequence[str], gguf: str, hidden: int) -> list[TensorSpec]:
    return [TensorSpec(name, gguf, (hidden, hidden), slot=(index, len(names))) for index, name in enumerate(names)]


def sliced(config: Gemma3nConfig, slice_: MatFormerSlice) -> tuple[Gemma3nConfig, dict[str, Cut]]:
    """Return the configuration of a smaller model in a larger one, and what its tensors are there (model card).

    Raises ModelError for a layer or a width that the larger model does not have.
    """
    layers = [layer for layer in range(config.num_hidden_layers) if layer not in slice_.skipped]
    foreign = [layer for layer in slice_.skipped if not 0 <= layer < config.num_hidden_layers]
    if foreign or not layers:
        raise ModelError(f"layers {list(slice_.skipped)} cannot be left out of {config.num_hidden_layers} layers")
    sizes = slice_.intermediate_size
    if sizes is None:
        sizes = tuple(config.intermediate_size[layer] for layer in layers)
    elif len(sizes) == 1:
        sizes *= len(layers)
    if len(sizes) != len(layers):
        raise ModelError(f"there are {len(sizes)} widths for {len(layers)} layers; give one for each, or one for all")
    for layer, size in zip(layers, sizes, strict=True):
        if not 0 < size <= config.intermediate_size[layer] or size % 32:
            raise ModelError(
                f"layer {layer} has a width of {config.intermediate_size[layer]}, which cannot be cut to {size}; "
                "give a smaller multiple of 32"
            )
    kept = replace(
        config,
        num_hidden_layers=len(layers),
        intermediate_size=sizes,
        num_kv_shared_layers=sum(layer >= config.own_layers for layer in layers),
        activation_sparsity_pattern=tuple(config.activation_sparsity_pattern[layer] for layer in layers),
        layer_types=tuple(config.layer_types[layer] for layer in layers),
    )
    if not sharing.has_sources(kept.layer_types, kept.num_kv_shared_layers):
        raise ModelError(f"without layers {list(slice_.skipped)}, a kind of layers has no keys and values")
    per_layer = config.hidden_size_per_layer_input
    inputs = tuple((layer * per_layer, (layer + 1) * per_layer) for layer in layers)
    names = [spec.name for spec in tensors(kept)]
    cuts = {name: Cut(name) for name in names if ".layers." not in name}
    cuts[sharing.PER_LAYER_TABLE] = Cut(sharing.PER_LAYER_TABLE, cols=inputs)
    cuts[sharing.PER_LAYER_PROJECTION] = Cut(sharing.PER_LAYER_PROJECTION, rows=inputs)
    for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        new, old = f"{_TEXT}layers.{index}.", f"{_TEXT}layers.{layer}."
        cuts |= {name: Cut(old + name.removeprefix(new)) for name in names if name.startswith(new)}
        for name in ("gate_proj", "up_proj"):
            cuts[f"{new}mlp.{name}.weight"] = Cut(f"{old}mlp.{name}.weight", rows=((0, size),))
        cuts[f"{new}mlp.down_proj.weight"] = Cut(f"{old}mlp.down_proj.weight", cols=((0, size),))
    return kept, cuts


@dataclass(frozen=True)
class Layer:
    """One block: AltUp around an attention beside a LAuReL, a feed-forward network and the layer's own input.

    `cut` is how many standard deviations above the mean a gate must be to be let through, or None if all are.
    """

    altup: AltUp
    input_layernorm: Norm
    post_attention_layernorm: Norm
    post_laurel_norm: Norm
    pre_feedforward_layernorm: Norm
    post_per_layer_input_norm: Norm
    attention: Attention
    qkv_proj: Linear
    o_proj: Linear
    laurel_left: Linear
    laurel_right: Linear
    gate_up_proj: Linear
    cut: float | None
    down_proj: Linear
    input_gate: Linear
    input_projection: Linear


class Gemma3n(LanguageModel):
    """A Gemma 3n with its weights."""

    per_layer_table: Linear | HostTable
    per_layer_projection: Linear
    per_layer_norm: Norm
    projections: Linear
    layers: list[Layer]
    unembed_projections: list[Linear]
    norm: Norm

    def __init__(self, config: Gemma3nConfig) -> None:
        self.config = config
        self.softcap = config.final_logit_softcapping
        self.caches = sharing.caches(
            config.layer_types,
            config.num_kv_shared_layers,
            kv_heads=config.num_key_value_heads,
            head_dims=[config.head_dim] * config.num_hidden_layers,
            window=config.sliding_window,
        )
        self._global_rope = Rope(config.rope_theta, config.head_dim)
        self._local_rope = Rope(config.rope_local_base_freq, config.head_dim)
        self.ropes = (self._local_rope, self._global_rope)

    @classmethod
    async def load(cls, config: Gemma3nConfig, loader: Loader) -> Gemma3n:
        """Load the weights, in the order of the table."""
        model = cls(config)
        model.head = await loader.linear(sharing.EMBEDDING)
        model.per_layer_table = await loader.table(sharing.PER_LAYER_TABLE)
        model.per_layer_projection = await loader.linear(sharing.PER_LAYER_PROJECTION)
        # The projection is meant times hidden_size^-0.5, which its norm takes back: only eps feels it.
        model.per_layer_norm = await loader.norm(sharing.PER_LAYER_NORM, config.rms_norm_eps * config.hidden_size)
        model.projections = await loader.linear(*_PROJECTIONS)
        model.layers = [await model._load_layer(loader, index) for index in range(config.num_hidden_layers)]
        model.unembed_projections = [await loader.linear(name) for name in _UNEMBED_PROJECTIONS]
        model.norm = await loader.norm(sharing.FINAL_NORM, config.rms_norm_eps)
        hard_tokens: dict[str, Tower] = {}
        for tower in (config.vision, config.audio):
            if isinstance(tower, HardConfig):
                hard_tokens[tower.key] = await HardTokens.load(tower, loader)
            elif isinstance(tower, MobileNetV5Config):
                model.vision = await MobileNetV5.load(tower, loader)
            elif tower:
                model.audio = await Usm.load(tower, loader)
        model.hard_tokens = hard_tokens
        return model

    async def _load_layer(self, loader: Loader, index: int) -> Layer:
        config, shared = self.config, index >= self.config.own_layers
        prefix, share = f"{_TEXT}layers.{index}.", config.activation_sparsity_pattern[index]

        async def norm(name: str) -> Norm:
            return await loader.norm(f"{prefix}{name}.weight", config.rms_norm_eps)

        async def linear(*names: str) -> Linear:
            return await loader.linear(*(f"{prefix}{name}.weight" for name in names))

        return Layer(
            altup=AltUp(
                router=await loader.vectors(
                    f"{prefix}altup.router_norm.weight", f"{prefix}altup.modality_router.weight"
                ),
                prediction=await loader.vectors(f"{prefix}altup.prediction_coefs.weight"),
                correction=await loader.vectors(f"{prefix}altup.correction_coefs.weight"),
                output=await loader.vectors(
                    f"{prefix}post_feedforward_layernorm.weight", f"{prefix}altup.correct_output_scale"
                ),
                eps=config.rms_norm_eps,
            ),
            input_layernorm=await norm("input_layernorm"),
            post_attention_layernorm=await norm("post_attention_layernorm"),
            post_laurel_norm=await norm("laurel.post_laurel_norm"),
            pre_feedforward_layernorm=await norm("pre_feedforward_layernorm"),
            post_per_layer_input_norm=await norm("post_per_layer_input_norm"),
            attention=Attention(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                scale=1.0,
                window=None if config.is_global(index) else config.sliding_window,
                q_norm=await norm("self_attn.q_norm"),
                k_norm=None if shared else await norm("self_attn.k_norm"),
                rope=self._global_rope if config.is_global(index) else self._local_rope,
                cache=sharing.sources(config.layer_types, config.num_kv_shared_layers)[index],
                value_norm=True,
            ),
            qkv_proj=await linear(*(f"self_attn.{which}_proj" for which in ("q" if shared else "qkv"))),
            o_proj=await linear("self_attn.o_proj"),
            laurel_left=await linear("laurel.linear_left"),
            laurel_right=await linear("laurel.linear_right"),
            gate_up_proj=await linear("mlp.gate_proj", "mlp.up_proj"),
            cut=NormalDist().inv_cdf(share) if share else None,
            down_proj=await linear("mlp.down_proj"),
            input_gate=await linear("per_layer_input_gate"),
            input_projection=await linear("per_layer_projection"),
        )

    def forward(self, step: Step) -> Normed:
        """Take the tokens of a step through the layers."""
        config = self.config
        x = step.embed(self.head, scale=config.hidden_size**0.5)
        context, rows = step.linear(self.per_layer_projection, x), step.lookup(self.per_layer_table)
        scale = config.hidden_size_per_layer_input**0.5
        inputs = step.per_layer_inputs(context, rows, self.per_layer_norm, scale=scale)
        streams, added = altup.begin(step, x, step.compute(step.linear(self.projections, x))), None
        for index, layer in enumerate(self.layers):
            if index == config.own_layers:
                step, streams, added, inputs = step.last_tokens(streams, added, inputs)
            streams, x = altup.predict(step, layer.altup, streams, added)
            u = step.compute(step.norm(x, layer.input_layernorm))
            low = step.linear(layer.laurel_right, step.compute(step.linear(layer.laurel_left, u)))
            h = step.linear(layer.qkv_proj, u, "qkv")
            h = step.linear(layer.o_proj, step.attention(layer.attention, h))
            x = step.laurel(
                x, step.norm(h, layer.post_attention_layernorm), u, step.norm(low, layer.post_laurel_norm)
            )
            h = step.linear(layer.gate_up_proj, step.norm(x, layer.pre_feedforward_layernorm), "gate_up")
            h = step.linear(layer.down_proj, step.geglu(h, cut=layer.cut))
            x = altup.correct(step, layer.altup, streams, x, step.compute(h))
            h = step.gated_input(step.linear(layer.input_gate, x), inputs, index)
            added = step.norm(step.linear(layer.input_projection, h), layer.post_per_layer_input_norm)
        assert added is not None, "a model has layers"
        return step.norm(altup.end(step, streams, added, self.unembed_projections), self.norm)


FAMILY = Family(
    name=NAME,
    model_types=MODEL_TYPES,
    architectures=(ARCHITECTURE,),
    config=Gemma3nConfig,
    tensors=tensors,
    unread=unread,
    sliced=sliced,
    load=Gemma3n.load,
    chat=GEMMA3,
    prefixes=sharing.HF_PREFIXES,
    ignored=sharing.HF_TOWERS,
    towers={
        "vision_config": ("model.vision_tower.", multimodal_embedder.VISION),
        "audio_config": ("model.audio_tower.", multimodal_embedder.AUDIO),
    },
    text_only=lambda config: replace(config, vision=None, audio=None),
)
