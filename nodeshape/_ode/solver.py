"""A solve by the plain loop: its options made ready, then run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from nodeshape._ode.control import Controller, Norm, rms
from nodeshape._ode.field import Field, State
from nodeshape._ode.integrate import EqualSteps
from nodeshape._ode.loop import Callbacks, Loop
from nodeshape._ode.method import Method
from nodeshape._ode.root import StageEquations
from nodeshape._ode.stage import MAX_STAGE_ITERATIONS, STAGE_TOLERANCE, StageSolver
from nodeshape._ode.stats import SolverStats

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass
class Plan:
    """How a solve is done.

    Attributes:
        times: observation times.
        t: the same, where they are differentiated or traced.
        steps, step_size: of equal steps in each interval.
        grid: to step on, as a function ``(func, y0, t)`` or as times; None for the intervals.
        adaptive: whether error control chooses the steps.
        rtol, atol: numbers, tensors, or for a tuple state tuples of them.
        settings: the user's options.
    """

    func: Callable[[Tensor, Any], Any]
    y0: State
    times: list[float]
    t: Tensor | None
    method: Method
    steps: int | None
    step_size: float | None
    adaptive: bool
    rtol: Any
    atol: Any
    settings: dict[str, Any]
    loop: Loop = field(init=False)

    def __post_init__(self) -> None:
        self.field = Field(self.func, self.y0)
        self.loop = Loop(
            self.field,
            self.method,
            self.times,
            self.t,
            solve=self._stage_solver(),
            callbacks=self._callbacks(),
            perturb=bool(self.settings.get("perturb", False)),
        )

    def run(self) -> Tensor:
        """The packed states at all times, ``[times, ...]``."""
        y = self.field.pack(self.y0)
        if len(self.times) == 1:
            return y[None]
        if self.adaptive:
            stops, jumps = self._stops()
            most = int(self.settings.get("max_num_steps", self.settings.get("max_steps", MOST_ATTEMPTS)))
            return self.loop.adaptive(y, self.controller(), most, stops, jumps)
        grid = self.settings.get("grid_constructor")
        if grid is not None:
            return self.loop.on_grid(y, self._grid(grid), self.settings.get("interp", "linear") == "cubic")
        return self.loop.fixed(y, self.counts())

    def counts(self) -> list[int]:
        """Equal steps in each interval; one where neither their number nor their size is given."""
        if self.step_size is None:
            return [self.steps or 1] * (len(self.times) - 1)
        equal = EqualSteps(None, self.step_size)
        return [equal.number(end - start) for start, end in pairwise(self.times)]

    def controller(self) -> Controller:
        """What chooses the steps."""
        names = ("first_step", "min_step", "max_step", "safety")
        chosen = {name: float(self.settings[name]) for name in names if name in self.settings}
        chosen |= {
            new: float(self.settings[old])
            for old, new in (("ifactor", "grow"), ("dfactor", "shrink"))
            if old in self.settings
        }
        order = self.method.error_order or self.method.order + 1
        return Controller(order, self._tolerance(self.rtol), self._tolerance(self.atol), self.norm(), **chosen)

    def norm(self) -> Callable[[Any], Tensor]:
        """Of a packed state: the user's; or the root mean square, of a tuple the largest of its tensors'."""
        own = self.settings.get("norm")
        if isinstance(self.y0, Tensor):
            return rms if own is None else own
        unpack, of_parts = self.field.unpack, cast("Norm", own or mixed_norm)
        return lambda y: of_parts(unpack(y))

    def stats(self) -> SolverStats:
        """What the solve cost so far."""
        loop, stats = self.loop, SolverStats.zeros(self.field.samples, self.field.device)
        stats.nfe_forward += self.field.evaluations
        stats.accepted += loop.accepted
        stats.rejected += loop.rejected
        stats.step_control = "shared" if self.adaptive else "fixed"
        if loop.solve is not None:
            loop.solve.stats = stats
            stats.stage_iterations = stats.stage_iterations + loop.solve.evaluations
            stats.residual = torch.maximum(stats.residual, torch.as_tensor(loop.solve.residual).to(stats.residual))
        return stats

    def count_backward(self, stats: SolverStats) -> None:
        """Enter what the backward pass costs, when it begins: a product for each stage, and those of its equations."""
        stats.nfe_backward = torch.zeros_like(stats.nfe_forward) + len(self.method.b) * self.loop.accepted

    def _tolerance(self, value: Any) -> float | Tensor:
        if isinstance(value, (tuple, list)):
            assert isinstance(self.y0, tuple)
            parts = [torch.as_tensor(v, dtype=torch.float64).to(x.device) for v, x in zip(value, self.y0)]
            wide = tuple(
                part.expand(x.shape) if part.dim() != 1 else part.expand(x.numel()).reshape(x.shape)
                for part, x in zip(parts, self.y0)
            )
            return self.field.pack(wide).to(self.field.time_dtype)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.to(self.field.device, self.field.time_dtype)
        return float(value)

    def _grid(self, constructor: Any) -> list[float]:
        t = self.t if self.t is not None else torch.tensor(self.times, dtype=torch.float64)
        grid = constructor(self.func, self.y0, t) if callable(constructor) else constructor
        points = [float(x) for x in (grid.tolist() if isinstance(grid, Tensor) else grid)]
        lengths = [b - a for a, b in pairwise(points)]
        if points[0] != self.times[0] or points[-1] != self.times[-1]:
            raise ValueError(
                f"grid_constructor must return a grid from {self.times[0]:g} to {self.times[-1]:g}, got one from"
                f" {points[0]:g} to {points[-1]:g}"
            )
        if not (min(lengths) > 0 or max(lengths) < 0):
            raise ValueError(f"grid_constructor must return times that go one way, got {points}")
        return points

    def _stops(self) -> tuple[list[float], list[float]]:
        def listed(name: str) -> list[float]:
            value = self.settings.get(name)
            return [] if value is None else [float(x) for x in (value.tolist() if isinstance(value, Tensor) else value)]

        return [*listed("step_t"), *listed("grid_points")], listed("jump_t")

    def _callbacks(self) -> Callbacks | None:
        found = {name: getattr(self.func, name, None) for name in CALLBACKS}
        if not any(found.values()):
            return None
        if not self.adaptive and any(found[name] for name in CALLBACKS[1:]):
            warnings.warn(
                f"{self.method.name} takes given steps: callback_accept_step and callback_reject_step are not called",
                stacklevel=5,
            )
        unpack = self.field.unpack

        def told(callback: Any) -> Callable[[Tensor, Tensor, Tensor], Any]:
            return lambda t, y, h: callback(t, unpack(y), h)

        given = {
            short: told(found[name]) for short, name in zip(("step", "accept", "reject"), CALLBACKS) if found[name]
        }
        return Callbacks(**given)

    def _stage_solver(self) -> StageEquations | None:
        if self.method.explicit:
            return None
        get, dtype = self.settings.get, self.field.time_dtype
        if self.field.dtype.is_complex:
            raise ValueError(f"{self.method.name} solves equations for real states only, got {self.field.dtype}")
        tolerance = get("stage_tolerance", STAGE_TOLERANCE[dtype])
        iterations = get("max_stage_iterations", MAX_STAGE_ITERATIONS)
        return StageEquations(self.field, StageSolver(get("stage_solver", "anderson"), tolerance, iterations))


def mixed_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The largest root mean square of some tensors."""
    norms = [rms(x) for x in tensors]
    return torch.stack(norms).max() if norms else torch.zeros(())


#: Attempts between two observations.
MOST_ATTEMPTS = 1_000_000
