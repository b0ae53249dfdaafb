"""Problems and references shared by the tests of the solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2

import torch
from torch import Tensor, nn

import nodeshape as ns

THETA = {"euler": 0.0, "implicit_euler": 1.0, "implicit_midpoint": 0.5}
ORDER = {"euler": 1, "implicit_euler": 1, "implicit_midpoint": 2}
METHODS = tuple(THETA)
EXACT_ADJOINTS = ("discrete", "reversible")
ADJOINTS = (*EXACT_ADJOINTS, "continuous")


class HandWritten(nn.Module):
    """A dynamics that nodeshape has never heard of: a damped, driven oscillator with a learned coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.randn(3, 3))
        self.damping = nn.Parameter(torch.tensor(0.3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y @ self.coupling + t) - self.damping * y * t


def dynamics_and_state(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    func, y0 = {
        "mlp": lambda: (ns.MLPDynamics(3, hidden=(5,)), torch.randn(2, 3)),
        "conv": lambda: (ns.ConvDynamics(4), torch.randn(2, 4, 3, 3)),
        "hand-written": lambda: (HandWritten(), torch.randn(2, 3)),
    }[kind]()
    return func.to(dtype), y0.to(dtype).requires_grad_()


def unrolled(func: Callable[[Tensor, Tensor], Tensor], y: Tensor, t: Tensor, method: str, steps: int) -> Tensor:
    """The solve as autograd sees it: plain fixed-point iteration to convergence, every operation recorded."""
    theta = THETA[method]
    ys = [y]
    for start, end in zip(t, t[1:]):
        h = (end - start) / steps
        for k in range(steps):
            time = start + (k + theta) * h
            stage = y
            for _ in range(40 if theta else 0):
                stage = y + theta * h * func(time, stage)
            y = y + h * func(time, stage)
        ys.append(y)
    return torch.stack(ys)


def gradients(ys: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss that weighs every entry of every observation differently."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(ys.shape, generator=generator, dtype=torch.float64).to(ys.dtype)
    return list(torch.autograd.grad((ys * weights).sum() + 0.5 * (ys * ys).sum(), inputs))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor of the list, in the maximum norm.

    A tensor that is zero but for rounding (a gradient the network is invariant to) is held against the others.
    """
    with torch.no_grad():
        sizes = [float(b.abs().max()) for b in expected]
        return max(float((a - b).abs().max()) / max(size, 1e-3 * max(sizes)) for a, b, size in zip(found, expected, sizes))


def orders(errors: Sequence[float]) -> list[float]:
    """The observed order of each halving of the step."""
    return [log2(a / b) for a, b in zip(errors, errors[1:])]
