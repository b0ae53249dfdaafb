"""Adaptive dopri5 of nodeshape beside torchdiffeq's on a spiral and on DETEST: evaluations of f, error and time.

    pip install torchdiffeq
    python benchmarks/detest.py              # the tables, in about ten minutes
    python benchmarks/detest.py D5 E2        # some problems only

DETEST: Hull, Enright, Fellen & Sedgwick, *Comparing numerical methods for ordinary differential equations*, SIAM J.
Numer. Anal. 9 (1972), 603-637. Each problem goes from t=0 to t=20 in float64 with rtol = atol and is observed at 0, 1,
..., 20. Its error is the root mean square of (y - reference) / (1 + |reference|) over components and times; the
reference is SciPy's DOP853 at 3e-14.

With one tolerance two solvers make different errors, so evaluations are compared at equal error: each library solves at
33 tolerances, and what an error costs is read off its curve of the fewest evaluations that reach it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from math import exp, inf, isfinite, log, sqrt
from statistics import geometric_mean, median

import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from torch import Tensor

import nodeshape as ns

torch.set_default_dtype(torch.float64)

END = 20.0
TIMES = torch.linspace(0.0, END, 21)
TOLERANCES = (1e-3, 1e-6, 1e-9)
SWEEP = [10 ** (-2 - k / 4) for k in range(33)]
REPEATS = 5

Field = Callable[[Tensor, Tensor], Tensor]
Problem = tuple[Field, Tensor]
Solve = Callable[..., Tensor]

SOLVERS: dict[str, Solve] = {"torchdiffeq": torchdiffeq.odeint, "nodeshape": ns.odeint}


# ---- Problems: f and y(0) ------------------------------------------------------------------------------------------


def spiral() -> Problem:
    """torchdiffeq's demonstration: a cubic spiral into the origin."""
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    return (lambda t, y: y**3 @ matrix), torch.tensor([2.0, 0.0])


def a1() -> Problem:
    """Exponential decay."""
    return (lambda t, y: -y), torch.tensor([1.0])


def a2() -> Problem:
    """A Riccati equation."""
    return (lambda t, y: -(y**3) / 2), torch.tensor([1.0])


def a3() -> Problem:
    """An oscillation."""
    return (lambda t, y: y * torch.cos(t)), torch.tensor([1.0])


def a4() -> Problem:
    """Logistic growth."""
    return (lambda t, y: y / 4 * (1 - y / 20)), torch.tensor([1.0])


def a5() -> Problem:
    """A spiral curve."""
    return (lambda t, y: (y - t) / (y + t)), torch.tensor([4.0])


def b1() -> Problem:
    """Two populations in conflict."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        met = y[0] * y[1]
        return torch.stack([2 * (y[0] - met), met - y[1]])

    return field, torch.tensor([1.0, 3.0])


def linear(matrix: Tensor, y0: Tensor) -> Problem:
    return (lambda t, y: matrix @ y), y0


def b2() -> Problem:
    """A linear chemical reaction."""
    return linear(torch.tensor([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]]), torch.tensor([2.0, 0.0, 1.0]))


def b3() -> Problem:
    """A nonlinear chemical reaction."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        made = y[1] * y[1]
        return torch.stack([-y[0], y[0] - made, made])

    return field, torch.tensor([1.0, 0.0, 0.0])


def b4() -> Problem:
    """The integral surface of a torus."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        x, z = y[0] / torch.hypot(y[0], y[1]), y[1] / torch.hypot(y[0], y[1])
        return torch.stack([-y[1] - x * y[2], y[0] - z * y[2], x])

    return field, torch.tensor([3.0, 0.0, 0.0])


def b5() -> Problem:
    """Euler's equations of a rigid body."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]])

    return field, torch.tensor([0.0, 1.0, 1.0])


def first_of(n: int) -> Tensor:
    return torch.eye(n)[0]


def chain(rates: Tensor) -> Problem:
    """Radioactive decay along a chain of which the last element is stable."""
    return linear(torch.diag(rates, -1) - torch.diag(torch.cat([rates, torch.zeros(1)])), first_of(len(rates) + 1))


def heat(n: int) -> Problem:
    """Heat in a rod of n points."""
    line = torch.diag(torch.ones(n - 1), 1)
    return linear(line + line.T - 2 * torch.eye(n), first_of(n))


