"""One step of a method: its stages, the state at its end, anywhere in it, and an estimate of its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.method import Method, Weights

#: A step size: a number, or a scalar tensor where times are differentiated.
Size = float | Tensor
#: Solve a stage F = f(t, base + c F): ``(t, base, c, guess of F) -> F``.
StageSolve = Callable[[Tensor, Tensor, Size, Tensor | None], Tensor]


def combine(y: Tensor, h: Size, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """y + h Σ w_i F_i; weights of 0 cost nothing."""
    for weight, slope in zip(weights, slopes):
        if weight != 0.0:
            y = torch.add(y, slope, alpha=h * weight) if isinstance(h, float) else y + slope * (h * weight)
    return y


def stages(
    field: Callable[[Tensor, Tensor], Tensor],
    method: Method,
    y: Tensor,
    times: Sequence[Tensor],
    h: Size,
    first: Tensor | None = None,
    guess: Tensor | None = None,
    solve: StageSolve | None = None,
) -> list[Tensor]:
    """The slopes F_i of the step of ``h`` from ``y``.

    Args:
        times: of the stages, scalars.
        first: F_1, if it is known from the step before.
        guess: of the first stage, if that is an equation.
        solve: of stages that are equations; explicit methods have none.
    """
    slopes: list[Tensor] = []
    for i, row in enumerate(method.a):
        if i == 0 and first is not None:
            slopes.append(first)
            continue
        base = combine(y, h, row[:-1], slopes)
        if row[-1] == 0.0:
            slopes.append(field(times[i], base))
        else:
            assert solve is not None
            slopes.append(solve(times[i], base, h * row[-1], slopes[-1] if slopes else guess))
    return slopes


def end(method: Method, y: Tensor, h: Size, slopes: Sequence[Tensor]) -> Tensor:
    """The state at the end of the step; the slopes are added up first, so that y is rounded once."""
    used = [(weight, slope) for weight, slope in zip(method.b, slopes) if weight != 0.0]
    if len(used) == 1:
        return combine(y, h, *zip(*used))
    (first, slope), *rest = used
    total = slope if first == 1.0 else slope * first
    for weight, slope in rest:
        total = torch.add(total, slope, alpha=weight)
    return torch.add(y, total, alpha=h) if isinstance(h, float) else y + total * h


@torch.no_grad()
def error(method: Method, h: float, slopes: Sequence[Tensor]) -> Tensor:
    """The estimate of the step's error, h Σ e_i F_i."""
    weighted = [(w, slope) for w, slope in zip(method.error, slopes) if w != 0.0]
    total = weighted[0][1] * (h * weighted[0][0])
    for w, slope in weighted[1:]:
        total.add_(slope, alpha=h * w)
    return total


@lru_cache(maxsize=256)
def interpolant(method: Method) -> tuple[Weights, ...]:
    """Weights of F_1 … F_s and the slopes at both ends, for the powers x¹ … x⁴ of the part x of the step covered.

    y + h Σ w_i(x) F_i matches state and slope at both ends and, where the method gives it, the state in the middle
    (Shampine 1986): a quartic, otherwise the cubic of Hermite.
    """
    middle = method.middle or (0.0,) * len(method.b)
    # Coefficients of: the change over the step, the change over its first half, the slope at its start, at its end.
    whole, half, start, stop = (
        ((0, -5, 14, -8), (0, 16, -32, 16), (1, -4, 5, -2), (0, 1, -3, 2))
        if method.middle
        else ((0, 3, -2, 0), (0, 0, 0, 0), (1, -2, 1, 0), (0, -1, 1, 0))
    )
    return tuple(
        (*(whole[k] * b + half[k] * m for b, m in zip(method.b, middle)), float(start[k]), float(stop[k]))
        for k in range(4)
    )


@dataclass
class Piece:
    """A step that was taken, to be interpolated.

    Attributes:
        t, h, t_end: start, size and end.
        start, size: t and h, as tensors where times are differentiated.
        y, y_end: the states at its ends.
        slopes: F_1 … F_s, and those at the start and at the end.
        before: what f depended on besides, for a step that is taken anew.
    """

    method: Method
    t: float
    h: float
    t_end: float
    start: Size
    size: Size
    y: Tensor
    y_end: Tensor
    slopes: list[Tensor]
    before: Any = None

    def part(self, t: Tensor) -> Tensor:
        """Which part of the step times ``t`` are."""
        size = self.size
        return (t - self.start) / (size.to(t) if isinstance(size, Tensor) else size)

    def states(self, x: Tensor) -> Tensor:
        """The states at parts ``x`` ``[n]`` of the step, ``[n, *y.shape]``."""
        return self.y + self._weighted(_powers(x)) * self.size

    def derivatives(self, x: Tensor) -> Tensor:
        """dy/dt of the interpolant at parts ``x`` ``[n]`` of the step, ``[n, *y.shape]``."""
        return self._weighted(torch.stack([torch.ones_like(x), 2 * x, 3 * x * x, 4 * x * x * x], dim=1))

    def _weighted(self, powers: Tensor) -> Tensor:
        """Σ w_i F_i for ``powers`` ``[n, 4]``."""
        weights, used = _weights(self.method, powers)
        total: Tensor = torch.tensordot(weights.to(self.y.dtype), torch.stack([self.slopes[i] for i in used]), dims=1)
        return total


def interpolate(method: Method, x: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """(y(x) − y) / h of n steps, ``[n, ...]``, at the part ``x`` ``[n]`` of each.

    Args:
        slopes: F_1 … F_s, and those at the start and at the end, ``[n, ...]`` each.
    """
    weights, used = _weights(method, _powers(x))
    many = (-1, *(1,) * (slopes[0].dim() - 1))
    return torch.stack([weights[:, k].reshape(many) * slopes[i] for k, i in enumerate(used)]).sum(dim=0)


def _powers(x: Tensor) -> Tensor:
    return torch.stack([x, x * x, x * x * x, x * x * x * x], dim=1)


def _weights(method: Method, powers: Tensor) -> tuple[Tensor, list[int]]:
    """Weights of slopes ``[n, used]`` for powers of x ``[n, 4]``, and the slopes that have any."""
    rows = interpolant(method)
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    table = torch.tensor([[row[i] for i in used] for row in rows], dtype=powers.dtype, device=powers.device)
    return powers @ table, used
