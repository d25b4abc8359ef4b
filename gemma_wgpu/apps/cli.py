"""The command `gemma-wgpu`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click
from tqdm import tqdm

import gemma_wgpu
from gemma_wgpu import pictures
from gemma_wgpu.apps.batch_file import STANDARD, answers, open_results, read_lines
from gemma_wgpu.apps.conversation import Conversation, spoken
from gemma_wgpu.bench import tables
from gemma_wgpu.bench.evaluate import evaluate as evaluate_text
from gemma_wgpu.bench.peers import PEERS
from gemma_wgpu.bench.run import Load, Report, Shape, check_context, evict, model_hash, parse_depths
from gemma_wgpu.bench.run import bench as run_bench
from gemma_wgpu.engine import structured
from gemma_wgpu.engine.generation import Generation
from gemma_wgpu.engine.thoughts import THINKING
from gemma_wgpu.errors import DeviceError, GemmaError, RequestError
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.files import is_full, reason
from gemma_wgpu.gemma import (
    ACTIVATIONS,
    MOST_SIDE_BY_SIDE,
    PRECISIONS,
    TABLE_PLACES,
    checked_context_length,
    expected_bytes,
    keeps_table,
)
from gemma_wgpu.gpu.native import native_adapters
from gemma_wgpu.models.keys import listed
from gemma_wgpu.models.spec import MatFormerSlice
from gemma_wgpu.ops.tuner import chosen
from gemma_wgpu.ops.tuning import usual_tuning
from gemma_wgpu.options import RANGES, Constraint, Options
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.convert import Quant, TowerQuant
from gemma_wgpu.weights.convert import convert as write_folder
from gemma_wgpu.weights.matformer import SlicedCheckpoint
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.summary import LayoutUse, TowerUse, summarize

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Ends a command that fails by one line on the standard error and exit status 1.

    This is so for the errors of this package and for a standard output that cannot be written. An interrupt ends it
    with exit status 130, and a pipe that was closed with 1; both are quiet.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command, and leave Python."""
        if sys.stdin is None:  # it was closed before
            sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
        try:
            return super().main(*args, **options)
        except OSError as error:
            if not _is_of_output(error):
                raise
            _drop_output()
            click.ClickException(f"the standard output cannot be written: {reason(error)}").show()
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run what was asked for."""
        try:
            return super().invoke(ctx)
        except GemmaError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            sys.exit(130)


def _is_of_output(error: OSError) -> bool:
    """Say whether an error is the standard output's: what it holds cannot be written now either."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return error.filename is None and is_full(error)  # without a buffer, the output holds nothing


