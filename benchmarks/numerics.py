"""Measure what docs/mathematics.md claims: orders, gradients, memory, evaluations. Draws docs/figures/*.png.

python benchmarks/numerics.py [--out docs/figures]
"""

from __future__ import annotations

import argparse
import sys
from math import log2
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import nodeshape as ns

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from nodeshape._benchmarking.memory import STATE_BYTES, bytes_of_training_step

METHODS = ("euler", "implicit_euler", "implicit_midpoint")
ADJOINTS = ("discrete", "reversible", "continuous")
STYLE = {"euler": "o-", "implicit_euler": "s--", "implicit_midpoint": "^-"}
MODES = {"discrete": "o-", "reversible": "s-", "continuous": "^--"}
T = torch.tensor([0.0, 1.0], dtype=torch.float64)


def conv(samples: int = 4, seed: int = 0) -> tuple[ns.ConvDynamics, Tensor]:
    torch.manual_seed(seed)
    return ns.ConvDynamics(8).double(), torch.randn(samples, 8, 8, 8, dtype=torch.float64)


def solve(func: torch.nn.Module, y0: Tensor, method: str, steps: int) -> Tensor:
    with torch.no_grad():
        return ns.odeint(func, y0, T, method=method, steps=steps)[-1]


def converged(func: torch.nn.Module, y0: Tensor) -> Tensor:
    coarse, fine = (solve(func, y0, "implicit_midpoint", n) for n in (800, 1600))
    return fine + (fine - coarse) / 3


def smooth_errors(steps: list[int]) -> dict[str, list[float]]:
    """y' = y (1 − y) cos t, whose solution is known."""
    y0 = torch.tensor([[0.1, 0.8]], dtype=torch.float64)
    growth = torch.exp(torch.sin(torch.tensor(1.0, dtype=torch.float64)))
    exact = y0 * growth / (1 - y0 + y0 * growth)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (1 - y) * torch.cos(t)

    return {
        method: [float((ns.odeint(func, y0, T, method=method, steps=n)[-1] - exact).abs().max()) for n in steps]
        for method in METHODS
    }


def conv_errors(steps: list[int], open_relu: bool) -> dict[str, list[float]]:
    func, y0 = conv()
    if open_relu:  # a bias so large that no ReLU ever closes: the same network without kinks
        for norm in (func.norm1, func.norm2):
            torch.nn.init.constant_(norm.bias, 6.0)
    exact = converged(func, y0)
    size = float(exact.norm())
    return {m: [float((solve(func, y0, m, n) - exact).norm()) / size for n in steps] for m in METHODS}


def print_orders(title: str, errors: dict[str, list[float]]) -> None:
    print(f"\n{title}: order of each halving")
    for method, values in errors.items():
        found = [log2(a / b) for a, b in zip(values, values[1:])]
        mean = sum(found) / len(found)
        print(f"  {method:18}", *(f"{x:5.2f}" for x in found), f"  mean {mean:.2f}, error {values[-1]:.1e}")


def draw_orders(out: Path) -> None:
    steps = [10 * 2**k for k in range(6)]
    panels = {
        "smooth: y' = y(1−y) cos t": smooth_errors(steps),
        "ConvDynamics, every ReLU open": conv_errors(steps, open_relu=True),
        "ConvDynamics, ReLUs switching": conv_errors(steps, open_relu=False),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (title, errors) in zip(axes, panels.items()):
        print_orders(title, errors)
        for k, (method, values) in enumerate(errors.items()):  # the wider line beneath, where two are equal
            axis.loglog(steps, values, STYLE[method], label=method, markersize=8 - 2 * k, linewidth=4 - 1.3 * k)
        for order in (1, 2):
            start = errors["euler" if order == 1 else "implicit_midpoint"][0] * 0.45
            line = [start * (steps[0] / n) ** order for n in steps]
            axis.loglog(steps, line, ":", color="grey", linewidth=1, label="slopes 1, 2" if order == 1 else None)
        axis.set(title=title, xlabel="steps from t=0 to t=1")
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("error")
    axes[0].legend(fontsize=8)
    save(figure, out / "order.png")


def gradient(adjoint: str, method: str, steps: int) -> Tensor:
    torch.manual_seed(0)
    func = ns.MLPDynamics(16, hidden=(32,)).double()
    y0 = torch.randn(8, 16, dtype=torch.float64)
    ys = ns.odeint(func, y0, T, method=method, steps=steps, adjoint=adjoint)
    grads = torch.autograd.grad(ys[-1].square().sum(), tuple(func.parameters()))
    return torch.cat([x.flatten() for x in grads])


def draw_gradients(out: Path) -> None:
    steps = [5, 10, 20, 40, 80, 160]
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    print("\ngradient against discrete (relative), steps", steps)
    for adjoint, line in (("reversible", "-"), ("continuous", "--")):
        for method in METHODS:
            errors = []
            for n in steps:
                exact = gradient("discrete", method, n)
                errors.append(float((gradient(adjoint, method, n) - exact).norm() / exact.norm()))
            print(f"  {adjoint:11} {method:18}", *(f"{x:.1e}" for x in errors))
            k = METHODS.index(method)
            # Some curves are equal: the first drawn are the widest, so that all are seen.
            look = {"color": f"C{k + 3 * (adjoint == 'continuous')}", "marker": STYLE[method][0]}
            look |= {"lw": (6, 3, 1.5)[k], "ms": (10, 6, 4)[k]}
            axis.loglog(steps, errors, line, label=f"{adjoint}, {method}", **look)
    axis.set(xlabel="steps from t=0 to t=1", ylabel="relative distance from the exact gradient")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    save(figure, out / "gradient.png")


def draw_memory(out: Path) -> None:
    steps = [10, 30, 100, 300, 1000]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    print("\npeak bytes of a training step, steps", steps)
    for axis, method in zip(axes, METHODS):
        for adjoint in ADJOINTS:
            peaks = [bytes_of_training_step(method, adjoint, n)[0] for n in steps]
            print(f"  {method:18} {adjoint:11}", *peaks, f"  1000 / 10 steps: {peaks[-1] / peaks[0]:.3f}")
            axis.loglog(steps, [p / STATE_BYTES for p in peaks], MODES[adjoint], label=adjoint, markersize=4)
        axis.set(title=method, xlabel="steps")
    axes[0].set_ylabel("peak memory, in states")
    axes[0].legend(fontsize=8)
    save(figure, out / "memory.png")


def print_evaluations() -> None:
    """ConvDynamics, 20 steps, implicit stages solved to the default tolerance of the dtype."""
    print("\nevaluations of f per sample: forward, backward (products with the Jacobian, and f rebuilt), ratio")
    for dtype in (torch.float32, torch.float64):
        func, y0 = conv()
        func, y0 = func.to(dtype), y0.to(dtype)
        for method in METHODS:
            for adjoint in ADJOINTS:
                ys, stats = ns.odeint(func, y0, T, method=method, steps=20, adjoint=adjoint, return_stats=True)
                ys[-1].square().sum().backward()
                forward, backward = (float(x.double().mean()) for x in (stats.nfe_forward, stats.nfe_backward))
                name = str(dtype).removeprefix("torch.")
                print(f"  {name} {method:18} {adjoint:11} {forward:7.1f} {backward:7.1f} {backward / forward:6.2f}")


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print_evaluations()
    draw_orders(out)
    draw_gradients(out)
    draw_memory(out)
