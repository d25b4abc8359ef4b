"""Tiny Gemma 3 models, and the logits that the Gemma 3 report gives them: the architecture once more, in numpy."""

import json
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.checkpoints import Raw, blocks, gguf_metadata, gguf_tensors, write_gguf, write_hf
from tests.table import EMBEDDING, gguf_name, matrix_shapes, norm_shapes
from tests.vocabulary import CONTROL, SPECIAL, Vocabulary, tokenizer_json

Weights = dict[str, NDArray[np.float32]]
"""By Hugging Face's names; norms are what they multiply by."""

_CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
_WORDS = ["▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "▁and", "▁so", "▁it", "▁went", "▁home", "▁again"]
PIECES = [
    *_CONTROLS,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *(chr(letter) for letter in range(ord("a"), ord("z") + 1)),
    "▁",
    "\n",
    *_WORDS,
]
PIECES += [f"▁{token}" for token in range(len(PIECES), 320)]
TYPES = [CONTROL] * len(_CONTROLS) + [6] * 256 + [1] * (len(PIECES) - len(_CONTROLS) - 256)
EOS, BOS, END_OF_TURN = 1, 2, 5

# Where the float16 scales of a block lie, and what makes weights of about 1 of them.
_SCALES = {
    GGMLQuantizationType.Q4_K: {0: 1 / 160, 2: 1 / 25},
    GGMLQuantizationType.Q6_K: {208: 1 / 1000},
}

# Three layers, the last one global; two query heads to a key/value head; a prompt of nine tokens wraps the rings.
HF: dict[str, object] = {
    "model_type": "gemma3_text",
    "vocab_size": len(PIECES),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "max_position_embeddings": 128,
}


def token(piece: str | int) -> int:
    """The id of a piece, or of a byte."""
    return PIECES.index(f"<0x{piece:02X}>" if isinstance(piece, int) else piece)


def random_weights(config: Gemma3Config, seed: int = 0) -> Weights:
    """Weights under which every part of the architecture shows in the logits, and no end token is likely."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (rows, cols) in matrix_shapes(config).items():
        weights[name] = rng.standard_normal((rows, cols), np.float32) * np.float32(cols**-0.5)
    weights[EMBEDDING][[EOS, END_OF_TURN]] = 0
    for name, (size,) in norm_shapes(config).items():
        factor = 2 if "q_norm" in name or "k_norm" in name or ".post_" in name else 1
        weights[name] = np.float32(factor) + np.float32(0.3) * rng.standard_normal(size, np.float32)
    return weights


def scripted_weights(config: Gemma3Config, scripts: Sequence[Sequence[int]]) -> Weights:
    """Weights under which each token of a script is followed by the next one, whatever came before.

    All scripts together have at most `hidden_size` tokens, and no token has two followers.
    """
    rng = np.random.default_rng(0)
    weights = {name: np.zeros(shape, np.float32) for name, shape in matrix_shapes(config).items()}
    weights |= {name: np.ones(shape, np.float32) for name, shape in norm_shapes(config).items()}
    embedding = rng.standard_normal((config.vocab_size, config.hidden_size))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    tokens = sorted({token for script in scripts for token in script})
    embedding[tokens] = np.linalg.qr(rng.standard_normal((config.hidden_size,) * 2))[0][: len(tokens)]
    weights[EMBEDDING][:] = embedding
    # The first feed-forward layer is a table: row i is open to one token only, and puts out the one that follows it.
    prefix = "model.layers.0"
    for row, (token, following) in enumerate(pair for script in scripts for pair in pairwise(script)):
        weights[f"{prefix}.mlp.gate_proj.weight"][row] = embedding[token]
        weights[f"{prefix}.mlp.up_proj.weight"][row] = embedding[token]
        weights[f"{prefix}.mlp.down_proj.weight"][:, row] = embedding[following]
    weights[f"{prefix}.post_feedforward_layernorm.weight"] *= 20
    weights["model.norm.weight"] *= 4
    return weights


def write_folder(
    folder: Path,
    hf: Mapping[str, object],
    weights: Weights,
    vocabulary: Vocabulary | None = None,
    special: Container[str] = SPECIAL,
    *,
    plus_one: bool = True,
) -> Path:
    """A Hugging Face model folder in float32; `plus_one` says that it has norms less 1."""
    stored = {name: ("float32", values - (plus_one and values.ndim == 1)) for name, values in weights.items()}
    write_hf(folder, hf, {name: (kind, values.astype(np.float32)) for name, (kind, values) in stored.items()})
    tiny = Vocabulary(PIECES, -np.arange(len(PIECES), dtype=np.float32), np.array(TYPES, np.int32))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary or tiny, special)))
    return folder


def metadata(config: Gemma3Config) -> dict[str, object]:
    """The metadata of a GGUF whose last layer alone is global."""
    return (
        gguf_metadata(config)
        | {
            "gemma3.attention.sliding_window_pattern": config.num_hidden_layers,
            "gemma3.rope.freq_base_swa": config.rope_local_base_freq,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": config.rope_scaling_factor,
        }
        | metadata_of_tokens()
    )


def metadata_of_tokens() -> dict[str, object]:
    """The vocabulary in a GGUF's metadata."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(score) for score in range(len(PIECES))],
        "tokenizer.ggml.token_type": TYPES,
    }


