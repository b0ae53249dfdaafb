"""Spirals from noisy points at irregular times: a Neural ODE beside a GRU of equal size, inside and beyond the window.

The report has it from the paper on Neural ODEs (Chen et al. 2018, section 5) that they give "much smoother, continuous
spirals than the typical RNN". Here both see 40 noisy points of a spiral, each spiral at times of its own, and give the
curve: at other times of the window that was seen, and beyond it, for as long again. Nothing beyond the window is in the
training data.

A GRU reads the points backwards in time and gives the state at time 0. Then
- the Neural ODE solves dy/dt = f(y); two numbers of y are the position in the plane, the others say which spiral it is;
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

Solve = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spirals:
    """Archimedean spirals, both ways round: radius and angle are linear in time. All parameters ``[samples]``."""

    radius: Tensor
    growth: Tensor
    angle: Tensor
    speed: Tensor

    @classmethod
    def drawn(cls, samples: int, random: torch.Generator) -> Spirals:
        u = torch.rand(5, samples, generator=random)
        way = torch.where(u[4] < 0.5, -1.0, 1.0)
        return cls(0.3 + 1.0 * u[0], 0.05 + 0.1 * u[1], 2 * math.pi * u[2], way * (1.2 + 0.6 * u[3]))

    def at(self, t: Tensor) -> Tensor:
        """Points ``[times, samples, 2]`` at times ``[times, samples]``."""
        radius, angle = self.radius + self.growth * t, self.angle + self.speed * t
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def times(samples: int, start: float, end: float, random: torch.Generator) -> Tensor:
    """Irregular times ``[points, samples]``, increasing, each sample's own: gaps are exponential, but none is 0."""
    gaps = 0.1 - torch.log1p(-torch.rand(POINTS + 1, samples, generator=random))
    ends = gaps.cumsum(dim=0)
    return start + (end - start) * ends[:-1] / ends[-1]


class Field(nn.Module):
    """f of the ODE: it does not see the time, so that what was learned of a place holds at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(STATE, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, STATE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def on_ours(f: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    return ns.odeint(f, y0, t, method="rk4", options={"step_size": STEP})


def on_torchdiffeq(f: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    """The same there, as quick as it can be: a common grid, off which each sample's own times are read."""
    import torchdiffeq

    grid = torch.arange(math.ceil(float(t.max()) / STEP) + 1) * STEP
    states, samples = torchdiffeq.odeint(f, y0, grid, method="rk4"), torch.arange(t.shape[1])
    before = (t / STEP).long().clamp(max=len(grid) - 2)
    return torch.lerp(states[before, samples], states[before + 1, samples], (t / STEP - before)[..., None])


def start(encoder: PointEncoder, seen_at: Tensor, seen: Tensor) -> Tensor:
    """The state at time 0, ``[batch, ...]``: points are read backwards."""
    return encoder(10 * seen_at.flip(0), seen.flip(0), torch.zeros_like(seen_at[0]))


class NeuralODE(nn.Module):
    """Points ``[times, batch, 2]`` seen at ``seen_at`` to points at ``t``, both ``[times, batch]``."""

    def __init__(self, f: nn.Module | None = None, solve: Solve = on_ours) -> None:
        super().__init__()
        self.encoder = PointEncoder(2, 32, STATE)
        self.f = ns.fuse(Field(), torch.zeros(1, STATE)) if f is None else f
        self.solve = solve

    def forward(self, seen_at: Tensor, seen: Tensor, t: Tensor) -> Tensor:
        from_0 = torch.cat([torch.zeros_like(t[:1]), t])
        return self.solve(self.f, start(self.encoder, seen_at, seen), from_0)[1:, :, :2]


class Rival(nn.Module):
    """The same with a GRU in place of the ODE."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.encoder = PointEncoder(2, 32, hidden)
        self.gru, self.head = nn.GRU(1, hidden), nn.Linear(hidden, 2)

    def forward(self, seen_at: Tensor, seen: Tensor, t: Tensor) -> Tensor:
        waits = 10 * t.diff(dim=0, prepend=torch.zeros_like(t[:1]))
        return self.head(self.gru(waits[..., None], start(self.encoder, seen_at, seen)[None])[0])


class Curve(nn.Module):
    """What is exported: a state at time 0, ``[batch, 6]``, to the curve over both windows, ``[batch, times, 2]``."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f, self.steps = f, round(2 * WINDOW / STEP)

    def forward(self, y0: Tensor) -> Tensor:
        t = [k * STEP for k in range(self.steps + 1)]
        return ns.odeint(self.f, y0, t, method="rk4", steps=1)[..., :2].transpose(0, 1)


