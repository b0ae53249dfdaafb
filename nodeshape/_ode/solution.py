"""A solved problem's tie to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.implicit import differentiable_gradient
from nodeshape._ode.problem import Problem
from nodeshape._ode.sweep import Sweep


class Solution(torch.autograd.Function):
    """Ties the observations of a solved problem to what they depend on."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, ys: list[Tensor], y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        """Return the observations in ``ys``, a list of one so that autograd takes them for a new tensor."""
        ctx.problem = problem
        ctx.save_for_backward(ys[0], y0, t, *parameters)
        return ys[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sweep backwards in the problem's gradient mode."""
        problem: Problem = ctx.problem
        ys, y0, t, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in (y0, t, *parameters)):
            if problem.adjoint != "discrete":
                raise RuntimeError(
                    f"adjoint={problem.adjoint!r} has no second derivatives (backward with create_graph=True):"
                    " use adjoint='discrete'"
                )
            return None, None, *differentiable_gradient(problem, y0, t, parameters, grads[0])
        sweep = Sweep(problem, with_time=ctx.needs_input_grad[3])
        to_y0 = sweep.run(ys, grads[0])
        to_t = torch.tensor(sweep.to_times, dtype=t.dtype, device=t.device) if ctx.needs_input_grad[3] else None
        return None, None, to_y0, to_t, *sweep.to_parameters
