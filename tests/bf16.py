"""Two measures for quantisers: the bf16 model that a quantised one stands for, and plain rounding."""

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants
from numpy.typing import NDArray

from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights import encodings
from gemma_wgpu.weights.packed import Packed

_REPLACED = ("general.architecture", "general.file_type", "general.quantization_version")
_ENCODINGS = {
    Layout.INT8: (encodings.Q8_0, GGMLQuantizationType.Q8_0),
    Layout.INT4: (encodings.Q4_0, GGMLQuantizationType.Q4_0),
}


def write(original: Path, out: Path) -> Path:
    """Write the GGUF `original` as `out`, with every matrix dequantised and rounded to bf16, ties to even."""
    reader = GGUFReader(original)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = GGUFWriter(out, architecture.contents())
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for name, field in reader.fields.items():
        if name not in _REPLACED and not name.startswith("GGUF."):
            # The first type of an array is ARRAY, and the last one is that of its elements.
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    kind = GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values: NDArray[np.float32] = quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def nearest(weights: NDArray[np.float32], layout: Layout, _pool: Executor | None = None) -> Packed:
    """Round to the nearest number of a grid that spans the block, in the place of `quantize`.

    `gguf` does this, and llama.cpp does the same. A block's outermost weight becomes 127 or -127 as INT8, -8 as INT4.
    """
    encoding, kind = _ENCODINGS[layout]
    rows, cols = weights.shape
    return Packed(layout, rows, cols, *encoding.split(quants.quantize(weights, kind).reshape(-1)))
