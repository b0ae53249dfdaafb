"""The solve as an ordinary differentiable computation, for derivatives of any order.

A stage is a function of its base, c and whatever f depends on; its derivative, by the implicit function theorem, solves
an equation of the same kind. So the stage is an autograd function whose backward pass calls itself. The solve built of
such stages is what second derivatives go through; it keeps the graph of one evaluation of f a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nodeshape._march import StageSolver

#: F(rows, *inputs): everything F's value depends on and that may require grad is among the inputs.
Differentiable = Callable[..., Tensor]


def differentiable_stage(
    function: Differentiable, solver: StageSolver, base: Tensor, c: Tensor, *inputs: Tensor
) -> Tensor:
    """Solve Y = base + c F(Y, *inputs), differentiably in ``base``, ``c`` and the inputs, as often as F is.

    ``c`` is a scalar or ``[samples, 1]``.
    """
    result: Tensor = _Stage.apply(function, solver, base, c, *inputs)
    return result


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Differentiable, solver: StageSolver, base: Tensor, c: Tensor, *inputs: Tensor
    ) -> Tensor:
        stage = solver.solve(lambda rows: function(rows, *inputs), None, base, c.reshape(-1), base)
        solver.check(stage, float("nan"), float("nan"), "differentiated")
        ctx.function, ctx.solver = function, solver
        ctx.save_for_backward(base, c, stage.value, *inputs)
        return stage.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        function, solver = ctx.function, ctx.solver
        base, c, y, *inputs = ctx.saved_tensors

        def transposed(w: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
            with torch.enable_grad():
                point = y if y.requires_grad else y.detach().requires_grad_()
                value = function(point, *inputs)
                if not value.requires_grad:
                    return torch.zeros_like(w)
                product = torch.autograd.grad(value, point, w, create_graph=True, allow_unused=True)[0]
            return torch.zeros_like(w) if product is None else product

        w = differentiable_stage(transposed, solver, grad, c, y, *inputs)
        with torch.enable_grad():
            value = function(y, *inputs)
            wanted = [x for x in inputs if x.requires_grad]
            products: list[Tensor | None] = [None] * len(wanted)
            if wanted and value.requires_grad:
                products = list(torch.autograd.grad(value, wanted, c * w, create_graph=True, allow_unused=True))
            to_c = (w * value).sum_to_size(c.shape) if c.requires_grad else None
        by_input = iter(products)
        return (None, None, w, to_c, *(next(by_input) if x.requires_grad else None for x in inputs))
