"""The time loop: one step of the theta family, and equal steps made of it.

Everything marches rows ``[samples, size]``. A step is ``(t, h)``: two numbers shared by the batch, or two tensors
``[samples]`` where each sample chose its own; then a step of h = 0 is a sample waiting for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from nodeshape._errors import StageSolveError
from nodeshape._ode.stage import Stage, anderson_stage, explicit_stage, newton_stage
from nodeshape._ode.system import System, Time


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
        jacobian: Callable[[Tensor], Tensor],
        base: Tensor,
        c: float | Tensor,
        guess: Tensor,
    ) -> Stage:
        """Solve Y = base + c F(Y), without judging the outcome. ``c`` is a number or ``[samples]``."""
        if not isinstance(c, Tensor) and c == 0.0:
            return explicit_stage(function, base)
        factor = column(c, base)
        if self.name == "newton":
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
            f"{count} of {failed.numel()} samples (the first is number {first}) did not solve the {sweep} stage"
            f" equation at t={_number(t, first):.6g} with h={_number(h, first):.3g}: relative residual"
            f" {float(stage.residual[first]):.1e} after {int(stage.evaluations[first])} evaluations, tolerance"
            f" {self.tolerance:.1e}; {remedy}, or loosen options={{'stage_tolerance': ...}}"
        )


def _number(value: Time, sample: int) -> float:
    return float(value[sample]) if isinstance(value, Tensor) else value


def column(h: Time, rows: Tensor) -> Tensor | float:
    """A number, or one per sample, as a factor of ``rows``."""
    return h[:, None].to(rows.dtype) if isinstance(h, Tensor) else h


@dataclass
class Marcher:
    """Steps of a system by the one-stage method theta, each stage guessed from the one before.

    Attributes:
        system: f and its Jacobian.
        theta: where in the step the stage lies.
        solver: of the stage equation.
        slope: f at the latest stage, ``[samples, size]``; None before the first.
        evaluations: of f so far, ``[samples]``.
    """

    system: System
    theta: float
    solver: StageSolver
    slope: Tensor | None = None
    evaluations: Tensor | int = 0
    sweep: ClassVar[str] = "forward"

    def step(self, y: Tensor, t: Time, h: Time) -> tuple[Tensor, Stage]:
        """Step from ``y`` at ``t`` to ``t + h``."""
        y, stage = self.attempt(y, t, h, self.slope)
        self.solver.check(stage, t, h, self.sweep)
        self.slope = stage.slope
        return y, stage

    def undo(self, y: Tensor, t: Time, h: Time) -> tuple[Tensor, Stage]:
        """Step back from ``y`` at ``t + h`` to ``t`` through the very stage of the step from ``t``.

        This is the adjoint method, 1 − theta, run with −h.
        """
        y, stage = self._through(y, t + self.theta * h, -h, -(1.0 - self.theta) * h, self.slope)
        self.solver.check(stage, t, h, "reversed")
        self.slope = stage.slope
        return y, stage

    def attempt(self, y: Tensor, t: Time, h: Time, slope: Tensor | None) -> tuple[Tensor, Stage]:
        """Step from ``y`` at ``t`` to ``t + h`` without judging or remembering the stage."""
        return self._through(y, t + self.theta * h, h, self.theta * h, slope)

    def _through(self, y: Tensor, t: Time, h: Time, c: Time, slope: Tensor | None) -> tuple[Tensor, Stage]:
        """The step of ``h`` whose stage is at ``t`` and solves Y = y + c f(t, Y)."""
        guess = y if slope is None else y + column(c, y) * slope
        stage = self._solve_stage(y, t, c, guess)
        if not isinstance(h, Tensor):
            self.evaluations = self.evaluations + stage.evaluations
            return y + h * stage.slope, stage
        moving = h != 0  # a waiting sample keeps its state even where its slope is not finite
        self.evaluations = self.evaluations + torch.where(moving, stage.evaluations, 0)
        return torch.where(moving[:, None], y + column(h, y) * stage.slope, y), stage

    def field(self, t: Time, y: Tensor) -> Tensor:
        """f outside a stage, counted too."""
        self.evaluations = self.evaluations + torch.ones(y.shape[0], dtype=torch.long, device=y.device)
        return self.system(t, y)

    def _solve_stage(self, base: Tensor, t: Time, c: Time, guess: Tensor) -> Stage:
        return self.solver.solve(
            lambda rows: self.system(t, rows), lambda rows: self.system.jacobian(t, rows), base, c, guess
        )


#: Steps in an interval beyond which a step size is taken for a mistake.
MOST_STEPS = 10_000_000


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
        # A length that is a multiple of the size up to rounding (of float32 times) takes that multiple.
        count = abs(length) / self.size * (1.0 - 1e-6)
        if count > MOST_STEPS:
            raise ValueError(f"step_size {self.size:g} cuts an interval into more than {MOST_STEPS} steps: raise it")
        return max(1, ceil(count))

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
