"""Stages that are equations, F = f(t, Y), Y = base + c F: solved, and differentiated by the implicit function theorem.

With J = ∂f/∂y at the stage, a cotangent v of F reaches f's inputs as u = v + c Jᵀ u, an equation of the same kind, and
base as Jᵀ u. What is differentiated is the record of the evaluation that solved the equation; for second derivatives
the stage is solved anew, as a differentiable function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._ode.field import Field
from nodeshape._ode.implicit import differentiable_stage, products_of
from nodeshape._ode.stage import StageSolver
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.step import Size
from nodeshape._ode.system import leaves


@dataclass
class StageEquations:
    """Solves the stages of one field, and remembers what that took.

    Attributes:
        evaluations: of f spent on stages, per sample, ``[samples]``; 0 before the first.
        residual: largest relative residual of a stage, ``[samples]``.
        closed: what f depends on besides time and state and that requires grad, for second derivatives; None before
            the first recorded stage.
        where: start and size of the step whose stages are solved, for the error message.
        stats: that the transposed equations' products with Jᵀ are entered in, if any.
    """

    field: Field
    solver: StageSolver
    evaluations: Tensor | int = 0
    residual: Tensor | float = 0.0
    stats: SolverStats | None = None
    closed: tuple[Tensor, ...] | None = None
    where: tuple[float, float] = (0.0, 0.0)

    def __call__(self, t: Tensor, base: Tensor, c: Size, guess: Tensor | None) -> Tensor:
        """F, given a guess of it.

        Raises:
            StageSolveError: the equation was not solved to its tolerance.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("implicit stages cannot be solved under torch.func transforms: use an explicit method")
        shape, rows_of = base.shape, (self.field.samples, self.field.size)
        recording = torch.is_grad_enabled()
        linked = recording and any(isinstance(x, Tensor) and x.requires_grad for x in (base, c))
        differentiable = linked or (recording and t.requires_grad)
        point = value = base  # of the latest evaluation, recorded if that is wanted

        def function(rows: Tensor) -> Tensor:
            nonlocal point, value, differentiable
            y = rows.reshape(shape)
            if linked:
                y = _Point.apply(y, base, c)
            elif differentiable:
                y = cut(y)
            point, value = y, self.field(t, y)
            differentiable = differentiable or value.requires_grad
            return value.detach().reshape(rows_of)

        def jacobian(rows: Tensor) -> Tensor:
            y = rows.reshape(shape).detach()
            return jacobian_of_samples(lambda y: self.field(t, y), y, self.field.samples)

        size = float(c)
        rows = base.detach().reshape(rows_of)
        first = rows if guess is None else rows + size * guess.detach().reshape(rows_of)
        stage = self.solver.solve(function, jacobian, rows, size, first)
        self.solver.check(stage, *self.where, "forward")
        self.evaluations = self.evaluations + stage.evaluations
        self.residual = torch.maximum(torch.as_tensor(self.residual, device=rows.device), stage.residual.double())
        if not differentiable:
            return value
        if not point.requires_grad:  # it was not known yet that f depends on something that requires grad
            point = cut(point)
            value = self.field(t, point)
        if self.closed is None:
            own = self.field.func.parameters() if isinstance(self.field.func, nn.Module) else ()
            found = leaves(value, point)
            self.closed = tuple(dict.fromkeys((*(x for x in own if x.requires_grad), *found)))
        finite = torch.isfinite(stage.value).all(dim=1, keepdim=True)
        slope: Tensor = _Slope.apply(value, point, c, self, finite, base, t, *self.closed)
        return slope

    def transposed(
        self, product: Callable[[Tensor], Tensor], v: Tensor, finite: Tensor, where: tuple[float, float]
    ) -> Tensor:
        """u = v + product(u); NaN for samples whose stage is not ``finite`` ``[samples, 1]``."""
        rows_of = (self.field.samples, self.field.size)

        def function(rows: Tensor) -> Tensor:
            return product(rows.reshape(v.shape)).reshape(rows_of)

        def matrix(rows: Tensor) -> Tensor:
            columns = [function(unit.expand_as(rows).contiguous()) for unit in torch.eye(rows.shape[1]).to(rows)]
            return torch.stack(columns, dim=2)

        rows = torch.where(finite, v.reshape(rows_of), torch.nan)
        stage = self.solver.solve(function, matrix, rows, 1.0, rows)
        self.solver.check(stage, *where, "transposed")
        if self.stats is not None:
            self.stats.nfe_backward = self.stats.nfe_backward + stage.evaluations
        return stage.value.reshape(v.shape)


