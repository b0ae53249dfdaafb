"""Steps chosen by error control: step doubling and a PI controller, for each sample by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nodeshape._errors import StepSizeError
from nodeshape._ode.integrate import EqualSteps, Stepper
from nodeshape._ode.stage import Stage
from nodeshape._ode.system import Time

#: A step is aimed at this fraction of the tolerated error.
SAFETY = 0.9
#: Exponents of the latest and the previous error in the PI controller (Hairer & Wanner II, IV.2), times order + 1.
PROPORTIONAL, INTEGRAL = 0.7, 0.4


@dataclass
class ErrorControl:
    """Steps of each sample's own, so that the error of each step stays within ``atol + rtol |y|``.

    An attempt takes one step of h and two of h/2. Their difference over 2^p − 1 estimates the error of the halves
    (Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, II.4), which are kept if
    rms(error / (atol + rtol max(|y|, |y_new|))) ≤ 1 for that sample.

    Attributes:
        order: p of the method.
        rtol, atol: relative and absolute tolerance.
        min_step: in units of the interval's length; smaller raises StepSizeError.
        max_steps: attempts a sample may make in one interval; more raises StepSizeError.
        shared: one step for the whole batch, for an f that cannot be evaluated sample by sample.
        rejected: attempts thrown away so far, ``[samples]``.
        proposal: the step to try next, ``[samples]``; None before the first.
    """

    order: int
    rtol: float
    atol: float
    min_step: float
    max_steps: int
    shared: bool
    rejected: Tensor | int = 0
    proposal: Tensor | None = None

    def integrate(
        self, stepper: Stepper, y: Tensor, start: float, end: float
    ) -> Iterator[tuple[Time, Time, Tensor, Stage]]:
        """Yield (t, h, y after the step, stage) for each half step; samples that wait have h = 0."""
        length = end - start
        alive = torch.isfinite(y).all(dim=1)  # a sample that is not finite has nowhere to go
        done = torch.where(alive, 0.0, 1.0).double()  # fraction of the interval covered
        if stepper.slope is None:
            stepper.slope = stepper.field(start, y)
        if self.proposal is None:
            self.proposal = self._first_step(y, stepper.slope, abs(length))
        size = self.proposal / abs(length)
        previous = torch.ones_like(done)
        attempts = torch.zeros_like(done, dtype=torch.long)
        while bool((done < 1.0).any()):
            moving = done < 1.0
            rest = 1.0 - done
            trial = torch.minimum(size, rest)
            trial = torch.where(rest - trial < 1e-3 * trial, rest, trial)  # no sliver at the end
            t, h = self._clock(start + done * length, torch.where(moving, trial * length, 0.0), moving)
            half = 0.5 * h
            big, whole = stepper.attempt(y, t, h, stepper.slope)
            middle, first = stepper.attempt(y, t, half, stepper.slope)
            small, second = stepper.attempt(middle, t + half, half, first.slope)

            solved = whole.solved & first.solved & second.solved
            error = torch.where(solved, self._error(y, big, small), torch.inf).nan_to_num(torch.inf, posinf=torch.inf)
            if self.shared:
                error = torch.where(moving, error, 0.0).max().expand_as(error)
            accept = moving & (error <= 1.0)
            attempts = attempts + moving
            self.rejected = self.rejected + (moving & ~accept).long()
            if bool(accept.any()):
                rows = accept[:, None]
                stepper.slope = torch.where(rows, second.slope, stepper.slope)
                middle, y = torch.where(rows, middle, y), torch.where(rows, small, y)
                half = torch.where(accept, half, 0.0) if isinstance(half, Tensor) else half
                yield t, half, middle, first
                yield t + half, half, y, second

            done = torch.where(accept, torch.where(trial >= rest, 1.0, done + trial), done)
            factor, previous = self._controller(error, previous, accept)
            # A step cut short by the end of the interval says nothing against the longer one.
            proposed = torch.where(accept & (trial < size), torch.maximum(size, trial * factor), trial * factor)
            size = torch.where(moving, proposed, size)
            self._give_up(done, size, attempts, start, length, error)
        self.proposal = size * abs(length)

    def _clock(self, t: Tensor, h: Tensor, moving: Tensor) -> tuple[Time, Time]:
        """Each sample's time and step; two numbers if they are shared."""
        if not self.shared:
            return t, h
        first = int(moving.nonzero()[0])
        return float(t[first]), float(h[first])

    def _error(self, y: Tensor, big: Tensor, small: Tensor) -> Tensor:
        scale = self.atol + self.rtol * torch.maximum(y.abs(), small.abs())
        error = (small - big) / (2**self.order - 1)
        return _rms(error / scale)

    def _first_step(self, y: Tensor, slope: Tensor, length: float) -> Tensor:
        """A step that changes the state by a hundredth (HNW II.4, starting step size, a–b)."""
        scale = self.atol + self.rtol * y.abs()
        size, speed = _rms(y / scale), _rms(slope / scale)
        step = torch.where((size < 1e-5) | (speed * length < 1e-5), 1e-3 * length, 0.01 * size / speed)
        step = step.nan_to_num(1e-3 * length).clamp(10 * self.min_step * length, length)
        return step.min().expand_as(step) if self.shared and len(step) else step

    def _controller(self, error: Tensor, previous: Tensor, accept: Tensor) -> tuple[Tensor, Tensor]:
        """The factor for the next step, and the error to remember."""
        error, k = error.clamp(1e-10, 1e10), self.order + 1
        grow = (SAFETY * error ** (-PROPORTIONAL / k) * previous ** (INTEGRAL / k)).clamp(0.2, 5.0)
        shrink = (SAFETY * error ** (-1.0 / k)).clamp(0.1, 0.9)
        return torch.where(accept, grow, shrink), torch.where(accept, error, previous)

    def _give_up(
        self, done: Tensor, size: Tensor, attempts: Tensor, start: float, length: float, error: Tensor
    ) -> None:
        small = (done < 1.0) & (size < self.min_step) & (1.0 - done > self.min_step)
        many = (done < 1.0) & (attempts >= self.max_steps)
        stuck = small | many
        if not bool(stuck.any()):
            return
        i = int(stuck.nonzero()[0])
        why, remedy = (
            (f"needs steps under min_step={self.min_step:.1e} of the interval", "lower options={'min_step': ...}")
            if bool(small[i])
            else (f"has made max_steps={self.max_steps} attempts", "raise options={'max_steps': ...}")
        )
        raise StepSizeError(
            f"{int(stuck.sum())} of {stuck.numel()} samples (the first is number {i}) cannot be carried past"
            f" t={start + float(done[i]) * length:.6g}: sample {i} {why} (error {float(error[i]):.1e} of the"
            f" tolerance); loosen rtol and atol, {remedy}, or use an implicit method if the problem is stiff"
        )


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean(dim=1).sqrt()


Steps = EqualSteps | ErrorControl
