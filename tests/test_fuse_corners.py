"""Corners of the solver of programs: gradients that store less, stages that nobody needs, records that are large."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error
from test_fuse import MLP, TIGHT, solved
from test_op_arguments import backward, solve, unary
from torch import Tensor

import nodeshape as ns
from nodeshape._ode import fused
from nodeshape._ode.method import Method

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
T = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)


def fused_and_plain(batch: int, **arguments: object) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    """Observations and gradients of both."""
    torch.manual_seed(0)
    f, y0 = MLP().double(), torch.randn(batch, 8, dtype=torch.float64)
    program = ns.fuse(f, y0)
    assert ns.backend(program, y0, **arguments).name == "fused"  # type: ignore[arg-type]
    return solved(program, y0, T, **arguments), solved(f, y0, T, **arguments)


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("adjoint", ["reversible", "continuous"])
@pytest.mark.parametrize("method", ["euler", "implicit_midpoint"])
def test_any_number_of_samples_has_the_gradients_that_store_less(method: str, adjoint: str, batch: int) -> None:
    options = TIGHT if method != "euler" or adjoint == "reversible" else None
    found, expected = fused_and_plain(batch, method=method, steps=3, adjoint=adjoint, options=options)
    assert relative_error(found[0], expected[0]) < 1e-12
    assert relative_error(found[1], expected[1]) < 1e-9


@pytest.mark.parametrize("batch", [1, 40])
def test_an_implicit_stage_that_the_solution_does_not_depend_on_is_left_out(batch: int) -> None:
    method = Method("of two", 1, a=((1.0,), (0.5, 0.5)), b=(1.0, 0.0), c=(1.0, 1.0))
    found, _ = fused_and_plain(batch, method=method, steps=3, options=TIGHT)
    same, expected = fused_and_plain(batch, method="implicit_euler", steps=3, options=TIGHT)
    for some in (same, expected):
        assert relative_error(found[0], some[0]) < 1e-12
        assert relative_error(found[1], some[1]) < 1e-9


def test_memory_of_a_large_record_is_handed_on_to_the_next_and_not_to_a_much_smaller_one() -> None:
    def record(batch: int) -> tuple[Tensor, Tensor]:
        """What 256 steps leave and keep, 32 MB of 4,096 samples."""
        y0 = torch.linspace(-1, 1, 4 * batch, dtype=torch.float64).reshape(batch, 4)
        ys, stages, *_ = solve(unary, y0=y0, steps=[256], adjoint=1)
        assert stages.shape == (256, batch, 4)
        return ys, stages

    def has_its_gradient(ys: Tensor, stages: Tensor) -> bool:
        y, slope = ys[0], torch.ones_like(ys[0])
        for _ in range(256):
            slope *= 1 + (1 - y.tanh() ** 2) / 256
            y = y + y.tanh() / 256
        found = backward(unary, ys=ys, stages=stages, grad_ys=torch.ones_like(ys), steps=[256])[0]
        return torch.allclose(ys[1], y) and torch.allclose(found, 1 + slope)

    first, other = record(9000), record(9000)
    place = first[1].data_ptr()
    del first
    again = record(8500)
    assert again[1].data_ptr() == place
    assert has_its_gradient(*again) and has_its_gradient(*other), "nobody else writes there"
    del again
    assert record(4200)[1].data_ptr() != place
