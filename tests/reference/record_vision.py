"""Records what transformers makes of the small Gemma 3 with a vision tower in tests/data/gemma3_vision, in float32.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_vision

Writes reference.npz next to the model. Its images are the pixel_values of pictures.npz there. `features` are what
the projector makes of them, float32 (2, 4, 192). For each prompt of PROMPTS, `<name>_ids` are its ids,
`<name>_images` the images whose soft tokens are among them, `<name>_logits` float32 (ids, 576), and `<name>_greedy`
the 8 likeliest ids that follow, one after the other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForConditionalGeneration

FOLDER = Path(__file__).parents[1] / "data" / "gemma3_vision"
BEGIN, END, SOFT = 509, 510, 512
BLOCK = [BEGIN, *[SOFT] * 4, END]
TEXT: list[int] = np.random.Generator(np.random.PCG64(5)).integers(3, 500, 120).tolist()

# The window has 8 tokens.
PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    "text": ([2, *TEXT[:40]], []),
    "two": ([2, *TEXT[:11], *BLOCK, *TEXT[11:14], *BLOCK, *TEXT[14:40]], [0, 1]),
    "first": ([*BLOCK, *TEXT[:5]], [1]),
    "last": ([2, *TEXT[:20], *BLOCK], [0]),
    "side by side": ([2, *TEXT[:3], BEGIN, *[SOFT] * 12, END, *TEXT[3:9]], [0, 1, 0]),
    "far": ([2, *BLOCK, *TEXT[:100], *BLOCK, *TEXT[100:]], [1, 1]),
    "alone": ([SOFT] * 4, [0]),
}


@torch.inference_mode()
def main() -> None:
    model = Gemma3ForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with np.load(FOLDER / "pictures.npz") as pictures:
        pixels = torch.from_numpy(pictures["pixel_values"])
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    recorded: dict[str, Any] = {"features": features.numpy()}
    for name, (ids, images) in PROMPTS.items():
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            inputs |= {"pixel_values": pixels[images], "token_type_ids": (inputs["input_ids"] == SOFT).long()}
        logits = model(**inputs, use_cache=False).logits[0]
        made = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.cat(made.logits).topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 2e-3, f"{name}: a greedy choice is not clear"
        recorded[f"{name}_ids"] = np.array(ids, np.int32)
        recorded[f"{name}_images"] = np.array(images, np.int32)
        recorded[f"{name}_logits"] = logits.numpy()
        recorded[f"{name}_greedy"] = made.sequences[0, len(ids) :].int().numpy()
    np.savez_compressed(FOLDER / "reference.npz", **recorded)


if __name__ == "__main__":
    main()
