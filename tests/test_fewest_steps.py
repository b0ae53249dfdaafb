"""``fewest_steps`` and running a model under another solver."""

from __future__ import annotations

from itertools import count

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
def test_fewest_steps_is_within_tolerance_and_nothing_cheaper_is(tolerance: float) -> None:
    model, y0 = block()
    found = ns.fewest_steps(model, y0, tolerance)
    with torch.no_grad():
        exact = model.with_solver("implicit_midpoint", steps=1000)(y0)

        def attempt(method: str, steps: int) -> tuple[float, float]:
            solver = model.with_solver(method, steps=steps)
            error = float((solver(y0) - exact).abs().max())
            return error, float(solver.stats.nfe_forward.double().mean())

        error, evaluations = attempt(found.method, found.steps)
        assert evaluations == found.evaluations and found.error <= tolerance
        assert error == pytest.approx(found.error, rel=0.05)
        for method in METHODS:  # whatever costs less misses the tolerance
            for steps in count(1):
                error, evaluations = attempt(method, steps)
                if evaluations >= found.evaluations:
                    break
                assert error > tolerance, (method, steps)
            assert steps > 1 or method != found.method


def test_a_tolerance_out_of_reach_is_refused() -> None:
    func, y0 = dynamics_and_state("mlp", torch.float32)
    with pytest.raises(ValueError, match=r"out of reach.*float64"):
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
