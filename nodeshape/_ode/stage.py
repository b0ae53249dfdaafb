"""The stage equation Y = base + c F(Y): one solver for forward stages, rebuilt stages and transposed stages.

Every sweep of this library is made of this one step. With J = ∂f/∂y at the stage:

    forward      Y = y_k      + θ h     f(Y)      then  y_{k+1} = y_k     + h f(Y)
    reversed     Y = y_{k+1}  − (1−θ) h f(Y)      then  y_k     = y_{k+1} − h f(Y)
    transposed   w = λ_{k+1}  + θ h     Jᵀ w      then  λ_k     = λ_{k+1} + h Jᵀ w

Samples are rows and never mix: each has its own iteration history, stops at its own tolerance, and fails alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nodeshape._errors import StageSolveError
from nodeshape._ode.system import Time

Function = Callable[[Tensor], Tensor]

#: Iterates of history Anderson acceleration keeps.
ANDERSON_MEMORY = 5
#: A residual difference this much shorter after orthogonalisation (relative) counts as dependent on the newer ones.
DEPENDENT = 1e-3
#: Relative residual at which a stage counts as solved, by dtype.
STAGE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
MAX_STAGE_ITERATIONS = 100


@dataclass
class Stage:
    """A solved stage, row by row.

    Attributes:
        value: Y, ``[samples, size]``.
        slope: F(Y), ``[samples, size]``.
        evaluations: evaluations of F each sample needed, ``[samples]``.
        residual: relative residual each sample stopped at, ``[samples]``.
        solved: which samples reached the tolerance (or came in non-finite), ``[samples]``.
    """

    value: Tensor
    slope: Tensor
    evaluations: Tensor
    residual: Tensor
    solved: Tensor


def _relative(change: Tensor, value: Tensor, base: Tensor) -> Tensor:
    """‖change‖ / max(‖value‖, ‖base‖) by sample: infinite if only the change is not zero, NaN if one is not finite."""
    norm, scale = _norm(change)[:, 0], torch.maximum(_norm(base), _norm(value))[:, 0]
    return torch.where(norm > 0, norm / scale, norm)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of the rows, kept as a column; no square in it overflows or underflows."""
    peak = x.abs().amax(dim=-1, keepdim=True)
    unit = x / torch.where(peak > 0, peak, 1.0)
    return peak * _dot(unit, unit).sqrt()


def explicit_stage(function: Function, base: Tensor) -> Stage:
    """The stage of an explicit method: Y = base."""
    samples = base.shape[0]
    return Stage(
        value=base,
        slope=function(base),
        evaluations=torch.ones(samples, dtype=torch.long, device=base.device),
        residual=torch.zeros(samples, dtype=base.dtype, device=base.device),
        solved=torch.ones(samples, dtype=torch.bool, device=base.device),
    )


