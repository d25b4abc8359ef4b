"""Records what transformers makes of the random model of random_1b.py, in float32, on one sequence of 1100 ids.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_random_1b

Writes random_1b.npz next to this file: ids (1100,); top32_ids, top32_logits (1100, 32) and logsumexp (1100,) of every
position; positions (5,) and whole_logits (5, 1024), all logits at these; greedy_1 and greedy_513, 40 new ids after
so many.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM

from tests.reference.random_1b import STOPS, write
from tests.reference.recording import all_logits, greedy, tops

POSITIONS = [0, 510, 511, 512, 1099]


def main() -> None:
    ids = np.random.Generator(np.random.PCG64(4)).integers(107, 1024, 1100).astype(np.int32)
    ids[[0, 512]] = 166, 303  # these make the greedy choices after 1 and 513 ids clear ones
    with tempfile.TemporaryDirectory() as folder:
        model = Gemma3ForCausalLM.from_pretrained(
            write(Path(folder)), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    logits = all_logits(model, ids)
    recorded: dict[str, Any] = {
        "ids": ids,
        **tops(logits),
        "positions": np.array(POSITIONS, np.int32),
        "whole_logits": logits[POSITIONS],
        **{f"greedy_{length}": greedy(model, ids[:length], stops=STOPS) for length in (1, 513)},
    }
    np.savez_compressed(Path(__file__).with_name("random_1b.npz"), **recorded)


if __name__ == "__main__":
    main()
