"""Continuous normalising flows on four shapes of the plane: density, samples, and what they cost.

The claim (Chen et al., arXiv:1806.07366, section 4; Grathwohl et al., arXiv:1810.01367; Finlay et al.,
arXiv:2002.02798): an ODE that carries data x at t=0 to noise z at t=1 is a density model, of log density
log N(z) + ∫ ∇·f dt, whose field may be any network; solved backwards it samples; and kinetic and Jacobian
regularisation keep it cheap to solve. The rivals are a neural spline flow of zuko's with about as many weights, and
torchdiffeq's example, a hypernetwork trained through its adjoint under error control, both in the processor time that
ours takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Example, alternate, progress
from torch import Tensor, nn

import nodeshape as ns

BATCH, STEPS, TRAINING, HELD_OUT = 256, 5, 20_000, 4_000
#: Of kinetic energy and of the Jacobian's norm in the loss.
REGULARISATION = 0.002
VARIANTS = {"exact trace": {}, "Hutchinson's trace": {"trace": "hutchinson"}, "not regularised": {"regularise": 0.0}}


def data(name: str, n: int, seed: int) -> Tensor:
    """``[n, 2]`` points of a shape, about of unit spread."""
    from sklearn.datasets import make_circles, make_moons

    generator = torch.Generator().manual_seed(seed)
    if name == "moons":
        return 1.5 * (torch.tensor(make_moons(n, noise=0.07, random_state=seed)[0]).float() - torch.tensor([0.5, 0.25]))
    if name == "circles":
        return 2 * torch.tensor(make_circles(n, noise=0.06, factor=0.5, random_state=seed)[0]).float()
    if name == "pinwheel":  # Johnson et al., arXiv:1603.06277
        r, s = 1.0 + 0.3 * torch.randn(n, generator=generator), 0.1 * torch.randn(n, generator=generator)
        angle = torch.randint(5, (n,), generator=generator) * (2 * math.pi / 5) + 0.25 * r.exp()
        return 1.5 * torch.stack([r * angle.cos() - s * angle.sin(), r * angle.sin() + s * angle.cos()], 1)
    column, row = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    corner = torch.stack([column, 2 * row + column % 2], 1)
    return corner + torch.rand(n, 2, generator=generator) - 2  # of density 1/8


DATA = ("moons", "circles", "pinwheel", "checkerboard")


class Flow(nn.Module):
    """A continuous normalising flow: called, it samples; ``log_prob`` is its density."""

    def __init__(self, width: int = 64, trace: str = "exact", regularise: float = REGULARISATION) -> None:
        super().__init__()
        self.f, self.regularise = ns.MLPDynamics(2, (width, width)), regularise
        with torch.no_grad():
            for x in self.f.layers[0].parameters():
                x *= 3  # densities have edges, all over the plane
        x = torch.zeros(2, 2)
        self.field = ns.fuse(self.f, x)
        dynamics = ns.WithDivergence(self.f, trace, kinetic=True, jacobian=True)
        self.training_dynamics = ns.fuse(dynamics, dynamics.state(x))
        self.dynamics = ns.fuse(ns.WithDivergence(self.f), (x, x[:, :1]))

    def forward(self, z: Tensor) -> Tensor:
        """Samples x from noise z, both ``[batch, 2]``, by the reverse solve."""
        return ns.odeint(self.field, z, [1.0, 0.0], method="rk4", steps=4 * STEPS)[-1]

    def loss(self, x: Tensor, odeint: Callable[..., Any] = ns.odeint, **how: Any) -> Tensor:
        """Mean negative log-likelihood in nats, and what regularises the flow."""
        how = how or {"steps": STEPS}
        dynamics = self.training_dynamics if odeint is ns.odeint else self.training_dynamics.func
        start = self.training_dynamics.func.state(x)
        z, change, kinetic, jacobian = (s[-1] for s in odeint(dynamics, start, T, method="rk4", **how)[:4])
        return (change[:, 0] - normal(z)).mean() + self.regularise * (kinetic.mean() + jacobian.mean())

    def log_prob(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Log density at each x at time t, ``[batch]``, to a tolerance of 1e-5."""
        if t == 1.0:
            return normal(x)
        start = self.dynamics.func.state(x)
        z, change = ns.odeint(self.dynamics, start, [t, 1.0], method="dopri5", rtol=1e-5, atol=1e-5)
        return normal(z[-1]) - change[-1, :, 0]

    def evaluations(self, x: Tensor) -> float:
        """How many evaluations of f a solve to 1e-5 takes, in the mean over samples."""
        _, stats = ns.odeint(self.field, x, T, method="dopri5", rtol=1e-5, atol=1e-5, return_stats=True)
        return float(stats.nfe_forward.float().mean())


