"""The findings of a benchmark for readers: as Markdown, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_wgpu.bench.run import OURS, Figure, Kernel, Report, Result
from gemma_wgpu.errors import RequestError

_MOST_KERNELS = 8  # a table has so many rows for kernels
_COLUMNS = [
    *("engine", "prefill", "decode", "depth", "phase", "tokens_per_second", "min", "max"),
    *("first_token_seconds", "bytes_per_second", "bandwidth"),
    *("model", "quantization", "precision", "adapter", "date", "valid"),
]
_CARD = [
    *("report", "engine", "backend", "quantisation", "precision", "test", "prefill tokens/s", "decode tokens/s"),
    *("first token", "CPU memory", "GPU memory", "model size", "p50 / p95 / p99 of a token, ms", "roofline"),
    "tokens right",
]


@dataclass(frozen=True)
class Table:
    """A table with a `head` of column names. The figures of the rows whose indices are in `void` do not count."""

    title: str
    head: list[str]
    rows: list[list[str]]
    void: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return the table as Markdown."""
        cells = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)


Lines = dict[str, list[tuple[int, Figure]]]
"""The lines of a plot by name: their points x, and y with its spread."""


@dataclass(frozen=True)
class Panel:
    """A plot: its title, what its axes are, and its lines."""

    title: str
    x: str
    y: str
    lines: Lines


def card(reports: Sequence[Report]) -> Table:
    """Return reports beside each other, in the columns in which LiteRT publishes the speed of its models and more."""
    rows: list[list[str]] = []
    void: list[int] = []
    for number, report in enumerate(reports, 1):
        for result in report.results:
            if not report.valid:
                void.append(len(rows))
            rows.append(_card_row(number, report, result))
    return Table("Results", _CARD, rows, tuple(void))


def _card_row(number: int, report: Report, result: Result) -> list[str]:
    speeds = (str(speed or "") for speed in (result.prefill, result.decode))
    percentiles = (f"{1000 * seconds:.1f}" for seconds in result.token_percentiles or ())
    row = dict.fromkeys(_CARD, "") | {
        "report": str(number),
        "engine": result.engine,
        "test": str(result.shape),
        **dict(zip(("prefill tokens/s", "decode tokens/s"), speeds, strict=True)),
        "first token": f"{result.first_token.median:.2f} s",
        "p50 / p95 / p99 of a token, ms": " / ".join(percentiles),
    }
    if result.engine == OURS:
        match = report.match
        row |= {
            "backend": report.adapter.backend,
            "quantisation": report.quantization,
            "precision": report.precision.upper(),
            "CPU memory": _megabytes(sum(report.host_bytes.values())),
            "GPU memory": _megabytes(sum(report.gpu_bytes.values())),
            "model size": _megabytes(report.model_bytes or 0),
            "tokens right": (f"{match.same} of {match.tokens}" if match else "not known")
            + ("" if report.valid else ": INVALID"),
        }
        if rate := result.decode_bandwidth:
            row["roofline"] = f"{rate / report.bandwidth:.0%}"
    return [row[name] for name in _CARD]


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB" if nbytes else ""


def title(report: Report) -> str:
    """Return what was measured, on what and when."""
    return (
        f"{report.model} {report.quantization}, {report.precision}, {report.activations} activations, on "
        f"{report.adapter} with {report.tuning}; {report.machine}; "
        f"{', '.join(f'{name} {version}' for name, version in report.versions.items())}; {report.date}"
    )


def warnings(report: Report) -> list[str]:
    """Return what a reader of the figures must know first."""
    found = []
    match = report.match
    if match and match.same < match.tokens:
        wrong = f"{match.tokens - match.same} of {match.tokens} tokens are not those of {match.source}"
        found.append(f"INVALID: {wrong}. So it was not this model that was measured.")
    elif not report.valid:
        found.append("INVALID: the same prompt gave different tokens in different runs.")
    if report.adapter.type == "CPU":
        found.append(
            f"{report.adapter} is the CPU, which stands in for a GPU: these figures say nothing about any GPU."
        )
    return found


def tables(report: Report) -> list[Table]:
    """Return the tables of speed, of our speed beside the peers', of other facts, and of the GPU's time by kernel."""
    found = [Table("Speed", ["engine", "test", "tokens/s", "first token", "GB/s", "of bandwidth"], _speeds(report))]
    if ratios := list(_ratios(report)):
        found.append(Table("Peers", ["test", "peer", f"{OURS} : peer", "same first tokens"], ratios))
    found.append(Table("Facts", ["", ""], _facts(report)))
    kernels = [
        row
        for result in report.results
        for row in (
            *_kernels(result, "prompt", result.prefill_kernels, result.prefill_profiled),
            *_kernels(result, "token", result.decode_kernels, result.decode_profiled),
        )
    ]
    if kernels:
        found.append(Table("Kernels", ["test", "kernel", "workgroups", "dispatches", "ms", "share"], kernels))
    return found