def _drop_output() -> None:
    """Write what the standard output still holds to nowhere, so that Python does not fail by it at its end."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-wgpu")
def main() -> None:
    """Run Gemma 3 on any GPU."""


_precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="Compute in this precision."
)
_activations_option = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="float",
    show_default=True,
    help="Compute prompts in this form if the weights have 4 or 8 bits.",
)


_table_option = click.option(
    "--per-layer-table",
    type=click.Choice(TABLE_PLACES),
    default="auto",
    show_default=True,
    help="Hold the table of a Gemma 3n or Gemma 4 that has its layers' own inputs here.",
)


def _vision_options(command: F) -> F:
    """Add the options that say which tower a model has."""
    for option in (
        click.option("--no-vision", is_flag=True, help="Leave the tower that reads images out."),
        click.option(
            "--mmproj",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Read the tower of a .gguf file from this file.  [default: an mmproj file beside the model]",
        ),
    ):
        command = option(command)
    return command


def _vision(mmproj: Path | None, no_vision: bool) -> bool | Path:
    """Return what `gemma_wgpu.load` calls `vision`."""
    if mmproj and no_vision:
        raise click.UsageError("--mmproj and --no-vision exclude each other")
    return mmproj or not no_vision


_pan_option = click.option(
    "--pan-and-scan", is_flag=True, help="Let the model also see crops of long images, for more tokens."
)


_thinking_option = click.option(
    "--thinking",
    type=click.Choice(THINKING),
    default="off",
    show_default=True,
    help="Let a Gemma 4 think before it answers a chat, and show or hide what it thinks.",
)


@dataclass(frozen=True)
class _Model:
    """The model that a command is for, and how it is loaded."""

    name: str
    precision: str
    activations: str
    context_length: int | None
    vision: bool | Path
    per_layer_table: str

    def load(self, *, quiet: bool = False) -> gemma_wgpu.Gemma:
        """Load it onto the GPU, with a progress bar unless it is to be quiet."""
        return _load(
            self.name,
            self.precision,
            self.activations,
            self.context_length,
            vision=self.vision,
            per_layer_table=self.per_layer_table,
            quiet=quiet,
        )


_MODEL_OPTIONS = (
    _precision_option,
    _activations_option,
    click.option(
        "--context-length",
        type=int,
        help="Let prompt and text have so many tokens together.  [default: 4096, or less if the model has less]",
    ),
    _vision_options,
    _table_option,
    click.option(
        "--model",
        default="demo",
        show_default=True,
        help="A .gguf file, a model folder, its URL, a Hugging Face id, or 'demo'.",
    ),
)


def _model_options(command: F) -> F:
    """Add the options that say which model is loaded, and how; they are the command's `model`, a _Model."""

    @wraps(command)
    def with_model(
        *,
        model: str,
        precision: str,
        activations: str,
        context_length: int | None,
        mmproj: Path | None,
        no_vision: bool,
        per_layer_table: str,
        **others: Any,
    ) -> Any:
        vision = _vision(mmproj, no_vision)
        loaded = _Model(model, precision, activations, context_length, vision, per_layer_table)
        return command(model=loaded, **others)

    added: Any = with_model
    for option in _MODEL_OPTIONS:
        added = option(added)
    return cast("F", added)


_UNSET = {"max_new_tokens": "the text may fill the context", "seed": "random"}


def _sampling_options(*without: str) -> Callable[[F], F]:
    """Add an option for each number in Options, but for those that are named."""
    defaults = {field.name: field.default for field in fields(Options)}

    def add(command: F) -> F:
        for name, range_ in reversed(RANGES.items()):
            if name not in without:
                command = click.option(
                    f"--{name.replace('_', '-')}",
                    type=int if range_.whole else float,
                    default=defaults[name],
                    show_default=_UNSET.get(name, True),
                    help=range_.help,
                )(command)
        return command

    return add


_batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(1, MOST_SIDE_BY_SIDE),
    default=8,
    show_default=True,
    help="Generate so many texts at once; each takes memory for a cache.",
)


