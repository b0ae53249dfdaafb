"""The gradients of a solve against autograd through the unrolled, converged solve."""

from __future__ import annotations

import pytest
import torch
from problems import (
    ADJOINTS,
    EXACT_ADJOINTS,
    METHODS,
    ORDER,
    dynamics_and_state,
    gradients,
    orders,
    relative_error,
    unrolled,
)
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._benchmarking.memory import PeakMemory

DYNAMICS = ("mlp", "conv", "hand-written")
TIMES = {"increasing": [0.0, 0.3, 0.35, 1.0], "decreasing": [1.0, 0.4, 0.0, -0.2]}


@pytest.mark.parametrize("direction", TIMES)
@pytest.mark.parametrize("kind", DYNAMICS)
@pytest.mark.parametrize("method", METHODS)
def test_discrete_and_reversible_gradients_equal_autograd_through_the_unrolled_solve(
    method: str, kind: str, direction: str
) -> None:
    func, y0 = dynamics_and_state(kind)
    t = torch.tensor(TIMES[direction], dtype=torch.float64, requires_grad=True)
    inputs = (y0, t, *func.parameters())
    reference = unrolled(func, y0, t, method, steps=5)
    expected = gradients(reference, inputs)
    for adjoint in EXACT_ADJOINTS:
        for options in ({}, {"checkpoint_every": 3}) if adjoint == "reversible" else ({},):
            ys = ns.odeint(func, y0, t, method=method, steps=5, adjoint=adjoint, options=options)
            assert relative_error([ys], [reference]) < 1e-11
            assert relative_error(gradients(ys, inputs), expected) < 1e-10


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS)
@pytest.mark.parametrize("method", METHODS)
def test_float32_gradients_are_exact_to_float32(method: str, adjoint: str) -> None:
    func, y0 = dynamics_and_state("mlp", torch.float32)
    double, y0_double = dynamics_and_state("mlp")
    t = torch.tensor([0.0, 0.5, 1.0])
    ys = ns.odeint(func, y0, t, method=method, steps=5, adjoint=adjoint)
    assert ys.dtype == torch.float32
    expected = gradients(unrolled(double, y0_double, t.double(), method, 5), (y0_double, *double.parameters()))
    assert relative_error([x.double() for x in gradients(ys, (y0, *func.parameters()))], expected) < 1e-5


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS)
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_passes(method: str, adjoint: str) -> None:
    func, y0 = dynamics_and_state("hand-written")
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return ns.odeint(func, y0, t, method=method, steps=3, adjoint=adjoint)

    assert torch.autograd.gradcheck(solve, (y0, t, *func.parameters()))


@pytest.mark.parametrize("stage_solver", ["anderson", "newton"])
@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_of_discrete_pass_gradgradcheck(method: str, stage_solver: str) -> None:
    func, y0 = dynamics_and_state("hand-written")
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    options = {"stage_solver": stage_solver}

    def solve(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return ns.odeint(func, y0, t, method=method, steps=2, options=options)

    inputs = (y0, t, *func.parameters())
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)
    first = torch.autograd.grad(solve(*inputs).sin().sum(), inputs)
    graphed = torch.autograd.grad(solve(*inputs).sin().sum(), inputs, create_graph=True)
    assert relative_error(graphed, first) < 1e-11


def test_second_derivatives_under_error_control_match_first_ones_differenced() -> None:
    func, y0 = dynamics_and_state("mlp")
    direction, size = torch.randn_like(y0), 1e-4

    def first(y0: Tensor, **graph: bool) -> Tensor:
        ys = ns.odeint(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3, options={"fused": False})
        return torch.autograd.grad(ys[-1].sin().sum(), y0, **graph)[0]

    graphed = first(y0, create_graph=True)
    assert relative_error([graphed], [first(y0)]) < 1e-11
    second = torch.autograd.grad((graphed * direction).sum(), y0)[0]
    after, before = (first((y0 + h * direction).detach().requires_grad_()) for h in (size, -size))
    assert relative_error([second], [(after - before) / (2 * size)]) < 1e-3


@pytest.mark.parametrize("adjoint", ["reversible", "continuous"])
def test_second_derivatives_elsewhere_are_refused_with_the_remedy(adjoint: str) -> None:
    func, y0 = dynamics_and_state("hand-written")
    ys = ns.odeint(func, y0, torch.tensor([0.0, 1.0]), steps=2, adjoint=adjoint)
    with pytest.raises(RuntimeError, match=f"{adjoint}.*no second derivatives.*use adjoint='discrete'"):
        torch.autograd.grad(ys.sum(), y0, create_graph=True)


