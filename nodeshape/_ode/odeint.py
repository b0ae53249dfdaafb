"""``odeint``: solve dy/dt = f(t, y) at given times, differentiably, with torchdiffeq's calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from nodeshape._ode import fused
from nodeshape._ode.backend import fused_weights
from nodeshape._ode.error_control import ErrorControl, Steps
from nodeshape._ode.integrate import MOST_STEPS, EqualSteps
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.problem import ADJOINTS, Problem
from nodeshape._ode.solution import Solution
from nodeshape._ode.stage import MAX_STAGE_ITERATIONS, STAGE_TOLERANCE, StageSolver
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.system import State, System

DEFAULT_METHOD = "implicit_midpoint"
RTOL, ATOL = 1e-4, 1e-6
MIN_STEP, MAX_STEPS = 1e-10, 10_000
#: Largest count that an option takes; beyond, it is taken for a mistake.
MOST_ITERATIONS = 2**31 - 1
#: A rebuilt trajectory may be this many times further off than a stage.
DRIFT_PER_STAGE_TOLERANCE = 1e3
ADJOINT_TOLERANCES = ("adjoint_rtol", "adjoint_atol")
OPTIONS = (
    "step_size",
    "stage_solver",
    "stage_tolerance",
    "max_stage_iterations",
    "checkpoint_every",
    "drift_tolerance",
    "min_step",
    "max_steps",
    "adjoint_step_size",
    *ADJOINT_TOLERANCES,
)


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    method: str | None = "implicit_midpoint",
    steps: int | None = None,
    step_size: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    adjoint: str = "discrete",
    options: Mapping[str, Any] | None = None,
    return_stats: bool = False,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y) from ``y(t[0]) = y0`` and return y at every time in ``t``.

    The first dimension of ``y0`` is the batch if ``y0`` (every tensor of a tuple) has at least two dimensions; each
    sample then has its own stage iterations and, under error control, its own steps.

    Args:
        func: a module or function ``func(t, y) -> dy/dt``; ``t`` is a scalar tensor, dy/dt has the shape of ``y``.
        y0: initial state, a float32 or float64 tensor or a tuple of them.
        t: strictly increasing or decreasing times, ``[times]``; each is hit exactly.
        method: ``"euler"``, ``"implicit_euler"`` or ``"implicit_midpoint"``.
        steps: equal steps in each interval of ``t``, at most 10 million.
        step_size: an interval of length T takes ceil(T / step_size) equal steps.
        rtol, atol: with neither ``steps`` nor ``step_size``, steps are chosen so that the error of each stays within
            ``atol + rtol |y|`` (defaults 1e-4 and 1e-6).
        adjoint: how gradients are computed. ``"discrete"``: exact, stores one state a step (of a fused ConvDynamics
            three maps). ``"reversible"``: exact to the stage tolerance, memory independent of the number of steps.
            ``"continuous"``: the approximate adjoint of Chen et al., likewise independent. Only ``"discrete"`` has
            second derivatives.
        options: ``step_size``, as in torchdiffeq; ``stage_solver``, ``"anderson"`` or ``"newton"`` (small stiff
            states); ``stage_tolerance`` and ``max_stage_iterations`` of implicit stages; ``checkpoint_every`` (steps
            between stored states) and ``drift_tolerance`` of ``"reversible"``; ``min_step`` (in units of the interval)
            and ``max_steps`` (attempts in an interval) of error control; ``adjoint_step_size``, or ``adjoint_rtol`` and
            ``adjoint_atol``, of the backward pass of ``"continuous"`` (default: those of the forward pass).
        return_stats: also return :class:`SolverStats`; its backward counts appear when the backward pass has run.
        adjoint_params: tensors to differentiate with respect to, besides ``y0`` and ``t``. By default the parameters of
            ``func`` and whatever else its first evaluation is computed from.

    Returns:
        ``[times, *y0.shape]`` (a tuple of such for a tuple state), or ``(solution, stats)``.

    Raises:
        ValueError: an argument is out of its range.
        StageSolveError: an implicit stage did not converge.
        StepSizeError: error control needs too small or too many steps.
        ReversalDriftError: in the backward pass, if a ``"reversible"`` gradient would be wrong.
    """
    scheme = get_method(method or DEFAULT_METHOD)
    if adjoint not in ADJOINTS:
        raise ValueError(f"unknown adjoint {adjoint!r}: choose one of {', '.join(ADJOINTS)}")
    settings = _settings(options) if options else {}
    tensors = _tensors(y0)
    t, times = _times(t)
    if "step_size" in settings:
        if step_size is not None:
            raise ValueError(f"step_size is given twice: {step_size!r}, and {settings['step_size']!r} in options")
        step_size = settings["step_size"]
    _check_steps(steps, step_size)
    fixed = steps is not None or step_size is not None
    stage_tolerance = STAGE_TOLERANCE[tensors[0].dtype]
    drift_tolerance = settings.get("drift_tolerance", DRIFT_PER_STAGE_TOLERANCE * stage_tolerance)
    stage_tolerance = settings.get("stage_tolerance", stage_tolerance)
    max_iterations = settings.get("max_stage_iterations", MAX_STAGE_ITERATIONS)

    weights = fused_weights(func, y0, steps, step_size, settings, adjoint_params)
    if not isinstance(weights, str):
        if steps is not None:
            counts = [int(steps)] * (len(times) - 1)
        else:
            equal = EqualSteps(None, step_size)
            counts = [equal.number(end - start) for start, end in pairwise(times)]
        ys, forward_evaluations, residual = fused.solve(
            cast("Any", func),  # ConvDynamics or MLPDynamics,
            weights,
            tensors[0],  # and a single tensor, as fused_weights has seen
            t,
            counts,
            scheme,
            adjoint,
            stage_tolerance,
            max_iterations,
            settings.get("checkpoint_every"),
            drift_tolerance,
        )
        if not return_stats:
            return ys
        return ys, _fused_stats(scheme, sum(counts), forward_evaluations, fused.backward_evaluations(ys), residual)

    solver = StageSolver(settings.get("stage_solver", "anderson"), stage_tolerance, max_iterations)
    differentiable = torch.is_grad_enabled()
    with torch.no_grad():
        system = System(func, y0, adjoint_params if differentiable else ())
        rows = system.rows(y0)
        stats = SolverStats.zeros(system.samples, system.device)
        forward: Steps
        backward: Steps
        if fixed:
            forward = backward = EqualSteps(steps, step_size)
        else:
            tolerances = _positive("rtol", rtol, RTOL), _positive("atol", atol, ATOL)
            limits = settings.get("min_step", MIN_STEP), settings.get("max_steps", MAX_STEPS)
            shared = system.samples < 2
            if not shared:
                shared = not system.separable(times[0], rows)
                stats.nfe_forward += 2
                stats.step_control = "shared" if shared else "per sample"
            forward = ErrorControl(scheme.order, *tolerances, *limits, shared)
            adjoint_rtol, adjoint_atol = map(settings.get, ADJOINT_TOLERANCES, tolerances)
            backward = ErrorControl(scheme.order, adjoint_rtol, adjoint_atol, *limits, shared)
        if "adjoint_step_size" in settings:
            backward = EqualSteps(None, settings["adjoint_step_size"])
        problem = Problem(
            system,
            scheme,
            solver,
            times,
            forward,
            backward,
            adjoint,
            settings.get("checkpoint_every"),
            drift_tolerance,
            stats,
        )
        ys = problem.solve(rows, keep=differentiable)
    inputs = (*tensors, t, *(system.parameters or ()))
    if differentiable and any(x.requires_grad for x in inputs):
        ys = Solution.apply(problem, [ys], system.rows(y0), t, *(system.parameters or ()))
    solution = system.state(ys)
    return (solution, stats) if return_stats else solution


