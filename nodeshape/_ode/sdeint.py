"""``sdeint``: solve dy = f(t, y) dt + g(t, y) dW along a path of Brownian motion, differentiably."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from math import isqrt, prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from nodeshape._ode.brownian import BrownianPath
from nodeshape._ode.field import SAME, Field
from nodeshape._ode.graph import leaves
from nodeshape._ode.loop import BLOCK, under_vmap
from nodeshape._ode.odeint import Dynamics, Times, check_resolution, tensors_of, times_of
from nodeshape._ode.options import check_steps, read_options, steps_of
from nodeshape._ode.root import StageEquations
from nodeshape._ode.sde_fused import driven_steps, program_of
from nodeshape._ode.sde_method import SDE_METHODS, SDEMethod, check_noise, sde_step
from nodeshape._ode.stage import COARSE_TOLERANCE, MAX_STAGE_ITERATIONS, STAGE_TOLERANCE, StageSolver
from nodeshape._ode.surroundings import Surroundings
from nodeshape._ode.unrolled import is_exporting

#: What ``options`` may hold.
OPTIONS = ("recompute", "stage_solver", "stage_tolerance", "max_stage_iterations")
SPELLED = {"ito": "Itô", "stratonovich": "Stratonovich"}

Y = TypeVar("Y", Tensor, tuple[Tensor, ...])
#: W(t) − W(s) of (s, t).
Increments = Callable[[float, float], Tensor]


def sdeint(
    f: Dynamics,
    g: Dynamics,
    y0: Y,
    t: Times,
    *,
    method: str = "euler_maruyama",
    noise: str = "diagonal",
    steps: int | None = None,
    step_size: float | None = None,
    path: Increments | None = None,
    calculus: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Y:
    """Solve dy = f(t, y) dt + g(t, y) dW from ``y(t[0]) = y0`` along one path of W and return y at every time in ``t``.

    Which equation that is depends on the method. Stratonovich's dy = f dt + g ∘ dW is Itô's with the drift
    f + ½ Σ_k (∂g_k/∂y) g_k, g_k the columns of g; where g does not depend on y (additive noise) both are the same. A
    method has strong order p if the error along each path falls as h^p, weak order p if that of expectations does:

    ==============================  ============  ========================  ====
    method                          calculus      strong                    weak
    ==============================  ============  ========================  ====
    ``"euler_maruyama"``            Itô           ½, additive noise 1       1
    ``"implicit_euler_maruyama"``   Itô           ½, additive noise 1       1
    ``"heun"``                      Stratonovich  1 if noise commutes or ½  1
    ``"midpoint"``                  Stratonovich  1 if noise commutes or ½  1
    ``"implicit_midpoint"``         Stratonovich  1 if noise commutes or ½  1
    ==============================  ============  ========================  ====

    Noise commutes where m = 1, where it is additive, and where it is diagonal with each element of g a function of the
    same element of y. The implicit methods are so in the drift alone, which lifts the bound that a stiff drift puts on
    the step, and not one that large noise does.

    :func:`fuse_sde` makes f and g of small networks a program that takes the steps in the C++ kernel.

    Gradients with respect to y0 and whatever f and g depend on are exact, those of the very steps on the very path, of
    any order. Autograd stores every step; ``options={"recompute": True}`` stores every √n-th of n states and takes the
    steps between anew along the same path, at the price of one more forward pass.

    Args:
        f: drift ``f(t, y)``, of the shape of y.
        g: diffusion ``g(t, y)``: of the shape of y for diagonal noise, ``[*y.shape, m]`` for general noise; a tuple of
            such for a tuple state.
        y0: floating-point tensor or a tuple of them. Its first dimension is the batch of samples, each with noise of
            its own, if (every tensor of a tuple) has at least two dimensions.
        t: strictly increasing times ``[times]``; decreasing ones for Stratonovich's methods, which then run back along
            the same path.
        method: one of the table.
        noise: ``"diagonal"``: an independent W for each element of y; ``"general"``: m of them for each sample, shared
            by its elements. Scalar noise is general noise with m = 1.
        steps: equal steps in each interval of ``t``; this or ``step_size`` must be given.
        step_size: an interval of length T takes ceil(T / step_size) equal steps.
        path: a :class:`BrownianPath`, or any function ``(s, t)`` that returns W(t) − W(s): of y0's shape for diagonal
            noise (of a tuple ``[batch, size of all]``), ``[batch, m]`` for general noise (``[m]`` without a batch). By
            default a new one, seeded by PyTorch's random numbers.
        calculus: ``"ito"`` or ``"stratonovich"``, the one that f and g are meant in, if it is to be checked.
        options: ``recompute``; of the stages of implicit methods ``stage_solver``, ``stage_tolerance`` and
            ``max_stage_iterations``, as for :func:`odeint`.

    Returns:
        The solution ``[times, *y0.shape]`` (a tuple of such for a tuple state), of y0's dtype and on its device.

    Raises:
        TypeError: ``y0`` is not made of tensors.
        ValueError: an argument is out of its range, or f, g or the path returns another shape than it should.
        StageSolveError: the stage of an implicit method was not solved.
        RuntimeError: with ``recompute``, f, g or the path is another in the backward pass than in the forward pass.
    """
    if torch.compiler.is_compiling() and not is_exporting():  # it stays as it is, between what is compiled
        how: Any = {"method": method, "noise": noise, "steps": steps, "step_size": step_size, "path": path}
        outside: Y = torch.compiler.disable(sdeint)(f, g, y0, t, **how, calculus=calculus, options=options)
        return outside
    for name, function in (("f", f), ("g", g)):
        if not callable(function):
            raise TypeError(f"{name} must be a function of (t, y), got {function!r}; odeint solves without noise")
    scheme = _method_of(method, calculus, noise)
    settings = read_options(options)
    for name in settings:
        if name not in OPTIONS:
            remedy = "give step_size=..." if name == "step_size" else f"those of sdeint are {', '.join(OPTIONS)}"
            raise ValueError(f"option {name!r} is odeint's: {remedy}")
    first = tensors_of(y0)[0]
    if first.is_complex():
        raise ValueError(f"sdeint solves for real states, got {first.dtype}: give real and imaginary part as a tuple")
    if is_exporting():
        raise ValueError(
            "sdeint draws random numbers, which no exported file holds: export the drift alone, by"
            " odeint(f, y0, t, steps=...)"
        )
    t, times = times_of(t)
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError("t cannot be differentiated, as Brownian motion has no derivative: give t.detach()")
    check_steps(steps, step_size)
    if steps is None and step_size is None:
        raise ValueError("sdeint has no error control: give steps=... in each interval of t, or step_size=...")
    if scheme.calculus == "ito" and times[-1] < times[0]:
        raise ValueError(
            f"{method!r} solves an Itô equation, which has no meaning back in time: give increasing t, or use 'heun' or"
            " 'midpoint'"
        )
    check_resolution(first, times, steps, step_size, False)
    counts = [steps if step_size is None else steps_of(b - a, step_size) for a, b in pairwise(times)]
    solution: Y = _Solve(scheme, f, g, noise, y0, times, [int(n or 1) for n in counts], path, settings).run()
    return solution


sdeint.__module__ = "nodeshape"


def _method_of(name: str, calculus: str | None, noise: str) -> SDEMethod:
    if name not in SDE_METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(SDE_METHODS)}")
    if noise not in ("diagonal", "general"):
        more = ": scalar noise is 'general' with m = 1" if noise == "scalar" else ""
        more = ": additive noise is either, with a g that does not depend on y" if noise == "additive" else more
        raise ValueError(f"noise must be 'diagonal' or 'general', got {noise!r}{more}")
    method = SDE_METHODS[name]
    if calculus is None or calculus == method.calculus:
        return method
    if calculus not in SPELLED:
        raise ValueError(f"calculus must be 'ito' or 'stratonovich', got {calculus!r}")
    others = [repr(x.name) for x in SDE_METHODS.values() if x.calculus == calculus]
    sign = "subtract" if calculus == "ito" else "add"
    raise ValueError(
        f"{name!r} solves {SPELLED[method.calculus]}'s equation, f and g are meant in {SPELLED[calculus]}'s sense: use"
        f" {', '.join(others[:-1])} or {others[-1]}, or {sign} the drift ½ Σ_k (∂g_k/∂y) g_k"
    )


class _Noise:
    """(t, y) to g(t, y) ΔW, for the ΔW of the step that is being taken.

    Attributes:
        change: ΔW.
    """

    def __init__(self, g: Dynamics, general: bool, field: Field) -> None:
        self.g, self.general, self.field = g, general, field
        self.change: Tensor | None = None

    def __call__(self, t: Tensor, y: Any) -> Any:
        assert self.change is not None
        value = self.g(t, y)
        one = isinstance(y, Tensor)
        parts, states = ([value], [y]) if one else (value, y)
        if not isinstance(parts, (list, tuple)) or len(parts) != len(states):
            raise ValueError(f"g must return a tuple of {len(states)} tensors, as its state is one, got {value!r:.60}")
        for part, state in zip(parts, states):
            check_noise(part, state, self.general)
        if self.general:
            products = [self._product(part, state) for part, state in zip(parts, states)]
        else:
            shared = self.change if one else self.field.unpack(self.change)
            products = [part * change for part, change in zip(parts, [shared] if one else shared)]
        return products[0] if one else tuple(products)

    def columns(self, t: Tensor, y: Any) -> int:
        """m of general noise."""
        value = self.g(t, y)
        part, state = (value, y) if isinstance(y, Tensor) else (value[0], y[0])
        check_noise(part, state, self.general)
        return int(part.shape[-1])

    def _product(self, part: Tensor, state: Tensor) -> Tensor:
        assert self.change is not None
        lead, m = self.change.shape[:-1], self.change.shape[-1]
        if part.shape[-1] != m:
            raise ValueError(f"g returned {part.shape[-1]} columns, but the path is of {m}, shape {list(lead)} + [{m}]")
        wide = torch.promote_types(part.dtype, self.change.dtype)
        product = part.reshape(*lead, prod(state.shape[len(lead) :]), m).to(wide) @ self.change[..., None].to(wide)
        return product.reshape(state.shape)


class _Solve:
    """A solve, ready to run."""

    def __init__(
        self,
        method: SDEMethod,
        f: Dynamics,
        g: Dynamics,
        noise: str,
        y0: Any,
        times: list[float],
        counts: list[int],
        path: Increments | None,
        settings: dict[str, Any],
    ) -> None:
        self.method, self.y0, self.times, self.counts, self.settings = method, y0, times, counts, settings
        self.drift = Field(f, y0)
        self.term = _Noise(g, noise == "general", self.drift)
        self.noise = Field(self.term, y0)
        self.grid = [times[0]]
        for (start, end), count in zip(pairwise(times), counts):
            self.grid += [start + (end - start) * (k / count) for k in range(1, count)] + [end]
        self.solve = None if method.explicit else self._equations()
        self.increment = self._increments(path)
        self.surroundings = Surroundings(lambda: (f, g), self.drift.device) if settings.get("recompute") else None
        forwards = self.surroundings is None and self.grid[-1] > self.grid[0]
        self.program = program_of(f, g, method.name, noise, y0) if forwards else None

    def run(self) -> Any:
        """The states at all times, as the caller sees them."""
        if self.program is not None:
            every = driven_steps(self.program, self.method.name, self.y0, self.grid, self.increment)
            return every[list(accumulate(self.counts, initial=0))]
        y = self.drift.pack(self.y0)
        states, first = [y if len(self.times) > 1 else y.clone()], 0
        block = BLOCK if self.surroundings is None else isqrt(max(len(self.grid) - 2, 0)) + 1
        take = self._taken_anew if self.surroundings is not None and torch.is_grad_enabled() else self._steps
        for count in self.counts:
            for start in range(first, first + count, block):
                y = take(y, start, min(start + block, first + count))
            first += count
            states.append(y)
        return self.drift.unpack(torch.stack(states), (len(states),))

    def _steps(self, y: Tensor, first: int, last: int) -> Tensor:
        """The state after the steps from a point of the grid to another."""
        grid, places = self.grid, self.method.c
        now = [grid[k] + c * (grid[k + 1] - grid[k]) for k in range(first, last) for c in places]
        times = torch.tensor(now, dtype=self.drift.time_dtype, device=self.drift.device).unbind()
        guess: Tensor | None = None
        for i, k in enumerate(range(first, last)):
            h = grid[k + 1] - grid[k]
            self.term.change = self.increment(grid[k], grid[k + 1])
            if self.solve is not None:
                self.solve.where = grid[k], h
            stage_times = times[i * len(places) : (i + 1) * len(places)]
            y, slope = sde_step(self.method, self.drift, self.noise, y, stage_times, h, guess, self.solve)
            guess = slope.detach()
        return y

    def _taken_anew(self, y: Tensor, first: int, last: int) -> Tensor:
        """:meth:`_steps`, of which autograd keeps the start; the backward pass takes them again."""
        assert self.surroundings is not None
        around, before = self.surroundings, self.surroundings.snapshot()
        weights: list[tuple[Tensor, int]] = []
        reached: Tensor | None = None

        def steps(y: Tensor) -> Tensor:
            if reached is None:
                return self._steps(y, first, last)
            around.check_weights()
            with around.restored() as restore:
                restore(before)
                again = self._steps(y, first, last)
            rtol = SAME[self.drift.time_dtype]
            same = torch.allclose(again.detach(), reached, rtol, rtol, equal_nan=True)
            if not same or any(x._version != version for x, version in weights):
                raise RuntimeError(
                    "f, g or the path is not what it was in the forward pass, so the gradient would be wrong: call"
                    " backward() before changing a weight or an attribute, or leave out options={'recompute': True}"
                )
            return again

        with set_checkpoint_early_stop(False):  # so that the end is reached, and compared
            after: Tensor = checkpoint(steps, y, use_reentrant=False, preserve_rng_state=False)
        weights += [(x, x._version) for x in leaves(after, y)]
        reached = after.detach()
        return after

    def _equations(self) -> StageEquations:
        get, field = self.settings.get, self.drift
        tolerance = get("stage_tolerance", COARSE_TOLERANCE if field.coarse else STAGE_TOLERANCE[field.time_dtype])
        iterations = get("max_stage_iterations", MAX_STAGE_ITERATIONS)
        return StageEquations(field, StageSolver(get("stage_solver", "anderson"), tolerance, iterations))

    def _increments(self, path: Increments | None) -> Increments:
        """ΔW of a step, from the path that was given, checked, or from a new one."""
        field, general = self.drift, self.term.general
        lead = [field.samples] if field.batched else []
        shape = list(field.pack(self.y0).shape) if not general else [*lead, -1]
        if path is None:
            if under_vmap():
                raise ValueError(
                    "torch.func.vmap does not say how many samples there are: give path=ns.BrownianPath(...), made"
                    " outside of it, which all of them share"
                )
            if len(self.grid) == 1:
                return lambda s, t: torch.empty(0)
            if general:
                with torch.no_grad():
                    now = torch.tensor(self.times[0], dtype=field.time_dtype, device=field.device)
                    shape[-1] = self.term.columns(now, self.y0)
            grid = self.grid if self.grid[-1] > self.grid[0] else self.grid[::-1]
            new = BrownianPath(shape, grid[0], grid[-1], dtype=field.dtype, device=field.device, grid=grid)
            return new.increment
        if not callable(path):
            raise ValueError(f"path must be a BrownianPath or a function (s, t), got {type(path).__name__}")
        given = path.increment if isinstance(path, BrownianPath) else path
        known = shape[: len(lead)] if general else shape
        wanted = f"[{', '.join(map(str, [*known, 'm'] if general else known))}]"

        def increment(s: float, t: float) -> Tensor:
            change = given(s, t)
            found = list(change.shape)
            if len(found) != len(shape) or found[: len(known)] != known:
                raise ValueError(f"the path must be of shape {wanted} for this y0 and noise, got {found}")
            if change.dtype is not field.dtype or change.device != field.device:
                raise ValueError(
                    f"the path must be {field.dtype} on {field.device}, as the state, got {change.dtype} on"
                    f" {change.device}"
                )
            return change

        return increment
