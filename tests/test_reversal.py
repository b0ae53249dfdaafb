"""The ``reversible`` gradient: memory, and refusing a trajectory that cannot be rebuilt."""

from __future__ import annotations

import pytest
import torch
from problems import METHODS, dynamics_and_state, gradients, relative_error

import nodeshape as ns
from nodeshape._benchmarking.memory import STATE_BYTES, bytes_of_training_step

MARK_BYTES = STATE_BYTES // 32  # a number per sample, by which an f that has changed is found out


@pytest.mark.parametrize("method", METHODS)
def test_memory_grows_by_a_number_per_sample_and_step_or_by_a_state_or_by_what_autograd_needs(method: str) -> None:
    for adjoint in ("reversible", "continuous"):
        few, many = (bytes_of_training_step(method, adjoint, steps) for steps in (3, 9))
        assert many[0] <= 1.1 * few[0] and many[1] - few[1] <= 6 * MARK_BYTES
    few, many = (bytes_of_training_step(method, "discrete", steps, recompute=True) for steps in (3, 6))
    assert STATE_BYTES <= (many[1] - few[1]) / 3 <= STATE_BYTES + MARK_BYTES
    few, many = (bytes_of_training_step(method, "discrete", steps) for steps in (3, 6))
    assert STATE_BYTES < (many[1] - few[1]) / 3 <= 4 * STATE_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_of_reversible_at_a_thousand_steps_is_that_at_ten(method: str) -> None:
    few, many = (bytes_of_training_step(method, "reversible", steps)[0] for steps in (10, 1000))
    assert many <= 1.1 * few


@pytest.mark.parametrize("method", METHODS)
def test_a_strong_contraction_is_refused_and_solved_with_checkpoints(method: str) -> None:
    func, y0 = dynamics_and_state("mlp")
    rate = 12.0 if method == "euler" else 60.0

    def contracting(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return func(t, y) - rate * y

    t = torch.tensor([0.0, 4.0], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    solve = {"method": method, "steps": 100}
    expected = gradients(ns.odeint(contracting, y0, t, **solve), inputs)
    ys = ns.odeint(contracting, y0, t, adjoint="reversible", **solve)
    with pytest.raises(ns.ReversalDriftError, match=r"drifted.*tolerance.*checkpoint_every"):
        gradients(ys, inputs)
    ys = ns.odeint(contracting, y0, t, adjoint="reversible", options={"checkpoint_every": 2}, **solve)
    assert relative_error(gradients(ys, inputs), expected) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_passes_the_drift_check_is_as_good_as_its_tolerance(method: str) -> None:
    """From mild to hopeless contraction: refused, or right."""
    outcomes = set()
    for rate in (0.5, 5.0, 40.0):
        y0 = torch.tensor([[1.0, -0.5]], dtype=torch.float64, requires_grad=True)
        rates = torch.tensor([rate, 0.3], dtype=torch.float64, requires_grad=True)

        def func(t: torch.Tensor, y: torch.Tensor, rates: torch.Tensor = rates) -> torch.Tensor:
            return torch.sin(3 * y.flip(1)) - rates * y

        t = torch.tensor([0.0, 3.0], dtype=torch.float64)
        exact = gradients(ns.odeint(func, y0, t, method=method, steps=100), (y0, rates))
        ys = ns.odeint(func, y0, t, method=method, steps=100, adjoint="reversible")
        try:
            found = gradients(ys, (y0, rates))
        except (ns.ReversalDriftError, ns.StageSolveError):
            outcomes.add("refused")
        else:
            outcomes.add("returned")
            assert relative_error(found, exact) < 1e-8
    assert outcomes == {"refused", "returned"}
