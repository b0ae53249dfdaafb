"""The op that solves a program in given steps: its shapes and gradients, and one function that calls it.

    solve(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, int[] steps,
          float tolerance, int max_iterations, int adjoint, int kept_per_step, int checkpoint_every,
          float drift_tolerance) -> (Tensor ys, Tensor stages, Tensor evaluations, Tensor residual)
    solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights, ...the same...)
        -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor evaluations)

- ``y0`` ``[batch, ...]``, float32 or float64, whose samples have the program's elements; ``weights`` as the program
  numbers them, of the dtype of ``y0``; ``t`` ``[times]``, float32 or float64, on the CPU on every device;
  ``steps[j]`` equal steps between ``t[j]`` and ``t[j + 1]``.
- ``program`` and ``constants`` as csrc/program_plan.h reads them; ``tableau`` float64 ``[stages + 2, stages]``: a, b,
  c.
- ``adjoint`` says what the gradient will need: 0 none, 1 ``discrete``, 2 ``reversible`` (which stores the state after
  every ``checkpoint_every``-th step of an interval, 0 for none), 3 ``continuous``; the last two for one stage.
  ``discrete`` keeps ``kept_per_step`` states per step: one of an explicit method, all stages of others. With 0 the
  kernels choose: they keep that, or what the backward pass reads of every evaluation, ``[elements]``, so that none is
  made again (with -1 wherever they can); ``grad_t`` is then NaN unless that includes the slopes.
- ``ys`` ``[times, *y0.shape]``. ``stages`` ``[stored, *y0.shape]``: what was kept for the backward pass; how its
  numbers lie is between an op and its backward op, of the same instruction set.
- ``evaluations`` int64 ``[batch]``: of f in the forward solve; in the backward sweep of f, where the trajectory is
  found again, and of its vector–Jacobian product. ``residual`` float64 ``[batch]``: the largest relative residual of a
  stage. ``grad_t`` is float64, on the device of ``ys``.
- A program that is ConvDynamics, one stage and 0 or 3 as ``kept_per_step`` take a kernel of its own
  (csrc/peephole.h), which keeps three states per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nodeshape._errors import ReversalDriftError, StageSolveError
from nodeshape._ode import fused
from nodeshape._ode.method import METHODS, Method
from nodeshape._ode.program import Program, nobodys

MOST_STAGES = 16  # as in csrc/program.h
#: What the op calls ``adjoint``, by its number.
ADJOINTS = ("none", "discrete", "reversible", "continuous")


def tableau_of(method: Method) -> tuple[Tensor, int]:
    """a, b and c, float64 ``[stages + 2, stages]``, and the states that ``discrete`` keeps per step."""
    return _tableaux[method.name] if METHODS.get(method.name) is method else _made(method)


def _made(method: Method) -> tuple[Tensor, int]:
    stages = len(method.b)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in (*method.a, method.b, method.c)]
    return torch.tensor(rows, dtype=torch.float64), 1 if method.explicit else stages


with nobodys():
    _tableaux = {name: _made(method) for name, method in METHODS.items()}


def solve(
    program: Program,
    weights: list[Tensor],
    y0: Tensor,
    t: Tensor,
    steps: list[int],
    method: Method,
    adjoint: str,
    tolerance: float,
    max_iterations: int,
    checkpoint_every: int | None,
    drift_tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve from ``t[0]`` through all of ``t``.

    Args:
        program: of f.
        weights: as the program numbers them.
        y0: ``[batch, ...]``.
        t: observation times, ``[times]``; differentiable.
        steps: equal steps in each interval between them.
        method: of any number of stages.
        adjoint: ``"discrete"``, ``"reversible"`` or ``"continuous"``; nothing is stored where no gradient is recorded.
        tolerance: relative residual of a solved stage.
        max_iterations: evaluations of f that one stage may take.
        checkpoint_every: for ``"reversible"``; None or 0 for no checkpoints within an interval.
        drift_tolerance: for ``"reversible"``.

    Returns:
        ``ys`` ``[times, *y0.shape]``, the evaluations of the forward pass, int64 ``[batch]``, and ``residual`` float64
        ``[batch]``.

    Raises:
        StageSolveError: a stage was not solved; in the backward pass too.
        ReversalDriftError: in the backward pass of ``"reversible"``.
    """
    tableau, kept_per_step = tableau_of(method)
    compiling = torch.compiler.is_compiling()
    if not (compiling or t.requires_grad):
        kept_per_step = 0
    elif method.one_stage:
        kept_per_step = program.maps_kept
    if not (t.is_cpu and (t.dtype == torch.float32 or t.dtype == torch.float64)):
        t = t.to(device="cpu", dtype=torch.float64)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (y0, t, *weights))
    mode = ADJOINTS.index(adjoint) if recorded else 0
    scheme = (
        *(program.code, program.constants, tableau, steps, tolerance, int(max_iterations), mode),
        *(kept_per_step, int(checkpoint_every or 0), drift_tolerance),
    )
    try:
        if compiling:
            ys, _, evaluations, residual = torch.ops.nodeshape.solve.default(y0, t, weights, *scheme)
        elif recorded:
            counts: list[Tensor] = []
            ys = _Recorded.apply(scheme, counts, y0, t, *weights)
            evaluations, residual = counts
        else:
            ys, _, evaluations, residual = below_autograd(torch.ops.nodeshape.solve.default, y0, t, weights, *scheme)
    except RuntimeError as error:
        raise translated(error) from None
    return ys, evaluations, residual


