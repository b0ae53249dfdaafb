"""The forward solve, and its three gradients: ``discrete``, ``reversible`` and ``continuous``.

With the stage Y of each step, J = ∂f/∂y at (t_k + θh, Y) and λ = ∂L/∂y, the exact gradient of the discrete solve is

    w       = λ_{k+1} + θ h Jᵀ w
    λ_k     = λ_{k+1} + h Jᵀ w
    dL/dp  += h (∂f/∂p)ᵀ w
    dL/dh_k = wᵀ f + θ h wᵀ ∂f/∂t,    dL/dt_k = h wᵀ ∂f/∂t

``discrete`` stores the stages; ``reversible`` rebuilds them from the solution by undoing each step. ``continuous`` is
the adjoint method of Chen et al. (arXiv:1806.07366, appendix B): it solves the adjoint ODE backwards in time, which
agrees with the gradient of the discrete solve only as h → 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nodeshape._implicit import differentiable_stage
from nodeshape._march import ErrorControl, Marcher, StageSolver, Steps, marcher_of
from nodeshape._method import Method
from nodeshape._stage import Stage
from nodeshape._stats import SolverStats
from nodeshape._system import Linearisation, System, Time

ADJOINTS = ("discrete", "reversible", "continuous")


class ReversalDriftError(RuntimeError):
    """The trajectory rebuilt for a ``reversible`` gradient left the one that was solved."""


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
        marcher = marcher_of(self.system, self.method.theta, self.solver)
        ys = [y]
        for start, end in zip(self.times, self.times[1:]):
            steps: list[Step] = []
            for k, (t, h, following, stage) in enumerate(self.steps.march(marcher, y, start, end)):
                self._count(stage, h)
                if keep:
                    steps.append(self._keep(k, t, h, y, stage))
                y = following
            ys.append(y)
            self.record.append(steps)
        if isinstance(self.steps, ErrorControl) and self.steps.rejected is not None:
            self.stats.rejected = self.steps.rejected
            assert self.steps.evaluations is not None
            self.stats.nfe_forward = self.stats.nfe_forward + self.steps.evaluations
        return torch.stack(ys)

    def _keep(self, k: int, t: Time, h: Time, y: Tensor, stage: Stage) -> Step:
        step = Step(t, h)
        if self.adjoint == "discrete":
            # A waiting sample's stage is of an attempt that was thrown away.
            step.stage = torch.where(h[:, None] != 0, stage.value, y) if isinstance(h, Tensor) else stage.value
        elif self.adjoint == "reversible" and self.checkpoint_every and k and k % self.checkpoint_every == 0:
            step.state = y
        return step

    def _count(self, stage: Stage, h: Time) -> None:
        stats = self.stats
        stats.nfe_forward = stats.nfe_forward + stage.evaluations
        if not self.method.explicit:
            stats.stage_iterations = stats.stage_iterations + stage.evaluations
            stats.residual = torch.maximum(stats.residual, stage.residual.double())
        stats.accepted = stats.accepted + ((h != 0).long() if isinstance(h, Tensor) else 1)


class Solution(torch.autograd.Function):
    """Ties the observations of a solved problem to what they depend on."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, ys: list[Tensor], y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        """Return the observations in ``ys``, a list of one so that autograd takes them for a new tensor."""
        ctx.problem = problem
        ctx.save_for_backward(ys[0], y0, t, *parameters)
        return ys[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sweep backwards in the problem's gradient mode."""
        problem: Problem = ctx.problem
        ys, y0, t, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in (y0, t, *parameters)):
            if problem.adjoint != "discrete":
                raise RuntimeError(f"adjoint={problem.adjoint!r} has no second derivatives: use adjoint='discrete'")
            return None, None, *_differentiable_gradient(problem, y0, t, parameters, grads[0])
        sweep = _Sweep(problem, ctx.needs_input_grad[3])
        to_y0 = sweep.run(ys, grads[0])
        to_t = torch.tensor(sweep.to_times, dtype=t.dtype, device=t.device) if ctx.needs_input_grad[3] else None
        return None, None, to_y0, to_t, *sweep.to_parameters


