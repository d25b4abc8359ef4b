"""Tiny models for tests, written by the `gguf` and `safetensors` packages."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from gemma_wgpu.models import siglip
from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.table import gguf_name, matrix_shapes, norm_shapes

Raw = tuple[NDArray[np.generic], GGMLQuantizationType]

# The float16 scales of a block lie at these bytes; all its other bytes may have any value.
_HALVES = {
    GGMLQuantizationType.F16: (0,),
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_0: (0,),
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
}

HF_CONFIG: dict[str, object] = {
    "model_type": "gemma3_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "max_position_embeddings": 128,
}
CONFIG = Gemma3Config.from_hf(HF_CONFIG)

# A patch has 147 pixels, which are no whole blocks, and the table of positions is the largest vector.
HF_SEEING: dict[str, object] = {
    "model_type": "gemma3",
    "text_config": HF_CONFIG,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 84,
        "patch_size": 7,
    },
    "mm_tokens_per_image": 9,
}
SEEING = Gemma3Config.from_hf(HF_SEEING)


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of bfloat16 numbers: those of `values`, cut short."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def blocks(rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, cols: int) -> NDArray[np.uint8]:
    """Return random bytes of a rows x cols matrix, (rows, bytes per row), whose floats are all finite."""
    if kind == GGMLQuantizationType.F32:
        return rng.standard_normal((rows, cols), np.float32).view(np.uint8)
    if kind == GGMLQuantizationType.BF16:
        return bfloat16(rng.standard_normal((rows, cols), np.float32)).view(np.uint8)
    data = rng.integers(0, 256, quant_shape_to_byte_shape((rows, cols), kind), np.uint8)
    records = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at in _HALVES[kind]:
        bits = rng.integers(0, 0x7C00, len(records), np.uint16)  # 0x7C00 is infinity
        signs = rng.integers(0, 2, len(records), np.uint16) << 15
        records[:, at : at + 2] = (bits | signs)[:, None].view(np.uint8)
    return data


def gguf_tensors(
    rng: np.random.Generator,
    kind: GGMLQuantizationType,
    config: Gemma3Config = CONFIG,
    *,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
) -> dict[str, Raw]:
    """Return raw tensors by GGUF name: matrices are of `kind`, or of `kinds` by Hugging Face name; norms are F32."""
    tensors: dict[str, Raw] = {}
    for name, (rows, cols) in matrix_shapes(config).items():
        of = (kinds or {}).get(name, kind)
        tensors[gguf_name(name)] = blocks(rng, of, rows, cols), of
    for name, (size,) in norm_shapes(config).items():
        tensors[gguf_name(name)] = rng.standard_normal(size, np.float32), GGMLQuantizationType.F32
    return tensors


def gguf_metadata(config: Gemma3Config = CONFIG) -> dict[str, object]:
    """Return what llama.cpp's converter writes for `config`, with a vocabulary of the right size and no sense."""
    return {
        "general.name": "Tiny",
        "gemma3.context_length": config.max_position_embeddings,
        "gemma3.embedding_length": config.hidden_size,
        "gemma3.block_count": config.num_hidden_layers,
        "gemma3.feed_forward_length": config.intermediate_size,
        "gemma3.attention.head_count": config.num_attention_heads,
        "gemma3.attention.head_count_kv": config.num_key_value_heads,
        "gemma3.attention.key_length": config.head_dim,
        "gemma3.attention.value_length": config.head_dim,
        "gemma3.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "gemma3.attention.sliding_window": config.sliding_window,
        "gemma3.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"▁{token}" for token in range(config.vocab_size)],
        "tokenizer.ggml.scores": [-float(token) for token in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [1] * config.vocab_size,
    }


def tower_values(rng: np.random.Generator, config: Gemma3Config = SEEING) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a tower by Hugging Face name, as Hugging Face has them."""
    assert config.vision is not None
    specs = siglip.tensors(config.vision, config.hidden_size)
    return {spec.name: rng.standard_normal(spec.shape, np.float32) for spec in specs}


def mmproj_tensors(
    values: Mapping[str, NDArray[np.float32]], kind: GGMLQuantizationType = GGMLQuantizationType.F32
) -> dict[str, Raw]:
    """Return what llama.cpp's converter makes of a tower: matrices are of `kind`, and the soft norm has the 1."""
    table = get_tensor_name_map(MODEL_ARCH.MMPROJ, 64)
    tensors: dict[str, Raw] = {}
    for name, array in values.items():
        stem, suffix = re.fullmatch(r"(.*)[._](weight|bias)", name).groups()  # type: ignore[union-attr]
        of = kind if array.ndim > 1 and "embeddings" not in name else GGMLQuantizationType.F32
        used = array + np.float32(1) if "soft_emb_norm" in name else array
        tensors[f"{table.get_name(stem)}.{suffix}"] = quantize(used, of), of
    return tensors


def mmproj_metadata(config: Gemma3Config = SEEING) -> dict[str, object]:
    """Return what llama.cpp's converter writes of a tower."""
    tower = config.vision
    assert tower is not None
    return {
        "clip.projector_type": "gemma3",
        "clip.has_vision_encoder": True,
        "clip.vision.image_size": tower.image_size,
        "clip.vision.patch_size": tower.patch_size,
        "clip.vision.embedding_length": tower.hidden_size,
        "clip.vision.feed_forward_length": tower.intermediate_size,
        "clip.vision.projection_dim": config.hidden_size,
        "clip.vision.block_count": tower.num_hidden_layers,
        "clip.vision.attention.head_count": tower.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": tower.layer_norm_eps,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.use_gelu": True,
    }


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, Raw],
    *,
    architecture: str = "gemma3",
    alignment: int | None = None,
) -> Path:
    """Write a GGUF of version 3."""
    writer = GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                raise TypeError(key)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patch(path: Path, at: int, value: bytes) -> None:
    """Put `value` in the place of the bytes at `at`."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])


def description(path: Path, tensor: str) -> int:
    """Return where a GGUF describes a tensor after its name: u32 dimensions, u64 each, u32 type, u64 offset."""
    return path.read_bytes().index(struct.pack("<Q", len(tensor)) + tensor.encode()) + 8 + len(tensor)


def hf_tensors(
    rng: np.random.Generator, dtype: str, config: Gemma3Config = CONFIG
) -> dict[str, tuple[str, NDArray[np.generic]]]:
    """Return (dtype, bits) by Hugging Face name; `dtype` is "float32", "float16" or "bfloat16"."""
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {}
    for name, shape in {**matrix_shapes(config), **norm_shapes(config)}.items():
        values = rng.standard_normal(shape, np.float32)
        bits: NDArray[np.generic] = values
        if dtype == "bfloat16":
            bits = bfloat16(values)
        elif dtype == "float16":
            bits = values.astype(np.float16)
        tensors[name] = dtype, bits
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[np.generic]]]) -> Path:
    """Write one safetensors file."""
    specs = {
        name: TensorSpec(dtype=dtype, shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
        for name, (dtype, bits) in tensors.items()
    }
    serialize_file(specs, path)
    return path


def write_hf(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, tuple[str, NDArray[np.generic]]],
    *,
    shards: int = 1,
) -> Path:
    """Write a model folder: config.json and the tensors, with an index if there is more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = list(tensors)[shard::shards]
        write_safetensors(folder / name, {tensor: tensors[tensor] for tensor in chosen})
        weight_map |= dict.fromkeys(chosen, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_bits(left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    """Say whether two float32 arrays agree to the bit, shapes included."""
    return left.dtype == right.dtype == np.float32 and np.array_equal(
        np.ascontiguousarray(left).view(np.uint32), np.ascontiguousarray(right).view(np.uint32)
    )


def resident(path: Path) -> int:
    """Return the KiB of a mapped file that are in this process's memory, as Linux counts them."""
    maps = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"Rss: +(\d+)", entry) for entry in maps if str(path) in entry]
    return sum(int(size[1]) for size in sizes if size)
