"""Records what transformers makes of the random checkpoints of families.py, in float32.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_families

Writes families.npz next to this file: for each family `<name>_logits` float32 (100, 512) of the ids of families.py,
and `<name>_greedy`, the 8 likeliest ids that follow, one after the other; and `slice_logits`, the logits of what is
sliced out of the Gemma 3n.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Gemma4ForCausalLM

from tests.reference.families import CONFIGS, IDS, WIDTH, WITHOUT, write

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
    recorded["slice_logits"] = _sliced()(ids, use_cache=False).logits[0].numpy()
    np.savez_compressed(Path(__file__).with_name("families.npz"), **recorded)


def _sliced() -> Gemma3nForCausalLM:
    """The Gemma 3n without the layers WITHOUT, and with feed-forward networks of WIDTH."""
    config = CONFIGS["gemma3n"]
    with tempfile.TemporaryDirectory() as folder:
        whole = load_file(write(Path(folder), "gemma3n") / "model.safetensors")
    layers = [layer for layer in range(config["num_hidden_layers"]) if layer not in WITHOUT]
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    smaller = config | {
        "num_hidden_layers": len(layers),
        "layer_types": [config["layer_types"][layer] for layer in layers],
        "intermediate_size": [WIDTH] * len(layers),
        "num_kv_shared_layers": sum(layer >= own for layer in layers),
        "activation_sparsity_pattern": [config["activation_sparsity_pattern"][layer] for layer in layers],
    }
    weights = {name: tensor.float() for name, tensor in whole.items() if ".layers." not in name}
    size = config["hidden_size_per_layer_input"]
    table, projection = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"
    weights[table] = weights[table].unflatten(1, (-1, size))[:, layers].flatten(1)
    weights[projection] = weights[projection].unflatten(0, (-1, size))[layers].flatten(0, 1)
    for name, tensor in whole.items():
        if ".layers." in name:
            before, _, rest = name.partition(".layers.")
            layer, _, part = rest.partition(".")
            if int(layer) in layers:
                cut = tensor[:, :WIDTH] if "down_proj" in part else tensor
                cut = cut[:WIDTH] if "gate_proj" in part or "up_proj" in part else cut
                weights[f"{before}.layers.{layers.index(int(layer))}.{part}"] = cut.float()
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**smaller, attn_implementation="eager")).eval()
    loaded = model.load_state_dict(weights, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"], loaded
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