def c5() -> Problem:
    """The Sun and its five outer planets; the state is positions, then velocities, ``[2, 5, 3]``."""
    gravity, sun = 2.95912208286, 1.00000597682
    masses = torch.tensor(
        [0.954786104043e-3, 0.285583733151e-3, 0.437273164546e-4, 0.517759138449e-4, 0.277777777778e-5]
    )
    places = [
        [3.42947415189, 3.35386959711, 1.35494901715],
        [6.64145542550, 5.97156957878, 2.18231499728],
        [11.2630437207, 14.6952576794, 6.27960525067],
        [-30.1552268759, 1.65699966404, 1.43785752721],
        [-21.1238353380, 28.4465098142, 15.388265967],
    ]
    speeds = [
        [-0.557160570446, 0.505696783289, 0.230578543901],
        [-0.415570776342, 0.365682722812, 0.169143213293],
        [-0.325325669158, 0.189706021964, 0.0877265322780],
        [-0.0240476254170, -0.287659532608, -0.117219543175],
        [-0.176860753121, -0.216393453025, -0.0148647893090],
    ]
    apart = 1.0 - torch.eye(5)

    def field(t: Tensor, y: Tensor) -> Tensor:
        place, speed = y
        towards_sun = place / place.norm(dim=1, keepdim=True) ** 3
        between = place[None] - place[:, None]  # [of, to, 3]
        cubes = (between.square().sum(2) + torch.eye(5)) ** 1.5
        pulls = ((apart / cubes)[:, :, None] * between - (apart[:, :, None] * towards_sun[None])) * masses[:, None]
        return torch.stack([speed, gravity * (pulls.sum(1) - (sun + masses)[:, None] * towards_sun)])

    return field, torch.tensor([places, speeds])


def orbit(eccentricity: float) -> Problem:
    """Two bodies; the state is the position in the plane, then the velocity."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[2:], -y[:2] / torch.hypot(y[0], y[1]) ** 3])

    return field, torch.tensor([1 - eccentricity, 0.0, 0.0, sqrt((1 + eccentricity) / (1 - eccentricity))])


def second_order(acceleration: Callable[[Tensor, Tensor, Tensor], Tensor], y0: list[float]) -> Problem:
    """y'' = acceleration(t, y, y')."""
    return (lambda t, y: torch.stack([y[1], acceleration(t, y[0], y[1])])), torch.tensor(y0)


def e1() -> Problem:
    """Bessel's equation of order 1/2."""
    return second_order(
        lambda t, y, v: -(v / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y), [0.6713967071418030, 0.09540051444747446]
    )


def e2() -> Problem:
    """Van der Pol's equation."""
    return second_order(lambda t, y, v: (1 - y * y) * v - y, [2.0, 0.0])


def e3() -> Problem:
    """Duffing's equation."""
    return second_order(lambda t, y, v: y**3 / 6 - y + 2 * torch.sin(2.78535 * t), [0.0, 0.0])


def e4() -> Problem:
    """A fall through air."""
    return second_order(lambda t, y, v: 0.032 - 0.4 * v * v, [30.0, 0.0])


def e5() -> Problem:
    """A linear pursuit."""
    return second_order(lambda t, y, v: torch.sqrt(1 + v * v) / (25 - t), [0.0, 0.0])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "spiral": spiral,
    **{"A1": a1, "A2": a2, "A3": a3, "A4": a4, "A5": a5},
    **{"B1": b1, "B2": b2, "B3": b3, "B4": b4, "B5": b5},
    "C1": lambda: chain(torch.ones(9)),
    "C2": lambda: chain(torch.arange(1.0, 10.0)),
    "C3": lambda: heat(10),
    "C4": lambda: heat(51),
    "C5": c5,
    **{f"D{k + 1}": lambda e=e: orbit(e) for k, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))},
    **{"E1": e1, "E2": e2, "E3": e3, "E4": e4, "E5": e5},
}


# ---- Measurements --------------------------------------------------------------------------------------------------


@cache
def reference(name: str) -> Tensor:
    """The states at ``TIMES``, ``[21, *y0.shape]``."""
    field, y0 = PROBLEMS[name]()

    def flat(t: float, y: object) -> object:
        return field(torch.tensor(t), torch.as_tensor(y).reshape(y0.shape)).reshape(-1).numpy()

    found = solve_ivp(flat, (0.0, END), y0.reshape(-1).numpy(), "DOP853", TIMES.numpy(), rtol=3e-14, atol=3e-14)
    return torch.from_numpy(found.y.T.copy()).reshape(-1, *y0.shape)


