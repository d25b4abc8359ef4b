"""Write site/bench/references.json: the greedy tokens that were recorded, for the benchmark page to compare with."""

import json

import numpy as np

from gemma_wgpu.fetch.hub import DEMO_SHA256
from tests.reference.golden import F16_GREEDY, FOLDER

PATH = FOLDER.parents[1] / "site" / "bench" / "references.json"


def content() -> str:
    """By the SHA-256 of the model. As many tokens as rounding to float16 leaves alone."""
    recorded = np.load(FOLDER / "gemma3_270m_q4_k_m.npz")
    names = [name.removesuffix("_greedy") for name in recorded.files if name.endswith("_greedy")]
    prompts = [
        {"ids": recorded[f"{name}_ids"].tolist(), "tokens": recorded[f"{name}_greedy"][:F16_GREEDY].tolist()}
        for name in names
    ]
    found = {DEMO_SHA256: {"source": "transformers 5.23 in float32", "prompts": prompts}}
    return json.dumps(found) + "\n"


if __name__ == "__main__":
    PATH.write_text(content(), encoding="utf-8")
