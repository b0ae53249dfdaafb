"""The contenders: ways to solve dy/dt = f(t, y) from t=0 to t=1 in equal steps, and to differentiate that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodeshape._models.dynamics import ConvDynamics, MLPDynamics
from nodeshape._ode.backend import backend
from nodeshape._ode.fused import program_of
from nodeshape._ode.method import METHODS
from nodeshape._ode.odeint import odeint
from nodeshape._ode.program_op import tableau_of

Dynamics = ConvDynamics | MLPDynamics
Solve = Callable[[Tensor], Tensor]
Call = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What every contender is given.

    Attributes:
        dynamics: f.
        y0: float32, ``[batch, channels, height, width]`` or ``[batch, dim]``.
        steps: equal steps from t=0 to t=1.
        training: also compute the gradients of y0 and the parameters for a given cotangent of y(1).
        method: of nodeshape; the others all run explicit Euler.
        tolerance: of implicit stages; None for odeint's default.
    """

    dynamics: Dynamics
    y0: Tensor
    steps: int = 20
    training: bool = False
    method: str = "euler"
    tolerance: float | None = None

    def call(self, solve: Solve) -> Call:
        """A forward solve ``() -> (y1,)``, or a training step ``() -> gradients``."""
        y0 = self.y0
        if not self.training:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (solve(y0),)

            return forward
        inputs = [y0.clone().requires_grad_(), *self.dynamics.parameters()]
        cotangent = self.cotangent()

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(solve(inputs[0]), inputs, cotangent)

        return step

    def cotangent(self) -> Tensor:
        """dL/dy(1)."""
        return torch.randn(self.y0.shape, generator=torch.Generator().manual_seed(1)).to(self.y0.device)


def nodeshape(problem: Problem, adjoint: str = "discrete") -> Call:
    """``odeint`` as users call it, on the fused kernel."""
    path = backend(problem.dynamics, problem.y0, steps=problem.steps)
    if path.name != "fused":
        raise Unavailable(path.reason)
    return problem.call(_odeint(problem, adjoint))


def plain_loop(problem: Problem, adjoint: str = "discrete") -> Call:
    """``odeint`` with ``NODESHAPE_FUSED=0``."""
    solve = _odeint(problem, adjoint)

    def plain(y: Tensor) -> Tensor:
        with without_fused():
            return solve(y)

    return problem.call(plain)


def op(problem: Problem) -> Call:
    """The op alone, without odeint's Python: what diffrax's compiled function is to diffrax."""
    assert isinstance(problem.dynamics, MLPDynamics) and problem.method == "euler" and not problem.training
    path = backend(problem.dynamics, problem.y0, steps=problem.steps)
    if path.name != "fused":
        raise Unavailable(path.reason)
    solve = torch.ops.nodeshape.solve.default
    y0, weights = problem.y0, [x.detach() for x in problem.dynamics.parameters()]
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    program, (tableau, _) = program_of(problem.dynamics, weights, y0), tableau_of(METHODS["euler"])
    arguments = (t, weights, program.code, program.constants, tableau, [problem.steps], 1e-6, 50, 0, 0, 0, 1e-3)

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (solve(y0, *arguments)[0][-1],)

    return forward


def compiled_loop(problem: Problem) -> Call:
    """``torch.compile`` of the Euler loop one would write by hand, as one graph."""
    dynamics, steps = problem.dynamics, problem.steps

    def loop(y: Tensor) -> Tensor:
        for k in range(steps):
            y = y + dynamics(k / steps, y) / steps
        return y

    torch.compiler.reset()
    call = problem.call(torch.compile(loop, fullgraph=True, dynamic=False))
    try:
        call()
    except Exception as error:  # whatever a missing or broken compiler raises
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {_first_line(error)}") from error
    return call


def torchdiffeq(problem: Problem, adjoint: bool = False) -> Call:
    """``torchdiffeq.odeint``, or ``odeint_adjoint``, with the fixed-step Euler method."""
    try:
        import torchdiffeq as package
    except ImportError as error:
        raise Unavailable("not installed: pip install torchdiffeq") from error
    function = package.odeint_adjoint if adjoint else package.odeint
    t, options = torch.tensor([0.0, 1.0], device=problem.y0.device), {"step_size": 1 / problem.steps}

    def solve(y: Tensor) -> Tensor:
        y1: Tensor = function(problem.dynamics, y, t, method="euler", options=options)[-1]
        return y1

    return problem.call(solve)


def diffrax(problem: Problem) -> Call:
    """diffrax, jitted, float32, Euler in constant steps; its gradient is that of the discrete solve."""
    if problem.y0.device.type != "cpu":
        raise Unavailable("measured on the CPU only")
    try:
        import diffrax as package
        import jax
    except ImportError as error:
        raise Unavailable("not installed: pip install diffrax") from error
    from nodeshape._benchmarking.jax import field, parameters

    assert isinstance(problem.dynamics, MLPDynamics)
    term = package.ODETerm(field(problem.dynamics))
    controller, euler = package.ConstantStepSize(), package.Euler()

    def solve(y0: Any, weights: Any) -> Any:
        h = 1 / problem.steps
        return package.diffeqsolve(term, euler, 0.0, 1.0, h, y0, weights, stepsize_controller=controller).ys[-1]

    def gradients(y0: Any, weights: Any, cotangent: Any) -> Any:
        return jax.vjp(solve, y0, weights)[1](cotangent)

    arguments = [jax.numpy.asarray(problem.y0.numpy()), parameters(problem.dynamics)]
    if problem.training:
        arguments.append(jax.numpy.asarray(problem.cotangent().numpy()))
    function = jax.jit(gradients if problem.training else solve)

    def call() -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(jax.block_until_ready(function(*arguments))))

    return call


@contextmanager
def without_fused() -> Iterator[None]:
    """Within it, odeint takes the plain loop."""
    before = os.environ.get("NODESHAPE_FUSED")
    os.environ["NODESHAPE_FUSED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["NODESHAPE_FUSED"]
        else:
            os.environ["NODESHAPE_FUSED"] = before


def _odeint(problem: Problem, adjoint: str) -> Solve:
    times = torch.tensor([0.0, 1.0])
    options = None if problem.tolerance is None else {"stage_tolerance": problem.tolerance}

    def solve(y: Tensor) -> Tensor:
        y1: Tensor = odeint(
            problem.dynamics, y, times, method=problem.method, steps=problem.steps, adjoint=adjoint, options=options
        )[-1]
        return y1

    return solve


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
