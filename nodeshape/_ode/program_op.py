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

ADJOINTS = ("none", "discrete", "reversible", "continuous")
MOST_STAGES = 16  # as in csrc/program.h
_tableaux: dict[str, tuple[Method, Tensor]] = {}


def tableau_of(method: Method) -> Tensor:
    """a, b and c, float64 ``[stages + 2, stages]``."""
    known = _tableaux.get(method.name)
    if known is not None and known[0] is method:
        return known[1]
    stages = len(method.b)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in (*method.a, method.b, method.c)]
    tableau = torch.tensor(rows, dtype=torch.float64)
    _tableaux[method.name] = method, tableau
    return tableau


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
    if not (t.is_cpu and (t.dtype == torch.float32 or t.dtype == torch.float64)):
        t = t.to(device="cpu", dtype=torch.float64)
    recorded = torch.is_grad_enabled() and (
        y0.requires_grad or t.requires_grad or any(x.requires_grad for x in weights)
    )
    scheme = (
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
    op = torch.ops.nodeshape.solve.default
    try:
        if torch.compiler.is_compiling():
            ys, _, forward, residual = op(y0, t, weights, *scheme)
        elif recorded:
            ys, _, forward, residual = fused._Recorded.apply("solve", scheme, y0, t, *weights)
        else:
            ys, _, forward, residual = fused._below_autograd(op, y0, t, weights, *scheme)
    except RuntimeError as error:
        raise fused._translated(error) from None
    return ys, forward, residual


def _stored_rows(steps: Sequence[int], adjoint: int, kept_per_step: int, checkpoint_every: int) -> int:
    if adjoint == 1:
        return sum(steps) * kept_per_step
    return fused._stored_rows(steps, ADJOINTS[adjoint], checkpoint_every)


def _register() -> None:
    library = torch.library

    def fake(y0: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any) -> Any:
        _, _, _, steps, _, _, adjoint, kept_per_step, checkpoint_every, _ = scheme
        rows = _stored_rows(steps, adjoint, kept_per_step, checkpoint_every)
        batch = y0.shape[0]
        return (
            y0.new_empty((t.shape[0], *y0.shape)),
            y0.new_empty((rows, *y0.shape)),
            y0.new_empty((batch,), dtype=torch.int64),
            y0.new_empty((batch,), dtype=torch.float64),
        )

    def fake_backward(
        grad_ys: Tensor, ys: Tensor, stages: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any
    ) -> Any:
        return fused._fake_backward(ys, t, weights)

    def backward(ctx: Any, grad_ys: Tensor, *_: Any) -> tuple[Any, ...]:
        op = torch.ops.nodeshape.solve_backward
        grad_y0, grad_t, grad_weights = fused._gradient(ctx, op, grad_ys, timed=ctx.needs_input_grad[1])
        # An empty list of steps passes for a list of tensors, whose gradient is a list.
        return grad_y0, grad_t, grad_weights, *([] if isinstance(x, list) and not x else None for x in ctx.scheme)

    library.register_fake("nodeshape::solve", fake)
    library.register_fake("nodeshape::solve_backward", fake_backward)
    library.register_autograd("nodeshape::solve", backward, setup_context=fused._setup_context)
    library.register_autograd("nodeshape::solve_backward", fused._no_second_derivative)


if fused._missing is None:
    _register()
