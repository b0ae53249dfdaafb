"""Inhomogeneous Poisson process: events whose rate λ(z(t)) a latent ODE carries, trained by the exact log-likelihood.

The claim (Chen et al., "Neural Ordinary Differential Equations", 2018, section 5.2): a Poisson process with intensity
λ(z(t)), dz/dt = f(z), has the log-likelihood Σ log λ(z(tᵢ)) − ∫ λ(z(t)) dt, and the integral is one more state of the
same solve. Several sequences of events are drawn by thinning from an intensity that we know, so that the recovered one
can be compared with it. Rivals: a histogram and a spline of log λ, both of the size that cross-validation prefers; an
oracle that knows the formula and fits its five numbers shows what these data can tell at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Example, alternate, progress
from torch import Tensor, nn

import nodeshape as ns

#: The window [0, END] of the events, sequences of them, equal steps of the solve.
END, SEQUENCES, STEPS = 10.0, 60, 200
#: base, height, decay time, period, phase: of the true intensity.
TRUTH = (1.0, 10.0, 5.0, 2.5, 0.0)
#: Bins that the rivals and the oracle count events in, far narrower than what λ does.
BINS = 400


def true_intensity(t: np.ndarray, numbers: tuple[float, ...] = TRUTH) -> np.ndarray:
    """A rate, events per unit of time, that swings and decays."""
    base, height, decay, period, phase = numbers
    return base + height * np.exp(-t / decay) * (1 + np.sin(2 * math.pi * t / period + phase))


def draw_events(random: np.random.Generator, sequences: int) -> list[np.ndarray]:
    """Times of events of each sequence, by thinning (Lewis and Shedler, 1979)."""
    most = TRUTH[0] + 2 * TRUTH[1]
    candidates = [random.uniform(0, END, random.poisson(most * END)) for _ in range(sequences)]
    return [np.sort(t[random.uniform(0, most, len(t)) < true_intensity(t)]) for t in candidates]


class Intensity(nn.Module):
    """z of a few numbers and the integral of λ(z) as one state: d(z, Λ)/dt = (f(z), λ(z))."""

    def __init__(self, mean_rate: float, size: int = 4, width: int = 64) -> None:
        super().__init__()
        self.z0 = nn.Parameter(torch.randn(1, size))
        self.net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, size))
        with torch.no_grad():
            self.net[2].weight.mul_(3)  # so that z has moved well before the window ends
        self.log_rate = nn.Linear(size, 1)
        nn.init.constant_(self.log_rate.bias, math.log(mean_rate))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        return self.net(z), torch.exp(self.log_rate(z))

    def start(self) -> tuple[Tensor, Tensor]:
        return self.z0, torch.zeros_like(self.z0[:, :1])


class Curve:
    """log λ at given times from states at the grid: z by cubic Hermite interpolation, of the steps' order."""

    def __init__(self, times: Tensor, grid: Tensor) -> None:
        self.left = (torch.searchsorted(grid, times, right=True) - 1).clamp(0, len(grid) - 2)
        step = grid[1] - grid[0]
        s = ((times - grid[self.left]) / step)[:, None]
        self.weights = [(1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2 * step, s**2 * (3 - 2 * s), s**2 * (s - 1) * step]

    def __call__(self, model: Intensity, z: Tensor) -> Tensor:
        """From z ``[grid, size]``: log λ ``[times]``."""
        slope, left, right = model.net(z), self.left, self.left + 1
        parts = z[left], slope[left], z[right], slope[right]
        return model.log_rate(sum(w * x for w, x in zip(self.weights, parts)))[:, 0]


def log_likelihood(model: Intensity, solve: Callable[..., Any], curve: Curve, grid: Tensor, sequences: int) -> Tensor:
    """Σ log λ(tᵢ) − ∫ λ dt of all sequences, by one solve that gives both."""
    z, integral = solve(model.start(), grid)
    return curve(model, z[:, 0]).sum() - sequences * integral[-1, 0, 0]


def solver(model: Intensity) -> Callable[..., Any]:
    """Ours: one rk4 step per interval of the grid, in the kernel."""
    fused = ns.fuse(model, model.start())
    return lambda start, grid: ns.odeint(fused, start, grid, method="rk4", steps=1)


def fit(model: Intensity, events: list[np.ndarray], iterations: int, name: str = "latent ODE") -> None:
    """Maximise the log-likelihood by Adam, with a learning rate that falls to 0."""
    grid = torch.linspace(0, END, STEPS + 1)
    times = torch.tensor(np.concatenate(events), dtype=torch.float32)
    curve, solve = Curve(times, grid), solver(model)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=iterations, pct_start=0.1)
    for _ in progress(range(iterations), name):
        optimizer.zero_grad()
        (-log_likelihood(model, solve, curve, grid, len(events)) / len(times)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def intensity(model: Intensity, t: np.ndarray) -> np.ndarray:
    """λ at increasing times from 0 on."""
    z, _ = ns.odeint(model, model.start(), torch.tensor(t, dtype=torch.float32), method="rk4", steps=2)
    return torch.exp(model.log_rate(z[:, 0]))[:, 0].double().numpy()


def counted(events: list[np.ndarray]) -> np.ndarray:
    return np.histogram(np.concatenate(events), BINS, (0, END))[0]


def histogram(bins: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Rates of the narrow bins from their counts: the mean of each of ``bins`` wide ones."""
    return lambda counts, sequences: (
        np.repeat(counts.reshape(bins, -1).mean(1), BINS // bins) / sequences * BINS / END + 1e-6
    )


def spline(knots: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Cubic spline of log λ by Poisson regression."""
    from sklearn.linear_model import PoissonRegressor
    from sklearn.preprocessing import SplineTransformer

    basis = SplineTransformer(knots).fit_transform(np.arange(BINS)[:, None])

    def rates(counts: np.ndarray, sequences: int) -> np.ndarray:
        regression = PoissonRegressor(alpha=1e-4, max_iter=1000, solver="newton-cholesky").fit(basis, counts)
        return regression.predict(basis) / sequences * BINS / END

    return rates


def by_cross_validation(
    family: Callable[[int], Callable[[np.ndarray, int], np.ndarray]], sizes: list[int], events: list[np.ndarray]
) -> tuple[np.ndarray, int]:
    """Rates by the size whose rates make events left out, a fifth at a time, most likely; and that size."""

    def left_out(size: int) -> float:
        total = 0.0
        for k in range(5):
            kept = [x for i, x in enumerate(events) if i % 5 != k]
            rates = family(size)(counted(kept), len(kept))
            held = counted(events[k::5])
            total += float((held * np.log(rates)).sum() - len(events[k::5]) * rates.sum() * END / BINS)
        return total

    best = max(sizes, key=left_out)
    return family(best)(counted(events), len(events)), best


def oracle(events: list[np.ndarray]) -> np.ndarray:
    """Rates by the true formula, its five numbers by maximum likelihood from the true ones on."""
    from scipy.optimize import minimize

    centres, counts = (np.arange(BINS) + 0.5) * END / BINS, counted(events)

    def loss(numbers: np.ndarray) -> float:
        rates = np.maximum(true_intensity(centres, tuple(numbers)), 1e-6)
        return float(len(events) * rates.sum() * END / BINS - (counts * np.log(rates)).sum())

    best = minimize(loss, TRUTH, method="Nelder-Mead", options={"maxiter": 4000, "maxfev": 4000})
    return true_intensity(centres, tuple(best.x))


def relative_error(rates: np.ndarray, truth: np.ndarray) -> float:
    """‖λ̂ − λ‖ / ‖λ‖ in L2, at equally spaced times."""
    return float(np.linalg.norm(rates - truth) / np.linalg.norm(truth))


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    torch.manual_seed(seed)
    events = draw_events(np.random.default_rng(seed), SEQUENCES)
    model = Intensity(sum(map(len, events)) / SEQUENCES / END)
    fit(model, events, 150 if quick else 800)
    centres = (np.arange(BINS) + 0.5) * END / BINS
    truth = true_intensity(centres)
    bars, bins = by_cross_validation(histogram, [n for n in range(5, 81) if BINS % n == 0], events)
    curve, knots = by_cross_validation(spline, list(range(4, 31, 2)), events)
    beyond = np.linspace(0, 1.25 * END, 501)
    longer = intensity(model, beyond)
    ours = intensity(model, np.concatenate([[0.0], centres]))[1:]
    after = beyond > END
    figures = {
        "events": float(sum(map(len, events))),
        "error": relative_error(ours, truth),
        "error of the histogram": relative_error(bars, truth),
        "error of the spline": relative_error(curve, truth),
        "error of the oracle": relative_error(oracle(events), truth),
        "error beyond the window": relative_error(longer[after], true_intensity(beyond[after])),
        "bins": float(bins),
        "knots": float(knots),
    }
    return figures, (events, centres, bars, curve, beyond, longer, figures)


def draw(shown: Any, path: Path) -> None:
    from matplotlib.figure import Figure

    events, centres, bars, curve, beyond, longer, figures = shown
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    named = {name: f"{100 * x:.1f}%" for name, x in figures.items()}
    upper.stairs(bars, np.linspace(0, END, BINS + 1), color="0.7", fill=True, alpha=0.6)
    upper.stairs(
        bars, np.linspace(0, END, BINS + 1), color="0.6", label=f"histogram ({named['error of the histogram']})"
    )
    upper.plot(centres, curve, color="tab:green", lw=1.2, label=f"spline of log λ ({named['error of the spline']})")
    upper.plot(beyond, true_intensity(beyond), "k--", lw=1.5, label="truth")
    upper.plot(beyond, longer, color="tab:red", lw=2, label=f"latent ODE ({named['error']})")
    upper.axvline(END, color="0.4", lw=0.8, ls=":")
    upper.text(END, upper.get_ylim()[1] * 0.5, " beyond the window", color="0.3", fontsize=9)
    upper.set(ylabel="events per unit of time", xlim=(0, beyond[-1]), ylim=(0, None))
    upper.set_title(f"Intensity from {len(events)} sequences of events (relative L2 error within the window)")
    upper.legend(loc="upper right", fontsize=9)
    lower.eventplot(events[:12], lw=0.8, linelengths=0.7, color="tab:blue")
    lower.set(xlabel="t", ylabel="sequence", yticks=[])
    lower.set_title("Twelve of them", fontsize=10)
    figure.savefig(path, dpi=110)


def speed() -> dict[str, float]:
    from torchdiffeq import odeint

    events = draw_events(np.random.default_rng(0), SEQUENCES)
    torch.manual_seed(0)
    model = Intensity(5.0)
    grid = torch.linspace(0, END, STEPS + 1)
    curve = Curve(torch.tensor(np.concatenate(events), dtype=torch.float32), grid)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def iteration(solve: Callable[..., Any]) -> Callable[[], None]:
        def once() -> None:
            optimizer.zero_grad()
            (-log_likelihood(model, solve, curve, grid, SEQUENCES) / 3000).backward()
            optimizer.step()

        return once

    theirs = iteration(lambda start, grid: odeint(model, start, grid, method="rk4"))
    return {"training iteration": alternate(iteration(solver(model)), theirs)}


def verdict(figures: dict[str, float]) -> str:
    ours, target = figures["error"], "within" if figures["error"] <= 0.1 else "not within"
    rivals = {name: figures[f"error of the {name}"] for name in ("histogram", "spline", "oracle")}
    beside = ", ".join(f"{100 * x:.1f}% for the {name}" for name, x in rivals.items())
    return f"The recovered intensity is {100 * ours:.1f}% from the truth, {target} 10%; beside it {beside}."


EXAMPLE = Example(
    "poisson",
    "A latent ODE recovers the intensity of a Poisson process by its exact likelihood, an extra state of the solve",
    train,
    draw,
    speed,
    verdict,
)

if __name__ == "__main__":
    EXAMPLE.main()
