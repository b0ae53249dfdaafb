"""Steps of each sample's own under error control, for an f that is known or declared not to couple samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from math import copysign, inf
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.control import Controller, no_further, not_finite, samples_failed
from nodeshape._ode.loop import Loop
from nodeshape._ode.step import combine, end, error, interpolate, stages


@dataclass
class _Attempt:
    """A step of some samples, or the second half of one."""

    t: Tensor
    h: Tensor
    t_end: Tensor
    y: Tensor
    y_end: Tensor
    slopes: list[Tensor]
    before: Any


@dataclass
class SampleSteps:
    """A solve in which every sample chooses its steps; those that have arrived are left out.

    Attributes:
        loop: field, method, times and stage equations.
        control: of the steps; its norm is not used, each sample's error is a root mean square.
        most_steps: attempts of a sample between two observations.
        stops: times that a step must end at.
        jumps: such times at which f jumps: it is evaluated anew just behind them.
        on_failure: ``"raise"`` or ``"nan"``.
        accepted, rejected, evaluations: of each sample, ``[samples]``.
        failures: why a sample failed, by its number.
    """

    loop: Loop
    control: Controller
    most_steps: int
    stops: Sequence[float] = ()
    jumps: Sequence[float] = ()
    on_failure: str = "raise"
    accepted: Tensor = default(init=False)
    rejected: Tensor = default(init=False)
    evaluations: Tensor = default(init=False)
    failures: dict[int, str] = default(default_factory=dict)

    def __post_init__(self) -> None:
        field, times = self.loop.field, self.loop.times
        self.device, n = field.device, field.samples
        self.accepted, self.rejected, self.evaluations = torch.zeros(3, n, dtype=torch.long, device=self.device)
        self.sign = copysign(1.0, times[-1] - times[0])
        ends = sorted({self.sign * x for x in (*self.stops, *self.jumps)} | {self.sign * times[-1]})
        self.limits = self._times([x for x in ends if x <= self.sign * times[-1]])
        self.observed = self._times([self.sign * x for x in times])

    def run(self, y: Tensor) -> Tensor:
        """The states at all times ``[times, samples, ...]``."""
        loop, n = self.loop, self.loop.field.samples
        t = torch.full((n,), loop.times[0], dtype=torch.float64, device=self.device)
        states = _Observations(len(loop.times), n)
        states.add(torch.arange(n, device=self.device), y)
        if n == 0:
            return torch.stack([y] * len(loop.times))
        lost = ~torch.isfinite(y.detach()).reshape(n, -1).all(dim=1)  # has nowhere to go
        for i in lost.nonzero()[:, 0].tolist():
            self.failures[i] = not_finite(i, loop.times[0])
        if self.failures and self.on_failure == "raise":
            raise samples_failed(self.failures, n)
        done = lost.clone()
        slope = self._slopes(self._seen(self._clock(t)), y)
        self.evaluations += 1
        h = self._first(y, slope)
        rejected = torch.zeros_like(done)
        attempts = torch.zeros_like(self.accepted)
        while True:
            rows = (~done).nonzero()[:, 0]
            if len(rows) == 0:
                break
            now, size = t[rows], h[rows]
            limit = self.limits[torch.searchsorted(self.limits, self.sign * now, right=True)]
            rest = limit - self.sign * now
            cut = size >= rest * (1 - 1e-9)
            size = torch.where(cut, rest, size)
            target = torch.where(cut, self.sign * limit, now + self.sign * size)
            step = target - now
            pieces, estimate = self._attempt(rows, y, slope, now, step, target)
            ratio = self._ratio(estimate, pieces[0].y, pieces[-1].y_end, rows)
            kept = ((ratio <= 1.0) | (size <= self.control.min_step)) & torch.isfinite(ratio)
            attempts[rows] += 1
            self.accepted[rows] += kept * len(pieces)
            self.rejected[rows] += ~kept
            proposed = self._next(size, ratio, rejected[rows])
            rejected[rows] = ~kept
            # A step cut short says nothing against the longer one.
            h[rows] = torch.where(kept & (size < h[rows]), torch.maximum(h[rows], proposed), proposed)
            if bool(kept.any()):
                pieces, good = self._kept(pieces, kept, rows, y, slope, now, step, target)
                there = rows[good]
                for piece in pieces:
                    self._observe(states, piece, there)
                    if loop.recorder is not None:
                        loop.recorder.after(piece.t, piece.h, piece.y, piece.slopes, piece.before, there)
                last = pieces[-1]
                y = y.index_copy(0, there, last.y_end)
                t_end = target[good]
                t = t.index_copy(0, there, t_end)  # not in place: f's record may hold it
                done = done.index_fill(0, there[t_end == loop.times[-1]], True)
                attempts[there[(self.observed[:, None] == self.sign * t_end).any(dim=0)]] = 0
                slope = slope.index_copy(0, there, self._slope_at_end(last, t_end, there))
            self._give_up(
                rows, t, (target == now) | (~kept & (size <= self.control.min_step)), attempts, ratio, done, lost
            )
        return states.assembled(lost, y)

    # ---- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(
        self, rows: Tensor, y: Tensor, slope: Tensor, t: Tensor, h: Tensor, t_end: Tensor
    ) -> tuple[list[_Attempt], Tensor]:
        """A step of ``rows`` and the estimate of its error; two halves where the method has none."""
        method, equations = self.loop.method, self.loop.solve
        whole_batch = len(rows) == len(y)
        here, known = (y, slope) if whole_batch else (y[rows], slope[rows])
        if equations is not None:
            equations.unsolved = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        whole = self._one(here, t, h, t_end, known, rows)
        pieces = [whole]
        if method.error:
            with torch.no_grad():
                estimate = error(method, 1.0, [x.detach() for x in whole.slopes]) * self._column(h, here)
        else:
            middle = t + 0.5 * h
            first = self._one(here, t, 0.5 * h, middle, known, rows)
            slope = self._slope_at_end(first, middle, rows)
            second = self._one(first.y_end, middle, t_end - middle, t_end, slope, rows)
            pieces = [first, second]
            with torch.no_grad():
                estimate = (second.y_end - whole.y_end) / (2**method.order - 1)
        if equations is not None and equations.unsolved is not None:
            estimate = torch.where(self._column(equations.unsolved, here).bool(), torch.nan, estimate)
        return pieces, estimate

    def _one(self, y: Tensor, t: Tensor, h: Tensor, t_end: Tensor, slope: Tensor, rows: Tensor) -> _Attempt:
        loop, method = self.loop, self.loop.method
        before = loop.recorder.before() if loop.recorder is not None else None
        evaluations = loop.field.evaluations
        start, size = self._differentiable(t, h, t_end)
        times = [self._seen(start + c * size) for c in method.c]
        jumping = self._jumping(t_end)
        if bool(jumping.any()):  # f is evaluated just before the end
            back = torch.full_like(times[0].detach(), -self.sign * inf)
            shifts = [torch.nextafter(x.detach(), back) - x.detach() for x in times]
            times = [
                torch.where(jumping, x + shift, x) if c == 1.0 else x for c, x, shift in zip(method.c, times, shifts)
            ]
        column = self._column(size, y)
        if loop.solve is not None:
            loop.solve.where, loop.solve.rows = (t, h), rows
        known = slope if method.starts_with_slope and loop.recorder is None else None
        slopes = stages(loop.field, method, y, times, column, known, slope.detach(), loop.solve)
        self.evaluations[rows] += loop.field.evaluations - evaluations
        return _Attempt(t, h, t_end, y, end(method, y, column, slopes), slopes, before)

    def _differentiable(self, t: Tensor, h: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor]:
        """Start and size of a step, tied to the times of the solve where they are differentiated."""
        traced = self.loop.t
        if traced is None:
            return t, h
        last = traced[-1].to(t)
        start = self._clock(t)
        return start, torch.where(t_end == self.loop.times[-1], last - start, h)

    def _clock(self, t: Tensor) -> Tensor:
        """Times of samples, tied to those of the solve where they are differentiated."""
        traced = self.loop.t
        if traced is None:
            return t
        moved = traced[0].to(t) + (t - self.loop.times[0])
        return torch.where(t == self.loop.times[-1], traced[-1].to(t), moved)

    def _kept(
        self,
        pieces: list[_Attempt],
        kept: Tensor,
        rows: Tensor,
        y: Tensor,
        slope: Tensor,
        t: Tensor,
        h: Tensor,
        t_end: Tensor,
    ) -> tuple[list[_Attempt], Tensor]:
        """The pieces of the samples whose step is kept, and which of ``rows`` they are."""
        if bool(kept.all()):
            return pieces, torch.arange(len(rows), device=self.device)
        good = kept.nonzero()[:, 0]
        last = pieces[-1]
        if last.y_end.requires_grad and not bool(torch.isfinite(last.y_end.detach()).all()):
            # A record that holds numbers that are not finite has no finite gradient: the others are stepped anew.
            again, _ = self._attempt(rows[good], y, slope, t[good], h[good], t_end[good])
            return again, good

        def of(x: Tensor) -> Tensor:
            return x[good]

        return [
            _Attempt(of(p.t), of(p.h), of(p.t_end), of(p.y), of(p.y_end), [of(x) for x in p.slopes], p.before)
            for p in pieces
        ], good

    def _slope_at_end(self, piece: _Attempt, t: Tensor, rows: Tensor) -> Tensor:
        if self.loop.method.ends_with_slope and not bool(self._jumping(t).any()):
            return piece.slopes[-1]
        self.evaluations[rows] += 1
        seen = self._seen(self._clock(t))
        behind = torch.nextafter(seen, torch.full_like(seen, self.sign * inf))
        return self._slopes(torch.where(self._jumping(t), behind, seen), piece.y_end)

    def _slopes(self, t: Tensor, y: Tensor) -> Tensor:
        """f of samples; a record that holds numbers that are not finite has no finite gradient, so without such."""
        slope = self.loop.field(t, y)
        if not slope.requires_grad:
            return slope
        finite = torch.isfinite(slope.detach()).reshape(len(y), -1).all(dim=1)
        if bool(finite.all()):
            return slope
        good = finite.nonzero()[:, 0]
        if not len(good):
            return slope.detach()
        return slope.detach().index_copy(0, good, self.loop.field(t[good], y[good]))

    def _jumping(self, t: Tensor) -> Tensor:
        """Which times are jumps of f."""
        if not self.jumps:
            return torch.zeros_like(t, dtype=torch.bool)
        return (t[:, None] == self._times(list(self.jumps))).any(dim=1)

    # ---- observations ------------------------------------------------------------------------------------------------

    def _observe(self, states: _Observations, piece: _Attempt, rows: Tensor) -> None:
        """Enter the states at the observation times that a step passes or ends at."""
        begin, stop = self.sign * piece.t, self.sign * piece.t_end
        low = torch.searchsorted(self.observed, begin, right=True)
        high = torch.searchsorted(self.observed, stop, right=True)
        count = high - low
        if not bool(count.any()):
            return
        which = torch.repeat_interleave(torch.arange(len(rows), device=self.device), count)
        offset = torch.arange(len(which), device=self.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
        index = low[which] + offset
        exact = self.observed[index] == stop[which]
        if self.loop.t is not None:  # an observation at the end of a step moves with its time, except the last
            exact &= index == len(self.loop.times) - 1
        ends, inside = exact.nonzero()[:, 0], (~exact).nonzero()[:, 0]
        n = self.loop.field.samples
        if len(ends):
            states.add(index[ends] * n + rows[which[ends]], piece.y_end[which[ends]])
        if not len(inside):
            return
        index, which = index[inside], which[inside]
        start, size = self._differentiable(piece.t, piece.h, piece.t_end)
        times = self.sign * self.observed if self.loop.t is None else self.loop.t.to(self.observed)
        x = ((times[index] - start[which]) / size[which]).to(self.loop.field.time_dtype)
        method = self.loop.method
        slope_end = piece.slopes[-1]
        if not method.ends_with_slope:
            slope_end = self._slopes(self._seen(self._clock(piece.t_end)), piece.y_end)
            self.evaluations[rows] += 1
        slope_start = piece.slopes[0]
        if not method.starts_with_slope:
            slope_start = self.loop.field(self._seen(self._clock(piece.t)), piece.y)
            self.evaluations[rows] += 1
        slopes = [slope[which] for slope in (*piece.slopes, slope_start, slope_end)]
        moved = interpolate(method, x, slopes) * self._column(size[which], piece.y)
        states.add(index * n + rows[which], piece.y[which] + moved)

    # ---- control -----------------------------------------------------------------------------------------------------

    def _first(self, y: Tensor, slope: Tensor) -> Tensor:
        """The first step of each sample (Hairer, Nørsett & Wanner I, II.4)."""
        control = self.control
        if control.first_step is not None:
            return torch.full((len(y),), control.first_step, dtype=torch.float64, device=self.device)
        rows = torch.arange(len(y), device=self.device)
        with torch.no_grad():
            scale = self._scale(y, y, rows)
            size, speed = _rms(y / scale), _rms(slope / scale)
            h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).nan_to_num(1e-6)
            t = torch.full_like(h, self.loop.times[0])
            moved = combine(y, self._column(self.sign * h, y), (1.0,), (slope,))
            after = self.loop.field(self._seen(t + self.sign * h), moved)
            self.evaluations += 1
            steepest = torch.maximum(speed, _rms((after - slope) / scale) / h)
            small = torch.clamp(h * 1e-3, min=1e-6)
            guess = torch.where(steepest <= 1e-15, small, (0.01 / steepest) ** (1 / control.order))
            first = torch.where(torch.isfinite(guess), torch.minimum(100 * h, guess), h)
        return first.clamp(control.min_step, control.max_step)

    def _scale(self, y: Tensor, y_end: Tensor, rows: Tensor) -> Tensor:
        def of(tolerance: float | Tensor) -> float | Tensor:
            whole = isinstance(tolerance, Tensor) and tolerance.dim() == y.dim() and len(tolerance) > 1
            return tolerance[rows] if whole else tolerance  # type: ignore[index]

        return torch.maximum(y.abs(), y_end.abs()) * of(self.control.rtol) + of(self.control.atol)

    @torch.no_grad()
    def _ratio(self, estimate: Tensor, y: Tensor, y_end: Tensor, rows: Tensor) -> Tensor:
        """The error of each sample in units of the tolerance; infinite if it is not a number."""
        return _rms(estimate / self._scale(y, y_end, rows)).nan_to_num(inf, posinf=inf)

    def _next(self, size: Tensor, ratio: Tensor, rejected: Tensor) -> Tensor:
        """The step to try next; it does not grow right after it was ``rejected``."""
        control = self.control
        factor = control.safety * ratio.clamp(1e-10, 1e10) ** (-1.0 / control.order)
        factor = factor.clamp(control.shrink, control.grow)
        factor = torch.where(rejected & (ratio <= 1.0), factor.clamp(max=1.0), factor)
        return (size * factor).clamp(control.min_step, control.max_step)

    def _give_up(
        self,
        rows: Tensor,
        t: Tensor,
        stuck: Tensor,
        attempts: Tensor,
        ratio: Tensor,
        done: Tensor,
        lost: Tensor,
    ) -> None:
        many = attempts[rows] >= self.most_steps
        many = many & ~done[rows]
        failed = (stuck | many).nonzero()[:, 0].tolist()
        if not failed:
            return

        reasons = {
            int(rows[k]): no_further(
                int(rows[k]), float(t[rows[k]]), float(ratio[k]), self.most_steps if bool(many[k]) else None
            )
            for k in failed
        }
        if self.on_failure == "raise":
            raise samples_failed(reasons, self.loop.field.samples)
        self.failures |= reasons
        for i in reasons:
            done[i] = lost[i] = True

    # ---- shapes ------------------------------------------------------------------------------------------------------

    def _seen(self, t: Tensor) -> Tensor:
        return t.to(self.loop.field.time_dtype)

    def _column(self, x: Tensor, y: Tensor) -> Tensor:
        """One number per sample ``[n]`` as a factor of ``y`` ``[n, ...]``."""
        return x.to(self.loop.field.time_dtype).reshape(-1, *(1,) * (y.dim() - 1))

    def _times(self, times: list[float]) -> Tensor:
        return torch.tensor(times, dtype=torch.float64, device=self.device)


class _Observations:
    """States of samples at times, gathered in any order."""

    def __init__(self, times: int, samples: int) -> None:
        self.times, self.samples = times, samples
        self._places: list[Tensor] = []
        self._states: list[Tensor] = []

    def add(self, places: Tensor, states: Tensor) -> None:
        """Enter ``states`` ``[n, ...]`` at ``places`` ``[n]``, time · samples + sample."""
        self._places.append(places)
        self._states.append(states)

    def assembled(self, lost: Tensor, y: Tensor) -> Tensor:
        """The states ``[times, samples, ...]``; NaN where none was entered."""
        places = torch.cat(self._places)
        every = self.times * self.samples
        if len(places) < every:
            missing = torch.ones(every, dtype=torch.bool, device=places.device)
            missing[places] = False
            rest = missing.nonzero()[:, 0]
            self.add(rest, y.new_full((len(rest), *y.shape[1:]), torch.nan))
            places = torch.cat(self._places)
        states = torch.cat(self._states).index_select(0, torch.argsort(places))
        return states.reshape(self.times, self.samples, *y.shape[1:])


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, float64 ``[n]``."""
    return x.detach().double().reshape(len(x), -1).square().mean(dim=1).sqrt()
