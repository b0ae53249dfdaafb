"""Stochastic differential equations: one learned from its paths, and noise in the depth of a classifier.

The report this project started from names stochastic equations as an answer to Neural ODEs being "overly
deterministic". Two programs ask what they give.

1. Paths of an Ornstein–Uhlenbeck process, dx = θ (μ − x) dt + σ dW. A neural drift f and a neural diffusion g are
   trained until paths of dx = f dt + g dW and the observed ones cannot be told apart by the energy distance (Székely &
   Rizzo 2013). The rival is the Neural ODE, g = 0, trained likewise: it can only stretch and squeeze the
   scatter of the starts.
2. A classifier of drawn shapes, stem → ODE → head, trained on clean images and tested on noisy, covered and blurred
   ones. Its ODE block is deterministic; or has multiplicative noise, dy = f dt + s y ∘ dW (Liu et al. 2019, "Neural
   SDE: Stabilizing Neural ODE Networks with Stochastic Noise"); or a random clock, dy = f ∘ (dt + s dW), whose end is
   the features at the random depth 1 + s W(1). Rival: the deterministic one trained on images with noise added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Example, alternate, progress
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, softplus

import nodeshape as ns
from nodeshape._data.datasets import drawn_data

# ---- 1. learn an equation from its paths -----------------------------------------------------------------------------

THETA, MU, SIGMA = 2.0, 1.0, 0.8
TIMES = torch.linspace(0, 2, 21)
STEPS = 2  # in each interval


def start(count: int, random: torch.Generator) -> Tensor:
    return -1 + 0.3 * torch.randn(count, 1, generator=random)


def truth(x: Tensor, random: torch.Generator) -> Tensor:
    """Paths ``[times, n, 1]`` from x, exact in law."""
    step = float(TIMES[1])
    keep, kick = math.exp(-THETA * step), SIGMA * math.sqrt((1 - math.exp(-2 * THETA * step)) / (2 * THETA))
    paths = [x]
    for _ in TIMES[1:]:
        x = MU + keep * (x - MU) + kick * torch.randn(x.shape, generator=random)
        paths.append(x)
    return torch.stack(paths)


def moments(paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation at each time, and the covariance with the end."""
    x = paths[..., 0]
    mean = x.mean(dim=1)
    return mean, x.std(dim=1), ((x - mean[:, None]) * (x[-1] - mean[-1])).mean(dim=1)


def exact_moments() -> tuple[Tensor, Tensor, Tensor]:
    decay = torch.exp(-THETA * TIMES)
    variance = 0.3**2 * decay**2 + SIGMA**2 / (2 * THETA) * (1 - decay**2)
    return MU + (-1 - MU) * decay, variance.sqrt(), variance * torch.exp(-THETA * (TIMES[-1] - TIMES))


