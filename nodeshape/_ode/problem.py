"""A solve: what is solved and how, its forward pass, and what that records for the gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nodeshape._ode.error_control import ErrorControl, Steps
from nodeshape._ode.integrate import Stepper, stage_of_moving
from nodeshape._ode.method import Method
from nodeshape._ode.stage import Stage, StageSolver
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.system import System, Time

ADJOINTS = ("discrete", "reversible", "continuous")


@dataclass
class Step:
    """One step of the solution.

    Attributes:
        t, h: start and size; numbers, or ``[samples]``.
        stage: Y, ``[samples, size]``; kept by ``discrete`` only.
        state: the state at ``t``, ``[samples, size]``; kept at the checkpoints of ``reversible`` only.
    """

    t: Time
    h: Time
    stage: Tensor | None = None
    state: Tensor | None = None


@dataclass
class Problem:
    """A solve: what is solved, how, and (after :meth:`solve`) what was recorded for the gradient.

    Attributes:
        times: observation times.
        backward_steps: for the ``continuous`` adjoint.
        checkpoint_every: steps between stored states of ``reversible``; None stores the observations only.
        drift_tolerance: largest relative distance of a rebuilt state from the stored one.
        record: the steps of each interval between observations.
    """

    system: System
    method: Method
    solver: StageSolver
    times: list[float]
    steps: Steps
    backward_steps: Steps
    adjoint: str
    checkpoint_every: int | None
    drift_tolerance: float
    stats: SolverStats
    record: list[list[Step]] = field(default_factory=list)

    def solve(self, y: Tensor, keep: bool) -> Tensor:
        """Solve from ``y`` ``[samples, size]``; return the states at the observation times ``[times, samples, size]``.

        ``keep`` records what the gradient will need.
        """
        stepper = Stepper(self.system, self.method.theta, self.solver)
        ys = [y]
        for start, end in zip(self.times, self.times[1:]):
            steps: list[Step] = []
            for k, (t, h, following, stage) in enumerate(self.steps.integrate(stepper, y, start, end)):
                self._count(stage, h)
                if keep:
                    steps.append(self._keep(k, t, h, y, stage))
                y = following
            if isinstance(self.steps, ErrorControl):  # which left samples alone that are not finite
                y = torch.where(torch.isfinite(y).all(dim=1, keepdim=True), y, torch.nan)
            ys.append(y)
            self.record.append(steps)
        self.stats.nfe_forward = self.stats.nfe_forward + stepper.evaluations
        if isinstance(self.steps, ErrorControl):
            self.stats.rejected = self.stats.rejected + self.steps.rejected
        return torch.stack(ys)

    def _keep(self, k: int, t: Time, h: Time, y: Tensor, stage: Stage) -> Step:
        step = Step(t, h)
        if self.adjoint == "discrete":
            step.stage = stage_of_moving(stage, h, y)
        elif self.adjoint == "reversible" and self.checkpoint_every and k and k % self.checkpoint_every == 0:
            step.state = y
        return step

    def _count(self, stage: Stage, h: Time) -> None:
        stats, moved = self.stats, (h != 0).long() if isinstance(h, Tensor) else 1
        stats.accepted = stats.accepted + moved
        if not self.method.explicit:
            stats.stage_iterations = stats.stage_iterations + moved * stage.evaluations
            stats.residual = torch.maximum(stats.residual, moved * stage.residual.double())
