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

Function = Callable[[Tensor], Tensor]

#: Columns of iteration history Anderson acceleration keeps.
ANDERSON_MEMORY = 5
#: A residual difference this much shorter after orthogonalisation (relative) counts as dependent on the older ones.
DEPENDENT = 1e-3
#: Relative residual at which a stage counts as solved, by dtype.
STAGE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
MAX_STAGE_ITERATIONS = 50


class StageSolveError(RuntimeError):
    """An implicit stage was not solved to its tolerance."""


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


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=1).sqrt()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=1, keepdim=True)


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

    The differences of the residuals are kept orthonormal (modified Gram–Schmidt), so the least-squares problem of each
    iteration is a handful of dot products. On linear problems this is GMRES, which is why stiff but small problems
    converge where plain iteration diverges.

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
    base_norm = _rms(base)
    broken = ~torch.isfinite(base_norm)  # propagates like any NaN; no iteration can help
    evaluations = torch.ones_like(base_norm, dtype=torch.long)
    relative = torch.zeros_like(base_norm)
    active = torch.ones_like(broken)
    history: list[tuple[Tensor, Tensor]] = []  # (q, x): orthonormal residual differences, the matching iterate steps

    while True:
        norm = _rms(residual)
        scale = torch.maximum(base_norm, _rms(value))
        latest = torch.where(norm > 0, norm / scale, norm)
        relative = torch.where(active, latest, relative)
        active = active & ~(latest <= tolerance) & torch.isfinite(latest) & ~broken & (evaluations < max_iterations)
        if not bool(active.any()):
            break

        step = residual
        for q, x in history:
            step = step - _dot(q, residual) * (x + q)
        rows = active[:, None]
        new_value = torch.where(rows, value + step, value)
        new_slope = torch.where(rows, function(new_value), slope)
        new_residual = base + c * new_slope - new_value
        evaluations = evaluations + active

        difference, moved = new_residual - residual, new_value - value
        q, x = difference, moved
        for old_q, old_x in history:
            overlap = _dot(old_q, q)
            q, x = q - overlap * old_q, x - overlap * old_x
        # A difference within the span of the older ones outdates them: the sample starts its history anew with it.
        whole, length = _dot(difference, difference).sqrt(), _dot(q, q).sqrt()
        stale = length <= DEPENDENT * whole
        q, x, length = (
            torch.where(stale, difference, q),
            torch.where(stale, moved, x),
            torch.where(stale, whole, length),
        )
        usable = rows & (length > 0) & torch.isfinite(length)
        length = torch.where(usable, length, torch.ones_like(length))
        history = [(torch.where(stale, 0.0, old_q), torch.where(stale, 0.0, old_x)) for old_q, old_x in history]
        history.append((torch.where(usable, q / length, 0.0), torch.where(usable, x / length, 0.0)))
        history = history[-ANDERSON_MEMORY:]
        value, slope, residual = new_value, new_slope, new_residual

    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)


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
    broken = ~torch.isfinite(_rms(base))
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
        norm = _rms(correction)
        latest = torch.where(norm > 0, norm / torch.maximum(_rms(base), _rms(value)), norm)
        latest = torch.where(healthy, latest, torch.inf)
        relative = torch.where(active, latest, relative)
        active = healthy & ~(latest <= tolerance) & torch.isfinite(latest) & (evaluations < max_iterations)
    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)
