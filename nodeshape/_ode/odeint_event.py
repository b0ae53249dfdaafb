"""``odeint_event``: solve until an event, with gradients through the time of the event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.event import EventFunction
from nodeshape._ode.field import State
from nodeshape._ode.odeint import odeint


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: EventFunction,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """Solve from ``t0`` until ``event_fn(t, y)`` is zero; gradients go through the time of the event.

    Args:
        func, y0: as for :func:`nodeshape.odeint`.
        t0: the start, a scalar tensor.
        event_fn: ``(t, y)`` to a tensor; the first of its elements to change its sign ends the solve.
        reverse_time: go back in time.
        odeint_interface: :func:`nodeshape.odeint` (default) or :func:`nodeshape.odeint_adjoint`.
        arguments: of that function.

    Returns:
        the time of the event, a scalar, and the states at ``t0`` and at the event, ``[2, *y0.shape]``.
    """
    start = torch.as_tensor(t0).reshape(-1)
    start = start if start.is_floating_point() else start.double()
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **arguments)
    many = not isinstance(solution, Tensor)
    states = tuple(x[-1] for x in solution) if many else (solution[-1],)
    now = event_t.detach().requires_grad_()

    def called(function: Callable[..., Any], t: Tensor, given: tuple[Tensor, ...]) -> Any:
        return function(t, given if many else given[0])

    with torch.enable_grad():
        points = tuple(x.detach().requires_grad_() for x in states)
        slopes = called(func, now.detach(), tuple(x.detach() for x in points))
        slopes = tuple(x.detach() for x in slopes) if many else (slopes.detach(),)
        values = called(event_fn, now, points).reshape(-1)
        value = values[values.detach().abs().argmin()]
        to_t, *to_states = torch.autograd.grad(value, (now, *points), allow_unused=True, retain_graph=True)
        fixed = called(event_fn, now.detach(), tuple(x.detach() for x in points)).reshape(-1)
        fixed = fixed[values.detach().abs().argmin()]  # which may depend on parameters of event_fn
    # With the state at a time that stays, y, the time T of the event moves by dT = −dc / (∂c/∂t + ∂c/∂y · f).
    drift = (event_t - event_t.detach()).to(states[0].dtype)
    still = tuple(x - f * drift for x, f in zip(states, slopes))
    rate = torch.zeros_like(value) if to_t is None else to_t
    rate = rate + sum((g * f).sum() for g, f in zip(to_states, slopes) if g is not None)
    moved = fixed - fixed.detach()
    for g, x in zip(to_states, still):
        if g is not None:
            moved = moved + (g * (x - x.detach())).sum()
    shift: Tensor = _Once.apply(-moved / rate.detach())
    time = event_t.detach() + (shift - shift.detach()).to(event_t.dtype)
    ends = tuple(x + f * (shift - shift.detach()).to(x.dtype) for x, f in zip(still, slopes))
    whole = solution if many else (solution,)
    joined = tuple(torch.cat([x[:-1], end[None]]) for x, end in zip(whole, ends))
    return time, joined if many else joined[0]


class _Once(torch.autograd.Function):
    """A value that is differentiated once: the formula's own derivative would lack how f and the event bend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("the time of an event has no second derivatives (backward with create_graph=True)")
        return grads[0]


odeint_event.__module__ = "nodeshape"
