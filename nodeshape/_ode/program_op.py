"""The op that solves a program: its shapes and gradients, and one function that calls it.

    solve(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, int[] steps,
          float tolerance, int max_iterations, int adjoint, int kept_per_step, int checkpoint_every,
          float drift_tolerance) -> (Tensor ys, Tensor stages, Tensor evaluations, Tensor residual)
    solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights, ...the same...)
        -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor evaluations)

- ``y0`` ``[batch, ...]``, whose samples have the program's elements; ``weights`` as the program numbers them, of the
  dtype of ``y0``.
- ``program`` and ``constants`` as csrc/program_plan.h reads them; ``tableau`` float64 ``[stages + 2, stages]``: a, b,
  c.
- ``adjoint`` 0 none, 1 discrete, 2 reversible, 3 continuous. ``discrete`` keeps ``kept_per_step`` states per step: one
  of an explicit method, all stages of others. The rest is as in :mod:`nodeshape._ode.fused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.method import METHODS, Method
from nodeshape._ode.program import Program

ADJOINTS = ("none", "discrete", "reversible", "continuous")
MOST_STAGES = 16  # as in csrc/program.h


def tableau_of(method: Method) -> Tensor:
    """a, b and c, float64 ``[stages + 2, stages]``."""
    return _tableaux[method.name] if METHODS.get(method.name) is method else _made(method)


def _made(method: Method) -> Tensor:
    stages = len(method.b)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in (*method.a, method.b, method.c)]
    return torch.tensor(rows, dtype=torch.float64)


_tableaux = {name: _made(method) for name, method in METHODS.items()}  # now, as a tracer's tensors are its own


def solve(
    program: Program,
    weights: list[Tensor],
    y0: Tensor,
    t: Tensor,
    steps: list[int],
    method: Method,
    adjoint: str,
    tolerance: float,
    max_iterations: int,
    checkpoint_every: int | None,
    drift_tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`nodeshape._ode.fused.solve`, of a program."""

    def scheme(recorded: bool) -> tuple[Any, ...]:
        return (
            program.code,
            program.constants,
            tableau_of(method),
            steps,
            tolerance,
            int(max_iterations),
            ADJOINTS.index(adjoint) if recorded else 0,
            1 if method.explicit else len(method.b),
            int(checkpoint_every or 0),
            drift_tolerance,
        )

    return fused.call("solve", y0, t, weights, scheme)


def _stored_rows(steps: Sequence[int], adjoint: int, kept_per_step: int, checkpoint_every: int) -> int:
    if adjoint == 1:
        return sum(steps) * kept_per_step
    return fused.stored_rows(steps, ADJOINTS[adjoint], checkpoint_every)


def _fake(y0: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any) -> Any:
    _, _, _, steps, _, _, adjoint, kept_per_step, checkpoint_every, _ = scheme
    rows = _stored_rows(steps, adjoint, kept_per_step, checkpoint_every)
    batch = y0.shape[0]
    return (
        y0.new_empty((t.shape[0], *y0.shape)),
        y0.new_empty((rows, *y0.shape)),
        y0.new_empty((batch,), dtype=torch.int64),
        y0.new_empty((batch,), dtype=torch.float64),
    )


if fused._missing is None:
    fused.register("solve", _fake)
