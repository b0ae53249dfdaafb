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
from torch._higher_order_ops.while_loop import while_loop

from nodeshape._ode.field import Field
from nodeshape._ode.graph import jacobian_by_rows, leaves
from nodeshape._ode.implicit import differentiable_stage, products_of
from nodeshape._ode.stage import (
    ANDERSON_MEMORY,
    LOST,
    MAX_STAGE_ITERATIONS,
    TRACED_ITERATIONS,
    Stage,
    StageSolver,
    Time,
    column,
    traced_stage,
)
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.step import Size
from nodeshape._ode.unrolled import current, is_recording, is_tracing


def _loop(condition: Callable[..., Tensor], body: Callable[..., Any], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What ``while_loop`` does, which compiles what it is given."""
    while bool(condition(*values)):
        values = body(*values)
    return values


@dataclass
class StageEquations:
    """Solves the stages of one field, and remembers what that took.

    Attributes:
        evaluations: of f spent on stages, per sample, ``[samples]``; 0 before the first.
        residual: largest relative residual of a stage, ``[samples]``.
        calls: of f for stages, each for all samples.
        closed: what f depends on besides time and state and that requires grad, for second derivatives; None before
            the first recorded stage.
        where: start and size of the step whose stages are solved, for the error message.
        sweep: which stages they are, for the error message.
        rows: the samples that take the step; None for all.
        unsolved: samples with a stage that was not solved, ``[samples]``, for a loop that takes a shorter step then;
            None for an error.
        on_failure: told the samples whose stage was not solved, ``[samples]``, and what happened, instead of an error.
        stats: that the transposed equations' products with Jᵀ are entered in, if any.
    """

    field: Field
    solver: StageSolver
    evaluations: Tensor | int = 0
    residual: Tensor | float = 0.0
    stats: SolverStats | None = None
    calls: int = 0
    closed: tuple[Tensor, ...] | None = None
    where: tuple[Time, Time] = (0.0, 0.0)
    sweep: str = "forward"
    rows: Tensor | None = None
    unsolved: Tensor | None = None
    on_failure: Callable[[Tensor, Callable[[int], str]], Any] | None = None

    def __call__(self, t: Tensor, base: Tensor, c: Size, guess: Tensor | None) -> Tensor:
        """F, given a guess of it.

        Raises:
            StageSolveError: the equation was not solved to its tolerance.
        """
        if is_tracing():
            return self._traced(t, base, c, guess)
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError(
                "implicit stages cannot be solved under torch.func transforms or forward-mode differentiation: use an"
                " explicit method"
            )
        if base.numel() == 0:
            return self.field(t, base)
        each = t.dim() > 0  # samples at times of their own
        shape, rows_of = base.shape, (len(base) if each else self.field.samples, self.field.size)
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
            return jacobian_by_rows(lambda rows: self.field(t, rows.reshape(shape)).reshape(rows_of), rows.detach())

        size = (
            c.detach().reshape(-1)
            if each and isinstance(c, Tensor)
            else float(c.detach() if isinstance(c, Tensor) else c)
        )
        rows = base.detach().reshape(rows_of)
        first = rows if guess is None else rows + column(size, rows) * guess.detach().reshape(rows_of)
        before = self.field.evaluations
        stage = self.solver.solve(function, jacobian, rows, size, first)
        self.calls += self.field.evaluations - before
        if self.unsolved is not None:
            self.unsolved = self.unsolved | ~stage.solved
        elif self.on_failure is not None:
            if not bool(stage.solved.all()):
                self.on_failure(~stage.solved, self.solver.describe(stage, *self.where, self.sweep))
                # Their slope is 0 from now on; f is evaluated where that is harmless.
                function(torch.where(stage.solved[:, None], stage.value, rows))
                stage.value = torch.where(stage.solved[:, None], stage.value, rows)
        else:
            self.solver.check(stage, *self.where, self.sweep)
        self._count(stage)
        if not differentiable:
            return value
        if not point.requires_grad:  # it was not known yet that f depends on something that requires grad
            point = cut(point)
            value = self.field(t, point)
        if not value.requires_grad:  # f depends on nothing
            return value
        if self.closed is None:
            own = self.field.func.parameters() if isinstance(self.field.func, nn.Module) else ()
            clock = leaves(t)
            found = [x for x in leaves(value, point) if all(x is not y for y in clock)]
            self.closed = tuple(dict.fromkeys((*(x for x in own if x.requires_grad), *found)))
        finite = torch.isfinite(stage.value).all(dim=1, keepdim=True)
        slope: Tensor = _Slope.apply(value, point, c, self, finite, base, t, *self.closed)
        return slope

    def _traced(self, t: Tensor, base: Tensor, c: Size, guess: Tensor | None) -> Tensor:
        """F by a fixed number of evaluations, for a compiler or an exporter."""
        unrolled, rows_of = current(), self.field.rows
        # Numbers alone, but for the batch, which may differ from record to run.
        shape = (-1, *base.shape[1:]) if base.dim() > 0 else ()
        field = self.field.alone if unrolled is not None and is_recording() else self.field

        def function(rows: Tensor) -> Tensor:
            if unrolled is not None and not is_recording():
                unrolled.evaluations += 1
            return field(t, rows.reshape(shape)).reshape(rows_of)

        rows = base.reshape(rows_of)
        first = rows if guess is None else rows + c * guess.reshape(rows_of)
        tolerance, memory, loop = self.solver.tolerance, ANDERSON_MEMORY, None
        if unrolled is not None:
            if not unrolled.implicit:
                unrolled.implicit = True
            most, memory = unrolled.iterations, unrolled.memory
            if self.field.batched:  # else its samples are one, whose largest would decide for all, however many
                tolerance = max(tolerance, unrolled.tolerance)
            if unrolled.stops:
                loop = while_loop if is_recording() else _loop
        elif self.solver.max_iterations != MAX_STAGE_ITERATIONS:
            most = self.solver.max_iterations
        else:
            most = TRACED_ITERATIONS[self.field.time_dtype]
        before = 0 if unrolled is None else unrolled.evaluations
        # Who says how many evaluations compares the result with solved stages on examples; others may be far off.
        lost = None if unrolled is None else max(LOST, 10.0 * tolerance)
        slope = traced_stage(function, rows, c, first, tolerance, most, memory, loop, lost)
        if unrolled is not None and not is_recording():
            unrolled.most = max(unrolled.most, unrolled.evaluations - before)
        return slope.reshape(shape)

    def _count(self, stage: Stage) -> None:
        if self.rows is None:
            self.evaluations = self.evaluations + stage.evaluations
            self.residual = torch.maximum(
                torch.as_tensor(self.residual, device=stage.residual.device), stage.residual.double()
            )
            return
        if not isinstance(self.evaluations, Tensor):
            self.evaluations = torch.zeros(self.field.samples, dtype=torch.long, device=self.field.device)
            self.residual = torch.zeros(self.field.samples, dtype=torch.float64, device=self.field.device)
        assert isinstance(self.residual, Tensor)
        self.evaluations[self.rows] += stage.evaluations
        self.residual[self.rows] = torch.maximum(self.residual[self.rows], stage.residual.double())

    def transposed(
        self, product: Callable[[Tensor], Tensor], v: Tensor, finite: Tensor, where: tuple[Time, Time]
    ) -> Tensor:
        """u = v + product(u); NaN for samples whose stage is not ``finite`` ``[samples, 1]``."""
        rows_of = (len(finite), self.field.size)

        def function(rows: Tensor) -> Tensor:
            return product(rows.reshape(v.shape)).reshape(rows_of)

        def matrix(rows: Tensor) -> Tensor:
            columns = [function(unit.expand_as(rows).contiguous()) for unit in torch.eye(rows.shape[1]).to(rows)]
            return torch.stack(columns, dim=2)

        rows = torch.where(finite, v.reshape(rows_of), torch.nan)
        stage = self.solver.solve(function, matrix, rows, 1.0, rows)
        self.solver.check(stage, *where, "transposed")
        if self.stats is not None:
            self.stats.nfe_backward = self.stats.nfe_backward + (
                stage.evaluations if len(finite) == self.field.samples else stage.evaluations.max()
            )
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
            ctx.shape = c.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        to_c = (grads[0] * ctx.saved_tensors[0]).sum_to_size(ctx.shape) if ctx.needs_input_grad[2] else None
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
        size = ctx.c.detach() if isinstance(ctx.c, Tensor) else ctx.c

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
        if not set(leaves(ctx.value, ctx.point)) <= {*closed, *leaves(t)}:
            raise RuntimeError(
                "func depends on a tensor that its first evaluation did not use, so second derivatives would lack it:"
                " make func an nn.Module that owns it"
            )
        field = equations.field
        rows_of = (len(base) if t.dim() > 0 else field.samples, field.size)

        def function(rows: Tensor, time: Tensor) -> Tensor:
            return field(time, rows.reshape(base.shape)).reshape(rows_of)

        def slope(base: Tensor, c: Tensor, t: Tensor) -> Tensor:
            rows = base.reshape(rows_of)
            factor = c.reshape(-1, 1) if t.dim() > 0 else c
            stage = differentiable_stage(function, equations.solver, ctx.where, rows, factor, [t], closed)
            return function(stage, t).reshape(base.shape)

        c = torch.as_tensor(ctx.c, dtype=base.dtype, device=base.device)
        to_base, to_c, to_t, *to_closed = products_of(slope, v, (base, c, t), closed)
        return [to_c if isinstance(ctx.c, Tensor) else None, None, None, to_base, to_t, *to_closed]
