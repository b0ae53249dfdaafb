"""The methods for stochastic differential equations, as data, and one step of any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from nodeshape._ode.step import StageSolve, combine

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SDEMethod:
    """A stochastic Runge–Kutta method for dy = f(t, y) dt + g(t, y) dW (Rümelin 1982).

    With ΔW the change of W over the step::

        Y_i     = y_k + h Σ_{j≤i} a_ij f(t_k + c_j h, Y_j) + Σ_{j<i} b_ij g(t_k + c_j h, Y_j) ΔW
        y_{k+1} = y_k + h Σ_i α_i f(t_k + c_i h, Y_i)      + Σ_i β_i g(t_k + c_i h, Y_i) ΔW

    Attributes:
        name: what ``sdeint`` knows it by.
        calculus: ``"ito"`` or ``"stratonovich"``: whose integral of g dW it converges to.
        c: the stages' places in the step.
        a, b: rows i, up to a_ii and b_i,i−1. With a_ii ≠ 0 the stage is an equation.
        alpha, beta: weights of drift and noise.
    """

    name: str
    calculus: str
    c: tuple[float, ...]
    a: Rows
    b: Rows
    alpha: tuple[float, ...]
    beta: tuple[float, ...]

    @property
    def explicit(self) -> bool:
        """Whether no stage is an equation."""
        return all(row[-1] == 0.0 for row in self.a)

    @cached_property
    def needed(self) -> tuple[tuple[bool, bool], ...]:
        """Of each stage, whether its drift and whether its noise is used."""
        stages = range(len(self.c))
        drift = [self.alpha[i] != 0.0 or any(row[i] != 0.0 for row in self.a[i:]) for i in stages]
        noise = [self.beta[i] != 0.0 or any(row[i] != 0.0 for row in self.b[i + 1 :]) for i in stages]
        return tuple(zip(drift, noise))


#: Strong order ½ and weak order 1 (Kloeden & Platen 1992, 10.2 and 14.1), both: drift-implicit 12.2.
_EULER_MARUYAMA = SDEMethod("euler_maruyama", "ito", (0.0,), ((0.0,),), ((),), (1.0,), (1.0,))
_IMPLICIT_EULER_MARUYAMA = SDEMethod(
    "implicit_euler_maruyama", "ito", (0.0, 1.0), ((0.0,), (0.0, 1.0)), ((), (1.0,)), (0.0, 1.0), (1.0, 0.0)
)
#: Strong order 1 where the noise commutes, otherwise ½ (Rümelin 1982; Burrage & Burrage 1996).
_HEUN = SDEMethod("heun", "stratonovich", (0.0, 1.0), ((0.0,), (1.0, 0.0)), ((), (1.0,)), (0.5, 0.5), (0.5, 0.5))
_MIDPOINT = SDEMethod(
    "midpoint", "stratonovich", (0.0, 0.5), ((0.0,), (0.5, 0.0)), ((), (0.5,)), (0.0, 1.0), (0.0, 1.0)
)
_IMPLICIT_MIDPOINT = SDEMethod(
    "implicit_midpoint", "stratonovich", (0.0, 0.5), ((0.0,), (0.0, 0.5)), ((), (0.5,)), (0.0, 1.0), (0.0, 1.0)
)
SDE_METHODS = {
    method.name: method for method in (_EULER_MARUYAMA, _HEUN, _MIDPOINT, _IMPLICIT_EULER_MARUYAMA, _IMPLICIT_MIDPOINT)
}


def sde_step(
    method: SDEMethod,
    drift: Callable[[Tensor, Tensor], Tensor],
    noise: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    times: Sequence[Tensor],
    h: float,
    guess: Tensor | None = None,
    solve: StageSolve | None = None,
) -> tuple[Tensor, Tensor]:
    """The state after a step of ``h`` from ``y``, and its last stage's drift.

    Args:
        drift, noise: f, and g ΔW of this step.
        times: of the stages, scalars.
        guess: of the drift of a stage that is an equation.
        solve: of such stages; explicit methods have none.
    """
    slopes: list[Tensor] = []
    kicks: list[Tensor] = []
    for i, (row, kicked) in enumerate(zip(method.a, method.b)):
        value = combine(combine(y, h, row[:-1], slopes), 1.0, kicked, kicks)
        needs_drift, needs_noise = method.needed[i]
        slope = kick = value  # a place in the row, of weight 0
        if row[-1] != 0.0:
            assert solve is not None
            slope = solve(times[i], value, h * row[-1], guess)
            value = combine(value, h, row[-1:], [slope])
        elif needs_drift:
            slope = drift(times[i], value)
        if needs_noise:
            kick = noise(times[i], value)
        slopes.append(slope)
        kicks.append(kick)
    after = combine(combine(y, h, method.alpha, slopes), 1.0, method.beta, kicks)
    return after, slopes[-1]


def check_noise(part: Any, state: Tensor, general: bool) -> None:
    """Raise TypeError or ValueError where what g returned does not fit its state."""
    if not isinstance(part, Tensor):
        raise TypeError(f"g must return tensors, got {type(part).__name__}")
    if general:
        if part.shape[:-1] != state.shape or part.dim() == 0:
            remedy = "or use noise='diagonal'" if part.shape == state.shape else "m Brownian motions last"
            got, shape = tuple(part.shape), tuple(state.shape)
            raise ValueError(f"g must return (*y.shape, m) for general noise: for {shape} it returned {got}; {remedy}")
    elif part.shape != state.shape:
        remedy = "use noise='general'" if part.shape[:-1] == state.shape else "as torch.ones_like(y) * sigma has it"
        got, shape = tuple(part.shape), tuple(state.shape)
        raise ValueError(f"g must return y's shape for diagonal noise: for {shape} it returned {got}; {remedy}")
