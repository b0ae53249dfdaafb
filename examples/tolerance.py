"""A classifier trained at one tolerance of its solver and tested at another: accuracy and evaluations.

The claim (the report, after Chen et al., arXiv:1806.07366, section 3): the tolerance of the solver can be set, and set
differently for training and for testing, to trade accuracy for evaluations of f. Each of six networks is trained
under error control by dopri5 at a tolerance from 10 to 1e-5 and tested at all of them. Its flow begins thirty times as
fast as that of nodeshape's classifier, so that tolerances may make a difference. The rival is the same network, trained
and tested by rk4 in as many evaluations, in equal steps; and in one or two steps, to see where fixed steps end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Example, alternate, progress
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._data.shapes import CLASSES, draw_set

TASK, SIZE, WIDTH, SPEED = "compound", 16, 8, 10.0
TOLERANCES = (1e1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
TRAINING, TESTING, BATCH = 2400, 1000, 60


def images(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn shapes ``[count, 1, 16, 16]`` in [0, 1], and their classes."""
    drawn, labels = draw_set(TASK, split, count, seed, SIZE)
    return torch.from_numpy(drawn).float() / 255, torch.from_numpy(labels)


def network(seed: int) -> ns.ShapeClassifier:
    """A small classifier whose flow is quick, and solved in the kernel."""
    torch.manual_seed(seed)
    model = ns.ShapeClassifier(len(CLASSES[TASK]), image_size=SIZE, width=WIDTH, method="dopri5", rtol=1e-3)
    nn.init.constant_(model.ode.dynamics.norm3.weight, SPEED)
    model.ode.dynamics = ns.fuse(model.ode.dynamics, model.stem(torch.zeros(2, 1, SIZE, SIZE)))
    return model


def solve_by(model: ns.ShapeClassifier, tolerance: float | None = None, steps: int | None = None) -> ns.ShapeClassifier:
    """Set the solver: dopri5 under error control, or rk4 in equal steps."""
    ode = model.ode
    ode.method = "dopri5" if steps is None else "rk4"
    ode.rtol = ode.atol = tolerance
    ode.steps = steps
    return model


