"""What type checkers and editors say of the public functions, and that it is what they give."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import nodeshape as ns
from nodeshape._ode.odeint import AdjointArguments, Arguments

ROOT = Path(__file__).parents[1]


def test_a_type_checker_finds_the_types_asserted_in_this_file() -> None:
    """An ``assert_type`` that does not hold is an error, and so is an ``ignore`` of an error that is not there."""
    pytest.importorskip("mypy")
    run = subprocess.run([sys.executable, "-m", "mypy", "--strict", __file__], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_typed_arguments_are_those_of_the_functions() -> None:
    own = {"func", "y0", "t", "event_fn", "return_stats", "return_dense"}
    assert {*inspect.signature(ns.odeint).parameters} == {*get_type_hints(Arguments)} | own
    adjoint_only = {*get_type_hints(AdjointArguments)} - {*get_type_hints(Arguments)}
    assert {*inspect.signature(ns.odeint_adjoint).parameters} - {"arguments"} == adjoint_only | {"func", "y0", "t"}


@pytest.mark.parametrize("solve", [ns.odeint, ns.odeint_adjoint])
def test_both_functions_give_what_their_types_say(solve: Any) -> None:
    f, y, t = nn.Tanh(), torch.ones(3, 2), torch.tensor([0.0, 1.0])
    func = lambda t, y: f(y) if isinstance(y, Tensor) else tuple(map(f, y))  # noqa: E731
    assert type(solve(func, y, t, steps=2)) is Tensor
    assert [type(x) for x in solve(func, (y, y), t, steps=2)] == [Tensor, Tensor]
    solution, stats = solve(func, (y, y), t, steps=2, return_stats=True)
    assert type(solution) is tuple and type(stats) is ns.SolverStats


def test_the_type_of_a_solution_follows_the_state_and_return_stats() -> None:
    f, y, t = ns.MLPDynamics(2), torch.ones(3, 2), (0.0, 1.0)

    def pair(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state

    assert_type(ns.odeint(f, y, t, steps=2), Tensor)
    assert_type(ns.odeint(f, nn.Parameter(y), t, steps=2, return_stats=False), Tensor)
    assert_type(ns.odeint(pair, (y, y), t, steps=2), tuple[Tensor, ...])
    assert_type(ns.odeint(f, y, t, steps=2, return_stats=True), tuple[Tensor, ns.SolverStats])
    assert_type(ns.odeint(pair, (y, y), t, steps=2, return_stats=True), tuple[tuple[Tensor, ...], ns.SolverStats])
    dense = ns.odeint(f, y, t, method="rk4", steps=2, return_dense=True)
    assert_type(dense, ns.DenseSolution)
    event = ns.odeint(f, y, t, method="dopri5", event_fn=lambda t, y: t - 0.5)
    assert_type(event, tuple[Tensor, Tensor])
    assert type(dense) is ns.DenseSolution and [type(x) for x in event] == [Tensor, Tensor]
    assert_type(ns.odeint_adjoint(f, y, t, steps=2, adjoint_rtol=1e-3), Tensor)
    assert_type(ns.odeint_adjoint(f, y, t, steps=2, return_stats=True), tuple[Tensor, ns.SolverStats])
    with pytest.raises(TypeError):
        ns.odeint(f, y, t, step=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        ns.odeint_adjoint(f, y, t, step=2)  # type: ignore[call-overload]


def test_modules_give_tensors_and_name_their_arguments() -> None:
    block = ns.ODEBlock(ns.MLPDynamics(2), steps=2)
    assert_type(block(torch.ones(3, 2)), Tensor)
    assert_type(block.with_solver(steps=3), ns.ODEBlock)
    model = ns.ShapeClassifier(3, method="euler", steps=2, adjoint="reversible", options={"max_steps": 5})
    assert_type(model(torch.ones(2, 1, 32, 32)), Tensor)
    with pytest.raises(TypeError):
        ns.ShapeClassifier(3, step=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        block(torch.ones(3, 2), 0.0)  # type: ignore[call-arg]
