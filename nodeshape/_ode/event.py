"""Solves that end where an event function is zero."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.loop import Segment
from nodeshape._ode.solver import Plan

#: Steps of a given size without an event after which the search is given up.
MOST_STEPS = 1_000_000

EventFunction = Callable[[Tensor, Any], Tensor]


def integrate_until_event(plan: Plan, event_fn: EventFunction) -> tuple[Tensor, Tensor]:
    """Step from the first time towards the second, and beyond, until an element of ``event_fn(t, y)`` changes its sign.

    Returns:
        the time of the event, a scalar, and the packed states at the start and at the event, ``[2, ...]``.

    Raises:
        StepSizeError: error control cannot go on.
        RuntimeError: no event in ``MOST_STEPS`` steps of a given size.
    """
    loop, field = plan.loop, plan.field
    y = field.pack(plan.y0)
    t0 = plan.times[0]
    signs = _values(plan, event_fn, t0, y).sign()

    def passed(t: float, y: Tensor) -> bool:
        return bool((_values(plan, event_fn, t, y).sign() != signs).any())

    if bool((signs == 0).any()):
        return loop._at(t0), torch.stack([y, y])
    for piece in _pieces(plan, y):
        if not passed(piece.t_end, piece.y_end):
            continue
        piece = loop._complete(piece)
        low, high = 0.0, 1.0
        while True:
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            with torch.no_grad():
                there = piece.states(_part(plan, middle))[0]
            if passed(piece.t + middle * piece.h, there):
                high = middle
            else:
                low = middle
        x = _part(plan, high)
        return loop._at(piece.t + high * piece.h), torch.stack([y, piece.states(x)[0]])
    raise RuntimeError(f"event_fn did not change its sign in {MOST_STEPS} steps from t={t0:g}")


def _pieces(plan: Plan, y: Tensor) -> Any:
    """The steps of a solve that has no end."""
    loop, t0 = plan.loop, plan.times[0]
    sign = 1.0 if plan.times[1] > t0 else -1.0
    if plan.adaptive:
        stops, jumps = plan._stops()
        loop.begin_counting(plan.most_attempts())
        for piece, _ in loop.steps(y, plan.controller(), sign * inf, stops, jumps):
            if piece is not None:
                yield piece
        return
    if plan.step_size is None:
        raise ValueError(
            "an event is looked for in steps of a given size: pass step_size, or options={'step_size': ...}"
        )
    length = sign * plan.step_size
    for piece, _, _ in loop._segment(y, Segment(t0, t0 + MOST_STEPS * length, MOST_STEPS), None, keep=True):
        yield piece


def _values(plan: Plan, event_fn: EventFunction, t: float, y: Tensor) -> Tensor:
    with torch.no_grad():
        values = torch.as_tensor(event_fn(plan.loop._time(t), plan.field.unpack(y))).reshape(-1)
    if bool(torch.isnan(values).any()):
        raise RuntimeError(f"event_fn returned NaN at t={t:g}: it must be a number wherever the solution may go")
    return values


def _part(plan: Plan, x: float) -> Tensor:
    return torch.tensor([x], dtype=plan.field.time_dtype, device=plan.field.device)
