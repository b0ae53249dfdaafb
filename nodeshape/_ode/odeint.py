"""``odeint``: solve dy/dt = f(t, y) at given times, differentiably, with torchdiffeq's calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from nodeshape._ode import fused, program_op
from nodeshape._ode.adjoint import adjoint_solution, parameters_of
from nodeshape._ode.backend import fused_weights
from nodeshape._ode.error_control import ErrorControl, Steps
from nodeshape._ode.event import EventFunction, integrate_until_event
from nodeshape._ode.fuse import Fused
from nodeshape._ode.integrate import EqualSteps
from nodeshape._ode.interpolation import DenseSolution
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.options import DRIFT_PER_STAGE_TOLERANCE, check_steps, positive, read_options
from nodeshape._ode.problem import ADJOINTS, Problem
from nodeshape._ode.solution import Solution
from nodeshape._ode.solver import Plan
from nodeshape._ode.stage import MAX_STAGE_ITERATIONS, STAGE_TOLERANCE, StageSolver
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.system import State, System

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_METHOD = "implicit_midpoint"
#: Default tolerances: of the methods of one stage, which have no estimate of their own, and of the others.
ONE_STAGE_TOLERANCES, TOLERANCES = (1e-4, 1e-6), (1e-7, 1e-9)
ADJOINT_TOLERANCES = ("adjoint_rtol", "adjoint_atol")
#: Of one-stage methods under error control: smallest step in units of the interval, attempts in an interval.
MIN_STEP, MAX_STEPS = 1e-10, 10_000
#: Options that only the general loop has.
GENERAL_OPTIONS = frozenset(
    {
        "grid_constructor",
        "interp",
        "perturb",
        "first_step",
        "max_step",
        "max_num_steps",
        "safety",
        "ifactor",
        "dfactor",
        "norm",
        "step_t",
        "jump_t",
        "grid_points",
        "adjoint_method",
        "adjoint_options",
    }
)
#: Types a state may have.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

Y = TypeVar("Y", Tensor, tuple[Tensor, ...])


class Arguments(TypedDict, total=False):
    """The keyword arguments of :func:`odeint` but for those that the type of its result depends on."""

    method: str | None
    steps: int | None
    step_size: float | None
    rtol: Any
    atol: Any
    adjoint: str
    options: Mapping[str, Any] | None
    adjoint_params: Sequence[Tensor] | None


class AdjointArguments(Arguments, total=False):
    """Those of :func:`odeint_adjoint`."""

    adjoint_rtol: Any
    adjoint_atol: Any
    adjoint_method: str | None
    adjoint_options: Mapping[str, Any] | None


Dynamics = Callable[[Tensor, Any], Any]
Times = Tensor | Sequence[float]


@overload
def odeint(
    func: Dynamics, y0: Y, t: Times, *, event_fn: EventFunction, **arguments: Unpack[Arguments]
) -> tuple[Tensor, Y]: ...
@overload
def odeint(
    func: Dynamics, y0: State, t: Times, *, return_dense: Literal[True], **arguments: Unpack[Arguments]
) -> DenseSolution: ...
@overload
def odeint(
    func: Dynamics, y0: Y, t: Times, *, return_stats: Literal[False] = ..., **arguments: Unpack[Arguments]
) -> Y: ...
@overload
def odeint(
    func: Dynamics, y0: Y, t: Times, *, return_stats: Literal[True], **arguments: Unpack[Arguments]
) -> tuple[Y, SolverStats]: ...
@overload
def odeint(
    func: Dynamics, y0: State, t: Times, *, return_stats: bool = ..., **arguments: Unpack[Arguments]
) -> State | tuple[State, SolverStats]: ...
def odeint(
    func: Dynamics,
    y0: State,
    t: Times,
    *,
    method: str | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    rtol: Any = None,
    atol: Any = None,
    adjoint: str = "discrete",
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunction | None = None,
    return_stats: bool = False,
    return_dense: bool = False,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y) from ``y(t[0]) = y0`` and return y at every time in ``t``, differentiably.

    ``steps`` and ``step_size`` hold for each interval of ``t``: 4,000 steps with 1,000 times are four million. The
    first dimension of ``y0`` is the batch of samples if ``y0`` (every tensor of a tuple) has at least two dimensions;
    implicit stages are iterated sample by sample. ``func`` always sees the whole state, so it may couple samples.

    Args:
        func: a module or function ``func(t, y) -> dy/dt``; ``t`` is a scalar tensor of the state's dtype, dy/dt has the
            shape of ``y``. Its attributes ``callback_step``, ``callback_accept_step`` and ``callback_reject_step``, if
            any, are called with (t, y, h) of each step that is tried, kept, thrown away.
        y0: initial state, a floating-point or complex tensor or a tuple of them. Of bfloat16 and half the steps are
            added up in float32.
        t: strictly increasing or decreasing times, ``[times]``; or ``[times, batch]``, each sample's own, which begin
            together.
        method: of one stage, with fused kernels, ``"euler"``, ``"implicit_euler"`` and ``"implicit_midpoint"`` (the
            default); explicit ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``; explicit with an error estimate
            ``"adaptive_heun"``, ``"fehlberg2"``, ``"bosh3"``, ``"dopri5"``, ``"tsit5"``, ``"dopri8"``; implicit
            ``"trapezoid"``, and with an estimate ``"sdirk2"``, ``"trbdf2"``, ``"kvaerno3"``.
        steps: equal steps in each interval of ``t``, at most 10 million.
        step_size: an interval of length T takes ceil(T / step_size) equal steps.
        rtol, atol: with neither ``steps`` nor ``step_size``, steps are chosen so that the estimated error of each stays
            within ``atol + rtol |y|``: of a one-stage method, which halves each step to estimate its error, sample by
            sample (defaults 1e-4 and 1e-6); of others in the root mean square over the whole state, of a tuple over
            each tensor, as in torchdiffeq (defaults 1e-7 and 1e-9). Tensors, or tuples of numbers, hold for parts of
            the state. A step does not see what happens between its stages: name pulses and jumps in time in
            ``jump_t``, or bound the step by ``max_step``. Other methods without an estimate take one step per interval
            of ``t`` where no tolerance is given.
        adjoint: how gradients are computed. ``"discrete"``: exact; stores one state per step (a fused ConvDynamics
            three), or, of methods of several stages, what autograd needs. ``"reversible"``, of one-stage methods: exact
            to the stage tolerance, memory independent of the number of steps. ``"continuous"``: the approximate adjoint
            of Chen et al., likewise independent. Only ``"discrete"`` has second derivatives.
        options: of given steps ``step_size``, and as in torchdiffeq ``grid_constructor``, ``interp``, ``perturb``; of
            error control ``first_step``, ``min_step`` (kept whatever its error; of one-stage methods in units of the
            interval, and an error), ``max_step``, ``max_num_steps`` (between two times), ``safety``, ``ifactor``,
            ``dfactor``, ``norm``, ``step_t``, ``jump_t``, as in torchdiffeq, and ``max_steps`` (attempts in an
            interval). Of implicit stages ``stage_solver``, ``"anderson"``, ``"newton"`` (small stiff states) or
            ``"krylov"`` (large ones), ``stage_tolerance``, ``max_stage_iterations``; ``checkpoint_every`` (steps
            between stored states) and ``drift_tolerance`` of ``"reversible"``; ``adjoint_step_size``, or
            ``adjoint_rtol`` and ``adjoint_atol``, of the backward pass of ``"continuous"``; ``fused``: False keeps a
            solve off the kernels.
        event_fn: ``(t, y)`` to a tensor; the solve goes from ``t[0]`` towards ``t[1]`` and beyond, until an element of
            it changes its sign. See :func:`odeint_event` for gradients through the time.
        return_stats: also return :class:`SolverStats`; its backward counts appear when the backward pass has run.
        return_dense: return a :class:`DenseSolution` instead: state and derivative at any time in between.
        adjoint_params: tensors to differentiate with respect to, besides ``y0`` and ``t``. By default the parameters of
            ``func`` and whatever else its first evaluation is computed from. (A ``"discrete"`` solve of several stages
            differentiates by all.)

    Returns:
        The solution ``[times, *y0.shape]`` (a tuple of such for a tuple state), of y0's dtype and on its device; with
        ``return_stats``, ``(solution, stats)``. With ``event_fn``, ``(time of the event, solution)``, whose two states
        are
        those at the start and at the event.

    Raises:
        TypeError: ``y0`` is not made of tensors.
        ValueError: an argument is out of its range, or ``func`` returns another shape than it was given.
        StageSolveError: an implicit stage was not solved; in the backward pass too.
        StepSizeError: error control needs too small or too many steps; in the backward pass too.
        ReversalDriftError: in the backward pass, if a ``"reversible"`` gradient would be wrong.
        RuntimeError: ``func`` changed between forward and backward pass where the latter evaluates it, or second
            derivatives that the mode or the fused kernel does not have.
    """
    if adjoint not in ADJOINTS:
        raise ValueError(f"unknown adjoint {adjoint!r}: choose one of {', '.join(ADJOINTS)}")
    settings = read_options(options) if options else {}
    tensors = _tensors(y0)
    if isinstance(t, Tensor) and t.dim() == 2:
        return _own_times(
            func,
            y0,
            t,
            tensors,
            {
                "method": method,
                "steps": steps,
                "step_size": step_size,
                "rtol": rtol,
                "atol": atol,
                "adjoint": adjoint,
                "options": options,
                "event_fn": event_fn,
                "return_stats": return_stats,
                "return_dense": return_dense,
                "adjoint_params": adjoint_params,
            },
        )
    t, times = _times(t)
    if "step_size" in settings:
        if step_size is not None:
            raise ValueError(f"step_size is given twice: {step_size!r}, and {settings['step_size']!r} in options")
        step_size = settings["step_size"]
    if steps is not None or step_size is not None:
        check_steps(steps, step_size)
    scheme = get_method(method or DEFAULT_METHOD)
    one_stage = scheme.one_stage and _on_rows(settings, tensors[0])
    if (one_stage or isinstance(func, Fused)) and event_fn is None and not return_dense:
        weights = fused_weights(func, y0, scheme, steps, step_size, settings, adjoint_params, adjoint, (rtol, atol))
        if not isinstance(weights, str):
            return _fused(func, weights, y0, t, times, steps, step_size, scheme, adjoint, settings, return_stats)
        if one_stage:
            return _rows(
                func,
                y0,
                tensors,
                t,
                times,
                scheme,
                steps,
                step_size,
                (rtol, atol),
                adjoint,
                settings,
                return_stats,
                adjoint_params,
            )
    adaptive = _is_adaptive(scheme, steps, step_size, rtol, atol, settings)
    if not adaptive and steps is None and step_size is None and "grid_constructor" not in settings:
        steps = 1
    _check_resolution(tensors[0], times, steps, step_size)
    _refuse(scheme, adjoint, settings)
    return _plain(
        func,
        y0,
        t,
        times,
        scheme,
        steps,
        step_size,
        adaptive,
        (rtol, atol),
        adjoint,
        settings,
        event_fn,
        return_stats,
        return_dense,
        adjoint_params,
    )


