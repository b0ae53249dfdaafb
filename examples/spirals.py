"""Spirals from noisy points at irregular times: a Neural ODE beside a GRU of equal size, inside and beyond the window.

The report has it from the paper on Neural ODEs (Chen et al. 2018, section 5) that they give "much smoother, continuous
spirals than the typical RNN". Here both see 40 noisy points of a spiral, each spiral at times of its own, and give the
curve: at other times of the window that was seen, and beyond it, for as long again. Nothing beyond the window is in the
training data.

A GRU reads the points and gives a state. Then
- the Neural ODE solves dy/dt = f(y) from the last point on, forwards and backwards; two numbers of y are the position
  in the plane, the others say which spiral it is. In training it also reads only the first points and predicts others;
- its rival is another GRU that is told the time to the next point, with as many weights as f.
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

WINDOW = 4.0  # of time that is observed; as much again is asked for
POINTS, NOISE = 40, 0.05
STATE, STEP = 6, 0.1


@dataclass(frozen=True)
class Spirals:
    """Archimedean spirals that grow by 0.08 and turn by 1.5 radians per unit of time. All parameters ``[samples]``."""

    radius: Tensor
    angle: Tensor
    way: Tensor

    @classmethod
    def drawn(cls, samples: int, random: torch.Generator) -> Spirals:
        u = torch.rand(3, samples, generator=random)
        return cls(0.2 + 1.4 * u[0], 2 * math.pi * u[1], torch.where(u[2] < 0.5, -1.0, 1.0))

    def at(self, t: Tensor) -> Tensor:
        """Points ``[times, samples, 2]`` at times ``[times, samples]``."""
        radius, angle = self.radius + 0.08 * t, self.angle + 1.5 * self.way * t
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def times(samples: int, start: float, end: float, random: torch.Generator) -> Tensor:
    """Irregular times ``[points, samples]``, increasing, each sample's own: gaps are exponential, but none is 0."""
    gaps = 0.1 - torch.log1p(-torch.rand(POINTS + 1, samples, generator=random))
    ends = gaps.cumsum(dim=0)
    return start + (end - start) * ends[:-1] / ends[-1]


