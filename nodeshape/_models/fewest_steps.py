"""``fewest_steps``: the cheapest solver under which a trained model still says what its converged solve says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._errors import StageSolveError
from nodeshape._models.block import ODEBlock
from nodeshape._ode.method import SOURCE_METHODS

#: Steps of the midpoint rule the converged solve starts from, and at most takes.
FIRST_STEPS, MAX_STEPS = 32, 2048
#: The error of the converged solve stays this far below the tolerance.
MARGIN = 0.1


@dataclass(frozen=True)
class FewestSteps:
    """What :func:`fewest_steps` found.

    Attributes:
        method, steps: for ``model.with_solver(method=..., steps=...)``.
        evaluations: of f per sample, the mean over the images.
        error: largest absolute difference of an output from the converged solve.
    """

    __module__ = "nodeshape"

    method: str
    steps: int
    evaluations: float
    error: float


@torch.no_grad()
def fewest_steps(model: nn.Module, images: Tensor, tolerance: float) -> FewestSteps:
    """Find the solver with the fewest evaluations of f whose outputs stay within ``tolerance``.

    Args:
        model: an :class:`ODEBlock`, or a module with ``with_solver(method=..., steps=...)`` and its block as ``.ode``;
            run as it is, so call ``model.eval()`` first.
        images: inputs of the model, ``[batch, ...]``; what is found holds for these.
        tolerance: largest absolute difference of any output (logit) from that of the converged solve.

    The converged solve is the midpoint rule's with its steps halved until that changes a tenth of ``tolerance`` at
    most, extrapolated (Richardson; Hairer, Nørsett & Wanner I, II.4).

    Raises:
        ValueError: ``tolerance`` is not positive, or below what the converged solve reaches.
        StageSolveError: the converged solve's stages are not solved.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    exact = converged(model, images, tolerance)
    best: FewestSteps | None = None
    for method in sorted(SOURCE_METHODS.values(), key=lambda method: -method.order):
        best = _fewest_of_method(model, images, exact, tolerance, method.name, best)
    assert best is not None  # the midpoint rule comes first and has converged
    return best


fewest_steps.__module__ = "nodeshape"


def _run(model: Any, images: Tensor, method: str, steps: int) -> tuple[Tensor, float]:
    """The outputs, and the evaluations of f per sample."""
    solver = model.with_solver(method=method, steps=steps)
    outputs: Tensor = solver(images)
    block: ODEBlock = solver if isinstance(solver, ODEBlock) else solver.ode
    stats = block.stats
    assert stats is not None
    return outputs, float(stats.nfe_forward.double().mean())


def converged(model: nn.Module, images: Tensor, tolerance: float) -> Tensor:
    """Halve the step of the midpoint rule until that changes nothing of note; extrapolate the last two solves."""
    steps = FIRST_STEPS
    coarse, _ = _run(model, images, "implicit_midpoint", steps)
    while steps < MAX_STEPS:
        steps *= 2
        fine, _ = _run(model, images, "implicit_midpoint", steps)
        change = float((fine - coarse).abs().max())
        if change <= MARGIN * tolerance:
            return fine + (fine - coarse) / 3.0
        coarse = fine
    raise ValueError(
        f"tolerance {tolerance:.1e} is out of reach: from {steps // 2} to {steps} steps the outputs still change by"
        f" {change:.1e}; raise the tolerance, or run the model in float64"
    )


def _fewest_of_method(
    model: nn.Module, images: Tensor, exact: Tensor, tolerance: float, method: str, best: FewestSteps | None
) -> FewestSteps | None:
    """The better of ``best`` and the fewest steps of ``method``: doubled until good enough, then bisected."""

    def attempt(steps: int) -> FewestSteps | None:
        """None if the stage equation cannot be solved with such long steps."""
        try:
            outputs, evaluations = _run(model, images, method, steps)
        except StageSolveError:
            return None
        return FewestSteps(method, steps, evaluations, float((outputs - exact).abs().max()))

    failed, steps = 0, 1
    while True:
        found = attempt(steps)
        if found is not None and found.error <= tolerance:
            break
        failed, steps = steps, 2 * steps
        # A step costs at least one evaluation: more steps than the best has evaluations cannot win.
        if steps > (MAX_STEPS if best is None else best.evaluations):
            return best
    while steps - failed > 1:
        middle = (failed + steps) // 2
        candidate = attempt(middle)
        if candidate is not None and candidate.error <= tolerance:
            found, steps = candidate, middle
        else:
            failed = middle
    return found if best is None or found.evaluations < best.evaluations else best