odeint.__module__ = "nodeshape"


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """``odeint`` with ``adjoint="continuous"``, so that code written for torchdiffeq's function runs unchanged.

    The backward pass uses the method of the forward pass; its steps follow ``adjoint_rtol`` and ``adjoint_atol``, or
    ``adjoint_options={"step_size": ...}`` (default: those of the forward pass). Its error norm is that of state and
    adjoint, without the parameters, which torchdiffeq calls ``{"norm": "seminorm"}``. Another ``adjoint_method`` or
    other ``adjoint_options`` raise ValueError.
    """
    method = arguments.get("method") or DEFAULT_METHOD
    if adjoint_method not in (None, method):
        raise ValueError(f"adjoint_method must be the method of the forward pass, {method!r}, got {adjoint_method!r}")
    options = dict(arguments.pop("options", None) or {})
    backward = dict(adjoint_options or {})
    if backward.pop("norm", "seminorm") != "seminorm":
        raise ValueError("adjoint_options: the only norm is 'seminorm'")
    if "step_size" in backward:
        options["adjoint_step_size"] = backward.pop("step_size")
    if backward:
        raise ValueError(f"adjoint_options may hold 'step_size' and 'norm', got {sorted(backward)}")
    given = zip(ADJOINT_TOLERANCES, (adjoint_rtol, adjoint_atol))
    options.update((name, value) for name, value in given if value is not None)
    arguments.setdefault("adjoint", "continuous")
    return odeint(func, y0, t, options=options, **arguments)


