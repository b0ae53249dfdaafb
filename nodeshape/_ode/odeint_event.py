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
    found: tuple[Tensor, Any] = odeint_interface(func, y0, t, event_fn=event_fn, **arguments)
    return found


odeint_event.__module__ = "nodeshape"
