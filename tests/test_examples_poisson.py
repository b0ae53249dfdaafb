"""examples/poisson.py: the likelihood, its integral, the interpolation, and that it learns and exports."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from scipy.integrate import quad, simpson
from torch import nn

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import poisson


@pytest.fixture(scope="module")
def events():
    return poisson.draw_events(np.random.default_rng(0), poisson.SEQUENCES)


@pytest.fixture(scope="module")
def trained(events):
    torch.manual_seed(0)
    model = poisson.Intensity(sum(map(len, events)) / len(events) / poisson.END)
    poisson.fit(model, events, 300)
    return model


@pytest.fixture
def double(trained):
    return deepcopy(trained).double()


def test_thinning_draws_as_many_events_where_they_are_as_the_intensity_says():
    drawn = np.concatenate(poisson.draw_events(np.random.default_rng(1), 400))
    for begin, end in ((0, 1), (1, 2.5), (2.5, 7), (7, 10)):
        expected = 400 * quad(poisson.true_intensity, begin, end)[0]
        seen = ((drawn >= begin) & (drawn < end)).sum()
        assert abs(seen - expected) < 4 * expected**0.5


def test_the_extra_state_is_the_integral_of_the_intensity(double):
    model = double
    grid = torch.linspace(0, poisson.END, poisson.STEPS + 1, dtype=torch.float64)
    _, integral = poisson.solver(model)(model.start(), grid)
    fine = torch.linspace(0, poisson.END, 2001, dtype=torch.float64)
    z, _ = poisson.solver(model)(model.start(), fine)
    exact = simpson(model.log_rate(z[:, 0]).exp()[:, 0].detach(), x=fine)
    assert abs(integral[-1].item() - exact) < 1e-6 * exact


def test_the_likelihood_is_that_of_a_solve_through_every_event(events, double):
    model = double
    times = torch.tensor(np.sort(np.concatenate(events[:5])))
    grid = torch.linspace(0, poisson.END, poisson.STEPS + 1, dtype=torch.float64)
    curve, solve = poisson.Curve(times, grid), poisson.solver(model)
    found = poisson.log_likelihood(model, solve, curve, grid, 5)
    every = torch.cat([torch.zeros(1), times, torch.full((1,), poisson.END)]).double()
    z, integral = ns.odeint(ns.fuse(model, model.start()), model.start(), every, method="rk4", steps=8)
    exact = model.log_rate(z[1:-1, 0]).sum() - 5 * integral[-1, 0, 0]
    assert abs(found - exact).item() < 1e-3  # of some hundred
    ours, theirs = (
        torch.cat([x.flatten() for x in torch.autograd.grad(value, list(model.parameters()))])
        for value in (found, exact)
    )
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_kernel_takes_the_solve():
    model = poisson.Intensity(3.0)
    fused = ns.fuse(model, model.start())
    assert ns.backend(fused, model.start(), torch.linspace(0, 1, 3), method="rk4", steps=1).name == "fused"


def test_training_recovers_the_intensity(events, trained):
    t = np.linspace(0, poisson.END, 401)
    truth = poisson.true_intensity(t)
    constant = np.full_like(t, sum(map(len, events)) / len(events) / poisson.END)
    assert poisson.relative_error(poisson.intensity(trained, t), truth) < 0.2
    assert poisson.relative_error(constant, truth) > 0.5


def test_rivals_are_fits_not_guesses(events):
    centres = (np.arange(poisson.BINS) + 0.5) * poisson.END / poisson.BINS
    truth = poisson.true_intensity(centres)
    assert poisson.relative_error(poisson.oracle(events), truth) < 0.05
    rates, knots = poisson.by_cross_validation(poisson.spline, [6, 14], events)
    assert knots == 14 and poisson.relative_error(rates, truth) < 0.15
    rates, bins = poisson.by_cross_validation(poisson.histogram, [2, 25], events)
    assert bins == 25 and abs(rates.mean() * poisson.END * len(events) / sum(map(len, events)) - 1) < 1e-6


def test_it_exports(trained, tmp_path):
    class Rate(nn.Module):
        """Intensity and its integral at the end of a solve from given states."""

        def __init__(self):
            super().__init__()
            self.model = trained

        def forward(self, z, integral):
            z, integral = ns.odeint(self.model, (z, integral), [0.0, 1.0], method="rk4", steps=4)
            return self.model.log_rate(z[-1]).exp(), integral[-1]

    z = trained.z0.detach() + 0.1 * torch.randn(4, 4)
    ns.to_onnx(Rate(), (z, torch.zeros(4, 1)), tmp_path / "rate.onnx")
    file = onnxruntime.InferenceSession(tmp_path / "rate.onnx")
    rate, integral = file.run(None, {"z": z.numpy(), "integral": np.zeros((4, 1), "f")})
    expected = Rate()(z, torch.zeros(4, 1))
    np.testing.assert_allclose(rate, expected[0].detach(), rtol=1e-4)
    np.testing.assert_allclose(integral, expected[1].detach(), rtol=1e-4)


@pytest.mark.slow
def test_an_iteration_is_faster_than_on_torchdiffeq():
    assert poisson.speed()["training iteration"] > 1.5
