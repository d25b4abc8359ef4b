"""The command `gemma-wgpu`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from tqdm import tqdm

import gemma_wgpu
from gemma_wgpu.apps.batch_file import Results, answers, read_requests
from gemma_wgpu.apps.conversation import Conversation
from gemma_wgpu.bench import tables
from gemma_wgpu.bench.evaluate import evaluate as evaluate_text
from gemma_wgpu.bench.peers import PEERS
from gemma_wgpu.bench.run import Load, Report, Shape, check_context, evict, model_hash, parse_depths
from gemma_wgpu.bench.run import bench as run_bench
from gemma_wgpu.engine import structured
from gemma_wgpu.engine.generation import Generation
from gemma_wgpu.engine.model import expected_bytes
from gemma_wgpu.engine.sampling import Sampling
from gemma_wgpu.errors import DeviceError, GemmaError, RequestError
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.gemma import ACTIVATIONS, PRECISIONS, checked_context_length
from gemma_wgpu.gpu.native import native_adapters
from gemma_wgpu.ops.kernels import usual_tuning
from gemma_wgpu.ops.tuning import chosen
from gemma_wgpu.weights.checkpoint import open_checkpoint
from gemma_wgpu.weights.convert import Quant
from gemma_wgpu.weights.convert import convert as write_folder
from gemma_wgpu.weights.summary import LayoutUse, summarize

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns this package's errors into one line on stderr and exit code 1, an interrupt into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GemmaError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            sys.exit(130)


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
        click.option(
            "--activations",
            type=click.Choice(ACTIVATIONS),
            default="float",
            help="Of prompts, where the weights are of 4 or 8 bits.",
            show_default=True,
        ),
        click.option("--context-length", type=int, help="Tokens of prompt and text together.  [default: 4096]"),
        click.option(
            "--model",
            default="demo",
            show_default=True,
            help="A .gguf file, a model folder, its URL, a Hugging Face id, or 'demo'.",
        ),
    ):
        command = option(command)
    return command


def _sampling_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--max-new-tokens", type=int, help="Stop after so many tokens.  [default: until the context is full]"
            ),
            click.option(
                "--temperature",
                type=float,
                default=1.0,
                show_default=True,
                help="0 takes the likeliest token always.",
            ),
            click.option(
                "--top-k", type=int, default=64, show_default=True, help="Draw from the k likeliest tokens; 0 is off."
            ),
            click.option(
                "--top-p",
                type=float,
                default=0.95,
                show_default=True,
                help="Draw from the likeliest that make up p; 1 is off.",
            ),
            click.option(
                "--min-p",
                type=float,
                default=0.0,
                show_default=True,
                help="Draw from those p times as likely as the likeliest.",
            ),
            click.option(
                "--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: fewer repetitions."
            ),
        )
    ):
        command = option(command)
    return command


_batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Texts that are generated at once; each takes memory for a cache.",
)
_seed_option = click.option("--seed", type=int, help="The same seed gives the same text.  [default: random]")


@main.command()
@click.argument("prompt")
@_model_options
@click.option("--chat", is_flag=True, help="Take the prompt as a message to an instruction-tuned model.")
@_sampling_options
@_seed_option
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. May be repeated.")
@click.option(
    "--json-schema",
    "schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The text is to be JSON that is valid by the schema in this file.",
)
@click.option("--regex", metavar="PATTERN", help="The text is to match this regular expression.")
@click.option("--choice", "choices", multiple=True, metavar="TEXT", help="The text is to be one of these. Repeated.")
@click.option("--quiet", "-q", is_flag=True, help="The text only: no progress bar, no figures.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print text, token ids and figures as a line of JSON at the end."
)
def generate(
    prompt: str,
    model: str,
    precision: str,
    activations: str,
    context_length: int | None,
    chat: bool,
    schema: Path | None,
    regex: str | None,
    choices: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT; "-" reads it from the standard input."""
    options["constraint"] = _constraint(schema, regex, choices)
    Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})  # what is amiss, before a long load
    if prompt == "-":
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        prompt = sys.stdin.read().removesuffix("\n")
    with _load(model, precision, activations, context_length, quiet=quiet) as gemma:
        generation = gemma.chat(prompt, **options) if chat else gemma.generate(prompt, **options)
        if not (chat or as_json):
            click.echo(prompt, nl=False)
        try:
            for piece in generation:
                if not as_json:
                    click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            generation.stats.finish_reason = "interrupted"
        if as_json:
            result = {"text": generation.text, "ids": generation.ids, "seed": generation.sampling.seed}
            click.echo(json.dumps(result | asdict(generation.stats), ensure_ascii=False))
        else:
            click.echo()
        if not (quiet or as_json):
            _report(gemma, generation)
    if generation.stats.finish_reason == "interrupted":
        sys.exit(130)