class Hypernetwork(nn.Module):
    """The flow of torchdiffeq's example, trained as there: one hidden layer, its weights made from the time."""

    def __init__(self, scale: float = 2.0, width: int = 64, hidden: int = 32) -> None:
        super().__init__()
        sizes = [1, hidden, hidden, 3 * width * 2 + width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.scale, self.width = scale, width  # data there have about half of our spread

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = self.layers[2](torch.tanh(self.layers[1](torch.tanh(self.layers[0](t.reshape(1, 1))))))[0]
        w, u, gate, b = weights.split([2 * self.width] * 3 + [self.width])
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            hidden = torch.tanh(z @ w.reshape(2, self.width) + b)
            dz = hidden @ (u * torch.sigmoid(gate)).reshape(self.width, 2) / self.width
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace[:, None]

    def log_prob(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint_adjoint

        start = (x / self.scale, torch.zeros(len(x), 1))
        t = torch.tensor([10.0, 0.0])
        z, change = odeint_adjoint(self, start, t, method="dopri5", rtol=1e-5, atol=1e-5)
        return normal(z[-1] / 0.1**0.5) - math.log(0.1) - change[-1, :, 0] - 2 * math.log(self.scale)

    def loss(self, x: Tensor) -> Tensor:
        return -self.log_prob(x).mean()


class Spline(nn.Module):
    """A discrete flow: zuko's neural spline flow, which covers [−5, 5]."""

    def __init__(self) -> None:
        super().__init__()
        from zuko.flows import NSF

        self.flow = NSF(2, transforms=2, hidden_features=(32, 32))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)

    def loss(self, x: Tensor) -> Tensor:
        return -self.log_prob(x).mean()


T = torch.tensor([0.0, 1.0])
RIVAL, EQUAL = "torchdiffeq's", "ours in as many iterations as torchdiffeq's"


def normal(z: Tensor) -> Tensor:
    """Log density of a standard normal distribution of the plane, ``[batch]``."""
    return -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)


