"""Records what transformers makes of the random checkpoints of families.py, in float32.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_families

Writes families.npz next to this file: for each family `<name>_logits` float32 (100, 512) of the ids of families.py,
and `<name>_greedy`, the 8 likeliest ids that follow, one after the other.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3nForCausalLM, Gemma4ForCausalLM

from tests.reference.families import IDS, write

CLASSES = {"gemma3n": Gemma3nForCausalLM, "gemma4": Gemma4ForCausalLM}


@torch.inference_mode()
def main() -> None:
    recorded: dict[str, Any] = {}
    ids = torch.tensor([IDS])
    for name, cls in CLASSES.items():
        with tempfile.TemporaryDirectory() as folder:
            model, info = cls.from_pretrained(
                write(Path(folder), name), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        model.eval()
        recorded[f"{name}_logits"] = model(ids, use_cache=False).logits[0].numpy()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.cat(made.logits).topk(2).values
        print(
            name, "deviation", recorded[f"{name}_logits"].std(), "least margin", (top[:, 0] - top[:, 1]).min().item()
        )
        recorded[f"{name}_greedy"] = made.sequences[0, len(IDS) :].int().numpy()
    np.savez_compressed(Path(__file__).with_name("families.npz"), **recorded)


if __name__ == "__main__":
    main()
