"""What the tests of the fused solver compare it with: the plain PyTorch loop in float64."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._ode import fused

METHODS = ("euler", "implicit_euler", "implicit_midpoint")
ADJOINTS = ("discrete", "reversible", "continuous")
#: With ``--cuda-on-host``: the machine that the CUDA kernels' build for the CPU is to play, as if it were the only one.
ON_HOST = os.environ.get("NODESHAPE_TEST_ISAS", "").split()


def instruction_sets() -> list[str]:
    """The instruction sets this machine can run."""
    if fused._missing or ON_HOST:
        return ON_HOST
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for isa in ("avx512", "avx2", "portable"):
            patch.setenv("NODESHAPE_ISA", isa)
            try:
                ns.odeint(ns.MLPDynamics(1, ()), torch.zeros(1, 1), [0.0, 1.0], method="euler", steps=1)
            except RuntimeError:
                continue
            found.append(isa)
    return found


def most_threads() -> int:
    """The most threads that shared a fused solve's work since the last call."""
    return ctypes.CDLL(str(fused._LIBRARY)).nodeshape_most_threads()


def pairwise(*axes: Sequence[object]) -> list[object]:
    """The product of the axes, as pytest's parameters.

    Slow tests are those that are not needed for each value to meet once each value of every other axis.
    """
    rows = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing, needed = set().union(*pairs.values()), set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        needed.add(best)
        missing -= pairs[best]
    return [
        pytest.param(*(axis[i] for axis, i in zip(axes, row)), marks=[] if row in needed else pytest.mark.slow)
        for row in rows
    ]


@dataclass
class Result:
    """A solve and the gradient of a fixed random projection of it."""

    ys: Tensor
    y0: Tensor
    t: Tensor
    parameters: Tensor  # all of them, flat

    def distance(self, other: Result) -> tuple[float, float, float, float]:
        """Relative distances of the four, in the order above."""
        pairs = ((self.ys, other.ys), (self.y0, other.y0), (self.t, other.t), (self.parameters, other.parameters))
        return tuple(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


def random_conv(channels: int) -> ns.ConvDynamics:
    f = ns.ConvDynamics(channels)
    for x in f.parameters():
        if x.dim() == 1:
            nn.init.normal_(x, 0.3, 0.5)
    return f


def solve(f: nn.Module, y0: Tensor, t: Tensor, *, fused: bool, dtype: torch.dtype, **arguments: object) -> Result:
    """Solve and differentiate in ``dtype``, by the fused kernel or by the plain loop."""
    f = deepcopy(f).to(dtype)
    y0 = y0.detach().to(dtype).requires_grad_()
    t = t.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODESHAPE_FUSED", "1" if fused else "0")
        assert ns.backend(f, y0, **arguments).name == ("fused" if fused else "plain")
        ys = ns.odeint(f, y0, t, **arguments)
        weights = torch.randn(ys.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (ys * weights.to(dtype)).sum().backward()
    return Result(ys.detach(), y0.grad, t.grad, torch.cat([x.grad.flatten() for x in f.parameters()]))
