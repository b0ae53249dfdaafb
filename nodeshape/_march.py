"""The time loop: one step of the theta family, and the two ways of choosing steps (equal, or by error control).

Everything marches rows ``[samples, size]``. A step is ``(t, h)``: two numbers shared by the batch, or two tensors
``[samples]`` where each sample chose its own; then a step of h = 0 is a sample waiting for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from nodeshape._method import Method
from nodeshape._stage import Stage, StageSolveError, anderson_stage, explicit_stage, newton_stage
from nodeshape._system import System, Time

#: f of the marched system, and (for Newton) its Jacobian, both at a time.
VectorField = Callable[[Time, Tensor], Tensor]
Jacobian = Callable[[Time, Tensor], Tensor]


class StepSizeError(RuntimeError):
    """Error control could not reach the end of the interval."""


@dataclass(frozen=True)
class StageSolver:
    """How stage equations are solved, and what to say when they are not.

    Attributes:
        name: ``"anderson"`` or ``"newton"``.
        tolerance: relative residual (Anderson) or correction (Newton) of a solved stage.
        max_iterations: evaluations of f a stage may take.
    """

    name: str
    tolerance: float
    max_iterations: int

    def solve(
        self,
        function: Callable[[Tensor], Tensor],
        jacobian: Callable[[Tensor], Tensor] | None,
        base: Tensor,
        c: float | Tensor,
        guess: Tensor,
    ) -> Stage:
        """Solve Y = base + c F(Y), without judging the outcome. ``c`` is a number or ``[samples]``."""
        if not isinstance(c, Tensor) and c == 0.0:
            return explicit_stage(function, base)
        factor = c[:, None] if isinstance(c, Tensor) else c
        if self.name == "newton" and jacobian is not None:
            return newton_stage(function, jacobian, base, factor, guess, self.tolerance, self.max_iterations)
        return anderson_stage(function, base, factor, guess, self.tolerance, self.max_iterations)

    def check(self, stage: Stage, t: Time, h: Time, sweep: str) -> None:
        """Raise StageSolveError if a sample's stage was not solved."""
        failed = ~stage.solved
        if not bool(failed.any()):
            return
        count = int(failed.sum())
        first = int(failed.nonzero()[0])
        remedy = "use adjoint='discrete'" if sweep == "reversed" else "take smaller steps"
        if self.name == "anderson":
            remedy += ", for a small stiff state use options={'stage_solver': 'newton'}"
        raise StageSolveError(
            f"{count} of {failed.numel()} samples (the first is number {first}) did not solve the {sweep} stage equation"
            f" at t={_number(t, first):.6g} with h={_number(h, first):.3g}: relative residual"
            f" {float(stage.residual[first]):.1e} after {int(stage.evaluations[first])} evaluations, tolerance"
            f" {self.tolerance:.1e}; {remedy}, or loosen options={{'stage_tolerance': ...}}"
        )


def _number(value: Time, sample: int) -> float:
    return float(value[sample]) if isinstance(value, Tensor) else value


def _column(h: Time, dtype: torch.dtype) -> Tensor | float:
    return h[:, None].to(dtype) if isinstance(h, Tensor) else h


@dataclass
class Marcher:
    """One-stage steps of a vector field, forwards (theta) or undone (``reverse``), each stage guessed from the last.

    Attributes:
        field: F(t, rows).
        jacobian: ∂F/∂rows, needed by Newton only.
        theta: where in the step the stage lies.
        solver: of the stage equation.
    """

    field: VectorField
    jacobian: Jacobian | None
    theta: float
    solver: StageSolver
    slope: Tensor | None = None  # of the latest stage

    def attempt(self, y: Tensor, t: Time, h: Time, slope: Tensor | None) -> tuple[Tensor, Stage]:
        """Step from ``y`` at ``t`` to ``t + h`` without judging or remembering the stage."""
        return self._stage(y, t + self.theta * h, h, self.theta * h, slope)

    def step(self, y: Tensor, t: Time, h: Time) -> tuple[Tensor, Stage]:
        """Step from ``y`` at ``t`` to ``t + h``."""
        y, stage = self.attempt(y, t, h, self.slope)
        self.solver.check(stage, t, h, "forward" if _forward(h) else "backward")
        self.slope = stage.slope
        return y, stage

    def undo(self, y: Tensor, t: Time, h: Time) -> tuple[Tensor, Stage]:
        """Step back from ``y`` at ``t + h`` to ``t`` through the very stage of the step from ``t``.

        This is the adjoint method, 1 − theta, run with −h.
        """
        y, stage = self._stage(y, t + self.theta * h, -h, -(1.0 - self.theta) * h, self.slope)
        self.solver.check(stage, t, h, "reversed")
        self.slope = stage.slope
        return y, stage

    def _stage(self, y: Tensor, t: Time, h: Time, c: Time, slope: Tensor | None) -> tuple[Tensor, Stage]:
        guess = y if slope is None else y + _column(c, y.dtype) * slope
        jacobian = self.jacobian
        stage = self.solver.solve(
            lambda rows: self.field(t, rows),
            None if jacobian is None else lambda rows: jacobian(t, rows),
            y,
            c.to(y.dtype) if isinstance(c, Tensor) else c,
            guess,
        )
        if isinstance(h, Tensor):  # a waiting sample keeps its state even where its slope is not finite
            column = h[:, None].to(y.dtype)
            return torch.where(column != 0, y + column * stage.slope, y), stage
        return y + h * stage.slope, stage


