"""Continue prompts on many machines with Ray Data: each actor of a pool has a GPU, and a model on it.

    pip install 'gemma-wgpu[ray]'
    python examples/ray_batch.py prompts.jsonl answers --model gemma-3-1b-it-q4_0.gguf --actors 8 --gpus 1

Each line of prompts.jsonl has a "prompt". The lines that are written to the folder `answers` also have a "text" and a
"finish_reason". Every machine must find the model's file under the same path. Ray counts the GPUs of NVIDIA and AMD
by itself. For GPUs of others, say `--gpus 0`, and `--actors` with the number of your GPUs. An actor takes the first
GPU that it sees. So if a machine has several GPUs, start several containers on it, and give each of them one GPU.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import ray

import gemma_wgpu


class Writer:
    """An actor, which loads the model once. It continues the prompts of a block side by side, block after block."""

    def __init__(self, model: str, max_new_tokens: int, batch_size: int) -> None:
        self._gemma = gemma_wgpu.load(model)
        self._options = gemma_wgpu.Options(max_new_tokens=max_new_tokens, temperature=0)
        self._batch_size = batch_size

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        prompts = [str(prompt) for prompt in block["prompt"]]
        generations = self._gemma.generate(prompts, options=self._options, batch_size=self._batch_size)
        texts = generations.result()
        reasons = [stats.finish_reason for stats in generations.stats]
        return block | {"text": np.array(texts, object), "finish_reason": np.array(reasons, object)}


@click.command()
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.option("--model", default="demo", show_default=True, help="Load this model.")
@click.option("--actors", default=2, show_default=True, help="Load the model so many times on all machines together.")
@click.option(
    "--gpus", default=1.0, show_default=True, help="Let each actor have so many of the GPUs that Ray counts."
)
@click.option("--max-new-tokens", default=256, show_default=True, help="Stop each text after so many tokens.")
@click.option("--batch-size", default=8, show_default=True, help="Let each actor generate so many texts at once.")
def main(
    prompts: Path, answers: Path, model: str, actors: int, gpus: float, max_new_tokens: int, batch_size: int
) -> None:
    """Continue the prompts of the JSON Lines file PROMPTS on all machines of the Ray cluster, and write ANSWERS."""
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
