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
from nodeshape._ode.method import Method
from nodeshape._ode.program import Program

MOST_STAGES = 16  # as in csrc/program.h
_tableaux: dict[str, tuple[Method, Tensor, int]] = {}


def tableau_of(method: Method) -> tuple[Tensor, int]:
    """a, b and c, float64 ``[stages + 2, stages]``, and the states that ``discrete`` keeps per step."""
    known = _tableaux.get(method.name)
    if known is None or known[0] is not method:
        stages = len(method.b)
        rows = [[*row, *[0.0] * (stages - len(row))] for row in (*method.a, method.b, method.c)]
        tableau = torch.tensor(rows, dtype=torch.float64)
        known = _tableaux[method.name] = method, tableau, 1 if method.explicit else stages
    return known[1:]


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
    tableau, kept_per_step = tableau_of(method)
    before = (program.code, program.constants, tableau, steps, tolerance, int(max_iterations))
    after = (kept_per_step, int(checkpoint_every or 0), drift_tolerance)
    return fused.call("solve", y0, t, weights, before, adjoint, after)


def _stored_rows(steps: Sequence[int], adjoint: int, kept_per_step: int, checkpoint_every: int) -> int:
    rows = fused.stored_rows(steps, adjoint, checkpoint_every)
    return rows * kept_per_step if fused.ADJOINTS[adjoint] == "discrete" else rows


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
