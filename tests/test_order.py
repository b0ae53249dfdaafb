"""Order of convergence, and the times at which f is evaluated."""

from __future__ import annotations

import pytest
import torch
from problems import METHODS, ORDER, THETA, orders
from torch import Tensor

import nodeshape as ns


def logistic(t: Tensor, y: Tensor) -> Tensor:
    """y' = y (1 − y) cos t: nonlinear and time-dependent."""
    return y * (1 - y) * torch.cos(t)


def logistic_solution(y0: Tensor, t: float) -> Tensor:
    growth = torch.exp(torch.sin(torch.tensor(t, dtype=torch.float64)))
    return y0 * growth / (1 - y0 + y0 * growth)


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_at_the_methods_order_over_six_halvings(method: str) -> None:
    y0 = torch.tensor([[0.1, 0.5], [0.8, 0.3]], dtype=torch.float64)
    exact = logistic_solution(y0, 2.0)
    errors = []
    for k in range(7):
        ys = ns.odeint(logistic, y0, torch.tensor([0.0, 2.0]), method=method, steps=20 * 2**k)
        errors.append(float((ys[-1] - exact).abs().max()))
    assert orders(errors) == pytest.approx([ORDER[method]] * 6, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_conv_dynamics_converges_at_the_methods_order_where_no_relu_switches(method: str) -> None:
    torch.manual_seed(0)
    func = ns.ConvDynamics(4).double()
    for norm in (func.norm1, func.norm2):  # every ReLU open: smooth dynamics
        torch.nn.init.constant_(norm.bias, 6.0)
    y0 = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0])
    steps = [10 * 2**k for k in range(6)]
    exact = _richardson(func, y0, t)
    errors = _errors(func, y0, t, method, steps, exact)
    assert orders(errors) == pytest.approx([ORDER[method]] * 5, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_conv_dynamics_with_relu_kinks_keeps_the_order_on_average(method: str) -> None:
    torch.manual_seed(0)
    func = ns.ConvDynamics(4).double()
    y0 = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0])
    exact = _richardson(func, y0, t)
    steps = [20 * 2**k for k in range(6)]
    errors = _errors(func, y0, t, method, steps, exact)
    # A step across a kink errs by O(h²), whatever the method; there are finitely many such steps.
    assert sum(orders(errors)) / 5 == pytest.approx(ORDER[method], abs=0.3 if method == "implicit_midpoint" else 0.05)


def _errors(func: torch.nn.Module, y0: Tensor, t: Tensor, method: str, steps: list[int], exact: Tensor) -> list[float]:
    with torch.no_grad():
        return [float((ns.odeint(func, y0, t, method=method, steps=n)[-1] - exact).norm()) for n in steps]


@torch.no_grad()
def _richardson(func: torch.nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    coarse, fine = (ns.odeint(func, y0, t, method="implicit_midpoint", steps=n)[-1] for n in (600, 1200))
    return fine + (fine - coarse) / 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, -0.5)])
def test_f_is_evaluated_at_the_stage_time_of_every_step_and_nowhere_else(
    method: str, ends: tuple[float, float]
) -> None:
    times: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t))
        return -y

    t = torch.tensor([ends[0], sum(ends) / 2, ends[1]], dtype=torch.float64)
    y0 = torch.ones(3, dtype=torch.float64)
    _, stats = ns.odeint(func, y0, t, method=method, steps=4, return_stats=True)
    h = (ends[1] - ends[0]) / 8
    stages = [ends[0] + (k + THETA[method]) * h for k in range(8)]
    assert len(times) == int(stats.nfe_forward)
    if method == "euler":
        assert times == pytest.approx(stages)
    assert list(dict.fromkeys(round(x, 12) for x in times)) == pytest.approx(stages)


def test_step_size_takes_the_fewest_equal_steps_no_longer_than_it() -> None:
    y0, t = torch.ones(1, 1), torch.tensor([0.0, 1.0, 1.25], dtype=torch.float64)
    # In each interval; the option of torchdiffeq lays them from the first time to the last.
    for step_size, expected, on_grid in ((0.1, 10 + 3, 13), (0.3, 4 + 1, 5), (5.0, 2, 1), (1 / 3, 3 + 1, 4)):
        for asked, count in (({"step_size": step_size}, expected), ({"options": {"step_size": step_size}}, on_grid)):
            _, stats = ns.odeint(lambda t, y: -y, y0, t, method="euler", return_stats=True, **asked)
            assert stats.accepted.tolist() == [count]
