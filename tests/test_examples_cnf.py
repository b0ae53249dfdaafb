"""The example of normalising flows: its densities, its samples, what it exports."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import cnf


@pytest.fixture(scope="module")
def flow() -> cnf.Flow:
    torch.manual_seed(0)
    model = cnf.Flow(width=32)
    cnf.fit(model, cnf.data("moons", 5000, 0), 0, "moons", 1e-2, 300)
    return model


def test_its_likelihood_beats_a_normal_distribution_of_the_same_moments(flow: cnf.Flow) -> None:
    x, held_out = cnf.data("moons", 5000, 0), cnf.data("moons", 2000, 1)
    rival = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    assert cnf.nll(flow, held_out) < cnf.nll(rival, held_out) - 0.4


def test_its_likelihood_integrates_to_one(flow: cnf.Flow) -> None:
    side = torch.linspace(-6.0, 6.0, 241)
    with torch.no_grad():
        total = flow.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (12 / 240) ** 2
    assert float(total) == pytest.approx(1.0, abs=2e-3)


def test_the_reverse_solve_undoes_the_flow(flow: cnf.Flow) -> None:
    z = torch.randn(500, 2)
    with torch.no_grad():
        x = flow(z)
        back = ns.odeint(flow.field, x, [0.0, 1.0], method="dopri5", rtol=1e-6, atol=1e-6)[-1]
    assert float((back - z).abs().max()) < 2e-3 and float((x - z).abs().max()) > 0.3


def test_its_samples_are_as_likely_as_held_out_data(flow: cnf.Flow) -> None:
    with torch.no_grad():
        samples = flow(torch.randn(4000, 2))
        entropy = cnf.nll(flow, samples)
    assert abs(entropy - cnf.nll(flow, cnf.data("moons", 4000, 1))) < 0.3
    assert float(samples.std(0).sub(cnf.data("moons", 4000, 1).std(0)).abs().max()) < 0.15


def test_hutchinsons_trace_trains_it_too() -> None:
    torch.manual_seed(0)
    model, held_out = cnf.Flow(width=16, trace="hutchinson"), cnf.data("circles", 1000, 1)
    before = cnf.nll(model, held_out)
    cnf.fit(model, cnf.data("circles", 5000, 0), 0, "circles", 2e-2, 200)
    assert cnf.nll(model, held_out) < before - 0.2


def test_its_training_takes_the_kernel() -> None:
    flow = cnf.Flow(width=8)
    start = flow.training_dynamics.func.state(torch.zeros(2, 2))
    assert ns.backend(flow.training_dynamics, start, cnf.T, method="rk4", steps=4).name == "fused"


def test_the_sampler_runs_in_onnxruntime(flow: cnf.Flow, tmp_path: Path) -> None:
    import onnxruntime

    z = torch.randn(64, 2)
    ns.to_onnx(flow, z[:8], tmp_path / "sampler.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "sampler.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found), flow(z), atol=1e-4)


def test_the_rival_of_torchdiffeq_has_a_density_too() -> None:
    torch.manual_seed(0)
    side = torch.linspace(-4.0, 4.0, 81)
    with torch.no_grad():
        total = cnf.Hypernetwork().log_prob(torch.cartesian_prod(side, side)).exp().sum() * 0.1**2
    assert float(total) == pytest.approx(1.0, abs=1e-2)


def test_the_checkerboard_is_of_density_one_eighth() -> None:
    x = cnf.data("checkerboard", 20_000, 0)
    cells = x.floor().long() + 2
    counts = torch.bincount(4 * cells[:, 0] + cells[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8 and float(counts[counts > 0].float().std() / 2500) < 0.05
    assert math.isclose(float(x.abs().max()), 2, abs_tol=0.01)
