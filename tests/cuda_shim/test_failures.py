"""Samples that fail on CUDA: NaN, and an error from the next op that finds it. Run by tests/test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import torch
from fused_reference import random_conv

import nodeshape as ns

TIMES = torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)


@pytest.fixture(autouse=True)
def only_on_the_shim(request):
    if not request.config.getoption("--cuda-on-host"):
        pytest.skip("run by tests/test_cuda_kernels.py")


def test_unsolved_stage_is_nan_and_an_error_of_the_next_op():
    f, y0 = random_conv(4), torch.randn(6, 4, 5, 5)
    with torch.no_grad():
        ys = ns.odeint(f, y0, TIMES, method="implicit_euler", steps=3, options={"max_stage_iterations": 2})
        assert ys[1:].isnan().all()
        with pytest.raises(
            ns.StageSolveError, match=r"6 of 6 samples .* forward stage equation at t=0 .* smaller steps"
        ):
            ns.odeint(f, y0, TIMES, method="euler", steps=3)
        ns.odeint(f, y0, TIMES, method="euler", steps=3)  # raised once


def test_drift_of_the_reversed_trajectory_is_nan_and_an_error_of_the_next_op():
    """y' = -20 y contracts by e^-20; what rounding left cannot be expanded back."""
    f = ns.MLPDynamics(2, ())
    with torch.no_grad():
        f.layers[0].weight.copy_(torch.tensor([[-20.0, 1.0, 0.0], [0.0, -15.0, 0.0]]))
    y0 = torch.randn(3, 2, requires_grad=True)
    ys = ns.odeint(f, y0, [0.0, 1.0], method="implicit_midpoint", steps=40, adjoint="reversible")
    ys.sum().backward()
    assert y0.grad.isnan().all()
    assert all(x.grad.isnan().all() for x in f.parameters())
    with pytest.raises(RuntimeError, match=r"ReversalDriftError: 3 of 3 samples drifted"):
        torch.ops.nodeshape.raise_failures()