class Equation(nn.Module):
    """dx = f(x) dt + g(x) ∘ dW; with ``noisy`` False the Neural ODE."""

    noise_type, sde_type = "diagonal", "stratonovich"  # of torchsde

    def __init__(self, noisy: bool = True) -> None:
        super().__init__()
        self.noisy, self.terms = noisy, None
        self.drift, self.diffusion = (nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)) for _ in range(2))

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return self.drift(x)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return softplus(self.diffusion(x))

    def forward(self, x: Tensor) -> Tensor:
        """Paths ``[times, n, 1]`` from x."""
        if self.noisy:
            self.terms = self.terms or ns.fuse_sde(self.f, self.g, x)  # the same functions, in the kernel
            return ns.sdeint(*self.terms, x, TIMES, method="midpoint", steps=STEPS)
        self.terms = self.terms or ns.fuse(self.f, x)
        return ns.odeint(self.terms, x, TIMES, method="midpoint", steps=STEPS)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Between the laws of paths ``[times, n, 1]``, seen by their values and their scaled increments."""
    rows = [torch.cat([p, 2 * (p[1:] - p[:-1])])[..., 0].T for p in (x, y)]
    within = [torch.cdist(r, r).sum() / (len(r) * (len(r) - 1)) for r in rows]
    return 2 * torch.cdist(*rows).mean() - within[0] - within[1]


def fit(model: Equation, seed: int, iterations: int, name: str) -> Tensor:
    """Train, and return 4,000 new paths."""
    random = torch.Generator().manual_seed(seed)
    data = truth(start(4000, random), random)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations, 3e-4)
    for _ in progress(range(iterations), name):
        some = data[:, torch.randint(4000, (256,), generator=random)]
        loss = energy_distance(model(start(256, random)), some)
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    with torch.no_grad():
        return model(start(4000, random))


def learn_equation(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    figures, found, models = {}, {}, {}
    for name, noisy in (("SDE", True), ("ODE", False)):
        torch.manual_seed(seed)
        models[name] = Equation(noisy)
        found[name] = fit(models[name], seed, 60 if quick else 1200, f"Ornstein–Uhlenbeck, {name}")
        for what, ours, true in zip(("mean", "deviation", "covariance"), moments(found[name]), exact_moments()):
            figures[f"{what} off by, {name}"] = float((ours - true).abs().max() / true.abs().max())
    x = torch.linspace(-1, 2, 61)[:, None]
    with torch.no_grad():
        drift, diffusion = models["SDE"].f(x, x)[:, 0], models["SDE"].g(x, x)[:, 0]
    slope = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], dim=1), drift[:, None]).solution[0]
    figures |= {"theta, truth 2": -float(slope), "sigma, truth 0.8": float(diffusion.mean())}
    return figures, (found, x[:, 0], drift, diffusion)


# ---- 2. a classifier with noise in its depth -------------------------------------------------------------------------

SIZE, CHANNELS, BLOCK_STEPS, PATHS = 24, 16, 4, 8
#: What the ODE block is, how much noise it has, and how much is added to the images it is trained on.
KINDS = {
    "deterministic": ("none", 0.0, 0.0),
    "noise on features": ("features", 1.0, 0.0),
    "random clock": ("clock", 0.4, 0.0),
    "deterministic, noisy images": ("none", 0.0, 0.15),
}
STRENGTHS = {"noise": (0.0, 0.1, 0.2, 0.3), "cover": (0.0, 0.2, 0.3, 0.4), "blur": (0.0, 1.0, 2.0, 3.0)}


class Block(nn.Module):
    """y(0) to y(1): an ODE in evaluation mode without ``noisy``, else an SDE of Stratonovich's."""

    def __init__(self, kind: str, scale: float) -> None:
        super().__init__()
        self.dynamics, self.kind, self.scale, self.noisy = ns.ConvDynamics(CHANNELS), kind, scale, True
        self.terms: tuple[Any, Any] | None = None
        self.latest: tuple[Any, Any] = (None, None)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.dynamics(t, y)
        if self.kind == "clock":
            self.latest = y, slope
        return slope

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        if self.kind == "features":
            return self.scale * y
        slope = self.latest[1] if y is self.latest[0] else self.dynamics(t, y)  # f is called just before
        return self.scale * slope[..., None]

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "none" or not self.noisy:
            return ns.odeint(self.dynamics, y, (0.0, 1.0), method="midpoint", steps=BLOCK_STEPS)[-1]
        noise = "diagonal" if self.kind == "features" else "general"
        if self.kind == "features":
            self.terms = self.terms or ns.fuse_sde(self.f, self.g, y)
        terms = self.terms or (self.f, self.g)
        return ns.sdeint(*terms, y, (0.0, 1.0), method="midpoint", noise=noise, steps=BLOCK_STEPS)[-1]


