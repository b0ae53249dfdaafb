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

from nodeshape._ode.solver import Plan, mixed_norm
from nodeshape._ode.system import leaves

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def adjoint_solution(
    plan: Plan, backward: Plan, options: dict[str, Any], y0: Tensor, t: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Solve ``plan``; the states ``[times, ...]``, whose gradient is that of the continuous adjoint.

    Args:
        backward: method, steps and tolerances of the backward solve; its func, state and times are not used.
        options: of the backward solve; ``norm`` sees ``(dL/dt, y, a, *dL/dp)``, or is ``"seminorm"``: without dL/dp.
        y0: the packed state.
        t: the times, differentiable.
        parameters: to differentiate by, besides.
    """
    solution: Tensor = _Adjoint.apply(plan, backward, options, y0, t, *parameters)
    return solution


def parameters_of(func: Callable[..., Any], plan: Plan) -> tuple[Tensor, ...]:
    """The parameters of ``func``, if it is a module; or what its value at the start was computed from."""
    if isinstance(func, nn.Module):
        # A replica of DataParallel holds its parameters as plain attributes.
        if getattr(func, "_is_replica", False):
            held = [x for module in func.modules() for x in module.__dict__.values()]
            return tuple(x for x in held if isinstance(x, Tensor) and x.requires_grad)
        return tuple(x for x in func.parameters() if x.requires_grad)
    with torch.enable_grad():
        start = torch.tensor(plan.times[0], dtype=plan.field.time_dtype, device=plan.field.device)
        found = plan.field(start, plan.field.pack(plan.y0).detach())
    return leaves(found)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        backward: Plan,
        options: dict[str, Any],
        y0: Tensor,
        t: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.backward, ctx.parameters = plan, backward, parameters
        ctx.adjoint_options = dict(options)
        ctx.adjoint_options["norm"] = _norm(options.get("norm"), plan)
        ys = plan.run()
        ctx.save_for_backward(ys, t, *parameters)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in grads):
            raise RuntimeError(
                "adjoint='continuous' has no second derivatives (backward with create_graph=True): use"
                " adjoint='discrete'"
            )
        ys, t, *parameters = ctx.saved_tensors
        plan: Plan = ctx.plan
        with_time = ctx.needs_input_grad[4]
        with torch.no_grad():
            plan.field.check_first()
            augmented = _Augmented(plan, parameters, with_time)
            state = (ys.new_zeros(()), ys[-1], grads[0][-1], *(torch.zeros_like(p) for p in parameters))
            to_times = torch.zeros(len(plan.times), dtype=torch.float64, device=ys.device)
            for j in range(len(plan.times) - 1, 0, -1):
                if with_time:
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
                packed = solve.run()[-1]
                to_time, _, a, *to_parameters = solve.field.unpack(packed)
                state = (to_time, ys[j - 1], a + grads[0][j - 1], *to_parameters)
            to_times[0] = state[0]
        wanted = ctx.needs_input_grad[5:]
        to_t = to_times.to(t.device, t.dtype) if with_time else None
        found = (x if needed else None for x, needed in zip(state[3:], wanted))
        return None, None, None, state[2], to_t, *found


class _Augmented:
    """``(dL/dt, y, a, *dL/dp)`` to its derivative; the user's adjoint callbacks are its callbacks."""

    def __init__(self, plan: Plan, parameters: Sequence[Tensor], with_time: bool) -> None:
        self.plan, self.parameters, self.with_time = plan, list(parameters), with_time
        self.checked = False
        for name in CALLBACKS:
            callback = getattr(plan.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, y, a, *_ = state
        with torch.enable_grad():
            time = t.detach().requires_grad_(self.with_time)
            point = y.detach().requires_grad_()
            slope = self.plan.field(time, point)
            inputs = [*([time] if self.with_time else []), point, *self.parameters]
            if not slope.requires_grad:
                found: list[Tensor | None] = [None] * len(inputs)
            else:
                if not self.checked:
                    self._refuse_untracked_leaves(slope, inputs)
                found = list(torch.autograd.grad(slope, inputs, -a, allow_unused=True, retain_graph=True))
        products = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]
        to_time = products.pop(0) if self.with_time else torch.zeros_like(t)
        return (to_time, slope.detach(), *products)

    def _refuse_untracked_leaves(self, slope: Tensor, inputs: list[Tensor]) -> None:
        self.checked = True
        known = {id(x) for x in inputs}
        if any(id(x) not in known for x in leaves(slope)):
            raise RuntimeError(
                "func depends on a tensor that is not among its parameters, so the gradient would lack it: make func an"
                " nn.Module that owns it, pass adjoint_params=[every tensor func depends on], or use adjoint='discrete'"
            )


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
