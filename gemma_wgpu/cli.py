"""The command `gemma-wgpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from tqdm import tqdm

import gemma_wgpu
from gemma_wgpu.errors import GemmaError
from gemma_wgpu.gemma import PRECISIONS
from gemma_wgpu.generate import Generation
from gemma_wgpu.kernels import lanes

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns this package's errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GemmaError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-wgpu")
def main() -> None:
    """Run Gemma 3 on any GPU."""


def _model_options(command: F) -> F:
    for option in (
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="auto",
            help="Precision of the arithmetic.",
            show_default=True,
        ),
        click.option("--context-length", type=int, help="Tokens of prompt and text together.  [default: 4096]"),
        click.option(
            "--model",
            default="demo",
            show_default=True,
            help="A .gguf file, a Hugging Face model folder or id, or 'demo'.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("prompt")
@_model_options
@click.option("--chat", is_flag=True, help="Take the prompt as a message to an instruction-tuned model.")
@click.option("--max-new-tokens", type=int, help="Stop after so many tokens.  [default: until the context is full]")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest token always.")
@click.option("--top-k", type=int, default=64, show_default=True, help="Draw from the k likeliest tokens; 0 is off.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Draw from the likeliest that make up p; 1 is off."
)
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Draw from those p times as likely as the likeliest."
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: fewer repetitions.")
@click.option("--seed", type=int, help="The same seed gives the same text.  [default: random]")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. May be repeated.")
@click.option("--quiet", "-q", is_flag=True, help="The text only: no progress bar, no figures.")
def generate(
    prompt: str, model: str, precision: str, context_length: int | None, chat: bool, quiet: bool, **options: Any
) -> None:
    """Continue PROMPT; "-" reads it from the standard input."""
    if prompt == "-":
        prompt = sys.stdin.read()
    with _load(model, precision, context_length, quiet) as gemma:
        generation = gemma.chat(prompt, **options) if chat else gemma.generate(prompt, **options)
        if not chat:
            click.echo(prompt, nl=False)
        try:
            for piece in generation:
                click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            pass
        click.echo()
        if not quiet:
            _report(gemma, generation)
    if generation.stats.finish_reason == "interrupted":
        sys.exit(130)


def _load(model: str, precision: str, context_length: int | None, quiet: bool) -> gemma_wgpu.Gemma:
    with tqdm(
        desc=f"Loading {model}", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=quiet or None
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return gemma_wgpu.load(model, precision=precision, context_length=context_length, progress=progress)


def _report(gemma: gemma_wgpu.Gemma, generation: Generation) -> None:
    stats = generation.stats
    click.secho(
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
        f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason}; seed {generation.sampling.seed}). "
        f"{gemma.name} {gemma.quantization}, {gemma.precision}, {gemma.device.info}",
        err=True,
        dim=True,
    )


@main.command()
def devices() -> None:
    """Show the GPUs of this machine; the first one is used."""
    from gemma_wgpu.gpu.native import native_adapters

    for number, adapter in enumerate(native_adapters()):
        info, limits = adapter.info, adapter.limits
        click.secho(f"{number}: {info}", bold=True)
        rows = {
            "type": info.type,
            "vendor": info.vendor,
            "features": ", ".join(sorted(adapter.features)) or "none that matter here",
            "precision": "f16" if "shader-f16" in adapter.features else "f32 (no shader-f16)",
            "matrix kernels": f"threads a row: {lanes(info)}",
            "largest buffer": f"{limits.max_buffer_size:,} bytes",
            "largest binding": f"{limits.max_storage_buffer_binding_size:,} bytes",
            "workgroup": f"{limits.max_compute_invocations_per_workgroup} threads, "
            f"{limits.max_compute_workgroup_storage_size:,} bytes",
        }
        for name, value in rows.items():
            click.echo(f"   {name:<16} {value or '-'}")