def cut(x: Tensor) -> Tensor:
    """``x`` as a tensor to differentiate by that passes no gradient on."""
    severed: Tensor = _Cut.apply(x.detach().requires_grad_())
    return severed


class _Point(torch.autograd.Function):
    """Y, whose cotangent is that of base; of c it is that times F = (Y − base) / c."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, base: Tensor, c: Size) -> Tensor:
        if isinstance(c, Tensor):
            ctx.save_for_backward((y - base) / c)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        to_c = (grads[0] * ctx.saved_tensors[0]).sum() if ctx.needs_input_grad[2] else None
        return None, grads[0], to_c


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class _Slope(torch.autograd.Function):
    """F = value, recorded at ``point`` = base + c F; the rest is what second derivatives are taken by."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        point: Tensor,
        c: Size,
        equations: StageEquations,
        finite: Tensor,
        base: Tensor,
        t: Tensor,
        *closed: Tensor,
    ) -> Tensor:
        ctx.value, ctx.point, ctx.c, ctx.equations, ctx.finite = value, point, c, equations, finite
        ctx.inputs, ctx.where = (base, t, closed), equations.where
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (v,) = grads
        if torch.is_grad_enabled():
            return None, None, *_Slope.differentiable(ctx, v)
        size = float(ctx.c)

        def product(u: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(ctx.value, ctx.point, u, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if found is None else size * found

        u = ctx.equations.transposed(product, v, ctx.finite, ctx.where)
        return u, *(None for _ in ctx.needs_input_grad[1:])

    @staticmethod
    def differentiable(ctx: Any, v: Tensor) -> list[Tensor | None]:
        """The gradients of c, base, t and what is closed over, recorded: of the stage solved anew."""
        equations: StageEquations = ctx.equations
        base, t, closed = ctx.inputs
        if not set(leaves(ctx.value, ctx.point)) <= {*closed, t}:
            raise RuntimeError(
                "func depends on a tensor that its first evaluation did not use, so second derivatives would lack it:"
                " make func an nn.Module that owns it"
            )
        field, rows_of = equations.field, (equations.field.samples, equations.field.size)

        def function(rows: Tensor, time: Tensor) -> Tensor:
            return field(time, rows.reshape(base.shape)).reshape(rows_of)

        def slope(base: Tensor, c: Tensor, t: Tensor) -> Tensor:
            rows = base.reshape(rows_of)
            stage = differentiable_stage(function, equations.solver, ctx.where, rows, c, [t], closed)
            return function(stage, t).reshape(base.shape)

        c = torch.as_tensor(ctx.c, dtype=base.dtype, device=base.device)
        to_base, to_c, to_t, *to_closed = products_of(slope, v, (base, c, t), closed)
        return [to_c if isinstance(ctx.c, Tensor) else None, None, None, to_base, to_t, *to_closed]


def jacobian_of_samples(function: Callable[[Tensor], Tensor], y: Tensor, samples: int) -> Tensor:
    """∂f/∂y of each sample by itself, ``[samples, size, size]``, one vector–Jacobian product per component."""
    with torch.enable_grad():
        point = y.detach().requires_grad_()
        out = function(point).reshape(samples, -1)
        size = out.shape[1]
        if not out.requires_grad:
            return out.new_zeros(samples, size, size)
        rows = [
            torch.autograd.grad(out[:, i].sum(), point, retain_graph=i + 1 < size, allow_unused=True)[0]
            for i in range(size)
        ]
    return torch.stack([out.new_zeros(samples, size) if x is None else x.reshape(samples, -1) for x in rows], dim=1)