odeint.__module__ = "nodeshape"


@overload
def odeint_adjoint(
    func: Dynamics, y0: Y, t: Times, *, event_fn: EventFunction, **arguments: Unpack[AdjointArguments]
) -> tuple[Tensor, Y]: ...
@overload
def odeint_adjoint(
    func: Dynamics, y0: Y, t: Times, *, return_stats: Literal[False] = ..., **arguments: Unpack[AdjointArguments]
) -> Y: ...
@overload
def odeint_adjoint(
    func: Dynamics, y0: Y, t: Times, *, return_stats: Literal[True], **arguments: Unpack[AdjointArguments]
) -> tuple[Y, SolverStats]: ...
@overload
def odeint_adjoint(
    func: Dynamics, y0: State, t: Times, *, return_stats: bool = ..., **arguments: Unpack[AdjointArguments]
) -> State | tuple[State, SolverStats]: ...
def odeint_adjoint(
    func: Dynamics,
    y0: State,
    t: Times,
    *,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """``odeint`` with ``adjoint="continuous"``, so that code written for torchdiffeq's function runs unchanged.

    All other arguments, and what is returned and raised, are those of :func:`odeint`.

    Args:
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward pass (default: those of the forward pass).
        adjoint_options: of the backward pass (default: those of the forward pass but ``norm``). ``norm`` sees
            ``(dL/dt, y, a, *dL/dp)``, by default the largest root mean square of them; ``"seminorm"`` leaves out dL/dp.

    Raises:
        ValueError: another ``adjoint_method`` whose options would be those of the forward pass, too.
    """
    options = dict(arguments.pop("options", None) or {})
    method = arguments.get("method") or DEFAULT_METHOD
    arguments.setdefault("adjoint", "continuous")
    tolerances = {"adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol}
    options.update((name, value) for name, value in tolerances.items() if value is not None)
    own = dict(adjoint_options or {})
    if get_method(method).one_stage and own.keys() <= {"norm", "step_size"} and own.get("norm") in (None, "seminorm"):
        if adjoint_method not in (None, method):
            raise ValueError(f"adjoint_method must be that of the forward pass, {method!r}, got {adjoint_method!r}")
        if own.get("step_size") is not None:
            options["adjoint_step_size"] = own["step_size"]
        return odeint(func, y0, t, options=options, **arguments)
    if adjoint_method not in (None, method) and options and adjoint_options is None:
        raise ValueError(
            f"adjoint_method={adjoint_method!r} cannot take the options of {method!r}: pass adjoint_options"
        )
    general = {"adjoint_method": adjoint_method, "adjoint_options": None if adjoint_options is None else own}
    options.update((name, value) for name, value in general.items() if value is not None)
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


def _is_adaptive(
    scheme: Method, steps: int | None, step_size: float | None, rtol: Any, atol: Any, settings: Mapping[str, Any]
) -> bool:
    """Whether error control chooses the steps."""
    if steps is not None or step_size is not None or "grid_constructor" in settings:
        return False
    return bool(scheme.error) or rtol is not None or atol is not None


def _on_rows(settings: Mapping[str, Any], y0: Tensor) -> bool:
    """Whether a solve of a one-stage method goes by rows, sample by sample; some options are the general loop's."""
    return y0.dtype in STAGE_TOLERANCE and settings.keys().isdisjoint(GENERAL_OPTIONS)


def _refuse(scheme: Method, adjoint: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what the general loop does not offer."""
    if adjoint == "reversible":
        raise ValueError(
            "adjoint='reversible' undoes steps of euler, implicit_euler and implicit_midpoint, without options of other"
            f" methods, not of {scheme.name}: use adjoint='discrete', or 'continuous' for less memory"
        )


def _plain(
    func: Dynamics,
    y0: State,
    t: Tensor,
    times: list[float],
    scheme: Method,
    steps: int | None,
    step_size: float | None,
    adaptive: bool,
    tolerances: tuple[Any, Any],
    adjoint: str,
    settings: dict[str, Any],
    event_fn: EventFunction | None,
    return_stats: bool,
    return_dense: bool,
    adjoint_params: Sequence[Tensor] | None,
) -> Any:
    rtol, atol = (default if value is None else value for value, default in zip(tolerances, TOLERANCES))
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, (int, float)):
            positive(name, value)
    traced = t if torch.is_grad_enabled() and t.requires_grad else None
    plan = Plan(func, y0, times, traced, scheme, steps, step_size, adaptive, rtol, atol, settings)
    plan.loop.keep = return_dense
    if event_fn is not None and (adjoint == "discrete" or not torch.is_grad_enabled()):
        found, ys = integrate_until_event(plan, event_fn)
        return found, plan.field.unpack(ys, (2,))
    if adjoint == "continuous" and torch.is_grad_enabled():
        event_t: Tensor | None = None
        if event_fn is not None:
            with torch.no_grad():
                event_t, _ = integrate_until_event(plan, event_fn)
            t = torch.stack([t[0], event_t.to(t)])
            plan = replace(plan, times=t.tolist(), t=None)
        backward, own = _backward_plan(plan, settings)
        parameters = parameters_of(func, plan) if adjoint_params is None else tuple(adjoint_params)
        parameters = tuple(x for x in parameters if x.requires_grad)
        ys = adjoint_solution(plan, backward, own, plan.field.pack(y0), t, parameters)
        if event_t is not None:
            return event_t, plan.field.unpack(ys, (2,))
    else:
        ys = plan.run()
    if return_dense:
        solution: Any = DenseSolution(plan)
    else:
        solution = plan.field.unpack(ys, (len(times),))
    if not return_stats:
        return solution
    stats = plan.stats()
    if ys.requires_grad and not torch.compiler.is_compiling():
        ys.register_hook(lambda grad: plan.count_backward(stats))
    return solution, stats


def _backward_plan(plan: Plan, settings: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """How the continuous adjoint is solved: as the forward pass, but for what ``adjoint_...`` options say."""
    own = {name: value for name, value in settings.items() if name not in ("norm", "grid_constructor")}
    given = dict(own.pop("adjoint_options", None) or settings.get("adjoint_options") or {})
    own |= given
    if "grid_constructor" in settings:
        own.setdefault("grid_constructor", settings["grid_constructor"])
    scheme = get_method(settings.get("adjoint_method") or plan.method)
    step_size, steps = own.get("adjoint_step_size", own.get("step_size", plan.step_size)), plan.steps
    if "adjoint_step_size" in own or given.get("step_size") is not None:
        steps = None
    rtol, atol = settings.get("adjoint_rtol", plan.rtol), settings.get("adjoint_atol", plan.atol)
    adaptive = _is_adaptive(scheme, steps, step_size, rtol if plan.adaptive else None, None, own)
    if not adaptive and steps is None and step_size is None and "grid_constructor" not in own:
        steps = 1
    backward = Plan(
        func=plan.func,
        y0=plan.y0,
        times=plan.times,
        t=None,
        method=scheme,
        steps=steps,
        step_size=None if steps is not None else step_size,
        adaptive=adaptive,
        rtol=rtol,
        atol=atol,
        settings=own,
    )
    return backward, own


def _fused(
    func: Any,
    weights: list[Tensor],
    y0: Any,
    t: Tensor,
    times: list[float],
    steps: int | None,
    step_size: float | None,
    scheme: Method,
    adjoint: str,
    settings: Mapping[str, Any],
    return_stats: bool,
) -> Any:
    if step_size is None:
        counts = [int(steps or 1)] * (len(times) - 1)
    else:
        equal = EqualSteps(None, step_size)
        counts = [equal.number(end - start) for start, end in pairwise(times)]
    program = func if isinstance(func, Fused) else None
    start = y0 if program is None else program.pack(y0)
    tolerance = STAGE_TOLERANCE[start.dtype]
    solve: Any = fused.solve if program is None else program_op.solve
    ys, evaluations, residual = solve(
        func if program is None else program.program,
        weights,
        start,
        t,
        counts,
        scheme,
        adjoint,
        settings.get("stage_tolerance", tolerance),
        settings.get("max_stage_iterations", MAX_STAGE_ITERATIONS),
        settings.get("checkpoint_every"),
        settings.get("drift_tolerance", DRIFT_PER_STAGE_TOLERANCE * tolerance),
    )
    solution: Any = ys if program is None else program.unpack(ys)
    if not return_stats:
        return solution
    return solution, _fused_stats(scheme, sum(counts), evaluations, fused.backward_evaluations(ys), residual)


def _rows(
    func: Dynamics,
    y0: State,
    tensors: tuple[Tensor, ...],
    t: Tensor,
    times: list[float],
    scheme: Method,
    steps: int | None,
    step_size: float | None,
    given_tolerances: tuple[Any, Any],
    adjoint: str,
    settings: Mapping[str, Any],
    return_stats: bool,
    adjoint_params: Sequence[Tensor] | None,
) -> Any:
    """A solve of one-stage methods on rows: steps that are undone, or each sample's own."""
    tolerance = STAGE_TOLERANCE[tensors[0].dtype]
    solver = StageSolver(
        settings.get("stage_solver", "anderson"),
        settings.get("stage_tolerance", tolerance),
        settings.get("max_stage_iterations", MAX_STAGE_ITERATIONS),
    )
    differentiable = torch.is_grad_enabled()
    with torch.no_grad():
        system = System(func, y0, adjoint_params if differentiable else ())
        rows = system.rows(y0)
        stats = SolverStats.zeros(system.samples, system.device)
        forward: Steps
        backward: Steps
        if steps is not None or step_size is not None:
            forward = backward = EqualSteps(steps, step_size)
        else:
            rtol, atol = (d if v is None else v for v, d in zip(given_tolerances, ONE_STAGE_TOLERANCES))
            tolerances = positive("rtol", rtol), positive("atol", atol)
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
            settings.get("drift_tolerance", DRIFT_PER_STAGE_TOLERANCE * tolerance),
            stats,
        )
        ys = problem.solve(rows, keep=differentiable)
    inputs = (*tensors, t, *(system.parameters or ()))
    if differentiable and any(x.requires_grad for x in inputs):
        ys = Solution.apply(problem, [ys], system.rows(y0), t, *(system.parameters or ()))
    solution = system.state(ys)
    return (solution, stats) if return_stats else solution


def _own_times(func: Dynamics, y0: State, t: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Any:
    """A solve at each sample's own times ``t`` ``[times, batch]``: one through all, of which each takes its own."""
    batch = tensors[0].shape[0] if tensors[0].dim() > 0 else 0
    if any(x.dim() < 2 or x.shape[0] != batch for x in tensors) or t.shape[1] != batch:
        shapes = f"t {list(t.shape)} and y0 {list(tensors[0].shape)}"
        raise ValueError(f"t must be [times], or [times, batch] for a state [batch, ...]: got {shapes}")
    if arguments["event_fn"] is not None or arguments["return_dense"]:
        raise ValueError("t [times, batch] does not go with event_fn or return_dense: give t [times]")
    if not bool((t[0] == t[0, 0]).all()):
        raise ValueError(
            f"each sample's times must begin together, got {t[0].tolist()}: shift them, or solve one by one"
        )
    lengths = t.detach()[1:] - t.detach()[:-1]
    if not (bool((lengths > 0).all()) or bool((lengths < 0).all())):
        raise ValueError("each sample's times must be strictly increasing or decreasing, all one way")
    every, where = torch.unique(t.detach(), return_inverse=True)
    order = where
    if len(t) > 1 and bool((lengths < 0).all()):
        every, order = every.flip(0), len(every) - 1 - where
    if t.requires_grad:  # each of the times is any of the equal ones of the samples
        first = torch.zeros(len(every), dtype=torch.long, device=t.device)
        first[order.reshape(-1)] = torch.arange(t.numel(), device=t.device)
        every = t.reshape(-1)[first]
    if arguments["steps"] is not None:
        raise ValueError(
            "steps counts those between two times, which differ by sample in t [times, batch]: give step_size"
        )
    found: Any = odeint(func, y0, every, **arguments)
    solution, *stats = found if arguments["return_stats"] else (found,)
    samples = torch.arange(batch, device=tensors[0].device).expand(len(t), batch)
    order = order.to(tensors[0].device)
    picked = solution[order, samples] if isinstance(solution, Tensor) else tuple(x[order, samples] for x in solution)
    return (picked, *stats) if stats else picked


def _check_resolution(y0: Tensor, times: list[float], steps: int | None, step_size: float | None) -> None:
    """Raise ValueError where times in the state's type, which is what func sees, are too coarse for the steps."""
    if y0.dtype in (torch.float64, torch.complex128) or len(times) < 2:
        return
    spacing = 1.2e-7 * max(map(abs, times))
    h = min(abs(b - a) for a, b in pairwise(times)) / (steps or 1)
    if step_size is not None and step_size > 1e-30:
        h = min(step_size, h)
    if spacing > 0.25 * h:
        raise ValueError(
            f"float32 times near {times[0]:g} are {spacing:.2g} apart, too coarse for steps of {h:.2g}: count time from"
            " the start, t - t[0], or give a float64 y0"
        )


def _tensors(y0: State) -> tuple[Tensor, ...]:
    if isinstance(y0, Tensor) and y0.dtype in DTYPES:
        return (y0,)
    tensors = y0 if isinstance(y0, tuple) else (y0,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
    found = {f"{x.dtype} on {x.device}" for x in tensors}
    if len(found) > 1:
        raise ValueError(f"the tensors of y0 must share dtype and device, got {', '.join(sorted(found))}")
    if tensors[0].dtype not in DTYPES:
        raise ValueError(
            f"y0 must be floating-point or complex, got {tensors[0].dtype}: convert it, as with y0.float()"
        )
    return tensors


def _times(t: Tensor | Sequence[float]) -> tuple[Tensor, list[float]]:
    if isinstance(t, Tensor):
        if t.dim() != 1:
            raise ValueError(f"t must have one dimension, [times], got shape {list(t.shape)}")
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