class Classifier(nn.Module):
    def __init__(self, kind: str, scale: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1),
            nn.GroupNorm(4, CHANNELS),
        )
        self.block = Block(kind, scale)
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(CHANNELS * (SIZE // 4) ** 2, 7))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.stem(2 * images - 1)))


def corrupted(images: Tensor, kind: str, strength: float, random: torch.Generator) -> Tensor:
    """Gaussian noise; a grey square of a part of the side; a mean over squares, taken several times."""
    if strength == 0:
        return images
    if kind == "noise":
        return (images + strength * torch.randn(images.shape, generator=random)).clamp(0, 1)
    if kind == "blur":
        for _ in range(int(strength)):
            images = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        return images
    side = round(strength * SIZE)
    corner = torch.randint(SIZE - side + 1, (len(images), 2, 1), generator=random)
    inside = (torch.arange(SIZE) >= corner) & (torch.arange(SIZE) < corner + side)
    return torch.where(inside[:, None, 0, :, None] & inside[:, None, 1, None, :], 0.5, images)


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Per cent, of the probabilities averaged over paths where there is noise."""
    paths = PATHS if model.block.kind != "none" and model.block.noisy else 1
    chance = sum(model(images).softmax(dim=1) for _ in range(paths))
    return float((chance.argmax(dim=1) == labels).double().mean() * 100)


def fit_classifier(kind: str, seed: int, quick: bool) -> Classifier:
    block, scale, image_noise = KINDS[kind]
    torch.manual_seed(seed)
    model, random = Classifier(block, scale), torch.Generator().manual_seed(seed)
    data = drawn_data("compound", 600 if quick else 4000, 1, SIZE, "grey", seed).train
    epochs, size = 4 if quick else 16, 60
    adam = torch.optim.Adam(model.parameters(), 4e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, total_steps=epochs * math.ceil(len(data) / size))
    for _ in progress(range(epochs), kind):
        for index in torch.randperm(len(data), generator=random).split(size):
            images, labels = data.batch(index, torch.device("cpu"))
            loss = cross_entropy(model(corrupted(images, "noise", image_noise, random)), labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
            rates.step()
    return model.eval()


def classify(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    test = drawn_data("compound", 1, 200 if quick else 1000, SIZE, "grey", seed).test
    images, labels = test.batch(slice(None), torch.device("cpu"))
    curves: dict[str, dict[str, list[float]]] = {}
    figures = {}
    for kind in KINDS:
        model = fit_classifier(kind, seed, quick)
        curves[kind] = {}
        figures[f"clean, {kind}"] = accuracy(model, images, labels)
        for what, strengths in STRENGTHS.items():
            random = torch.Generator().manual_seed(seed)
            found = [accuracy(model, corrupted(images, what, s, random), labels) for s in strengths[1:]]
            curves[kind][what] = [figures[f"clean, {kind}"], *found]
        for what, values in curves[kind].items():
            figures[f"{what}, {kind}"] = sum(values[1:]) / 3
        figures[f"corrupted, {kind}"] = sum(sum(values[1:]) for values in curves[kind].values()) / 9
        if KINDS[kind][0] != "none":
            model.block.noisy = False
            figures[f"clean, {kind}, its noise off"] = accuracy(model, images, labels)
    return figures, curves


# ---- the program -----------------------------------------------------------------------------------------------------


def train(seed: int, quick: bool) -> tuple[dict[str, float], Any]:
    (first, equation), (second, curves) = learn_equation(seed, quick), classify(seed, quick)
    return first | second, (equation, curves)


class Flat(nn.Module):
    """A block's equation as torchsde wants it, of states ``[batch, size]``."""

    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.block.f(t, y.reshape(-1, CHANNELS, SIZE // 4, SIZE // 4)).flatten(1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.block.scale * y


def speed() -> dict[str, float]:
    import torchsde

    equation, random = Equation(), torch.Generator().manual_seed(0)
    x, data = start(256, random), truth(start(256, random), random)
    block = Block("features", 0.4)
    flat, features = Flat(block), torch.randn(60, CHANNELS, SIZE // 4, SIZE // 4)
    ends = torch.tensor([0.0, 1.0])

    def theirs(module: nn.Module, y: Tensor, times: Tensor, method: str, dt: float) -> Tensor:
        return torchsde.sdeint(module, y, times, method=method, dt=dt)

    def iteration(loss: Callable[[], Tensor], module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            loss().backward()

        return run

    dt = float(TIMES[1]) / STEPS
    fits = [
        iteration(lambda: energy_distance(equation(x), data), equation),
        iteration(lambda: energy_distance(theirs(equation, x, TIMES, "midpoint", dt), data), equation),
    ]
    blocks = [
        iteration(lambda: block(features).square().mean(), block),
        iteration(
            lambda: theirs(flat, features.flatten(1), ends, "midpoint", 1 / BLOCK_STEPS)[-1].square().mean(), block
        ),
    ]
    return {"Ornstein–Uhlenbeck": alternate(*fits), "classifier's block": alternate(*blocks, samples=25)}


def draw(shown: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    (found, x, drift, diffusion), curves = shown
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    mean, deviation, _ = exact_moments()
    axes[0, 0].plot(TIMES, found["SDE"][:, :15, 0], color="tab:blue", alpha=0.3, linewidth=0.7)
    axes[0, 0].fill_between(TIMES, mean - 2 * deviation, mean + 2 * deviation, color="black", alpha=0.12)
    axes[0, 0].plot(TIMES, mean, "k--", label="truth, mean ± 2 deviations")
    axes[0, 0].plot(TIMES, moments(found["SDE"])[0], color="tab:blue", label="learned SDE, mean and paths")
    axes[0, 0].set(title="Ornstein–Uhlenbeck, learned from paths", xlabel="t", ylabel="x")
    axes[0, 1].plot(TIMES, deviation, "k--", label="truth")
    for name, colour in (("SDE", "tab:blue"), ("ODE", "tab:orange")):
        axes[0, 1].plot(TIMES, moments(found[name])[1], color=colour, label=f"neural {name}")
    axes[0, 1].set(title="Standard deviation", xlabel="t")
    axes[0, 1].set_ylim(bottom=0)
    axes[0, 2].plot(x, THETA * (MU - x), "k--", label="truth")
    axes[0, 2].plot(x, drift, color="tab:blue", label="learned drift f(x)")
    axes[0, 2].plot(x, SIGMA * torch.ones_like(x), "k:", label="truth")
    axes[0, 2].plot(x, diffusion, color="tab:green", label="learned diffusion g(x)")
    axes[0, 2].set(title="The equation itself", xlabel="x")
    names = {"noise": "noise, deviation", "cover": "covered square, part of the side", "blur": "blurred, times"}
    for axis, (what, strengths) in zip(axes[1], STRENGTHS.items()):
        for kind, curve in curves.items():
            axis.plot(strengths, curve[what], marker="o", label=kind)
        axis.set(title=f"Shapes: {what}", xlabel=names[what], ylabel="accuracy, %", ylim=(10, 102))
    for axis in (*axes[0], axes[1, 0]):
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def verdict(means: dict[str, float]) -> str:
    plain, features, clock, images = (means[f"corrupted, {kind}"] for kind in KINDS)
    return (
        f"The SDE's deviation is off by at most {100 * means['deviation off by, SDE']:.0f}% of the largest, the ODE's"
        f" by {100 * means['deviation off by, ODE']:.0f}%. Of corrupted shapes the deterministic classifier knows"
        f" {plain:.1f}%; noise on its features makes that {features:.1f}%, a random clock {clock:.1f}%, and noise on"
        f" its training images {images:.1f}%."
    )


EXAMPLE = Example(
    name="sde",
    claim='Stochastic equations learn what Neural ODEs cannot, and make a classifier less "overly deterministic"',
    train=train,
    draw=draw,
    speed=speed,
    verdict=verdict,
    rival="torchsde",
)

if __name__ == "__main__":
    EXAMPLE.main()
