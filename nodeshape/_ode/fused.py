"""The fused solver: its ops, their shapes and gradients, and one function that calls them.

The ops, registered by ``libnodeshape_cpu.so`` under ``torch.ops.nodeshape`` and again by ``libnodeshape_cuda.so`` for
tensors on a GPU, where torch has CUDA (``mlp_*`` have ``int activation`` after ``weights``, its number among
``ACTIVATIONS`` of ``_models/dynamics.py``):

    conv_solve(Tensor y0, Tensor t, Tensor[] weights, int[] steps, float theta, float tolerance, int max_iterations,
               int adjoint, int checkpoint_every, float drift_tolerance)
        -> (Tensor ys, Tensor stages, Tensor evaluations, Tensor residual)
    conv_solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights, ...the same...)
        -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor evaluations)

- ``y0`` ``[batch, channels, height, width]`` or ``[batch, dim]``, float32 or float64; ``weights`` in the order of the
  module's ``state_dict()``; ``t`` ``[times]``, float32 or float64 too; ``steps[j]`` equal steps between ``t[j]`` and
  ``t[j + 1]``.
- ``adjoint`` says what the gradient will need: 0 none, 1 ``discrete``, 2 ``reversible`` (which stores the state after
  every ``checkpoint_every``-th step of an interval, 0 for none), 3 ``continuous``. No argument is a string: torch's
  stable ABI leaks those.
- ``ys`` ``[times, *y0.shape]``. ``stages`` ``[stored, batch, ...]``: the stages of ``discrete``, the checkpoints of
  ``reversible``, otherwise empty; how its numbers lie is between an op and its backward op, of the same instruction
  set. Feature maps are ``[maps, height, width, channels]``: a stage is kept with the outputs of both convolutions, so
  that the backward sweep repeats none of them, a checkpoint is one map.
- ``evaluations`` int64 ``[batch]``: of f in the forward solve; in the backward sweep of f, where the trajectory is
  found again, and of its vector–Jacobian product. ``residual`` float64 ``[batch]``: the largest relative residual of a
  stage.
- ``t`` is a CPU tensor on every device; ``grad_t`` is float64, on the device of ``ys``.
- On the CPU, a sample that fails raises from its op. On CUDA, where nothing waits for the device, it gives NaN, and the
  same error comes from the next op that finds it; ``torch.ops.nodeshape.raise_failures()`` does nothing but look, and
  raises a RuntimeError whose message begins with the error's name, as all ops do.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._errors import ReversalDriftError, StageSolveError
from nodeshape._ode.layers import any_global_hooks
from nodeshape._ode.method import Method

_LIBRARY = Path(__file__).with_name("libnodeshape_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("libnodeshape_cuda.so")
_CONV_MAPS_KEPT = 3  # as in csrc/problem.h
#: What the ops call ``adjoint``, by its number.
ADJOINTS = ("none", "discrete", "reversible", "continuous")
# Why a library is not there:
_missing: str | None = None
_cuda_missing: str | None = None


@dataclass(frozen=True)
class Kernel:
    """What the fused solver must know of a class of dynamics that it has a kernel for.

    Attributes:
        op: ``"conv_solve"`` or ``"mlp_solve"``; its backward op has ``_backward`` behind.
        dimensions: of the state.
        weights: the parameters of a module in state_dict order; or why it may not compute what its class does. Called
            with the module and whether torch.compile is tracing.
        arguments: what the op takes behind the weights, before the scheme.
    """

    op: str
    dimensions: int
    weights: Callable[[Any, bool], list[Tensor] | str]
    arguments: Callable[[Any], tuple[Any, ...]]


#: By the exact class of a dynamics, which registers itself.
KERNELS: dict[type, Kernel] = {}


def weights_for(dynamics: Any, y0: Any) -> list[Tensor] | str:
    """The parameters to solve with, in state_dict order; or why the fused solver does not take this solve."""
    compiling = torch.compiler.is_compiling()
    if _turned_off(compiling):
        return "NODESHAPE_FUSED=0"
    kernel = KERNELS.get(type(dynamics))
    if kernel is None:
        return f"{type(dynamics).__name__} has no fused kernel (ConvDynamics and MLPDynamics have)"
    if not isinstance(y0, Tensor):
        return "the state is a tuple"
    if not (y0.is_cpu or y0.is_cuda):
        return f"the state is on {y0.device}"
    if y0.dtype not in (torch.float32, torch.float64):
        return f"the state is {y0.dtype}"
    if y0.dim() != kernel.dimensions:
        return f"the state has {y0.dim()} dimensions, the kernel takes {kernel.dimensions}"
    if not compiling:
        if type(y0) not in (Tensor, nn.Parameter):
            return f"the state is a {type(y0).__name__}"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            return "a torch.func transform or forward-mode differentiation is active"
    if any_global_hooks():
        return "hooks of all modules are registered"
    missing = _missing or (_cuda_missing if y0.is_cuda else None)
    return missing or kernel.weights(dynamics, compiling)


def _turned_off(compiling: bool) -> bool:
    """Whether NODESHAPE_FUSED is 0: of os.environ's dictionary, as its own lookup takes a tenth of a small solve."""
    # Compilers know os.environ alone, and a test may have put a plain dictionary in its place.
    environment = None if compiling else getattr(os.environ, "_data", None)
    if environment is None:
        return os.environ.get("NODESHAPE_FUSED") == "0"
    return bool(environment.get(b"NODESHAPE_FUSED") == b"0")


