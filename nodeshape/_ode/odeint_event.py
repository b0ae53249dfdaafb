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
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **arguments)
    many = not isinstance(solution, Tensor)
    states = tuple(x[-1] for x in solution) if many else (solution[-1],)
    now = event_t.detach().requires_grad_()

    def called(function: Callable[..., Any], t: Tensor, given: tuple[Tensor, ...]) -> Any:
        return function(t, given if many else given[0])

    with torch.enable_grad():
        points = tuple(x.detach().requires_grad_() for x in states)
        slopes = called(func, now, points)
        slopes = tuple(slopes) if many else (slopes,)
        values = called(event_fn, now, points)
        value = values.reshape(-1)[values.detach().abs().argmin()]
        to_t, *to_states = torch.autograd.grad(value, (now, *points), allow_unused=True)
    # The time moves with the event: dt = −dc / (∂c/∂t + ∂c/∂y · f). Its value stays.
    rate = torch.zeros_like(value) if to_t is None else to_t
    rate = rate + sum((g * f.detach()).sum() for g, f in zip(to_states, slopes) if g is not None)
    moved = sum(
        ((g * (x - x.detach())).sum() for g, x in zip(to_states, states) if g is not None),
        start=torch.zeros_like(value.detach()),
    )
    time = event_t - (moved / rate.detach()).to(event_t.dtype)
    shift = (time - time.detach()).to(states[0].dtype)
    ends = tuple(x + f.detach() * shift for x, f in zip(states, slopes))
    whole = solution if many else (solution,)
    joined = tuple(torch.cat([x[:-1], end[None]]) for x, end in zip(whole, ends))
    return time, joined if many else joined[0]


odeint_event.__module__ = "nodeshape"
