"""The backward sweep: λ = ∂L/∂y from the last observation to the first, in one of three gradient modes.

With the stage Y of each step and J = ∂f/∂y at (t_k + θh, Y), the exact gradient of the discrete solve is

    w       = λ_{k+1} + θ h Jᵀ w
    λ_k     = λ_{k+1} + h Jᵀ w
    dL/dp  += h (∂f/∂p)ᵀ w
    dL/dh_k = wᵀ f + θ h wᵀ ∂f/∂t,    dL/dt_k = h wᵀ ∂f/∂t

``discrete`` stored the stages; ``reversible`` rebuilds them from the solution by undoing each step. ``continuous`` is
the adjoint method of Chen et al. (arXiv:1806.07366, appendix B): it solves the adjoint ODE backwards in time, which
agrees with the gradient of the discrete solve only as h → 0.
"""

from __future__ import annotations

from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from nodeshape._errors import ReversalDriftError
from nodeshape._ode.integrate import Stepper, stage_of_moving
from nodeshape._ode.problem import Problem, Step
from nodeshape._ode.stage import Stage, StageSolver, column
from nodeshape._ode.system import Linearisation, System, Time


class Sweep:
    """One backward pass of a solved problem.

    Attributes:
        to_times: dL/dt of each observation time.
        to_parameters: dL/dp of each parameter; None where f does not depend on it.
    """

    def __init__(self, problem: Problem, with_time: bool) -> None:
        self.to_times = [0.0] * len(problem.times)
        self.to_parameters: list[Tensor | None] = [None] * len(problem.system.parameters or ())
        self._problem = problem
        self._with_time = with_time
        self._slope: Tensor | None = None  # Jᵀw of the latest transposed stage
        problem.stats.nfe_backward = torch.zeros_like(problem.stats.nfe_forward)

    def run(self, ys: Tensor, grads: Tensor) -> Tensor:
        """Return dL/dy0 given the observations and dL/d(observations), both ``[times, samples, size]``."""
        modes = {"discrete": self._discrete, "reversible": self._reversible, "continuous": self._continuous}
        return modes[self._problem.adjoint](ys, grads)

    def _discrete(self, ys: Tensor, grads: Tensor) -> Tensor:
        lam = grads[-1]
        for j in reversed(range(len(self._problem.record))):
            for step in reversed(self._problem.record[j]):
                assert step.stage is not None
                lam = self._transpose(j, step, step.stage, lam)
            lam = lam + grads[j]
        return lam

    def _reversible(self, ys: Tensor, grads: Tensor) -> Tensor:
        problem = self._problem
        stepper = Stepper(problem.system, problem.method.theta, problem.solver)
        lam = grads[-1]
        for j in reversed(range(len(problem.record))):
            y = ys[j + 1]
            for k, step in reversed(list(enumerate(problem.record[j]))):
                y, stage = stepper.undo(y, step.t, step.h)
                lam = self._transpose(j, step, stage_of_moving(stage, step.h, y), lam)
                stored = ys[j] if k == 0 else step.state
                if stored is not None:
                    self._check_drift(y, stored, ys[j + 1], step)
                    y = stored
            lam = lam + grads[j]
        problem.stats.nfe_backward += stepper.evaluations
        return lam

    def _check_drift(self, rebuilt: Tensor, stored: Tensor, end: Tensor, step: Step) -> None:
        def size(x: Tensor) -> Tensor:
            return x.square().mean(dim=1).sqrt()

        drift = size(rebuilt - stored) / torch.maximum(size(stored), size(end)).clamp_min(torch.finfo(end.dtype).tiny)
        bad = ~(drift <= self._problem.drift_tolerance) & torch.isfinite(stored).all(dim=1)
        if bool(bad.any()):
            t = float(step.t[bad][0]) if isinstance(step.t, Tensor) else step.t
            raise ReversalDriftError(
                f"{int(bad.sum())} of {bad.numel()} samples drifted by up to {float(drift[bad].max()):.1e} (relative)"
                f" when the trajectory was rebuilt back to t={t:.6g}, tolerance {self._problem.drift_tolerance:.1e}:"
                " the flow contracts too strongly to be undone; set options={'checkpoint_every': m} with a smaller m,"
                " or use adjoint='discrete'"
            )

    def _transpose(self, j: int, step: Step, value: Tensor, lam: Tensor) -> Tensor:
        """λ at the start of the step, whose stage is ``value``, from λ at its end; exact."""
        problem, theta, h = self._problem, self._problem.method.theta, step.h
        t = step.t + theta * h
        point = Linearisation(problem.system, t, value, self._with_time)
        w = lam
        if not problem.method.explicit:
            guess = lam if self._slope is None else lam + column(theta * h, lam) * self._slope
            stage = transposed_stage(problem.solver, problem.system, point, t, value, lam, theta * h, guess)
            problem.solver.check(stage, step.t, h, "transposed")
            problem.stats.nfe_backward += stage.evaluations
            w, self._slope = stage.value, stage.slope
        to_y, to_t = self._accumulate(point, w, h)
        if to_t is not None:
            to_h = (w * point.value).sum(dim=1)
            self._share(j, step, to_h if isinstance(h, Tensor) else to_h.sum(), to_t)
        return lam + to_y

    def _accumulate(self, point: Linearisation, w: Tensor, h: Time) -> tuple[Tensor, Tensor | None]:
        """Add h wᵀ∂f/∂p to the parameters' gradient; return h wᵀ∂f/∂y and h wᵀ∂f/∂t."""
        self._problem.stats.nfe_backward += 1
        to_y, to_t, to_parameters = point.products(column(h, w) * w)
        for i, grad in enumerate(to_parameters):
            if grad is not None:
                total = self.to_parameters[i]
                self.to_parameters[i] = grad if total is None else total + grad
        return to_y, to_t

    def _share(self, j: int, step: Step, w_f: Tensor, to_t: Tensor) -> None:
        """Share a step's dL/dh_k and dL/dt_k between the ends of its interval: h_k = r L and t_k = t_j + s L."""
        start, end = self._problem.times[j : j + 2]
        length = end - start
        to_h = w_f + self._problem.method.theta * to_t
        by_length = to_h * (step.h / length) + to_t * ((step.t - start) / length)
        self.to_times[j + 1] += float(by_length.sum())
        self.to_times[j] += float((to_t - by_length).sum())

    def _continuous(self, ys: Tensor, grads: Tensor) -> Tensor:
        problem, size, theta = self._problem, self._problem.system.size, self._problem.method.theta
        stepper = AdjointStepper(problem.system, theta, problem.solver)
        steps = copy(problem.backward_steps)
        lam = grads[-1]
        for j in reversed(range(len(problem.record))):
            start, end = problem.times[j : j + 2]
            self._observe(j + 1, ys, grads[j + 1])
            pair = torch.cat([ys[j + 1], lam], dim=1)
            for t, h, following, stage in steps.integrate(stepper, pair, end, start):
                y, a = torch.split(stage_of_moving(stage, h, pair), size, dim=1)
                self._accumulate(Linearisation(problem.system, t + theta * h, y, with_time=False), a, -h)
                pair = following
            lam = pair[:, size:]
            if j == 0:
                self._observe(0, ys, -lam)
            lam = lam + grads[j]
        problem.stats.nfe_backward += stepper.evaluations
        return lam

    def _observe(self, j: int, ys: Tensor, w: Tensor) -> None:
        """Moving observation j moves what is observed along f."""
        if self._with_time:
            self._problem.stats.nfe_backward += 1
            self.to_times[j] += float((w * self._problem.system(self._problem.times[j], ys[j])).sum())


