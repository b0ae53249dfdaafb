"""Which solver a trained classifier is deployed under: difference and time of each, and the quickest good one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nodeshape._errors import StageSolveError, UserError
from nodeshape._exporting.verify import CheckImages, classify_all, milliseconds
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._models.fewest_steps import converged
from nodeshape._ode.method import SOURCE_METHODS

STEPS = (1, 2, 3, 5, 10, 20, 40)
BATCH = 100


@dataclass(frozen=True)
class Tried:
    """A solver that was tried: its largest difference of a logit from the converged solve's, and its cost.

    Attributes:
        same_class: part of the images in the converged solve's class.
        accuracy: part of the images that are classified right; None where no right class is known.
        milliseconds: of one image in PyTorch.
    """

    method: str
    steps: int
    difference: float
    same_class: float
    accuracy: float | None
    milliseconds: float


def try_solvers(model: ShapeClassifier, checked: CheckImages, tolerance: float) -> tuple[list[Tried], Tried]:
    """Every method at several numbers of steps, and the quickest whose logits are within ``tolerance`` of converged.

    Raises:
        UserError: no solver is, or the converged solve does not reach the tolerance.
    """
    images = checked.images
    try:
        with torch.no_grad():
            exact = torch.cat([converged(model, batch, tolerance) for batch in images.split(BATCH)])
    except (ValueError, StageSolveError) as error:
        raise UserError(f"--tolerance {tolerance:g}: {error}") from error
    tried = []
    cases = [(method, steps) for method in SOURCE_METHODS for steps in STEPS]
    for method, steps in tqdm(cases, desc="trying solvers", delay=2, disable=None, leave=False):
        solver = model.with_solver(method, steps)
        with tqdm(disable=True) as progress:
            try:
                logits = classify_all(solver, images, BATCH, progress)
            except StageSolveError:  # steps too long for their equations
                continue
        same = float((logits.argmax(dim=1) == exact.argmax(dim=1)).double().mean())
        difference = float((logits - exact).abs().max())
        time = milliseconds(solver, images[:1], budget=0.1)
        tried.append(Tried(method, steps, difference, same, checked.accuracy(logits), time))
    good = [x for x in tried if x.difference <= tolerance]
    if not good:
        closest = min(tried, key=lambda x: x.difference)
        raise UserError(
            f"--tolerance {tolerance:g}: no solver of at most {STEPS[-1]} steps is within it of the converged solve;"
            f" the closest is {closest.method} in {closest.steps} steps, {closest.difference:.1e} away"
        )
    return tried, min(good, key=lambda x: x.milliseconds)


def plot_solvers(tried: list[Tried], tolerance: float, path: Path) -> None:
    """Difference, and accuracy where it is known, against time of one image, a line per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels: list[tuple[str, Callable[[Tried], float | None]]] = [
        ("largest difference of a logit\nfrom the converged solve's", lambda x: x.difference)
    ]
    if any(x.accuracy is not None for x in tried):
        panels.append(("images classified right, %", lambda x: None if x.accuracy is None else 100 * x.accuracy))
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    (first, *_), *_ = grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (label, of) in zip(grid[0], panels):
        for method in SOURCE_METHODS:
            own = [x for x in tried if x.method == method]
            axes.plot([x.milliseconds for x in own], [of(x) for x in own], "o-", label=method)
            for x in own:
                axes.annotate(str(x.steps), (x.milliseconds, of(x)), textcoords="offset points", xytext=(4, 4))
        axes.set(xscale="log", xlabel="one image, ms (numbers are steps)", ylabel=label)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    first.set_yscale("log")
    first.axhline(tolerance, color="grey", linestyle="--", label="--tolerance")
    first.legend()
    figure.savefig(path, dpi=150)
