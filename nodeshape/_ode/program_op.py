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
    solve_adaptive(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, float rtol,
                   float atol, float first_step, float min_step, float max_step, float safety, float grow, float shrink,
                   int order, int most_attempts, bool record)
        -> (Tensor ys, Tensor states, Tensor spans, Tensor before, Tensor last, Tensor counts, Tensor outcomes,
            Tensor failures)
    solve_adaptive_backward(Tensor grad_ys, Tensor states, Tensor spans, Tensor before, Tensor last, Tensor t,
                            Tensor[] weights, Tensor program, Tensor constants, Tensor tableau)
        -> (Tensor grad_y0, Tensor[] grad_weights, Tensor evaluations)

- ``adjoint`` 0 none, 1 discrete, 2 reversible, 3 continuous. ``discrete`` keeps ``kept_per_step`` states per step: one
  of an explicit method, all stages of others. With 0 the kernels choose: they keep that, or what the backward
  pass reads of every evaluation, ``[elements]``, so that none is made again (with -1 wherever they can); ``grad_t`` is
  then NaN unless that includes the slopes. The rest is as in :mod:`nodeshape._ode.fused`.
- Under error control every sample takes its own steps, on the CPU, in eager mode. ``tableau`` is float64
  ``[stages + 7, stages]``: behind a, b and c the weights of the error, and those of dense output for x, x², x³ and x⁴;
  its last stage is the slope at the end of a step. ``states`` ``[steps, elements]``, ``spans`` ``[steps, 2]`` (start
  and end) and ``before`` ``[steps]`` (the sample's step before it, or -1) are the accepted steps of all samples,
  ``last`` ``[samples]`` each one's last; there are none without ``record``. ``counts`` ``[3, samples]``: accepted,
  rejected, evaluations. ``outcomes`` ``[samples]``: of csrc/control.h; ``failures`` ``[samples, 2]``:
  the time such a sample did not get past, and its error in units of the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.control import Controller, no_further, not_finite, samples_failed
from nodeshape._ode.method import METHODS, Method
from nodeshape._ode.program import Program
from nodeshape._ode.step import interpolant

MOST_STAGES = 16  # as in csrc/program.h


def tableau_of(method: Method) -> tuple[Tensor, int]:
    """a, b and c, float64 ``[stages + 2, stages]``, and the states that ``discrete`` keeps per step."""
    return _tableaux[method.name] if METHODS.get(method.name) is method else _made(method)


def _made(method: Method) -> tuple[Tensor, int]:
    stages = len(method.b)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in (*method.a, method.b, method.c)]
    return torch.tensor(rows, dtype=torch.float64), 1 if method.explicit else stages


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
    tableau, kept_per_step = tableau_of(method)
    if not (torch.compiler.is_compiling() or t.requires_grad):
        kept_per_step = 0
    before = (program.code, program.constants, tableau, steps, tolerance, int(max_iterations))
    after = (kept_per_step, int(checkpoint_every or 0), drift_tolerance)
    return fused.call("solve", y0, t, weights, before, adjoint, after)


#: Of csrc/control.h's outcomes of a sample.
TOO_MANY_ATTEMPTS, NOT_FINITE = 1, 3


@dataclass(frozen=True)
class Adaptive:
    """A solution under error control, and what it took.

    Attributes:
        ys: ``[times, *y0.shape]``.
        accepted, rejected, evaluations: int64 ``[samples]``.
        backward_evaluations: the same of the backward pass, zero until it has run.
        failures: why a sample failed, by its number.
    """

    ys: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    backward_evaluations: Tensor
    failures: dict[int, str]


def _embedded_of(method: Method) -> Tensor:
    """a, b, c, error and dense output as the op takes them, the slope at the end of a step as the last stage."""
    more = 0 if method.ends_with_slope else 1
    stages = len(method.b) + more
    a = [[*row, *[0.0] * (stages - len(row))] for row in method.a]
    b, c, error = ([*row, *[0.0] * more] for row in (method.b, method.c, method.error))
    if more:
        a.append(list(b))
        c[-1] = 1.0
    dense = []
    for *row, start, stop in interpolant(method):
        row += [0.0] * more
        row[0] += start
        row[-1] += stop
        dense.append(row)
    return torch.tensor([*a, b, c, error, *dense], dtype=torch.float64)