def fit(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, epochs: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(data[1]) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=epochs * per_epoch)
    model.train()
    for step in progress(range(epochs * per_epoch), name):
        if step % per_epoch == 0:
            order = torch.randperm(len(data[1]), generator=generator)
        chosen = order[step % per_epoch * BATCH :][:BATCH]
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def tested(model: ns.ShapeClassifier, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy in percent, and evaluations of f per image."""
    model.eval()
    with torch.no_grad():
        accuracy = float((model(data[0]).argmax(1) == data[1]).double().mean())
    return 100 * accuracy, float(model.ode.stats.nfe_forward.double().mean())


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    tolerances = TOLERANCES[::2] if quick else TOLERANCES
    data, test = images("train", 600 if quick else TRAINING, seed), images("test", TESTING, seed)
    epochs = 6 if quick else 8
    figures: dict[str, float] = {}
    for own in tolerances:
        model = solve_by(network(seed), own)
        fit(model, data, seed, epochs, f"rtol {own:g}")
        for other in tolerances:
            accuracy, evaluations = tested(solve_by(model, other), test)
            figures[f"accuracy, trained {own:g}, tested {other:g}"] = accuracy
            figures[f"evaluations, trained {own:g}, tested {other:g}"] = evaluations
        steps = round(figures[f"evaluations, trained {own:g}, tested {own:g}"] / 4)
        figures[f"accuracy, rk4 in the evaluations of {own:g}"] = by_rk4(steps, data, test, seed, epochs)[0]
    for steps in (1, 2):
        own_accuracy, tight = by_rk4(steps, data, test, seed, epochs)
        figures[f"accuracy, trained by rk4 in {steps}, tested so"] = own_accuracy
        figures[f"accuracy, trained by rk4 in {steps}, tested at 1e-05"] = tight
    return figures, (figures, tolerances)


def by_rk4(steps: int, data: Any, test: Any, seed: int, epochs: int) -> tuple[float, float]:
    """Accuracies of a network trained in equal steps: tested in as many, and at a tight tolerance."""
    model = solve_by(network(seed), steps=steps)
    fit(model, data, seed, epochs, f"rk4, {steps} steps")
    return tested(model, test)[0], tested(solve_by(model, TOLERANCES[-1]), test)[0]


def draw(shown: tuple[dict[str, float], tuple[float, ...]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figures, tolerances = shown
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained", width_ratios=(1.2, 1))
    for axis, what, cmap in zip(axes, ("accuracy", "evaluations"), ("viridis", "cividis_r")):
        table = [[figures[f"{what}, trained {a:g}, tested {b:g}"] for b in tolerances] for a in tolerances]
        columns = [f"{b:g}" for b in tolerances]
        if what == "accuracy":
            table = [[*row, figures[f"accuracy, rk4 in the evaluations of {a:g}"]] for row, a in zip(table, tolerances)]
            columns.append("rival")
        axis.imshow(table, cmap=cmap, aspect="auto")
        middle = (max(map(max, table)) + min(map(min, table))) / 2
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                dark = (value < middle) == (what == "accuracy")
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(tolerances)), [f"{a:g}" for a in tolerances])
        axis.set(xlabel="tested at rtol", ylabel="trained at rtol")
    axes[0].axvline(len(tolerances) - 0.5, color="white", lw=4)
    axes[0].set_title("Accuracy, % (rival: rk4, equal evaluations)")
    axes[1].set_title("Evaluations of f per image")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def speed() -> dict[str, float]:
    import torchdiffeq

    model, (x, labels) = network(0), images("train", BATCH, 0)
    f, t = model.ode.dynamics.func, torch.tensor([0.0, 1.0])

    def iteration(ode: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> None:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model.head(ode(model.stem(x))), labels).backward()
            optimiser.step()

        return step

    ratios: dict[str, float] = {}
    for rtol in (1e-1, 1e-3, 1e-5):
        solve_by(model, rtol)
        for name, odeint in (("odeint", torchdiffeq.odeint), ("odeint_adjoint", torchdiffeq.odeint_adjoint)):

            def theirs(y: Tensor, odeint: Any = odeint, rtol: float = rtol) -> Tensor:
                return odeint(f, y, t, method="dopri5", rtol=rtol, atol=rtol)[-1]

            ratios[f"training iteration, rtol {rtol:g}, {name}"] = alternate(
                iteration(model.ode), iteration(theirs), samples=7
            )
    return ratios


def verdict(means: dict[str, float]) -> str:
    tolerances = [own for own in TOLERANCES if f"accuracy, trained {own:g}, tested {own:g}" in means]
    loose, tight = tolerances[0], tolerances[-1]

    def at(what: str, own: float, other: float) -> float:
        return means[f"{what}, trained {own:g}, tested {other:g}"]

    return (
        f"Trained at {tight:g}, a test at {loose:g} has {at('accuracy', tight, loose):.1f}% in"
        f" {at('evaluations', tight, loose):.0f} evaluations, one at {tight:g} has {at('accuracy', tight, tight):.1f}%"
        f" in {at('evaluations', tight, tight):.0f}. Trained at {loose:g}, it is {at('accuracy', loose, loose):.1f}% at"
        f" {loose:g} and {at('accuracy', loose, tight):.1f}% at {tight:g}. A network trained by rk4 in one step has"
        f" {means['accuracy, trained by rk4 in 1, tested so']:.1f}% in that step and"
        f" {means['accuracy, trained by rk4 in 1, tested at 1e-05']:.1f}% at {tight:g}."
    )


if __name__ == "__main__":
    Example(
        "tolerance",
        "A solver's tolerance can be set for training and, differently, for testing.",
        train,
        draw,
        speed,
        verdict,
    ).main()
