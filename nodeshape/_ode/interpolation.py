"""A solution at any time between the first and the last: what ``return_dense=True`` gives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.solver import Plan
from nodeshape._ode.step import Piece


class DenseSolution:
    """y(t) and dy/dt between the first and the last time of a solve, differentiable as the solve is.

    Between the ends of a step y is a quartic for ``dopri5``, ``tsit5`` and ``dopri8``, a cubic for other methods.

    Attributes:
        t_start, t_end: the times it holds between, numbers.
    """

    __module__ = "nodeshape"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pieces = [plan.loop._complete(piece) for piece in plan.loop.pieces]
        self.t_start, self.t_end = plan.times[0], plan.times[-1]
        self._sign = 1.0 if self.t_end >= self.t_start else -1.0
        self._starts = [self._sign * piece.t for piece in self._pieces]

    def __call__(self, t: Tensor | float) -> Any:
        """The state at ``t``, a time or ``[times]``: ``[*t.shape, *y0.shape]``, of a tuple state a tuple of such.

        Raises:
            ValueError: a time is not between the first and the last.
        """
        return self._at(t, Piece.states)

    def derivative(self, t: Tensor | float) -> Any:
        """dy/dt of the interpolant at ``t``, shaped as the state there."""
        return self._at(t, Piece.derivatives)

    def _at(self, t: Tensor | float, of: Callable[[Piece, Tensor], Tensor]) -> Any:
        field = self._plan.field
        t = torch.as_tensor(t, dtype=torch.float64)
        flat = t.reshape(-1)
        times = [float(x) for x in flat.detach().tolist()]
        low, high = sorted((self.t_start, self.t_end))
        for time in times:
            if not low <= time <= high:
                raise ValueError(
                    f"t={time:g} is outside of the solve, which goes from {self.t_start:g} to {self.t_end:g}"
                )
        if not times:
            return field.unpack(self._pieces[0].y.new_zeros((*t.shape, *self._pieces[0].y.shape)), tuple(t.shape))
        values: list[Tensor] = []
        for i, time in enumerate(times):
            piece = self._pieces[max(0, bisect_right(self._starts, self._sign * time) - 1)]
            x = piece.part(flat[i : i + 1]).to(field.device, field.time_dtype)
            values.append(of(piece, x)[0])
        return field.unpack(torch.stack(values).reshape(*t.shape, *values[0].shape), tuple(t.shape))