def runs(report: Report) -> Table:
    """Return the table of all runs, those to warm up too."""
    rows = [
        [
            result.engine,
            str(result.shape),
            str(number or "warm-up"),
            f"{1000 * run.prefill_seconds:.1f} ms",
            f"{1000 * run.decode_seconds:.1f} ms" if result.shape.decode else "",
            " ".join(map(str, run.ids)),
        ]
        for result in report.results
        for number, run in enumerate((result.warm_up, *result.runs))
    ]
    return Table("Runs", ["engine", "test", "run", "first token", "the others", "tokens"], rows)


def markdown(report: Report) -> str:
    """Return all tables but that of the single runs."""
    return "\n\n".join([title(report), *warnings(report), *map(str, tables(report))]) + "\n"


def _speeds(report: Report) -> list[list[str]]:
    rows = []
    for result in report.results:
        for phase, speed in (("prefill", result.prefill), ("decode", result.decode)):
            if speed is None:
                continue
            row = [result.engine, f"{result.shape}, {phase}", str(speed), "", "", ""]
            if phase == "prefill":
                row[3] = f"{_scaled(result.first_token, 1000)} ms"
            elif rate := result.decode_bandwidth:
                row[4:] = [f"{rate / 1e9:.1f}", f"{rate / report.bandwidth:.0%}"]
            rows.append(row)
    return rows


def _scaled(figure: Figure, factor: float) -> Figure:
    return Figure(*(factor * value for value in astuple(figure)))


def _ratios(report: Report) -> Iterator[list[str]]:
    ours = {result.shape: result for result in report.results if result.engine == OURS}
    for peer in report.results:
        if peer.engine == OURS:
            continue
        our = ours[peer.shape]
        same = [a == b for a, b in zip(our.runs[0].ids, peer.runs[0].ids, strict=True)]
        equal = f"{[*same, False].index(False)} of {len(same)}"
        for phase, a, b in (("prefill", our.prefill, peer.prefill), ("decode", our.decode, peer.decode)):
            if a and b:
                yield [f"{peer.shape}, {phase}", peer.engine, f"{a.median / b.median:.2f}", equal]


def _facts(report: Report) -> list[list[str]]:
    sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in report.gpu_bytes.items())
    host = report.host
    facts = {
        "on the GPU": f"{sum(report.gpu_bytes.values()) / 1e6:,.1f} MB: {sizes}",
        "context": f"{report.context_length} tokens",
        "bandwidth": f"{report.bandwidth / 1e9:.1f} GB/s, reading",
        "a token at decode": f"{report.dispatches_per_token} dispatches, for which the host takes "
        f"{_scaled(host.alone, 1e6)} µs alone, {_scaled(host.beside_shaders, 1e6)} µs beside the shaders",
        "first run": f"{report.results[0].warm_up.prefill_seconds:.2f} s until the first token, shaders included",
    }
    for result in report.results:
        if percentiles := result.token_percentiles:
            half, most, nearly_all = (f"{1000 * seconds:.2f}" for seconds in percentiles)
            facts[f"a token of {result.engine}, {result.shape}"] = f"p50 {half} ms, p95 {most}, p99 {nearly_all}"
    if report.load:
        first = [_load("cold", report.load.cold, report.load.cold_stages)] if report.load.cold is not None else []
        facts["load"] = "; ".join([*first, _load("warm", report.load.warm, report.load.warm_stages)])
    if report.host_bytes:
        facts["on the host"] = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in report.host_bytes.items())
    if report.match:
        match = report.match
        facts["tokens"] = (
            f"{match.same} of {match.tokens} as in {match.source}, after {match.prompts} "
            f"{'prompt' if match.prompts == 1 else 'prompts'}"
        )
    else:
        facts["tokens"] = "not compared: no reference is known for this model"
    facts["features"] = ", ".join(report.features) or "none"
    facts["limits"] = ", ".join(f"{name} {value:,}" for name, value in asdict(report.limits).items())
    if report.sha256:
        facts["model's SHA-256"] = report.sha256
    return [[name, value] for name, value in facts.items()]


def _load(how: str, seconds: float, stages: dict[str, float]) -> str:
    times = ", ".join(f"{name} {duration:.2f}" for name, duration in stages.items())
    return f"{seconds:.2f} s {how}" + (f" ({times})" if times else "")