@main.command()
@click.argument("prompt")
@_model_options
@click.option("--chat", is_flag=True, help="Send the prompt as a message to an instruction-tuned model.")
@_thinking_option
@click.option(
    "--image",
    "-f",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show this image where <start_of_image> stands in the prompt, or in front of it. This may be repeated.",
)
@_pan_option
@_sampling_options()
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. This may be repeated.")
@click.option(
    "--json-schema",
    "schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Generate JSON that is valid by the schema in this file.",
)
@click.option("--regex", metavar="PATTERN", help="Generate a text that matches this regular expression.")
@click.option(
    "--choice", "choices", multiple=True, metavar="TEXT", help="Generate this text or another --choice. Repeat it."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the text only: no progress bar, no figures.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print text, token ids and figures as a line of JSON at the end."
)
def generate(
    prompt: str,
    model: _Model,
    chat: bool,
    thinking: str,
    images: tuple[Path, ...],
    pan_and_scan: bool,
    schema: Path | None,
    regex: str | None,
    choices: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue PROMPT. If PROMPT is "-", read it from the standard input."""
    options = Options(**given, constraint=_constraint(schema, regex, choices))  # it raises before a long load
    if thinking != "off" and not chat:
        raise click.UsageError("--thinking is for chats; add --chat")
    if prompt == STANDARD:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        prompt = sys.stdin.read().removesuffix("\n")
    shown = [pictures.opened(path) for path in images]
    message = _message(prompt, shown) if chat else []
    with model.load(quiet=quiet) as gemma, ExitStack() as reading:
        progress = reading.enter_context(_bar(quiet=quiet or not images))
        seen: dict[str, Any] = {"pan_and_scan": pan_and_scan, "progress": progress, "options": options}
        if chat:
            generation = gemma.chat(message, thinking=thinking, **seen)
        else:
            if images and _IMAGE not in prompt:
                prompt = _IMAGE * len(images) + prompt
            generation = gemma.generate(prompt, images=shown, **seen)
        begun = False

        def begin() -> None:
            nonlocal begun
            reading.close()  # the bar makes room for the text
            if not (chat or as_json or begun):
                click.echo(prompt, nl=False)
            begun = True

        if not images:
            begin()
        try:
            for text, is_thought in spoken(generation):
                begin()
                if not as_json:
                    click.echo(click.style(text, dim=True) if is_thought and text else text, nl=False)
        except KeyboardInterrupt:
            generation.stats.finish_reason = "interrupted"
        begin()
        if as_json:
            result = {"text": generation.answer, "ids": generation.ids, "seed": generation.seed}
            if thinking == "show":
                result["thought"] = generation.thought
            click.echo(json.dumps(result | asdict(generation.stats), ensure_ascii=False))
        else:
            click.echo()
        if not (quiet or as_json):
            _report(gemma, generation)
    if generation.stats.finish_reason == "interrupted":
        sys.exit(130)


_IMAGE = "<start_of_image>"


def _message(text: str, images: Sequence[object]) -> list[dict[str, object]]:
    """Return a chat of one message, with each PIL image where one stands in the text, or else all in front of it.

    Raises RequestError if the text has another number of them.
    """
    texts = text.split(_IMAGE) if images and _IMAGE in text else [*[""] * len(images), text]
    if len(texts) - 1 != len(images):
        raise RequestError(
            f"the number of {_IMAGE} in the prompt is {len(texts) - 1}, but that of its images is {len(images)}; "
            "write one for each image, or none"
        )
    parts: list[dict[str, object]] = [{"type": "text", "text": texts[0]}]
    for image, following in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": following}]
    return [{"role": "user", "content": parts}]


@main.command()
@_model_options
@click.option("--system", "-p", default="", metavar="TEXT", help="Say how the model is to behave.")
@click.option(
    "--file",
    "--image",
    "-f",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put this file, a text or an image, in front of the first message. This may be repeated.",
)
@_thinking_option
@_pan_option
@_sampling_options()
def chat(
    model: _Model,
    system: str,
    files: tuple[Path, ...],
    thinking: str,
    pan_and_scan: bool,
    **given: Any,
) -> None:
    """Talk with an instruction-tuned model. In the chat, /help lists its commands."""
    try:
        from gemma_wgpu.apps.terminal import Chat
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'gemma-wgpu[chat]'") from None
    options = Options(**given)
    with model.load() as gemma:
        Chat(gemma, Conversation(system), options, files, thinking=thinking, pan_and_scan=pan_and_scan).run()


@main.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("out", type=click.Path(dir_okay=False, allow_dash=True))
@_model_options
@_thinking_option
@_pan_option
@_sampling_options("seed")
@_batch_size_option
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="The first line has this seed, and each other line one more than the line above it.",
)
def batch(
    source: str,
    out: str,
    model: _Model,
    thinking: str,
    pan_and_scan: bool,
    batch_size: int,
    seed: int,
    **given: Any,
) -> None:
    """Answer the requests of SOURCE, one a line, in OUT.

    A line of SOURCE is a JSON object. It has a "custom_id", which no other line has, a "prompt" to continue or the
    "messages" of a chat, and any options that Python's `generate` has, if they differ from those given here. Its line
    in OUT has the same "custom_id", and a "text" or an "error". What the model thought before the answer to a chat is
    beside it, as "thought", if "thinking" is "show".

    A message may have images, as in Python: {"type": "image", "path": "cat.png"} is a part of its content. Its path
    begins in the folder in which the command runs.

    If the command was interrupted or killed, the same command goes on with the lines that are missing in OUT. If
    SOURCE is "-", it is the standard input. If OUT is "-", the results go to the standard output, and the next run
    begins anew. The exit status is 1 if any line of OUT has an error.
    """
    Options(**given, seed=seed)  # it raises before a long load
    given |= {"pan_and_scan": True} if pan_and_scan else {}
    given |= {"thinking": thinking} if thinking != "off" else {}
    lines = read_lines(source, given, seed)
    with open_results(out) as results, model.load() as gemma:
        missing = results.missing(gemma, lines)
        with tqdm(
            desc=f"Writing {out}",
            total=len(lines),
            initial=len(lines) - len(missing),
            unit=" results",
            leave=False,
            disable=True if out == STANDARD else None,
        ) as bar:
            for result in answers(gemma, missing, batch_size):
                results.append(result)
                bar.update()
    place = "the standard output" if out == STANDARD else out
    failed = f", {results.failed} of them errors" if results.failed else ""
    click.secho(f"{len(lines)} results in {place}, {len(missing)} of them new{failed}", err=True, dim=True)
    if results.failed:
        sys.exit(1)


@main.command()
@_model_options
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Listen at this address; 0.0.0.0 is all networks."
)
@click.option("--port", default=8080, show_default=True, help="Listen at this port; 0 is one that is free.")
@click.option("--api-key", envvar="GEMMA_WGPU_API_KEY", show_envvar=True, help="Refuse clients without this key.")
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="URL", help="Let web pages from there use it, too (CORS)."
)
@_batch_size_option
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Let so many texts wait.")
@click.option(
    "--allow-remote-images",
    "remote_images",
    is_flag=True,
    help="Fetch the images that clients name by web addresses.",
)
@_pan_option
@click.option("--name", help="Let clients call the model by this name.  [default: the model's own]")
def serve(
    model: _Model,
    host: str,
    port: int,
    api_key: str | None,
    origins: tuple[str, ...],
    batch_size: int,
    queue: int,
    remote_images: bool,
    pan_and_scan: bool,
    name: str | None,
) -> None:
    """Serve a model to clients of OpenAI's API, and to a web page of its own.

    Ctrl-C ends it at once, with exit status 0. Clients whose texts are under way are told that the server stopped.
    """
    try:
        from gemma_wgpu.apps.server import app
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'gemma-wgpu[server]'") from None
    with closing(app.bind(host, port)) as bound, model.load() as gemma:
        app.listen(bound)  # before anybody reads where
        click.echo(f"{name or gemma.name} at {app.address(bound)} (Ctrl-C stops)")
        if not (app.is_local(bound) or api_key):
            click.secho(
                "Anybody who reaches this address may use it; --api-key asks for a key.", err=True, fg="yellow"
            )
        app.serve(
            gemma,
            bound,
            name=name,
            api_key=api_key,
            origins=origins,
            remote_images=remote_images,
            pan_and_scan=pan_and_scan,
            batch_size=batch_size,
            waiting=queue,
        )


def _constraint(schema: Path | None, regex: str | None, choices: tuple[str, ...]) -> Constraint | None:
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
    model: str,
    precision: str,
    activations: str,
    context_length: int | None,
    *,
    vision: bool | Path = False,
    per_layer_table: str = "auto",
    quiet: bool = False,
) -> gemma_wgpu.Gemma:
    with _bar(model, quiet=quiet) as progress:
        return gemma_wgpu.load(
            model,
            precision=precision,
            activations=activations,
            context_length=context_length,
            vision=vision,
            per_layer_table=per_layer_table,
            progress=progress,
        )


@contextmanager
def _bar(subject: str = "", *, quiet: bool = False) -> Iterator[OnProgress]:
    """Yield a function that shows Progress as a bar, if the standard error is a terminal.

    The bar says what is done to `subject`.
    """
    with tqdm(leave=False, delay=0.1, disable=quiet or None) as bar:

        def show(progress: Progress) -> None:
            is_bytes = progress.unit == "bytes"
            bar.unit, bar.unit_scale, bar.unit_divisor = (
                ("B", True, 1024) if is_bytes else (f" {progress.unit}", False, 1000)
            )
            what = progress.what[:1].upper() + progress.what[1:]
            bar.set_description(f"{what} {subject}".strip(), refresh=False)
            bar.total = progress.total or None
            bar.update(progress.done - bar.n)

        yield show


def _report(gemma: gemma_wgpu.Gemma, generation: Generation) -> None:
    stats = generation.stats
    click.secho(
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
        f"{stats.decode_tokens_per_second:.1f} a second ({stats.finish_reason}; seed {generation.seed}). "
        f"{gemma.name} {gemma.quantization}, {gemma.precision}, {sum(gemma.gpu_bytes.values()) / 1e6:,.0f} MB on "
        f"{gemma.device.info}",
        err=True,
        dim=True,
    )


def _sliced(checkpoint: Checkpoint, without_layers: str | None, width: str | None) -> Checkpoint:
    """Return what is to be converted of a model."""
    if without_layers is None and width is None:
        return checkpoint
    skipped = _whole_numbers("--without-layers", without_layers or "")
    sizes = None if width is None else _whole_numbers("--width", width)
    return SlicedCheckpoint(checkpoint, MatFormerSlice(skipped, sizes))


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "3,20-24"."""
    numbers: list[int] = []
    for item in filter(None, text.split(",")):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RequestError(f"{option} is {text!r}; give whole numbers, as in 3,20-24")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    type=click.Choice(get_args(Quant)),
    help="Write the matrices in this form.  [default: int4, or keep if they are quantised]",
)
@click.option(
    "--embedding",
    type=click.Choice(["int8", "int4"]),
    help="Write the embedding in this form.  [default: int8 if the matrices are int4, else the same as they]",
)
@click.option(
    "--tower",
    type=click.Choice(get_args(TowerQuant)),
    help="Write the tower that reads images in this form.  [default: int8, or as the matrices if those are f16 or "
    "kept]",
)
@click.option("--without-layers", metavar="N,N-N", help="Leave these layers (from 0) of a Gemma 3n out.")
@click.option(
    "--width",
    metavar="N,N",
    help="Cut the feed-forward networks of a Gemma 3n to this width, or to one for each layer that is left. An E4B "
    "becomes an E2B by --without-layers 20-24 --width 8192.",
)
@_vision_options
@click.option("--shard-size", default="95MB", show_default=True, help="Write no file that is larger.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a model folder with nothing else in it.")
def convert(
    source: str,
    out: Path,
    quant: Quant | None,
    embedding: Any,
    tower: TowerQuant | None,
    without_layers: str | None,
    width: str | None,
    mmproj: Path | None,
    no_vision: bool,
    shard_size: str,
    force: bool,
) -> None:
    """Write the model SOURCE as the model folder OUT, quantised.

    A model folder holds the very bytes that the GPU reads, in files small enough for static hosting. SOURCE can be
    all that --model of `generate` can be.
    """
    vision = _vision(mmproj, no_vision)
    with (
        _bar(source) as progress,
        open_checkpoint(find(source, progress, vision=vision), vision=vision) as checkpoint,
    ):
        write_folder(
            _sliced(checkpoint, without_layers, width),
            out,
            quant=quant,
            embedding=embedding,
            tower=tower,
            shard_size=_parse_bytes(shard_size),
            force=force,
            progress=progress,
        )


