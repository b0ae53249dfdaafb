"""Corners of the solver of programs: gradients that store less, stages nobody needs, large records, float32."""

from __future__ import annotations

import pytest
import torch
from fused_reference import instruction_sets
from problems import relative_error
from test_fuse import MLP, TIGHT, solved
from test_op_arguments import backward, solve, unary
from torch import Tensor

import nodeshape as ns
from nodeshape._ode import fused
from nodeshape._ode.method import METHODS, Method
from nodeshape._ode.program import UNARY, Builder, Ref
from nodeshape._ode.program_op import tableau_of

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


#: Constants of the functions that have some, and functions of positive numbers.
CONSTANTS = {
    "affine": (2.0, 1.0),
    "leaky_relu": (0.1,),
    "elu": (1.1, 0.9, 1.2),
    "softplus": (1.5, 20.0),
    "power": (1.5,),
}
CONSTANTS["clamp"] = (-0.3, 0.7)
POSITIVE = ("log", "sqrt", "power", "reciprocal", "log1p")


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", UNARY)
def test_a_function_and_its_slope_are_in_float32_what_they_are_in_float64(
    name: str, isa: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODESHAPE_ISA", isa)
    builder = Builder([4, 1])
    program = builder.finish(builder.unary(name, Ref(0), (4,), CONSTANTS.get(name, (0.0,))))
    y0 = torch.linspace(0.2 if name in POSITIVE else -2, 2.1, 4 * batch, dtype=torch.float64).reshape(batch, 4)
    results = []
    for dtype in (torch.float32, torch.float64):
        rest = ([], program.code, program.constants, tableau_of(METHODS["euler"])[0], [1], 1e-3, 10, 1, 1, 0, 1e-3)
        ys, stages, *_ = torch.ops.nodeshape.solve(y0.to(dtype), T[::2], *rest)
        results.append((ys, torch.ops.nodeshape.solve_backward(ys.sign(), ys, stages, T[::2], *rest)[0]))
    for single, double in zip(*results):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)
