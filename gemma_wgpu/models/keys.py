"""Reading configurations: typed access to config.json and to GGUF metadata, and the keys that families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gemma_wgpu.errors import ModelError
from gemma_wgpu.ops.layout import BLOCK

LOCAL = "sliding_attention"
GLOBAL = "full_attention"

MOST_LAYERS = 1 << 10
_MOST = 1 << 24
_HUGE = 1e38


class Keys:
    """Typed access to a mapping that was read from a file.

    `source` names the file, and `family` is what people call the models that have these keys. Every method raises
    ModelError, which names the file and the key, if a value is missing or is not what it must be.
    """

    def __init__(self, mapping: Mapping[str, object], source: str, family: str, prefix: str = "") -> None:
        self._mapping = mapping
        self._source = source
        self._prefix = prefix
        self.family = family

    def error(self, key: str, problem: str) -> ModelError:
        """Return the error for a key."""
        return ModelError(f"{self._source}: {self._prefix}{key} {problem}")

    def get(self, key: str, default: object = None) -> object:
        """Return the value of a key, whatever it is."""
        return self._mapping.get(key, default)

    def _required(self, key: str) -> object:
        """Return a value that must be there."""
        value = self._mapping.get(key)
        if value is None:
            raise self.error(key, f"is missing; this is not a complete {self.family} model")
        return value

    def text(self, key: str) -> str:
        """Return a text that must be there."""
        value = self._required(key)
        if not isinstance(value, str):
            raise self.error(key, f"is {shown(value)}, not a text")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """Return an integer in [least, most]. Without a default, a key that is null counts as missing."""
        value = self._required(key) if default is None else self._mapping.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"is {shown(value)}, not a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above zero that float32 can hold."""
        value = self._required(key) if default is None else self._mapping.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _HUGE:
            raise self.error(key, f"is {shown(value)}, not a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """Return `count` numbers, of which a file may give one for all."""
        value = self._required(key)
        values = [value] * count if isinstance(value, int | float) else value
        if not isinstance(values, Sequence | np.ndarray) or len(values) != count:
            raise self.error(key, f"is {shown(value)}, not a list of {count} numbers")
        if not all(isinstance(each, int | float | np.number | np.bool_) for each in values):
            raise self.error(key, f"is {shown(value)}, not a list of numbers")
        return [float(each) for each in values]

    def counts(self, key: str, count: int) -> list[int]:
        """Return `count` whole numbers above zero, of which a file may give one for all."""
        values = self.numbers(key, count)
        if not all(1 <= value <= _MOST and value == int(value) for value in values):
            raise self.error(key, f"is {shown(self.get(key))}, not whole numbers from 1 to {_MOST}")
        return [int(value) for value in values]

    def size(self, key: str, default: int | None = None) -> int:
        """Return a count that is a multiple of 32, since the rows of weights are read in blocks."""
        value = self.count(key, default)
        if value % BLOCK:
            raise self.error(key, f"is {value}; only multiples of {BLOCK} can be run")
        return value

    def inner(self, key: str) -> Keys:
        """Return the keys of an object inside."""
        value = self._mapping.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"is {shown(value)}, not an object")
        return Keys(value, self._source, self.family, f"{self._prefix}{key}.")

    def refuse(self, *keys: str) -> None:
        """Raise ModelError if one of these keys asks for something that the family does not do."""
        for key in keys:
            if self._mapping.get(key) not in (None, False, 0):
                raise self.error(key, f"is set, which {self.family} language models do not do")

    def check_heads(self, heads: tuple[str, int], kv_heads: tuple[str, int], head_dim: tuple[str, int]) -> None:
        """Raise ModelError unless these (key, value) pairs make an attention."""
        if heads[1] % kv_heads[1]:
            raise self.error(heads[0], f"is {heads[1]}, not a multiple of {kv_heads[0]} {kv_heads[1]}")
        if head_dim[1] % 2:
            raise self.error(head_dim[0], f"is {head_dim[1]}; rotary embedding needs an even number")


def shown(value: object) -> str:
    """Return a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them: "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def pattern(every: int, layers: int) -> tuple[str, ...]:
    """Return the types of `layers` layers: a layer is global if its number, from 1, is a multiple of `every`."""
    return tuple(LOCAL if (layer + 1) % every else GLOBAL for layer in range(layers))


def text_keys(config: Mapping[str, object], source: str, family: str, model_types: Sequence[str]) -> Keys:
    """Return the keys of a language model in config.json, which may be in an object of a multimodal model's keys.

    Raises ModelError for another `model_type`, and for weights that Hugging Face's libraries have quantised.
    """
    outer = Keys(config, source, family)
    model_type = outer.text("model_type")
    if model_type not in model_types:
        raise outer.error("model_type", f"is {shown(model_type)}; only {listed(model_types)} can be run")
    keys = outer.inner("text_config") if "text_config" in config else outer
    for level in (outer, keys):
        if level.get("quantization_config") is not None:
            raise level.error("quantization_config", "is set; use the model's bf16 original or a GGUF instead")
    activation = keys.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise keys.error("hidden_activation", f"is {shown(activation)}; {family} has gelu_pytorch_tanh")
    return keys


def hf_layer_types(keys: Keys, layers: int, every: int) -> tuple[str, ...]:
    """Return `layer_types` of config.json, or what older keys say; or else the `pattern` with the default `every`."""
    types = keys.get("layer_types")
    if types is None:
        # Some versions of transformers name it with an underscore.
        key = "_sliding_window_pattern" if keys.get("sliding_window_pattern") is None else "sliding_window_pattern"
        return pattern(keys.count(key, every), layers)
    if not isinstance(types, Sequence) or any(kind not in (LOCAL, GLOBAL) for kind in types):
        raise keys.error("layer_types", f"may hold {LOCAL} and {GLOBAL} only")
    if len(types) != layers:
        raise keys.error("layer_types", f"has {len(types)} entries for {layers} layers")
    return tuple(types)


def hf_rope(keys: Keys, theta: float, local_theta: float) -> tuple[float, float, float]:
    """Return theta and scaling factor of the global layers, and theta of the local ones, from config.json.

    Both forms are read: `rope_theta`, `rope_local_base_freq` and `rope_scaling`, and the `rope_parameters` of
    transformers 5. `theta` and `local_theta` are the defaults.
    """
    if keys.get("rope_parameters") is None:
        factor = 1.0 if keys.get("rope_scaling") is None else _hf_rope_factor(keys.inner("rope_scaling"))
        return keys.number("rope_theta", theta), factor, keys.number("rope_local_base_freq", local_theta)
    parameters = keys.inner("rope_parameters")
    full, sliding = parameters.inner(GLOBAL), parameters.inner(LOCAL)
    if _hf_rope_factor(sliding) != 1:
        raise sliding.error("rope_type", f"scales the local layers, which {keys.family} does not do")
    return full.number("rope_theta", theta), _hf_rope_factor(full), sliding.number("rope_theta", local_theta)


def _hf_rope_factor(keys: Keys) -> float:
    key = "type" if keys.get("rope_type") is None else "rope_type"
    kind = keys.get(key, "default")
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise keys.error(key, f"is {shown(kind)}; {keys.family} has default and linear")
    return keys.number("factor")


def gguf_keys(metadata: Mapping[str, object], source: str, family: str, architecture: str) -> tuple[Keys, int]:
    """Return the keys of a GGUF's metadata, and the size of its vocabulary.

    Raises ModelError for another `general.architecture`, and if there are no tokens.
    """
    keys = Keys(metadata, source, family)
    found = keys.text("general.architecture")
    if found != architecture:
        raise keys.error("general.architecture", f"is {shown(found)}; only {architecture} can be run")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise keys.error("tokenizer.ggml.tokens", "has no tokens; the file is not a whole model")
    return keys, len(tokens)


def gguf_rope_factor(keys: Keys, architecture: str) -> float:
    """Return the number by which the positions of the global layers are divided."""
    kind = keys.get(f"{architecture}.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise keys.error(f"{architecture}.rope.scaling.type", f"is {shown(kind)}; {keys.family} has none and linear")
    return keys.number(f"{architecture}.rope.scaling.factor", 1.0)
