"""A latent ODE: a variational autoencoder that fits spirals from 30, 50 or 100 noisy points and continues them.

The experiment of Chen et al., "Neural Ordinary Differential Equations", 2018, section 5.1 and table 2: 1,000 pieces of
two spirals, half of them clockwise and half counter-clockwise, 100 time points each, of which n are seen, with noise.
A GRU reads them and says of which mean and variance the latent state z at the last one is; dz/dt = f(z) is solved
forwards and backwards from there, and a decoder turns z into points. In training the GRU also stops after the first
few of a piece's points and the others are predicted. The error is that on the 100 time points that follow the window,
of pieces that training has not seen.

The rival is a GRU with as many weights, which reads points and the time to the next and predicts it, as in the paper;
it continues a spiral from what it predicted itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Example, alternate, progress
from encoders import PointEncoder
from torch import Tensor, nn

import nodeshape as ns

SIZES = (30, 50, 100)
PAPER = {"latent ODE": (0.1642, 0.1502, 0.1346), "RNN": (0.3937, 0.3202, 0.1813)}
#: Time points of a spiral and of a window of it, the time between two, noise; as the authors draw them.
TOTAL, WINDOW, GAP, NOISE = 1000, 100, 6 * math.pi / 999, 0.3
#: Units of a coordinate in which networks see it.
SCALE = 5.0
LATENT, BATCH = 4, 50

Solve = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pieces:
    """Windows of spirals, a sample each.

    Attributes:
        where: which of the window's time points are seen, ``[points, samples]``, increasing.
        seen: the points there, with noise, ``[points, samples, 2]``.
        true: the window and as much again, ``[2 * WINDOW, samples, 2]``; NaN behind the spiral's end.
    """

    where: Tensor
    seen: Tensor
    true: Tensor

    @classmethod
    def drawn(cls, samples: int, points: int, random: torch.Generator, followed: bool = False) -> Pieces:
        """Pieces from anywhere but the very ends, as the authors draw them; ``followed`` by a whole window if asked."""
        where = torch.rand(WINDOW, samples, generator=random).argsort(dim=0)[:points].sort(dim=0).values
        start = torch.randint(WINDOW, TOTAL - (2 if followed else 1) * WINDOW, (samples,), generator=random)
        way = torch.rand(samples, generator=random) < 0.5
        index = start + torch.arange(2 * WINDOW)[:, None]
        true = torch.where(way[:, None], *spirals(index * GAP))
        true[index >= TOTAL] = math.nan
        seen = true[where, torch.arange(samples)]
        return cls(where, seen + NOISE * torch.randn(seen.shape, generator=random), true)

    def __getitem__(self, batch: Tensor) -> Pieces:
        return Pieces(self.where[:, batch], self.seen[:, batch], self.true[:, batch])


def spirals(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The counter-clockwise spiral, r = 0.3 θ, and the clockwise one, r = 15 / θ, angles from 0 to 6π."""
    other = 6 * math.pi + 1 - angle
    out, radius = 0.3 * angle, 15 / other
    return (
        torch.stack([out * torch.cos(angle) + 5, out * torch.sin(angle)], dim=-1),
        torch.stack([radius * torch.cos(other) - 5, radius * torch.sin(other)], dim=-1),
    )


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, 20), nn.ELU(), nn.Linear(20, 20), nn.ELU(), nn.Linear(20, LATENT))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


def on_ours(f: nn.Module, z0: Tensor, t: Tensor) -> Tensor:
    return ns.odeint(f, z0, t, method="midpoint", steps=1)


def on_torchdiffeq(f: nn.Module, z0: Tensor, t: Tensor) -> Tensor:
    import torchdiffeq

    return torchdiffeq.odeint(f, z0, t, method="midpoint")


