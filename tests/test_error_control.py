"""Error control: steps chosen by step doubling, for each sample by itself."""

from __future__ import annotations

from math import e, pi

import pytest
import torch
from problems import METHODS, dynamics_and_state, gradients, relative_error
from torch import Tensor

import nodeshape as ns


def spiral(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-0.3 * y[:, 0] + 2 * y[:, 1], -2 * y[:, 0] - 0.3 * y[:, 1]], dim=1) * (1 + 0.5 * torch.cos(t))


def spiral_solution(y0: Tensor, t: float) -> Tensor:
    s = torch.tensor(t, dtype=torch.float64)
    s = s + 0.5 * torch.sin(s)
    turn = torch.stack([torch.stack([s.mul(2).cos(), s.mul(2).sin()]), torch.stack([-s.mul(2).sin(), s.mul(2).cos()])])
    return torch.exp(-0.3 * s) * y0 @ turn.T


@pytest.mark.parametrize("method", METHODS)
def test_the_error_follows_the_tolerance(method: str) -> None:
    y0 = torch.tensor([[1.0, 0.5], [-3.0, 2.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    exact = torch.stack([spiral_solution(y0, float(x)) for x in t])
    errors, steps = [], []
    for rtol in (1e-1, 1e-2, 1e-3):
        ys, stats = ns.odeint(spiral, y0, t, method=method, rtol=rtol, atol=rtol / 10, return_stats=True)
        errors.append(float((ys - exact).abs().max()))
        steps.append(int(stats.accepted.max()))
        assert stats.step_control == "per sample"
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1
    assert steps[0] < steps[1] < steps[2]


def test_every_observation_time_is_hit_exactly() -> None:
    y0 = torch.zeros(2, 1, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.1000001, 2.0, 7.3], dtype=torch.float64)
    for times in (t, -t):  # dy/dt = 1: y is the time integrated over
        ys = ns.odeint(lambda t, y: torch.ones_like(y), y0, times)
        torch.testing.assert_close(ys[:, 0, 0], times, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adjoint", ["discrete", "reversible"])
def test_gradients_are_those_of_the_steps_taken(method: str, adjoint: str) -> None:
    func, y0 = dynamics_and_state("mlp")
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    tolerances = {"rtol": 1e-2, "atol": 1e-3}
    found = gradients(ns.odeint(func, y0, t, method=method, adjoint=adjoint, **tolerances), inputs)
    # the same steps as equal steps of each sample alone, through autograd's own record of the replay
    ys = ns.odeint(func, y0, t, method=method, **tolerances)
    graphed = torch.autograd.grad((ys * _weights(ys)).sum() + 0.5 * (ys * ys).sum(), inputs, create_graph=True)
    expected = [x.detach() for x in graphed]
    assert relative_error(found, expected) < 1e-10


def _weights(ys: Tensor) -> Tensor:
    return torch.randn(ys.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_continuous_gradients_follow_their_own_tolerance() -> None:
    func, y0 = dynamics_and_state("mlp")
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    exact = gradients(ns.odeint(func, y0, t, steps=400), inputs)
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-5):
        options = {"adjoint_rtol": tolerance, "adjoint_atol": tolerance}
        ys = ns.odeint(func, y0, t, rtol=1e-5, atol=1e-5, adjoint="continuous", options=options)
        errors.append(relative_error(gradients(ys, inputs), exact))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_continuous_gradients_of_conv_dynamics_take_error_control() -> None:
    torch.manual_seed(0)
    func, y0 = ns.ConvDynamics(4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (y0, *func.parameters())
    expected = gradients(ns.odeint(func, y0, [0.0, 1.0], steps=100), inputs)
    ys = ns.odeint(func, y0, [0.0, 1.0], rtol=1e-3, atol=1e-4, adjoint="continuous")
    assert relative_error(gradients(ys, inputs), expected) < 5e-2


def test_each_sample_takes_its_own_steps() -> None:
    rates = torch.tensor([[-0.1], [-5.0], [-200.0]], dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:  # the rate rides along in the state
        return torch.cat([y[:, 1:] * y[:, :1], torch.zeros_like(y[:, 1:])], dim=1)

    y0 = torch.cat([torch.ones_like(rates), rates], dim=1)
    _, stats = ns.odeint(func, y0, [0.0, 1.0], return_stats=True)
    assert stats.accepted[0] < stats.accepted[1] < stats.accepted[2]
    assert (stats.nfe_forward > 2 * stats.accepted).all()


def test_f_that_needs_its_whole_batch_shares_one_step_and_nan_samples_do_not_stop_it() -> None:
    offsets = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]  # [batch, 1]: no meaning for one sample alone

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y * (1 + 10 * offsets)

    y0 = torch.ones(4, 2, dtype=torch.float64)
    y0[1, 0] = torch.nan
    for method in METHODS:
        ys, stats = ns.odeint(func, y0, [0.0, 1.0], method=method, rtol=1e-3, atol=1e-4, return_stats=True)
        assert stats.step_control == "shared"
        assert len(set(stats.accepted.tolist())) == 1
        exact = torch.exp(-(1 + 10 * offsets)).expand(4, 2)
        assert ys[-1, 1].isnan().all()
        keep = [0, 2, 3]
        torch.testing.assert_close(ys[-1, keep], exact[keep], rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_shares_one_step_in_training_and_not_in_evaluation(training: bool) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double().train(training)
    y0 = torch.randn(5, 2, dtype=torch.float64) * torch.logspace(-1, 1, 5)[:, None]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return layers(y)

    with torch.no_grad():
        ys, stats = ns.odeint(func, y0, [0.0, 1.0], rtol=1e-3, atol=1e-4, return_stats=True)
        expected = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=2000)
    assert stats.step_control == ("shared" if training else "per sample")
    assert (len(set(stats.accepted.tolist())) == 1) == training
    torch.testing.assert_close(ys, expected, rtol=1e-2, atol=1e-3)


def test_f_that_mixes_its_samples_shares_one_step_although_it_takes_one_alone() -> None:
    y0 = torch.tensor([[1.0, 2.0], [0.0, -3.0], [0.5, 0.1]], dtype=torch.float64)
    ys, stats = ns.odeint(lambda t, y: y - y.mean(dim=0), y0, [0.0, 1.0], return_stats=True)
    assert stats.step_control == "shared" and len(set(stats.accepted.tolist())) == 1
    mean = y0.mean(dim=0)
    torch.testing.assert_close(ys[-1], mean + e * (y0 - mean), rtol=1e-2, atol=0.0)


def test_a_solution_that_blows_up_raises_instead_of_hanging() -> None:
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)  # y' = y² ends at t = 1 / y0
    for method in METHODS:
        with pytest.raises(ns.StepSizeError, match=r"1 of 2 samples \(the first is number 1\).*t=0\.(5|4)"):
            ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], method=method, rtol=1e-2, atol=1e-2)


def test_too_many_steps_raise_with_the_remedy() -> None:
    y0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ns.StepSizeError, match=r"max_steps=30 attempts.*use an implicit method"):
        ns.odeint(lambda t, y: -1000 * y, y0, [0.0, 1.0], method="euler", options={"max_steps": 30})