class AdjointStepper(Stepper):
    """Steps of the pair ``[y, a]``: dy/dt = f, da/dt = −Jᵀa. The stage of y does not need that of a and comes first."""

    sweep: ClassVar[str] = "adjoint"

    def field(self, t: Time, y: Tensor) -> Tensor:
        """The right-hand side of both."""
        stage = self._solve_stage(y, t, 0.0, y)
        self.evaluations = self.evaluations + stage.evaluations
        return stage.slope

    def _solve_stage(self, base: Tensor, t: Time, c: Time, guess: Tensor) -> Stage:
        size = self.system.size
        y = super()._solve_stage(base[:, :size], t, c, guess[:, :size])
        point = Linearisation(self.system, t, y.value, with_time=False)
        a = transposed_stage(self.solver, self.system, point, t, y.value, base[:, size:], -c, guess[:, size:])
        return Stage(
            value=torch.cat([y.value, a.value], dim=1),
            slope=torch.cat([y.slope, -a.slope], dim=1),
            evaluations=y.evaluations + a.evaluations,
            residual=torch.maximum(y.residual, a.residual),
            solved=y.solved & a.solved,
        )


def transposed_stage(
    solver: StageSolver, system: System, point: Linearisation, t: Time, y: Tensor, base: Tensor, c: Time, guess: Tensor
) -> Stage:
    """Solve w = base + c Jᵀ w, J at (t, y). A sample whose ``y`` is not finite has a NaN gradient."""
    base = torch.where(torch.isfinite(y).all(dim=1, keepdim=True), base, torch.nan)
    return solver.solve(point.transposed, lambda rows: system.jacobian(t, y).transpose(1, 2), base, c, guess)