def fit(
    model: Any,
    x: Tensor,
    seed: int,
    name: str,
    rate: float,
    iterations: int = 0,
    seconds: float = 0.0,
    batch: int = BATCH,
) -> tuple[float, int]:
    """Train for so many iterations, or so many seconds of processor time; how long, and how many, that was."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    begin, done = time.process_time(), 0

    def share() -> float:
        return done / iterations if iterations else (time.process_time() - begin) / seconds

    for _ in progress(range(iterations or 10**6), name):
        if share() >= 1:
            break
        if rate > 1e-3:
            optimiser.param_groups[0]["lr"] = rate * (0.02 + 0.98 * math.cos(math.pi / 2 * share()) ** 2)
        optimiser.zero_grad()
        model.loss(x[torch.randint(len(x), (batch,), generator=generator)]).backward()
        optimiser.step()
        done += 1
    return time.process_time() - begin, done


def nll(model: Any, x: Tensor) -> float:
    """Held out, in nats per point."""
    with torch.no_grad():
        return -float(model.log_prob(x).mean())


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    figures: dict[str, float] = {}
    shown: dict[str, Any] = {}
    iterations = 200 if quick else 1000
    for name in DATA[:1] if quick else DATA:
        x, test = data(name, TRAINING, seed), data(name, HELD_OUT, seed + 10_000)
        for variant, how in VARIANTS.items():
            if variant != "exact trace" and (quick or name != "pinwheel"):
                continue
            torch.manual_seed(seed)
            model = Flow(**how)
            label = name if variant == "exact trace" else f"{name}, {variant}"
            took = fit(model, x, seed, label, 1e-2, iterations)[0]
            figures[f"{label}: ours"] = nll(model, test)
            figures[f"{label}: evaluations to 1e-5"] = model.evaluations(test)
            if variant == "exact trace":
                ours, seconds = model, took
        spline, hyper = Spline(), Hypernetwork()
        fit(spline, x, seed, f"{name}, spline", 1e-2, seconds=seconds)
        figures[f"{name}: spline flow"] = nll(spline, test)
        done = fit(hyper, x, seed, f"{name}, torchdiffeq", 1e-3, seconds=seconds, batch=512)[1]
        figures[f"{name}: {RIVAL}"] = nll(hyper, test)
        torch.manual_seed(seed)
        short = Flow()
        fit(short, x, seed, f"{name}, as many iterations", 1e-2, done)
        figures[f"{name}: {EQUAL}"] = nll(short, test)
        figures[f"{name}: torchdiffeq's iterations"] = done
        figures[f"{name}: seconds"] = seconds
        shown[name] = (ours, spline, test)
    return figures, shown


def draw(shown: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    times = (1.0, 0.6, 0.3, 0.0)
    titles = ("data", *(f"ours, t = {t:g}" for t in times), "samples: z blue, x red", "spline flow")
    figure, axes = plt.subplots(
        len(shown), len(titles), figsize=(2 * len(titles), 2 * len(shown) + 0.3), squeeze=False, layout="constrained"
    )
    side = torch.linspace(-3.0, 3.0, 91)
    grid = torch.cartesian_prod(side, side)

    def density(axis: Any, log_prob: Tensor) -> None:
        axis.imshow(log_prob.exp().reshape(91, 91).T, extent=(-3, 3, -3, 3), origin="lower", cmap="magma", vmin=0)

    for row, (name, (ours, spline, test)) in zip(axes, shown.items()):
        row[0].plot(*test[:1500].T, ".", ms=1.2, color="black")
        row[0].set_ylabel(name)
        with torch.no_grad():
            for axis, t in zip(row[1:], times):
                density(axis, ours.log_prob(grid, t))
            z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
            paths = ns.odeint(ours.field, z, torch.linspace(1.0, 0.0, 21), method="rk4", steps=1)
            for k in range(len(z)):
                row[5].plot(*paths[:, k].T, color="grey", lw=0.6)
            row[5].plot(*paths[0].T, ".", ms=3, color="tab:blue")
            row[5].plot(*paths[-1].T, ".", ms=3, color="tab:red")
            density(row[6], spline.log_prob(grid))
        for axis in row:
            axis.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    figure.savefig(path, dpi=60)
    plt.close(figure)


def speed() -> dict[str, float]:
    import torchdiffeq

    model, x = Flow(), data("moons", BATCH, 0)

    def iteration(*how: Any, **options: Any) -> Callable[[], None]:
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step() -> None:
            optimiser.zero_grad()
            model.loss(x, *how, **options).backward()
            optimiser.step()

        return step

    grid = {"step_size": 1 / STEPS}
    return {
        f"training iteration, {name}": alternate(iteration(), iteration(solve, options=grid))
        for name, solve in (("odeint", torchdiffeq.odeint), ("odeint_adjoint", torchdiffeq.odeint_adjoint))
    }


def verdict(means: dict[str, float]) -> str:
    names = [name for name in DATA if f"{name}: ours" in means]

    def better(own: str, rival: str) -> str:
        return f"{sum(means[f'{name}: {own}'] <= means[f'{name}: {rival}'] for name in names)} of {len(names)}"

    return (
        f"Held out, ours is at least as likely as torchdiffeq's example on {better('ours', RIVAL)} shapes in equal time"
        f" and on {better(EQUAL, RIVAL)} in as many iterations, and as the spline flow on"
        f" {better('ours', 'spline flow')}."
    )


if __name__ == "__main__":
    Example(
        "cnf",
        "A continuous normalising flow models any density of the plane, samples from it, and trains fast.",
        train,
        draw,
        speed,
        verdict,
    ).main()