class LatentODE(nn.Module):
    """Points seen to the distribution of z at the last of them; z to points before and after it."""

    def __init__(self, f: nn.Module | None = None, solve: Solve = on_ours) -> None:
        super().__init__()
        self.encoder = PointEncoder(2, 25, 2 * LATENT)
        self.f = ns.fuse(Field(), torch.zeros(1, LATENT)) if f is None else f
        self.decoder = nn.Sequential(nn.Linear(LATENT, 20), nn.ReLU(), nn.Linear(20, 2))
        self.solve = solve

    def encode(self, where: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z, ``[batch, 4]`` each."""
        t = 10 * GAP * where
        mean, log_variance = self.encoder(t, seen / SCALE, t[-1]).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor, away: Tensor) -> Tensor:
        """Points ``[times, batch, 2]`` so many time points ``away`` from z, ``[times, batch]``, negative before it."""
        past, future = max(0, -int(away.min())), max(0, int(away.max()))
        states = [z[None]]
        if past:
            states.insert(0, self.solve(self.f, z, torch.arange(past + 1) * -GAP)[1:].flip(0))
        if future:
            states.append(self.solve(self.f, z, torch.arange(future + 1) * GAP)[1:])
        return SCALE * self.decoder(torch.cat(states)[away + past, torch.arange(len(z))])

    def loss(self, pieces: Pieces, first: int) -> Tensor:
        """Minus the evidence lower bound per point, but for a constant; the encoder reads the ``first`` points."""
        mean, log_variance = self.encode(pieces.where[:first], pieces.seen[:first])
        z = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        found = self.decode(z, pieces.where - pieces.where[first - 1])
        misfit = (found - pieces.seen).square().sum() / (2 * NOISE**2)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum() / 2
        return (misfit + divergence) / pieces.where.numel()

    def predicted(self, pieces: Pieces) -> Tensor:
        """The window and as much again, ``[2 * WINDOW, batch, 2]``, of the most probable z."""
        z, _ = self.encode(pieces.where, pieces.seen)
        return self.decode(z, torch.arange(2 * WINDOW)[:, None] - pieces.where[-1])


class Rival(nn.Module):
    """A GRU that predicts the next point from those so far and the time until then."""

    def __init__(self, hidden: int = 30) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, hidden), nn.Linear(hidden, 2)

    def forward(self, points: Tensor, steps: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The points ``steps`` time points after each of ``points``, and what the GRU remembers."""
        found, h = self.gru(torch.cat([points / SCALE, 10 * GAP * steps[..., None]], dim=-1), h)
        return SCALE * self.head(found), h

    def loss(self, pieces: Pieces, first: int) -> Tensor:
        """Minus the logarithm of the likelihood per point, but for a constant: each of all those before it."""
        found, _ = self(pieces.seen[:-1], pieces.where.diff(dim=0))
        return (found - pieces.seen[1:]).square().sum() / (2 * NOISE**2 * pieces.where[1:].numel())

    def predicted(self, pieces: Pieces) -> Tensor:
        """As of the latent ODE; NaN inside the window, of which it predicts no point from both sides."""
        ahead = torch.cat([pieces.where.diff(dim=0), WINDOW - pieces.where[-1:]])
        found, h = self(pieces.seen, ahead)
        points = [found[-1:]]
        for _ in range(WINDOW - 1):
            found, h = self(points[-1], torch.ones_like(ahead[:1]), h)
            points.append(found)
        return torch.cat([torch.full_like(pieces.true[:WINDOW], math.nan), *points])


class Decoder(nn.Module):
    """What is exported: z at the last point seen, ``[batch, 4]``, to each tenth point behind it, ``[batch, 10, 2]``."""

    def __init__(self, model: LatentODE) -> None:
        super().__init__()
        self.f, self.decoder = model.f, model.decoder

    def forward(self, z: Tensor) -> Tensor:
        states = ns.odeint(self.f, z, [k * GAP for k in range(0, WINDOW + 1, 10)], method="rk4", steps=1)
        return SCALE * self.decoder(states[1:].transpose(0, 1))


def fit(model: LatentODE | Rival, pieces: Pieces, iterations: int, random: torch.Generator, name: str) -> None:
    """Train, with the encoder at the end of the first few points or of all, so that it learns to see ahead."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    points, samples = pieces.where.shape
    for _ in progress(range(iterations), name):
        batch = torch.randint(samples, (BATCH,), generator=random)
        step(model, optimizer, pieces[batch], int(torch.randint(points // 10, points + 1, (), generator=random)))
        schedule.step()


def step(model: LatentODE | Rival, optimizer: torch.optim.Optimizer, pieces: Pieces, first: int) -> None:
    """One training iteration."""
    optimizer.zero_grad()
    model.loss(pieces, first).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


@torch.no_grad()
def errors(model: LatentODE | Rival, pieces: Pieces) -> tuple[float, float]:
    """Root-mean-square error of a coordinate, of the true spiral, without noise: in the window, and beyond."""
    squares = (model.predicted(pieces) - pieces.true).square()
    return math.sqrt(squares[:WINDOW].mean()), math.sqrt(squares[WINDOW:].mean())


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    figures: dict[str, float] = {}
    drawn = []
    for points in SIZES[:1] if quick else SIZES:
        random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        known = Pieces.drawn(1000, points, random)
        new = Pieces.drawn(500, points, random, followed=True)
        ode, rival = LatentODE(), Rival()
        for model, name in ((ode, "latent ODE"), (rival, "GRU")):
            fit(model, known, 200 if quick else 3000, random, f"{name}, {points} points")
            inside, figures[f"{name}, {points} points"] = errors(model, new)
            if model is ode:
                figures[f"{name}, {points} points, inside the window"] = inside
        drawn.append((points, ode, rival, new))
    return figures, drawn


def one_of_each(pieces: Pieces) -> Pieces:
    """A counter-clockwise and a clockwise piece."""
    first, second = pieces.true[1] - pieces.true[0], pieces.true[2] - pieces.true[1]
    turn = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return pieces[torch.stack([way.nonzero()[0, 0] for way in (turn > 0, turn < 0)])]


def draw(drawn: Any, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, len(drawn) + 1, width_ratios=[*(1 for _ in drawn), 1.3])
    found_errors: dict[str, list[float]] = {"latent ODE": [], "GRU": []}
    colors = ("C0", "C3")
    for column, (points, ode, rival, pieces) in enumerate(drawn):
        some = one_of_each(pieces)
        for row, (name, model, color) in enumerate(zip(found_errors, (ode, rival), colors)):
            found_errors[name].append(errors(model, pieces)[1])
            with torch.no_grad():
                found = model.predicted(some)
            axes = figure.add_subplot(grid[row, column])
            for k, hidden in enumerate(("", "_")):  # a label that begins so is not in the legend
                axes.plot(*some.true[:, k].T, color="0.8", linewidth=5, label=f"{hidden}true spiral")
                axes.plot(*some.seen[:, k].T, ".", color="0.3", markersize=3, label=f"{hidden}points seen")
                axes.plot(*found[:WINDOW, k].T, color=color, label="_" if row else f"{hidden}inside the window")
                axes.plot(*found[WINDOW - 1 :, k].T, ":", color=color, linewidth=2, label=f"{hidden}beyond")
            axes.set(xticks=[], yticks=[], title=f"{name}, {points} points")
            axes.set_aspect("equal", adjustable="datalim")
            if column == 0:
                axes.legend(fontsize=7, loc="upper right")
    along, sizes = figure.add_subplot(grid[:, -1]), SIZES[: len(drawn)]
    for (paper, theirs), (name, ours), color in zip(PAPER.items(), found_errors.items(), colors):
        along.plot(sizes, theirs[: len(sizes)], "s--", color=color, alpha=0.5, label=f"{paper} of the paper")
        along.plot(sizes, ours, "o-", color=color, label=f"{name} here")
    along.set(xlabel="points seen", xticks=sizes, ylim=(0, None), title="root-mean-square error beyond")
    along.legend()
    figure.savefig(path, dpi=100)


def speed() -> dict[str, float]:
    ratios: dict[str, float] = {}
    for points in SIZES:
        pieces = Pieces.drawn(BATCH, points, torch.Generator().manual_seed(0))

        def iteration(model: LatentODE, pieces: Pieces = pieces) -> Callable[[], None]:
            optimizer = torch.optim.Adam(model.parameters())
            return lambda: step(model, optimizer, pieces, len(pieces.where) // 2)

        theirs = LatentODE(Field(), on_torchdiffeq)
        ratios[f"training iteration, {points} points"] = alternate(iteration(LatentODE()), iteration(theirs))
    return ratios


def verdict(figures: dict[str, float]) -> str:
    sizes = [points for points in SIZES if f"GRU, {points} points" in figures]
    said = []
    for points, most in zip(sizes, PAPER["latent ODE"]):
        ours, rival = figures[f"latent ODE, {points} points"], figures[f"GRU, {points} points"]
        said.append(f"with {points} points {ours / most:.2f} times the paper's and {ours / rival:.2f} times the GRU's")
    return f"The latent ODE's error is {'; '.join(said)}."


example = Example(
    name="latent_ode",
    claim="A latent ODE continues spirals from few noisy points with a smaller error than an RNN of equal size.",
    train=train,
    draw=draw,
    speed=speed,
    verdict=verdict,
)

if __name__ == "__main__":
    example.main()