def observed(spirals: Spirals, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times in the window, and noisy points there."""
    t = times(len(spirals.radius), 0.0, WINDOW, random)
    points = spirals.at(t)
    return t, points + NOISE * torch.randn(points.shape, generator=random)


def held_out(samples: int, random: torch.Generator) -> Tensor:
    """Other times, ``[2 * POINTS, samples]``: half of them inside the window, half beyond."""
    return torch.cat([times(samples, 0.0, WINDOW, random), times(samples, WINDOW, 2 * WINDOW, random)])


class Field(nn.Module):
    """f of the ODE: it does not see the time, so that what was learned of a place holds at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(STATE, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, STATE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class NeuralODE(nn.Module):
    """Points ``[times, batch, 2]`` seen at ``seen_at`` to points at ``t``, both ``[times, batch]``.

    Args:
        f: of the ODE.
        odeint: ours, or torchdiffeq's; a method without an error estimate takes one step from time to time in both.
    """

    def __init__(self, f: nn.Module | None = None, odeint: Callable[..., Tensor] = ns.odeint) -> None:
        super().__init__()
        self.encoder = PointEncoder(2, 32, STATE)
        self.f = ns.fuse(Field(), torch.zeros(1, STATE)) if f is None else f
        self.odeint = odeint

    def forward(self, seen_at: Tensor, seen: Tensor, t: Tensor) -> Tensor:
        y = self.encoder(10 * seen_at, seen, 10 * seen_at[-1])
        steps = (t - seen_at[-1]) / STEP
        past, future = (max(1, math.ceil(float(x))) for x in (-steps.min(), steps.max()))
        before, after = (
            self.odeint(self.f, y, torch.arange(count + 1) * size, method="rk4")[..., :2]
            for count, size in ((past, -STEP), (future, STEP))
        )
        states, samples = torch.cat([before[1:].flip(0), after]), torch.arange(t.shape[1])
        low = (steps + past).long().clamp(max=len(states) - 2)  # each sample's own times are between two of the grid
        return torch.lerp(states[low, samples], states[low + 1, samples], (steps + past - low)[..., None])


class Rival(nn.Module):
    """The same with a GRU in place of the ODE, from time 0 on, as it runs one way only."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.encoder = PointEncoder(2, 32, hidden)
        self.gru, self.head = nn.GRU(1, hidden), nn.Linear(hidden, 2)

    def forward(self, seen_at: Tensor, seen: Tensor, t: Tensor) -> Tensor:
        h = self.encoder(10 * seen_at.flip(0), seen.flip(0), torch.zeros_like(t[0]))
        waits = 10 * t.diff(dim=0, prepend=torch.zeros_like(t[:1]))
        return self.head(self.gru(waits[..., None], h[None])[0])


class Curve(nn.Module):
    """What is exported: a state, ``[batch, 6]``, to the curve from there on, ``[batch, times, 2]``."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, y: Tensor) -> Tensor:
        t = [k * 4 * STEP for k in range(round(WINDOW / STEP) // 4 + 1)]
        return ns.odeint(self.f, y, t, method="rk4")[..., :2].transpose(0, 1)


def fit(model: nn.Module, spirals: Spirals, iterations: int, random: torch.Generator, name: str) -> None:
    """Fit the points seen of each spiral, which are noisy, by least squares.

    The Neural ODE predicts those behind a random cut; the rival, which does worse with cuts, sees all.
    """
    t, seen = observed(spirals, random)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in progress(range(iterations), name):
        batch = torch.randint(t.shape[1], (64,), generator=random)
        cut = int(torch.randint(POINTS // 4, POINTS + 1, (), generator=random))
        step(model, optimizer, t[:, batch], seen[:, batch], cut if isinstance(model, NeuralODE) else POINTS)
        schedule.step()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, t: Tensor, seen: Tensor, first: int) -> None:
    """One training iteration: all points from the ``first`` ones."""
    optimizer.zero_grad()
    (model(t[:first], seen[:first], t) - seen).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def errors(model: nn.Module, spirals: Spirals, random: torch.Generator) -> tuple[float, float]:
    """Root-mean-square distance from the true spirals, which training has not seen, at other times: inside, beyond."""
    seen_at, seen = observed(spirals, random)
    t = held_out(len(spirals.radius), random)
    squares = (model(seen_at, seen, t) - spirals.at(t)).square().sum(-1)
    return math.sqrt(squares[:POINTS].mean()), math.sqrt(squares[POINTS:].mean())


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    known, new = Spirals.drawn(1000, random), Spirals.drawn(200, random)
    models = {"Neural ODE": NeuralODE(), "GRU": Rival()}
    figures: dict[str, float] = {}
    for name, model in models.items():
        fit(model, known, 200 if quick else 2000, torch.Generator().manual_seed(seed), name)
        inside, beyond = errors(model, new, torch.Generator().manual_seed(seed + 1))
        figures |= {f"{name}: error inside": inside, f"{name}: error beyond": beyond}
    figures["GRU's error beyond over the Neural ODE's"] = (
        figures["GRU: error beyond"] / figures["Neural ODE: error beyond"]
    )
    return figures, (models, new)


def draw(drawn: Any, path: Path) -> None:
    from matplotlib.figure import Figure

    models, spirals = drawn
    random = torch.Generator().manual_seed(1)
    seen_at, seen = observed(spirals, random)
    t = held_out(len(spirals.radius), random)
    true = spirals.at(t)
    dense = torch.linspace(0.0, 2 * WINDOW, 161)[:, None].expand(-1, len(spirals.radius))
    smooth = spirals.at(dense)
    chosen = [int(k) for way in (spirals.way > 0, spirals.way < 0) for k in way.nonzero()[:2]]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=[1, 1, 1, 1, 1.6])
    along = figure.add_subplot(grid[:, 4])
    for row, ((name, model), color) in enumerate(zip(models.items(), ("C0", "C3"))):
        with torch.no_grad():
            found = model(seen_at, seen, t)
            # An ODE has a state at all times, a GRU one at each time that it is told.
            curve, half = (model(seen_at, seen, dense), 81) if isinstance(model, NeuralODE) else (found, POINTS)
        for column, k in enumerate(chosen):
            axes = figure.add_subplot(grid[row, column])
            axes.plot(*smooth[:, k].T, color="0.8", linewidth=5, label="true spiral")
            axes.plot(*seen[:, k].T, ".", color="0.3", markersize=4, label=f"{POINTS} points seen")
            axes.plot(*curve[:half, k].T, color=color, label="inside the window")
            axes.plot(*curve[half - 1 :, k].T, color=color, linestyle=(0, (2, 1)), label="beyond")
            axes.set(aspect="equal", xticks=[], yticks=[], xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), title=name)
            if column == 0:
                axes.legend(fontsize=6, loc="upper left")
        squares = (found - true).square().sum(-1)
        slots = (t / (2 * WINDOW) * 32).long()
        mean = torch.stack([squares[slots == k].mean() for k in range(32)])
        along.plot((torch.arange(32) + 0.5) * 2 * WINDOW / 32, mean.sqrt(), color=color, label=name)
    along.axvspan(0, WINDOW, color="0.93", label="window seen")
    along.set(xlabel="time", yscale="log", title="root-mean-square error", xlim=(0, 2 * WINDOW))
    along.legend()
    figure.savefig(path, dpi=100)


def speed() -> dict[str, float]:
    import torchdiffeq

    random = torch.Generator().manual_seed(0)
    t = times(64, 0.0, WINDOW, random)
    seen = Spirals.drawn(64, random).at(t)

    def iteration(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters())
        return lambda: step(model, optimizer, t, seen, POINTS // 2)

    return {"training iteration": alternate(iteration(NeuralODE()), iteration(NeuralODE(Field(), torchdiffeq.odeint)))}


def verdict(figures: dict[str, float]) -> str:
    ratio = figures["GRU's error beyond over the Neural ODE's"]
    if ratio < 1:
        return (
            f"The GRU extrapolates better: the Neural ODE's error beyond the window is {1 / ratio:.1f} times as large."
        )
    return f"Beyond the window the GRU's error is {ratio:.1f} times the Neural ODE's."


example = Example(
    name="spirals",
    claim="A Neural ODE continues spirals, seen as noisy points at irregular times, better than a GRU of equal size.",
    train=train,
    draw=draw,
    speed=speed,
    verdict=verdict,
)

if __name__ == "__main__":
    example.main()
