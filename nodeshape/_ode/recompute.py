"""Exact gradients without autograd's record of the solve: the backward pass takes each step anew.

Where a step starts is stored (``options={"recompute": True}``), or found by undoing it (``adjoint="reversible"``): with
theta the place of a one-stage method's stage, the adjoint method 1 − theta, run with −h from the end of the step, goes
through the very same stage (Hairer, Lubich & Wanner, *Geometric Numerical Integration*, II.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nodeshape._errors import ReversalDriftError
from nodeshape._ode.field import Field
from nodeshape._ode.graph import refuse_untracked
from nodeshape._ode.method import Method
from nodeshape._ode.root import StageEquations
from nodeshape._ode.stage import Time
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.step import Size, end, stages
from nodeshape._ode.surroundings import Snapshot, Surroundings

#: A slope found anew may differ from that of the forward pass by this much, relative to its length.
SAME_SLOPE = {torch.float32: 1e-2, torch.float64: 1e-5}


@dataclass(frozen=True)
class Step:
    """One step of the solution.

    Attributes:
        t, h: start and size; numbers, or ``[n]`` where samples take their own.
        mark: of its slopes, a number per sample, to be compared.
        before: what f depended on besides.
        state: at its start, ``[samples, ...]``, where it is stored.
        rows: the n samples that take it; None for all.
    """

    t: Time
    h: Time
    mark: Tensor
    before: Snapshot | None
    state: Tensor | None = None
    rows: Tensor | None = None


@dataclass
class Recorder:
    """What the forward pass leaves for the backward pass: of each step its place, and as little else as will do.

    Attributes:
        times: observation times.
        stored: store the state at the start of each step; else undo steps.
        checkpoint_every: where steps are undone, of how many in an interval the start of one is stored.
        discovers: whether the parameters are those that were found, rather than given.
        drift_tolerance: largest relative distance of a state that was found by undoing steps from the stored one.
    """

    field: Field
    method: Method
    times: list[float]
    stored: bool
    checkpoint_every: int | None
    drift_tolerance: float
    discovers: bool
    equations: StageEquations
    steps: list[Step] = default(default_factory=list)
    varying: bool = False
    _direction: Tensor | None = None
    _taken: int = 0

    def __post_init__(self) -> None:
        self.surroundings = Surroundings(self.field.func, self.field.device)
        self._times = torch.tensor(self.times, dtype=torch.float64)
        self._sign = 1.0 if self.times[-1] > self.times[0] else -1.0
        self._signed = [self._sign * x for x in self.times]

    def before(self) -> Snapshot:
        """To be called before a step, for :meth:`after`."""
        return self.surroundings.snapshot()

    def after(
        self, t: Time, h: Time, y: Tensor, slopes: Sequence[Tensor], before: Snapshot | None, rows: Tensor | None = None
    ) -> None:
        """Enter a step from ``y``."""
        observed = not isinstance(t, Tensor) and t in self.times
        self._taken = 0 if observed else self._taken + 1
        every = self.checkpoint_every
        keep = self.stored or (every is not None and self._taken > 0 and self._taken % every == 0)
        own = keep and (isinstance(t, Tensor) or not observed)
        self.steps.append(Step(t, h, self.mark(slopes), before, y.detach() if own else None, rows))

    def finish(self) -> None:
        """To be called behind the last step."""
        now = self.before()
        self.varying = any(step.before is not now for step in self.steps)

    def mark(self, slopes: Sequence[Tensor]) -> Tensor:
        """A number per sample that another slope would not have."""
        last = slopes[-1].detach()
        flat = last.reshape(self._samples(last), self.field.size)
        if self._direction is None or len(self._direction) != flat.shape[1]:
            signs = torch.arange(flat.shape[1], device=flat.device) * 2654435761 % 65536 >= 32768
            self._direction = torch.where(signs, 1.0, -1.0).to(flat.dtype)
        return flat @ self._direction

    # ---- the backward pass -------------------------------------------------------------------------------------------

    def gradients(
        self, ys: Tensor, grads: Tensor, parameters: Sequence[Tensor], with_time: bool
    ) -> tuple[Tensor, list[float], list[Tensor], Tensor]:
        """dL/dy0, dL/dt, dL/dp of each parameter, and the products with f's Jacobian that took, ``[samples]``."""
        self.surroundings.check_weights()
        self._to_times = torch.zeros(len(self.times), dtype=torch.float64)
        self._to_parameters = [torch.zeros_like(p) for p in parameters]
        self._products = 0
        self.equations.stats = SolverStats.zeros(self.field.samples, self.field.device)
        self._changed: str | None = None
        lam, y = grads[-1], ys[-1]
        with self.surroundings.restored() as restore:
            if self.steps:
                restore(self.steps[0].before)
            for step in reversed(self.steps):
                again = partial(restore, step.before) if self.varying else None
                try:
                    y, lam = self._back(step, ys, grads, y, lam, parameters, with_time, again)
                finally:
                    self.field.before = None
        products = self._products + self.equations.stats.nfe_backward
        return lam, self._to_times.tolist(), self._to_parameters, products

    def _back(
        self,
        step: Step,
        ys: Tensor,
        grads: Tensor,
        y: Tensor,
        lam: Tensor,
        parameters: Sequence[Tensor],
        with_time: bool,
        again: Callable[[], None] | None,
    ) -> tuple[Tensor, Tensor]:
        """State and λ = dL/dy at the start of a step, from those at its end."""
        rows = step.rows
        y_end, lam_end = (y, lam) if rows is None else (y[rows], lam[rows])
        interval = self._interval(step)
        guess: Tensor | None = None
        if self.stored:
            start = step.state if step.state is not None else ys[int(interval[0])]
        else:
            self.field.before = again  # of an equation each evaluation is to see the same surroundings
            start, guess = self._undo(step, y_end)
            stored, known = self._known(step, interval, ys)
            self._check_drift(
                step, start, stored, known, ys[interval + 1, rows] if rows is not None else ys[interval + 1][0]
            )
            if self._changed is not None and bool(known.any()):
                raise RuntimeError(self._changed)
            start = torch.where(known.reshape(-1, *(1,) * (start.dim() - 1)), stored, start)
        self.field.before = None if self.method.explicit else again
        if again is not None:
            again()
        lam_start = self._differentiate(step, start, guess, lam_end, parameters, with_time)
        assert lam_start is not None
        begun = self._begun(step, interval)
        observed = grads[interval] if rows is None else grads[interval, rows]
        if rows is None:
            return start, lam_start + observed[0] if bool(begun[0]) else lam_start
        column = begun.reshape(-1, *(1,) * (start.dim() - 1))
        lam_start = torch.where(column, lam_start + observed, lam_start)
        return y.index_copy(0, rows, start), lam.index_copy(0, rows, lam_start)

    def _undo(self, step: Step, y_end: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the start of a step of a one-stage method, and its slope."""
        theta = self.method.theta
        h: Size = self._column(step.h, y_end) if isinstance(step.h, Tensor) else step.h
        time = self._seen(step.t + theta * step.h)
        c = -(1.0 - theta) * h
        if theta == 1.0:
            slope = self.field(time, y_end)
        else:
            equations = self.equations
            equations.sweep, equations.where, equations.rows = "reversed", (step.t, step.h), step.rows
            slope = equations(time, y_end, c, None)
        return y_end - h * slope, slope

    def _differentiate(
        self,
        step: Step,
        start: Tensor,
        guess: Tensor | None,
        lam: Tensor | None,
        parameters: Sequence[Tensor],
        with_time: bool,
    ) -> Tensor | None:
        """λ at the start; the gradients of times and parameters are added up. None if the step is only looked at."""
        method, equations = self.method, self.equations
        equations.sweep, equations.where, equations.rows = "forward", (step.t, step.h), step.rows
        with torch.enable_grad():
            y = start.detach().requires_grad_()
            t, size = (
                torch.as_tensor(x, dtype=torch.float64, device=self.field.device).detach().requires_grad_(with_time)
                for x in (step.t, step.h)
            )
            h: Size = self._column(size, y) if with_time or isinstance(step.h, Tensor) else step.h
            times = [self._seen(t + c * size) for c in method.c]

            slopes = stages(self.field, method, y, times, h, None, guess, equations)
            after = end(method, y, h, slopes)
        self._check_slopes(step, slopes)
        if lam is None:
            return None
        if self.discovers:
            refuse_untracked(after, (y, t, size, *parameters))
        self._products += len(method.b)
        wanted = [y, *([t, size] if with_time else []), *parameters]
        if not after.requires_grad:
            return lam
        found: list[Tensor | None] = list(torch.autograd.grad(after, wanted, lam, allow_unused=True, retain_graph=True))
        to_y = found.pop(0)
        if with_time:
            to_t, to_h = (torch.zeros_like(t) if x is None else x for x in (found.pop(0), found.pop(0)))
            self._share(step, self._interval(step), to_t, to_h)
        for total, grad in zip(self._to_parameters, found):
            if grad is not None:
                total.add_(grad)
        return torch.zeros_like(lam) if to_y is None else to_y

    def _share(self, step: Step, interval: Tensor, to_t: Tensor, to_h: Tensor) -> None:
        """Share dL/dt and dL/dh of a step between the ends of its interval: h = r L and t = t_j + s L."""
        first, last = self._times[interval], self._times[interval + 1]
        length = last - first
        t, h = (torch.as_tensor(x, dtype=torch.float64).cpu().reshape(-1) for x in (step.t, step.h))
        to_t, to_h = to_t.reshape(-1).cpu(), to_h.reshape(-1).cpu()
        by_length = to_h * (h / length) + to_t * ((t - first) / length)
        self._to_times.index_add_(0, interval + 1, by_length)
        self._to_times.index_add_(0, interval, to_t - by_length)

    def _known(self, step: Step, interval: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        """Stored states at the start of a step, and of which samples there are any."""
        begun = self._begun(step, interval)
        observed = ys[interval[0]] if step.rows is None else ys[interval, step.rows]
        if step.state is None:
            return observed, begun
        column = begun.reshape(-1, *(1,) * (observed.dim() - 1))
        return torch.where(column, observed, step.state), torch.ones_like(begun)

    def _begun(self, step: Step, interval: Tensor) -> Tensor:
        """Whether the step begins its interval, ``[n]``."""
        t = torch.as_tensor(step.t, dtype=torch.float64).cpu().reshape(-1)
        return (self._times[interval] == t).to(self.field.device)

    def _interval(self, step: Step) -> Tensor:
        """Which interval between observations a step is in, ``[n]``; on the CPU."""
        if not isinstance(step.t, Tensor):
            return torch.tensor([bisect_right(self._signed, self._sign * step.t) - 1])
        return torch.searchsorted(self._sign * self._times, self._sign * step.t.cpu(), right=True) - 1

    def _check_drift(self, step: Step, rebuilt: Tensor, stored: Tensor, known: Tensor, end: Tensor) -> None:
        if not bool(known.any()):
            return

        def size(x: Tensor) -> Tensor:
            return x.reshape(self._samples(x), self.field.size).double().square().mean(dim=1).sqrt()

        smallest = torch.finfo(rebuilt.dtype).tiny
        drift = size(rebuilt - stored) / torch.maximum(size(stored), size(end)).clamp_min(smallest)
        bad = ~(drift <= self.drift_tolerance) & torch.isfinite(size(stored)) & known
        if bool(bad.any()):
            y = torch.where(known.reshape(-1, *(1,) * (rebuilt.dim() - 1)), stored, rebuilt)
            self._differentiate(step, y, None, None, (), False)  # which says so if it is f that has changed
            t = float(step.t[bad][0]) if isinstance(step.t, Tensor) else step.t
            raise ReversalDriftError(
                f"{int(bad.sum())} of {bad.numel()} samples drifted by up to {float(drift[bad].max()):.1e} (relative)"
                f" when the trajectory was rebuilt back to t={t:.6g}, tolerance {self.drift_tolerance:.1e}:"
                " the flow contracts too strongly to be undone; set options={'checkpoint_every': m} with a smaller m,"
                " or use adjoint='discrete'"
            )

    def _check_slopes(self, step: Step, slopes: Sequence[Tensor]) -> None:
        last = slopes[-1].detach()
        length = last.reshape(self._samples(last), self.field.size).norm(dim=1)
        wrong = (self.mark(slopes) - step.mark).abs() > SAME_SLOPE[self.field.time_dtype] * length
        if bool(wrong.any()):
            t = float(step.t[0]) if isinstance(step.t, Tensor) else step.t
            message = (
                f"func is not what it was in the forward pass (in the step from t={t:.6g}, {int(wrong.sum())} of"
                f" {wrong.numel()} samples), so the gradient would be wrong: the backward pass evaluates it again, and"
                " something it depends on (an attribute, a tensor, another library's random numbers) has changed"
                " since; call backward() before changing it, or use adjoint='discrete', which keeps what it needs"
            )
            if self.stored or bool(self._begun(step, self._interval(step)).any()):
                raise RuntimeError(message)
            self._changed = self._changed or message  # unless the trajectory was not found again: that is known soon

    def _samples(self, x: Tensor) -> int:
        """Of a state of some samples."""
        return len(x) if self.field.batched else 1

    def _column(self, x: Tensor, y: Tensor) -> Tensor:
        kind = self.field.time_dtype
        return x.to(kind) if x.dim() == 0 else x.to(kind).reshape(-1, *(1,) * (y.dim() - 1))

    def _seen(self, t: Any) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64, device=self.field.device).to(self.field.time_dtype)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Any, recorder: Recorder, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.recorder = plan, recorder
        ys: Tensor = plan.run()
        recorder.finish()
        ctx.save_for_backward(ys, t, *parameters)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan, recorder = ctx.plan, ctx.recorder
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError(
                f"{plan.mode} has no second derivatives (backward with create_graph=True): use adjoint='discrete'"
            )
        ys, t, *parameters = ctx.saved_tensors
        before = plan.field.evaluations
        with torch.no_grad():
            to_y0, to_times, to_parameters, products = recorder.gradients(
                ys, grads[0], parameters, ctx.needs_input_grad[3]
            )
        plan.count_backward(plan.field.evaluations - before + products)
        plan.field.evaluations = before
        to_t = torch.tensor(to_times, dtype=t.dtype, device=t.device) if ctx.needs_input_grad[3] else None
        return None, None, to_y0, to_t, *to_parameters


def recomputed_solution(plan: Any, recorder: Recorder, y0: Tensor, t: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Solve ``plan``; the states ``[times, ...]``, whose gradient takes each step anew.

    Args:
        y0: the packed state.
        t: the times, differentiable.
        parameters: to differentiate by, besides.
    """
    plan.loop.recorder = recorder
    solution: Tensor = _Recomputed.apply(plan, recorder, y0, t, *parameters)
    return solution
