"""Which path a solve takes: the fused kernel, or the plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.fuse import Fused
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.options import CALLBACKS, UniformGrid, check_steps, read_options, steps_of
from nodeshape._ode.program_op import MOST_STAGES
from nodeshape._ode.unrolled import is_tracing, keeps_ops


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

    All arguments are those of :func:`odeint`, which says what they mean. Without ``t`` they are judged as if all times
    were on the grid of the option ``step_size``.

    Raises:
        ValueError: an unknown method or option.
    """
    settings = read_options(options)
    times: list[float] = []
    if t is not None:
        times = (t.unique() if t.dim() == 2 else t).tolist() if isinstance(t, Tensor) else list(t)
    asked = (method, steps, step_size, (rtol, atol), adjoint, settings, adjoint_params)
    how = Request.of(*asked, times, event_fn is not None)
    weights = fused_weights(func, y0, how, event_fn is None and not return_dense, t)
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

#: Options that the kernel of programs knows besides, under error control.
ADAPTIVE_OPTIONS = frozenset(
    {"first_step", "max_step", "max_num_steps", "safety", "ifactor", "dfactor", "on_failure", "step_control"}
)

#: Of a ``reversible`` solve that names neither a method nor steps: its order is 2.
REVERSIBLE_TOLERANCES = (1e-4, 1e-6)
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

    @classmethod
    def of(
        cls,
        method: str | None,
        steps: int | None,
        step_size: float | None,
        tolerances: tuple[Any, Any],
        adjoint: str,
        options: Mapping[str, Any],
        adjoint_params: Any = None,
        times: Sequence[float] = (),
        event: bool = False,
    ) -> Request:
        """The request of a call, its defaults filled in.

        The option ``step_size`` is torchdiffeq's: a grid from the first time on, between whose points observations are
        interpolated. It becomes a ``grid_constructor`` unless all observations are on the grid.

        Raises:
            ValueError: steps are given twice, or out of range.
        """
        # Numbers and words alone: what else may be given may change, or be costly to compare.
        simple = not options and adjoint_params is None and tolerances == (None, None) and method.__class__ in _WORDS
        key = (method, steps, step_size, adjoint) if simple and (type(steps), type(step_size)) in _NUMBERS else None
        if key in _requests and not torch.compiler.is_compiling():
            return _requests[key]
        options, given = dict(options), options.get("step_size")
        if given is not None and step_size is not None:
            raise ValueError(f"step_size is given twice: {step_size!r}, and {given!r} in options")
        size = step_size if given is None else given
        scheme = get_method(method or default_method(steps, size, adjoint))
        if adjoint == "reversible" and method is None and tolerances == (None, None):
            tolerances = REVERSIBLE_TOLERANCES
        if steps is not None or size is not None:
            check_steps(steps, size)
            if "grid_constructor" in options:
                raise ValueError("give steps, step_size or grid_constructor, not two of them")
        if given is not None and adjoint != "reversible" and not event and not _on_grid(times, given):
            del options["step_size"]
            size, options["grid_constructor"] = None, UniformGrid(given)
        made = cls(scheme, steps, size, options, adjoint_params, adjoint, tolerances)
        if key is not None and not torch.compiler.is_compiling():
            if len(_requests) == MOST_REQUESTS:
                _requests.clear()
            _requests[key] = made
        return made

    @property
    def adaptive(self) -> bool:
        """Whether error control chooses the steps."""
        if self.steps is not None or self.step_size is not None or "grid_constructor" in self.options:
            return False
        asked = self.tolerances[0] is not None or self.tolerances[1] is not None
        return bool(self.method.error) or asked or any(name in ERROR_CONTROL for name in self.options)


#: Of earlier calls, by method, steps, step_size and adjoint: making one is much of what a small solve costs in Python.
_requests: dict[Any, Request] = {}
MOST_REQUESTS = 256
_CALLBACKS = frozenset(CALLBACKS)
_WORDS = (str, type(None))
_NUMBERS = ((int, type(None)), (type(None), float))


