"""What a benchmark found, to be read: as Markdown, as CSV, as a picture."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_wgpu.bench import OURS, Figure, Kernel, Report, Result
from gemma_wgpu.errors import RequestError

_MOST_KERNELS = 8  # rows of a table
_COLUMNS = [
    *("engine", "prefill", "decode", "depth", "phase", "tokens_per_second", "min", "max"),
    *("first_token_seconds", "bytes_per_second", "bandwidth"),
]


def markdown(report: Report) -> str:
    """Tables of speed, of the peers' beside ours, of what else was measured, and of the GPU's time by kernel."""
    parts = [
        f"{report.model} {report.quantization}, {report.precision}, {report.activations} activations, on "
        f"{report.adapter} with {report.tuning}; {report.machine}; "
        f"{', '.join(f'{name} {version}' for name, version in report.versions.items())}; {report.date}",
        _table(["engine", "test", "tokens/s", "first token", "GB/s", "of bandwidth"], _speeds(report)),
    ]
    if ratios := list(_ratios(report)):
        parts.append(_table(["test", "peer", f"{OURS} : peer", "same first tokens"], ratios))
    parts.append(_table(["", ""], _facts(report)))
    kernels = [
        row
        for result in report.results
        for row in (
            *_kernels(result, "prompt", result.prefill_kernels),
            *_kernels(result, "token", result.decode_kernels),
        )
    ]
    if kernels:
        parts.append(_table(["test", "kernel", "workgroups", "dispatches", "ms", "share"], kernels))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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
        "first run": f"{report.results[0].warm_up.prefill_seconds:.2f} s until the first token, shaders compiled",
    }
    if report.load:
        facts["load"] = f"{report.load.cold:.2f} s cold, {report.load.warm:.2f} s warm"
    if report.sha256:
        facts["model's SHA-256"] = report.sha256
    return [[name, value] for name, value in facts.items()]


def _kernels(result: Result, what: str, kernels: list[Kernel]) -> Iterator[list[str]]:
    total = sum(kernel.seconds for kernel in kernels)
    rest = kernels[_MOST_KERNELS:]
    rows = [(k.shader, "×".join(map(str, k.workgroups)), k.dispatches, k.seconds) for k in kernels[:_MOST_KERNELS]]
    if rest:
        rows.append(("others", "", sum(k.dispatches for k in rest), sum(k.seconds for k in rest)))
    for shader, workgroups, dispatches, seconds in rows:
        share = f"{seconds / total:.0%}" if total else ""
        yield [f"{result.shape}, a {what}", shader, workgroups, str(dispatches), f"{1000 * seconds:.3f}", share]


def to_csv(report: Report) -> str:
    """A row for each engine, shape and phase."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in report.results:
        shape = result.shape
        test = result.engine, shape.prefill, shape.decode, shape.depth
        if speed := result.prefill:
            writer.writerow([*test, "prefill", *astuple(speed), result.first_token.median, "", report.bandwidth])
        if speed := result.decode:
            rate = result.decode_bandwidth or ""
            writer.writerow([*test, "decode", *astuple(speed), "", rate, report.bandwidth])
    return text.getvalue()


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises RequestError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise RequestError("a plot needs matplotlib; pip install 'gemma-wgpu[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(report: Report, path: Path) -> None:
    """Draw into a file the speed of decode over the depth, that of prefill over the length of the prompt, and the
    GPU's time for a layer's attention at decode over the depth, where it is known.

    Raises RequestError where matplotlib is not installed or the file cannot be written.
    """
    plt = pyplot()
    panels = [
        ("Decode", "tokens in the cache", "tokens a second", _decode_lines(report)),
        ("Prefill", "tokens of the prompt", "tokens a second", _prefill_lines(report)),
        ("Attention at decode", "tokens in the cache", "µs of the GPU, a layer", _attention_lines(report)),
    ]
    drawn = [panel for panel in panels if panel[-1]]
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4.4), layout="constrained", squeeze=False)
    for axis, (title, x, y, lines) in zip(axes[0], drawn, strict=True):
        for label, points in lines.items():
            xs, figures = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            medians, smallest, largest = np.transpose([astuple(figure) for figure in figures])
            spread = medians - smallest, largest - medians
            axis.errorbar(xs, medians, spread, fmt="o-", capsize=3, markersize=4, linewidth=1.6, label=label)
        axis.set(title=title, xlabel=x, ylabel=y)
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


_Lines = dict[str, list[tuple[int, Figure]]]


def _decode_lines(report: Report) -> _Lines:
    lines: _Lines = defaultdict(list)
    for result in report.results:
        if result.decode:
            shape = replace(result.shape, depth=0)
            lines[f"{result.engine}, {shape}"].append((result.shape.depth + shape.prefill, result.decode))
    return lines


def _prefill_lines(report: Report) -> _Lines:
    """At the smallest depth alone: all of them would be too many."""
    depth = min(result.shape.depth for result in report.results)
    lines: _Lines = defaultdict(list)
    for result in report.results:
        if result.prefill and result.shape.depth == depth:
            lines[f"{result.engine} @ d{depth}" if depth else result.engine].append(
                (result.shape.prefill, result.prefill)
            )
    return lines


def _attention_lines(report: Report) -> _Lines:
    lines: _Lines = defaultdict(list)
    for result in report.results:
        for kernel in result.decode_kernels:
            if kernel.shader.startswith("attention"):
                label = f"{kernel.shader}, {kernel.dispatches} layers"
                microseconds = Figure.of([kernel.seconds * 1e6 / kernel.dispatches])
                lines[label].append((result.shape.depth + result.shape.prefill, microseconds))
    return lines
