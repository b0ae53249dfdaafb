"""The solve as an ordinary differentiable computation, for derivatives of any order.

A stage is a function of its base, c and whatever f depends on; its derivative, by the implicit function theorem, solves
an equation of the same kind. So the stage is an autograd function whose backward pass calls itself. The solve built of
such stages is what second derivatives go through; it keeps the graph of one evaluation of f a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nodeshape._march import StageSolver
from nodeshape._system import Time, jacobian_by_rows

if TYPE_CHECKING:
    from nodeshape._solve import Problem

#: F(rows, *inputs): everything F's value depends on and that may require grad is among the inputs.
Differentiable = Callable[..., Tensor]


def differentiable_gradient(
    problem: Problem, y0: Tensor, t: Tensor, parameters: Sequence[Tensor], grads: Tensor
) -> list[Tensor | None]:
    """The ``discrete`` gradient with a graph of its own: the recorded steps replayed as differentiable stages."""
    inputs = [x for x in (y0, t, *parameters) if x.requires_grad]
    ys = _replay(problem, y0, t, parameters)
    found = iter(torch.autograd.grad(ys, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in (y0, t, *parameters)]


def _replay(problem: Problem, y: Tensor, t: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    system, theta = problem.system, problem.method.theta

    def slope(rows: Tensor, time: Tensor, *parameters: Tensor) -> Tensor:
        return system(time, rows)

    ys = [y]
    for j, steps in enumerate(problem.record):
        start, end = problem.times[j : j + 2]
        length = t[j + 1] - t[j]
        for step in steps:
            h = (length * (step.h / (end - start))).to(y)
            time = (t[j] + length * ((step.t - start) / (end - start))).to(y) + theta * h
            factor = h[:, None] if h.dim() else h
            stage = y
            if not problem.method.explicit:
                where = (step.t, step.h)
                stage = differentiable_stage(slope, problem.solver, where, y, theta * factor, time, *parameters)
            following = y + factor * slope(stage, time)
            y = torch.where(factor != 0, following, y) if h.dim() else following
        ys.append(y)
    return torch.stack(ys)


def differentiable_stage(
    function: Differentiable, solver: StageSolver, where: tuple[Time, Time], base: Tensor, c: Tensor, *inputs: Tensor
) -> Tensor:
    """Solve Y = base + c F(Y, *inputs), differentiably in ``base``, ``c`` and the inputs, as often as F is.

    ``c`` is a scalar or ``[samples, 1]``; ``where`` is the step's start and size, for the error message.
    """
    result: Tensor = _Stage.apply(function, solver, where, base, c, *inputs)
    return result


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Differentiable,
        solver: StageSolver,
        where: tuple[Time, Time],
        base: Tensor,
        c: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        def field(rows: Tensor) -> Tensor:
            return function(rows, *inputs)

        stage = solver.solve(field, lambda rows: jacobian_by_rows(field, rows), base, c.reshape(-1), base)
        solver.check(stage, *where, "differentiated")
        ctx.function, ctx.solver, ctx.where = function, solver, where
        ctx.save_for_backward(c, stage.value, *inputs)
        return stage.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        function = ctx.function
        c, y, *inputs = ctx.saved_tensors

        def transposed(w: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
            with torch.enable_grad():
                point = y if y.requires_grad else y.detach().requires_grad_()
                value = function(point, *inputs)
                if not value.requires_grad:
                    return torch.zeros_like(w)
                product = torch.autograd.grad(value, point, w, create_graph=True, allow_unused=True)[0]
            return torch.zeros_like(w) if product is None else product

        w = differentiable_stage(transposed, ctx.solver, ctx.where, grad, c, y, *inputs)
        with torch.enable_grad():
            value = function(y, *inputs)
            wanted = [x for x in inputs if x.requires_grad]
            products: list[Tensor | None] = [None] * len(wanted)
            if wanted and value.requires_grad:
                products = list(torch.autograd.grad(value, wanted, c * w, create_graph=True, allow_unused=True))
            to_c = (w * value).sum_to_size(c.shape) if c.requires_grad else None
        by_input = iter(products)
        return (None, None, None, w, to_c, *(next(by_input) if x.requires_grad else None for x in inputs))
