"""A sample's result does not depend on its batch-mates."""

from __future__ import annotations

import pytest
import torch
from problems import METHODS
from torch import Tensor

import nodeshape as ns


def mixed(t: Tensor, y: Tensor) -> Tensor:
    """y' = a sin(y) cos(t) + b y with a, b carried along: the rows below are mild, stiff, diverging."""
    x, a, b = y.unbind(dim=1)
    return torch.stack([a * torch.sin(x) * torch.cos(t) + b * x, torch.zeros_like(x), torch.zeros_like(x)], dim=1)


ROWS = {
    "mild": [0.7, 1.0, -0.5],
    "mild too": [-2.0, 0.5, 0.1],
    "stiff": [1.0, 3.0, -400.0],
    "diverging": [1.0, 0.0, 30.0],
    "nan": [float("nan"), 1.0, 1.0],
    "infinite": [float("inf"), 1.0, 1.0],
}
OWN = {"step_control": "per_sample", "on_failure": "nan"}
CHOICES = {"fixed steps": {"steps": 40}, "error control": {"rtol": 1e-3, "atol": 1e-4, "options": OWN}}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_solved_alone_as_in_a_batch_of_stiff_diverging_and_nan_samples(method: str, choice: str) -> None:
    batch = torch.tensor(list(ROWS.values()), dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0])
    solve = {"method": method, **CHOICES[choice]}
    together, stats = ns.odeint(mixed, batch, t, return_stats=True, **solve)
    to_together = torch.autograd.grad(together[:, :3].square().sum(), batch)[0]
    for i, name in enumerate(ROWS):
        row = batch[i : i + 1].detach().requires_grad_()
        alone, stats_alone = ns.odeint(mixed, row, t, return_stats=True, **solve)
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-12, atol=0.0, equal_nan=True, msg=name)
        assert int(stats.accepted[i]) == int(stats_alone.accepted[0])
        if i < 3:
            to_alone = torch.autograd.grad(alone.square().sum(), row)[0]
            torch.testing.assert_close(to_alone[0], to_together[i], rtol=1e-12, atol=1e-300, msg=name)
    assert together[1:, 4].isnan().any(dim=-1).all() and torch.isfinite(together[:, :2]).all()


def test_explicit_euler_overflows_to_infinity_without_touching_the_others() -> None:
    y0 = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    rates = torch.tensor([[-1.0], [-1e4]], dtype=torch.float64)
    ys = ns.odeint(lambda t, y: rates * y, y0, [0.0, 400.0], method="euler", steps=400)
    assert float(ys[-1, 0]) == 0.0 and not torch.isfinite(ys[-1, 1])


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_growth_past_the_largest_number_is_infinite_or_an_error_but_never_finite(method: str) -> None:
    y0 = torch.ones(1, 1, dtype=torch.float64)
    try:
        ys = ns.odeint(lambda t, y: 8 * y, y0, [0.0, 200.0], method=method, steps=2000)
    except ns.StageSolveError:
        assert method != "euler"
    else:
        assert not torch.isfinite(ys[-1]).any()
