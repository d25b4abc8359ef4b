"""What a family of models is to the rest: a configuration, a table of tensors, and a forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, Self

from gemma_wgpu.ops.kv_cache import CacheSpec
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Norm, Normed, Step
from gemma_wgpu.tokens.chat import ChatTemplate


class Kind(Enum):
    """What a tensor is for, which decides how it is stored and quantised.

    - MATRIX: a weight matrix (rows, cols). EMBEDDING: the table of token embeddings, which is the head too.
    - NORM: what a norm multiplies by. NORM_PLUS_ONE: the same less 1 in Hugging Face's files, and with the 1 in
      GGUF's.
    - BIAS: what is added to a matrix's product.
    """

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    NORM = "norm"
    NORM_PLUS_ONE = "norm plus one"
    BIAS = "bias"

    @property
    def is_matrix(self) -> bool:
        """Say whether it lies on the GPU in one of the layouts of `ops.layout`; a vector is float32."""
        return self in (Kind.MATRIX, Kind.EMBEDDING)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model: what Hugging Face's files and GGUF files call it, its shape, and what it is for.

    `copies` are names under which some files hold the same weights once more.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    kind: Kind = Kind.MATRIX
    copies: tuple[str, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Return (rows, cols) as the GPU has them: a vector is one row, a matrix has whole blocks of columns."""
        if not self.kind.is_matrix:
            return 1, self.shape[0]
        rows, cols = self.shape
        return rows, -(-cols // BLOCK) * BLOCK


class Config(Protocol):
    """The shape of a language model, in Hugging Face's words. Families have frozen dataclasses of this form."""

    vocab_size: Any  # int; a frozen dataclass has no attribute that can be set
    hidden_size: Any
    num_hidden_layers: Any
    max_position_embeddings: Any

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, source: str = ...) -> Self:
        """Read a config.json. Raises ModelError, which names `source` and the key."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str = ...) -> Self:
        """Read the metadata of a GGUF file. Raises ModelError, which names `source` and the key."""

    def to_hf(self) -> dict[str, object]:
        """Return a config.json that `from_hf` and transformers read."""

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""


class Loader(Protocol):
    """Brings weights to the GPU, in the order in which it is asked for them: that of the family's table."""

    async def linear(self, *names: str, bias: str | None = None) -> Linear:
        """Load matrices, stacked row upon row, by their names in the table."""

    async def norm(self, name: str, eps: float) -> Norm:
        """Load a norm by its name in the table."""


class LanguageModel(ABC):
    """A model with its weights: token ids in, logits out.

    `caches` says which caches of keys and values its layers have, `ropes` which rotations, and `head` turns the last
    norm into logits.
    """

    caches: Sequence[CacheSpec]
    ropes: Sequence[Rope]
    head: Linear

    @abstractmethod
    def forward(self, step: Step) -> Normed:
        """Take the tokens of a step through the layers; return the norm that the head begins with."""


@dataclass(frozen=True)
class Family:
    """A family of models, as its file declares it.

    - name: what people call it.
    - model_types: `model_type` in config.json. architectures: `general.architecture` in GGUF files.
    - tensors: the table of a configuration, in the order of use. Files keep it, and weights are uploaded in it.
    - load: makes the model, and loads its weights in the order of the table.
    - chat: how a chat becomes a prompt.
    - prefixes: what the tensors' names begin with in other files than the plain ones, and what is meant.
    - ignored: what the names of tensors begin with that are not of the language model.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: type[Any]
    tensors: Callable[[Any], list[TensorSpec]]
    load: Callable[[Any, Loader], Coroutine[Any, Any, LanguageModel]]
    chat: ChatTemplate
    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
