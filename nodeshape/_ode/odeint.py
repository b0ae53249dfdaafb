"""``odeint``: solve dy/dt = f(t, y) at given times, differentiably, with torchdiffeq's calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from nodeshape._ode import adaptive_op, fused, program_op
from nodeshape._ode.adjoint import adjoint_solution, parameters_of
from nodeshape._ode.backend import ERROR_CONTROL, Request, default_method, fused_weights
from nodeshape._ode.compiled import compiled_step
from nodeshape._ode.control import rms
from nodeshape._ode.event import EventFunction, integrate_until_event, with_moving_time
from nodeshape._ode.field import State
from nodeshape._ode.fuse import Fused
from nodeshape._ode.interpolation import DenseSolution
from nodeshape._ode.method import Method, get_method
from nodeshape._ode.options import (
    ADJOINTS,
    CALLBACKS,
    DRIFT_PER_STAGE_TOLERANCE,
    UniformGrid,
    read_options,
    steps_of,
)
from nodeshape._ode.program import Program
from nodeshape._ode.recompute import recomputed_solution
from nodeshape._ode.solver import Plan, controller_of, most_attempts_of
from nodeshape._ode.stage import MAX_STAGE_ITERATIONS, STAGE_TOLERANCE
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.unrolled import current, is_exporting, is_tracing

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOLERANCES = (1e-7, 1e-9)
#: Options that the backward pass of ``continuous`` does not take over.
NOT_OF_ADJOINT = ("norm", "step_control", "on_failure", "compile")
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

    A call that names no method is solved as by torchdiffeq: ``"dopri5"``, steps chosen by error control. ``steps`` and
    ``step_size`` hold for each interval of ``t``: 4,000 steps with 1,000 times are four million. The first dimension of
    ``y0`` is the batch of samples if ``y0`` (every tensor of a tuple) has at least two dimensions. ``func`` sees the
    whole state and may couple samples.

    Args:
        func: a module or function ``func(t, y) -> dy/dt``; ``t`` is a scalar tensor of the state's dtype, dy/dt has the
            shape of ``y``. Its attributes ``callback_step``, ``callback_accept_step`` and ``callback_reject_step``, if
            any, are called with (t, y, size) of each step that is tried, kept, thrown away.
        y0: initial state, a floating-point or complex tensor or a tuple of them. Of bfloat16 and half the steps are
            added up in float32.
        t: strictly increasing or decreasing times, ``[times]``; or ``[times, batch]``, each sample's own, which begin
            together.
        method: of one stage ``"euler"``, ``"implicit_euler"`` and ``"implicit_midpoint"`` (the
            default where ``steps`` or ``step_size`` is given); explicit ``"midpoint"``, ``"heun2"``, ``"heun3"``,
            ``"rk4"``; explicit with an error estimate ``"adaptive_heun"``, ``"fehlberg2"``, ``"bosh3"``, ``"dopri5"``
            (the default), ``"tsit5"``, ``"dopri8"``; implicit ``"trapezoid"``, and with an estimate ``"sdirk2"``,
            ``"trbdf2"``, ``"kvaerno3"``.
        steps: equal steps in each interval of ``t``, at most 10 million.
        step_size: an interval of length T takes ceil(T / step_size) equal steps.
        rtol, atol: with neither ``steps`` nor ``step_size``, steps are chosen so that the estimated error of each stays
            within ``atol + rtol |y|`` in the root mean square over the whole state, of a tuple over each tensor, as in
            torchdiffeq (defaults 1e-7 and 1e-9). Tensors, or tuples of numbers, hold for parts of the state. A step
            does not see what happens between its stages: name pulses and jumps in time in ``jump_t``, or bound the step
            by ``max_step``. Methods without an estimate halve each step to have one; given neither a tolerance nor an
            option of error control they take one step per interval.
        adjoint: how gradients are computed. ``"discrete"``: exact, by autograd's record of the solve; with
            ``options={"recompute": True}`` by taking each step anew from stored states, as the fused kernels do.
            ``"reversible"``, of one-stage methods: exact to the stage tolerance by undoing steps, one number per sample
            and step is stored. ``"continuous"``: the approximate adjoint of Chen et al., in memory independent of the
            number of steps. Only ``"discrete"`` has second derivatives. Where the backward pass evaluates f again it
            does so with the random numbers, weights, buffers and training mode of the forward pass, and raises if f is
            another all the same.
        options: of given steps ``step_size`` (as in torchdiffeq a grid from the first time on, between whose points
            observations are interpolated), ``grid_constructor``, ``interp``, ``perturb``; of error control
            ``first_step``, ``min_step`` (kept whatever its error), ``max_step``, ``max_num_steps`` or ``max_steps``
            (attempts between two times), ``safety``, ``ifactor``, ``dfactor``, ``norm``, ``step_t``, ``jump_t``, as in
            torchdiffeq, and ``step_control``: ``"shared"`` steps of the whole batch, or ``"per_sample"`` for an f that
            does not couple samples (the default of ConvDynamics, MLPDynamics, and a fused f in the kernel). Of implicit
            stages ``stage_solver``, ``"anderson"``, ``"newton"`` (small stiff states) or ``"krylov"`` (large ones),
            ``stage_tolerance``, ``max_stage_iterations``. ``on_failure``: ``"raise"``, or ``"nan"`` for samples that
            fail while the others live on; the statistics say why. ``compile``: compile each step by torch.compile
            (explicit methods, given steps). ``checkpoint_every`` (steps between stored states) and ``drift_tolerance``
            of ``"reversible"``; ``adjoint_step_size``, or ``adjoint_rtol`` and ``adjoint_atol``, of the backward pass
            of ``"continuous"``; ``fused``: False keeps a solve off the kernels.
        event_fn: ``(t, y)`` to a tensor; the solve goes from ``t[0]`` towards ``t[1]`` and beyond, until an element of
            it changes its sign. Gradients go through the time of the event.
        return_stats: also return :class:`SolverStats`; its backward counts appear when the backward pass has run.
        return_dense: return a :class:`DenseSolution` instead: state and derivative at any time in between.
        adjoint_params: tensors to differentiate with respect to, besides ``y0`` and ``t``; each step is then taken anew
            in the backward pass. By default the parameters of ``func`` and whatever else it is computed from.

    Returns:
        The solution ``[times, *y0.shape]`` (a tuple of such for a tuple state), of y0's dtype and on its device; with
        ``return_stats``, ``(solution, stats)``. With ``event_fn``, ``(time of the event, solution)``, whose two states
        are those at the start and at the event.

    Raises:
        TypeError: ``y0`` is not made of tensors.
        ValueError: an argument is out of its range, or ``func`` returns another shape than it was given.
        StageSolveError: an implicit stage was not solved; in the backward pass too.
        StepSizeError: error control needs too small or too many steps; in the backward pass too.
        ReversalDriftError: in the backward pass, if a ``"reversible"`` gradient would be wrong.
        RuntimeError: ``func`` works in place in a way that would spoil the solution, is another in the backward pass
            than in the forward pass, or second derivatives that the mode or the fused kernel does not have.
    """
    if adjoint not in ADJOINTS:
        raise ValueError(f"unknown adjoint {adjoint!r}: choose one of {', '.join(ADJOINTS)}")
    settings = read_options(options) if options else {}
    tensors = tensors_of(y0)
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
    unrolled = current()
    if is_exporting() and unrolled is None:
        _refuse_to_export(Request.of(method, steps, step_size, (rtol, atol), adjoint, settings), event_fn, return_dense)
    # How gradients are computed says nothing where there are none, as in a file.
    recorded = adjoint == "discrete" and adjoint_params is None and not settings.get("recompute", False)
    symbolic = (
        isinstance(t, Tensor)
        and is_tracing()
        and step_size is None
        and "step_size" not in settings
        and (recorded or not torch.is_grad_enabled())
        and event_fn is None
        and not (return_dense or any(hasattr(func, name) for name in CALLBACKS))
    )
    given = steps is not None or unrolled is not None
    if isinstance(t, Tensor) and symbolic and (given or _takes_one_step(method, rtol, atol, adjoint, settings)):
        times = [float(k) for k in range(len(t))]  # a compiler knows how many there are, not which
    else:
        symbolic = False
        t, times = times_of(t if unrolled is None or not isinstance(t, Tensor) else unrolled.known(t))
    asked = (method, steps, step_size, (rtol, atol), adjoint, settings, adjoint_params)
    how = Request.of(*asked, times, event_fn is not None)
    if unrolled is not None:
        _refuse_to_export(how, event_fn, return_dense)
        if how.adaptive:
            unrolled.adaptive = True
            kept = {name: value for name, value in how.options.items() if name not in ERROR_CONTROL}
            how = replace(how, steps=unrolled.steps, options=kept, tolerances=(None, None))
    weights = fused_weights(func, y0, how, event_fn is None and not return_dense, t)
    if not isinstance(weights, str):
        if how.adaptive:
            return _fused_adaptive(func, weights, y0, t, times, how, return_stats)
        return _fused(func, weights, y0, t, times, symbolic, how, return_stats)
    _check_results(times, event_fn is not None, return_stats, return_dense)
    one_each = not how.adaptive and how.steps is None and how.step_size is None
    steps = 1 if one_each and "grid_constructor" not in how.options else how.steps
    if not symbolic:
        grid = how.options.get("grid_constructor")
        points = grid.points(times) if isinstance(grid, UniformGrid) and len(times) > 1 else times
        check_resolution(tensors[0], points, steps, how.step_size, how.adaptive)
    rtol, atol = (default if value is None else value for value, default in zip(how.tolerances, TOLERANCES))
    if not is_exporting():  # which would record it
        _check_tolerances(rtol, atol)
    traced = t.double() if symbolic or (torch.is_grad_enabled() and t.requires_grad) else None
    plan = Plan(func, y0, times, traced, how.method, steps, how.step_size, how.adaptive, rtol, atol, dict(how.options))
    plan.per_sample = how.adaptive and _per_sample(func, plan, event_fn is not None or return_dense)
    return _plain(plan, t, adjoint, event_fn, return_stats, return_dense, adjoint_params)


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
    method = arguments.get("method") or default_method(arguments.get("steps"), arguments.get("step_size"))
    arguments.setdefault("adjoint", "continuous")
    tolerances = {"adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol}
    options.update((name, value) for name, value in tolerances.items() if value is not None)
    own = dict(adjoint_options or {})
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


def _refuse_to_export(how: Request, event_fn: EventFunction | None, return_dense: bool) -> None:
    """Raise ValueError for solves whose steps depend on the numbers, so that no record of them holds for others."""
    if event_fn is not None or return_dense:
        raise ValueError("event_fn and return_dense cannot be exported: give odeint times and steps=...")
    if how.adaptive and current() is None:
        raise ValueError(
            "error control cannot be exported, as its steps depend on the numbers: give odeint steps=..., or export by"
            " ns.to_onnx, ns.to_torchscript or ns.to_pt2, which find how many"
        )


def _takes_one_step(method: str | None, rtol: Any, atol: Any, adjoint: str, settings: Mapping[str, Any]) -> bool:
    """Whether a call without steps takes one in each interval."""
    how = Request.of(method, None, None, (rtol, atol), adjoint, settings)
    return "grid_constructor" not in settings and not how.adaptive


def _check_results(times: list[float], event: bool, return_stats: bool, return_dense: bool) -> None:
    if len(times) < 2 and (event or return_dense):
        raise ValueError(f"event_fn and return_dense need at least two times, got {times}")
    if event and (return_stats or return_dense):
        raise ValueError("event_fn does not go with return_stats or return_dense")


def _check_tolerances(rtol: Any, atol: Any) -> None:
    both_zero = True
    for name, value in (("rtol", rtol), ("atol", atol)):
        for part in value if isinstance(value, (tuple, list)) else (value,):
            x = torch.as_tensor(part, dtype=torch.float64)
            if not bool(((x >= 0) & torch.isfinite(x)).all()):
                raise ValueError(f"{name} must be a positive number or 0, got {value!r}")
            both_zero = both_zero and not bool((x > 0).all())
    if both_zero:
        raise ValueError(f"rtol and atol may not both be 0, got {rtol!r} and {atol!r}")


def _per_sample(func: Dynamics, plan: Plan, one_clock: bool) -> bool:
    """Whether each sample takes steps of its own: where f is known, or declared, not to couple them."""
    asked = plan.settings.get("step_control")
    why = None
    if not plan.field.batched:
        why = "the state has no batch of samples"
    elif one_clock or plan.has_callbacks or "norm" in plan.settings:
        why = "an event_fn, return_dense, a norm or callbacks concern the whole batch"
    if asked == "per_sample" and why is not None:
        raise ValueError(f"options={{'step_control': 'per_sample'}} is not possible: {why}")
    kernel = fused.KERNELS.get(type(func))
    plan.field.takes_columns = kernel is not None and not isinstance(kernel.weights(func, False), str)
    if asked is None:
        return why is None and plan.field.samples > 1 and plan.field.takes_columns
    return bool(asked == "per_sample")


def _plain(
    plan: Plan,
    t: Tensor,
    adjoint: str,
    event_fn: EventFunction | None,
    return_stats: bool,
    return_dense: bool,
    adjoint_params: Sequence[Tensor] | None,
) -> Any:
    """A solve by the time loop."""
    recording = torch.is_grad_enabled()
    stored = adjoint == "discrete" and (plan.settings.get("recompute", False) or adjoint_params is not None)
    recompute = stored or adjoint == "reversible"
    plan.loop.keep = return_dense
    if plan.settings.get("compile", False) and not is_tracing():
        other = plan.adaptive or "grid_constructor" in plan.settings or not plan.method.explicit
        if other or recompute or return_dense or event_fn is not None:
            raise ValueError(
                "options={'compile': True} compiles given steps of explicit methods, differentiated by"
                " adjoint='discrete' or 'continuous', without return_dense or event_fn"
            )
        plan.loop.compiled = compiled_step(plan.func, plan.y0, plan.method)
    if plan.settings.get("on_failure") == "nan" and (return_dense or event_fn is not None):
        raise ValueError("options={'on_failure': 'nan'} does not go with return_dense or event_fn")
    if recompute or adjoint == "continuous":
        plan.mode = "options={'recompute': True}" if adjoint == "discrete" else f"adjoint={adjoint!r}"
        _refuse(plan, adjoint, return_dense and recording)
    if event_fn is not None and (not recording or not (recompute or adjoint == "continuous")):
        found, ys, element = integrate_until_event(plan, event_fn)
        return _moving(plan, event_fn, found, plan.field.unpack(ys, (2,)), element)
    event_t: Tensor | None = None
    element = 0
    if recording and (recompute or adjoint == "continuous"):
        if event_fn is not None:
            with torch.no_grad():
                event_t, _, element = integrate_until_event(plan, event_fn)
            t = torch.stack([t[0].double(), event_t.to(t.device).double()])
            plan = replace(plan, times=t.tolist(), t=None)
        plan.loop.t = None
        discovers = adjoint_params is None
        parameters = parameters_of(plan.func, plan) if adjoint_params is None else tuple(adjoint_params)
        parameters = tuple(x for x in parameters if x.requires_grad)
        if any(x.is_complex() for x in parameters) and not plan.field.dtype.is_complex:
            raise ValueError(f"{plan.mode} takes complex parameters for complex states only: use adjoint='discrete'")
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(f"{plan.mode} cannot be transformed by torch.func: use adjoint='discrete'")
        y = plan.field.pack(plan.y0)
        if recompute:
            ys = recomputed_solution(plan, plan.recorder(stored, discovers), y, t.clone(), parameters)
        else:
            backward, own = _backward_plan(plan, plan.settings)
            ys = adjoint_solution(plan, backward, own, discovers, y, t.clone(), parameters)
        if event_t is not None:
            assert event_fn is not None
            return _moving(plan, event_fn, event_t, plan.field.unpack(ys, (2,)), element)
    else:
        ys = plan.run()
    solution: Any = DenseSolution(plan) if return_dense else plan.field.unpack(ys, (len(plan.times),))
    if not return_stats:
        return solution
    stats = plan.stats()
    if ys.requires_grad and not torch.compiler.is_compiling():
        ys.register_hook(lambda grad: plan.count_products())
    return solution, stats


def _moving(
    plan: Plan, event_fn: EventFunction, event_t: Tensor, solution: State, element: int
) -> tuple[Tensor, State]:
    """An event's time and states, differentiable where gradients are recorded."""
    if not torch.is_grad_enabled():
        return event_t, solution
    return with_moving_time(plan.func, event_fn, event_t, solution, element)


def _refuse(plan: Plan, adjoint: str, dense: bool) -> None:
    """Raise ValueError for what gradients without autograd's record do not offer."""
    if adjoint == "reversible" and not plan.method.one_stage:
        raise ValueError(
            "adjoint='reversible' undoes steps of euler, implicit_euler and implicit_midpoint, not of"
            f" {plan.method.name}: use adjoint='discrete', with options={{'recompute': True}} or 'continuous' for less"
            " memory"
        )
    if dense:
        raise ValueError(f"return_dense keeps every step, which {plan.mode} does not: use adjoint='discrete'")
    if plan.settings.get("on_failure") == "nan":
        raise ValueError(f"options={{'on_failure': 'nan'}} does not go with {plan.mode}: use adjoint='discrete'")
    if adjoint == "continuous":
        return
    for name in ("grid_constructor", "perturb", "jump_t"):
        if name in plan.settings:
            raise ValueError(f"option {name!r} does not go with {plan.mode}: use adjoint='discrete'")


def _backward_plan(plan: Plan, settings: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """How the continuous adjoint is solved: as the forward pass, or by ``adjoint_options`` where they are given."""
    scheme = get_method(settings.get("adjoint_method") or plan.method)
    steps, step_size = plan.steps, plan.step_size
    given = settings.get("adjoint_options")
    if given is None:
        own = {name: value for name, value in settings.items() if name not in NOT_OF_ADJOINT}
    else:
        own = dict(given)
        if scheme.error or not own.keys().isdisjoint({"step_size", "grid_constructor"}):
            steps = step_size = None
    if "adjoint_step_size" in own or own.get("step_size") is not None:
        steps, step_size = None, own.get("adjoint_step_size", own.get("step_size"))
        own.pop("grid_constructor", None)
    elif "grid_constructor" in own:
        steps = step_size = None
    rtol, atol = settings.get("adjoint_rtol", plan.rtol), settings.get("adjoint_atol", plan.atol)
    tolerance = rtol if plan.adaptive or "adjoint_rtol" in settings or "adjoint_atol" in settings else None
    adaptive = Request(scheme, steps, step_size, own, tolerances=(tolerance, None)).adaptive
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


def _program(func: Any, weights: list[Tensor], y0: Any) -> tuple[Program, Tensor, Callable[[Tensor], Any]]:
    """What the ops are given for f and its state, and what makes their solution the caller's."""
    if isinstance(func, Fused):
        return func.program, func.pack(y0), func.unpack
    return fused.program_of(func, weights, y0), y0, lambda ys: ys


def _fused(
    func: Any,
    weights: list[Tensor],
    y0: Any,
    t: Tensor,
    times: list[float],
    symbolic: bool,
    how: Request,
    return_stats: bool,
) -> Any:
    scheme, settings = how.method, how.options
    grid, observed = settings.get("grid_constructor"), times
    if grid is not None and len(times) > 1:
        times = grid.points(observed)
        t = torch.tensor(times, dtype=torch.float64)
    if how.step_size is None:
        counts = [int(how.steps or 1)] * (len(times) - 1)
    else:
        counts = [steps_of(end - start, how.step_size) for start, end in pairwise(times)]
    program, start, unpack = _program(func, weights, y0)
    if not symbolic:
        check_resolution(start, times, how.steps, how.step_size, False)
    tolerance = STAGE_TOLERANCE[start.dtype]
    ys, evaluations, residual = program_op.solve(
        program,
        weights,
        start,
        t,
        counts,
        scheme,
        how.adjoint,
        settings.get("stage_tolerance", tolerance),
        settings.get("max_stage_iterations", MAX_STAGE_ITERATIONS),
        settings.get("checkpoint_every"),
        settings.get("drift_tolerance", DRIFT_PER_STAGE_TOLERANCE * tolerance),
    )
    seen = ys if times is observed else _between(ys, times, observed)
    solution = unpack(seen)
    if not return_stats:
        return solution
    return solution, _fused_stats(scheme, sum(counts), evaluations, program_op.backward_evaluations(ys), residual)


def _between(states: Tensor, grid: list[float], t: Sequence[float] | Tensor) -> Tensor:
    """States at times ``t`` ``[times]``, or each sample's ``[times, batch]``, by linear interpolation on a grid.

    Args:
        states: at the points of the grid, ``[points, batch, ...]``.
        grid: from the first to the last time, one way.
    """
    sign = 1.0 if grid[-1] > grid[0] else -1.0
    if not isinstance(t, Tensor):  # numbers, so that exporters see which points are taken
        ends, k = [], 1
        for time in t:
            while sign * grid[k] < sign * time:
                k += 1
            ends.append(k)
        parts = [(time - grid[k - 1]) / (grid[k] - grid[k - 1]) for time, k in zip(t, ends)]
        weight = torch.tensor(parts, dtype=states.dtype, device=states.device)
        last = torch.tensor(ends, device=states.device)
        return torch.lerp(states[last - 1], states[last], weight.reshape(-1, *(1,) * (states.dim() - 1)))
    points, t = torch.tensor(grid, dtype=torch.float64), t.detach().to("cpu", torch.float64)
    after = torch.searchsorted(sign * points, sign * t).clamp(min=1)
    part = (t - points[after - 1]) / (points[after] - points[after - 1])
    weight = part.to(states.device, states.dtype).reshape(*t.shape, *(1,) * (states.dim() - 2))
    after, samples = after.to(states.device), torch.arange(t.shape[1], device=states.device)
    return torch.lerp(states[after - 1, samples], states[after, samples], weight)


def _fused_adaptive(
    func: Any, weights: list[Tensor], y0: Any, t: Tensor, times: list[float], how: Request, return_stats: bool
) -> Any:
    program, start, unpack = _program(func, weights, y0)
    check_resolution(start, times, None, None, True)
    rtol, atol = (default if value is None else value for value, default in zip(how.tolerances, TOLERANCES))
    _check_tolerances(rtol, atol)
    control = controller_of(how.method, how.options, float(rtol), float(atol), rms)
    most, on_failure = most_attempts_of(how.options), how.options.get("on_failure", "raise")
    kept = t if t.is_cpu and t.dtype in (torch.float32, torch.float64) else t.to("cpu", torch.float64)
    found = adaptive_op.solve_adaptive(program, weights, start, kept, how.method, control, most, on_failure)
    solution = unpack(found.ys)
    if not return_stats:
        return solution
    stats = SolverStats.zeros(start.shape[0], start.device)
    stats.nfe_forward, stats.nfe_backward = found.evaluations, found.backward_evaluations
    stats.accepted, stats.rejected, stats.failures = found.accepted, found.rejected, found.failures
    stats.step_control = "per sample"
    return solution, stats


def _own_times(func: Dynamics, y0: State, t: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Any:
    """A solve at each sample's own times ``t`` ``[times, batch]``: one through all, of which each takes its own."""
    batch = tensors[0].shape[0] if tensors[0].dim() > 0 else 0
    if any(x.dim() < 2 or x.shape[0] != batch for x in tensors) or t.shape[1] != batch:
        shapes = f"t {list(t.shape)} and y0 {list(tensors[0].shape)}"
        raise ValueError(f"t must be [times], or [times, batch] for a state [batch, ...]: got {shapes}")
    if t.numel() == 0:
        raise ValueError(f"t must hold at least one time, got shape {list(t.shape)}")
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
    if arguments["steps"] is not None:
        raise ValueError(
            "steps counts those between two times, which differ by sample in t [times, batch]: give step_size"
        )
    grid = _kernel_grid(func, y0, every.tolist(), t, arguments)
    if grid is not None:  # each sample reads its own times off the states there
        own = {name: value for name, value in arguments["options"].items() if name not in ("step_size", "interp")}
        there: Any = odeint(func, y0, grid, **{**arguments, "steps": 1, "options": own})
        states, *stats = there if arguments["return_stats"] else (there,)
        seen: Any = tuple(_between(x, grid, t) for x in ((states,) if isinstance(states, Tensor) else states))
        seen = seen[0] if isinstance(states, Tensor) else seen
        return (seen, *stats) if stats else seen
    moves = t - t.detach() if torch.is_grad_enabled() and t.requires_grad else None
    if moves is not None:
        # To start later by a little is to start from that much further back along the slope.
        y0 = _along(y0, [-f for f in _slopes(func, every[:1], _rows_of(y0, lead=True))], moves[0], 0)
    found: Any = odeint(func, y0, every, **arguments)
    solution, *stats = found if arguments["return_stats"] else (found,)
    samples = torch.arange(batch, device=tensors[0].device).expand(len(t), batch)
    order = order.to(tensors[0].device)

    def pick(x: Tensor) -> Tensor:
        return x[order, samples]

    picked: Any = pick(solution) if isinstance(solution, Tensor) else tuple(map(pick, solution))
    if moves is not None:
        picked = _along(picked, [pick(f) for f in _slopes(func, every, _rows_of(solution))], moves, 1)
    return (picked, *stats) if stats else picked


def _kernel_grid(
    func: Dynamics, y0: State, times: list[float], t: Tensor, arguments: dict[str, Any]
) -> list[float] | None:
    """The points that a kernel steps on, where the option ``step_size`` makes a grid that ``times`` are not on."""
    settings = read_options(arguments["options"])
    if "step_size" not in settings:
        return None
    tolerances = (arguments["rtol"], arguments["atol"])
    size, params = arguments["step_size"], arguments["adjoint_params"]
    how = Request.of(arguments["method"], None, size, tolerances, arguments["adjoint"], settings, params, times)
    grid = how.options.get("grid_constructor")
    if not isinstance(grid, UniformGrid) or isinstance(fused_weights(func, y0, how, True, t), str):
        return None
    return grid.points(times)


def _rows_of(states: Any, lead: bool = False) -> list[Tensor] | Tensor:
    """States ``[times, ...]``, without gradients; of one state if it has no ``lead`` of times yet."""
    if isinstance(states, Tensor):
        return states.detach()[None] if lead else states.detach()
    return [x.detach()[None] if lead else x.detach() for x in states]


@torch.no_grad()
def _slopes(func: Dynamics, times: Tensor, states: Any) -> list[Tensor]:
    """dy/dt at each of ``times``, ``[times, ...]`` for each tensor of the state."""
    one = isinstance(states, Tensor)
    first = states if one else states[0]
    rows = [
        func(t.to(first.device, first.real.dtype), states[k].clone() if one else tuple(x[k].clone() for x in states))
        for k, t in enumerate(times)
    ]
    return [torch.stack(rows)] if one else [torch.stack(x) for x in zip(*rows)]


def _along(states: Any, slopes: list[Tensor], moves: Tensor, lead: int) -> Any:
    """States moved along their slopes in time, by ``moves`` ``[batch]``, or ``[times, batch]`` if ``lead`` is 1."""

    def moved(x: Tensor, f: Tensor) -> Tensor:
        many = (*moves.shape, *(1,) * (x.dim() - 1 - lead))
        return x + (f if lead else f[0]) * moves.to(x.device, x.dtype).reshape(many)

    if isinstance(states, Tensor):
        return moved(states, slopes[0])
    return tuple(map(moved, states, slopes))


def check_resolution(
    y0: Tensor, times: list[float], steps: int | None, step_size: float | None, adaptive: bool
) -> None:
    """Raise ValueError where times in the state's type, which is what func sees, are too coarse for the steps.

    Given steps may be shorter than that where the error of a time is nothing beside the interval.
    """
    if y0.dtype in (torch.float64, torch.complex128) or len(times) < 2:
        return
    for a, b in pairwise(times):
        spacing = 1.2e-7 * max(abs(a), abs(b))
        h = abs(b - a) if adaptive else abs(b - a) / (steps or 1)
        if step_size is not None and step_size > 1e-30:
            h = min(step_size, h)
        if spacing > 0.25 * h and (adaptive or spacing > 1e-5 * abs(b - a)):
            raise ValueError(
                f"float32 times near {a:g} are {spacing:.2g} apart, too coarse for steps of {h:.2g}: count time from"
                " the start, t - t[0], or give a float64 y0"
            )


def tensors_of(y0: State) -> tuple[Tensor, ...]:
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


def times_of(t: Tensor | Sequence[float]) -> tuple[Tensor, list[float]]:
    if isinstance(t, Tensor):
        if t.dim() != 1:
            raise ValueError(f"t must have one dimension, [times], got shape {list(t.shape)}")
        times = t.tolist()
        if times and isinstance(times[0], (torch.SymFloat, torch.SymInt)):  # then all of them are
            raise ValueError(
                "how many steps there are follows from t, which is computed, or a buffer, where the solve is recorded:"
                " give steps=... instead of step_size=..., or t as a list of numbers"
            )
        if not t.is_floating_point():
            times = [float(x) for x in times]
    else:
        times = [float(x) for x in t]
        t = torch.tensor(times, dtype=torch.float64)
    if len(times) == 2 and (times[0] < times[1] or times[1] < times[0]) and isfinite(times[1] - times[0]):
        return t, times  # as most are; what has a finite difference is finite
    if not times:
        raise ValueError("t must hold at least one time, got none")
    lengths = [b - a for a, b in pairwise(times)]
    if not all(map(isfinite, times)) or (lengths and not (min(lengths) > 0 or max(lengths) < 0)):
        raise ValueError(f"t must be finite and strictly increasing or decreasing, got {times}")
    if not all(map(isfinite, lengths)):
        raise ValueError(f"t must have finite intervals, but the length of one overflows: got {times}")
    return t, times