def solve(library: str, name: str, tolerance: float, times: Tensor = TIMES) -> tuple[Tensor, int]:
    """The states at ``times`` and how often f was evaluated."""
    field, y0 = PROBLEMS[name]()
    evaluations = 0

    def counted(t: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return field(t, y)

    with torch.no_grad():
        states = SOLVERS[library](counted, y0, times, rtol=tolerance, atol=tolerance, method="dopri5")
    return states, evaluations


@cache
def measured(library: str, name: str, tolerance: float) -> tuple[float, int]:
    """The error, infinite where the solve fails, and the evaluations of f."""
    try:
        states, evaluations = solve(library, name, tolerance)
    except (AssertionError, ns.StepSizeError):  # torchdiffeq asserts
        return inf, 0
    exact = reference(name)
    return float(((states - exact) / (1 + exact.abs())).square().mean().sqrt()), evaluations


def cost(library: str, name: str, error: float) -> float:
    """The fewest evaluations that reach an error, interpolated in logarithms between tolerances of the sweep."""
    curve: list[tuple[float, float]] = []  # falling errors, rising evaluations
    for found, evaluations in sorted((measured(library, name, x) for x in SWEEP), key=lambda pair: pair[1]):
        if isfinite(found) and (not curve or found < curve[-1][0]):
            curve.append((found, evaluations))
    for (coarse, few), (fine, many) in pairwise(curve):
        if fine <= error <= coarse:
            return exp(log(few) + log(many / few) * log(error / coarse) / log(fine / coarse))
    return curve[0][1] if error > curve[0][0] else curve[-1][1]


def seconds(name: str, tolerance: float) -> dict[str, float]:
    """The median of some solves by each library in turn."""
    found: dict[str, list[float]] = {library: [] for library in SOLVERS}
    field, y0 = PROBLEMS[name]()
    with torch.no_grad():
        for _ in range(REPEATS):
            for library, run in SOLVERS.items():
                start = time.perf_counter()
                run(field, y0, TIMES, rtol=tolerance, atol=tolerance, method="dopri5")
                found[library].append(time.perf_counter() - start)
    return {library: median(times) for library, times in found.items()}


def check_that_observations_are_free(name: str) -> None:
    """Raise AssertionError where 1,000 observation times cost nodeshape more than two."""
    for tolerance in TOLERANCES:
        _, few = solve("nodeshape", name, tolerance, torch.tensor([0.0, END]))
        _, many = solve("nodeshape", name, tolerance, torch.linspace(0.0, END, 1000))
        assert many <= few, f"{name} at {tolerance:g}: {many} evaluations for 1,000 times, {few} for two"


def main() -> None:
    names = sys.argv[1:] or list(PROBLEMS)
    torch.set_num_threads(1)
    print("torch", version("torch"), " torchdiffeq", version("torchdiffeq"))
    for name in names:
        check_that_observations_are_free(name)
    print("1,000 observation times cost no more evaluations than two, on each problem at each tolerance.")
    summary = []
    for tolerance in TOLERANCES:
        print(
            f"\nrtol = atol = {tolerance:g}; the ratios are torchdiffeq's over nodeshape's, above 1 is better here\n\n"
            "| problem | evaluations | error | torchdiffeq: evaluations | error | ratio of evaluations at equal error"
            " | milliseconds | torchdiffeq's | ratio |\n|---|---|---|---|---|---|---|---|---|"
        )
        at_equal_error, in_time = [], []
        for name in names:
            (error, evaluations), (their_error, theirs) = (
                measured(x, name, tolerance) for x in ("nodeshape", "torchdiffeq")
            )
            ratio = cost("torchdiffeq", name, their_error) / cost("nodeshape", name, their_error)
            took = seconds(name, tolerance)
            speed = took["torchdiffeq"] / took["nodeshape"]
            at_equal_error.append(ratio)
            in_time.append(speed)
            print(
                f"| {name} | {evaluations} | {error:.1e} | {theirs} | {their_error:.1e} | {ratio:.2f}"
                f" | {1e3 * took['nodeshape']:.1f} | {1e3 * took['torchdiffeq']:.1f} | {speed:.2f} |",
                flush=True,
            )
        for what, ratios in (("evaluations at equal error", at_equal_error), ("time", in_time)):
            summary.append(
                f"| {tolerance:g} | {what} | {geometric_mean(ratios):.2f} | {min(ratios):.2f}"
                f" | {sum(x >= 0.995 for x in ratios)} of {len(ratios)} |"
            )
    print("\n| rtol = atol | ratio of | geometric mean | least | at least 1 (rounded) |\n|---|---|---|---|---|")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