@main.command()
@_model_options
@click.option("--system", "-p", default="", metavar="TEXT", help="How the model is to behave.")
@click.option(
    "--file",
    "-f",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text to put in front of the first message. May be repeated.",
)
@_sampling_options
@_seed_option
def chat(
    model: str,
    precision: str,
    activations: str,
    context_length: int | None,
    system: str,
    files: tuple[Path, ...],
    **options: Any,
) -> None:
    """Talk with an instruction-tuned model; /help there lists the commands."""
    try:
        from gemma_wgpu.apps.terminal import Chat, Settings
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'gemma-wgpu[chat]'") from None
    settings = Settings(**options)
    with _load(model, precision, activations, context_length) as gemma:
        Chat(gemma, Conversation(system), settings, files).run()


@main.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@_model_options
@_sampling_options
@_batch_size_option
@click.option("--seed", default=0, show_default=True, help="Of the first line; each has one more than that above it.")
def batch(
    source: Path,
    out: Path,
    model: str,
    precision: str,
    activations: str,
    context_length: int | None,
    max_new_tokens: int | None,
    batch_size: int,
    seed: int,
    **options: Any,
) -> None:
    """Answer the requests of SOURCE, one a line, in OUT.

    A line of SOURCE is a JSON object: a "custom_id", which is its own, a "prompt" to continue or the "messages" of a
    chat, and options that Python's `generate` has, where they differ from those given here. Its line in OUT has the
    same "custom_id", and a "text" or an "error". The same command goes on with what was interrupted or killed.
    """
    Sampling(**options, seed=seed)
    requests = read_requests(source, {**options, "max_new_tokens": max_new_tokens}, seed)
    with _load(model, precision, activations, context_length) as gemma, Results(out) as results:
        waiting = results.missing(gemma, requests)
        with tqdm(
            desc=f"Writing {out}",
            total=len(requests),
            initial=len(requests) - len(waiting),
            unit=" results",
            leave=False,
            disable=None,
        ) as bar:
            for result in answers(gemma, waiting, batch_size):
                results.append(result)
                bar.update()
    click.secho(f"{len(requests)} results in {out}, {len(waiting)} of them new", err=True, dim=True)


@main.command()
@_model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is on all networks.")
@click.option("--port", default=8080, show_default=True, help="0 takes one that is free.")
@click.option("--api-key", envvar="GEMMA_WGPU_API_KEY", show_envvar=True, help="What clients must send.")
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="A web page's that may use it (CORS).")
@_batch_size_option
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Texts that may wait.")
@click.option("--name", help="What clients are to call the model.  [default: as the model does]")
def serve(
    model: str,
    precision: str,
    activations: str,
    context_length: int | None,
    host: str,
    port: int,
    api_key: str | None,
    origins: tuple[str, ...],
    batch_size: int,
    queue: int,
    name: str | None,
) -> None:
    """Serve a model to clients of OpenAI's API, and to a web page of its own."""
    try:
        from gemma_wgpu.apps.server import app
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'gemma-wgpu[server]'") from None
    with closing(app.bind(host, port)) as bound, _load(model, precision, activations, context_length) as gemma:
        bound.listen()  # before somebody reads where
        click.echo(f"{name or gemma.name} at {app.address(bound)} (Ctrl-C stops)")
        if not (app.is_local(bound) or api_key):
            click.secho("Whoever reaches this address may use it; --api-key asks for a key.", err=True, fg="yellow")
        app.serve(gemma, bound, name=name, api_key=api_key, origins=origins, batch_size=batch_size, waiting=queue)


