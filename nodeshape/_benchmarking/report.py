"""What a run of the bench leaves: aligned tables, the targets, a JSON file and a log-log plot."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nodeshape import __version__
from nodeshape._benchmarking.cases import DIRECT_LIMIT, Result
from nodeshape._benchmarking.targets import Target
from nodeshape._files import write_atomically


def describe_machine(machine: Mapping[str, Any]) -> str:
    """The machine in two lines, with a GPU in three."""
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s on {count} thread{'s' if count != '1' else ''}"
        for count, rate in machine["sgemm_flops_by_threads"].items()
    )
    gpu = f"{machine['gpu']}, sgemm {machine['gpu_sgemm_flops'] / 1e9:.0f} GFLOP/s\n" if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {machine['system']};"
        f" torch {machine['torch']}, Python {machine['python']}\nsgemm: {rates}"
    )


def table(title: str, rows: Sequence[Result]) -> str:
    """A section's table: median milliseconds, and how many times those of the first column they are."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.seconds, *row.skipped)))
    if any(row.direct_limit is not None for row in rows):
        names.append(DIRECT_LIMIT)
    grid = [[title, *(name if i == 0 else f"{name}   " for i, name in enumerate(names))]]
    notes = []
    for row in rows:
        base = row.time(names[0])
        grid.append([f"  {row.name}", *(_cell(row.time(name), base, i == 0) for i, name in enumerate(names))])
        notes += [f"  {row.name}: no {name}: {reason}" for name, reason in row.skipped.items()]
        notes += [f"  {row.name}: {name} {value:.2f}" for name, value in row.figures.items()]
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = [
        line[0].ljust(max(widths[0], 36))
        + "".join("  " + text.rjust(width) for text, width in zip(line[1:], widths[1:]))
        for line in grid
    ]
    return "\n".join([*lines, *notes])


def _cell(seconds: float | None, base: float | None, first: bool) -> str:
    if seconds is None:
        return "–" if first else "–" + " " * 9
    text = f"{_three_digits(1e3 * seconds)} ms"
    return text if first or base is None else f"{text} {_three_digits(seconds / base):>7}×"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def targets(chosen: Sequence[Target], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each target with the figure of this run, where it has one."""
    lines = []
    for target in chosen:
        figure = target.measured(results)
        met = None if figure is None else target.met(figure)
        lines.append({"name": target.name, "target": target.bound, "measured": figure, "met": met})
    return lines


def target_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The targets, one line each."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    width = max(len(line["name"]) for line in lines)
    return "\n".join(
        f"  {line['name']:<{width}}  {line['target']:>8}"
        f"  {'' if line['measured'] is None else format(line['measured'], '.3g'):>8}  {words[line['met']]}"
        for line in lines
    )


def write_json(
    path: Path,
    suite: str,
    quick: bool,
    machine: Mapping[str, Any],
    results: Sequence[Result],
    lines: Sequence[Mapping[str, Any]],
) -> None:
    """Everything that was measured; times in seconds."""
    report = {
        "nodeshape_version": __version__,
        "suite": suite,
        "quick": quick,
        "machine": machine,
        "cases": [asdict(result) for result in results],
        "targets": lines,
    }
    write_atomically(path, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def plot(path: Path, axes_of: Mapping[str, str], results: Sequence[Result], title: str) -> None:
    """A log-log panel for each section in ``axes_of``: median milliseconds, quartiles shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(axes_of), figsize=(4.1 * len(axes_of) + 1.8, 4.2), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for r in results if r.section in axes_of for name in r.seconds))
    styles = {name: {"color": f"C{i % 10}", "linestyle": ("-", ":")[i // 10 % 2]} for i, name in enumerate(names)}
    lines = {}
    for axes, (section, label) in zip(panels.flat, axes_of.items()):
        rows = [r for r in results if r.section == section]
        for name in names:
            points = [(r.scale, r.seconds[name]) for r in rows if name in r.seconds]
            if not points:
                continue
            x = [scale for scale, _ in points]
            (lines[name],) = axes.plot(x, [1e3 * t.median for _, t in points], marker="o", markersize=4, **styles[name])
            low, high = ([1e3 * getattr(t, f"{side}_quartile") for _, t in points] for side in ("lower", "upper"))
            axes.fill_between(x, low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
        limits = [(r.scale, 1e3 * r.direct_limit) for r in rows if r.direct_limit is not None]
        if limits:
            (lines[DIRECT_LIMIT],) = axes.plot(*zip(*limits), "--", color="#5b6570")
        ticks = [r.scale for r in rows]
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(section, fontsize=9)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms")
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
