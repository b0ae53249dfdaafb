"""The continuous adjoint (Chen et al., arXiv:1806.07366, appendix B): gradients from a solve backwards in time.

With a = ∂L/∂y, the state, a and the parameters' gradient are solved together from the last time to the first:

    dy/dt = f,    da/dt = −Jᵀ a,    d(dL/dp)/dt = −(∂f/∂p)ᵀ a

Memory does not depend on the number of steps. The gradient is that of the exact solution, approximately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._ode.graph import leaves, refuse_untracked
from nodeshape._ode.options import CALLBACKS
from nodeshape._ode.root import StageEquations
from nodeshape._ode.solver import Plan, mixed_norm
from nodeshape._ode.step import Size
from nodeshape._ode.surroundings import Surroundings


def adjoint_solution(
    plan: Plan,
    backward: Plan,
    options: dict[str, Any],
    discovers: bool,
    y0: Tensor,
    t: Tensor,
    parameters: Sequence[Tensor],
) -> Tensor:
    """Solve ``plan``; the states ``[times, ...]``, whose gradient is that of the continuous adjoint.

    Args:
        backward: method, steps and tolerances of the backward solve; its func, state and times are not used.
        options: of the backward solve; ``norm`` sees ``(dL/dt, y, a, *dL/dp)``, or is ``"seminorm"``: without dL/dp.
        discovers: whether the parameters are those that were found, rather than given.
        y0: the packed state.
        t: the times, differentiable.
        parameters: to differentiate by, besides.
    """
    solution: Tensor = _Adjoint.apply(plan, backward, options, discovers, y0, t, *parameters)
    return solution


def parameters_of(func: Callable[..., Any], plan: Plan) -> tuple[Tensor, ...]:
    """What requires grad of the parameters of ``func``, if it is a module, and of what its value is computed from.

    f is evaluated once more at the start, which leaves its random numbers and buffers as they were. What a later
    evaluation depends on besides is an error of the backward pass.
    """
    own: list[Any] = list(func.parameters()) if isinstance(func, nn.Module) else []
    if getattr(func, "_is_replica", False):  # a replica of DataParallel holds its parameters as plain attributes
        own = [x for module in func.modules() for x in module.__dict__.values()]  # type: ignore[attr-defined]
    surroundings = Surroundings(func, plan.field.device)
    snapshot = surroundings.snapshot()
    with surroundings.restored() as restore, torch.enable_grad():
        restore(snapshot)
        start = torch.tensor(plan.times[0], dtype=plan.field.time_dtype, device=plan.field.device)
        found = leaves(plan.field(start, plan.field.pack(plan.y0).detach()))
    return tuple(dict.fromkeys((*(x for x in own if isinstance(x, Tensor) and x.requires_grad), *found)))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        backward: Plan,
        options: dict[str, Any],
        discovers: bool,
        y0: Tensor,
        t: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.discovers = discovers
        ctx.plan, ctx.backward, ctx.parameters = plan, backward, parameters
        ctx.surroundings = Surroundings(plan.func, plan.field.device)
        ctx.snapshot = ctx.surroundings.snapshot()
        ctx.adjoint_options = dict(options)
        ctx.adjoint_options["norm"] = _norm(options.get("norm"), plan)
        plan.field.remembers = True
        ys = plan.run()
        plan.field.remembers = False
        ctx.save_for_backward(ys, t, *parameters)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError(
                "adjoint='continuous' has no second derivatives (backward with create_graph=True): use"
                " adjoint='discrete'"
            )
        ys, t, *parameters = ctx.saved_tensors
        plan: Plan = ctx.plan
        with_time = ctx.needs_input_grad[5]
        ctx.surroundings.check_weights()
        with torch.no_grad(), ctx.surroundings.restored() as restore:
            restore(ctx.snapshot)
            plan.field.check()
            augmented = _Augmented(plan, parameters, with_time, ctx.discovers)
            state = (ys.new_zeros(()), ys[-1], grads[0][-1], *(torch.zeros_like(p) for p in parameters))
            to_times = torch.zeros(len(plan.times), dtype=torch.float64, device=ys.device)
            for j in range(len(plan.times) - 1, 0, -1):
                if with_time:
                    augmented.evaluations += 1
                    slope = plan.field(plan.loop._time(plan.times[j]), ys[j])
                    to_times[j] = (slope * grads[0][j].conj()).sum().real
                    state = (state[0] - to_times[j].to(state[0]), *state[1:])
                solve = replace(
                    ctx.backward,
                    func=augmented,
                    y0=state,
                    times=[plan.times[j], plan.times[j - 1]],
                    t=None,
                    settings=ctx.adjoint_options,
                )
                if solve.loop.solve is not None:
                    solve.loop.solve = _AdjointEquations(solve, augmented, solve.loop.solve)
                packed = solve.run()[-1]
                to_time, _, a, *to_parameters = solve.field.unpack(packed)
                state = (to_time, ys[j - 1], a + grads[0][j - 1], *to_parameters)
            if with_time:  # to start later is to start from that much further along f
                augmented.evaluations += 1
                slope = plan.field(plan.loop._time(plan.times[0]), ys[0])
                to_times[0] = -(slope * (state[2] - grads[0][0]).conj()).sum().real
            plan.count_backward(augmented.evaluations)
        wanted = ctx.needs_input_grad[6:]
        to_t = to_times.to(t.device, t.dtype) if with_time else None
        found = (
            (x if p.is_complex() or not x.is_complex() else x.real).to(p.dtype) if needed else None
            for x, p, needed in zip(state[3:], parameters, wanted)
        )
        return None, None, None, None, state[2], to_t, *found


class _AdjointEquations(StageEquations):
    """Stages of the adjoint equations: that of y comes first, as it does not need that of a; the rest follows."""

    def __init__(self, solve: Plan, augmented: _Augmented, equations: StageEquations) -> None:
        super().__init__(augmented.plan.field, equations.solver, sweep="adjoint")
        self.packed, self.augmented = solve.field, augmented

    def __call__(self, t: Tensor, base: Tensor, c: Size, guess: Tensor | None) -> Tensor:
        """The slope of everything, given a guess of it."""
        state: Any = self.packed.unpack(base)
        slopes: Any = None if guess is None else self.packed.unpack(guess)
        before = self.field.evaluations
        slope = super().__call__(t, state[1], c, None if slopes is None else slopes[1])
        self.augmented.evaluations += self.field.evaluations - before
        y = state[1] + c * slope
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            value = self.field(t, point)

        def product(a: Tensor) -> Tensor:
            self.augmented.evaluations += 1
            if not value.requires_grad:
                return torch.zeros_like(a)
            (found,) = torch.autograd.grad(value, point, a, retain_graph=True, allow_unused=True)
            return torch.zeros_like(a) if found is None else -c * found

        finite = torch.isfinite(y).reshape(self.field.samples, self.field.size).all(dim=1, keepdim=True)
        a = self.transposed(product, state[2], finite, self.where)
        return self.packed.pack(self.augmented(t, (state[0], y, a, *state[3:])))


class _Augmented:
    """``(dL/dt, y, a, *dL/dp)`` to its derivative; the user's adjoint callbacks are its callbacks."""

    def __init__(self, plan: Plan, parameters: Sequence[Tensor], with_time: bool, discovers: bool) -> None:
        self.plan, self.parameters, self.with_time = plan, list(parameters), with_time
        self.discovers = discovers
        self.evaluations = 0
        for name in CALLBACKS:
            callback = getattr(plan.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, y, a, *_ = state
        self.evaluations += 2  # of f and of its product
        with torch.enable_grad():
            time = t.detach().requires_grad_(self.with_time)
            point = y.detach().requires_grad_()
            slope = self.plan.field(time, point)
            inputs = [*([time] if self.with_time else []), point, *self.parameters]
            if not slope.requires_grad:
                found: list[Tensor | None] = [None] * len(inputs)
            else:
                if self.discovers:
                    refuse_untracked(slope, inputs)
                found = list(torch.autograd.grad(slope, inputs, -a, allow_unused=True, retain_graph=True))
        products = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]
        to_time = products.pop(0) if self.with_time else torch.zeros_like(t)
        return (to_time, slope.detach(), *products)


def _norm(given: Any, plan: Plan) -> Callable[[Sequence[Tensor]], Tensor]:
    """The norm of ``(dL/dt, y, a, *dL/dp)``."""
    of_state, unpack = plan.norm(), plan.field.unpack
    if callable(given):
        if isinstance(plan.y0, Tensor):
            return given  # type: ignore[no-any-return]
        return lambda state: given((state[0], *unpack(state[1]), *unpack(state[2]), *state[3:]))
    seminorm = given == "seminorm"

    def norm(state: Sequence[Tensor]) -> Tensor:
        to_time, y, a, *to_parameters = state
        parts = [to_time.abs(), of_state(y), of_state(a)]
        if to_parameters and not seminorm:
            parts.append(mixed_norm(to_parameters))
        return torch.stack([part.to(parts[0].dtype) for part in parts]).max()

    return norm
