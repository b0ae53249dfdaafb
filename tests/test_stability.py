"""Stability, stiffness and invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import METHODS, THETA
from torch import Tensor

import nodeshape as ns

#: R(z) = (1 + (1 − θ) z) / (1 − θ z): what one step multiplies y by on y' = λ y, z = h λ.
STIFF = 50.0


@pytest.mark.parametrize("stage_solver", ["anderson", "newton"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stiff_linear_problem_follows_the_exact_stability_function(method: str, stage_solver: str) -> None:
    h, theta = 0.1, THETA[method]
    factor = (1 - (1 - theta) * STIFF) / (1 + theta * STIFF)
    y0 = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)
    t = torch.arange(9, dtype=torch.float64) * h
    ys = ns.odeint(lambda t, y: -STIFF / h * y, y0, t, method=method, steps=1, options={"stage_solver": stage_solver})
    expected = torch.tensor([factor**k for k in range(9)], dtype=torch.float64)[:, None, None] * y0
    assert ((ys - expected).abs() <= 1e-12 * expected.abs()).all()
    if method == "euler":
        assert float(ys[-1, 0, 0]) == pytest.approx(abs(1 - STIFF) ** 8, rel=1e-12)  # the blow-up
    elif method == "implicit_midpoint":
        assert (ys[1:].abs() < ys[:-1].abs()).all()  # stable for every step


@pytest.mark.parametrize("intervals", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_the_midpoint_rule_keeps_a_quadratic_invariant_over_thousands_of_steps(intervals: int) -> None:
    def rotation(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[:, 1], y[:, 0]], dim=1) * (1 + 0.5 * torch.sin(t))

    y0 = torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=torch.float64)
    t = torch.linspace(0, 20 * intervals, intervals + 1, dtype=torch.float64)
    with torch.no_grad():
        ys = ns.odeint(rotation, y0, t, method="implicit_midpoint", steps=1000)
        coarse = ns.odeint(rotation, y0, t[:2], method="implicit_euler", steps=1000)
    radius = ys.square().sum(dim=2)
    assert float((radius / radius[0] - 1).abs().max()) < 1e-10
    assert float(coarse[-1].square().sum()) < 0.99 * float(radius[0].sum())  # which backward Euler does not


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    x, v = y[:, 0], y[:, 1]
    return torch.stack([v, 1000.0 * (1 - x * x) * v - x], dim=1)


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(dim=1)
    slow, fast, reverse = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([reverse - slow, slow - reverse - fast, fast], dim=1)


PROBLEMS = {
    "van der pol, mu=1000": (van_der_pol, [2.0, 0.0], [0.0, 300.0, 700.0, 1200.0]),
    "robertson": (robertson, [1.0, 0.0, 0.0], [0.0, 0.4, 4.0, 40.0, 400.0, 4000.0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("method", "rtol", "bound"), [("implicit_euler", 1e-4, 2e-2), ("implicit_midpoint", 1e-5, 1e-3)]
)
def test_stiff_problems_agree_with_radau(method: str, rtol: float, bound: float, name: str) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    func, y0, times = PROBLEMS[name]

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return func(torch.tensor(t), torch.from_numpy(y)[None])[0].numpy()

    radau = integrate.solve_ivp(field, (times[0], times[-1]), y0, method="Radau", t_eval=times, rtol=1e-10, atol=1e-13)
    expected = torch.from_numpy(radau.y.T)
    scale = expected.abs().amax(dim=0)
    options = {"stage_solver": "newton", "max_steps": 100_000}
    state = torch.tensor([y0], dtype=torch.float64)
    with torch.no_grad():
        ys, stats = ns.odeint(
            func,
            state,
            torch.tensor(times),
            method=method,
            rtol=rtol,
            atol=rtol * 1e-4,
            options=options,
            return_stats=True,
        )
    error = float(((ys[:, 0] - expected).abs() / scale).max())
    print(f"{name}, {method}: error {error:.1e}, {int(stats.accepted)} steps, {int(stats.nfe_forward)} evaluations")
    assert error < bound
