"""The time loop: steps of any method from the first time to the last, given or chosen by error control.

Gradients are autograd's: every operation here is differentiable, and what is decided (which steps to take) is a number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from itertools import accumulate
from math import copysign, inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from nodeshape._errors import StageSolveError, StepSizeError
from nodeshape._ode.control import Controller
from nodeshape._ode.field import Field
from nodeshape._ode.method import Method
from nodeshape._ode.root import StageEquations
from nodeshape._ode.stage import MOST_AHEAD, predicted
from nodeshape._ode.step import Piece, Size, end, error, stages
from nodeshape._ode.unrolled import current, is_recording, is_tracing

if TYPE_CHECKING:
    from nodeshape._ode.compiled import Step
    from nodeshape._ode.recompute import Recorder

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
    """``count`` equal steps from ``start`` to ``end``; ``ends`` are the same as tensors that are differentiated."""

    start: float
    end: float
    count: int
    ends: tuple[Tensor, Tensor] | None = None


@dataclass
class Loop:
    """A solve of one field by one method.

    Attributes:
        times: observation times, numbers.
        t: the same as a tensor that is differentiated or traced; None where they are only numbers.
        solve: of the stages that are equations.
        callbacks: None where the user has none.
        perturb: evaluate f just inside a step at its ends, for an f that jumps there.
        recorder: of the steps, for a gradient that takes them anew.
        compiled: a given step in one, for :meth:`fixed` of explicit methods.
        on_failure: ``"raise"``, or ``"nan"`` for samples that fail while the others live on.
        failures: why a sample failed, by its number.
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
    recorder: Recorder | None = None
    compiled: Step | None = None
    on_failure: str = "raise"
    failures: dict[int, str] = default(default_factory=dict)
    accepted: int = 0
    rejected: int = 0
    pieces: list[Piece] = default(default_factory=list)
    _before: list[tuple[float, Tensor]] = default(default_factory=list)  # time and slope of stages, the latest first
    _attempts: int = 0
    _most: float = inf

    # ---- given steps -------------------------------------------------------------------------------------------------

    def fixed(self, y: Tensor, counts: Sequence[int]) -> Tensor:
        """Take ``counts[j]`` equal steps from ``times[j]`` to ``times[j + 1]``; the states there ``[times, ...]``."""
        y = self._begun(y)
        states = [self._without_failed(y)]
        slope: Tensor | None = None
        unrolled = current()
        steps = [y[None]]
        segments = [
            Segment(self.times[j], self.times[j + 1], count, None if self.t is None else (self.t[j], self.t[j + 1]))
            for j, count in enumerate(counts)
        ]
        if unrolled is not None and unrolled.form == "scan" and is_recording():
            after_each = self._scanned(y, segments)
            steps.append(after_each)
            states += [self._without_failed(after_each[last - 1]) for last in accumulate(counts)]
            segments = []
        for segment in segments:
            if unrolled is not None and unrolled.form == "loop" and is_recording():
                y = self._looped(y, segment, unrolled.given)
            else:
                for _, after, last in self._segment(y, segment, slope):
                    y_after, slope_after = after, last
                    if unrolled is not None and unrolled.states is not None:
                        steps.append(after[None])
                y, slope = y_after, slope_after
            states.append(self._without_failed(y))
        if unrolled is not None:
            unrolled.counts.update(counts)
            if unrolled.states is not None:
                whole = torch.cat(steps)
                unrolled.states(self.field.unpack(whole, (len(whole),)))
        return torch.stack(states)

    def _scanned(self, y: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The states after each step ``[steps, ...]`` of all segments, by one recorded step."""
        grids = [(self._grid_times(x, 0, x.count), x.count) for x in segments]
        size: Size | None = grids[0][0][1]  # a number in the record, where it is the same in all segments
        if not all(isinstance(h, float) and h == size for (_, h), _ in grids) and len(grids) > 1:
            size = None
        rows = [torch.stack(list(times)).reshape(count, -1) for (times, _), count in grids]
        if size is None:
            sizes = [torch.as_tensor(h, dtype=rows[0].dtype).expand(count, 1) for (_, h), count in grids]
            # How far each step's stage lies ahead, which is of use where a step has one.
            at = torch.cat(rows)[:, 0]
            between = torch.cat([at.new_zeros(1), at.diff()])
            ahead = torch.cat([at.new_zeros(1), between[1:] / between[:-1]])
            ahead = torch.where((ahead > 0.0) & (ahead <= MOST_AHEAD), ahead, 0.0)[:, None]
            rows = [torch.cat([torch.cat(rows), torch.cat(sizes), ahead], dim=1)]

        one: Size = 1.0

        def step(carry: tuple[Tensor, ...], now: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            y, *before = carry
            times, h, ahead = list(now.unbind()), size, one
            if h is None:
                *times, own, far = times
                h, ahead = own.to(self.field.dtype), far.to(self.field.dtype)
            slopes = stages(self.field.alone, self.method, y, times, h, None, self._guessed(before, ahead), self.solve)
            after = end(self.method, y, h, slopes).contiguous()
            return (after, *self._latest(slopes, before)), after.clone()

        y = y.contiguous().clone()
        carried = (y, *self._no_slopes(y))
        states: Tensor = scan(step, carried, torch.cat(rows))[1]
        return states

    def _looped(self, y: Tensor, segment: Segment, given: Tensor | None) -> Tensor:
        """The state at the end of the segment by one step that is recorded as the body of a loop.

        Args:
            given: how many steps to take; by default as many as the segment has.
        """
        kind, device = self.field.time_dtype, self.field.device
        count = torch.tensor(segment.count, device=device) if given is None else given
        start, stop = (torch.tensor(x, dtype=torch.float64) for x in (segment.start, segment.end))
        if segment.ends is not None:
            start, stop = segment.ends
        begin, length = (
            x.to(device, kind).clone() for x in (start, stop - start)
        )  # no views, which a loop cannot take

        def more(k: Tensor, *_: Tensor) -> Tensor:
            return k < count

        def one(k: Tensor, y: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
            h = length / count
            times = [begin + (k.to(kind) + c) * h for c in self.method.c]
            slopes = stages(self.field.alone, self.method, y, times, h, None, self._guessed(before, 1.0), self.solve)
            after = end(self.method, y, h, slopes).contiguous()
            return k + 1, after, *self._latest(slopes, before)

        y = y.contiguous().clone()
        first = torch.zeros((), dtype=torch.long, device=device)
        reached: Tensor = while_loop(more, one, (first, y, *self._no_slopes(y)))[1]
        return reached

    # The slopes before a step that is recorded are values that it takes and gives: those that guess its stage, first 0.

    def _no_slopes(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.solve is None:
            return ()
        return tuple(torch.zeros_like(y) for _ in range(2 if self._extrapolates else 1))

    def _guessed(self, before: Sequence[Tensor], ahead: Size) -> Tensor | None:
        if len(before) < 2:
            return before[0] if before else None
        last, earlier = before
        return predicted(last, earlier, ahead, self.field.rows)

    def _latest(self, slopes: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.clone().contiguous() for x in (slopes[-1], *before[:1])[: len(before)])

    def on_grid(self, y: Tensor, grid: Sequence[float], traced: Tensor | None, cubic: bool) -> Tensor:
        """Step from point to point of a grid; observations between its points are interpolated.

        Args:
            grid: from the first to the last time, one way.
            traced: the same as a tensor that is differentiated; None where the times are not.
            cubic: interpolate with the slopes at both ends, else linearly.
        """
        y = self._begun(y)
        states, j = [self._without_failed(y)], 1
        unrolled, steps = current(), [y[None]]
        told = None if unrolled is None else unrolled.states
        sign = copysign(1.0, grid[-1] - grid[0])
        slope: Tensor | None = None
        for k, (start, stop) in enumerate(zip(grid, grid[1:])):
            ends = None if traced is None else (traced[k], traced[k + 1])
            ((piece, after, slope),) = self._segment(y, Segment(start, stop, 1, ends), slope, keep=True)
            assert piece is not None
            while j < len(self.times) and sign * self.times[j] <= sign * stop:
                if self.times[j] == stop and self.t is None:
                    between = after
                elif cubic:
                    between = self._complete(piece).states(self._parts(piece, [j]))[0]
                else:
                    between = y + (after - y) * self._parts(piece, [j])
                states.append(self._without_failed(between))
                j += 1
            y = after
            if told is not None:
                steps.append(y[None])
        if told is not None:
            whole = torch.cat(steps)
            told(self.field.unpack(whole, (len(whole),)))
        return torch.stack(states)

    def _segment(
        self, y: Tensor, segment: Segment, slope: Tensor | None, keep: bool = False
    ) -> Iterator[tuple[Piece | None, Tensor, Tensor | None]]:
        """Yield each step's piece (where pieces are kept), the state and, if known, the slope at its end."""
        method, keep = self.method, keep or self.keep
        for first in range(0, segment.count, BLOCK):
            count = min(BLOCK, segment.count - first)
            times, h = self._grid_times(segment, first, count)
            per_step = len(method.c)
            length = (segment.end - segment.start) / segment.count
            for k in range(count):
                start = segment.start + (first + k) * length
                if self.callbacks is not None:
                    self.callbacks.step(self._time(start), y.clone(), self._time(abs(length)))
                if self.solve is not None:
                    self.solve.where = start, length
                reused = method.starts_with_slope and not self.perturb and self.recorder is None
                known = slope if reused else None
                now = times[k * per_step : (k + 1) * per_step]
                before = self.recorder.before() if self.recorder is not None else None
                at = start + method.c[0] * length
                after, slopes = self._given(y, at, now, h, known)
                may_fail = self.on_failure == "nan" and self.recorder is None and not is_tracing()
                if may_fail and self._lost(after, start + length) is not None:
                    after, slopes = self._given(y, at, now, h, None)  # without them, as what they gave has no gradient
                if self.recorder is not None:
                    self.recorder.after(start, length, y, slopes, before)
                slope = slopes[-1] if slopes and method.ends_with_slope else None
                self.accepted += 1
                piece = None
                if keep:
                    part = (first + k) / segment.count
                    begin = start if segment.ends is None else torch.lerp(*segment.ends, part)
                    piece = Piece(method, start, length, start + length, begin, h, y, after, slopes)
                if self.keep and piece is not None:
                    self.pieces.append(piece)
                y = after
                yield piece, y, slope

    def _given(
        self, y: Tensor, at: float, times: Sequence[Tensor], h: Size, known: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The state after one step, and the slopes of its stages, of which the first may be known.

        Args:
            at: the time of the first stage, as a number.
        """
        if self.compiled is not None and self.field.frozen is None:
            size = h if isinstance(h, Tensor) else torch.tensor(h, dtype=self.field.time_dtype)
            self.field.evaluations += len(self.method.c)
            return self.compiled(y, times, size), []
        guess = None if self.solve is None else self._predicted(at)
        slopes = stages(self.field, self.method, y, times, h, known, guess, self.solve)
        if self.solve is not None:
            earlier = [x for x in self._before if x[0] != at]  # not of the same stage, if it is solved once more
            self._before = [(at, slopes[-1].detach()), *(earlier[:1] if self._extrapolates else [])]
        return end(self.method, y, h, slopes), slopes

    @property
    def _extrapolates(self) -> bool:
        """Whether the stages of successive steps are of one kind."""
        return self.solve is not None and len(self.method.c) == 1

    def _predicted(self, at: float) -> Tensor | None:
        """The slope that a stage is guessed to have, from those before it."""
        if len(self._before) < 2:
            return self._before[0][1] if self._before else None
        (latest, last), (earlier, before) = self._before
        ahead = (at - latest) / (latest - earlier) if latest != earlier else 0.0
        return predicted(last, before, ahead, self.field.rows) if 0.0 < ahead <= MOST_AHEAD else last

    def _grid_times(self, segment: Segment, first: int, count: int) -> tuple[Sequence[Tensor], Size]:
        """The times of all stages of ``count`` steps, in order, and the size of a step."""
        parts = [(k + c) / segment.count for k in range(first, first + count) for c in self.method.c]
        kind, device = self.field.time_dtype, self.field.device
        h: Size = (segment.end - segment.start) / segment.count
        if segment.ends is None:
            length = segment.end - segment.start
            times = torch.tensor([segment.start + part * length for part in parts], dtype=kind, device=device)
        else:
            begin, finish = segment.ends
            whole = finish - begin
            times = (begin + whole * torch.tensor(parts, dtype=begin.dtype, device=begin.device)).to(device, kind)
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
        y = self._begun(y)
        states: list[Tensor] = [self._without_failed(y)[None]]
        j, sign = 1, copysign(1.0, self.times[-1] - self.times[0])
        self.begin_counting(most_steps)
        for piece, after in self.steps(y, control, self.times[-1], stops, jumps):
            if piece is None:
                continue
            reached, inside = piece.t_end, []
            # An observation at the end of a step moves with its time, except the last, which the step ends with.
            moves = self.t is not None and reached != self.times[-1]
            while j < len(self.times) and (
                sign * self.times[j] < sign * reached or (moves and self.times[j] == reached)
            ):
                inside.append(j)
                j += 1
            if inside:
                x = self._parts(piece, inside)
                states.append(self._without_failed(self._complete(piece).states(x), lead=1))
            if j < len(self.times) and self.times[j] == reached:
                states.append(self._without_failed(after)[None])
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
        if under_vmap():
            raise RuntimeError(
                "error control cannot be mapped by torch.func.vmap, which has no number to decide by: solve the batch"
                " as one state, or give steps"
            )
        sign = copysign(1.0, last - t)
        if not bool(torch.isfinite(y).all()):
            raise StepSizeError(
                f"the state at t={t:.6g} is not finite, so no step from there can be judged;"
                " options={'on_failure': 'nan'} lets the other samples live on"
            )
        stop_times = sorted({sign * s for s in (*stops, *jumps)})
        slope = self.field(self._at(t), y)
        h = control.first(y, slope, lambda h, z: self.field(self._at(t + sign * h), z))
        ratio = 0.0
        estimate: Tensor | None = None
        while t != last:
            if self._attempts >= self._most:
                self._give_up(
                    estimate,
                    control,
                    y,
                    f"error control made as many attempts as allowed and stands at t={t:.6g} (error {ratio:.1e} of the"
                    " tolerance): loosen rtol and atol, raise options={'max_num_steps': ...}, or use an implicit method"
                    " if the problem is stiff",
                )
                slope = self.field(self._at(t), y)
            i = bisect_right(stop_times, sign * t)
            limit = sign * min(stop_times[i], sign * last) if i < len(stop_times) else last
            rest = abs(limit - t)
            size = h if h < rest * (1 - 1e-9) else rest
            target = limit if size == rest else t + sign * size
            if target == t:
                self._give_up(
                    estimate,
                    control,
                    y,
                    f"error control cannot get past t={t:.6g}: it needs steps below the resolution of time (error"
                    f" {ratio:.1e} of the tolerance); loosen rtol and atol, name times at which func jumps in"
                    " options={'jump_t': ...}, or use an implicit method if the problem is stiff",
                )
                slope, h = (
                    self.field(self._at(t), y),
                    1e-6 * (max(1.0, abs(t)) if limit in (inf, -inf) else abs(limit - t)),
                )
                continue
            step = target - t
            if self.callbacks is not None:
                self.callbacks.step(self._at(t), y.clone(), self._time(size))
            try:
                self._attempts += 1
                pieces, estimate = self._attempt(y, t, step, target, slope, target == last, target in jumps)
                ratio = control.ratio(estimate, y, pieces[-1].y_end)
            except StageSolveError:
                if size <= control.min_step:
                    raise
                ratio, pieces = inf, []
            kept = control.accepts(size, ratio) and bool(pieces)
            if self.callbacks is not None:
                told = self.callbacks.accept if kept else self.callbacks.reject
                told(self._at(t), y.clone(), self._time(size))
            proposed = control.next(size, ratio)
            if kept:
                self.accepted += len(pieces)
                for piece in pieces:
                    if self.recorder is not None:
                        slopes = piece.slopes[:-2]
                        self.recorder.after(piece.t, piece.h, piece.y, slopes, piece.before)
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
                if pieces and size <= control.min_step:
                    self._give_up(
                        estimate,
                        control,
                        y,
                        f"a step of the smallest size allowed, {size:.3g}, has no finite result at t={t:.6g}: lower"
                        " options={'min_step': ...}, or use an implicit method if the problem is stiff",
                    )
                    slope = self.field(self._at(t), y)

    # ---- samples that fail -------------------------------------------------------------------------------------------

    def fail(self, which: Tensor, why: Callable[[int], str]) -> None:
        """Take samples ``which`` ``[samples]`` out of the solve: their slope is 0 from now on, their states are NaN."""
        frozen = self.field.frozen
        for i in which.nonzero()[:, 0].tolist():
            self.failures.setdefault(i, why(i))
        self.field.frozen = which if frozen is None else frozen | which
        self._attempts = 0

    def _begun(self, y: Tensor) -> Tensor:
        """The first state, without samples that are not finite if they may fail."""
        if self.on_failure == "raise" or is_tracing():
            return y
        return y if self._lost(y, self.times[0]) is None else self.field.without_frozen(y)

    def _lost(self, y: Tensor, time: float) -> Tensor | None:
        """Samples ``[samples]`` that are not finite, which fail by it; None if there are none."""
        lost = ~torch.isfinite(y.detach()).reshape(self.field.samples, self.field.size).all(dim=1)
        if not bool(lost.any()):
            return None
        self.fail(lost, lambda i: f"the state at t={time:.6g} is not finite")
        return lost

    def _without_failed(self, y: Tensor, lead: int = 0) -> Tensor:
        """A state, or several in ``lead`` dimensions before it, NaN for samples that failed."""
        frozen = self.field.frozen
        if frozen is None or not self.field.batched:
            return y if frozen is None else torch.full_like(y, torch.nan)
        return y.masked_fill(self.field.column(frozen, y[0] if lead else y), torch.nan)

    def _give_up(self, estimate: Tensor | None, control: Controller, y: Tensor, message: str) -> None:
        """Raise, or freeze the samples whose own error is too large while the others live on."""
        if self.on_failure == "raise" or estimate is None:
            raise StepSizeError(message)
        scaled = (estimate / control.scale(y, y)).reshape(self.field.samples, self.field.size).double()
        errors = scaled.square().mean(dim=1).sqrt().nan_to_num(inf)
        # A norm of the whole may be too large although no sample's is: then the worst one is at fault.
        worst = errors >= errors.max().clamp(max=1.0)
        self.fail(worst, lambda i: message)

    def _attempt(
        self, y: Tensor, t: float, h: float, t_end: float, slope: Tensor, last: bool, jumps: bool
    ) -> tuple[list[Piece], Tensor]:
        """One step and the estimate of its error; where the method has none, two halves that are compared with it."""
        whole = self._one(y, t, h, t_end, slope, last, jumps)
        if self.method.error:
            return [whole], error(self.method, h, [x.detach() for x in whole.slopes[:-2]])
        middle = t + 0.5 * h
        first = self._one(y, t, 0.5 * h, middle, slope, False, False)
        second = self._one(first.y_end, middle, t_end - middle, t_end, self._slope_at_end(first), last, jumps)
        with torch.no_grad():
            return [first, second], (second.y_end - whole.y_end) / (2**self.method.order - 1)

    def _one(self, y: Tensor, t: float, h: float, t_end: float, slope: Tensor, last: bool, jumps: bool) -> Piece:
        """A step; f is not evaluated at its end but just before it where it ``jumps`` there."""
        method, kind, device = self.method, self.field.time_dtype, self.field.device
        size: Size = h
        before = self.recorder.before() if self.recorder is not None else None
        start: Tensor | float = t
        if self.t is None:
            times: Sequence[Tensor] = torch.tensor([t + c * h for c in method.c], dtype=kind, device=device).unbind()
        else:
            start = self.t[0] + (t - self.times[0])
            exact = (self.t[-1] - start) if last else None
            wide = torch.as_tensor(h, dtype=start.dtype, device=start.device) if exact is None else exact
            times = [(start + c * wide).to(device, kind) for c in method.c]
            size = h if exact is None else exact.to(device, kind)
        if jumps:
            back = torch.tensor(copysign(inf, -h), dtype=kind, device=device)
            times = [
                x + (torch.nextafter(x.detach(), back) - x.detach()) if c == 1.0 else x for c, x in zip(method.c, times)
            ]
        if self.solve is not None:
            self.solve.where = t, h
        known = slope if method.starts_with_slope and self.recorder is None else None
        slopes = stages(self.field, method, y, times, size, known, slope.detach(), self.solve)
        after = end(method, y, size, slopes)
        return Piece(method, t, h, t_end, start, size, y, after, [*slopes, slope, slopes[-1]], before)

    def _slope_at_end(self, piece: Piece) -> Tensor:
        """f at the end of a step, evaluated once if no stage is there."""
        if not self.method.ends_with_slope and piece.slopes[-1] is piece.slopes[-3]:
            piece.slopes[-1] = self.field(self._at(piece.t_end), piece.y_end)
        return piece.slopes[-1]

    def _complete(self, piece: Piece) -> Piece:
        """The piece with the slopes at both ends, which interpolation needs."""
        if len(piece.slopes) == len(self.method.b):  # of given steps
            start = piece.slopes[0] if self.method.starts_with_slope else self.field(self._at(piece.t), piece.y)
            piece.slopes = [*piece.slopes, start, piece.slopes[-1]]
        self._slope_at_end(piece)
        return piece

    def _parts(self, piece: Piece, indices: list[int]) -> Tensor:
        """Which parts of a step some observation times in it are, ``[n]``."""
        if self.t is None:
            parts = [(self.times[i] - piece.t) / piece.h for i in indices]
            return torch.tensor(parts, dtype=self.field.time_dtype, device=self.field.device)
        return piece.part(self.t[indices]).to(self.field.device, self.field.time_dtype)

    def begin_counting(self, most_steps: float) -> None:
        """Allow this many attempts from now on."""
        self._attempts, self._most = 0, most_steps

    def _at(self, t: float) -> Tensor:
        """A time as f sees it, differentiable if the first one is."""
        if self.t is None:
            return self._time(t)
        return (self.t[0] + (t - self.times[0])).to(self.field.device, self.field.time_dtype)

    def _time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=self.field.time_dtype, device=self.field.device)


def under_vmap() -> bool:
    active = torch._C._functorch.peek_interpreter_stack()
    return active is not None and active.key() == torch._C._functorch.TransformType.Vmap
