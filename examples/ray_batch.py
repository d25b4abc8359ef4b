"""Prompts over many machines with Ray Data: a pool of actors, each with a GPU and a model on it.

    pip install 'gemma-wgpu[ray]'
    python examples/ray_batch.py prompts.jsonl answers --model gemma-3-1b-it-q4_0.gguf --actors 8 --gpus 1

Each line of prompts.jsonl has a "prompt"; the lines that are written to the folder `answers` have a "text" and a
"finish_reason" beside it. The model's file must be where each machine finds it. Ray counts the GPUs of NVIDIA and AMD
by itself; for others `--gpus 0` leaves it to you to have as many actors as GPUs. An actor takes the first GPU that it
sees, so a machine with several is best given to Ray as several containers of one.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import ray

import gemma_wgpu


class Writer:
    """An actor: it loads the model once, and continues the prompts of one block after the other, side by side."""

    def __init__(self, model: str, max_new_tokens: int, batch_size: int) -> None:
        self._gemma = gemma_wgpu.load(model)
        self._options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": 0}

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        generations = self._gemma.generate([str(prompt) for prompt in block["prompt"]], **self._options)
        texts = generations.result()
        reasons = [stats.finish_reason for stats in generations.stats]
        return block | {"text": np.array(texts, object), "finish_reason": np.array(reasons, object)}


@click.command()
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.option("--model", default="demo", show_default=True)
@click.option("--actors", default=2, show_default=True, help="How many have the model, all machines together.")
@click.option("--gpus", default=1.0, show_default=True, help="GPUs of Ray's that each takes.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--batch-size", default=8, show_default=True, help="Texts that an actor computes side by side.")
def main(
    prompts: Path, answers: Path, model: str, actors: int, gpus: float, max_new_tokens: int, batch_size: int
) -> None:
    """Continue the prompts of a JSON Lines file, on all machines of the Ray cluster."""
    data = ray.data.read_json(str(prompts.absolute()), lines=True)
    data.map_batches(
        Writer,
        fn_constructor_args=(model, max_new_tokens, batch_size),
        batch_size=4 * batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
    ).write_json(str(answers.absolute()))


if __name__ == "__main__":
    main()
