"""The time loop: one step of the theta family, and equal steps made of it.

Everything integrates rows ``[samples, size]``. A step is ``(t, h)``: two numbers shared by the batch, or two tensors
``[samples]`` where each sample chose its own; then a step of h = 0 is a sample waiting for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from nodeshape._ode.stage import Stage, StageSolver, column
from nodeshape._ode.system import System, Time


@dataclass
class Stepper:
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


def stage_of_moving(stage: Stage, h: Time, y: Tensor) -> Tensor:
    """The stage value; ``y`` for samples that wait, whose stage is of an attempt that was thrown away."""
    return torch.where(h[:, None] != 0, stage.value, y) if isinstance(h, Tensor) else stage.value


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

    def integrate(
        self, stepper: Stepper, y: Tensor, start: float, end: float
    ) -> Iterator[tuple[Time, Time, Tensor, Stage]]:
        """Yield (t, h, y after the step, stage) for each step from ``start`` to ``end``."""
        count = self.number(end - start)
        h = (end - start) / count
        for k in range(count):
            t = start + k * h
            y, stage = stepper.step(y, t, h)
            yield t, h, y, stage