class _Sweep:
    """One backward pass: accumulates the gradient of times and parameters while λ moves from the end to the start."""

    def __init__(self, problem: Problem, with_time: bool) -> None:
        self.problem = problem
        self.with_time = with_time
        self.to_times = [0.0] * len(problem.times)
        self.to_parameters: list[Tensor | None] = [None] * len(problem.system.parameters or ())
        self.slope: Tensor | None = None  # Jᵀw of the latest transposed stage
        problem.stats.nfe_backward = torch.zeros_like(problem.stats.nfe_forward)

    def run(self, ys: Tensor, grads: Tensor) -> Tensor:
        """Return dL/dy0 given the observations and dL/d(observations), both ``[times, samples, size]``."""
        interval = {"discrete": self._discrete, "reversible": self._reversible, "continuous": self._continuous}
        lam = grads[-1]
        for j in reversed(range(len(self.problem.times) - 1)):
            lam = interval[self.problem.adjoint](j, ys, lam, grads)
            lam = lam + grads[j]
        return lam

    def _discrete(self, j: int, ys: Tensor, lam: Tensor, grads: Tensor) -> Tensor:
        for step in reversed(self.problem.record[j]):
            assert step.stage is not None
            lam = self._transpose(j, step, step.stage, lam)
        return lam

    def _reversible(self, j: int, ys: Tensor, lam: Tensor, grads: Tensor) -> Tensor:
        problem = self.problem
        undo = marcher_of(problem.system, problem.method.theta, problem.solver)
        y = ys[j + 1]
        for k, step in reversed(list(enumerate(problem.record[j]))):
            y, stage = undo.undo(y, step.t, step.h)
            problem.stats.nfe_backward += stage.evaluations
            value = torch.where(step.h[:, None] != 0, stage.value, y) if isinstance(step.h, Tensor) else stage.value
            lam = self._transpose(j, step, value, lam)
            stored = ys[j] if k == 0 else step.state
            if stored is not None:
                self._check_drift(y, stored, ys[j + 1], step)
                y = stored
        return lam

    def _check_drift(self, rebuilt: Tensor, stored: Tensor, end: Tensor, step: Step) -> None:
        def size(x: Tensor) -> Tensor:
            return x.square().mean(dim=1).sqrt()

        drift = size(rebuilt - stored) / torch.maximum(size(stored), size(end)).clamp_min(torch.finfo(end.dtype).tiny)
        bad = ~(drift <= self.problem.drift_tolerance) & torch.isfinite(size(stored))
        if bool(bad.any()):
            t = float(step.t[bad][0]) if isinstance(step.t, Tensor) else step.t
            raise ReversalDriftError(
                f"{int(bad.sum())} of {bad.numel()} samples drifted by up to {float(drift[bad].max()):.1e} (relative) when"
                f" the trajectory was rebuilt back to t={t:.6g}, tolerance {self.problem.drift_tolerance:.1e}: the flow"
                " contracts too strongly to be undone; set options={'checkpoint_every': m} with a smaller m, or use"
                " adjoint='discrete'"
            )

    def _transpose(self, j: int, step: Step, stage: Tensor, lam: Tensor) -> Tensor:
        """λ at the start of the step from λ at its end, exactly."""
        problem, system, theta = self.problem, self.problem.system, self.problem.method.theta
        t, h = step.t + theta * step.h, step.h
        point = Linearisation(system, t, stage, self.with_time)
        column = h[:, None].to(lam.dtype) if isinstance(h, Tensor) else h
        w = lam
        if not problem.method.explicit:
            solved = problem.solver.solve(
                point.transposed,
                lambda rows: system.jacobian(t, stage).transpose(1, 2),
                lam,
                (theta * h).to(lam.dtype) if isinstance(h, Tensor) else theta * h,
                lam if self.slope is None else lam + theta * column * self.slope,
            )
            problem.solver.check(solved, step.t, h, "transposed")
            problem.stats.nfe_backward += solved.evaluations
            w, self.slope = solved.value, solved.slope
        else:
            problem.stats.nfe_backward += 1
        to_y, to_t = self._accumulate(point, w, column)
        if to_t is not None:
            to_h = (w * point.value).sum(dim=1)
            self._share(j, step, to_h if isinstance(h, Tensor) else to_h.sum(), to_t)
        return lam + to_y

    def _accumulate(self, point: Linearisation, w: Tensor, h: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Add h wᵀ∂f/∂p to the parameters' gradient; return h wᵀ∂f/∂y and h wᵀ∂f/∂t."""
        to_y, to_t, to_parameters = point.products(h * w)
        for i, grad in enumerate(to_parameters):
            if grad is not None:
                total = self.to_parameters[i]
                self.to_parameters[i] = grad if total is None else total + grad
        return to_y, to_t

    def _share(self, j: int, step: Step, w_f: Tensor, to_t: Tensor) -> None:
        """Share a step's dL/dh_k and dL/dt_k between the ends of its interval: h_k = r L and t_k = t_j + s L."""
        start, end = self.problem.times[j : j + 2]
        length = end - start
        to_h = w_f + self.problem.method.theta * to_t
        by_length = to_h * (step.h / length) + to_t * ((step.t - start) / length)
        self.to_times[j + 1] += float(by_length.sum())
        self.to_times[j] += float((to_t - by_length).sum())

    def _continuous(self, j: int, ys: Tensor, lam: Tensor, grads: Tensor) -> Tensor:
        problem, system, size = self.problem, self.problem.system, self.problem.system.size

        def augmented(t: Time, rows: Tensor) -> Tensor:
            point = Linearisation(system, t, rows[:, :size], with_time=False)
            return torch.cat([point.value, -point.transposed(rows[:, size:])], dim=1)

        if self.with_time:
            self.to_times[j + 1] += self._slope_along(j + 1, ys, grads[j + 1])
        marcher = Marcher(augmented, None, problem.method.theta, problem.solver)
        pair = torch.cat([ys[j + 1], lam], dim=1)
        start, end = problem.times[j : j + 2]
        steps = copy(problem.backward_steps)
        for t, h, following, stage in steps.march(marcher, pair, end, start):
            problem.stats.nfe_backward += stage.evaluations
            column = -h[:, None].to(lam.dtype) if isinstance(h, Tensor) else -h
            y, a = stage.value[:, :size], stage.value[:, size:]
            if isinstance(h, Tensor):
                waiting = h[:, None] == 0
                y, a = torch.where(waiting, pair[:, :size], y), torch.where(waiting, pair[:, size:], a)
            point = Linearisation(system, t + problem.method.theta * h, y, with_time=False)
            self._accumulate(point, a, column)
            pair = following
        if isinstance(steps, ErrorControl) and steps.evaluations is not None:
            problem.stats.nfe_backward += steps.evaluations
        lam = pair[:, size:]
        if self.with_time and j == 0:
            self.to_times[0] -= self._slope_along(0, ys, lam)
        return lam

    def _slope_along(self, j: int, ys: Tensor, w: Tensor) -> float:
        """wᵀ f at observation j."""
        self.problem.stats.nfe_backward += 1
        return float((w * self.problem.system(self.problem.times[j], ys[j])).sum())


def _differentiable_gradient(
    problem: Problem, y0: Tensor, t: Tensor, parameters: Sequence[Tensor], grads: Tensor
) -> list[Tensor | None]:
    """The ``discrete`` gradient with a graph of its own: the recorded steps replayed as differentiable stages."""
    inputs = [x for x in (y0, t, *parameters) if x.requires_grad]
    ys = _replay(problem, y0, t, parameters)
    found = iter(torch.autograd.grad(ys, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in (y0, t, *parameters)]


def _replay(problem: Problem, y: Tensor, t: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    system, theta = problem.system, problem.method.theta

    def slope(rows: Tensor, time: Tensor, *parameters: Tensor) -> Tensor:
        return system(time, rows)

    ys = [y]
    for j, steps in enumerate(problem.record):
        start, end = problem.times[j : j + 2]
        length = t[j + 1] - t[j]
        for step in steps:
            h = (length * (step.h / (end - start))).to(y)
            time = (t[j] + length * ((step.t - start) / (end - start))).to(y) + theta * h
            column = h[:, None] if h.dim() else h
            stage = y
            if not problem.method.explicit:
                stage = differentiable_stage(slope, problem.solver, y, theta * column, time, *parameters)
            y = y + column * slope(stage, time)
        ys.append(y)
    return torch.stack(ys)
