"""y = x², the function that Neural ODEs are said to fail on, and the one zero that mends it.

The claim (Dupont et al., Augmented Neural ODEs, arXiv:1904.01681): trajectories of an ODE in one dimension do not
cross, so x ↦ y is monotone whatever f is, and y = x² is out of reach; with one augmented dimension it is not. How far
out of reach can be said exactly: the monotone functions nearest to x² on [−1, 1] are max(x, ½)² and its mirror image,
with a mean squared error of 9/160. The rival is a multi-layer perceptron with as many weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Example, alternate, progress
from torch import Tensor, nn

import nodeshape as ns

#: The least mean squared error of a monotone function: half of ∫ (x² − ¼)² dx from −1 to ½.
MONOTONE = 9 / 160
STEPS, BATCH = 20, 256


class Flow(nn.Module):
    """x → [x, 0, …] → ODE → a linear layer, one number in and one out."""

    def __init__(self, augment: int) -> None:
        super().__init__()
        dynamics = ns.fuse(ns.MLPDynamics(1 + augment, (32,)), torch.zeros(2, 1 + augment))
        self.ode = ns.ODEBlock(dynamics, method="rk4", steps=STEPS, augment=augment)
        self.head = nn.Linear(1 + augment, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.ode(x))
        return y

    def trajectories(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Times, and the state of each sample at each: ``[times, batch, 1 + augment]``."""
        t = torch.linspace(0.0, 1.0, STEPS + 1)
        y0 = nn.functional.pad(x, (0, self.ode.augment))
        return t, ns.odeint(self.ode.dynamics, y0, t, method="rk4", steps=1)


def perceptron() -> nn.Module:
    """As many weights as the augmented flow has, 197 and 196."""
    return nn.Sequential(nn.Linear(1, 65), nn.Tanh(), nn.Linear(65, 1))


def fit(model: nn.Module, seed: int, iterations: int, name: str) -> float:
    """Train on noiseless points of [−1, 1]; the mean squared error on a grid."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in progress(range(iterations), name):
        x = 2 * torch.rand(BATCH, 1, generator=generator) - 1
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), x**2).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(grid()), grid() ** 2))


def grid() -> Tensor:
    return torch.linspace(-1.0, 1.0, 1001)[:, None]


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    torch.manual_seed(seed)
    models = {"plain": Flow(0), "augmented": Flow(1), "MLP": perceptron()}
    figures = {"best monotone": MONOTONE}
    for name, model in models.items():
        figures[name] = fit(model, seed, 300 if quick else 3000, name)
    return figures, models


def draw(models: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    x, starts = grid(), torch.linspace(-1.0, 1.0, 17)[:, None]
    colours = plt.get_cmap("coolwarm")((starts[:, 0] + 1) / 2)
    with torch.no_grad():
        axes[0].plot(x, x**2, color="black", lw=5, alpha=0.2, label="y = x²")
        falling = float(models["plain"](x[[0, -1]]).diff(dim=0)) < 0  # both are as near
        axes[0].plot(x, (-x if falling else x).clamp(min=0.5) ** 2, ":", color="black", label="best monotone")
        for name, model in models.items():
            axes[0].plot(x, model(x), "--" if name == "MLP" else "-", label=name)
        for axis, name in zip(axes[1:], ("plain", "augmented")):
            t, states = models[name].trajectories(starts)
            for k, colour in enumerate(colours):
                axis.plot(t, states[:, k, 0], color=colour, lw=1.2)
            axis.set(xlabel="t", ylabel="h₁(t)")
        for k, colour in enumerate(colours):
            axes[3].plot(states[:, k, 0], states[:, k, 1], color=colour, lw=1.2)
            axes[3].plot(states[-1, k, 0], states[-1, k, 1], "o", color=colour, ms=4)
    axes[0].set(title="What each fits", xlabel="x", ylabel="y", ylim=(-0.1, 1.45))
    axes[0].legend(frameon=False, ncols=2, fontsize="small", loc="upper center")
    axes[1].set_title("Plain: trajectories do not cross")
    axes[2].set_title("Augmented: seen in h₁ alone they do")
    axes[3].set(title="… by way of the added dimension", xlabel="h₁", ylabel="h₂")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def speed() -> dict[str, float]:
    import torchdiffeq

    model, x = Flow(1), 2 * torch.rand(BATCH, 1) - 1
    f, t = model.ode.dynamics.func, torch.tensor([0.0, 1.0])

    def iteration(solve: Any) -> Any:
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step() -> None:
            optimiser.zero_grad()
            nn.functional.mse_loss(solve(x), x**2).backward()
            optimiser.step()

        return step

    def theirs(odeint: Any) -> Any:
        options = {"step_size": 1 / STEPS}
        return lambda x: model.head(odeint(f, nn.functional.pad(x, (0, 1)), t, method="rk4", options=options)[-1])

    return {
        f"training iteration, {name}": alternate(iteration(model), iteration(theirs(odeint)))
        for name, odeint in (("odeint", torchdiffeq.odeint), ("odeint_adjoint", torchdiffeq.odeint_adjoint))
    }


def verdict(means: dict[str, float]) -> str:
    holds = means["plain"] > 0.9 * MONOTONE and means["augmented"] < MONOTONE / 100
    return (
        f"{'Confirmed' if holds else 'Not confirmed'}: in one dimension an error of {means['plain']:.4f}, where no"
        f" monotone function is below {MONOTONE:.4f}; with one more dimension {means['augmented']:.1e}, the MLP"
        f" {means['MLP']:.1e}."
    )


if __name__ == "__main__":
    Example(
        "quadratic",
        "A Neural ODE in one dimension cannot fit y = x², one augmented dimension mends it.",
        train,
        draw,
        speed,
        verdict,
    ).main()
