"""The stage equation Y = base + c F(Y): one solver for forward stages, rebuilt stages and transposed stages.

Every sweep of this library is made of this one step. With J = ∂f/∂y at the stage:

    forward      Y = y_k      + θ h     f(Y)      then  y_{k+1} = y_k     + h f(Y)
    reversed     Y = y_{k+1}  − (1−θ) h f(Y)      then  y_k     = y_{k+1} − h f(Y)
    transposed   w = λ_{k+1}  + θ h     Jᵀ w      then  λ_k     = λ_{k+1} + h Jᵀ w

Samples are rows and never mix: each has its own iteration history, stops at its own tolerance, and fails alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from nodeshape._errors import StageSolveError

Function = Callable[[Tensor], Tensor]
Time = float | Tensor  # one number for the batch, or one per sample, [samples]

#: Iterates of history Anderson acceleration keeps.
ANDERSON_MEMORY = 5
#: A stage is guessed to lie on the line through the slopes of the two before it where they differ by at most this part
#: of the last, and where that line goes on for at most so many times their distance.
MOST_TREND, MOST_AHEAD = 0.5, 2.0
#: A residual difference this much shorter after orthogonalisation (relative) counts as dependent on the newer ones.
DEPENDENT = 1e-3
#: Relative residual at which a stage counts as solved, by dtype.
STAGE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
#: The same where f computes in a type of low precision, whatever the stage is carried in.
COARSE_TOLERANCE = 2e-2
MAX_STAGE_ITERATIONS = 100


@dataclass
class Stage:
    """A solved stage, row by row.

    Attributes:
        value: Y, ``[samples, size]``.
        slope: F(Y), ``[samples, size]``.
        evaluations: evaluations of F each sample needed, ``[samples]``.
        residual: relative residual each sample stopped at, ``[samples]``.
        solved: which samples reached the tolerance (or came in non-finite), ``[samples]``.
    """

    value: Tensor
    slope: Tensor
    evaluations: Tensor
    residual: Tensor
    solved: Tensor


def _relative(change: Tensor, value: Tensor, base: Tensor) -> Tensor:
    """‖change‖ / max(‖value‖, ‖base‖) by sample: infinite if only the change is not zero, NaN if one is not finite."""
    norm, scale = _norm(change)[:, 0], torch.maximum(_norm(base), _norm(value))[:, 0]
    return torch.where(norm > 0, norm / scale, norm)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of the rows, kept as a column; no square in it overflows or underflows."""
    peak = x.abs().amax(dim=-1, keepdim=True)
    unit = x / torch.where(peak > 0, peak, 1.0)
    return peak * _dot(unit, unit).sqrt()


def predicted(last: Tensor, before: Tensor, ahead: Tensor | float, rows: Sequence[int]) -> Tensor:
    """The slope that a stage is guessed to have, on the line through those of the two stages before it.

    As Hairer & Wanner II, IV.8 start stages from the polynomial of the step before. A sample whose slopes differ by
    much is guessed to keep its last one.

    Args:
        ahead: how far, in times the distance of the two.
        rows: ``(samples, size)``, the shape in which a row is a sample.
    """
    change = ahead * (last - before)
    each, whole = change.reshape(*rows), last.reshape(*rows)
    follows = _dot(each, each) <= MOST_TREND**2 * _dot(whole, whole)
    return last + torch.where(follows, each, 0.0).reshape(last.shape)


def explicit_stage(function: Function, base: Tensor) -> Stage:
    """The stage of an explicit method: Y = base."""
    samples = base.shape[0]
    return Stage(
        value=base,
        slope=function(base),
        evaluations=torch.ones(samples, dtype=torch.long, device=base.device),
        residual=torch.zeros(samples, dtype=base.dtype, device=base.device),
        solved=torch.ones(samples, dtype=torch.bool, device=base.device),
    )


