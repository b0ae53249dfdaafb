"""``fewest_steps`` and running a model under another solver."""

from __future__ import annotations

import pytest
import torch
from problems import METHODS, dynamics_and_state

import nodeshape as ns


def block() -> tuple[ns.ODEBlock, torch.Tensor]:
    func, y0 = dynamics_and_state("conv")
    return ns.ODEBlock(func, method="euler", steps=20).eval(), y0.detach()


def test_another_solver_runs_with_the_same_weights() -> None:
    model, y0 = block()
    for method in METHODS:
        swapped = model.with_solver(method=method, steps=7)
        assert [id(x) for x in swapped.parameters()] == [id(x) for x in model.parameters()]
        expected = ns.odeint(model.dynamics, y0, [0.0, 1.0], method=method, steps=7)[-1]
        torch.testing.assert_close(swapped(y0), expected, rtol=0.0, atol=0.0)
    assert (model.method, model.steps) == ("euler", 20)


@pytest.mark.parametrize("tolerance", [0.2, 2e-2])
def test_fewest_steps_is_within_tolerance_and_one_step_less_is_not(tolerance: float) -> None:
    model, y0 = block()
    found = ns.fewest_steps(model, y0, tolerance)
    with torch.no_grad():
        exact = model.with_solver("implicit_midpoint", steps=1000)(y0)

        def error(method: str, steps: int) -> float:
            return float((model.with_solver(method, steps=steps)(y0) - exact).abs().max())

        assert found.error <= tolerance
        assert error(found.method, found.steps) == pytest.approx(found.error, rel=0.05)
        if found.steps > 1:
            assert error(found.method, found.steps - 1) > 0.9 * tolerance
        # No method reaches the tolerance with fewer evaluations: Euler's count is its steps.
        assert error("euler", max(1, int(found.evaluations) - 1)) > 0.9 * tolerance or found.method == "euler"


def test_a_tolerance_out_of_reach_is_refused() -> None:
    func, y0 = dynamics_and_state("mlp", torch.float32)
    with pytest.raises(ValueError, match="out of reach.*float64"):
        ns.fewest_steps(ns.ODEBlock(func), y0, 1e-12)
    with pytest.raises(ValueError, match="positive"):
        ns.fewest_steps(ns.ODEBlock(func), y0, 0.0)


def test_block_uses_other_tolerances_in_evaluation() -> None:
    func, y0 = dynamics_and_state("mlp")
    model = ns.ODEBlock(func, method="implicit_midpoint", rtol=1e-2, atol=1e-2, eval_rtol=1e-5, eval_atol=1e-5)
    counts = []
    for mode in (True, False):
        model.train(mode)(y0)
        assert model.stats is not None
        counts.append(int(model.stats.accepted.min()))
    assert counts[0] < counts[1]