@pytest.mark.parametrize("method", METHODS)
def test_a_rejected_attempt_is_counted_and_does_not_touch_the_solution(method: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:  # a bump, where the second column says, that long steps run into
        nonlocal calls
        calls += 1
        return torch.cat([10 * torch.exp(-((10 * (t - y[:, 1:])) ** 2)), torch.zeros_like(y[:, 1:])], dim=1)

    y0 = torch.tensor([[1.0, 0.5], [1.0, 0.4]], dtype=torch.float64)
    _, alone = ns.odeint(func, y0[:1], [0.0, 1.0], method=method, return_stats=True)
    assert int(alone.nfe_forward) == calls
    ys, stats = ns.odeint(func, y0, [0.0, 1.0], method=method, return_stats=True)
    assert stats.step_control == "per sample" and (stats.rejected > 0).all() and stats.rejected[0] == alone.rejected[0]
    torch.testing.assert_close(ys[-1, :, 0], torch.full((2,), 1 + pi**0.5, dtype=torch.float64), rtol=2e-3, atol=0.0)


def test_tolerances_work_in_float32_and_for_an_empty_batch() -> None:
    func, y0 = dynamics_and_state("conv", torch.float32)
    ys = ns.odeint(func, y0, [0.0, 1.0], rtol=1e-2, atol=1e-2)
    fine = ns.odeint(func, y0, [0.0, 1.0], steps=50)
    assert ys.dtype == torch.float32 and float((ys - fine).abs().max()) < 5e-2
    assert ns.odeint(func, y0[:0], [0.0, 1.0]).shape == (2, 0, *y0.shape[1:])