def _constraint(schema: Path | None, regex: str | None, choices: tuple[str, ...]) -> structured.Constraint | None:
    if (schema is not None) + (regex is not None) + bool(choices) > 1:
        raise click.UsageError("--json-schema, --regex and --choice exclude each other")
    if schema is not None:
        try:
            return structured.json_schema(json.loads(schema.read_bytes()))
        except ValueError as error:
            raise RequestError(f"{schema}: {error}") from None
    if regex is not None:
        return structured.regex(regex)
    return structured.choice(choices) if choices else None


def _load(
    model: str, precision: str, activations: str, context_length: int | None, *, quiet: bool = False
) -> gemma_wgpu.Gemma:
    with _bytes_bar(f"Loading {model}", quiet=quiet) as bar:
        return gemma_wgpu.load(
            model,
            precision=precision,
            activations=activations,
            context_length=context_length,
            progress=_moving(bar),
        )


def _bytes_bar(title: str, *, quiet: bool = False) -> tqdm[Any]:
    """A progress bar in bytes, where the standard error is a terminal."""
    return tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=quiet or None)


def _moving(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """What moves `bar` when it is told what is done, and of how much."""

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return move


def _stepping(bar: tqdm[Any]) -> Callable[[str, int, int], None]:
    """What moves `bar` when it is told what begins, how much is done, and of how much."""

    def step(what: str, done: int, total: int) -> None:
        bar.set_description(what.capitalize(), refresh=False)
        _moving(bar)(done, total)

    return step


def _report(gemma: gemma_wgpu.Gemma, generation: Generation) -> None:
    stats = generation.stats
    click.secho(
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
        f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason}; seed {generation.sampling.seed}). "
        f"{gemma.name} {gemma.quantization}, {gemma.precision}, {sum(gemma.gpu_bytes.values()) / 1e6:,.0f} MB on "
        f"{gemma.device.info}",
        err=True,
        dim=True,
    )


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quant", type=click.Choice(get_args(Quant)), help="Of the matrices.  [default: int4; keep if quantised]"
)
@click.option("--embedding", type=click.Choice(["int8", "int4"]), help="Of the embedding.  [default: int8 with int4]")
@click.option("--shard-size", default="95MB", show_default=True, help="The largest file to write.")
@click.option("--force", is_flag=True, help="Replace OUT where it is a model folder already.")
def convert(source: str, out: Path, quant: Quant | None, embedding: Any, shard_size: str, force: bool) -> None:
    """Write the model SOURCE as the model folder OUT, quantised.

    A model folder holds the very bytes that the GPU reads, in files small enough for static hosting. SOURCE is
    whatever `generate` takes as --model.
    """
    with _bytes_bar(f"Converting {source}") as bar, open_checkpoint(find(source, _moving(bar))) as checkpoint:
        write_folder(
            checkpoint,
            out,
            quant=quant,
            embedding=embedding,
            shard_size=_parse_bytes(shard_size),
            force=force,
            progress=_moving(bar),
        )


