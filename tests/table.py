"""Gemma 3's table of tensors, in the forms in which the tests use it."""

from gemma_wgpu.models.gemma3 import EMBEDDING, Gemma3Config, tensors
from gemma_wgpu.models.spec import TensorSpec

__all__ = ["EMBEDDING", "gguf_name", "matrix_shapes", "norm_shapes"]


def _specs(config: Gemma3Config) -> list[TensorSpec]:
    return tensors(config)


def matrix_shapes(config: Gemma3Config) -> dict[str, tuple[int, int]]:
    """Return (rows, cols) of every matrix."""
    return {spec.name: spec.stored_shape for spec in _specs(config) if spec.kind.is_matrix}


def norm_shapes(config: Gemma3Config) -> dict[str, tuple[int]]:
    """Return (length,) of every norm."""
    return {spec.name: (spec.shape[0],) for spec in _specs(config) if not spec.kind.is_matrix}


def gguf_name(name: str) -> str:
    """Return what a GGUF calls the tensor that Hugging Face calls `name`."""
    if name == "lm_head.weight":
        return "output.weight"
    layers = Gemma3Config.from_hf(_SHAPE | {"num_hidden_layers": 64})
    return next(spec.gguf for spec in _specs(layers) if spec.name == name)


_SHAPE: dict[str, object] = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64}
