"""The pictures of the paper, drawn from its figures alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter

from nodeshape._cli import picture
from nodeshape._experiments.source import METHOD_TITLES, solver_title
from nodeshape._ode.options import ADJOINTS
from nodeshape._training.plots import save

COLOURS = dict(zip(METHOD_TITLES, ("#0072b2", "#d55e00", "#009e73")))
ADJOINT_COLOURS = dict(zip(ADJOINTS, ("#0072b2", "#009e73", "#cc3377")))
#: Shapes and their sizes, which leave each other to be seen where counts are equal.
ADJOINT_MARKERS = dict(zip(ADJOINTS, (("o", 8), ("^", 6), ("D", 4))))
LINE_COLOURS = {"ResNet": "#5b6570", "RK-Net": "#d55e00", **{f"ODE-Net {a}": c for a, c in ADJOINT_COLOURS.items()}}
INK, GREY = "#1f2933", "#5b6570"


def draw(paper: dict[str, Any], folder: Path) -> None:
    """Every picture into ``folder``."""
    drawings: dict[str, tuple[Callable[[Any, Path], None], Any]] = {
        **{experiment["name"]: (_learning_curves, experiment) for experiment in paper["experiments"]},
        "depth": (_depth, paper["depth"]),
        "evaluations": (_evaluations, paper["evaluations"]),
        "other-solvers": (_other_solvers, paper["other_solvers"]),
        "sweep": (_sweep, paper["sweep"]),
    }
    for name, (draw_one, figures) in drawings.items():
        path = folder / f"{name}.png"
        with picture(path):
            draw_one(figures, path)


def _learning_curves(experiment: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for k, (method, column) in enumerate(experiment["methods"].items()):
        epochs = range(1, len(column["mean"]) + 1)
        beside = [epoch + 0.06 * (k - 1) for epoch in epochs]  # so that equal curves do not hide each other
        spread = [s or 0.0 for s in column["spread"]]
        label = METHOD_TITLES[method]
        axes.errorbar(beside, column["mean"], spread, color=COLOURS[method], marker="o", ms=4, capsize=3, label=label)
        axes.plot(epochs, column["report"], "--", color=COLOURS[method], alpha=0.6)
    axes.plot([], [], "--", color=GREY, label="the 2021 report")
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=experiment["title"], xticks=epochs, ylim=(None, 102))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    save(figure, path)


def _depth(lines: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 4.0), layout="constrained")
    for axes, name, unit, label in (
        (panels[0], "peak_bytes", 2**20, "peak memory of a training step, MiB"),
        (panels[1], "seconds", 1, "time of a training step, s"),
    ):
        for line, marker in zip(lines, "osv^D"):
            points = [(x, y / unit) for x, y in zip(line["depths"], line[name]) if y]
            if points:
                axes.plot(*zip(*points), color=LINE_COLOURS[line["name"]], marker=marker, label=line["name"], ms=5)
        axes.set(xscale="log", yscale="log", xlabel="residual blocks, or steps of the solver", ylabel=label)
        axes.set_xticks(lines[0]["depths"], map(str, lines[0]["depths"]))
        axes.minorticks_off()
        _plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    save(figure, path)


def _evaluations(counts_of: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(10.0, 3.9), layout="constrained", sharey=True, sharex=True)
    for axes, (method, counts) in zip(panels, counts_of.items()):
        solved = [c for c in counts if c["forward"]]
        if solved:
            ends = np.array([min(c["forward"] for c in solved), max(c["forward"] for c in solved)])
            axes.plot(ends, ends, ":", color=GREY, lw=1, label="as many as forwards")
            axes.plot(ends, ends / 2, "--", color=GREY, lw=1, label="half, as Chen et al. found")
        for adjoint, colour in ADJOINT_COLOURS.items():
            for kind, face, note in (("steps", colour, "equal steps"), ("rtol", "none", "error control")):
                points = [(c["forward"], c["backward"]) for c in solved if c["adjoint"] == adjoint and kind in c]
                if points:
                    marker, size = ADJOINT_MARKERS[adjoint]
                    axes.plot(*zip(*points), marker, color=colour, mfc=face, ms=size, label=f"{adjoint}, {note}")
        axes.set(xscale="log", yscale="log", xlabel="forward evaluations per image", title=METHOD_TITLES[method])
        axes.minorticks_off()
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("backward evaluations per image")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def _other_solvers(table: dict[str, Any], path: Path) -> None:
    rows, columns = table["rows"], table["columns"]
    values = np.array([[np.nan if v is None else v for v in row["accuracy"]] for row in rows], dtype=float)
    figure, axes = plt.subplots(figsize=(2.2 + 0.5 * len(columns), 1.5 + 0.32 * len(rows)), layout="constrained")
    # Ten points at least, so that a few images more or less do not look like much.
    lowest = np.floor(np.nanmin(values, initial=90.0))
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=lowest, vmax=100)
    figure.colorbar(image, label="test accuracy, %", pad=0.01)
    middle = (lowest + 100) / 2
    for (i, j), value in np.ndenumerate(values):
        dark = np.isfinite(value) and value < middle
        text = f"{value:.1f}" if np.isfinite(value) else "–"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
    axes.set_xticks(
        range(len(columns)), map(solver_title, columns), rotation=60, ha="right", rotation_mode="anchor", fontsize=7
    )
    axes.set_yticks(
        range(len(rows)), [f"{METHOD_TITLES[row['method']]}, {solver_title(row)}" for row in rows], fontsize=7
    )
    groups = [c["method"] if "steps" in c else "error control" for c in columns]
    for name in dict.fromkeys(groups):
        places = [j for j, group in enumerate(groups) if group == name]
        axes.text(sum(places) / len(places), -0.8, METHOD_TITLES.get(name, name), ha="center", fontsize=7, color=GREY)
        if places[0]:
            axes.axvline(places[0] - 0.5, color="white", lw=2)
    for i in range(1, len(rows)):
        if rows[i]["method"] != rows[i - 1]["method"]:
            axes.axhline(i - 0.5, color="white", lw=2)
    axes.set_ylabel("trained with", fontsize=8)
    axes.set_xlabel("tested with", fontsize=8)
    axes.tick_params(length=0)
    save(figure, path)


def _sweep(cells: list[dict[str, Any]], path: Path) -> None:
    steps = sorted({cell["step_size"] for cell in cells}, reverse=True)
    sizes = sorted({cell["train_size"] for cell in cells})
    figure, panels = plt.subplots(
        1, len(steps), figsize=(2.7 * len(steps) + 0.6, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, step in zip(panels.flat, steps):
        chosen = [cell for cell in cells if cell["step_size"] == step]
        for k, method in enumerate(METHOD_TITLES):
            x = [cell["train_size"] * 1.04 ** (k - 1) for cell in chosen]  # so that error bars do not hide each other
            mean = [
                np.nan if cell["methods"][method]["mean"] is None else cell["methods"][method]["mean"]
                for cell in chosen
            ]
            spread = [cell["methods"][method]["spread"] or 0.0 for cell in chosen]
            axes.errorbar(
                x, mean, spread, color=COLOURS[method], marker="o", ms=4, capsize=3, label=METHOD_TITLES[method]
            )
        axes.set(xscale="log", title=f"h = {step:g}", xlim=(0.8 * sizes[0], 1.25 * sizes[-1]))
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
    panels[0, 0].set_ylabel("test accuracy, %")
    figure.supxlabel("training images", fontsize=10)
    panels[0, 0].legend(fontsize=8, loc="lower right")
    save(figure, path)


def _plain_ticks(axis: Any) -> None:
    """A logarithmic axis marked 1, 2, 5, 10, … in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