def _kernels(result: Result, what: str, kernels: list[Kernel], profiled: float) -> Iterator[list[str]]:
    """Yield the rows of some kernels, and what they leave of the time that went by."""
    total = max(profiled, sum(kernel.seconds for kernel in kernels))
    rest = kernels[_MOST_KERNELS:]
    rows = [(k.shader, "×".join(map(str, k.workgroups)), k.dispatches, k.seconds) for k in kernels[:_MOST_KERNELS]]
    if rest:
        rows.append(("others", "", sum(k.dispatches for k in rest), sum(k.seconds for k in rest)))
    if kernels:
        rows.append(("between them", "", 0, total - sum(kernel.seconds for kernel in kernels)))
    for shader, workgroups, dispatches, seconds in rows:
        share = f"{seconds / total:.0%}" if total else ""
        yield [f"{result.shape}, a {what}", shader, workgroups, str(dispatches or ""), f"{1000 * seconds:.3f}", share]


def to_csv(*reports: Report) -> str:
    """Return CSV with a row for each report, engine, shape and phase."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for report in reports:
        what = report.model, report.quantization, report.precision, str(report.adapter), report.date, report.valid
        for result in report.results:
            shape = result.shape
            test = result.engine, shape.prefill, shape.decode, shape.depth
            if speed := result.prefill:
                first = result.first_token.median
                writer.writerow([*test, "prefill", *astuple(speed), first, "", report.bandwidth, *what])
            if speed := result.decode:
                rate = result.decode_bandwidth or ""
                writer.writerow([*test, "decode", *astuple(speed), "", rate, report.bandwidth, *what])
    return text.getvalue()


def pyplot() -> Any:
    """Return matplotlib.pyplot, which draws to files. Raises RequestError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise RequestError("a plot needs matplotlib; pip install 'gemma-wgpu[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(report: Report, path: Path) -> None:
    """Draw the `panels` of a report into a file.

    Raises RequestError if matplotlib is not installed, or if the file cannot be written.
    """
    plt = pyplot()
    drawn = panels(report)
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4.4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], drawn, strict=True):
        for label, points in panel.lines.items():
            xs, figures = zip(*points, strict=True)
            medians, smallest, largest = np.transpose([astuple(figure) for figure in figures])
            spread = medians - smallest, largest - medians
            axis.errorbar(xs, medians, spread, fmt="o-", capsize=3, markersize=4, linewidth=1.6, label=label)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(f"{report.model} {report.quantization}, {report.precision}, on {report.adapter}", fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: the plot cannot be written: {error}") from error
    finally:
        plt.close(figure)


def panels(report: Report) -> list[Panel]:
    """Return the plots of a report that have anything to show; their points are in the order of x.

    They are the speed of decode over the depth, the speed of prefill over the length of the prompt, and the GPU's
    time for a layer's attention at decode over the depth.
    """
    found = [
        Panel("Decode", "tokens in the cache", "tokens a second", _decode_lines(report)),
        Panel("Prefill", "tokens of the prompt", "tokens a second", _prefill_lines(report)),
        Panel("Attention at decode", "tokens in the cache", "µs of the GPU, a layer", _attention_lines(report)),
    ]
    for panel in found:
        for points in panel.lines.values():
            points.sort(key=lambda point: point[0])
    return [panel for panel in found if panel.lines]


def _decode_lines(report: Report) -> Lines:
    lines: Lines = defaultdict(list)
    for result in report.results:
        if result.decode:
            shape = replace(result.shape, depth=0)
            lines[f"{result.engine}, {shape}"].append((result.shape.depth + shape.prefill, result.decode))
    return lines


def _prefill_lines(report: Report) -> Lines:
    """Return the lines at the smallest depth alone, since all of them would be too many."""
    depth = min(result.shape.depth for result in report.results)
    lines: Lines = defaultdict(list)
    for result in report.results:
        if result.prefill and result.shape.depth == depth:
            lines[f"{result.engine} @ d{depth}" if depth else result.engine].append(
                (result.shape.prefill, result.prefill)
            )
    return lines


def _attention_lines(report: Report) -> Lines:
    lines: Lines = defaultdict(list)
    for result in report.results:
        for kernel in result.decode_kernels:
            if kernel.shader.startswith("attention"):
                label = f"{kernel.shader}, {kernel.dispatches} layers"
                microseconds = Figure.of([kernel.seconds * 1e6 / kernel.dispatches])
                lines[label].append((result.shape.depth + result.shape.prefill, microseconds))
    return lines
