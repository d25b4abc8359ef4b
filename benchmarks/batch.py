"""How much faster texts are generated side by side than one after the other.

python -m benchmarks.batch demo --size 8 --tokens 64

Both ways alternate, greedily, on the same prompts of different lengths, and their tokens must be equal. The figures
are decoded tokens per second. One after the other, the tokens after the first of each text count. Side by side, the
tokens count that come while all texts are under way.
"""

import time
from statistics import median

import click

import gemma_wgpu
from gemma_wgpu import Gemma
from gemma_wgpu.bench.run import prompt_ids


def alone(gemma: Gemma, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """Generate texts one after the other; return their token ids, and the decoded tokens per second."""
    ids, seconds = [], 0.0
    for prompt in prompts:
        generation = gemma.generate(prompt, max_new_tokens=tokens, temperature=0)
        generation.result()
        ids.append(generation.ids)
        seconds += generation.stats.decode_seconds
    return ids, sum(len(each) - 1 for each in ids) / seconds


def together(gemma: Gemma, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """Generate texts side by side; return their token ids, and the decoded tokens per second."""
    generations = gemma.generate(prompts, max_new_tokens=tokens, temperature=0, batch_size=len(prompts))
    times: list[list[float]] = [[] for _ in prompts]
    for index, piece in generations:
        if piece.ids:
            times[index].append(time.perf_counter())
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    return generations.ids, sum(begin < at <= end for each in times for at in each) / (end - begin)


@click.command()
@click.argument("model")
@click.option("--size", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--repetitions", "-r", default=3, show_default=True)
def main(model: str, size: int, tokens: int, repetitions: int) -> None:
    """Compare texts side by side with texts one after the other."""
    with gemma_wgpu.load(model, precision="f32") as gemma:
        prompts = [prompt_ids(gemma.tokenizer, 3 + 5 * index) for index in range(size)]
        together(gemma, prompts, 3), alone(gemma, prompts[:1], 3)  # to warm up
        runs = []
        for _ in range(repetitions):
            (ids, one), (same, many) = alone(gemma, prompts, tokens), together(gemma, prompts, tokens)
            if ids != same:
                raise click.ClickException("the tokens of both ways differ; one of them is wrong")
            runs.append((one, many))
            click.echo(f"one after the other {one:.1f} tok/s, {size} side by side {many:.1f}: {many / one:.2f}")
        click.echo(f"median ratio {median(many / one for one, many in runs):.2f} on {gemma.device.info}")


if __name__ == "__main__":
    main()