@main.command()
@click.argument("model")
@click.option("--context-length", type=int, help="For the GPU memory that it would take.  [default: 4096]")
def inspect(model: str, context_length: int | None) -> None:
    """Show what the model MODEL is made of, and what it takes on this machine's GPU."""
    with _bytes_bar(f"Loading {model}") as bar, open_checkpoint(find(model, _moving(bar))) as checkpoint:
        summary = summarize(checkpoint)
    config = summary.config
    context_length = checked_context_length(context_length, config)
    local = sum(not config.is_global(layer) for layer in range(config.num_hidden_layers))
    _table(
        f"{summary.name}, {summary.quantization}",
        {
            "parameters": f"{summary.parameters:,}",
            "layers": f"{config.num_hidden_layers}, {local} of them with a window of {config.sliding_window}",
            "sizes": f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
            f"vocabulary {config.vocab_size:,}",
            "heads": f"{config.num_attention_heads} of {config.head_dim}, "
            f"{config.num_key_value_heads} for keys and values",
            "context": f"{config.max_position_embeddings:,} tokens",
            "embedding": _layout_use(summary.embedding),
            **{f"{use.tensors} matrices": _layout_use(use) for use in summary.matrices},
            "in the file": f"{summary.file_bytes:,} bytes",
            "on the GPU": f"{summary.nbytes:,} bytes, {summary.bits_per_weight:.2f} bits a weight "
            "outside the embedding",
        },
    )
    adapter = native_adapters()[0]
    rows: dict[str, str] = {}
    for precision in ("f16", "f32"):
        if precision == "f16" and "shader-f16" not in adapter.features:
            rows[precision] = "this GPU has no shader-f16"
            continue
        try:
            sizes = expected_bytes(adapter, config, half=precision == "f16", context_length=context_length)
        except DeviceError as error:
            rows[precision] = f"does not fit: {error}"
            continue
        parts = {"weights": summary.nbytes, **sizes}
        total = sum(parts.values())
        rows[precision] = f"{total:,} bytes: " + ", ".join(f"{name} {size:,}" for name, size in parts.items())
    _table(f"On {adapter.info} at a context of {context_length}", rows)


def _layout_use(use: LayoutUse) -> str:
    return f"{use.layout.name}, {use.bits_per_weight:.2f} bits a weight, {use.nbytes:,} bytes"


@main.command()
@click.argument("model")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="The text to predict."
)
@click.option("--against", help="Another model, to measure the distance from.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--against-precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--segment", type=int, default=512, show_default=True, help="Tokens that are predicted in one go.")
@click.option("--max-tokens", type=int, help="Only the beginning of the text.  [default: all]")
def evaluate(
    model: str,
    text: Path,
    against: str | None,
    precision: str,
    against_precision: str,
    segment: int,
    max_tokens: int | None,
) -> None:
    """Perplexity of MODEL on a text, and its distance from another model or precision on the same text."""
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise click.BadParameter(f"{text} is not UTF-8 text", param_hint="--text") from None
    with ExitStack() as stack:
        judged = stack.enter_context(_load(model, precision, "float", segment))
        other = stack.enter_context(_load(against, against_precision, "float", segment)) if against else None
        with tqdm(desc="Evaluating", unit=" tokens", leave=False, disable=None) as bar:
            result = evaluate_text(
                judged, content, against=other, segment=segment, max_tokens=max_tokens, progress=_moving(bar)
            )
        rows = {"tokens": f"{result.tokens:,}", "perplexity": f"{result.perplexity:.4f}"}
        if other:
            rows["divergence"] = f"{result.divergence:.3g} ± {result.divergence_error:.1g} nats a token"
            rows["same top token"] = f"{result.agreement:.2%}"
        _table(repr(judged) + (f" against {other!r}" if other else ""), rows)


