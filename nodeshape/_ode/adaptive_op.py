"""The op that solves a program under error control, on the CPU and in eager mode, and one function that calls it.

    solve_adaptive(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, float rtol,
                   float atol, float first_step, float min_step, float max_step, float safety, float grow, float shrink,
                   int order, int most_attempts, bool record)
        -> (Tensor ys, Tensor states, Tensor spans, Tensor before, Tensor last, Tensor counts, Tensor outcomes,
            Tensor failures)
    solve_adaptive_backward(Tensor grad_ys, Tensor states, Tensor spans, Tensor before, Tensor last, Tensor t,
                            Tensor[] weights, Tensor program, Tensor constants, Tensor tableau)
        -> (Tensor grad_y0, Tensor[] grad_weights, Tensor evaluations)

- Every sample takes its own steps. What has a name of ``solve`` is as there (:mod:`nodeshape._ode.program_op`).
- ``tableau`` is float64 ``[stages + 7, stages]``: behind a, b and c the weights of the error, and those of dense output
  for x, x², x³ and x⁴; its last stage is the slope at the end of a step.
- ``states`` ``[steps, elements]``, ``spans`` ``[steps, 2]`` (start and end) and ``before`` ``[steps]`` (the sample's
  step before it, or -1) are the accepted steps of all samples, ``last`` ``[samples]`` each one's last; there are none
  without ``record``. ``counts`` ``[3, samples]``: accepted, rejected, evaluations.
- ``outcomes`` ``[samples]``: of csrc/control.h; ``failures`` ``[samples, 2]``: the time such a sample did not get past,
  and its error in units of the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.control import Controller, no_further, not_finite, samples_failed
from nodeshape._ode.method import METHODS, Method
from nodeshape._ode.program import Program, nobodys
from nodeshape._ode.program_op import below_autograd, no_second_derivative, translated
from nodeshape._ode.step import interpolant

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


with nobodys():
    _embedded = {name: _embedded_of(method) for name, method in METHODS.items() if method.explicit and method.error}


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
        ys, *_, counts, outcomes, failures = below_autograd(op, y0, t, weights, *scheme, *steps, False)
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
        ys, states, spans, before, last, *rest = below_autograd(op, y0, t, weights, *scheme, *steps, True)
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
            op = partial(below_autograd, op)
        states, spans, before, last, t, *weights = ctx.saved_tensors  # once, as torch.utils.checkpoint insists
        try:
            grad_y0, grad_weights, evaluations = op(grad_ys, states, spans, before, last, t, weights, *ctx.scheme)
        except RuntimeError as error:
            raise translated(error) from None
        ctx.counts.copy_(evaluations)
        grads = (None, None, None, grad_y0, None, *grad_weights)
        return tuple(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad))


if fused._missing is None:
    torch.library.register_autograd("nodeshape::solve_adaptive_backward", no_second_derivative)