odeint_adjoint.__module__ = "nodeshape"


def _fused_stats(method: Method, steps: int, forward: Tensor, backward: Tensor | None, residual: Tensor) -> SolverStats:
    return SolverStats(
        nfe_forward=forward,
        # filled in when the backward pass has run
        nfe_backward=torch.zeros_like(forward) if backward is None else backward,
        accepted=torch.full_like(forward, steps),
        rejected=torch.zeros_like(forward),
        stage_iterations=torch.zeros_like(forward) if method.explicit else forward,
        residual=residual,
    )


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = {name: value for name, value in (options or {}).items() if value is not None}
    for name, value in settings.items():
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}: known are {', '.join(OPTIONS)}")
        if name == "stage_solver":
            if value not in ("anderson", "newton"):
                raise ValueError(f"unknown stage_solver {value!r}: choose 'anderson' or 'newton'")
        elif name in ("checkpoint_every", "max_stage_iterations", "max_steps"):
            settings[name] = _count(f"option {name!r}", value, MOST_ITERATIONS)
        else:
            _positive(name, value, value)
    return settings


def _positive(name: str, value: float | None, default: float) -> float:
    value = default if value is None else value
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _count(name: str, value: Any, most: int) -> int:
    """``value`` as an int from 1 to ``most``."""
    whole = isinstance(value, int) or (isfinite(value) and value == int(value))
    if not whole or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return int(value)


def _check_steps(steps: int | None, step_size: float | None) -> None:
    if steps is not None and step_size is not None:
        raise ValueError(f"give steps or step_size, not both: got steps={steps!r} and step_size={step_size!r}")
    if steps is not None:
        _count("steps", steps, MOST_STEPS)
    if step_size is not None:
        _positive("step_size", step_size, step_size)


def _tensors(y0: State) -> tuple[Tensor, ...]:
    if isinstance(y0, Tensor) and y0.dtype in STAGE_TOLERANCE:
        return (y0,)
    tensors = y0 if isinstance(y0, tuple) else (y0,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
    kinds = {(x.dtype, x.device) for x in tensors}
    if len(kinds) > 1:
        raise ValueError(f"the tensors of y0 must share dtype and device, got {sorted(map(str, kinds))}")
    if tensors[0].dtype not in STAGE_TOLERANCE:
        raise ValueError(f"y0 must be float32 or float64, got {tensors[0].dtype}")
    return tensors


def _times(t: Tensor | Sequence[float]) -> tuple[Tensor, list[float]]:
    if isinstance(t, Tensor):
        if t.dim() != 1:
            raise ValueError(f"t must have one dimension, got shape {tuple(t.shape)}")
        times = [float(x) for x in t.tolist()]
    else:
        times = [float(x) for x in t]
        t = torch.tensor(times, dtype=torch.float64)
    if not times:
        raise ValueError("t must hold at least one time, got none")
    lengths = [b - a for a, b in pairwise(times)]
    if not all(map(isfinite, times)) or (lengths and not (min(lengths) > 0 or max(lengths) < 0)):
        raise ValueError(f"t must be finite and strictly increasing or decreasing, got {times}")
    if not all(map(isfinite, lengths)):
        raise ValueError(f"t must have finite intervals, but the length of one overflows: got {times}")
    return t, times
