"""Which path a solve takes: the fused kernel, or the plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nodeshape._ode import fused


@dataclass(frozen=True)
class Backend:
    """The path a solve takes and why.

    Attributes:
        name: ``"fused"`` or ``"plain"``.
        reason: one line.
    """

    __module__ = "nodeshape"

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def backend(
    func: Any,
    y0: Any,
    t: Any = None,
    *,
    steps: int | None = None,
    step_size: float | None = None,
    options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None,
    **others: Any,
) -> Backend:
    """Say which path ``odeint`` takes for these arguments (its own; those not named here do not matter)."""
    weights = fused_weights(func, y0, steps, step_size, options or {}, adjoint_params)
    if isinstance(weights, str):
        return Backend("plain", weights)
    return Backend("fused", f"{type(func).__name__} has a kernel for {y0.dtype} on {y0.device}")


backend.__module__ = "nodeshape"


def fused_weights(
    func: Any, y0: Any, steps: int | None, step_size: float | None, options: Mapping[str, Any], adjoint_params: Any
) -> list[Tensor] | str:
    """The parameters that the fused kernel solves with; or, if ``odeint`` takes the plain loop, the reason."""
    if steps is None and step_size is None and "step_size" not in options:
        return "error control chooses the steps"
    if options:
        if options.get("stage_solver", "anderson") != "anderson":
            return f"the stage solver is {options['stage_solver']}"
        if "adjoint_step_size" in options:
            return "the backward pass has steps of its own"
    if adjoint_params is not None:
        return "adjoint_params chooses what to differentiate by"
    return fused.weights_for(func, y0)