_embedded = {
    name: _embedded_of(method) for name, method in METHODS.items() if method.explicit and method.error
}  # now, as a tracer's tensors are its own


def solve_adaptive(
    program: Program,
    weights: list[Tensor],
    y0: Tensor,
    t: Tensor,
    method: Method,
    control: Controller,
    most_attempts: int,
    on_failure: str,
) -> Adaptive:
    """Solve from ``t[0]`` through all of ``t``, every sample in steps of its own.

    Args:
        program: of f.
        weights: as the program numbers them.
        y0: ``[batch, ...]``.
        t: at least two times, float32 or float64 on the CPU.
        method: explicit, with an estimate of its error, its first stage the slope at the start.
        control: of the steps, its tolerances numbers.
        most_attempts: of a sample between two observations that its steps end at.
        on_failure: ``"raise"``, or ``"nan"`` for NaN where a sample failed.

    Raises:
        StepSizeError: a sample failed and ``on_failure`` is ``"raise"``.
    """
    scheme = (program.code, program.constants, _embedded[method.name])
    steps = (
        *(float(control.rtol), float(control.atol), float(control.first_step or 0.0), control.min_step),
        *(min(control.max_step, 1e300), control.safety, control.grow, control.shrink, control.order, most_attempts),
    )
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (y0, *weights))
    backward = torch.zeros(y0.shape[0], dtype=torch.int64)
    if recorded:
        ys, counts, outcomes, failures = _AdaptiveRecorded.apply(scheme, steps, backward, y0, t, *weights)
    else:
        op = torch.ops.nodeshape.solve_adaptive.default
        ys, *_, counts, outcomes, failures = fused._below_autograd(op, y0, t, weights, *scheme, *steps, False)
    accepted, rejected, evaluations = counts
    reasons: dict[int, str] = {}
    if outcomes.any():
        for k in outcomes.nonzero()[:, 0].tolist():
            where, ratio = failures[k].tolist()
            if outcomes[k] == NOT_FINITE:
                reasons[k] = not_finite(k, where)
            else:
                reasons[k] = no_further(k, where, ratio, most_attempts if outcomes[k] == TOO_MANY_ATTEMPTS else None)
        if on_failure == "raise":
            raise samples_failed(reasons, y0.shape[0])
    return Adaptive(ys, accepted, rejected, evaluations, backward, reasons)


class _AdaptiveRecorded(torch.autograd.Function):
    """``solve_adaptive`` and its gradient for the steps that were taken."""

    @staticmethod
    def forward(ctx: Any, scheme: Any, steps: Any, counts: Tensor, y0: Tensor, t: Tensor, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        op = torch.ops.nodeshape.solve_adaptive.default
        ys, states, spans, before, last, *rest = fused._below_autograd(op, y0, t, weights, *scheme, *steps, True)
        ctx.scheme, ctx.counts = scheme, counts
        ctx.save_for_backward(states, spans, before, last, t.clone(), *weights)
        ctx.mark_non_differentiable(*rest)
        return ys, *rest

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_ys is None:
            return (None,) * len(ctx.needs_input_grad)
        op: Any = torch.ops.nodeshape.solve_adaptive_backward.default
        if not torch.is_grad_enabled():  # with create_graph the op records that it cannot be differentiated
            op = partial(fused._below_autograd, op)
        states, spans, before, last, t, *weights = ctx.saved_tensors  # once, as torch.utils.checkpoint insists
        try:
            grad_y0, grad_weights, evaluations = op(grad_ys, states, spans, before, last, t, weights, *ctx.scheme)
        except RuntimeError as error:
            raise fused._translated(error) from None
        ctx.counts.copy_(evaluations)
        grads = (None, None, None, grad_y0, None, *grad_weights)
        return tuple(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad))


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
    torch.library.register_autograd("nodeshape::solve_adaptive_backward", fused._no_second_derivative)
