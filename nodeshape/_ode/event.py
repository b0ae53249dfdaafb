"""Solves that end where an event function is zero."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.loop import Segment
from nodeshape._ode.solver import Plan
from nodeshape._ode.step import Piece

#: Steps of a given size without an event after which the search is given up.
MOST_STEPS = 1_000_000

EventFunction = Callable[[Tensor, Any], Tensor]


def integrate_until_event(plan: Plan, event_fn: EventFunction) -> tuple[Tensor, Tensor, int]:
    """Step from the first time towards the second, and beyond, until an element of ``event_fn(t, y)`` changes its sign.

    Returns:
        the time of the event, a scalar; the packed states at the start and at the event, ``[2, ...]``; and which
        element of ``event_fn`` it was.

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
        return loop._at(t0), torch.stack([y, y]), int((signs == 0).nonzero()[0])
    for piece in _pieces(plan, y):
        if not passed(piece.t_end, piece.y_end):
            continue
        piece = loop._complete(piece)

        def values(x: float, piece: Piece = piece) -> Tensor:
            with torch.no_grad():
                there = piece.states(_part(plan, x))[0]
            return _values(plan, event_fn, piece.t + x * piece.h, there)

        high = _first_change(values, signs)
        x = _part(plan, high)
        changed = int((values(high).sign() != signs).nonzero()[0])
        return loop._at(piece.t + high * piece.h), torch.stack([y, piece.states(x)[0]]), changed
    raise RuntimeError(f"event_fn did not change its sign in {MOST_STEPS} steps from t={t0:g}")


def _first_change(values: Callable[[float], Tensor], signs: Tensor) -> float:
    """Where in [0, 1] the first element of ``values`` leaves its sign: bisection, or Illinois' method for one element.

    (Dowell & Jarratt 1971: false position, halving the value of an end that stays.)
    """
    low, high = 0.0, 1.0
    f_low, f_high = (values(x) for x in (low, high))
    side = 0
    while True:
        x = 0.5 * (low + high)
        if signs.numel() == 1:
            a, b = float(f_low), float(f_high)
            guess = (low * b - high * a) / (b - a) if a != b else x
            x = guess if low < guess < high else x
        if x in (low, high) or high - low < 1e-15:
            return high
        f = values(x)
        if bool((f.sign() != signs).any()):
            if high - x < 4e-16:
                return x
            high, f_high = x, f
            f_low = 0.5 * f_low if side == 1 else f_low
            side = 1
        else:
            low, f_low = x, f
            f_high = 0.5 * f_high if side == -1 else f_high
            side = -1


def with_moving_time(
    func: Callable[[Tensor, Any], Any], event_fn: EventFunction, event_t: Tensor, solution: Any, element: int
) -> tuple[Tensor, Any]:
    """Time and states of an event, differentiable by whatever moves the event.

    Args:
        event_t: the time, differentiable as a time that is given.
        solution: the states at the start and at the event, ``[2, *y0.shape]``, of a tuple state a tuple of such.
    """
    many = not isinstance(solution, Tensor)
    states = tuple(x[-1] for x in solution) if many else (solution[-1],)
    now = event_t.detach().requires_grad_()

    def called(function: Callable[..., Any], t: Tensor, given: tuple[Tensor, ...]) -> Any:
        return function(t, given if many else given[0])

    with torch.enable_grad():
        points = tuple(x.detach().clone().requires_grad_() for x in states)
        clock = now.detach().to(states[0].real.dtype)
        slopes = called(func, clock, tuple(x.detach().clone() for x in points))  # of copies, which func may change
        slopes = tuple(x.detach() for x in slopes) if many else (slopes.detach(),)
        values = called(event_fn, now, points).reshape(-1)
        if not values.requires_grad:
            return event_t.detach(), solution
        value = values[element]
        to_t, *to_states = torch.autograd.grad(value, (now, *points), allow_unused=True, retain_graph=True)
        fixed = called(event_fn, now.detach(), tuple(x.detach() for x in points)).reshape(-1)
        fixed = fixed[element]  # which may depend on parameters of event_fn
    # With the state at a time that stays, y, the time T of the event moves by dT = −dc / (∂c/∂t + ∂c/∂y · f).
    drift = (event_t - event_t.detach()).to(states[0].dtype)
    still = tuple(x - f.to(x.dtype) * drift for x, f in zip(states, slopes))
    rate = torch.zeros_like(value) if to_t is None else to_t
    rate = rate + sum((g * f).sum() for g, f in zip(to_states, slopes) if g is not None)
    moved = fixed - fixed.detach()
    for g, x in zip(to_states, still):
        if g is not None:
            moved = moved + (g * (x - x.detach())).sum()
    shift: Tensor = _Once.apply(-moved / rate.detach())
    time = event_t.detach() + shift.to(event_t.dtype)
    ends = tuple(x + f * shift.to(x.dtype) for x, f in zip(still, slopes))
    whole = solution if many else (solution,)
    joined = tuple(torch.cat([x[:-1], end[None]]) for x, end in zip(whole, ends))
    return time, joined if many else joined[0]


class _Once(torch.autograd.Function):
    """0 that is differentiated as a value, once: the formula's own derivative would lack how f and the event bend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("the time of an event has no second derivatives (backward with create_graph=True)")
        return grads[0]


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
