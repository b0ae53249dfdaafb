"""The time loop: steps of any method from the first time to the last, given or chosen by error control.

Gradients are autograd's: every operation here is differentiable, and what is decided (which steps to take) is a number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from math import copysign, inf
from typing import Any

import torch
from torch import Tensor

from nodeshape._errors import StageSolveError, StepSizeError
from nodeshape._ode.control import Controller
from nodeshape._ode.field import Field
from nodeshape._ode.method import Method
from nodeshape._ode.root import StageEquations
from nodeshape._ode.step import Piece, Size, end, error, stages

#: Steps whose times are made tensors together.
BLOCK = 1024


def _nothing(t: Tensor, y: Tensor, h: Tensor) -> None:
    """A callback that is not there."""


@dataclass(frozen=True)
class Callbacks:
    """What the user is told: called with start, state and size of a step that is tried, kept or thrown away."""

    step: Callable[[Tensor, Tensor, Tensor], Any] = _nothing
    accept: Callable[[Tensor, Tensor, Tensor], Any] = _nothing
    reject: Callable[[Tensor, Tensor, Tensor], Any] = _nothing


@dataclass(frozen=True)
class Segment:
    """``count`` equal steps from ``start`` to ``end``; the state at its end is an observation, or is not."""

    start: float
    end: float
    count: int


@dataclass
class Loop:
    """A solve of one field by one method.

    Attributes:
        times: observation times, numbers.
        t: the same as a tensor that is differentiated or traced; None where they are only numbers.
        solve: of the stages that are equations.
        callbacks: None where the user has none.
        perturb: evaluate f just inside a step at its ends, for an f that jumps there.
        accepted, rejected: steps so far.
        pieces: the steps taken, where they are kept (``keep``).
    """

    field: Field
    method: Method
    times: list[float]
    t: Tensor | None = None
    solve: StageEquations | None = None
    callbacks: Callbacks | None = None
    perturb: bool = False
    keep: bool = False
    accepted: int = 0
    rejected: int = 0
    pieces: list[Piece] = default(default_factory=list)
    _attempts: int = 0
    _most: float = inf

    # ---- given steps -------------------------------------------------------------------------------------------------

    def fixed(self, y: Tensor, counts: Sequence[int]) -> Tensor:
        """Take ``counts[j]`` equal steps from ``times[j]`` to ``times[j + 1]``; the states there ``[times, ...]``."""
        states = [y]
        slope: Tensor | None = None
        for j, count in enumerate(counts):
            segment = Segment(self.times[j], self.times[j + 1], count)
            for _, after, last in self._segment(y, segment, j, slope):
                y_after, slope_after = after, last
            y, slope = y_after, slope_after
            states.append(y)
        return torch.stack(states)

    def on_grid(self, y: Tensor, grid: Sequence[float], cubic: bool) -> Tensor:
        """Step from point to point of a grid; observations between its points are interpolated.

        Args:
            grid: from the first to the last time, one way.
            cubic: interpolate with the slopes at both ends, else linearly.
        """
        states, j = [y], 1
        sign = copysign(1.0, grid[-1] - grid[0])
        slope: Tensor | None = None
        for start, stop in zip(grid, grid[1:]):
            ((piece, after, slope),) = self._segment(y, Segment(start, stop, 1), None, slope, keep=True)
            while j < len(self.times) and sign * self.times[j] <= sign * stop:
                x = (self.times[j] - start) / (stop - start)
                if x == 1.0:
                    states.append(after)
                elif cubic:
                    assert piece is not None
                    states.append(self._complete(piece).states(self._parts(piece, [self.times[j]], None))[0])
                else:
                    states.append(torch.lerp(y, after, x))
                j += 1
            y = after
        return torch.stack(states)

    def _segment(
        self, y: Tensor, segment: Segment, interval: int | None, slope: Tensor | None, keep: bool = False
    ) -> Iterator[tuple[Piece | None, Tensor, Tensor | None]]:
        """Yield each step's piece (where pieces are kept), the state and, if known, the slope at its end."""
        method, keep = self.method, keep or self.keep
        for first in range(0, segment.count, BLOCK):
            count = min(BLOCK, segment.count - first)
            times, h = self._grid_times(segment, first, count, interval)
            per_step = len(method.c)
            length = (segment.end - segment.start) / segment.count
            for k in range(count):
                start = segment.start + (first + k) * length
                if self.callbacks is not None:
                    self.callbacks.step(self._time(start), y, self._time(length))
                if self.solve is not None:
                    self.solve.where = start, length
                known = slope if method.starts_with_slope and method.ends_with_slope else None
                now = times[k * per_step : (k + 1) * per_step]
                slopes = stages(self.field, method, y, now, h, known, self.solve)
                after = end(method, y, h, slopes)
                slope = slopes[-1] if method.ends_with_slope else None
                self.accepted += 1
                piece = Piece(method, start, length, h, y, after, slopes) if keep else None
                if self.keep and piece is not None:
                    self.pieces.append(piece)
                y = after
                yield piece, y, slope

    def _grid_times(
        self, segment: Segment, first: int, count: int, interval: int | None
    ) -> tuple[Sequence[Tensor], Size]:
        """The times of all stages of ``count`` steps, in order, and the size of a step."""
        parts = [(k + c) / segment.count for k in range(first, first + count) for c in self.method.c]
        kind, device = self.field.time_dtype, self.field.device
        h: Size = (segment.end - segment.start) / segment.count
        if self.t is None or interval is None:
            length = segment.end - segment.start
            times = torch.tensor([segment.start + part * length for part in parts], dtype=kind, device=device)
        else:
            whole = self.t[interval + 1] - self.t[interval]
            times = (self.t[interval] + whole * torch.tensor(parts, dtype=self.t.dtype, device=self.t.device)).to(
                device, kind
            )
            h = (whole / segment.count).to(device, self.field.dtype)
        if self.perturb:
            forwards = torch.full_like(times, copysign(inf, segment.end - segment.start))
            inside = torch.nextafter(times.detach(), forwards)
            outside = torch.nextafter(times.detach(), -forwards)
            c = torch.tensor(self.method.c, device=device).repeat(count)
            moved = torch.where(c == 0.0, inside, torch.where(c == 1.0, outside, times.detach()))
            times = times + (moved - times.detach())
        return times.unbind(), h

    # ---- chosen steps ------------------------------------------------------------------------------------------------

    def adaptive(
        self,
        y: Tensor,
        control: Controller,
        most_steps: int,
        stops: Sequence[float] = (),
        jumps: Sequence[float] = (),
    ) -> Tensor:
        """Solve under error control; the states at all times ``[times, ...]``.

        Args:
            most_steps: attempts between two observations.
            stops: times that a step must end at.
            jumps: such times at which f jumps: it is evaluated anew just behind them.
        """
        states: list[Tensor] = [y[None]]
        j, sign = 1, copysign(1.0, self.times[-1] - self.times[0])
        self._attempts, self._most = 0, most_steps
        for piece, after in self.steps(y, control, self.times[-1], stops, jumps):
            self._attempts += 1
            if piece is None:
                continue
            reached = piece.t + piece.h
            inside = []
            while j < len(self.times) and sign * self.times[j] < sign * reached:
                inside.append(j)
                j += 1
            if inside:
                x = self._parts(piece, [self.times[i] for i in inside], inside)
                states.append(self._complete(piece).states(x))
            if j < len(self.times) and self.times[j] == reached:
                states.append(after[None])
                j += 1
            if inside or self.times[j - 1] == reached:
                self._attempts = 0
        return torch.cat(states)

    def steps(
        self,
        y: Tensor,
        control: Controller,
        last: float,
        stops: Sequence[float] = (),
        jumps: Sequence[float] = (),
    ) -> Iterator[tuple[Piece | None, Tensor]]:
        """Yield each step that is kept (by step doubling two at a time) and the state at its end; None for others."""
        t = self.times[0]
        if t == last:
            return
        sign = copysign(1.0, last - t)
        if not bool(torch.isfinite(y).all()):
            raise StepSizeError(f"the state at t={t:.6g} is not finite, so no step from there can be judged")
        stop_times = sorted({sign * s for s in (*stops, *jumps)})
        slope = self.field(self._at(t), y)
        h = control.first(y, slope, lambda h, z: self.field(self._at(t + sign * h), z))
        ratio = 0.0
        while t != last:
            if self._attempts >= self._most:
                raise StepSizeError(
                    f"error control made as many attempts as allowed and stands at t={t:.6g} (error {ratio:.1e} of the"
                    " tolerance): loosen rtol and atol, raise options={'max_num_steps': ...}, or use an implicit method"
                    " if the problem is stiff"
                )
            i = bisect_right(stop_times, sign * t)
            limit = sign * min(stop_times[i], sign * last) if i < len(stop_times) else last
            rest = abs(limit - t)
            size = h if h < rest * (1 - 1e-9) else rest
            target = limit if size == rest else t + sign * size
            if target == t:
                raise StepSizeError(
                    f"error control cannot get past t={t:.6g}: it needs steps below the resolution of time (error"
                    f" {ratio:.1e} of the tolerance); loosen rtol and atol, name times at which func jumps in"
                    " options={'jump_t': ...}, or use an implicit method if the problem is stiff"
                )
            step = target - t
            if self.callbacks is not None:
                self.callbacks.step(self._at(t), y, self._time(step))
            try:
                pieces, estimate = self._attempt(y, t, step, slope, target == last)
                ratio = control.ratio(estimate, y, pieces[-1].y_end)
            except StageSolveError:
                if size <= control.min_step:
                    raise
                ratio, pieces = inf, []
            kept = control.accepts(size, ratio) and bool(pieces)
            if self.callbacks is not None:
                told = self.callbacks.accept if kept else self.callbacks.reject
                told(self._at(t), y, self._time(step))
            proposed = control.next(size, ratio)
            if kept:
                self.accepted += 1
                for piece in pieces:
                    if self.keep:
                        self.pieces.append(self._complete(piece))
                    yield piece, piece.y_end
                t, y = target, pieces[-1].y_end
                if t != last:
                    slope = self._slope_at_end(pieces[-1])
                    if t in jumps:
                        behind = torch.nextafter(self._at(t).detach(), torch.tensor(sign * inf).to(self._at(t)))
                        slope = self.field(behind, y)
                # A step cut short says nothing against the longer one.
                h = max(h, proposed) if size < h else proposed
            else:
                self.rejected += 1
                yield None, y
                h = proposed

    def _attempt(self, y: Tensor, t: float, h: float, slope: Tensor, last: bool) -> tuple[list[Piece], Tensor]:
        """One step and the estimate of its error; where the method has none, two halves that are compared with it."""
        whole = self._one(y, t, h, slope, last)
        if self.method.error:
            return [whole], error(self.method, h, [x.detach() for x in whole.slopes[:-2]])
        first = self._one(y, t, 0.5 * h, slope, False)
        second = self._one(first.y_end, t + 0.5 * h, 0.5 * h, self._slope_at_end(first), last)
        second.h = (t + h) - second.t
        with torch.no_grad():
            return [first, second], (second.y_end - whole.y_end) / (2**self.method.order - 1)

    def _one(self, y: Tensor, t: float, h: float, slope: Tensor, last: bool) -> Piece:
        method = self.method
        size: Size = h
        start: Tensor | float = t
        if self.t is None:
            times: Sequence[Tensor] = torch.tensor(
                [t + c * h for c in method.c], dtype=self.field.time_dtype, device=self.field.device
            ).unbind()
        else:
            start = self.t[0] + (t - self.times[0])
            exact = (self.t[-1] - start) if last and t + h == self.times[-1] else None
            wide = torch.as_tensor(h, dtype=start.dtype, device=start.device) if exact is None else exact
            times = [(start + c * wide).to(self.field.device, self.field.time_dtype) for c in method.c]
            size = h if exact is None else exact.to(self.field.device, self.field.dtype)
        if self.solve is not None:
            self.solve.where = t, h
        known = slope if method.starts_with_slope else None
        slopes = stages(self.field, method, y, times, size, known, self.solve)
        after = end(method, y, size, slopes)
        return Piece(method, t, h, size, y, after, [*slopes, slope, slopes[-1]])

    def _slope_at_end(self, piece: Piece) -> Tensor:
        """f at the end of a step, evaluated once if no stage is there."""
        if not self.method.ends_with_slope and piece.slopes[-1] is piece.slopes[-3]:
            piece.slopes[-1] = self.field(self._at(piece.t + piece.h), piece.y_end)
        return piece.slopes[-1]

    def _complete(self, piece: Piece) -> Piece:
        """The piece with the slopes at both ends, which interpolation needs."""
        if len(piece.slopes) == len(self.method.b):  # of given steps
            start = piece.slopes[0] if self.method.starts_with_slope else self.field(self._at(piece.t), piece.y)
            piece.slopes = [*piece.slopes, start, piece.slopes[-1]]
        self._slope_at_end(piece)
        return piece

    def _parts(self, piece: Piece, times: list[float], indices: list[int] | None) -> Tensor:
        """Which parts of a step some times in it are, ``[n]``."""
        if self.t is None or indices is None:
            parts = [(time - piece.t) / piece.h for time in times]
            return torch.tensor(parts, dtype=self.field.time_dtype, device=self.field.device)
        start = self.t[0] + (piece.t - self.times[0])
        return ((self.t[indices] - start) / piece.size).to(self.field.device, self.field.time_dtype)

    def _at(self, t: float) -> Tensor:
        """A time as f sees it, differentiable if the first one is."""
        if self.t is None:
            return self._time(t)
        return (self.t[0] + (t - self.times[0])).to(self.field.device, self.field.time_dtype)

    def _time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=self.field.time_dtype, device=self.field.device)