def random_gguf(
    path: Path, config: Gemma3Config, kinds: Mapping[str, GGMLQuantizationType], seed: int = 0
) -> Weights:
    """Write a GGUF whose matrices are of the kinds given by name, else F32; return what `gguf` reads in it."""
    rng = np.random.default_rng(seed)
    weights = random_weights(config, seed)
    tensors: dict[str, Raw] = {}
    for name, values in weights.items():
        kind = kinds.get(name, GGMLQuantizationType.F32)
        raw: NDArray[np.generic] = values
        if kind != GGMLQuantizationType.F32:
            raw = _encoded(rng, kind, values)
            weights[name] = dequantize(raw, kind)
        tensors[gguf_name(name)] = raw, kind
    write_gguf(path, metadata(config), tensors)
    return weights


def _encoded(
    rng: np.random.Generator, kind: GGMLQuantizationType, values: NDArray[np.float32]
) -> NDArray[np.generic]:
    """`values` in `kind`; of the kinds that `gguf` cannot make, random bytes that stand for as large ones."""
    if kind not in _SCALES:
        encoded: NDArray[np.generic] = quantize(values, kind)
        return encoded
    data = blocks(rng, kind, *values.shape)
    records = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at, largest in _SCALES[kind].items():
        scales = rng.uniform(0.5, 1.0, (len(records), 1)) * largest * values.std()
        records[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return data


DAMAGES = [
    "missing file",
    "empty",
    "truncated",
    "truncated header",
    "wrong magic",
    "unsupported type",
    "wrong architecture",
    "missing tensor",
    "wrong shape",
]


def write_damaged(path: Path, damage: str) -> str:
    """Write a damaged model; return what an error must name beside the file."""
    config = Gemma3Config.from_hf(HF)
    tensors: dict[str, Raw] = gguf_tensors(np.random.default_rng(0), GGMLQuantizationType.F32, config)
    architecture, name = "gemma3", "blk.1.ffn_up.weight"
    if damage == "unsupported type":
        kind = GGMLQuantizationType.Q5_1
        row = config.hidden_size // 32 * GGML_QUANT_SIZES[kind][1]
        tensors[name] = np.zeros((config.intermediate_size, row), np.uint8), kind
    elif damage == "missing tensor":
        del tensors[name]
    elif damage == "wrong shape":
        tensors[name] = tensors[name][0][:64], GGMLQuantizationType.F32
    elif damage == "wrong architecture":
        architecture, name = "llama", "general.architecture is 'llama'"
    write_gguf(path, metadata(config), tensors, architecture=architecture)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
        name = "cut short"
    elif damage == "truncated header":
        path.write_bytes(path.read_bytes()[:500])
        name = "ends inside its header"
    elif damage == "wrong magic":
        path.write_bytes(b"GGML" + path.read_bytes()[4:])
        name = "not a GGUF file"
    elif damage == "missing file":
        path.unlink()
        name = "no such file"
    elif damage == "empty":
        path.write_bytes(b"")
        name = "empty"
    return name


def reference_logits(config: Gemma3Config, weights: Weights, ids: Sequence[int]) -> NDArray[np.float64]:
    """The logits after each of `ids`, by the Gemma 3 report (arXiv 2503.19786): (len(ids), vocab_size)."""
    return _forward(config, weights, ids)[0]


def reference_attention(config: Gemma3Config, weights: Weights, ids: Sequence[int]) -> list[NDArray[np.float64]]:
    """How each layer's heads share out their attention: (heads, len(ids), len(ids))."""
    return _forward(config, weights, ids)[1]


def _forward(
    config: Gemma3Config, weights: Weights, ids: Sequence[int]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    n, group = len(ids), config.num_attention_heads // config.num_key_value_heads
    distance = np.arange(n)[:, None] - np.arange(n)

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * w[f"{name}.weight"]

    def rotate(x: NDArray[np.float64], theta: float, factor: float) -> NDArray[np.float64]:
        frequencies = theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim) / factor
        # Angles are rounded as in training.
        angles = np.arange(n, dtype=np.float32)[:, None, None] * frequencies.astype(np.float32)
        cos, sin = np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)

    def attention(x: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
        prefix = f"model.layers.{layer}.self_attn"
        q, k, v = (
            (x @ w[f"{prefix}.{part}_proj.weight"].T).reshape(n, -1, config.head_dim) for part in ("q", "k", "v")
        )
        is_global = config.layer_types[layer] == "full_attention"
        theta = config.rope_theta if is_global else config.rope_local_base_freq
        factor = config.rope_scaling_factor if is_global else 1.0
        q = rotate(norm(q, f"{prefix}.q_norm"), theta, factor)
        k = rotate(norm(k, f"{prefix}.k_norm"), theta, factor)
        k, v = (np.repeat(heads, group, axis=1) for heads in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * config.query_pre_attn_scalar**-0.5
        visible = (distance >= 0) & (is_global | (distance < config.sliding_window))
        scores = np.where(visible, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        attended.append(shares)
        return np.einsum("hqk,khd->qhd", shares, v).reshape(n, -1) @ w[f"{prefix}.o_proj.weight"].T

    def feed_forward(x: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
        prefix = f"model.layers.{layer}.mlp"
        gate, up = (x @ w[f"{prefix}.{part}_proj.weight"].T for part in ("gate", "up"))
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * up) @ w[f"{prefix}.down_proj.weight"].T

    attended: list[NDArray[np.float64]] = []
    x = w[EMBEDDING][list(ids)] * config.hidden_size**0.5
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        y = attention(norm(x, f"{prefix}.input_layernorm"), layer)
        x = x + norm(y, f"{prefix}.post_attention_layernorm")
        y = feed_forward(norm(x, f"{prefix}.pre_feedforward_layernorm"), layer)
        x = x + norm(y, f"{prefix}.post_feedforward_layernorm")
    return norm(x, "model.norm") @ w[EMBEDDING].T, attended