@main.command()
@click.argument("model", default="demo")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    help="pp512 (prefill), tg128 (decode), pp512+tg128, or litert, which is pp1024+tg256. May be repeated.  "
    "[default: pp512 and tg128]",
)
@click.option("--prefill", type=int, default=0, help="A shape of your own: tokens of the prompt.")
@click.option("--decode", type=int, default=0, help="A shape of your own: tokens after it.")
@click.option("--depth", default="0", show_default=True, help="Tokens in the cache before: 0,1k,4k,16k.")
@click.option(
    "--repetitions", "-r", type=int, default=5, show_default=True, help="Runs of each, after one to warm up."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Of the output; json has every run.",
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="float", show_default=True)
@click.option("--peer", "peers", multiple=True, help=f"Measure another engine in turn: {', '.join(PEERS)}.")
@click.option("--peer-model", help="What it is to run.  [default: MODEL]")
@click.option("--threads", type=int, help="Of the CPU, for the peers.  [default: as they choose]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw speed over depth and length.")
def bench(
    model: str,
    shapes: tuple[str, ...],
    prefill: int,
    decode: int,
    depth: str,
    repetitions: int,
    form: str,
    precision: str,
    activations: str,
    peers: tuple[str, ...],
    peer_model: str | None,
    threads: int | None,
    plot: Path | None,
) -> None:
    """Measure how fast MODEL is, and where the time goes. benchmarks/README.md says how to read it."""
    chosen = [Shape.parse(shape) for shape in shapes] + ([Shape(prefill, decode)] if prefill or decode else [])
    chosen = chosen or [Shape.parse("pp512"), Shape.parse("tg128")]
    at = [replace(shape, depth=tokens) for tokens in parse_depths(depth) for shape in chosen]
    for peer in peers:
        if peer not in PEERS:
            raise RequestError(f"there is no peer {peer!r}; choose from {', '.join(PEERS)}")
    if plot:
        tables.pyplot()
    with _bytes_bar(f"Loading {model}") as bar:
        path = find(model, _moving(bar))
        peer_path = find(peer_model, _moving(bar)) if peer_model else path
    with open_checkpoint(path) as checkpoint:
        files, config = checkpoint.files, checkpoint.config
    check_context(at, config.max_position_embeddings)
    longest = max(shape.context for shape in at)
    context = max(longest, checked_context_length(None, config))
    evict(files)
    seconds = []
    for last in (False, True):
        started = time.perf_counter()
        gemma = gemma_wgpu.load(path, precision=precision, activations=activations, context_length=context)
        seconds.append(time.perf_counter() - started)
        if not last:
            gemma.close()
    with gemma, ExitStack() as stack:
        engines = [stack.enter_context(closing(PEERS[peer](peer_path, longest + 1, threads))) for peer in peers]
        with tqdm(unit=" steps", leave=False, disable=None) as bar:
            report = gemma.device.wait(
                run_bench(gemma, at, repetitions=repetitions, peers=engines, progress=_stepping(bar))
            )
    report = replace(report, load=Load(seconds[0], seconds[1]), sha256=model_hash(files))
    click.echo(_FORMATS[form](report), nl=False)
    if plot:
        tables.plot(report, plot)


_FORMATS: dict[str, Callable[[Report], str]] = {"md": tables.markdown, "csv": tables.to_csv, "json": Report.to_json}


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise click.BadParameter(f"{text!r} is not a size such as 95MB or 100MiB", param_hint="--shard-size")
    return int(float(match[1]) * _UNITS[match[2]])


def _table(title: str, rows: dict[str, str]) -> None:
    click.secho(title, bold=True)
    for name, value in rows.items():
        click.echo(f"   {name:<16} {value or '-'}")


@main.command()
def devices() -> None:
    """Show the GPUs of this machine; the first one is used."""
    for number, adapter in enumerate(native_adapters()):
        info, limits = adapter.info, adapter.limits
        tuning, usual = chosen(adapter), usual_tuning(info, adapter.features)
        rows = {
            "type": info.type,
            "vendor": info.vendor,
            "features": ", ".join(sorted(adapter.features)) or "none that matter here",
            "precision": "f16 and f32" if "shader-f16" in adapter.features else "f32 (no shader-f16)",
            "tuning": f"{tuning}" if tuning else f"{usual}, until it is measured when a model is first loaded",
            "largest buffer": f"{limits.max_buffer_size:,} bytes",
            "largest binding": f"{limits.max_storage_buffer_binding_size:,} bytes",
            "workgroup": f"{limits.max_compute_invocations_per_workgroup} threads, "
            f"{limits.max_compute_workgroup_storage_size:,} bytes",
        }
        _table(f"{number}: {info}", rows)