def fit(model: nn.Module, spirals: Spirals, iterations: int, random: torch.Generator, name: str) -> None:
    """Fit the points seen of each spiral, which are noisy, by least squares."""
    t = times(len(spirals.radius), 0.0, WINDOW, random)
    seen = spirals.at(t)
    seen += NOISE * torch.randn(seen.shape, generator=random)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in progress(range(iterations), name):
        batch = torch.randint(t.shape[1], (64,), generator=random)
        step(
            model,
            optimizer,
            t[:, batch],
            seen[:, batch],
            int(torch.randint(POINTS // 4, POINTS + 1, (), generator=random)),
        )
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
    samples = len(spirals.radius)
    seen_at, inside = times(samples, 0.0, WINDOW, random), times(samples, 0.0, WINDOW, random)
    seen = spirals.at(seen_at)
    seen += NOISE * torch.randn(seen.shape, generator=random)
    t = torch.cat([inside, times(samples, WINDOW, 2 * WINDOW, random)])
    squares = (model(seen_at, seen, t) - spirals.at(t)).square().sum(-1)
    return math.sqrt(squares[:POINTS].mean()), math.sqrt(squares[POINTS:].mean())


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    known, new = Spirals.drawn(1000, random), Spirals.drawn(200, random)
    models = {"Neural ODE": NeuralODE(), "GRU": Rival()}
    figures: dict[str, float] = {}
    for name, model in models.items():
        fit(model, known, 150 if quick else 3000, torch.Generator().manual_seed(seed), name)
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
    samples = len(spirals.radius)
    seen_at = times(samples, 0.0, WINDOW, random)
    seen = spirals.at(seen_at)
    seen += NOISE * torch.randn(seen.shape, generator=random)
    t = torch.cat([times(samples, 0.0, WINDOW, random), times(samples, WINDOW, 2 * WINDOW, random)])
    dense = torch.linspace(0.0, 2 * WINDOW, 200)[:, None].expand(-1, samples)
    chosen = [int(k) for way in (spirals.speed > 0, spirals.speed < 0) for k in way.nonzero()[:2]]
    figure = Figure(figsize=(12.5, 6), layout="constrained")
    panels = figure.subplots(2, 5, width_ratios=[1, 1, 1, 1, 1.25])
    for row, (name, model), color in zip(panels, models.items(), ("C0", "C3")):
        with torch.no_grad():
            found = model(seen_at, seen, t)
        for axes, k in zip(row, chosen):
            axes.plot(*true[:, k].T, color="0.75", linewidth=4, label="true spiral")
            axes.plot(*seen[:, k].T, ".", color="0.35", markersize=4, label=f"the {POINTS} points seen")
            axes.plot(*found[:half, k].T, color=color, label=f"{name}, inside the window")
            axes.plot(*found[half - 1 :, k].T, color=color, linestyle=(0, (2, 1)), label=f"{name}, beyond")
            axes.set(aspect="equal", xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
        row[0].set_ylabel(name)
        row[0].legend(loc="upper left", fontsize=6.5)
        error = (found - true).square().sum(-1).mean(1).sqrt()
        for axes in panels[:, 4]:
            axes.plot(t[:, 0], error, color=color, label=name)
    for axes in panels[:, 4]:
        axes.axvline(WINDOW, color="0.6", linestyle=":")
        axes.set(xlabel="time (the window seen ends at the line)", ylabel="root-mean-square error")
        axes.legend()
    panels[1, 4].set_yscale("log")
    figure.savefig(path, dpi=110)


def speed() -> dict[str, float]:
    random = torch.Generator().manual_seed(0)
    t = times(64, 0.0, WINDOW, random)
    seen = Spirals.drawn(64, random).at(t)

    def iteration(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters())
        return lambda: step(model, optimizer, t, seen, POINTS // 2)

    return {"training iteration": alternate(iteration(NeuralODE()), iteration(NeuralODE(Field(), on_torchdiffeq)))}


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
