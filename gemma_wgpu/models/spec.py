"""What a family of models is to the rest: a configuration, a table of tensors, and a forward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import pictures
from gemma_wgpu.ops.encoder import EncoderStep, LayerNorm
from gemma_wgpu.ops.kv_cache import CacheSpec
from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import HostTable, Linear
from gemma_wgpu.ops.rope import Rope
from gemma_wgpu.ops.step import Norm, Normed, Step
from gemma_wgpu.tokens.chat import ChatTemplate, MediumTokens


class Kind(Enum):
    """What a tensor is for, which decides how it is stored and quantised.

    - MATRIX: a weight matrix (rows, cols). EMBEDDING: the table of token embeddings, which is the head too. LOOKUP: a
      table of which only the tokens' rows are read.
    - NORM: what a norm multiplies by. NORM_PLUS_ONE: the same less 1 in Hugging Face's files, and with the 1 in
      GGUF's.
    - BIAS: what is added to a matrix's product. TABLE: vectors, a row each, that are added to others.
    - CONVOLUTION: the weights of a convolution, (rows, channels, height, width): a matrix, with the pixels that a
      row sees as its columns. DEPTHWISE: those of a convolution of each channel by itself, (channels, 1, height,
      width).
    """

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    LOOKUP = "lookup"
    NORM = "norm"
    NORM_PLUS_ONE = "norm plus one"
    BIAS = "bias"
    TABLE = "table"
    CONVOLUTION = "convolution"
    DEPTHWISE = "depthwise"

    @property
    def is_matrix(self) -> bool:
        """Say whether it lies on the GPU in one of the layouts of `ops.layout`; anything else is float32."""
        return self in (Kind.MATRIX, Kind.EMBEDDING, Kind.LOOKUP, Kind.CONVOLUTION)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model: what Hugging Face's files and GGUF files call it, its shape, and what it is for.

    `copies` are names under which some files hold the same weights once more. A `transposed` matrix has its outputs
    as columns in the files. GGUF files have a tensor with `slot` (i, n) as number i of the n that lie stacked in one.
    `tower` says whether it belongs to an encoder of images, rather than to the language
    model.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    kind: Kind = Kind.MATRIX
    copies: tuple[str, ...] = ()
    transposed: bool = False
    slot: tuple[int, int] | None = None
    tower: bool = False

    @property
    def size(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Return (rows, cols) as the GPU has them: a vector is one row, a matrix has whole blocks of columns."""
        if not self.kind.is_matrix:
            return self.size // self.shape[-1], self.shape[-1]
        rows = self.shape[-1 if self.transposed else 0]
        return rows, -(-self.size // rows // BLOCK) * BLOCK


Spans = tuple[tuple[int, int], ...]
"""What is taken of rows or columns: (start, stop) of each run."""


@dataclass(frozen=True)
class MatFormerSlice:
    """What a smaller model takes of a larger one: all layers but `skipped`, with networks of `intermediate_size`.

    `intermediate_size` has the width of each layer that is taken, or one for all; the widths stay if it is None.
    """

    skipped: tuple[int, ...]
    intermediate_size: tuple[int, ...] | None


@dataclass(frozen=True)
class Cut:
    """What a tensor of a smaller model is in the larger one: some rows and columns of `name`, or all."""

    name: str
    rows: Spans | None = None
    cols: Spans | None = None


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

    async def linear(self, *names: str, biases: Sequence[str] = ()) -> Linear:
        """Load matrices, stacked row upon row, by their names in the table; each has a bias, or none has one."""

    async def table(self, name: str) -> Linear | HostTable:
        """Load a table of which only some rows are read, or leave it where it is, by its name in the table."""

    async def norm(self, name: str, eps: float) -> Norm:
        """Load a norm by its name in the table."""

    async def layer_norm(self, weight: str, bias: str, eps: float) -> LayerNorm:
        """Load a LayerNorm by the names of its weight and its bias in the table."""

    async def vectors(self, *names: str) -> Operand:
        """Load what is no matrix, float32 and one after the other, by their names in the table."""

    async def derived(self, make: Callable[..., NDArray[np.float32]], *names: str) -> Operand:
        """Load what `make` makes of tensors, by their names in the table: it is called once, with each as float32.

        What is no matrix has its own shape, and a matrix is (rows, columns rounded up to whole blocks).
        """

    async def depthwise(self, name: str) -> Operand:
        """Load a convolution of each channel by itself, by its name: float32 (height * width, channels)."""


class Tower(ABC):
    """What reads images or sounds: out come the vectors that take the place of a thing's soft tokens.

    `tokens` says how such a thing stands in a prompt. The ids `hard` have vectors of the tower's, too, instead of the
    language model's embeddings.
    """

    tokens: MediumTokens
    hard: range = range(0)

    @abstractmethod
    def patches(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what `forward` begins with: float32 (count, size)."""

    @abstractmethod
    def forward(self, step: EncoderStep) -> Value:
        """Take patches through the layers; return float32 (tokens.count, hidden size of the text)."""

    def hard_rows(self, step: EncoderStep) -> Value:
        """Return the vectors of the ids `hard`, float32 (len(hard), hidden size of the text)."""
        raise NotImplementedError  # by towers without such ids


class VisionModel(Tower):
    """A tower that reads images, of `image_size` x `image_size` pixels of three colours: (3, size, size).

    The pixels have the mean `mean` and the deviation `deviation` if black is 0 and white is 1.
    """

    image_size: int
    mean = 0.5
    deviation = 0.5

    def views(self, source: object, *, pan_and_scan: bool = False, files: bool = True) -> list[NDArray[np.float32]]:
        """Return the pixels of a picture as `patches` takes them, and with `pan_and_scan` those of its crops.

        `source` is one of those that `pictures.opened` takes, or has the pixels already. Raises RequestError if it
        cannot be read.
        """
        whole = pictures.normalized(source, self.image_size)
        if whole is not None:
            return [whole]
        return pictures.views(
            source,
            self.image_size,
            mean=self.mean,
            deviation=self.deviation,
            pan_and_scan=pan_and_scan,
            files=files,
        )


class LanguageModel(ABC):
    """A model with its weights: token ids in, logits out.

    `caches` says which caches of keys and values its layers have, `ropes` which rotations, and `head` turns the last
    norm into logits, which stay inside of [-softcap, softcap] if there is one. `vision` reads images and `audio`
    sounds, if the model can. `hard_tokens` are towers that only have vectors for ids of their own, by any names.
    """

    caches: Sequence[CacheSpec]
    ropes: Sequence[Rope]
    head: Linear
    softcap: float | None = None
    vision: VisionModel | None = None
    audio: Tower | None = None
    hard_tokens: Mapping[str, Tower] = MappingProxyType({})

    @property
    def towers(self) -> dict[str, Tower]:
        """Return what reads things that are no text, by what these are called: "image" and "sound"."""
        towers = {"image": self.vision, "sound": self.audio}
        return {noun: tower for noun, tower in towers.items() if tower}

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
    - unread: the tensors of a configuration that files may hold though nobody reads them.
    - ignored: what the names of tensors begin with that a configuration may do without.
    - constants: tensors of GGUF files, by their names there, whose values follow from the configuration.
    - sliced: the configuration of a smaller model in a larger one, and what its tensors are there, by name.
    - towers: the keys of config.json that describe towers, and what the names of their tensors begin with: those of
      the tower itself, which files may lack, and those of what is behind it.
    - text_only: the configuration without what reads images and sounds.
    - with_projector: the configuration together with that of a GGUF file (its metadata, its path) which has the tower
      that reads images.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: type[Any]
    tensors: Callable[[Any], list[TensorSpec]]
    load: Callable[[Any, Loader], Coroutine[Any, Any, LanguageModel]]
    chat: ChatTemplate
    prefixes: Mapping[str, str] = field(default_factory=dict)
    unread: Callable[[Any], list[TensorSpec]] = lambda config: []
    ignored: tuple[str, ...] = ()
    constants: Callable[[Any], Mapping[str, NDArray[np.float32]]] = lambda config: {}
    sliced: Callable[[Any, MatFormerSlice], tuple[Any, Mapping[str, Cut]]] | None = None
    towers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    text_only: Callable[[Any], Any] = lambda config: config
    with_projector: Callable[[Any, Mapping[str, object], str], Any] | None = None
