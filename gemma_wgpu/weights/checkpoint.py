"""A model on disk: its configuration, its tensors by Hugging Face's names, its tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError, RequestError
from gemma_wgpu.gpu.device import Data
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout, Packed
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary

EMBEDDING = "model.embed_tokens.weight"


class Source(ABC):
    """A weight matrix on its way to the GPU: `shape` is (rows, cols), rows being its outputs."""

    name: str  # Hugging Face's
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The layout of the words."""

    @abstractmethod
    def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        """Rows [start, stop), in one or more runs: (the first row, quants, scales). `start` is even."""


class Weights(ABC):
    """What a model is loaded from. Use as a context manager, or close() when the weights have been read.

    `reports_progress` is of those whose bytes come slowly, and who tell how many have come.
    """

    name: str
    config: Gemma3Config
    quantization: str
    reports_progress: bool

    @abstractmethod
    def tensor(self, name: str) -> Source:
        """The matrix of a name in `matrix_shapes`. Raises ModelError for any other."""

    @abstractmethod
    async def norm_factors(self, name: str) -> NDArray[np.float32]:
        """What a norm of `norm_shapes` multiplies by, 1 + w, float32 (n,). Raises ModelError for others."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model. Raises ModelError when it is missing or damaged."""

    def seconds(self) -> dict[str, float]:
        """Spent so far on what comes before reading, by what it was; nothing where that takes no time of its own."""
        return {}

    @abstractmethod
    def release(self) -> None:
        """Give the memory of what was read back to the system; what was packed stays valid.

        Weights read from a mapped file count as the process's memory until then.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. What was packed stays valid; tensors raise ModelError from then on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tensor(Source):
    """A weight matrix that can be read."""

    @abstractmethod
    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Rows [start, stop), all by default; no others are read. Raises RequestError outside the matrix."""

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        """Rows [start, stop) as `pack` gives them."""
        packed = self.pack(start, stop)
        yield start, packed.quants, packed.scales

    def _checked(self, start: int, stop: int | None) -> tuple[int, int]:
        """Rows as `pack` is asked for them. Raises RequestError outside the matrix."""
        rows = self.shape[0]
        stop = rows if stop is None else stop
        if not 0 <= start < stop <= rows:
            raise RequestError(f"rows {start} to {stop} of {self.name} do not exist; it has {rows}")
        return start, stop


class Checkpoint(Weights):
    """A model that was found whole: every tensor the architecture needs was checked when it was opened.

    `nbytes` counts the bytes that these tensors take in the source. `quantization` is as the source calls it:
    "Q4_K_M", "bf16".
    """

    path: Path
    nbytes: int
    reports_progress = False

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The matrix of a name in `matrix_shapes`. Raises ModelError for any other."""

    @abstractmethod
    def norm(self, name: str) -> NDArray[np.float32]:
        """What a norm of `norm_shapes` multiplies by, 1 + w, float32 (n,). Raises ModelError for others."""

    async def norm_factors(self, name: str) -> NDArray[np.float32]:
        """`norm`."""
        return self.norm(name)

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary behind it, in our own form. Raises ModelError when it is missing or damaged."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """All the files that the model is made of."""


def matrix_shapes(config: Gemma3Config) -> dict[str, tuple[int, int]]:
    """(rows, cols) of every matrix the architecture has; the head is the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.query_size, config.key_value_size
    shapes = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (query, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, query),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def norm_shapes(config: Gemma3Config) -> dict[str, tuple[int]]:
    """(length,) of every norm the architecture has."""
    shapes = {"model.norm.weight": (config.hidden_size,)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (config.hidden_size,),
            f"{prefix}.post_attention_layernorm.weight": (config.hidden_size,),
            f"{prefix}.pre_feedforward_layernorm.weight": (config.hidden_size,),
            f"{prefix}.post_feedforward_layernorm.weight": (config.hidden_size,),
            f"{prefix}.self_attn.q_norm.weight": (config.head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (config.head_dim,),
        }
    return shapes


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file, a model folder, or a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

    Raises ModelError, naming the file and the tensor or key, when it is missing, damaged, incomplete or not a
    Gemma 3 that can be run.
    """
    from gemma_wgpu.weights.folder import FolderCheckpoint  # these build on this module
    from gemma_wgpu.weights.gguf import GGUFCheckpoint
    from gemma_wgpu.weights.manifest import MANIFEST
    from gemma_wgpu.weights.safetensors import SafetensorsCheckpoint

    path = Path(path).expanduser()
    if path.is_dir():
        return FolderCheckpoint(path) if (path / MANIFEST).exists() else SafetensorsCheckpoint(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder; give a .gguf file or a model folder")
    return GGUFCheckpoint(path)
