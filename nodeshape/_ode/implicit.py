"""A stage as an ordinary differentiable computation, for derivatives of any order.

A stage is a function of its base, c and whatever f depends on; its derivative, by the implicit function theorem, solves
an equation of the same kind. So the stage is an autograd function whose backward pass calls itself, and so is the
vector–Jacobian product in it. Second derivatives of a solve go through such stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.graph import jacobian_by_rows
from nodeshape._ode.stage import StageSolver, Time

#: F(rows, *passed). What else F's value depends on and that requires grad is listed beside it, as ``closed``.
Differentiable = Callable[..., Tensor]


def differentiable_stage(
    function: Differentiable,
    solver: StageSolver,
    where: tuple[Time, Time],
    base: Tensor,
    c: Tensor,
    passed: Sequence[Tensor],
    closed: Sequence[Tensor],
) -> Tensor:
    """Solve Y = base + c F(Y, *passed), differentiably in every tensor given, as often as F is.

    ``c`` is a scalar or ``[samples, 1]``; ``where`` is the step's start and size, for the error message.
    """
    arguments = (function, solver, where, len(passed), base, c, *passed, *closed)
    result: Tensor = _Stage.apply(*arguments)
    return result


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Differentiable,
        solver: StageSolver,
        where: tuple[Time, Time],
        count: int,
        base: Tensor,
        c: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        def field(rows: Tensor) -> Tensor:
            return function(rows, *inputs[:count])

        stage = solver.solve(field, lambda rows: jacobian_by_rows(field, rows), base, c.reshape(-1), base)
        solver.check(stage, *where, "differentiated")
        ctx.function, ctx.solver, ctx.where, ctx.count = function, solver, where, count
        ctx.save_for_backward(c, stage.value, *inputs)
        return stage.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        c, y, *inputs = ctx.saved_tensors
        passed, closed = (y, *inputs[: ctx.count]), inputs[ctx.count :]

        def transposed(w: Tensor, *passed: Tensor) -> Tensor:
            return products_of(ctx.function, w, passed, closed)[0]

        w = differentiable_stage(transposed, ctx.solver, ctx.where, grads[0], c, passed, closed)
        to_c = (w * ctx.function(*passed)).sum_to_size(c.shape) if ctx.needs_input_grad[5] else None
        return (None, None, None, None, w, to_c, *products_of(ctx.function, c * w, passed, closed)[1:])


def products_of(
    function: Differentiable, w: Tensor, passed: Sequence[Tensor], closed: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """(∂F/∂x)ᵀ w for each x passed and closed over, all taken for independent, as often differentiable as F is."""
    products: tuple[Tensor, ...] = _Products.apply(function, len(passed), w, *passed, *closed)
    return products


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Differentiable, count: int, w: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(w, *inputs)
        passed = [
            x.detach().requires_grad_() for x in inputs[:count]
        ]  # what they were computed from is not F's concern
        with torch.enable_grad():
            return tuple(x.detach() for x in _graphed_products(function, w, passed, inputs[count:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w, *inputs = ctx.saved_tensors
        count, closed = ctx.count, inputs[ctx.count :]

        def paired(w: Tensor, *others: Tensor) -> Tensor:
            passed, cotangents = others[:count], others[count:]
            products = _graphed_products(ctx.function, w, passed, closed)
            return torch.stack([(x * y).sum() for x, y in zip(products, cotangents)]).sum()

        arguments = (w, *inputs[:count], *grads)
        found = products_of(paired, torch.ones_like(w.sum()), arguments, closed)
        return None, None, *found[: 1 + count], *found[len(arguments) :]


def _graphed_products(
    function: Differentiable, w: Tensor, passed: Sequence[Tensor], closed: Sequence[Tensor]
) -> list[Tensor]:
    inputs = [*passed, *closed]
    value = function(*passed)
    wanted = [x for x in inputs if x.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if value.requires_grad:
        found = torch.autograd.grad(value, wanted, w, create_graph=True, allow_unused=True)
    by_input = iter(found)
    products = (next(by_input) if x.requires_grad else None for x in inputs)
    return [torch.zeros_like(x) if product is None else product for x, product in zip(inputs, products)]