def _forward(h: Time) -> bool:
    return bool((h >= 0).all()) if isinstance(h, Tensor) else h >= 0


@dataclass(frozen=True)
class EqualSteps:
    """``count`` equal steps an interval, or as many as ``size`` asks for: ceil(length / size)."""

    count: int | None = None
    size: float | None = None

    def number(self, length: float) -> int:
        """Steps in an interval of signed length ``length``."""
        if self.count is not None:
            return self.count
        assert self.size is not None
        # A length that is a multiple of the size up to rounding takes that multiple.
        return max(1, ceil(abs(length) / self.size * (1.0 - 1e-12)))

    def march(
        self, marcher: Marcher, y: Tensor, start: float, end: float
    ) -> Iterator[tuple[Time, Time, Tensor, Stage]]:
        """Yield (t, h, y after the step, stage) for each step from ``start`` to ``end``."""
        count = self.number(end - start)
        h = (end - start) / count
        for k in range(count):
            t = start + k * h
            y, stage = marcher.step(y, t, h)
            yield t, h, y, stage


@dataclass
class ErrorControl:
    """Steps of each sample's own, by step doubling and a PI controller (Hairer, Nørsett & Wanner, II.4; Söderlind 2003).

    An attempt takes one step of h and two of h/2; their difference over 2^p − 1 estimates the error of the halves,
    which are kept if rms(error / (atol + rtol max(|y|, |y_new|))) ≤ 1 for that sample.

    Attributes:
        method: for its order p.
        rtol, atol: relative and absolute tolerance.
        min_step: in units of the interval's length; smaller raises StepSizeError.
        max_steps: accepted and rejected steps a sample may take in one interval; more raises StepSizeError.
        shared: one step for the whole batch, for an f that cannot be evaluated sample by sample.
    """

    method: Method
    rtol: float
    atol: float
    min_step: float
    max_steps: int
    shared: bool
    rejected: Tensor | None = None  # [samples], attempts thrown away, over all intervals
    evaluations: Tensor | None = None  # [samples], of f in stages that are not part of the solution

    def march(
        self, marcher: Marcher, y: Tensor, start: float, end: float
    ) -> Iterator[tuple[Time, Time, Tensor, Stage]]:
        """Yield (t, h, y after the step, stage) for each half step; samples that wait have h = 0."""
        length = end - start
        samples = y.shape[0]
        count = dict(dtype=torch.float64, device=y.device)
        alive = torch.isfinite(y).all(dim=1)  # the others are NaN already and have nowhere to go
        done = torch.where(alive, 0.0, 1.0).to(**count)  # fraction of the interval covered
        size = self._first_size(marcher, y, start, length).to(**count)
        previous = torch.ones(samples, **count)
        attempts = torch.zeros(samples, dtype=torch.long, device=y.device)
        if self.rejected is None or self.evaluations is None:
            self.rejected = torch.zeros_like(attempts)
            self.evaluations = torch.ones_like(attempts)  # the one that chose the first step
        slope = marcher.slope
        while bool((done < 1.0).any()):
            moving = done < 1.0
            size = torch.minimum(size, 1.0 - done)
            size = torch.where(1.0 - done - size < 1e-3 * size, 1.0 - done, size)  # no sliver at the end
            h = torch.where(moving, size * length, 0.0)
            t: Time = start + done * length
            big, first_try = self._attempt(marcher, y, t, h, slope)
            middle, first = self._attempt(marcher, y, t, 0.5 * h, slope)
            small, second = self._attempt(marcher, middle, t + 0.5 * h, 0.5 * h, first.slope)
            error = self._error(big, small, y)
            solved = first_try.solved & first.solved & second.solved
            error = torch.where(solved & torch.isfinite(error), error, torch.inf)
            accept = moving & (error <= 1.0)
            if self.shared:
                worst = torch.where(moving, error, 0.0).max()
                error = torch.where(moving, worst, error)
                accept = moving & (worst <= 1.0)
            attempts = attempts + moving
            self.rejected = self.rejected + (moving & ~accept)

            for stage in (first_try, first, second):
                stage.evaluations = torch.where(moving, stage.evaluations, 0)
            self.evaluations = self.evaluations + first_try.evaluations
            if bool(accept.any()):
                rows = accept[:, None]
                y_middle, y = torch.where(rows, middle, y), torch.where(rows, small, y)
                slope = second.slope if slope is None else torch.where(rows, second.slope, slope)
                marcher.slope = slope
                half: Time = torch.where(accept, 0.5 * h, 0.0)
                if self.shared:
                    i = int(accept.nonzero()[0])
                    t, half = float(t[i]), float(half[i])
                yield t, half, y_middle, first
                yield t + half, half, y, second
            else:
                self.evaluations = self.evaluations + first.evaluations + second.evaluations

            done = torch.where(accept, torch.where(size >= 1.0 - done, 1.0, done + size), done)
            size, previous = self._next_size(size, error, previous, accept, moving)
            self._give_up(done, size, attempts, start, length, error)

    def _attempt(self, marcher: Marcher, y: Tensor, t: Tensor, h: Tensor, slope: Tensor | None) -> tuple[Tensor, Stage]:
        if self.shared:  # f takes one time: all moving samples have the same
            moving = h != 0
            if not bool(moving.any()):
                return marcher.attempt(y, float(t[0]), 0.0, slope)
            i = int(moving.nonzero()[0])
            stepped, stage = marcher.attempt(y, float(t[i]), float(h[i]), slope)
            return torch.where(moving[:, None], stepped, y), stage
        return marcher.attempt(y, t, h, slope)

    def _error(self, big: Tensor, small: Tensor, y: Tensor) -> Tensor:
        scale = self.atol + self.rtol * torch.maximum(y.abs(), small.abs())
        error = (small - big) / (2**self.method.order - 1)
        return (error / scale).square().mean(dim=1).sqrt().double()

    def _first_size(self, marcher: Marcher, y: Tensor, start: float, length: float) -> Tensor:
        """A first step, as a fraction of the interval, that changes the state by a hundredth (HNW II.4, step a–b)."""
        slope = marcher.slope
        if slope is None:
            slope = marcher.field(start, y)
        scale = self.atol + self.rtol * y.abs()
        d0 = (y / scale).square().mean(dim=1).sqrt()
        d1 = (slope / scale).square().mean(dim=1).sqrt() * abs(length)
        size = torch.where((d0 < 1e-5) | ~(d1 > 1e-5), 1e-3, 0.01 * d0 / d1).double()
        size = size.nan_to_num(1e-3).clamp(max(10 * self.min_step, 1e-12), 1.0)
        return size.min().expand_as(size) if self.shared else size

    def _next_size(
        self, size: Tensor, error: Tensor, previous: Tensor, accept: Tensor, moving: Tensor
    ) -> tuple[Tensor, Tensor]:
        order = self.method.order + 1
        bounded = error.clamp(1e-10, 1e10)
        factor = 0.9 * bounded ** (-0.7 / order) * previous ** (0.4 / order)
        factor = torch.where(accept, factor.clamp(0.2, 5.0), (0.9 * bounded ** (-1.0 / order)).clamp(0.1, 0.9))
        return torch.where(moving, size * factor, size), torch.where(accept, bounded, previous)

    def _give_up(
        self, done: Tensor, size: Tensor, attempts: Tensor, start: float, length: float, error: Tensor
    ) -> None:
        small = (done < 1.0) & (size < self.min_step) & (1.0 - done > self.min_step)
        many = (done < 1.0) & (attempts >= self.max_steps)
        stuck = small | many
        if not bool(stuck.any()):
            return
        i = int(stuck.nonzero()[0])
        why = (
            f"needs steps under min_step={self.min_step:.1e} of the interval"
            if bool(small[i])
            else f"has taken max_steps={self.max_steps} steps"
        )
        raise StepSizeError(
            f"{int(stuck.sum())} of {stuck.numel()} samples (the first is number {i}) cannot be carried past"
            f" t={start + float(done[i]) * length:.6g}: sample {i} {why} (error {float(error[i]):.1e} of the tolerance);"
            " loosen rtol and atol, raise options={'max_steps': ...}, or use an implicit method if the problem is stiff"
        )


Steps = EqualSteps | ErrorControl


def marcher_of(system: System, theta: float, solver: StageSolver) -> Marcher:
    """A marcher of the system itself."""
    return Marcher(system, system.jacobian, theta, solver)
