"""Make a tiny Gemma 3 that reads images: the whole architecture with random weights, in less than a megabyte.

    python site/make_tiny_vision.py [FOLDER]

It is for trying the notebook about images, and for tests. Its answers mean nothing. The numbers are the same every
time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.gemma3 import FAMILY, Gemma3Config
from gemma_wgpu.models.spec import Kind, TensorSpec
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer, TokenType
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Checkpoint, LocalTensor
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.packed import Packed

FOLDER = Path(__file__).parent / "content" / "models" / "tiny-vision"
SEED = 1

_CONTROLS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]
_TEXT = (
    "a an and are at below beside big bird blue boat bright cat circle cloud colour dark day dog evening far field "
    "fish flower garden grass green hill house in is it large leaf left light line moon morning mountain near night "
    "of old on one orange over path people picture red right river road roof round sea see shape sits sky small "
    "square stands star stone street sun that the there this three tree triangle two under walks wall water what "
    "where which white wide window with yellow"
)
_WORDS = _TEXT.split()


def make(folder: Path) -> None:
    """Write the model folder; one that is there is replaced. Raises RequestError if something else is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(RandomCheckpoint(SEED), folder, quant="int8", force=True)


class RandomCheckpoint(Checkpoint):
    """The model in memory, with weights of float32."""

    def __init__(self, seed: int) -> None:
        self.path = Path("tiny-vision")
        self.name, self.quantization, self.family = "tiny-vision", "float32", FAMILY
        self._vocabulary = _vocabulary()
        self.config = Gemma3Config.from_hf(_config(self._vocabulary.pieces))
        rng = np.random.default_rng(seed)
        self._weights = {name: self._random(rng, spec) for name, spec in self.table.items()}
        self.nbytes = sum(weights.nbytes for weights in self._weights.values())

    def _random(self, rng: np.random.Generator, spec: TensorSpec) -> NDArray[np.float32]:
        """Return the weights of a tensor, such that the numbers in the model neither grow nor fade."""
        noise: NDArray[np.float32] = rng.standard_normal(spec.shape, np.float32)
        match spec.kind:
            case Kind.NORM | Kind.NORM_PLUS_ONE:
                # Long queries and keys tell tokens apart, and large sums outgrow the token that a layer begins with.
                large = {"q_norm": 1.5, "k_norm": 1.5, "post_attention": 4, "post_feedforward": 4}
                factor = next((large[part] for part in large if part in spec.name), 1)
                return np.float32(factor) + noise * np.float32(0.1)
            case Kind.BIAS:
                return noise * np.float32(0.1)
            case Kind.TABLE:
                return noise * np.float32(0.1)
            case Kind.EMBEDDING:
                # Whole words are the likeliest tokens, and a text does not end.
                pieces = self._vocabulary.pieces
                words = {f"▁{word}" for word in _WORDS}
                noise[[piece not in words for piece in pieces]] *= np.float32(0.2)
                noise[[piece in ("<eos>", "<end_of_turn>") for piece in pieces]] = 0
            case Kind.MATRIX | Kind.CONVOLUTION:
                pass
        rows = spec.shape[-1 if spec.transposed else 0]
        return noise * np.float32((spec.size / rows) ** -0.5)

    def tensor(self, name: str) -> LocalTensor:
        """Return a matrix of the table. Raises ModelError for any other name."""
        spec = self.spec(name, matrix=True)
        weights = self._weights[name]
        matrix = np.zeros(spec.stored_shape, np.float32)
        matrix[:, : spec.size // len(matrix)] = weights.T if spec.transposed else weights.reshape(len(matrix), -1)
        return _Matrix(name, matrix)

    def values(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix. Raises ModelError for any other name."""
        return self._weights[self.spec(name, matrix=False).name]

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary."""
        return self._vocabulary

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer."""
        return self._vocabulary.tokenizer(self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return no file."""
        return ()

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Matrix(LocalTensor):
    """A matrix in memory."""

    layout = Layout.F32

    def __init__(self, name: str, weights: NDArray[np.float32]) -> None:
        self.name, self._weights = name, weights
        self.shape = weights.shape[0], weights.shape[1]

    def pack(self, start: int = 0, stop: int | None = None) -> Packed:
        """Return rows [start, stop), all by default. Raises RequestError outside the matrix."""
        start, stop = self._checked(start, stop)
        words = self._weights[start:stop].reshape(-1).view(np.uint32)
        return Packed(self.layout, stop - start, self.shape[1], words, np.zeros(0, np.uint32))


def _vocabulary() -> Vocabulary:
    """Return words, the beginnings that they are merged from, and bytes for everything else."""
    marked = [f"▁{word}" for word in _WORDS]
    parts = {part for word in ["user", "model", "What", "Where", *marked] for part in accumulate(word)}
    letters = {chr(code) for code in range(ord("!"), ord("~") + 1)}
    normal = ["\n", "\n\n", "\n\n\n", "\n\n\n\n", *sorted(parts | letters, key=lambda part: (len(part), part))]
    pieces = [*_CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types = [TokenType.CONTROL] * len(_CONTROLS) + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(normal)
    return Vocabulary(pieces, -np.arange(len(pieces), dtype=np.float32), np.array(types, np.uint8))


def _config(pieces: Sequence[str]) -> dict[str, object]:
    return {
        "model_type": "gemma3",
        "boi_token_index": pieces.index("<start_of_image>"),
        "eoi_token_index": pieces.index("<end_of_image>"),
        "image_token_index": pieces.index("<image_soft_token>"),
        "mm_tokens_per_image": 64,
        "text_config": {
            "model_type": "gemma3_text",
            "vocab_size": len(pieces),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 256,
            "max_position_embeddings": 2048,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
