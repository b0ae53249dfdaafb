"""Stochastic equations in the kernel: the steps along a path are those of an ODE that the path drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._ode.fuse import Fused, fuse
from nodeshape._ode.odeint import odeint
from nodeshape._ode.sde_method import check_noise
from nodeshape._ode.surroundings import modules_of

#: Most steps of one call of the kernel, and most numbers of all changes of W in them, which are part of its state.
MOST_STEPS, MOST_NUMBERS = 16, 64
#: Methods that take f and g at the same places, before the step's end, and their names for the driven ODE.
DRIVEN_METHODS = {"euler_maruyama": "euler", "midpoint": "midpoint"}

#: Held while a thread's steps are those of a program.
_edges = RLock()


class _Driven(nn.Module):
    """dy/dt = f(t, y) + g(t, y) ΔW/h, with the ΔW/h of the step that t is in.

    The state is ``(y, rates)`` with the rates ΔW/h of all steps, ``[batch, steps, numbers of each]``, which stay as
    they are.

    Attributes:
        numbers: of ΔW in each step.
        edges: between the steps, a little before each begins, ``[steps + 1]``.
    """

    edges: Tensor

    def __init__(self, f: Any, g: Any, general: bool, rates: Tensor) -> None:
        super().__init__()
        self.owners = nn.ModuleList(modules_of((f, g)))  # whose weights are trained
        self.f, self.g, self.general, self.numbers = f, g, general, rates.shape[2]
        self.register_buffer("edges", torch.arange(rates.shape[1] + 1, dtype=rates.dtype, device=rates.device))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, rates = state
        rate = rates[:, 0]
        if rates.shape[1] > 1:
            now = ((t >= self.edges[:-1]) & (t < self.edges[1:])).to(y.dtype)
            rate = (rates * now[:, None]).sum(dim=1)
        g = self.g(t, y)
        if self.general:
            drive = (g * rate.reshape(-1, *(1,) * (y.dim() - 1), rate.shape[-1])).sum(dim=-1)
        else:
            drive = g * rate.reshape(-1, *y.shape[1:])
        return self.f(t, y) + drive, torch.zeros_like(rates)


class FusedTerm:
    """f or g of :func:`fuse_sde`: calls the function it was made of; :func:`sdeint` knows both by their program.

    Attributes:
        func: the function.
        program: of both terms, driven.
        general: whether the noise is.
        like: shape of a sample and dtype that it was made for.
    """

    def __init__(self, func: Callable[..., Any], program: Fused, general: bool, y0: Tensor) -> None:
        self.func, self.program, self.general = func, program, general
        self.like = y0.shape[1:], y0.dtype

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.func(t, y)


def fuse_sde(f: Any, g: Any, y0: Tensor, *, noise: str = "diagonal") -> tuple[FusedTerm, FusedTerm]:
    """Make one program of f and g, so that :func:`sdeint` takes its steps in the C++ kernel.

    ``f, g = ns.fuse_sde(f, g, y0)`` are the same functions as before, which train and may be called; a solve by
    ``"euler_maruyama"`` or ``"midpoint"`` of states like ``y0`` goes through the kernel, all others through the loop.
    Along a path these methods take the very steps that ``"euler"`` and ``"midpoint"`` take of
    dy/dt = f(t, y) + g(t, y) ΔW/h, with ΔW of the step that t is in, and that is an ODE which :func:`fuse` lowers.
    The kernel has first derivatives; for second ones solve with the functions that f and g were made of.

    Args:
        f, g: as for :func:`sdeint`: modules, or methods of modules.
        y0: says what a sample looks like, ``[batch, ...]``; any batch will do later.
        noise: ``"diagonal"`` or ``"general"``.

    Returns:
        f and g.

    Raises:
        FuseError: an operation of f or g does not lower; it names its file and line, and what to write instead.
        TypeError, ValueError: an argument is out of its range, or f or g returns what :func:`sdeint` does not take.
    """
    if not isinstance(y0, Tensor) or y0.dim() < 2:
        raise ValueError(
            "fuse_sde takes states of one tensor [batch, ...]: give such a y0, or leave f and g as they are"
        )
    if noise not in ("diagonal", "general"):
        raise ValueError(f"noise must be 'diagonal' or 'general', got {noise!r}")
    general = noise == "general"
    with torch.no_grad():
        time, one = torch.zeros((), dtype=y0.dtype, device=y0.device), y0[:1].detach()
        drift, diffusion = f(time, one.clone()), g(time, one.clone())  # which may work in place
    check_noise(diffusion, one, general)
    if getattr(drift, "shape", None) != one.shape:
        got = tuple(drift.shape) if isinstance(drift, Tensor) else type(drift).__name__
        raise ValueError(f"f must return the shape of its state: it got {tuple(one.shape)} and returned {got}")
    numbers = diffusion.shape[-1] if general else one.numel()
    steps = max(1, min(MOST_STEPS, MOST_NUMBERS // max(numbers, 1)))
    rates = torch.zeros(len(y0), steps, numbers, dtype=y0.dtype, device=y0.device)
    program = fuse(_Driven(f, g, general, rates), (y0.detach(), rates))
    return FusedTerm(f, program, general, y0), FusedTerm(g, program, general, y0)


fuse_sde.__module__ = "nodeshape"


def program_of(f: Any, g: Any, method: str, noise: str, y0: Any) -> Fused | None:
    """The program that takes a solve's steps, forward in time, if there is one."""
    if not isinstance(f, FusedTerm) or not isinstance(g, FusedTerm) or f.program is not g.program:
        return None
    fits = isinstance(y0, Tensor) and y0.dim() >= 2 and (y0.shape[1:], y0.dtype) == f.like
    return f.program if fits and method in DRIVEN_METHODS and f.general == (noise == "general") else None


def driven_steps(
    program: Fused, method: str, y: Tensor, grid: Sequence[float], increment: Callable[[float, float], Tensor]
) -> Tensor:
    """The states at all points of an increasing grid, ``[points, *y.shape]``."""
    states = [y[None]]
    driven: Any = program.func
    most = len(driven.edges) - 1
    for first in range(0, len(grid) - 1, most):
        points = grid[first : first + most + 1]
        sizes = [b - a for a, b in pairwise(points)]
        changes = torch.stack([increment(a, b) for a, b in pairwise(points)], dim=1).flatten(2)
        if changes.shape[2] != driven.numbers:
            raise ValueError(f"g returns {driven.numbers} columns, but the path is of {changes.shape[2]}")
        rates = changes / torch.tensor(sizes, dtype=y.dtype, device=y.device)[:, None]
        rates = nn.functional.pad(rates, (0, 0, 0, most - len(sizes)))
        before = [points[0] - sizes[0], *(b - 0.25 * (b - a) for a, b in pairwise(points[:-1])), points[-1]]
        marks = before + [before[-1]] * (most + 1 - len(before))
        with _edges:
            driven.edges = torch.tensor(marks, dtype=y.dtype, device=y.device)  # the backward pass has the old one
            found, _ = odeint(program, (y, rates), points, method=DRIVEN_METHODS[method], steps=1)
        states.append(found[1:])
        y = found[-1]
    return torch.cat(states)