def anderson_stage(
    function: Function, base: Tensor, c: Tensor | float, guess: Tensor, tolerance: float, max_iterations: int
) -> Stage:
    """Solve Y = base + c F(Y) by Anderson acceleration (Walker & Ni 2011), started from ``guess``.

    Each step minimises the residual over the span of the last differences, as secants predict it. On linear problems
    this is GMRES, which is why stiff but small problems converge where plain iteration diverges. What lies outside the
    span is mixed in whole, and by half as much each time the residual has more than doubled.

    Args:
        function: F, on ``[samples, size]``.
        base: ``[samples, size]``.
        c: a number, or one per sample ``[samples, 1]``.
        guess: the first iterate, ``[samples, size]``.
        tolerance: on rms(Y − base − c F(Y)) / max(rms(Y), rms(base)).
        max_iterations: evaluations of F after which a sample counts as failed.
    """
    value = guess
    slope = function(value)
    residual = base + c * slope - value
    broken = ~torch.isfinite(base).all(dim=1)  # propagates like any NaN; no iteration can help
    active = ~broken
    evaluations = torch.ones_like(active, dtype=torch.long)
    relative = torch.zeros_like(base[:, 0])
    mixing = torch.ones_like(base[:, :1])
    history: list[tuple[Tensor, Tensor]] = []  # (residual difference, iterate difference), the newest first
    while True:
        relative = torch.where(active, _relative(residual, value, base), relative)
        active = active & ~(relative <= tolerance) & ~torch.isnan(relative) & (evaluations < max_iterations)
        if not bool(active.any()):
            break
        rows = active[:, None]
        new_value = torch.where(rows, value + _anderson_step(residual, history, mixing), value)
        new_slope = torch.where(rows, function(new_value), slope)
        new_residual = base + c * new_slope - new_value
        evaluations = evaluations + active
        # What the secants do not predict is mixed in more carefully once that has made things worse.
        worse = _norm(new_residual) > 2.0 * _norm(residual)
        mixing = torch.where(worse, 0.5 * mixing, mixing)
        history = [(new_residual - residual, new_value - value), *history[: ANDERSON_MEMORY - 1]]
        value, slope, residual = new_value, new_slope, new_residual
    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)


def _anderson_step(residual: Tensor, history: list[tuple[Tensor, Tensor]], mixing: Tensor) -> Tensor:
    """The iterate differences that the part of the residual in their span calls for, plus ``mixing`` times the rest.

    Modified Gram–Schmidt, the newest difference first, so that old ones never spoil new ones.
    """
    if not history:
        return mixing * residual
    differences, moves = (torch.stack(x) for x in zip(*history))
    whole = _norm(differences)
    step = torch.zeros_like(residual)
    for k in range(len(history)):
        length = _norm(differences[k])
        usable = (length > DEPENDENT * whole[k]) & torch.isfinite(length)
        q = torch.where(usable, differences[k] / length, 0.0)
        x = torch.where(usable, moves[k] / length, 0.0)
        along = _dot(q, residual)
        residual = residual - along * q
        step = step - along * x
        overlap = _dot(q, differences)
        differences = differences - overlap * q
        moves = moves - overlap * x
    return step + mixing * residual


def newton_stage(
    function: Function,
    jacobian: Callable[[Tensor], Tensor],
    base: Tensor,
    c: Tensor | float,
    guess: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Stage:
    """Solve Y = base + c F(Y) by Newton's method with a dense Jacobian per sample, for small stiff systems.

    Stops on the size of the correction, which stays meaningful where c F is so large that the residual drowns in
    rounding.

    Args:
        function, base, c, guess, tolerance, max_iterations: as for :func:`anderson_stage`.
        jacobian: ∂F/∂Y, ``[samples, size, size]``.
    """
    samples, size = base.shape
    identity = torch.eye(size, dtype=base.dtype, device=base.device)
    factor = c[:, :, None] if isinstance(c, Tensor) else c
    value, slope = guess, function(guess)
    broken = ~torch.isfinite(base).all(dim=1)
    evaluations = torch.ones(samples, dtype=torch.long, device=base.device)
    relative = torch.zeros_like(base[:, 0])
    active = ~broken
    while bool(active.any()):
        matrix = identity - factor * jacobian(value)
        healthy = active & torch.isfinite(matrix).all(dim=(1, 2)) & torch.isfinite(slope).all(dim=1)
        matrix = torch.where(healthy[:, None, None], matrix, identity)
        correction = torch.linalg.solve_ex(matrix, (base + c * slope - value)[..., None])[0][..., 0]
        rows = healthy[:, None]
        value = torch.where(rows, value + correction, value)
        slope = torch.where(rows, function(value), slope)
        evaluations = evaluations + healthy
        latest = torch.where(healthy, _relative(correction, value, base), torch.inf)
        relative = torch.where(active, latest, relative)
        active = healthy & ~(latest <= tolerance) & torch.isfinite(latest) & (evaluations < max_iterations)
    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)


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