def backward_evaluations(ys: Tensor) -> Tensor | None:
    """Evaluations in the backward pass of a solution, int64 ``[batch]``, zero until it has run; in eager mode only."""
    if torch.compiler.is_compiling():
        return None
    node: Any = ys.grad_fn
    if getattr(node, "_forward_cls", None) is not _Recorded:
        return None
    evaluations = torch.zeros(ys.shape[1], dtype=torch.int64, device=ys.device)
    node.backward_evaluations = evaluations
    return evaluations


def translated(error: RuntimeError) -> Exception:
    """The kernel's error as the class its message names."""
    message = str(error).split("\n")[0]
    for kind in (StageSolveError, ReversalDriftError, MemoryError):
        if message.startswith(f"{kind.__name__}: "):
            return kind(message.removeprefix(f"{kind.__name__}: "))
    if "atching rule not implemented" in message:
        return RuntimeError(
            "the fused solver takes one cotangent at a time, not several by is_grads_batched, jacobian(vectorize=True)"
            " or vmap of a gradient: use torch.func.jacrev, jacobian without vectorize, or options={'fused': False}"
        )
    return error


# ---- shapes and gradients --------------------------------------------------------------------------------------------


def _stored_rows(steps: Sequence[int], adjoint: int, kept_per_step: int, checkpoint_every: int) -> int:
    if ADJOINTS[adjoint] == "discrete":
        return sum(steps) * kept_per_step
    if ADJOINTS[adjoint] == "reversible" and checkpoint_every > 0:
        return sum((count - 1) // checkpoint_every for count in steps)
    return 0


def _fake(y0: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, steps, _, _, adjoint, kept_per_step, checkpoint_every, _ = scheme
    rows = _stored_rows(steps, adjoint, kept_per_step, checkpoint_every)
    batch = y0.shape[0]
    return (
        y0.new_empty((t.shape[0], *y0.shape)),
        y0.new_empty((rows, *y0.shape)),
        y0.new_empty((batch,), dtype=torch.int64),
        y0.new_empty((batch,), dtype=torch.float64),
    )


def _fake_backward(
    grad_ys: Tensor, ys: Tensor, stages: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    return (
        ys.new_empty(ys.shape[1:]),
        ys.new_empty(t.shape, dtype=torch.float64),
        [x.new_empty(x.shape) for x in weights],
        ys.new_empty((ys.shape[1],), dtype=torch.int64),
    )


def _gradient(
    ctx: Any, op: Callable[..., Any], grad_ys: Tensor, timed: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The gradients of y0, of t if ``timed`` (which waits for a GPU), and of the weights, by ``op``."""
    ys, stages, t, *weights = ctx.saved_tensors
    try:
        grad_y0, grad_t, grad_weights, evaluations = op(grad_ys, ys, stages, t, weights, *ctx.scheme)
    except RuntimeError as error:
        raise translated(error) from None
    wanted = getattr(ctx, "backward_evaluations", None)  # the function of that name leaves it there
    if wanted is not None:
        wanted.copy_(evaluations)
    return grad_y0, grad_t.to(t.device, t.dtype) if timed else None, grad_weights


def below_autograd(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call an op whose gradient nobody records, without the detour through Python that its registered formula is.

    A signal, such as Ctrl-C, ends a long solve. If its handler, which Python runs next, does not raise, the solve is
    taken anew.
    """
    while True:
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        except RuntimeError as error:
            if not str(error).startswith("Interrupted: "):
                raise


class _Recorded(torch.autograd.Function):
    """The op and its gradient in eager mode: what the registered formula does, without its cost to a small solve.

    What is not differentiable leaves by ``counts``, not as an output, which would cost as much as one that is.
    """

    @staticmethod
    def forward(
        ctx: Any, scheme: tuple[Any, ...], counts: list[Tensor], y0: Tensor, t: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ys, stages, *kept = below_autograd(torch.ops.nodeshape.solve.default, y0, t, weights, *scheme)
        counts += kept
        ctx.save_for_backward(ys, stages, t.clone(), *weights)  # t may be written into before the backward pass
        ctx.scheme = scheme
        return ys  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad_ys is None:
            return (None,) * len(needed)
        op: Any = torch.ops.nodeshape.solve_backward.default
        if not torch.is_grad_enabled():  # with create_graph the op records that it cannot be differentiated
            op = partial(below_autograd, op)
        grad_y0, grad_t, grad_weights = _gradient(ctx, op, grad_ys, timed=needed[3])
        return None, None, grad_y0, grad_t, *grad_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, t, weights, *scheme = inputs
    ys, stages, evaluations, residual = output
    ctx.mark_non_differentiable(stages, evaluations, residual)
    ctx.save_for_backward(ys, stages, t, *weights)
    ctx.scheme = scheme


def _formula(ctx: Any, grad_ys: Tensor, *_: Any) -> tuple[Any, ...]:
    # An empty list of steps passes for a list of tensors, whose gradient is a list.
    return *_gradient(ctx, torch.ops.nodeshape.solve_backward, grad_ys, timed=ctx.needs_input_grad[1]), *(
        [] if isinstance(x, list) and not x else None for x in ctx.scheme
    )


NO_SECOND_DERIVATIVE = (
    "the fused solver has no second derivatives: to differentiate twice give options={'fused': False}, or set"
    " NODESHAPE_FUSED=0 (adjoint='discrete')"
)


def no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


if fused._missing is None:
    torch.library.register_fake("nodeshape::solve", _fake)
    torch.library.register_fake("nodeshape::solve_backward", _fake_backward)
    torch.library.register_autograd("nodeshape::solve", _formula, setup_context=_setup_context)
    torch.library.register_autograd("nodeshape::solve_backward", no_second_derivative)
