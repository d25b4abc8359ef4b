"""Records what transformers makes of the random layers of large.py, in float32.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_large

Writes large.npz next to this file: for each size `<size>_positions` and the logits after these positions,
`<size>_logits` float32 (positions, 1024). The ids are those of large.py: 1060 for the 4B, which pass its window, and
40 for the others.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.reference.large import LENGTHS, SIZES, ids, text_config, write

_AT = [0, 1, 17, 39, 1022, 1023, 1024, 1059]


@torch.inference_mode()
def main() -> None:
    recorded: dict[str, Any] = {}
    for size in SIZES:
        config = Gemma3TextConfig(**text_config(size), attn_implementation="eager")
        model = Gemma3ForCausalLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            stored = load_file(write(Path(folder), size) / "model.safetensors")
        weights = {name.removeprefix("language_model."): weight.float() for name, weight in stored.items()}
        model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
        logits = model(torch.from_numpy(ids(LENGTHS[size])).long()[None]).logits[0].numpy()
        positions = [at for at in _AT if at < LENGTHS[size]]
        recorded |= {f"{size}_positions": np.array(positions, np.int32), f"{size}_logits": logits[positions]}
        print(size, "standard deviation of the logits", logits.std())
    np.savez_compressed(Path(__file__).with_name("large.npz"), **recorded)


if __name__ == "__main__":
    main()