def anderson_stage(
    function: Function, base: Tensor, c: Tensor | float, guess: Tensor, tolerance: float, max_iterations: int
) -> Stage:
    """Solve Y = base + c F(Y) by Anderson acceleration (Walker & Ni 2011), started from ``guess``.

    Each step minimises the residual over the span of the last differences, as secants predict it. On linear problems
    this is GMRES, which is why stiff but small problems converge where plain iteration diverges. What lies outside the
    span is mixed in whole, and by half as much each time the residual has more than doubled.

    F is evaluated for all samples at once, and every residual is that of the latest evaluation: a sample that has come
    to rest stays where it is, and wakes when F, coupling samples, moves its residual again.

    Args:
        function: F, on ``[samples, size]``.
        base: ``[samples, size]``.
        c: a number, or one per sample ``[samples, 1]``.
        guess: the first iterate, ``[samples, size]``.
        tolerance: on rms(Y − base − c F(Y)) / max(rms(Y), rms(base)).
        max_iterations: evaluations of F after which a sample counts as failed.
    """
    value = guess
    slope = function(value)
    residual = base + c * slope - value
    broken = ~torch.isfinite(base).all(dim=1)  # propagates like any NaN; no iteration can help
    evaluations = torch.ones_like(broken, dtype=torch.long)
    mixing = torch.ones_like(base[:, :1])
    history: list[tuple[Tensor, Tensor]] = []  # (residual difference, iterate difference), the newest first
    while True:
        relative = torch.where(broken, 0.0, _relative(residual, value, base))
        lost = torch.isnan(relative) | (evaluations >= max_iterations)
        active = ~(broken | lost) & ~(relative <= tolerance)
        if not bool(active.any()):
            break
        rows = active[:, None]
        new_value = torch.where(rows, value + _anderson_step(residual, history, mixing), value)
        slope = function(new_value)
        new_residual = base + c * slope - new_value
        evaluations = evaluations + active
        # What the secants do not predict is mixed in more carefully once that has made things worse.
        worse = _norm(new_residual) > 2.0 * _norm(residual)
        mixing = torch.where(worse, 0.5 * mixing, mixing)
        history = [(new_residual - residual, new_value - value), *history[: ANDERSON_MEMORY - 1]]
        value, residual = new_value, new_residual
    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)


def _anderson_step(residual: Tensor, history: list[tuple[Tensor, Tensor]], mixing: Tensor) -> Tensor:
    """The iterate differences that the part of the residual in their span calls for, plus ``mixing`` times the rest.

    Modified Gram–Schmidt, the newest difference first, so that old ones never spoil new ones.
    """
    if not history:
        return mixing * residual
    differences, moves = (torch.stack(x) for x in zip(*history))
    whole, moved = _norm(differences), (moves != 0).any(dim=-1, keepdim=True)
    step = torch.zeros_like(residual)
    for k in range(len(history)):
        length = _norm(differences[k])
        # A sample that rested learnt nothing: its residual moved by its neighbours' doing.
        usable = (length > DEPENDENT * whole[k]) & torch.isfinite(length) & moved[k]
        safe = torch.where(usable, length, 1.0)
        q = torch.where(usable, differences[k] / safe, 0.0)
        x = torch.where(usable, moves[k] / safe, 0.0)
        along = _dot(q, residual)
        residual = residual - along * q
        step = step - along * x
        overlap = _dot(q, differences)
        differences = differences - overlap * q
        moves = moves - overlap * x
    return step + mixing * residual


#: Evaluations of f of a stage that is traced, which cannot stop when it is solved.
TRACED_ITERATIONS = {torch.float64: 32, torch.float32: 16}
#: Relative residual of a stage in a file above which it is NaN rather than wrong: examples were easier to solve.
LOST = 1e-3