@pytest.mark.parametrize("method", METHODS)
def test_continuous_gradient_converges_to_the_discrete_one_at_the_methods_order(method: str) -> None:
    func, y0 = dynamics_and_state("hand-written")
    t = torch.tensor([0.0, 0.5, 1.2], dtype=torch.float64, requires_grad=True)
    groups = {"state and parameters": (y0, *func.parameters()), "times": (t,)}
    for name, inputs in groups.items():
        errors = []
        for steps in (10, 20, 40, 80):
            found, exact = (
                gradients(ns.odeint(func, y0, t, method=method, steps=steps, adjoint=adjoint), inputs)
                for adjoint in ("continuous", "discrete")
            )
            errors.append(relative_error(found, exact))
        if method == "implicit_midpoint" and name == "state and parameters":
            # The midpoint rule is its own adjoint method, so its backward sweep passes through the forward stages.
            assert max(errors) < 1e-10
        else:
            assert orders(errors) == pytest.approx([ORDER[method]] * 3, abs=0.1)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_gradient_jumps_at_each_observation(adjoint: str) -> None:
    """With y' = a y and L = Σ y(t_i), dL/dy0 = Σ exp(a t_i)."""
    rate = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))
    y0 = torch.tensor([[1.3]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.25, 0.5, 2.0], dtype=torch.float64)
    ys = ns.odeint(lambda t, y: rate * y, y0, t, steps=400, adjoint=adjoint)
    to_y0, to_rate = torch.autograd.grad(ys.sum(), (y0, rate))
    assert float(to_y0.detach()) == pytest.approx(float(torch.exp(rate * t).sum().detach()), rel=1e-5)
    expected = float((1.3 * t * torch.exp(rate * t)).sum().detach())
    assert float(to_rate.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_what_a_plain_function_closes_over_gets_its_gradient(adjoint: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    image = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(2, 3, dtype=torch.float64)

    def loss(solve: object) -> Tensor:
        context = torch.tanh(image @ weight)  # a tensor with a history of its own

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weight) * t + context

        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return solve(func, y0, t)[-1].sin().sum()  # type: ignore[operator]

    found = torch.autograd.grad(
        loss(lambda f, y, t: ns.odeint(f, y, t, method="implicit_midpoint", steps=10, adjoint=adjoint)), (weight, image)
    )
    expected = torch.autograd.grad(loss(lambda f, y, t: unrolled(f, y, t, "implicit_midpoint", 10)), (weight, image))
    assert relative_error(found, expected) < 1e-10


def test_adjoint_params_limits_the_gradient_to_the_tensors_given() -> None:
    func, y0 = dynamics_and_state("hand-written")
    ys = ns.odeint(func, y0, torch.tensor([0.0, 1.0]), steps=4, adjoint_params=[func.damping])
    to_damping, to_coupling = torch.autograd.grad(ys.sum(), (func.damping, func.coupling), allow_unused=True)
    assert to_damping is not None and to_coupling is None


def test_a_parameter_a_module_uses_only_late_gets_its_gradient_and_a_functions_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
            self.late = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return (self.early if t < 0.5 else self.late) * y

    func, y0, t = Late(), torch.ones(1, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = torch.autograd.grad(unrolled(func, y0, t, "euler", 10)[-1].sum(), tuple(func.parameters()))
    found = torch.autograd.grad(ns.odeint(func, y0, t, method="euler", steps=10)[-1].sum(), tuple(func.parameters()))
    assert relative_error(found, expected) < 1e-12
    ys = ns.odeint(lambda t, y: func(t, y), y0, t, method="euler", steps=10)
    found = torch.autograd.grad(ys[-1].sum(), tuple(func.parameters()))
    assert relative_error(found, expected) < 1e-12
    for adjoint in ("reversible", "continuous"):
        ys = ns.odeint(lambda t, y: func.late * y if t > 0.5 else y, y0, t, method="euler", steps=10, adjoint=adjoint)
        if ys.requires_grad:
            with pytest.raises(RuntimeError, match="adjoint_params"):
                ys.sum().backward()


def test_gradients_of_dynamics_that_ignore_state_or_time_or_parameters() -> None:
    y0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    shift = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    for method in METHODS:
        for adjoint in ADJOINTS:
            for func, expected in (
                (lambda t, y: shift, [1.0, 2.0, 2.0]),
                (lambda t, y: torch.ones_like(y), [1.0, None, 4.0]),
            ):
                ys = ns.odeint(func, y0, t, method=method, steps=3, adjoint=adjoint)
                grads = torch.autograd.grad(ys[-1].sum(), (y0, shift, t), allow_unused=True)
                found = [None if x is None else float(x.flatten()[-1]) for x in grads]
                assert found == pytest.approx(expected), (method, adjoint)


@pytest.mark.parametrize("name", ["fused", "plain"])
def test_nothing_is_recorded_without_gradients(name: str) -> None:
    func, y0 = dynamics_and_state("mlp")
    f = func if name == "fused" else lambda t, y: func(t, y)
    assert ns.backend(f, y0, steps=4).name == name

    def held(steps: int) -> tuple[bool, int, int]:
        with PeakMemory() as memory:
            ys = ns.odeint(f, y0, torch.tensor([0.0, 1.0]), method="euler", steps=steps)
            return ys.requires_grad, memory.live, memory.peak

    few, many = held(4), held(40)
    assert few[0] and many[1] - few[1] >= 36 * y0.nbytes  # what there is to record: a state per step
    with torch.no_grad():
        few, many = held(4), held(40)
        assert few[:2] == many[:2] and not few[0] and many[2] - few[2] <= 36 * y0.element_size()  # each step's time
    func.requires_grad_(False)
    y0.requires_grad_(False)
    assert held(4)[:2] == held(40)[:2] == few[:2]
