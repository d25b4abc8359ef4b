"""The shape of a Gemma 3 text model, read from a Hugging Face config.json or from GGUF metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from gemma_wgpu.errors import ModelError

LOCAL = "sliding_attention"
GLOBAL = "full_attention"

_PATTERN = 6  # every sixth layer is global
_LOCAL_THETA = 10_000.0
_GLOBAL_THETA = 1_000_000.0


@dataclass(frozen=True)
class Gemma3Config:
    """A Gemma 3 text model. Names, meanings and defaults are those of Hugging Face's Gemma3TextConfig.

    `rope_theta` and `rope_scaling_factor` are of the global layers (positions are divided by the factor),
    `rope_local_base_freq` of the local ones. `sliding_window` counts the query itself.
    Attention scores are scaled by `query_pre_attn_scalar ** -0.5`.
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

    def is_global(self, layer: int) -> bool:
        """Whether `layer` (from 0) attends to the whole context, rather than to the sliding window."""
        return self.layer_types[layer] == GLOBAL

    @property
    def query_size(self) -> int:
        """Rows of q_proj and columns of o_proj: all query heads side by side."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = "config.json") -> Self:
        """Read a config.json of `model_type` gemma3_text or gemma3 (multimodal: its `text_config`).

        Both forms of the rope settings are read: `rope_theta`, `rope_local_base_freq` and `rope_scaling`, and
        transformers 5's `rope_parameters`. Raises ModelError naming `source` and the key.
        """
        outer = _Keys(config, source)
        model_type = outer.text("model_type")
        if model_type not in ("gemma3", "gemma3_text"):
            raise outer.error("model_type", f"is {_shown(model_type)}; only gemma3 and gemma3_text can be run")
        keys = outer.inner("text_config") if "text_config" in config else outer
        for level in (outer, keys):
            if level.get("quantization_config") is not None:
                raise level.error("quantization_config", "is set; use the model's bf16 original or a GGUF instead")
        for key in ("attention_bias", "use_bidirectional_attention"):
            if keys.get(key):
                raise keys.error(key, "is set, which Gemma 3 language models do not do")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if keys.get(key) is not None:
                raise keys.error(key, "is set, which Gemma 3 language models do not do")
        activation = keys.get("hidden_activation", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise keys.error("hidden_activation", f"is {_shown(activation)}; Gemma 3 has gelu_pytorch_tanh")
        layers = keys.count("num_hidden_layers", most=_MOST_LAYERS)
        theta, factor, local_theta = _hf_rope(keys)
        # Published files leave out what equals transformers' defaults; the tensors' shapes show a wrong one.
        built = cls(
            vocab_size=keys.count("vocab_size", 262_208),
            hidden_size=keys.count("hidden_size"),
            intermediate_size=keys.count("intermediate_size"),
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
            layer_types=_hf_layer_types(keys, layers),
        )
        built._check_heads(keys, "num_attention_heads", "num_key_value_heads", "head_dim")
        return built

    def to_hf(self) -> dict[str, object]:
        """A config.json that `from_hf` and transformers read."""
        config: dict[str, object] = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
        config |= asdict(self)
        config["layer_types"] = list(self.layer_types)
        factor = config.pop("rope_scaling_factor")
        config["rope_scaling"] = None if factor == 1 else {"rope_type": "linear", "factor": factor}
        return config | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = "GGUF") -> Self:
        """Read the metadata of a GGUF whose `general.architecture` is gemma3.

        What the format leaves out is as in llama.cpp: layer pattern, local theta and attention scale. Raises
        ModelError naming `source` and the key.
        """
        keys = _Keys(metadata, source)
        architecture = keys.text("general.architecture")
        if architecture != "gemma3":
            raise keys.error("general.architecture", f"is {_shown(architecture)}; only gemma3 can be run")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise keys.error("tokenizer.ggml.tokens", "has no tokens; the file is not a whole model")
        if metadata.get("gemma3.final_logit_softcapping"):
            raise keys.error("gemma3.final_logit_softcapping", "is set, which Gemma 3 language models do not do")
        layers = keys.count("gemma3.block_count", most=_MOST_LAYERS)
        hidden = keys.count("gemma3.embedding_length")
        heads = keys.count("gemma3.attention.head_count")
        head_dim = keys.count("gemma3.attention.key_length")
        # Of the family only the 27B, which alone has 62 layers, does not scale by its head size.
        scalar = hidden / heads if layers == 62 else head_dim
        built = cls(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=keys.count("gemma3.feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys.count("gemma3.attention.head_count_kv"),
            head_dim=head_dim,
            rms_norm_eps=keys.number("gemma3.attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("gemma3.rope.freq_base", _GLOBAL_THETA),
            rope_local_base_freq=keys.number("gemma3.rope.freq_base_swa", _LOCAL_THETA),
            rope_scaling_factor=_gguf_rope_factor(keys),
            sliding_window=keys.count("gemma3.attention.sliding_window"),
            max_position_embeddings=keys.count("gemma3.context_length"),
            query_pre_attn_scalar=float(scalar),
            layer_types=_pattern(keys.count("gemma3.attention.sliding_window_pattern", _PATTERN), layers),
        )
        if keys.count("gemma3.attention.value_length", head_dim) != head_dim:
            raise keys.error("gemma3.attention.value_length", f"is not the key length, {head_dim}")
        built._check_heads(
            keys,
            "gemma3.attention.head_count",
            "gemma3.attention.head_count_kv",
            "gemma3.attention.key_length",
        )
        return built

    def _check_heads(self, keys: "_Keys", heads: str, kv_heads: str, head_dim: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise keys.error(
                heads,
                f"is {self.num_attention_heads}, not a multiple of {kv_heads} {self.num_key_value_heads}",
            )
        if self.head_dim % 2:
            raise keys.error(head_dim, f"is {self.head_dim}; rotary embedding needs an even number")


_MOST = 1 << 24
_HUGE = 1e38
_MOST_LAYERS = 1 << 10


class _Keys:
    """Typed access to a mapping read from a file; every failure names the file and the key."""

    def __init__(self, mapping: Mapping[str, object], source: str, prefix: str = "") -> None:
        self._mapping = mapping
        self._source = source
        self._prefix = prefix

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self._source}: {self._prefix}{key} {problem}")

    def get(self, key: str, default: object = None) -> object:
        return self._mapping.get(key, default)

    def _required(self, key: str) -> object:
        value = self._mapping.get(key)
        if value is None:
            raise self.error(key, "is missing; this is not a complete Gemma 3 model")
        return value

    def text(self, key: str) -> str:
        value = self._required(key)
        if not isinstance(value, str):
            raise self.error(key, f"is {_shown(value)}, not a text")
        return value

    def count(self, key: str, default: int | None = None, *, most: int = _MOST) -> int:
        """An integer in [1, most]. A key that is there but null counts as missing."""
        value = self._required(key) if default is None else self._mapping.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(key, f"is {_shown(value)}, not a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero that float32 holds."""
        value = self._required(key) if default is None else self._mapping.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _HUGE:
            raise self.error(key, f"is {_shown(value)}, not a positive number")
        return float(value)

    def inner(self, key: str) -> "_Keys":
        value = self._mapping.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"is {_shown(value)}, not an object")
        return _Keys(value, self._source, f"{self._prefix}{key}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pattern(every: int, layers: int) -> tuple[str, ...]:
    return tuple(LOCAL if (layer + 1) % every else GLOBAL for layer in range(layers))


def _hf_layer_types(keys: _Keys, layers: int) -> tuple[str, ...]:
    types = keys.get("layer_types")
    if types is None:
        # Named with an underscore by some versions of transformers.
        key = "_sliding_window_pattern" if keys.get("sliding_window_pattern") is None else "sliding_window_pattern"
        return _pattern(keys.count(key, _PATTERN), layers)
    if not isinstance(types, Sequence) or any(kind not in (LOCAL, GLOBAL) for kind in types):
        raise keys.error("layer_types", f"may hold {LOCAL} and {GLOBAL} only")
    if len(types) != layers:
        raise keys.error("layer_types", f"has {len(types)} entries for {layers} layers")
    return tuple(types)


def _hf_rope(keys: _Keys) -> tuple[float, float, float]:
    """Theta and scaling factor of the global layers, theta of the local ones."""
    if keys.get("rope_parameters") is None:
        factor = 1.0 if keys.get("rope_scaling") is None else _hf_rope_factor(keys.inner("rope_scaling"))
        return (
            keys.number("rope_theta", _GLOBAL_THETA),
            factor,
            keys.number("rope_local_base_freq", _LOCAL_THETA),
        )
    parameters = keys.inner("rope_parameters")
    full, sliding = parameters.inner(GLOBAL), parameters.inner(LOCAL)
    if _hf_rope_factor(sliding) != 1:
        raise sliding.error("rope_type", "scales the local layers, which Gemma 3 does not do")
    return (
        full.number("rope_theta", _GLOBAL_THETA),
        _hf_rope_factor(full),
        sliding.number("rope_theta", _LOCAL_THETA),
    )


def _hf_rope_factor(keys: _Keys) -> float:
    key = "type" if keys.get("rope_type") is None else "rope_type"
    kind = keys.get(key, "default")
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise keys.error(key, f"is {_shown(kind)}; Gemma 3 has default and linear")
    return keys.number("factor")


def _gguf_rope_factor(keys: _Keys) -> float:
    kind = keys.get("gemma3.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise keys.error("gemma3.rope.scaling.type", f"is {_shown(kind)}; Gemma 3 has none and linear")
    return keys.number("gemma3.rope.scaling.factor", 1.0)