def traced_stage(
    function: Function,
    base: Tensor,
    c: Tensor | float,
    guess: Tensor,
    tolerance: float,
    iterations: int,
    memory: int = ANDERSON_MEMORY,
    loop: Callable[..., Any] | None = None,
    lost: float | None = None,
) -> Tensor:
    """Solve Y = base + c F(Y) by a given number of evaluations of F, as few plain operations.

    Anderson acceleration as in :func:`anderson_stage`, but for the order of orthogonalisation: the oldest difference
    first, so that each is orthogonalised once, and all at once. Where the residual has more than doubled, which old
    differences did not foresee, they are forgotten. A sample that is solved stays where it is.
    Differentiated as a quasi-Newton iteration whose matrices are constants, the gradient converges with the iterates.

    Args:
        memory: differences kept.
        loop: ``(condition, body, values) -> values``, to take all evaluations but the first two in, which ends when
            all samples are solved; None to take them one after the other.
        lost: the relative residual above which a sample's result is NaN; None for the tolerance.

    Returns:
        F(Y) ``[samples, size]``.
    """
    whole = _dot(*[base.detach()] * 2)
    smallest = tolerance**2

    def evaluated(value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """F, the residual, its square and the square that it is relative to."""
        slope = function(value)
        residual = base + c * slope - value
        square, scale = _dot(*[residual.detach()] * 2), torch.maximum(whole, _dot(*[value.detach()] * 2))
        return slope, residual, square, scale

    def learnt(difference: Tensor, move: Tensor, *history: Tensor) -> tuple[Tensor, Tensor]:
        """One more orthonormal direction of residual differences, and the move behind it, ``[samples, 1, size]``."""
        length = _dot(difference, difference)
        if history:
            directions, moves = history
            overlap = difference[:, None] @ directions.mT
            difference = difference - (overlap @ directions)[:, 0]
            move = move - (overlap @ moves)[:, 0]
        left = _dot(difference, difference)
        useful = left > DEPENDENT**2 * length
        scale = torch.where(useful, torch.where(useful, left, 1.0).rsqrt(), 0.0)
        return (difference * scale)[:, None], (move * scale)[:, None]

    def improved(
        value: Tensor, residual: Tensor, square: Tensor, scale: Tensor, mixing: Tensor | None, *history: Tensor
    ) -> tuple[Tensor, ...]:
        """The state after one more evaluation, and the differences of residuals and iterates that it has made."""
        rest, along = residual, None
        if history:
            directions, moves = history
            along = residual[:, None] @ directions.mT
            rest = residual - (along @ directions)[:, 0]
        step = rest if mixing is None else mixing * rest
        if along is not None:
            step = step - (along @ moves)[:, 0]
        move = torch.where(square > smallest * scale, step, 0.0)
        value = value + move
        slope, after, square_after, scale = evaluated(value)
        worse = square_after > 4.0 * square
        mixing = torch.where(worse, 0.5, 1.0) if mixing is None else torch.where(worse, 0.5 * mixing, mixing)
        return slope, value, after, square_after, scale, mixing, (after - residual).detach(), move.detach()

    def again(slope: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The same with the directions and moves that are kept: none where the residual has more than doubled."""
        value, residual, square, scale, mixing, difference, move, *before = state
        new = learnt(difference, move, *before)
        history = [torch.cat(x, dim=1) for x in zip(before, new)] if before else list(new)
        after = improved(value, residual, square, scale, mixing, *history)
        worse = (after[5] < mixing)[:, None]
        return (*after, *(torch.where(worse, 0.0, x[:, 1 - memory :]) for x in history))

    slope, residual, square, scale = evaluated(guess)
    value = guess
    state: tuple[Tensor, ...] = (slope, value, residual, square, scale)
    if iterations > 1:
        state = improved(value, residual, square, scale, None)
    if loop is None:
        for _ in range(2, iterations):
            state = again(*state)
    elif iterations > 2:
        # What the latest evaluation has taught is learnt when it is known that there will be another.
        def more(k: Tensor, _: Tensor, __: Tensor, ___: Tensor, square: Tensor, scale: Tensor, *____: Tensor) -> Tensor:
            return (k < iterations) & (square > smallest * scale).any()

        def body(k: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return (k + 1, *(x.contiguous() for x in again(*state)))

        # Not of nothing, which a loop in a loop cannot take.
        start = torch.full_like(square[0, 0], 2, dtype=torch.long)
        nothing = torch.zeros_like(value)[:, None].expand(-1, memory - 1, -1)
        _, *state = loop(more, body, (start, *(x.contiguous().clone() for x in (*state, nothing, nothing))))
    slope, value, residual, square, scale = state[:5]
    if lost is None:
        solved = (_relative(residual.detach(), value.detach(), base.detach()) <= tolerance)[:, None]
    else:
        solved = (square <= lost**2 * scale) & (scale < inf)
    return torch.where(solved, slope, torch.nan)


def newton_stage(
    function: Function,
    jacobian: Function,
    base: Tensor,
    c: Tensor | float,
    guess: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Stage:
    """Solve Y = base + c F(Y) by Newton's method with a dense Jacobian per sample, for small stiff systems.

    The Jacobian is kept while it serves and renewed when convergence slows (Hairer & Wanner II, IV.8). Where F couples
    samples it is a part of the true one, which slows convergence but never changes the result: every residual is that
    of the whole. Stops on the error that the corrections let expect, rate/(1 − rate) times the latest, which stays
    meaningful where c F is so large that the residual drowns in rounding.

    Args:
        function, base, c, guess, tolerance, max_iterations: as for :func:`anderson_stage`.
        jacobian: ∂F/∂Y of each sample, ``[samples, size, size]``.
    """
    identity = torch.eye(base.shape[1], dtype=base.dtype, device=base.device)
    factor = c[:, :, None] if isinstance(c, Tensor) else c
    value, slope = guess, function(guess)
    broken = ~torch.isfinite(base).all(dim=1)
    evaluations = torch.ones_like(broken, dtype=torch.long)
    relative = torch.where(broken, 0.0, torch.full_like(base[:, 0], torch.inf))
    before = torch.full_like(relative, torch.inf)
    renew, pivots = True, None
    while True:
        if renew:
            matrix = identity - factor * jacobian(value)
            matrix = torch.where(torch.isfinite(matrix).all(dim=(1, 2), keepdim=True), matrix, identity)
            pivots, fresh = torch.linalg.lu_factor_ex(matrix)[:2], True
        assert pivots is not None
        correction = torch.linalg.lu_solve(*pivots, (base + c * slope - value)[..., None])[..., 0]
        size = _relative(correction, value, base)
        # No rate is known of the first correction; a Jacobian of the place is taken to converge at least by half.
        rate = torch.where(torch.isinf(before), 0.5, size / before).clamp(max=0.999)
        error = torch.where(size == 0, size, size * torch.maximum(rate / (1 - rate), torch.full_like(rate, 1e-3)))
        lost = ~torch.isfinite(size) | (evaluations >= max_iterations)
        relative = torch.where(broken, 0.0, torch.where(torch.isfinite(size), error, torch.inf))
        active = ~(broken | lost)
        value = torch.where(active[:, None], value + correction, value)
        slope = function(value)
        evaluations = evaluations + active
        if not bool((active & ~(relative <= tolerance)).any()):
            break
        slow = active & (relative > tolerance) & (rate > 0.3)
        renew = bool(slow.any()) and not fresh
        before, fresh = (torch.full_like(size, torch.inf) if renew else size), False
    return Stage(value, slope, evaluations, relative, solved=(relative <= tolerance) | broken)


#: Of the residual, by which each linear system of Newton–Krylov is solved; dimensions of its largest Krylov space.
FORCING, KRYLOV_DIMENSIONS = 1e-4, 60
#: Of the residual, that a linear system leaves at best if it is given up.
STAGNATION = 0.9
#: Corrections of Newton–Krylov where another stage solver failed.
RESCUE_CORRECTIONS = 10


def krylov_stage(
    function: Function, base: Tensor, c: Tensor | float, guess: Tensor, tolerance: float, max_iterations: int
) -> Stage:
    """Solve Y = base + c F(Y) by Newton's method whose linear systems GMRES solves (Knoll & Keyes 2004).

    No Jacobian is formed: its products with vectors are differences of F, so that any F will do, image-sized and stiff.
    All samples together are one system, whether F couples them or not.

    Args:
        function, base, c, guess, tolerance: as for :func:`anderson_stage`.
        max_iterations: corrections; each takes up to ``KRYLOV_DIMENSIONS`` evaluations of F.
    """
    broken = ~torch.isfinite(base).all(dim=1)
    alive = ~broken[:, None]
    value, slope = guess, function(guess)
    evaluations = 1
    epsilon = torch.finfo(base.dtype).eps ** 0.5
    relative = torch.full_like(base[:, 0], torch.inf)
    for _ in range(max_iterations):
        residual = torch.where(alive, base + c * slope - value, 0.0)
        relative = _together(residual, value, base, alive)
        if bool((relative <= tolerance).all()) or not bool(torch.isfinite(relative).all()):
            break
        scale = torch.where(alive, value, 0.0).norm().clamp_min(1.0)
        here, start = slope, value

        def product(v: Tensor, here: Tensor = here, start: Tensor = start, scale: Tensor = scale) -> Tensor:
            """(I − c J) v."""
            nonlocal evaluations
            evaluations += 1
            step = epsilon * scale / v.norm()
            return torch.where(alive, v - c * (function(start + step * v) - here) / step, 0.0)

        correction, left = gmres(product, residual, FORCING, KRYLOV_DIMENSIONS)
        if left > STAGNATION:
            break
        value = value + correction
        slope = function(value)
        evaluations += 1
        small = _together(correction, value, base, alive)
        if left <= 10 * FORCING and bool((small <= tolerance).all()):
            # The residual may drown in rounding where c F is large; the correction does not.
            relative = torch.minimum(small, _together(base + c * slope - value, value, base, alive))
            break
    relative = torch.where(broken, 0.0, relative)
    counts = torch.full_like(broken, evaluations, dtype=torch.long)
    return Stage(value, slope, counts, relative, solved=relative <= tolerance)


def _together(change: Tensor, value: Tensor, base: Tensor, alive: Tensor) -> Tensor:
    """The relative size of a change of the samples that are ``alive`` taken as one, for each of them."""
    rows = (torch.where(alive, x, 0.0).reshape(1, -1) for x in (change, value, base))
    return _relative(*rows).expand(len(change))


def gmres(product: Function, target: Tensor, tolerance: float, dimensions: int) -> tuple[Tensor, float]:
    """x with ‖target − A x‖ ≤ tolerance ‖target‖, or the best of a Krylov space (Saad & Schultz 1986).

    Also returns ‖target − A x‖ / ‖target‖; x is 0 where A x is not finite.

    Args:
        product: x to A x, for tensors of the shape of ``target``.
        dimensions: of the largest Krylov space.
    """
    size, dimensions = target.norm(), min(dimensions, target.numel())
    if not bool(size > 0):
        return torch.zeros_like(target), 0.0
    basis = [target / size]
    hessenberg = torch.zeros(dimensions + 1, dimensions, dtype=torch.float64)
    right = torch.zeros(dimensions + 1, dtype=torch.float64)
    right[0] = float(size)
    solution = torch.zeros(0, dtype=torch.float64)
    for k in range(dimensions):
        w = product(basis[k])
        for _ in range(2):  # orthogonalised twice is enough (Giraud & Langou 2002)
            for i, v in enumerate(basis):
                overlap = (w * v).sum()
                w = w - overlap * v
                hessenberg[i, k] += float(overlap)
        length = float(w.norm())
        if not isfinite(length):
            return torch.zeros_like(target), inf
        hessenberg[k + 1, k] = length
        matrix = hessenberg[: k + 2, : k + 1]
        solution = torch.linalg.lstsq(matrix, right[: k + 2]).solution
        left = float((right[: k + 2] - matrix @ solution).norm())
        if left <= tolerance * float(size) or length <= 1e-14 * float(size):
            break
        basis.append(w / length)
    total = torch.zeros_like(target)
    for weight, v in zip(solution.tolist(), basis):
        total.add_(v, alpha=weight)
    return total, left / float(size)


@dataclass(frozen=True)
class StageSolver:
    """How stage equations are solved, and what to say when they are not.

    Attributes:
        name: ``"anderson"``, ``"newton"`` or ``"krylov"``.
        tolerance: relative residual (Anderson) or correction (Newton) of a solved stage.
        max_iterations: evaluations of f that one stage may take.
    """

    name: str
    tolerance: float
    max_iterations: int

    def solve(
        self,
        function: Callable[[Tensor], Tensor],
        jacobian: Callable[[Tensor], Tensor],
        base: Tensor,
        c: float | Tensor,
        guess: Tensor,
    ) -> Stage:
        """Solve Y = base + c F(Y), without judging the outcome. ``c`` is a number or ``[samples]``."""
        if not isinstance(c, Tensor) and c == 0.0:
            return explicit_stage(function, base)
        factor = column(c, base)
        arguments = (base, factor, guess, self.tolerance)
        if self.name == "krylov":
            return krylov_stage(function, *arguments, self.max_iterations)
        if self.name == "newton":
            stage = newton_stage(function, jacobian, *arguments, self.max_iterations)
        else:
            stage = anderson_stage(function, *arguments, self.max_iterations)
        if bool(stage.solved.all()):
            return stage
        # They iterate sample by sample, which an F that couples samples may not bear; then all are one system.
        together = krylov_stage(function, *arguments, RESCUE_CORRECTIONS)
        together.evaluations += stage.evaluations
        return together if bool(together.solved.all()) else stage

    def check(self, stage: Stage, t: Time, h: Time, sweep: str) -> None:
        """Raise StageSolveError if a sample's stage was not solved."""
        failed = ~stage.solved
        if bool(failed.any()):
            first = int(failed.nonzero()[0])
            raise StageSolveError(
                f"{int(failed.sum())} of {failed.numel()} samples (the first is number {first}) did not solve"
                f" {self.describe(stage, t, h, sweep)(first)}"
            )

    def describe(self, stage: Stage, t: Time, h: Time, sweep: str) -> Callable[[int], str]:
        """What happened to a sample whose stage was not solved, by its number."""
        remedy = "use adjoint='discrete'" if sweep == "reversed" else "take smaller steps"
        if self.name == "anderson":
            remedy += ", for a stiff state use options={'stage_solver': 'krylov'} or, if it is small, 'newton'"
        return lambda sample: (
            f"the {sweep} stage equation at t={_number(t, sample):.6g} with h={_number(h, sample):.3g}: relative"
            f" residual {float(stage.residual[sample]):.1e} after {int(stage.evaluations[sample])} evaluations,"
            f" tolerance {self.tolerance:.1e}; {remedy}, or loosen options={{'stage_tolerance': ...}}"
        )


def _number(value: Time, sample: int) -> float:
    return float(value[sample]) if isinstance(value, Tensor) else value


def column(h: Time, rows: Tensor) -> Tensor | float:
    """A number, or one per sample, as a factor of ``rows``."""
    return h[:, None].to(rows.dtype) if isinstance(h, Tensor) else h
