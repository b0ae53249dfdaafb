"""A solve by the plain loop: its options made ready, then run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from nodeshape._ode.control import Controller, Norm, rms
from nodeshape._ode.field import Field, State
from nodeshape._ode.loop import Callbacks, Loop
from nodeshape._ode.method import Method
from nodeshape._ode.options import CALLBACKS, DRIFT_PER_STAGE_TOLERANCE, UniformGrid, steps_of
from nodeshape._ode.per_sample import SampleSteps
from nodeshape._ode.recompute import Recorder
from nodeshape._ode.root import StageEquations
from nodeshape._ode.stage import COARSE_TOLERANCE, MAX_STAGE_ITERATIONS, STAGE_TOLERANCE, StageSolver
from nodeshape._ode.stats import SolverStats


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
        per_sample: whether each sample takes steps of its own under error control.
        mode: how gradients are computed, in the user's words, for error messages.
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
    per_sample: bool = False
    mode: str = "adjoint='discrete'"
    loop: Loop = field(init=False)
    by_sample: SampleSteps | None = field(init=False, default=None)
    counted: SolverStats | None = field(init=False, default=None)

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
            on_failure=self.settings.get("on_failure", "raise"),
        )
        if self.loop.solve is not None and self.loop.on_failure == "nan" and not self.per_sample:
            self.loop.solve.on_failure = self.loop.fail

    def run(self) -> Tensor:
        """The packed states at all times, ``[times, ...]``."""
        y = self.field.pack(self.y0)
        if len(self.times) == 1:
            return y[None].clone()
        if self.adaptive:
            stops, jumps = self._stops()
            if self.loop.recorder is not None:
                stops += self.times
            most = self.most_attempts()
            if self.per_sample:
                on_failure = self.loop.on_failure
                self.by_sample = SampleSteps(self.loop, self.controller(), most, stops, jumps, on_failure)
                return self.by_sample.run(y)
            return self.loop.adaptive(y, self.controller(), most, stops, jumps)
        grid = self.settings.get("grid_constructor")
        if grid is not None:
            return self.loop.on_grid(y, *self._grid(grid), self.settings.get("interp", "linear") == "cubic")
        return self.loop.fixed(y, self.counts())

    def most_attempts(self) -> int:
        """Attempts between two observations."""
        return most_attempts_of(self.settings)

    def counts(self) -> list[int]:
        """Equal steps in each interval; one where neither their number nor their size is given."""
        if self.step_size is None:
            return [self.steps or 1] * (len(self.times) - 1)
        return [steps_of(end - start, self.step_size) for start, end in pairwise(self.times)]

    def controller(self) -> Controller:
        """What chooses the steps."""
        rtol, atol = self._tolerance(self.rtol), self._tolerance(self.atol)
        return controller_of(self.method, self.settings, rtol, atol, self.norm())

    def norm(self) -> Callable[[Any], Tensor]:
        """Of a packed state: the user's; or the root mean square, of a tuple the largest of its tensors'."""
        own = self.settings.get("norm")
        if own == "seminorm":
            raise ValueError("norm 'seminorm' is of the backward pass: give it in adjoint_options, or norm a function")
        if isinstance(self.y0, Tensor):
            return rms if own is None else own
        unpack, of_parts = self.field.unpack, cast("Norm", own or mixed_norm)
        return lambda y: of_parts(unpack(y))

    def stats(self) -> SolverStats:
        """What the solve cost so far."""
        loop, stats = self.loop, SolverStats.zeros(self.field.samples, self.field.device)
        if self.by_sample is not None:
            stats.nfe_forward += self.by_sample.evaluations
            stats.accepted += self.by_sample.accepted
            stats.rejected += self.by_sample.rejected
            stats.failures = self.by_sample.failures
        else:
            stats.nfe_forward += self.field.evaluations
            if loop.solve is not None:  # a sample counts the evaluations until its stages were solved
                stats.nfe_forward = stats.nfe_forward - loop.solve.calls + loop.solve.evaluations
            stats.accepted += loop.accepted
            stats.rejected += loop.rejected
            stats.failures = loop.failures
        if self.adaptive:
            stats.step_control = "per sample" if self.per_sample else "shared"
        if loop.solve is not None:
            loop.solve.stats = stats
            stats.stage_iterations = stats.stage_iterations + loop.solve.evaluations
            stats.residual = torch.maximum(stats.residual, torch.as_tensor(loop.solve.residual).to(stats.residual))
        self.counted = stats
        return stats

    def count_backward(self, evaluations: int | Tensor) -> None:
        """Enter what the backward pass cost, if anybody asked."""
        if self.counted is not None:
            self.counted.nfe_backward = torch.zeros_like(self.counted.nfe_forward) + evaluations

    def count_products(self) -> None:
        """Enter what autograd costs, when it begins: a product for each stage; equations add theirs."""
        if self.counted is not None:
            self.count_backward(len(self.method.b) * self.counted.accepted)

    def _tolerance(self, value: Any) -> float | Tensor:
        if isinstance(value, (tuple, list)):
            if not isinstance(self.y0, tuple) or len(value) != len(self.y0):
                parts_of = len(self.y0) if isinstance(self.y0, tuple) else "one tensor, not a tuple"
                raise ValueError(f"a tuple of {len(value)} tolerances needs a tuple state of as many, got {parts_of}")
            parts = [torch.as_tensor(v, dtype=torch.float64).to(x.device) for v, x in zip(value, self.y0)]
            wide = tuple(
                part.expand(x.shape) if part.dim() != 1 else part.expand(x.numel()).reshape(x.shape)
                for part, x in zip(parts, self.y0)
            )
            return self.field.pack(wide).to(self.field.time_dtype)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.to(self.field.device, self.field.time_dtype)
        return float(value)

    def _grid(self, constructor: Any) -> tuple[list[float], Tensor | None]:
        """Times to step on, and the same as a tensor if they are differentiated."""
        if self.t is None and isinstance(constructor, UniformGrid):
            return constructor.points(self.times), None
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
        if self.t is None:
            return points, None
        # Points that the constructor made of numbers move with neither end; those that are the ends do.
        if isinstance(grid, Tensor) and grid.requires_grad:
            return points, grid.double()
        inner = torch.tensor(points[1:-1], dtype=torch.float64, device=self.t.device)
        return points, torch.cat([self.t[:1], inner, self.t[-1:]])

    def _stops(self) -> tuple[list[float], list[float]]:
        def listed(name: str) -> list[float]:
            value = self.settings.get(name)
            return [] if value is None else [float(x) for x in (value.tolist() if isinstance(value, Tensor) else value)]

        return [*listed("step_t"), *listed("grid_points")], listed("jump_t")

    @property
    def has_callbacks(self) -> bool:
        """Whether the user wants to be told of steps."""
        return any(getattr(self.func, name, None) for name in CALLBACKS)

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

    def recorder(self, stored: bool, discovers: bool) -> Recorder:
        """For a gradient that takes steps anew, from stored states or from states found by undoing them."""
        equations = self._equations(solves=not (stored and self.method.explicit))
        every = self.settings.get("checkpoint_every")
        drift = self.settings.get("drift_tolerance", DRIFT_PER_STAGE_TOLERANCE * STAGE_TOLERANCE[self.field.time_dtype])
        return Recorder(self.field, self.method, self.times, stored, every, drift, discovers, equations)

    def _stage_solver(self) -> StageEquations | None:
        return None if self.method.explicit else self._equations()

    def _equations(self, solves: bool = True) -> StageEquations:
        get, dtype = self.settings.get, self.field.time_dtype
        if self.field.dtype.is_complex and solves:
            raise ValueError(f"{self.method.name} solves equations for real states only, got {self.field.dtype}")
        tolerance = get("stage_tolerance", COARSE_TOLERANCE if self.field.coarse else STAGE_TOLERANCE[dtype])
        iterations = get("max_stage_iterations", MAX_STAGE_ITERATIONS)
        return StageEquations(self.field, StageSolver(get("stage_solver", "anderson"), tolerance, iterations))


def mixed_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The largest root mean square of some tensors."""
    norms = [rms(x) for x in tensors]
    return torch.stack(norms).max() if norms else torch.zeros(())


#: Attempts between two observations.
MOST_ATTEMPTS = 1_000_000


def most_attempts_of(settings: Mapping[str, Any]) -> int:
    """Attempts between two observations that the options allow."""
    return int(settings.get("max_num_steps", settings.get("max_steps", MOST_ATTEMPTS)))


def controller_of(
    method: Method, settings: Mapping[str, Any], rtol: float | Tensor, atol: float | Tensor, norm: Norm
) -> Controller:
    """What chooses the steps of a method, as the options say."""
    names = ("first_step", "min_step", "max_step", "safety")
    chosen = {name: float(settings[name]) for name in names if name in settings}
    renamed = (("ifactor", "grow"), ("dfactor", "shrink"))
    chosen |= {new: float(settings[old]) for old, new in renamed if old in settings}
    return Controller(method.error_order or method.order + 1, rtol, atol, norm, **chosen)