@main.command()
@click.argument("model")
@click.option("--context-length", type=int, help="Show the GPU memory for this context.  [default: 4096]")
@_table_option
def inspect(model: str, context_length: int | None, per_layer_table: str) -> None:
    """Show what the model MODEL is made of, and what it takes on this machine's GPU."""
    with _bar(model) as progress:
        path = find(model, progress)
    with open_checkpoint(path) as checkpoint:
        config, summary = checkpoint.config, summarize(checkpoint)
        context_length = checked_context_length(context_length, config)
        _table(
            f"{summary.name}, {summary.quantization}",
            {
                "parameters": f"{summary.parameters:,}",
                **config.summary(),
                "embedding": _layout_use(summary.embedding),
                **({"per-layer table": _layout_use(summary.lookup)} if summary.lookup else {}),
                **{f"{use.tensors} matrices": _layout_use(use) for use in summary.matrices},
                **({"tower": _tower_use(summary.tower)} if summary.tower else {}),
                "in the file": f"{summary.file_bytes:,} bytes",
                "for the GPU": f"{summary.nbytes:,} bytes, {summary.bits_per_weight:.2f} bits a weight "
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
                sizes = expected_bytes(
                    adapter,
                    checkpoint,
                    half=precision == "f16",
                    context_length=context_length,
                    per_layer_table=per_layer_table,
                )
            except DeviceError as error:
                rows[precision] = f"does not fit: {error}"
                continue
            total = sum(sizes.values())
            rows[precision] = f"{total:,} bytes: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    place = "host" if keeps_table(per_layer_table, adapter.info) else "GPU"
    table = f", with the per-layer table on the {place}" if summary.lookup else ""
    _table(f"On {adapter.info} at a context of {context_length}{table}", rows)


def _layout_use(use: LayoutUse) -> str:
    return f"{use.layout.name}, {use.bits_per_weight:.2f} bits a weight, {use.nbytes:,} bytes"


def _tower_use(use: TowerUse) -> str:
    layouts = listed([f"{matrices.tensors} matrices in {matrices.layout.name}" for matrices in use.matrices])
    return f"{use.parameters:,} parameters, {layouts}, {use.nbytes:,} bytes"


@main.command()
@click.argument("model")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Predict the text in this file.",
)
@click.option("--against", help="Measure the distance from this model.")
@_precision_option
@click.option(
    "--against-precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Compute the model of --against in this precision.",
)
@click.option("--segment", type=int, default=512, show_default=True, help="Predict so many tokens in one go.")
@click.option("--max-tokens", type=int, help="Predict so many tokens of the text only.  [default: all]")
def evaluate(
    model: str,
    text: Path,
    against: str | None,
    precision: str,
    against_precision: str,
    segment: int,
    max_tokens: int | None,
) -> None:
    """Measure the perplexity of MODEL on a text, and its distance from another model or precision on the text."""
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise click.BadParameter(f"{text} is not UTF-8 text", param_hint="--text") from None
    with ExitStack() as stack:
        judged = stack.enter_context(_load(model, precision, "float", segment))
        other = stack.enter_context(_load(against, against_precision, "float", segment)) if against else None
        with _bar(model) as progress:
            result = evaluate_text(
                judged, content, against=other, segment=segment, max_tokens=max_tokens, progress=progress
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
    help="Time pp512 (prefill), tg128 (decode), pp512+tg128, or litert, which is pp1024+tg256. This may be "
    "repeated.  [default: pp512 and tg128]",
)
@click.option("--prefill", type=int, default=0, help="Time a shape of your own: so many tokens of a prompt.")
@click.option("--decode", type=int, default=0, help="Time a shape of your own: so many tokens after it.")
@click.option("--depth", default="0", show_default=True, help="Begin with so many tokens in the cache: 0,1k,4k,16k.")
@click.option(
    "--repetitions", "-r", type=int, default=5, show_default=True, help="Run each so often, after once to warm up."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Print in this format; json has every run.",
)
@_precision_option
@_activations_option
@_table_option
@click.option("--peer", "peers", multiple=True, help=f"Measure another engine in turn: {', '.join(PEERS)}.")
@click.option("--peer-model", help="Let the peers run this model.  [default: MODEL]")
@click.option("--threads", type=int, help="Let the peers use so many threads of the CPU.  [default: as they choose]")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw speed over depth and length into this file."
)
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
    per_layer_table: str,
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
    with _bar(model) as progress:
        path = find(model, progress, vision=False)
        peer_path = find(peer_model, progress, vision=False) if peer_model else path
    with open_checkpoint(path, vision=False) as checkpoint:
        files, config = checkpoint.files, checkpoint.config
    check_context(at, config.max_position_embeddings)
    longest = max(shape.context for shape in at)
    context = max(longest, checked_context_length(None, config))
    evict(files)
    seconds = []
    for last in (False, True):
        started = time.perf_counter()
        gemma = gemma_wgpu.load(
            path,
            precision=precision,
            activations=activations,
            context_length=context,
            vision=False,
            per_layer_table=per_layer_table,
        )
        seconds.append(time.perf_counter() - started)
        if not last:
            gemma.close()
    with gemma, ExitStack() as stack:
        engines = [stack.enter_context(closing(PEERS[peer](peer_path, longest + 1, threads))) for peer in peers]
        with _bar() as progress:
            report = gemma.device.wait(
                run_bench(gemma, at, repetitions=repetitions, peers=engines, progress=progress)
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