def solve(
    dynamics: Any,
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
        dynamics: f, of a class with a kernel.
        weights: what :func:`weights_for` gave.
        y0: ``[batch, channels, height, width]`` or ``[batch, dim]``.
        t: observation times, ``[times]``; differentiable.
        steps: equal steps in each interval between them.
        method: which gives theta.
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
    kernel = KERNELS[type(dynamics)]
    before = (*kernel.arguments(dynamics), steps, method.theta, tolerance, int(max_iterations))
    return call(kernel.op, y0, t, weights, before, adjoint, (int(checkpoint_every or 0), drift_tolerance))


def call(
    name: str,
    y0: Tensor,
    t: Tensor,
    weights: list[Tensor],
    before: tuple[Any, ...],
    adjoint: str,
    after: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Call an op the way this call is best recorded; what :func:`solve` returns.

    Args:
        name: of the op; its backward op has ``_backward`` behind.
        before, after: the op's arguments behind the weights, before and after ``adjoint``.
    """
    if not (t.is_cpu and (t.dtype == torch.float32 or t.dtype == torch.float64)):
        t = t.to(device="cpu", dtype=torch.float64)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (y0, t, *weights))
    scheme = (*before, ADJOINTS.index(adjoint) if recorded else 0, *after)
    try:
        if torch.compiler.is_compiling():
            ys, _, evaluations, residual = getattr(torch.ops.nodeshape, name).default(y0, t, weights, *scheme)
        elif recorded:
            counts: list[Tensor] = []
            ys = _Recorded.apply(_ops[name], scheme, counts, y0, t, *weights)
            evaluations, residual = counts
        else:
            ys, _, evaluations, residual = _below_autograd(_ops[name][0], y0, t, weights, *scheme)
    except RuntimeError as error:
        raise _translated(error) from None
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


def _translated(error: RuntimeError) -> Exception:
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


# ---- shapes and gradients of the ops ---------------------------------------------------------------------------------


def stored_rows(steps: Sequence[int], adjoint: int, checkpoint_every: int) -> int:
    if ADJOINTS[adjoint] == "discrete":
        return sum(steps)
    if ADJOINTS[adjoint] == "reversible" and checkpoint_every > 0:
        return sum((count - 1) // checkpoint_every for count in steps)
    return 0


def _fake_solve(
    y0: Tensor, t: Tensor, steps: Sequence[int], adjoint: int, checkpoint_every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = stored_rows(steps, adjoint, checkpoint_every)
    batch, *shape = y0.shape
    if len(shape) == 3:
        shape = [_CONV_MAPS_KEPT if ADJOINTS[adjoint] == "discrete" else 1, *shape[1:], shape[0]]
    return (
        y0.new_empty((t.shape[0], *y0.shape)),
        y0.new_empty((rows, batch, *shape)),
        y0.new_empty((batch,), dtype=torch.int64),
        y0.new_empty((batch,), dtype=torch.float64),
    )


def _fake_backward(ys: Tensor, t: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
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
        raise _translated(error) from None
    wanted = getattr(ctx, "backward_evaluations", None)  # the function of that name leaves it there
    if wanted is not None:
        wanted.copy_(evaluations)
    return grad_y0, grad_t.to(t.device, t.dtype) if timed else None, grad_weights


def _below_autograd(op: Callable[..., Any], *arguments: Any) -> Any:
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
    """An op and its gradient in eager mode: what the registered formula does, without its cost to a small solve.

    What is not differentiable leaves by ``counts``, not as an output, which would cost as much as one that is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: tuple[Any, Any],
        scheme: tuple[Any, ...],
        counts: list[Tensor],
        y0: Tensor,
        t: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ys, stages, *kept = _below_autograd(ops[0], y0, t, weights, *scheme)
        counts += kept
        ctx.save_for_backward(ys, stages, t.clone(), *weights)  # t may be written into before the backward pass
        ctx.scheme, ctx.op = scheme, ops[1]
        return ys  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad_ys is None:
            return (None,) * len(needed)
        op = ctx.op
        if not torch.is_grad_enabled():  # with create_graph the op records that it cannot be differentiated
            op = partial(_below_autograd, op)
        grad_y0, grad_t, grad_weights = _gradient(ctx, op, grad_ys, timed=needed[4])
        return None, None, None, grad_y0, grad_t, *grad_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, t, weights, *scheme = inputs
    ys, stages, evaluations, residual = output
    ctx.mark_non_differentiable(stages, evaluations, residual)
    ctx.save_for_backward(ys, stages, t, *weights)
    ctx.scheme = scheme


def _formula(op: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, grad_ys: Tensor, *_: Any) -> tuple[Any, ...]:
        # An empty list of steps passes for a list of tensors, whose gradient is a list.
        return *_gradient(ctx, op, grad_ys, timed=ctx.needs_input_grad[1]), *(
            [] if isinstance(x, list) and not x else None for x in ctx.scheme
        )

    return backward


NO_SECOND_DERIVATIVE = (
    "the fused solver has no second derivatives: set NODESHAPE_FUSED=0 to differentiate twice (adjoint='discrete')"
)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


#: Of each name the op and its backward op.
_ops: dict[str, tuple[Any, Any]] = {}


def register(name: str, fake: Callable[..., Any]) -> None:
    """Give an op and its backward op their shapes (``fake``) and gradients."""

    def fake_backward(
        grad_ys: Tensor, ys: Tensor, stages: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any
    ) -> Any:
        return _fake_backward(ys, t, weights)

    library = torch.library
    library.register_fake(f"nodeshape::{name}", fake)
    library.register_fake(f"nodeshape::{name}_backward", fake_backward)
    backward = getattr(torch.ops.nodeshape, f"{name}_backward")
    library.register_autograd(f"nodeshape::{name}", _formula(backward), setup_context=_setup_context)
    library.register_autograd(f"nodeshape::{name}_backward", _no_second_derivative)
    _ops[name] = getattr(torch.ops.nodeshape, name).default, backward.default


def _fake(y0: Tensor, t: Tensor, weights: list[Tensor], *scheme: Any) -> Any:
    # The scheme's arguments are the last seven of every op; mlp ops have the activation before them.
    *_, steps, _, _, _, adjoint, checkpoint_every, _ = scheme
    return _fake_solve(y0, t, steps, adjoint, checkpoint_every)


def _load() -> str | None:
    if not _LIBRARY.exists():
        return _told(f"{_LIBRARY.name} is not built: reinstall with a C++ compiler")
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return _told(f"{_LIBRARY.name} does not load: {error}")
    ctypes.CDLL(str(_LIBRARY)).nodeshape_let_signals_end_solves()
    for name in ("conv_solve", "mlp_solve"):
        register(name, _fake)
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not _CUDA_LIBRARY.exists():
        return f"{_CUDA_LIBRARY.name} is not built: reinstall with FORCE_CUDA=1 where nvcc is"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return _told(f"{_CUDA_LIBRARY.name} does not load: {error}")
    return None


def _told(reason: str) -> str:
    """Say, in one line, that solves will take the plain loop where this library's kernels were meant for them."""
    message = f"{reason}; solves take the plain loop, which is slower"
    warnings.warn_explicit(message, RuntimeWarning, "nodeshape", 0)  # of no line, which would be a second one
    return reason


_missing = _load()
_cuda_missing = _missing or _load_cuda()