def _on_grid(times: Sequence[float], step_size: float) -> bool:
    """Whether steps of ``step_size`` from the first time on end at every other one."""
    for start, end in pairwise(times):
        steps_of(end - start, step_size)  # which refuses too many
        count = abs(end - start) / step_size
        if abs(count - round(count)) > 1e-6 * max(1.0, count):
            return False
    return True


def fused_weights(
    func: Any,
    y0: Any,
    how: Request,
    states_only: bool = True,
    t: Any = None,
) -> list[Tensor] | str:
    """The parameters that the fused kernel solves with; or, if ``odeint`` takes the plain loop, the reason.

    Args:
        states_only: whether no event and no dense output is asked for.
        t: the times, where they are known.
    """
    options, method = how.options, how.method
    if options.get("fused") is False:
        return "options={'fused': False}"
    if not keeps_ops():
        return "an exporter records f itself, which runs anywhere"
    if how.adaptive:
        reason = _why_not_adaptive(how, y0, t)
        if reason:
            return reason
    elif how.adjoint != "discrete" and not method.one_stage:
        return f"adjoint={how.adjoint!r} of {method.name} takes the plain loop"
    if len(method.b) > MOST_STAGES:
        return f"{method.name} has more than {MOST_STAGES} stages"
    if not states_only:
        return "events and dense output take the plain loop"
    if not _CALLBACKS.isdisjoint(getattr(func, "__dict__", ())):
        return "its callbacks are told of steps"
    if options:
        if options.get("stage_solver", "anderson") != "anderson":
            return f"the stage solver is {options['stage_solver']}"
        taken = FUSED_OPTIONS | ADAPTIVE_OPTIONS if how.adaptive else FUSED_OPTIONS
        if isinstance(options.get("grid_constructor"), UniformGrid):
            reason = _why_not_between(how, t)
            if reason:
                return reason
            taken = taken | {"grid_constructor", "interp"}
        if not options.keys() <= taken:
            return f"option {min(options.keys() - taken)!r} takes the plain loop"
    if how.adjoint_params is not None:
        return "adjoint_params chooses what to differentiate by"
    return func.weights_for(y0) if isinstance(func, Fused) else fused.weights_for(func, y0)


def _why_not_between(how: Request, t: Any) -> str | None:
    """Why observations between the points of a grid are not read off the kernel's states at these points."""
    if how.options.get("interp", "linear") != "linear":
        return "cubic interpolation between the points of a grid takes the plain loop"
    if how.adjoint != "discrete" or how.options.get("recompute", False):
        return "gradients of a grid without a record take the plain loop"
    if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
        return "differentiated times between the points of a grid take the plain loop"
    return None


def _why_not_adaptive(how: Request, y0: Any, t: Any) -> str | None:
    """Why error control is not the kernel's: there every sample takes its own steps."""
    method = how.method
    if not (method.explicit and method.error and method.starts_with_slope and len(method.b) < MOST_STAGES):
        return (
            f"error control of {method.name} takes the plain loop (that of explicit methods with an estimate does not)"
        )
    if how.adjoint != "discrete" or how.options.get("recompute", False):
        return "gradients of error control without a record take the plain loop"
    if how.options.get("step_control") == "shared":
        return "samples are to share their steps"
    if not all(x is None or isinstance(x, Real) or (isinstance(x, Tensor) and x.dim() == 0) for x in how.tolerances):
        return "tolerances of each element take the plain loop"
    if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
        return "error control whose times are differentiated takes the plain loop"
    if t is not None and len(t) < 2:
        return "there is one time only"
    first = y0[0] if isinstance(y0, tuple) and y0 else y0
    if isinstance(first, Tensor) and not first.is_cpu:
        return f"error control on {first.device} takes the plain loop"
    if is_tracing():
        return "error control cannot be traced"
    return None
