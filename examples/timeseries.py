"""Irregular series of several channels, from a CSV file as sensors leave it, classified by an ODE-RNN.

The claim (Rubanova, Chen and Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019, section 3): a recurrent
network whose hidden state flows by an ODE between observations classifies irregular series better than one that is
only told the gaps (their table of human activity: 0.829 against 0.797 for RNN Δt). Rivals: that GRU with as many
numbers, and logistic regression on each channel's mean, spread, extremes and ends.

``--data FILE.csv`` takes anybody's series, a row per observation: columns ``series``, ``label`` and ``time``, if you
like ``split`` (train or test), and one for each channel; an empty cell is a value that is missing. Without it, the
Japanese vowels of aeon (Kudo et al., 1999: nine speakers, twelve channels, 7 to 29 frames of 6.4 ms) are written as
such a file first, without half the frames and a third of the other values.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Example, Parser, alternate, progress, say
from series import Series, batch, divided, read_series, summaries, thinned, write_vowels
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nodeshape as ns
from nodeshape._cli import existing_path
from nodeshape._errors import UserError

#: Equal steps of rk4 across a gap, whatever its length; hidden numbers of the ODE-RNN.
STEPS, HIDDEN = 4, 32
#: Shares of the test series' observations that are left out too, to see who bears it.
LEFT_OUT = (0.0, 0.25, 0.5, 0.75)


class Flow(nn.Module):
    """dh/ds = gap · f(h) for s from 0 to 1: every sample crosses a gap of its own in the same steps of one solve."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, hidden), nn.Tanh())
        with torch.no_grad():
            self.net[2].weight.mul_(0.1)  # at first, what was seen is kept across a gap

    def forward(self, s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, gap = state
        return gap * self.net(h), torch.zeros_like(gap)


def by_nodeshape(flow: Flow, state: tuple[Tensor, Tensor]) -> Tensor:
    return ns.odeint(flow, state, [0.0, 1.0], method="rk4", steps=STEPS)[0][-1]


class Recurrent(nn.Module):
    """One observation of a GRU that knows which values are missing; between observations an ODE, or the gap as input.

    Forward takes hidden ``[batch, hidden]``, gap ``[batch, 1]`` and values ``[batch, channels]`` in the units of the
    file, NaN where missing, and returns the hidden state after them and logits; so an exported file follows a sensor.
    """

    def __init__(self, found: list[Series], classes: int, hidden: int, flows: bool) -> None:
        super().__init__()
        values = np.concatenate([x.values for x in found])
        spread = np.nanstd(values, 0)
        for name, numbers in (("mean", np.nanmean(values, 0)), ("spread", np.where(spread > 0, spread, 1))):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32))
        gaps = np.concatenate([np.diff(x.times) for x in found])
        self.register_buffer("unit", torch.tensor(gaps.mean() if len(gaps) else 1.0, dtype=torch.float32))
        self.flow: nn.Module | None = Flow(hidden, hidden) if flows else None
        self.cell = nn.GRUCell(2 * values.shape[1] + (0 if flows else 1), hidden)
        self.head = nn.Linear(hidden, classes)
        self.solve: Callable[[Any, tuple[Tensor, Tensor]], Tensor] = by_nodeshape

    def fuse(self) -> None:
        """Solve in the kernel from now on."""
        if self.flow is not None:
            self.flow = ns.fuse(self.flow, (torch.zeros(2, self.cell.hidden_size), torch.zeros(2, 1)))

    def forward(self, hidden: Tensor, gap: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        gap, missing = gap / self.unit, torch.isnan(values)
        x = [torch.where(missing, 0.0, (values - self.mean) / self.spread), (~missing).to(values.dtype)]
        if self.flow is None:
            x.append(gap)
        else:
            hidden = self.solve(self.flow, (hidden, gap))
        updated = self.cell(torch.cat(x, 1), hidden)
        hidden = torch.where(missing.all(1, keepdim=True), hidden, updated)
        return hidden, self.head(hidden)

    def classify(self, gaps: Tensor, values: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` after whole series."""
        hidden = values.new_zeros(len(values), self.cell.hidden_size)
        for k in range(gaps.shape[1]):
            hidden, logits = self(hidden, gaps[:, k : k + 1], values[:, k])
        return logits


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def as_large_a_gru(found: list[Series], classes: int, size: int) -> Recurrent:
    """The GRU told the gaps whose parameters are as many as the ODE-RNN's, or a few more."""
    hidden = next(h for h in range(1, 1000) if parameters(Recurrent(found, classes, h, flows=False)) >= size)
    return Recurrent(found, classes, hidden, flows=False)


def fit(model: Recurrent, found: list[Series], labels: list[str], iterations: int, name: str) -> None:
    """Minimise cross-entropy by AdamW on batches of 64.

    Of each series up to seven in ten observations and a third of the other values are left out at random, and what
    stays is blurred: there are few series, and any network learns them by heart.
    """
    model.fuse()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=iterations)
    for chosen in progress(batches(len(found), iterations), name):
        gaps, values, classes = batch([thinned(found[k], 0.7 * float(torch.rand(()))) for k in chosen], labels)
        values = torch.where(torch.rand_like(values) < 1 / 3, math.nan, values)
        values += 0.3 * model.spread * torch.randn_like(values)
        optimizer.zero_grad()
        cross_entropy(model.classify(gaps, values), classes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def batches(count: int, iterations: int) -> list[list[int]]:
    def shuffled() -> Iterator[list[int]]:
        while True:
            yield from (part.tolist() for part in torch.randperm(count).split(64))

    return [chosen for chosen, _ in zip(shuffled(), range(iterations))]


def regression(found: list[Series]) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression(max_iter=5000)
    return make_pipeline(*steps).fit(summaries(found), [x.label for x in found])


@torch.no_grad()
def accuracy(model: Recurrent, found: list[Series], labels: list[str]) -> float:
    gaps, values, classes = batch(found, labels)
    return float((model.classify(gaps, values).argmax(1) == classes).float().mean())


def train(seed: int, quick: bool, args: Namespace) -> tuple[dict[str, float], Any]:
    path = args.data
    if path is None:
        path = args.out / "japanese-vowels.csv"
        write_vowels(path)
        say(f"Series: {path}")
    found, channels = read_series(path)
    to_train, to_test = divided(found, seed)
    labels = sorted({x.label for x in found})
    silent = [name for k, name in enumerate(channels) if all(np.isnan(x.values[:, k]).all() for x in to_train)]
    if silent:
        raise UserError(f"{path}: channel {', '.join(silent)} has no value in any series to train with; leave it out")
    torch.manual_seed(seed)
    ours = Recurrent(to_train, len(labels), HIDDEN, flows=True)
    gru = as_large_a_gru(to_train, len(labels), parameters(ours))
    for model, name in ((ours, "ODE-RNN"), (gru, "GRU-Δt")):
        fit(model, to_train, labels, 60 if quick else 800, name)
    simple = regression(to_train)
    names, results = ("ODE-RNN", "GRU-Δt", "regression"), {}
    for share in LEFT_OUT:
        test = to_test if share == 0 else [thinned(x, share) for x in to_test]
        results[share] = [
            accuracy(ours, test, labels),
            accuracy(gru, test, labels),
            float(simple.score(summaries(test), [x.label for x in test])),
        ]
    figures = {"parameters": float(parameters(ours)), "parameters of GRU-Δt": float(parameters(gru))}
    for share, row in results.items():
        where = "" if share == 0 else f", {share:.0%} left out"
        figures.update({f"accuracy of {name}{where}": x for name, x in zip(names, row)})
    return figures, (ours, to_test, labels, channels, names, results)


def draw(shown: Any, path: Path) -> None:
    from matplotlib.figure import Figure

    ours, to_test, labels, channels, names, results = shown
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    series = max(to_test, key=lambda x: len(x.times))
    _draw_series(left, ours, series, labels, channels)
    for name, marker, column in zip(names, "osd", zip(*results.values())):
        right.plot([100 * x for x in results], [100 * x for x in column], marker=marker, label=name)
    right.set(xlabel="observations left out of the test series [%]", ylabel="test accuracy [%]")
    right.set_title(f"{len(to_test)} test series of {len(labels)} classes")
    right.legend(loc="lower left")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def _draw_series(axes: Any, model: Recurrent, series: Series, labels: list[str], channels: list[str]) -> None:
    """Values of three channels, and the probability of the right class as it flows between observations."""
    gaps, values, _ = batch([series], labels)
    right, hidden = labels.index(series.label), torch.zeros(1, HIDDEN)
    times, probability = [], []
    silence = torch.full_like(values[:, 0], math.nan)
    for k, begin in enumerate(series.times):
        hidden, _ = model(hidden, gaps[:, k : k + 1], values[:, k])
        end = series.times[k + 1] if k + 1 < len(series.times) else begin
        for gap in np.linspace(0, end - begin, 12):
            _, logits = model(hidden, torch.tensor([[gap]], dtype=torch.float32), silence)
            times.append(begin + gap)
            probability.append(float(logits.softmax(1)[0, right]))
    for k in range(min(3, len(channels))):
        axes.plot(series.times, series.values[:, k], "o", ms=4, alpha=0.7, label=channels[k])
    axes.set(xlabel="time", ylabel="value")
    other = axes.twinx()
    other.plot(times, probability, color="k", lw=1.5, label="probability of the right class")
    other.set(ylim=(-0.02, 1.02), ylabel="probability of the right class")
    handles = [x for a in (axes, other) for x in a.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8, frameon=False)
    axes.set_title("A test series, three channels, and what the ODE-RNN makes of it")


def speed() -> dict[str, float]:
    from torchdiffeq import odeint

    def by_torchdiffeq(flow: Flow, state: tuple[Tensor, Tensor]) -> Tensor:
        options = {"step_size": 1 / STEPS}
        return odeint(flow, state, torch.tensor([0.0, 1.0]), method="rk4", options=options)[0][-1]

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    found = [
        Series(str(k % 9), "train", np.cumsum(random.exponential(size=15)), random.normal(size=(15, 12)).astype("f"))
        for k in range(64)
    ]
    labels = [str(k) for k in range(9)]
    gaps, values, classes = batch(found, labels)
    ours, theirs = (Recurrent(found, 9, HIDDEN, flows=True) for _ in range(2))
    ours.fuse()
    theirs.solve = by_torchdiffeq

    def iteration(model: Recurrent) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters())

        def once() -> None:
            optimizer.zero_grad()
            cross_entropy(model.classify(gaps, values), classes).backward()
            optimizer.step()

        return once

    return {"training iteration": alternate(iteration(ours), iteration(theirs))}


def verdict(figures: dict[str, float]) -> str:
    ours, gru, simple = (figures[f"accuracy of {name}"] for name in ("ODE-RNN", "GRU-Δt", "regression"))
    by = ours - max(gru, simple)
    how = "better than" if by > 0.01 else "worse than" if by < -0.01 else "within a point of the better of"
    return f"The ODE-RNN classifies {ours:.1%}, {how} the GRU told the gaps ({gru:.1%}) and regression ({simple:.1%})."


def arguments(parser: Parser) -> None:
    parser.add_argument("--data", type=existing_path, help="a CSV file of series; the Japanese vowels if not given")


EXAMPLE = Example(
    "timeseries",
    "An ODE-RNN classifies irregular series from a CSV file, beside a GRU that is told the gaps",
    train,
    draw,
    speed,
    verdict,
    arguments,
)

if __name__ == "__main__":
    EXAMPLE.main()
