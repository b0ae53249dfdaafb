"""Which path a solve takes: the fused kernel, or the plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.fuse import Fused
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.options import CALLBACKS, read_options


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
    scheme = get_method(method or default_method(steps, step_size, adjoint))
    how = Request(scheme, steps, step_size, settings, adjoint_params, adjoint, (rtol, atol))
    weights = fused_weights(func, y0, how, event_fn is None and not return_dense)
    if isinstance(weights, str):
        return Backend("plain", weights)
    first = y0[0] if isinstance(y0, tuple) else y0
    return Backend("fused", f"{type(func).__name__} has a kernel for {first.dtype} on {first.device}")


backend.__module__ = "nodeshape"


def default_method(steps: int | None, step_size: float | None, adjoint: str = "discrete") -> str:
    """The method of a call that names none: torchdiffeq's; the source's best for equal steps or steps to be undone."""
    general = steps is None and step_size is None and adjoint != "reversible"
    return "dopri5" if general else "implicit_midpoint"


#: Options that the kernels know, or that concern other solves only.
FUSED_OPTIONS = frozenset(
    {
        "step_size",
        "stage_solver",
        "stage_tolerance",
        "max_stage_iterations",
        "checkpoint_every",
        "drift_tolerance",
        "fused",
        "recompute",
        "step_control",
        "min_step",
        "max_steps",
        "adjoint_rtol",
        "adjoint_atol",
    }
)


#: Options that ask for error control.
ERROR_CONTROL = frozenset(
    {
        "first_step",
        "min_step",
        "max_step",
        "max_num_steps",
        "max_steps",
        "safety",
        "ifactor",
        "dfactor",
        "step_t",
        "jump_t",
        "step_control",
    }
)


@dataclass(frozen=True)
class Request:
    """How a solve is asked for.

    Attributes:
        steps, step_size: of equal steps; both None where none are given.
        tolerances: rtol and atol as given.
    """

    method: Method
    steps: int | None
    step_size: float | None
    options: Mapping[str, Any]
    adjoint_params: Any = None
    adjoint: str = "discrete"
    tolerances: tuple[Any, Any] = (None, None)

    @property
    def adaptive(self) -> bool:
        """Whether error control chooses the steps."""
        if self.steps is not None or self.step_size is not None or "grid_constructor" in self.options:
            return False
        asked = self.tolerances[0] is not None or self.tolerances[1] is not None
        return bool(self.method.error) or asked or any(name in ERROR_CONTROL for name in self.options)


def fused_weights(
    func: Any,
    y0: Any,
    how: Request,
    states_only: bool = True,
) -> list[Tensor] | str:
    """The parameters that the fused kernel solves with; or, if ``odeint`` takes the plain loop, the reason.

    Args:
        states_only: whether no event and no dense output is asked for.
    """
    options, method = how.options, how.method
    program = isinstance(func, Fused)
    if options.get("fused") is False:
        return "options={'fused': False}"
    if how.adaptive:
        return "error control chooses the steps"
    if not (method.one_stage or program):
        return f"{method.name} has no fused kernel (euler, implicit_euler and implicit_midpoint have)"
    if not states_only:
        return "events and dense output take the plain loop"
    if any(name in getattr(func, "__dict__", ()) for name in CALLBACKS):
        return "its callbacks are told of steps"
    if options:
        if options.get("stage_solver", "anderson") != "anderson":
            return f"the stage solver is {options['stage_solver']}"
        if not options.keys() <= FUSED_OPTIONS:
            return f"option {min(options.keys() - FUSED_OPTIONS)!r} takes the plain loop"
    if how.adjoint_params is not None:
        return "adjoint_params chooses what to differentiate by"
    if isinstance(func, Fused):
        return func.weights_for(y0, method, how.adjoint)
    return fused.weights_for(func, y0)
