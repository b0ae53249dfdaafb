"""The stage solver: Anderson acceleration and Newton, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nodeshape as ns
from nodeshape._ode.stage import STAGE_TOLERANCE, anderson_stage, newton_stage, predicted

IMPLICIT = ("implicit_euler", "implicit_midpoint")


def _residual(function: object, base: Tensor, c: float, value: Tensor) -> float:
    return float((base + c * function(value) - value).abs().max() / value.abs().max())  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anderson_solves_to_the_tolerance_of_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=dtype)
    base = torch.randn(5, 6, dtype=dtype)
    stage = anderson_stage(lambda y: torch.tanh(y @ matrix), base, 0.3, base, STAGE_TOLERANCE[dtype], 50)
    assert stage.solved.all()
    assert (stage.residual <= STAGE_TOLERANCE[dtype]).all()
    assert _residual(lambda y: torch.tanh(y @ matrix), base, 0.3, stage.value) < 10 * STAGE_TOLERANCE[dtype]


def test_anderson_solves_a_stiff_linear_stage_on_which_plain_iteration_diverges() -> None:
    rates = torch.tensor([[-3000.0, -40.0, -1.0]], dtype=torch.float64)  # three eigenvalues: three history columns
    base = torch.ones(2, 3, dtype=torch.float64)
    stage = anderson_stage(lambda y: rates * y, base, 1.0, base, 1e-13, 50)
    assert stage.solved.all() and int(stage.evaluations.max()) <= 10
    torch.testing.assert_close(stage.value, base / (1 - rates), rtol=1e-9, atol=0.0)


def test_newton_solves_a_stage_far_too_stiff_for_anderson() -> None:
    torch.manual_seed(1)
    rates = -torch.logspace(0, 9, 12, dtype=torch.float64)
    base = torch.rand(3, 12, dtype=torch.float64) + 0.5

    def function(y: Tensor) -> Tensor:
        return rates * (y + 0.1 * y**3)

    def jacobian(y: Tensor) -> Tensor:
        return torch.diag_embed(rates * (1 + 0.3 * y**2))

    assert not anderson_stage(function, base, 1.0, base, 1e-13, 50).solved.any()
    stage = newton_stage(function, jacobian, base, 1.0, base, 1e-13, 50)
    assert stage.solved.all()


def test_each_sample_stops_by_itself_and_counts_its_own_evaluations() -> None:
    rates = torch.tensor([[0.0], [-0.1], [-30.0]], dtype=torch.float64)
    base = torch.ones(3, 1, dtype=torch.float64)

    def function(y: Tensor) -> Tensor:
        return rates * y - 0.01 * rates * y**2

    stage = anderson_stage(function, base, 1.0, base, 1e-13, 50)
    assert stage.solved.all()
    assert stage.evaluations[0] == 1 and stage.evaluations[0] < stage.evaluations[1] < stage.evaluations[2]


def test_a_sample_that_does_not_converge_leaves_the_others_solved() -> None:
    base = torch.tensor([[1.0], [1.0], [torch.nan]], dtype=torch.float64)
    sign = torch.tensor([[-1.0], [1.0], [1.0]], dtype=torch.float64)
    stage = anderson_stage(lambda y: sign * y**2, base, 1.0, base, 1e-13, 50)  # y = 1 + y² has no real solution
    assert stage.solved.tolist() == [True, False, True]  # a NaN that came in is passed on, not blamed
    assert float(stage.value[0]) == pytest.approx((5**0.5 - 1) / 2, abs=1e-13)


@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("stage_solver", ["anderson", "newton"])
def test_non_convergence_names_samples_residual_step_and_remedy(method: str, stage_solver: str) -> None:
    y0 = torch.tensor([[0.1], [5.0], [6.0]], dtype=torch.float64)
    with pytest.raises(ns.StageSolveError) as error:
        ns.odeint(lambda t, y: y**2 + 1, y0, [0.0, 2.0], method=method, steps=2, options={"stage_solver": stage_solver})
    message = str(error.value)
    for part in (
        "of 3 samples",
        "t=0",
        "h=1",
        "residual",
        "tolerance 1.0e-13",
        "take smaller steps",
        "stage_tolerance",
    ):
        assert part in message, (part, message)
    assert ("'newton'" in message) == (stage_solver == "anderson")


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_state_whose_squares_overflow_or_underflow_is_solved_like_any_other(scale: float) -> None:
    y0 = torch.full((1, 2), scale, dtype=torch.float32)
    y = ns.odeint(lambda t, y: -3 * y, y0, [0.0, 1.0], method="implicit_euler", steps=1)[-1]
    torch.testing.assert_close(y / scale, torch.full((1, 2), 0.25), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", IMPLICIT)
def test_a_state_of_zero_moves(method: str) -> None:
    y0 = torch.tensor([[0.0], [1.0]])
    y = ns.odeint(lambda t, y: torch.ones_like(y), y0, [0.0, 1.0], method=method, steps=4)[-1]
    torch.testing.assert_close(y, y0 + 1)
    torch.manual_seed(0)
    f = ns.MLPDynamics(3, (8,))
    fused = ns.odeint(f, torch.zeros(2, 3), [0.0, 1.0], method=method, steps=4)[-1]
    plain = ns.odeint(lambda t, y: f(t, y), torch.zeros(2, 3), [0.0, 1.0], method=method, steps=4)[-1]
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjoint", ["discrete", "reversible", "continuous"])
@pytest.mark.parametrize("method", IMPLICIT)
def test_newton_serves_the_backward_pass_of_stiff_dynamics(method: str, adjoint: str) -> None:
    """Rates from 1 to 1e6 (to 10 where the trajectory is rebuilt), against the closed form of the solve."""
    top = 6 if adjoint == "discrete" else 1
    rates = torch.logspace(0, top, 10, dtype=torch.float64)
    y0 = torch.rand(2, 10, dtype=torch.float64, requires_grad=True)
    options = {"stage_solver": "newton", "checkpoint_every": 1 if adjoint == "reversible" else None}
    ys = ns.odeint(lambda t, y: -rates * y, y0, [0.0, 1.0], method=method, steps=20, adjoint=adjoint, options=options)
    found = torch.autograd.grad(ys[-1].sum(), y0)[0]
    z = -rates / 20
    factor = 1 / (1 - z) if method == "implicit_euler" else (1 + z / 2) / (1 - z / 2)
    torch.testing.assert_close(found[0], factor**20, rtol=1e-8, atol=1e-14)


class _Line(torch.nn.Module):
    """A slope that is linear in time, whatever the state."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.0 * y + 2.0 * t + 10.0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stages_start_on_the_line_through_the_slopes_of_the_two_before(
    dtype: torch.dtype, method: str, fused: bool
) -> None:
    y0 = torch.ones(3, 2, dtype=dtype)
    f = ns.fuse(_Line(), y0) if fused else _Line()

    def evaluations(*times: float) -> int:
        t, options = torch.tensor(times, dtype=dtype), {"fused": fused}
        _, stats = ns.odeint(f, y0, t, method=method, steps=8, options=options, return_stats=True)
        (count,) = set(stats.nfe_forward.tolist())
        return int(count) - 8 * (len(times) - 1)

    # The first two, which guess 0 and the slope before, are evaluated twice, the others where they guess.
    assert evaluations(0.0, 1.0) == evaluations(1.0, 0.0) == 2
    assert evaluations(0.0, 0.5, 0.75, 1.0) == 2
    # So far beyond the last two that their line is no guess.
    assert evaluations(0.0, 0.1, 10.0) > 2


def test_a_slope_that_jumps_or_is_not_finite_is_guessed_to_stay() -> None:
    last = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    before = torch.tensor([[0.5, 2.0], [-1.0, 0.0], [torch.nan, 2.0], [0.0, 0.0]])
    guess = predicted(last, before, 1.0, (-1, 2))
    assert guess.tolist() == [[1.5, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]
    assert predicted(last[:1], before[:1], 2.0, (-1, 2)).tolist() == [[2.0, 2.0]]  # twice as far
    assert predicted(last[:1], before[:1], 3.0, (-1, 2)).tolist() == [[1.0, 2.0]]  # further than is worth it
