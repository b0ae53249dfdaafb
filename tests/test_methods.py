"""Methods of several stages: their order, their gradients, and what torchdiffeq's users expect of a solve."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import exp, inf, log2, pi
from typing import Any

import pytest
import torch
from problems import gradients, relative_error
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._ode.control import Controller, rms
from nodeshape._ode.method import METHODS, Method

SEVERAL = [name for name, method in METHODS.items() if not method.one_stage]
EXPLICIT = [name for name in SEVERAL if METHODS[name].explicit]
ESTIMATED = [name for name in SEVERAL if METHODS[name].error]

Tree = tuple[Any, ...]  # a rooted tree is the tuple of the trees that hang from its root


@lru_cache
def trees(order: int) -> tuple[Tree, ...]:
    """The rooted trees of so many nodes (Butcher; Hairer, Nørsett & Wanner I, II.2)."""

    def sizes(total: int, largest: int) -> Iterator[list[int]]:
        if total == 0:
            yield []
        for first in range(min(total, largest), 0, -1):
            for rest in sizes(total - first, first):
                yield [first, *rest]

    found = {
        tuple(sorted(branches)) for parts in sizes(order - 1, order - 1) for branches in product(*map(trees, parts))
    }
    return tuple(sorted(found))


def nodes(tree: Tree) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: Tree) -> int:
    value = nodes(tree)
    for branch in tree:
        value *= density(branch)
    return value


def order_of(method: Method, weights: tuple[float, ...], x: float = 1.0) -> int:
    """The highest order whose conditions the weights meet for the state after the part ``x`` of a step."""
    stages = len(method.b)
    a = torch.zeros(stages, stages, dtype=torch.float64)
    for i, row in enumerate(method.a):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)

    def value(tree: Tree) -> Tensor:
        result = torch.ones(stages, dtype=torch.float64)
        for branch in tree:
            result = result * (a @ value(branch))
        return result

    b, order = torch.tensor(weights, dtype=torch.float64), 0
    while order < 9 and all(abs(float(b @ value(t)) - x ** (order + 1) / density(t)) < 1e-13 for t in trees(order + 1)):
        order += 1
    return order


@pytest.mark.parametrize("name", METHODS)
def test_a_tableau_meets_the_conditions_of_its_order_and_of_no_higher_one(name: str) -> None:
    method = METHODS[name]
    assert order_of(method, method.b) == method.order
    assert all(abs(sum(row) - c) < 1e-14 for row, c in zip(method.a, method.c))
    if method.error:
        embedded = tuple(b - e for b, e in zip(method.b, method.error))
        assert min(order_of(method, embedded), method.order) == method.error_order - 1
    if method.middle:
        assert order_of(method, method.middle, x=0.5) >= 4


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) * (1 + 0.1 * torch.cos(t))], dim=-1)


def fast_pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[..., 1], -4 * torch.sin(y[..., 0]) * (1 + 0.1 * torch.cos(t))], dim=-1)


START = torch.tensor([[1.0, 0.3], [-0.5, 1.2]], dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)


def exact() -> Tensor:
    return ns.odeint(pendulum, START, TIMES, method="dopri5", rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_measured_order_is_the_methods(name: str) -> None:
    order = METHODS[name].order
    counts = (16, 32) if order > 5 else (128, 256) if order == 5 else (64, 128)

    reference = ns.odeint(fast_pendulum, START, [0.0, 4.0], method="dopri8", rtol=1e-14, atol=1e-15)
    errors = [
        float((ns.odeint(fast_pendulum, START, [0.0, 4.0], method=name, steps=n) - reference).abs().max())
        for n in counts
    ]
    assert log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1 if order < 5 else 0.2)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_measured_order_of_an_error_estimate_is_the_methods(name: str) -> None:
    method = METHODS[name]

    def estimate(h: float) -> float:
        """Of one step of h, which error control hands to the norm in units of the tolerance."""
        seen: list[float] = []

        def norm(error: Tensor) -> Tensor:
            seen.append(float(error.norm()))
            return error.norm()

        options: dict[str, Any] = {"first_step": h, "norm": norm, "stage_tolerance": 1e-13}
        ns.odeint(fast_pendulum, START, [0.0, h], method=name, rtol=1e-300, atol=1.0, options=options)
        (found,) = seen
        return found

    h = 0.1 if method.order > 5 else 0.05
    expected = method.error_order or method.order + 1  # step doubling, where there is no embedded estimate
    assert log2(estimate(h) / estimate(h / 2)) == pytest.approx(expected, abs=0.1)


def test_a_step_shrinks_before_it_fails_and_does_not_grow_right_after_it_did() -> None:
    control = Controller(order=5, rtol=1e-3, atol=1e-3, norm=rms)
    assert control.next(1.0, 0.99) == pytest.approx(0.9, rel=1e-2)
    assert control.next(1.0, 2.0**5) == pytest.approx(0.45)
    assert control.next(0.45, 1e-9) == 0.45
    assert control.next(0.45, 1e-9) == 4.5
    assert control.next(1.0, inf) == 0.2
    assert control.next(1.0, 0.0) == 1.0
    assert control.next(1.0, 0.0) == 10.0


@pytest.mark.parametrize("name", ["midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("backwards", [False, True])
def test_given_steps_are_torchdiffeqs(name: str, backwards: bool) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    t = (t.flip(0) if backwards else t).clone().requires_grad_()
    y0 = START.clone().requires_grad_()
    inputs = (y0, t, *f.parameters())
    ours, theirs = (solve(lambda t, y: f(y) * t, y0, t, method=name) for solve in (ns.odeint, torchdiffeq.odeint))
    assert relative_error([ours], [theirs]) < 1e-12
    assert relative_error(gradients(ours, inputs), gradients(theirs, inputs)) < 1e-10


@pytest.mark.parametrize("name", SEVERAL)
def test_gradients_pass_gradcheck_with_given_and_with_chosen_steps(name: str) -> None:
    weight = torch.tensor([[0.3, -1.0], [0.8, -0.2]], dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, weight: Tensor, **choice: Any) -> Tensor:
        ys = ns.odeint(lambda t, y: torch.tanh(y @ weight) * torch.cos(t), y0, t, method=name, **choice)
        assert isinstance(ys, Tensor)
        return ys

    y0, t = START.clone().requires_grad_(), TIMES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: solve(*x, steps=2), (y0, t, weight), fast_mode=True)
    if name in ("heun2", "rk4", "trapezoid", "trbdf2"):
        assert torch.autograd.gradgradcheck(lambda *x: solve(*x, steps=1), (y0, t, weight), fast_mode=True)
    if name in ("dopri5", "tsit5", "trbdf2"):
        # Which steps are taken is left out of the gradient, so here it is bound not to change.
        tolerances = {"rtol": 1.0, "options": {"first_step": 0.3, "min_step": 0.3, "max_step": 0.3}}
        assert torch.autograd.gradcheck(lambda *x: solve(*x, **tolerances), (y0, t, weight), fast_mode=True)


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_error_follows_the_tolerance(name: str) -> None:
    reference, errors, evaluations = exact(), [], []
    for rtol in (1e-3, 1e-5, 1e-7):
        ys, stats = ns.odeint(pendulum, START, TIMES, method=name, rtol=rtol, atol=rtol, return_stats=True)
        errors.append(float((ys - reference).abs().max()))
        evaluations.append(int(stats.nfe_forward[0]))
        assert stats.step_control == "shared"
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    assert evaluations[0] <= evaluations[1] < evaluations[2]


@pytest.mark.parametrize("name", ["rk4", "dopri5", "trbdf2"])
def test_the_continuous_adjoint_comes_near_the_exact_gradient(name: str) -> None:
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    class Func(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.unused = f, nn.Linear(2, 2).double()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.f(y) * torch.cos(t)

    func, y0, t = Func(), START.clone().requires_grad_(), TIMES.clone().requires_grad_()
    choice: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if METHODS[name].error else {"steps": 20}
    inputs = (y0, t, *f.parameters())
    expected = gradients(ns.odeint(func, y0, t, method=name, **choice), inputs)
    assert relative_error(gradients(ns.odeint_adjoint(func, y0, t, method=name, **choice), inputs), expected) < 1e-3
    ns.odeint_adjoint(func, y0, t, method=name, **choice).sum().backward()
    assert func.unused.weight.grad is not None and not func.unused.weight.grad.any()


def test_a_func_that_changed_before_the_continuous_backward_pass_is_refused() -> None:
    class Gain(nn.Module):
        u = 1.0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.u * y

    func, y0 = Gain(), START.clone().requires_grad_()
    ys = ns.odeint_adjoint(func, y0, TIMES, method="rk4", steps=2)
    func.u = 9.0
    with pytest.raises(RuntimeError, match="not what it was in the forward pass"):
        ys.sum().backward()


def test_each_solve_has_the_gradient_of_its_own_func() -> None:
    class Gain(nn.Module):
        u = 1.0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.u * y

    func, y0 = Gain(), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    middle = ns.odeint(func, y0, [0.0, 1.0], method="heun2")[-1]
    func.u = 9.0
    last = ns.odeint(func, middle, [0.0, 1.0], method="heun2")[-1]
    (found,) = torch.autograd.grad(last.sum(), y0)
    assert float(found) == pytest.approx((1 + 1 + 0.5) * (1 + 9 + 40.5), rel=1e-14)


def test_many_times_cost_no_more_evaluations_than_two_and_are_as_exact() -> None:
    many = torch.linspace(0, 2, 1000, dtype=torch.float64)
    few, few_stats = ns.odeint(pendulum, START, [0.0, 2.0], method="dopri5", return_stats=True)
    ys, stats = ns.odeint(pendulum, START, many, method="dopri5", return_stats=True)
    assert torch.equal(stats.nfe_forward, few_stats.nfe_forward) and torch.equal(ys[-1], few[-1])
    dense = ns.odeint(pendulum, START, [0.0, 2.0], method="dopri5", rtol=1e-12, atol=1e-13, return_dense=True)
    assert float((ys - dense(many)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["euler", "rk4", "bosh3", "dopri5", "dopri8", "trbdf2"])
def test_dense_output_is_the_solution_at_its_times_and_its_derivative_is_func(name: str) -> None:
    choice: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8} if METHODS[name].error else {"steps": 200}
    for times in (TIMES, TIMES.flip(0)):
        dense = ns.odeint(pendulum, START, times, method=name, return_dense=True, **choice)
        assert isinstance(dense, ns.DenseSolution)
        ys = ns.odeint(pendulum, START, times, method=name, options={"max_step": 1e9}, **choice)
        assert float((dense(times) - ys).abs().max()) < 1e-7
        t = torch.tensor([0.11, 1.3, 1.99], dtype=torch.float64)
        slopes = torch.stack([pendulum(time, y) for time, y in zip(t, dense(t))])
        assert dense(t).shape == (3, 2, 2) and dense(0.5).shape == (2, 2)
        torch.testing.assert_close(dense.derivative(t), slopes, rtol=0, atol=1e-2 if name == "euler" else 1e-3)
    with pytest.raises(ValueError, match=r"t=2\.5 is outside"):
        dense(2.5)


@pytest.mark.parametrize("name", ["dopri5", "rk4"])
@pytest.mark.parametrize("solve", [ns.odeint, ns.odeint_adjoint])
def test_a_fall_ends_on_the_ground_with_gradients_through_the_time(name: str, solve: Any) -> None:
    class Fall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gravity = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1], -self.gravity.expand_as(y[1])

    func = Fall()
    height = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    options = None if name == "dopri5" else {"step_size": 0.03, "interp": "cubic"}
    time, (heights, speeds) = ns.odeint_event(
        func,
        (height, torch.zeros_like(height)),
        torch.tensor(1.0, dtype=torch.float64),
        event_fn=lambda t, y: y[0],
        method=name,
        options=options,
        odeint_interface=solve,
    )
    assert float(time) == pytest.approx(3.0, abs=1e-9) and float(speeds[-1]) == pytest.approx(-4.0, abs=1e-8)
    assert float(heights[-1].abs()) < 1e-8
    to_height, to_gravity = torch.autograd.grad(time, (height, func.gravity), retain_graph=True)
    assert float(to_height) == pytest.approx(1 / 4, abs=1e-7)  # t = 1 + sqrt(2 h / g)
    assert float(to_gravity) == pytest.approx(-1 / 2, abs=1e-7)
    (to_height,) = torch.autograd.grad(speeds[-1].sum(), height)
    assert float(to_height) == pytest.approx(-1 / 2, abs=1e-7)  # v = −sqrt(2 g h)


def test_callbacks_see_every_attempt_and_what_became_of_it() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, float]] = []

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -20 * (y - torch.cos(3 * t))

        def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.calls.append(("step", float(t)))

        def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.calls.append(("accept", float(t)))

        def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.calls.append(("reject", float(t)))

    func = Called()
    _, stats = ns.odeint(func, START, TIMES, method="bosh3", rtol=1e-4, atol=1e-4, return_stats=True)
    names = [name for name, _ in func.calls]
    assert names.count("accept") == int(stats.accepted[0]) and names.count("reject") == int(stats.rejected[0])
    assert names[::2] == ["step"] * (len(names) // 2) and "step" not in names[1::2]
    func.calls.clear()
    with pytest.warns(UserWarning, match="callback_accept_step and callback_reject_step are not called"):
        ns.odeint(func, START, TIMES, method="rk4", steps=5)
    assert [name for name, _ in func.calls] == ["step"] * 10


@pytest.mark.parametrize("name", ["rk4", "dopri5", "trbdf2"])
def test_a_func_that_works_in_place_gets_copies(name: str) -> None:
    y0 = START.clone()
    kept = y0.clone()
    steps: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if METHODS[name].error else {"steps": 20}
    expected = ns.odeint(lambda t, y: -2 * y, y0, TIMES, method=name, **steps)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = ns.odeint(lambda t, y: y.mul_(-2), y0, TIMES, method=name, **steps)
        assert torch.equal(y0, kept) and torch.equal(found, expected)


def test_a_func_that_works_in_place_only_later_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in place"):
        ns.odeint(lambda t, y: y.mul_(-2) if t > 0.5 else -2 * y, START.clone(), TIMES, method="rk4", steps=5)


def test_states_of_low_precision_are_summed_in_float32_and_returned_in_their_own() -> None:
    y0 = torch.ones(3, 2, dtype=torch.bfloat16)
    seen = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.add(y.dtype)
        return -y

    ys = ns.odeint(func, y0, [0.0, 1.0], method="rk4", steps=1000)
    assert ys.dtype == torch.bfloat16 and seen == {torch.bfloat16}
    assert float(ys[-1].float().mean()) == pytest.approx(exp(-1), abs=4e-3)  # in bfloat16 no step would move it


def test_slopes_of_another_type_do_not_change_the_solves() -> None:
    factor = torch.tensor([2.0], dtype=torch.float64)
    ys = ns.odeint(lambda t, y: -factor * y, START.float(), TIMES, method="rk4", steps=4)
    assert ys.dtype == torch.float32


def test_each_samples_own_times_give_what_a_solve_of_each_alone_gives() -> None:
    t = torch.tensor([[0.0, 0.0], [0.4, 1.1], [2.0, 1.7]], dtype=torch.float64, requires_grad=True)
    y0 = START.clone().requires_grad_()
    ys = ns.odeint(pendulum, y0, t, method="dopri5", rtol=1e-11, atol=1e-12)
    alone = [ns.odeint(pendulum, y0[i : i + 1], t[:, i], method="dopri5", rtol=1e-11, atol=1e-12) for i in range(2)]
    expected = torch.cat(alone, dim=1)
    assert relative_error([ys], [expected]) < 1e-8
    to_t, expected_to_t = (torch.autograd.grad(x[1:].sum(), t, retain_graph=True)[0] for x in (ys, expected))
    torch.testing.assert_close(to_t[1:], expected_to_t[1:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="begin together"):
        ns.odeint(pendulum, y0, t + torch.tensor([0.0, 0.1]), method="dopri5")


def test_a_pulse_is_seen_where_it_is_named() -> None:
    def pulse(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((t >= 5.0) & (t < 5.01), 100.0, 0.0) * torch.ones_like(y)

    y0 = torch.zeros(1, 1, dtype=torch.float64)
    options = {"jump_t": [5.0, 5.01]}
    ys = ns.odeint(pulse, y0, [0.0, 10.0], method="dopri5", options=options)
    assert float(ys[-1]) == pytest.approx(1.0, abs=1e-6)
    ys = ns.odeint(pulse, y0, [0.0, 10.0], method="dopri5", options={"max_step": 0.005})
    assert float(ys[-1]) == pytest.approx(1.0, abs=1e-2)


def test_float32_times_too_coarse_for_the_steps_are_refused() -> None:
    t = [1.7e9, 1.7e9 + 10]
    with pytest.raises(ValueError, match="too coarse for steps"):
        ns.odeint(lambda t, y: -y, torch.ones(1, 1), t, method="rk4", steps=10)
    ys = ns.odeint(lambda t, y: -y, torch.ones(1, 1, dtype=torch.float64), t, method="rk4", steps=100)
    assert float(ys[-1]) == pytest.approx(exp(-10), rel=1e-3)


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_transforms_of_an_explicit_solve_are_those_of_its_operations(name: str) -> None:
    choice: dict[str, Any] = {"steps": 3}

    def final(y0: Tensor) -> Tensor:
        ys = ns.odeint(pendulum, y0, TIMES, method=name, **choice)
        assert isinstance(ys, Tensor)
        return ys[-1]

    expected = torch.autograd.functional.jacobian(final, START[0])
    torch.testing.assert_close(torch.func.jacrev(final)(START[0]), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.func.jacfwd(final)(START[0]), expected, rtol=1e-12, atol=1e-13)
    each = torch.func.vmap(final)(START)
    torch.testing.assert_close(each, torch.stack([final(y) for y in START]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_a_module_around_given_steps_compiles_in_one_graph(name: str) -> None:
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def final(y0: Tensor) -> Tensor:
        ys = ns.odeint(lambda t, y: f(y) * t, y0, (0.0, 1.0), method=name, steps=3)
        assert isinstance(ys, Tensor)
        return ys[-1]

    compiled = torch.compile(final, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(START), final(START), rtol=1e-12, atol=1e-13)


# ---- func that couples samples ---------------------------------------------------------------------------------------

NODES = 8
LAPLACIAN = torch.zeros(NODES, NODES, dtype=torch.float64)
for _i in range(NODES):  # of a ring, with one long edge
    for _j in ((_i + 1) % NODES, (_i + 3) % NODES if _i == 0 else (_i + 1) % NODES):
        LAPLACIAN[_i, _i] += 1
        LAPLACIAN[_j, _j] += 1
        LAPLACIAN[_i, _j] -= 1
        LAPLACIAN[_j, _i] -= 1


@pytest.mark.parametrize("solver", ["anderson", "newton", "krylov"])
@pytest.mark.parametrize(
    ("name", "adjoint"),
    [
        *((name, "discrete") for name in ("implicit_euler", "implicit_midpoint", "trapezoid", "trbdf2")),
        ("implicit_midpoint", "reversible"),
    ],
)
def test_coupled_samples_take_the_steps_of_the_dense_solves(name: str, adjoint: str, solver: str) -> None:
    y0 = torch.zeros(NODES, 1, dtype=torch.float64)
    y0[0] = 1.0
    y0.requires_grad_()
    strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    h, unit = 0.25, torch.eye(NODES, dtype=torch.float64)
    g = METHODS[name].a[-1][-1]

    def dense(y: Tensor) -> Tensor:
        m = strength * LAPLACIAN
        for _ in range(4):
            if name == "implicit_euler":
                y = torch.linalg.solve(unit + h * m, y)
            elif name in ("implicit_midpoint", "trapezoid"):
                y = torch.linalg.solve(unit + h / 2 * m, y - h / 2 * m @ y)
            else:
                f1 = -m @ y
                y2 = torch.linalg.solve(unit + g * h * m, y + g * h * f1)
                w = METHODS[name].b[0]
                y = torch.linalg.solve(unit + g * h * m, y + h * w * (f1 - m @ y2))
        return y

    expected = dense(y0)
    ys = ns.odeint(
        lambda t, y: -strength * LAPLACIAN @ y,
        y0,
        [0.0, 1.0],
        method=name,
        steps=4,
        adjoint=adjoint,
        options={"stage_solver": solver, "checkpoint_every": 1},  # too strong a contraction to be undone further
    )
    assert relative_error([ys[-1]], [expected]) < 1e-10
    weights = torch.linspace(1, 2, NODES, dtype=torch.float64)[:, None]
    found, wanted = (torch.autograd.grad((y * weights).sum(), (y0, strength)) for y in (ys[-1], expected))
    assert relative_error(found, wanted) < 1e-10


def test_newton_krylov_solves_image_sized_stiff_states() -> None:
    torch.manual_seed(0)
    y0, rate = torch.randn(4, 1, 16, 16, dtype=torch.float64), 50.0 / 8
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)[None, None]

    def heat(t: Tensor, y: Tensor) -> Tensor:
        return rate * torch.nn.functional.conv2d(torch.nn.functional.pad(y, (1, 1, 1, 1), mode="circular"), kernel)

    ys = ns.odeint(heat, y0, [0.0, 20.0], method="implicit_euler", steps=20, options={"stage_solver": "krylov"})
    frequencies = 2 * torch.cos(2 * pi * torch.arange(16, dtype=torch.float64) / 16) - 2
    symbol = rate * (frequencies[:, None] + frequencies[None, :])
    expected = torch.fft.ifft2(torch.fft.fft2(y0) / (1 - symbol) ** 20).real
    assert relative_error([ys[-1]], [expected]) < 1e-9
