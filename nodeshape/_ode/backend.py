"""Which path a solve takes: the fused kernel, or the plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.fuse import Fused
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.options import read_options

#: Options that a fused program's solve knows.
PROGRAM_OPTIONS = frozenset(
    {
        "step_size",
        "stage_solver",
        "stage_tolerance",
        "max_stage_iterations",
        "checkpoint_every",
        "drift_tolerance",
        "fused",
    }
)


@dataclass(frozen=True)
class Backend:
    """The path a solve takes and why.

    Attributes:
        name: ``"fused"`` or ``"plain"``.
        reason: one line; ``str(backend)`` is both.
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
    method: str | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    rtol: Any = None,
    atol: Any = None,
    adjoint: str = "discrete",
    options: Mapping[str, Any] | None = None,
    event_fn: Any = None,
    return_stats: bool = False,
    return_dense: bool = False,
    adjoint_params: Any = None,
) -> Backend:
    """Say which path :func:`odeint` takes for these arguments, and why, without solving.

    All arguments are those of :func:`odeint`, which says what they mean; times, tolerances and results do not matter.

    Raises:
        ValueError: an unknown method or option.
    """
    settings = read_options(options)
    step_size = settings.get("step_size", step_size)
    scheme = get_method(method or "implicit_midpoint")
    weights: list[Tensor] | str = "events and dense output take the plain loop"
    if event_fn is None and not return_dense:
        weights = fused_weights(func, y0, scheme, steps, step_size, settings, adjoint_params, adjoint, (rtol, atol))
    if isinstance(weights, str):
        return Backend("plain", weights)
    first = y0[0] if isinstance(y0, tuple) else y0
    return Backend("fused", f"{type(func).__name__} has a kernel for {first.dtype} on {first.device}")


backend.__module__ = "nodeshape"


def fused_weights(
    func: Any,
    y0: Any,
    method: Method,
    steps: int | None,
    step_size: float | None,
    options: Mapping[str, Any],
    adjoint_params: Any,
    adjoint: str = "discrete",
    tolerances: tuple[Any, Any] = (None, None),
) -> list[Tensor] | str:
    """The parameters that the fused kernel solves with; or, if ``odeint`` takes the plain loop, the reason."""
    program = isinstance(func, Fused)
    if not (method.one_stage or program):
        return f"{method.name} has no fused kernel (euler, implicit_euler and implicit_midpoint have)"
    if options.get("fused") is False:
        return "options={'fused': False}"
    given = steps is not None or step_size is not None
    if not given and (not program or method.one_stage or method.error or tolerances != (None, None)):
        return "error control chooses the steps"
    if options:
        if options.get("stage_solver", "anderson") != "anderson":
            return f"the stage solver is {options['stage_solver']}"
        if "adjoint_step_size" in options:
            return "the backward pass has steps of its own"
    if adjoint_params is not None:
        return "adjoint_params chooses what to differentiate by"
    if isinstance(func, Fused):
        refused = options.keys() - PROGRAM_OPTIONS
        if refused:
            return f"option {min(refused)!r} takes the plain loop"
        return func.weights_for(y0, method, adjoint)
    return fused.weights_for(func, y0)
