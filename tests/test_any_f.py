"""Whatever f a user brings is solved right, or refused with the remedy: state held elsewhere, jumps, buffers, times."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from math import cos, exp, sin

import pytest
import torch
from problems import gradients, relative_error
from torch import Tensor, nn

import nodeshape as ns

ONE = torch.ones(1, 1, dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


class CountCalls(list[float]):
    """The times at which a module's own forward is called while the context lasts: none, if a kernel solves."""

    def __init__(self, module: nn.Module) -> None:
        self.forward, self.kind = type(module).forward, type(module)

    def __enter__(self) -> CountCalls:
        def counted(module: nn.Module, t: Tensor, y: Tensor) -> Tensor:
            self.append(float(t.flatten()[0]))
            out: Tensor = self.forward(module, t, y)
            return out

        self.kind.forward = counted
        return self

    def __exit__(self, *error: object) -> None:
        self.kind.forward = self.forward


# ---- what f depends on besides time and state -----------------------------------------------------------------------


class Controlled(nn.Module):
    """dy/dt = u · y, u an attribute, a buffer or a frozen weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        one = torch.tensor(1.0, dtype=torch.float64)
        if kind == "buffer":
            self.register_buffer("u", one)
        else:
            self.u = nn.Parameter(one, requires_grad=False) if kind == "weight" else one

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.u * y


@pytest.mark.parametrize("kind", ["attribute", "buffer", "weight"])
def test_a_control_set_between_two_solves_counts_as_it_was_in_each(kind: str) -> None:
    func = Controlled(kind)
    y0 = ONE.clone().requires_grad_()

    def two_solves(**how: object) -> Tensor:
        func.u.fill_(1.0)
        first = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=1, **how)[-1]
        with torch.no_grad():
            if kind == "attribute":
                func.u = torch.tensor(9.0, dtype=torch.float64)  # another tensor: f now is 9 y
            else:
                func.u.fill_(9.0)
        second = ns.odeint(func, first, [0.0, 1.0], method="euler", steps=1, **how)[-1]
        if kind == "attribute":
            func.u = torch.tensor(9.0, dtype=torch.float64)
        return second

    if kind == "attribute":
        assert float(torch.autograd.grad(two_solves().sum(), y0)[0]) == 20.0
    for how in ({"adjoint": "reversible"}, {"options": {"recompute": True}}):
        if kind == "buffer":  # kept as it was
            func.u.fill_(1.0)
            assert float(torch.autograd.grad(two_solves(**how).sum(), y0)[0]) == pytest.approx(20.0)
        else:  # nobody can know: found out
            with pytest.raises(RuntimeError, match=r"not what it was in the forward pass|has been changed in place"):
                torch.autograd.grad(two_solves(**how).sum(), y0)


class Noisy(nn.Module):
    """With dropout, batch normalisation and spectral norm: nothing that is the same when it is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Dropout(0.4),
            nn.Linear(8, 4),
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.layers(y)
        return out * torch.cos(t)


@pytest.mark.parametrize("bound", [True, False])
def test_dropout_batch_norm_and_spectral_norm_give_autograds_gradient_and_count_once(bound: bool) -> None:
    torch.manual_seed(0)
    func = Noisy().double()
    f: Callable[[Tensor, Tensor], Tensor] = func if bound else lambda t, y: func(t, y)
    start = {name: x.clone() for name, x in func.state_dict().items()}
    y0 = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    inputs = (y0, *func.parameters())
    found = []
    for how in ({"adjoint": "discrete"}, {"adjoint": "reversible"}, {"options": {"recompute": True}}):
        func.load_state_dict(start)
        func.train()
        torch.manual_seed(5)
        ys = ns.odeint(f, y0, [0.0, 0.3, 1.0], method="euler", steps=2, **how)
        if how.get("adjoint") == "reversible":
            continue  # its undone steps are equations, in which f must be a function: below
        before = {name: x.clone() for name, x in func.state_dict().items()}
        func.eval()  # before backward(): the forward pass was in training mode
        random = torch.get_rng_state()
        found.append(gradients(ys, inputs))
        assert not func.training and torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(x, before[name]) for name, x in func.state_dict().items())
        assert int(func.layers[1].num_batches_tracked) == 4
    assert relative_error(found[1], found[0]) < 1e-12


def test_steps_are_undone_with_the_dropout_mask_they_were_taken_with() -> None:
    torch.manual_seed(0)
    drop, layer = nn.Dropout(0.3), nn.Linear(4, 4).double()
    y0 = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return drop(torch.tanh(layer(y)))

    found = []
    for adjoint in ("discrete", "reversible"):
        torch.manual_seed(5)
        ys = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=8, adjoint=adjoint)
        found.append(gradients(ys, (y0, layer.weight)))
    assert relative_error(found[1], found[0]) < 1e-9
    torch.manual_seed(5)
    ys = ns.odeint(func, y0, [0.0, 1.0], method="rk4", steps=8, adjoint="continuous")
    with pytest.raises(RuntimeError, match="not what it was in the forward pass"):  # other times, other masks
        gradients(ys, (y0, layer.weight))


def test_an_optimiser_step_before_backward_is_an_error_in_every_mode() -> None:
    layer = nn.Linear(3, 3).double()
    y0 = torch.randn(2, 3, dtype=torch.float64)
    for how in ({"adjoint": "reversible"}, {"adjoint": "continuous"}, {"options": {"recompute": True}}, {}):
        ys = ns.odeint(lambda t, y: torch.tanh(layer(y)), y0, [0.0, 1.0], method="implicit_midpoint", steps=3, **how)
        with torch.no_grad():
            layer.weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ys.sum().backward()


def test_a_buffer_changed_before_backward_counts_as_it_was() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones((), dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y * (self.mask if t > 0.5 else 1.0)  # what the guard of the first evaluation does not see

    func = Masked()
    y0 = ONE.clone().requires_grad_()
    ys = ns.odeint_adjoint(func, y0, [0.0, 1.0], method="rk4", steps=20)
    func.mask.fill_(5.0)
    ys[-1].sum().backward()
    assert float(y0.grad) == pytest.approx(exp(-1), rel=1e-5) and float(func.mask) == 5.0


@pytest.mark.parametrize("how", [{}, {"adjoint": "reversible"}, {"adjoint": "continuous"}])
def test_tensors_held_by_a_module_or_a_closure_get_their_gradient(how: dict[str, str]) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.context: Tensor | None = None

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.layer(y)) + self.context

    torch.manual_seed(0)
    func, weight = Conditioned(), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    image = torch.randn(2, 3, dtype=torch.float64)
    func.context = image @ weight
    y0 = torch.zeros(2, 3, dtype=torch.float64)
    ys = ns.odeint(func, y0, [0.0, 1.0], method="implicit_midpoint", steps=40, **how)
    (found,) = torch.autograd.grad(ys[-1].sum(), weight, retain_graph=True)
    y = y0
    for _ in range(400):  # by hand
        middle = y + 0.00125 * (torch.tanh(func.layer(y)) + func.context)
        y = y + 0.0025 * (torch.tanh(func.layer(middle)) + func.context)
    (expected,) = torch.autograd.grad(y.sum(), weight)
    assert relative_error([found], [expected]) < 1e-4


def test_a_tensor_that_only_the_middle_of_a_solve_depends_on_is_found_out() -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y0 = ONE.clone().requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -w * y if 0.4 < t < 0.6 else -y

    discrete = torch.autograd.grad(ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=50)[-1].sum(), w)[0]
    assert float(discrete) < -0.05
    for adjoint in ("reversible", "continuous"):
        ys = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=50, adjoint=adjoint)
        with pytest.raises(RuntimeError, match="adjoint_params"):
            ys.sum().backward()
        ys = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=50, adjoint=adjoint, adjoint_params=[w])
        (found,) = torch.autograd.grad(ys[-1].sum(), w)
        assert float(found) == pytest.approx(float(discrete), rel=1e-1 if adjoint == "continuous" else 1e-9)


def test_adjoint_params_may_be_none_some_or_computed() -> None:
    z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = torch.tanh(z)
    y0 = ONE.clone().requires_grad_()
    for params in ((), (w,)):
        ys = ns.odeint_adjoint(lambda t, y: -w * y, y0, [0.0, 1.0], method="rk4", steps=20, adjoint_params=params)
        to_y0, to_z = torch.autograd.grad(ys[-1].sum(), (y0, z), allow_unused=True)
        rate = float(w.detach())
        assert float(to_y0) == pytest.approx(exp(-rate), rel=1e-6)
        if params:
            assert float(to_z) == pytest.approx(-exp(-rate) * (1 - rate**2), rel=1e-5)
        else:
            assert to_z is None


# ---- what f does -----------------------------------------------------------------------------------------------------


def test_an_f_that_calls_autograd_runs_in_every_grad_mode() -> None:
    def force(t: Tensor, y: Tensor) -> Tensor:  # −∇ of y⁴/4
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            (out,) = torch.autograd.grad(x.pow(4).sum() / 4, x, create_graph=True)
        return -out

    exact = 1 / 3**0.5  # of y' = −y³ from 1 at t=1
    for how in ({}, {"adjoint": "reversible"}, {"adjoint": "continuous"}):
        y0 = ONE.clone().requires_grad_()
        ys = ns.odeint(force, y0, [0.0, 1.0], method="implicit_midpoint", steps=200, **how)
        assert float(ys[-1]) == pytest.approx(exact, rel=1e-5)
        (grad,) = torch.autograd.grad(ys[-1].sum(), y0)
        assert float(grad) == pytest.approx(exact**3, rel=1e-4)
        with torch.no_grad():
            ys = ns.odeint(force, ONE, [0.0, 1.0], **how)
            assert float(ys[-1]) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_an_f_that_returns_one_buffer_again_and_again_is_refused(method: str) -> None:
    a, y0 = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    buffer = torch.empty(3, 2, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError, match="wrote into the tensor that it had returned before"):
        ns.odeint(lambda t, y: torch.matmul(y, a, out=buffer), y0, [0.0, 1.0], method=method)
    shift = torch.ones(3, 2, dtype=torch.float64)  # the same tensor, which nobody writes into, is right
    assert float(ns.odeint(lambda t, y: shift, y0, [0.0, 1.0], method=method)[-1, 0, 0]) == pytest.approx(2.0)


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_complex_states_may_be_taken_anew_for_their_gradient(method: str) -> None:
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([1 + 0.5j, 0.2j], dtype=torch.complex128, requires_grad=True)
    found = []
    for recompute in (False, True):
        options = {"recompute": recompute}
        ys = ns.odeint(lambda t, y: 1j * y * rate, y0, [0.0, 1.0], method=method, steps=5, options=options)
        found.append(torch.autograd.grad(ys[-1].abs().square().sum() + ys[-1].real.sum(), [y0, rate]))
    for record, anew in zip(*found):
        torch.testing.assert_close(record, anew, rtol=1e-13, atol=1e-13)


def test_complex_slopes_of_real_states_are_refused_in_tuples_too() -> None:
    with pytest.raises(ValueError, match="give a complex y0"):
        ns.odeint(lambda t, y: (1j * y[0],), (ONE,), [0.0, 1.0])


def test_an_f_of_another_dtype_does_not_change_that_of_the_solution() -> None:
    double = torch.full((1, 2), 0.5, dtype=torch.float64)
    for method in ("euler", "rk4", "implicit_midpoint", "dopri5"):
        ys = ns.odeint(lambda t, y: -y * double, torch.ones(1, 2), [0.0, 1.0], method=method)
        assert ys.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_solved_by_every_kind_of_method(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 8))
    y0 = torch.randn(4, 8)

    def func(t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = low(torch.cat([y, t.expand(len(y), 1)], dim=1))  # as f's weights have it, time too
        return out

    low = net
    expected = ns.odeint(func, y0, [0.0, 1.0])
    low = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 8))
    low.load_state_dict(net.state_dict())
    low = low.to(dtype)
    for method in ("rk4", "trapezoid", "implicit_midpoint", "trbdf2"):
        low.zero_grad()
        ys = ns.odeint(func, y0.to(dtype), [0.0, 1.0], method=method, steps=5)
        assert ys.dtype == dtype and float((ys.float() - expected).abs().max()) < 0.05
        ys.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in low.parameters())


# ---- times -----------------------------------------------------------------------------------------------------------


def test_no_observation_is_lost_where_times_cross_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        t = (torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1.2).sort().values
        for method in ("dopri5", "bosh3"):
            for options in ({}, {"step_control": "per_sample"}):
                ys = ns.odeint(decay, torch.ones(2, 1, dtype=torch.float64), t, method=method, options=options)
                assert ys.shape == (4, 2, 1)
                torch.testing.assert_close(ys[:, 0, 0], torch.exp(t[0] - t), rtol=1e-5, atol=0.0)


TIMED = {
    "fixed": {"method": "rk4", "steps": 20},
    "implicit": {"method": "trapezoid", "steps": 30},
    "adaptive": {"method": "dopri5"},
    "doubling": {"method": "rk4", "rtol": 1e-7, "atol": 1e-9},
    "on a grid": {"method": "rk4", "options": {"step_size": 0.03, "interp": "cubic"}},
    "stop at an observation": {"method": "dopri5", "options": {"step_t": [0.5]}},
    "per sample": {"method": "dopri5", "options": {"step_control": "per_sample"}},
    "reversible": {"method": "implicit_midpoint", "steps": 60, "adjoint": "reversible"},
    "continuous": {"method": "dopri5", "adjoint": "continuous"},
}


@pytest.mark.parametrize("name", TIMED)
def test_gradients_by_times_are_those_of_the_solution(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for k in range(4):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        if k:
            t = t + 0.2 * torch.rand(3, generator=generator, dtype=torch.float64)
        t.requires_grad_()
        y0 = torch.ones(2, 1, dtype=torch.float64)
        ys = ns.odeint(lambda t, y: y * torch.cos(t), y0, t, **TIMED[name])
        s = t.detach()
        values = torch.exp(torch.sin(s) - torch.sin(s[0]))
        torch.testing.assert_close(ys[:, 0, 0].detach(), values, rtol=1e-3, atol=0.0)
        (found,) = torch.autograd.grad(ys[1, 0, 0] + 2 * ys[2, 1, 0], t)
        slopes = values * torch.cos(s) * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        slopes[0] = -(values[1] + 2 * values[2]) * torch.cos(s[0])
        torch.testing.assert_close(found, slopes, rtol=3e-2, atol=1e-3)


def test_dense_output_differentiates_by_the_times_of_the_solve() -> None:
    for solve in ({"method": "dopri5"}, {"method": "rk4", "steps": 8}):
        t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
        dense = ns.odeint(lambda t, y: y, ONE, t, return_dense=True, **solve)
        (found,) = torch.autograd.grad(dense(0.3).sum(), t)
        assert float(found[0]) == pytest.approx(-exp(0.3), rel=1e-3) and abs(float(found[1])) < 1e-3


def test_times_of_single_precision_are_computed_with_in_double() -> None:
    t = torch.tensor([0.1, 1.0], requires_grad=True)
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.cos(20 * t) + 0 * y

    ys = ns.odeint(func, ONE, t, rtol=1e-10, atol=1e-12)
    low, high = (float(x) for x in t.detach().double())
    assert float(ys[-1]) == pytest.approx(1 + (sin(20 * high) - sin(20 * low)) / 20, abs=1e-9) and calls < 3000


def test_each_samples_own_times_have_their_own_gradient() -> None:
    t = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.3]], dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    ys = ns.odeint(lambda t, y: y * torch.cos(t), y0, t)
    weights = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, -1.0]], dtype=torch.float64)
    to_t, to_y0 = torch.autograd.grad((ys[..., 0] * weights).sum(), (t, y0))
    s = t.detach()
    growth = torch.exp(torch.sin(s) - torch.sin(s[0]))
    values = growth * y0.detach()[:, 0]
    expected = weights * values * torch.cos(s)
    expected[0] = -(weights[1:] * values[1:]).sum(dim=0) * torch.cos(s[0])
    torch.testing.assert_close(to_t, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(to_y0[:, 0], (weights[1:] * growth[1:]).sum(dim=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "tsit5", "dopri8"])
@pytest.mark.parametrize("control", ["shared", "per_sample"])
def test_a_jump_that_is_named_costs_two_solves_of_one_side_each(method: str, control: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.where(t < 1, 100.0, -100.0) + 0 * y

    options = {"jump_t": [1.0], "step_control": control}
    y0 = torch.zeros(2, 1, dtype=torch.float64)
    ys = ns.odeint(func, y0, [0.0, 2.0], method=method, rtol=1e-6, atol=1e-8, options=options)
    assert float(ys[-1].abs().max()) < 1e-10 and calls < 120


def test_perturb_keeps_methods_that_hand_on_their_last_slope_right() -> None:
    for method in ("dopri5", "heun2", "bosh3"):
        ys = ns.odeint(
            lambda t, y: torch.where(t < 1, 1.0, -1.0) + 0 * y,
            0 * ONE,
            [0.0, 2.0],
            method=method,
            steps=2,
            options={"perturb": True},
        )
        assert float(ys[-1]) == pytest.approx(0.0, abs=1e-12)


def test_torchdiffeqs_step_size_is_a_grid_from_the_first_time_on() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    for times, size in (([0.0, 0.5, 1.0], 0.3), ([0.0, 1.0], 0.3), ([1.0, 0.2, -0.5], 0.25), ([0.0, 0.5, 1.0], 0.1)):
        t = torch.tensor(times, dtype=torch.float64)
        for interp in ("linear", "cubic"):
            ours, theirs = (
                solve(lambda t, y: -y * t, ONE, t, method="midpoint", options={"step_size": size, "interp": interp})
                for solve in (ns.odeint, torchdiffeq.odeint)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_coarse_times_are_judged_interval_by_interval() -> None:
    t = torch.cat([torch.zeros(1), torch.logspace(-5, 2, 50)])
    ys = ns.odeint(decay, torch.ones(1, 1), t)
    torch.testing.assert_close(ys[:, 0, 0], torch.exp(-t), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"count time from the start, t - t\[0\]"):
        ns.odeint(decay, torch.ones(1, 1), torch.tensor([1.7e9, 1.7e9 + 1], dtype=torch.float64))


# ---- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", [ns.odeint, ns.odeint_adjoint])
def test_gradients_of_an_event_by_start_state_and_threshold(interface: Callable[..., object]) -> None:
    y0 = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solve = {"event_fn": lambda t, y: y.sum() - threshold, "odeint_interface": interface}
    time, ys = ns.odeint_event(decay, y0, t0, **solve)
    assert float(time) == pytest.approx(0.3 + torch.tensor(4.0).log().item(), rel=1e-6)
    to_t0, to_y0, to_threshold = torch.autograd.grad(time, (t0, y0, threshold), retain_graph=True)
    assert [float(x) for x in (to_t0, to_y0, to_threshold)] == pytest.approx([1.0, 0.5, -2.0], rel=1e-5)
    end = torch.autograd.grad(ys[-1].sum(), (t0, y0, threshold), allow_unused=True)
    assert [0.0 if x is None else float(x) for x in end] == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    solve["event_fn"] = lambda t, y: t - 1  # at a time that does not move
    time, ys = ns.odeint_event(decay, y0, t0, **solve)
    if time.requires_grad:
        to_t0 = torch.autograd.grad(time, t0, retain_graph=True, allow_unused=True)[0]
        assert to_t0 is None or abs(float(to_t0)) < 1e-12
    assert float(torch.autograd.grad(ys[-1].sum(), t0)[0]) == pytest.approx(2 * exp(-0.7), rel=1e-5)


def test_second_derivatives_of_an_event_are_refused() -> None:
    y0 = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    time, _ = ns.odeint_event(decay, y0, torch.tensor(0.0), event_fn=lambda t, y: y.sum() - 0.5)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(time, y0, create_graph=True)


@pytest.mark.parametrize("t", [torch.tensor([0, 1]), torch.tensor([0.0, 1.0])])
def test_the_state_at_an_event_is_that_of_its_time_in_every_mode(t: Tensor) -> None:
    p = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    for adjoint in ("discrete", "continuous"):
        time, ys = ns.odeint(lambda t, y: -p + 0 * y, y0, t, event_fn=lambda t, y: y.sum(), adjoint=adjoint)
        assert float(time) == pytest.approx(0.7) and abs(float(ys[-1])) < 1e-6


def test_an_event_function_that_is_zero_from_some_time_on_is_met_at_that_time() -> None:
    def event(t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(t) if t > 1.7 else y.sum() + 1

    for options in ({}, {"step_size": 0.4}):
        method = "rk4" if options else "dopri5"
        time, ys = ns.odeint(decay, ONE, [0.0, 1.0], event_fn=event, method=method, options=options)
        assert float(time) == pytest.approx(1.7, abs=1e-12)
        assert float(ys[-1]) == pytest.approx(exp(-1.7), rel=1e-3)


def test_an_event_that_is_not_a_number_or_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="event_fn returned NaN"):
        ns.odeint(decay, ONE, [0.0, 1.0], event_fn=lambda t, y: y.sum() * torch.nan)
    with pytest.raises(ns.StepSizeError, match="as many attempts as allowed"):
        ns.odeint(decay, ONE, [0.0, 1.0], event_fn=lambda t, y: y.sum() + 1, options={"max_num_steps": 30})


# ---- coupled states and stage equations ------------------------------------------------------------------------------


def test_a_stage_that_gmres_cannot_solve_is_an_error_or_solved() -> None:
    b = torch.zeros(100, dtype=torch.float64)
    b[0] = 1.0

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y - torch.roll(y, 1, -1) + b

    start = torch.ones(100, dtype=torch.float64)
    for solver in ("anderson", "newton", "krylov"):
        try:
            options = {"stage_solver": solver}
            y = ns.odeint(func, start, [0.0, 1.0], method="implicit_euler", steps=1, options=options)[-1]
        except ns.StageSolveError:
            assert solver != "newton"
        else:
            assert float((y - start - func(torch.tensor(1.0), y)).abs().max()) < 1e-9


def test_a_stage_without_a_number_shortens_the_step_or_is_one_error() -> None:
    tiny = torch.full((1, 1), 1e-18, dtype=torch.float64)
    for solver in ("anderson", "newton", "krylov"):
        with pytest.raises((ns.StageSolveError, ns.StepSizeError)):
            options = {"stage_solver": solver, "max_num_steps": 60}
            ns.odeint(lambda t, y: -y.sqrt(), tiny, [0.0, 1.0], method="sdirk2", options=options)
    for func in (lambda t, y: 1 / t.sqrt() + 0 * y, lambda t, y: 1e35 * y):
        with pytest.raises(ns.StepSizeError):
            ns.odeint(func, torch.ones(1, 1), [0.0, 1.0])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0,)])
def test_empty_states_are_solved_by_every_method(shape: tuple[int, ...]) -> None:
    for method in ("rk4", "dopri5", "trapezoid", "implicit_midpoint"):
        for solver in ("anderson", "newton", "krylov"):
            y0 = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            ys = ns.odeint(decay, y0, [0.0, 1.0], method=method, options={"stage_solver": solver})
            assert ys.shape == (2, *shape)
            ys.sum().backward()


def test_implicit_stages_under_transforms_are_refused_and_explicit_ones_right() -> None:
    def end(y0: Tensor, method: str) -> Tensor:
        return ns.odeint(decay, y0, [0.0, 1.0], method=method, steps=20)[-1]

    for method in ("implicit_midpoint", "trapezoid"):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
            end(torch.autograd.forward_ad.make_dual(ONE, ONE), method)
    _, tangent = torch.func.jvp(lambda y: end(y, "rk4"), (ONE,), (ONE,))
    assert float(tangent) == pytest.approx(exp(-1), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"cannot be mapped by torch\.func\.vmap"):
        torch.func.vmap(lambda y: ns.odeint(decay, y, [0.0, 1.0])[-1])(torch.ones(3, 1))
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
        torch.func.grad(lambda y: ns.odeint(decay, y, [0.0, 1.0], adjoint="continuous")[-1].sum())(ONE)


def test_states_made_in_inference_mode_are_solved_outside_it() -> None:
    with torch.inference_mode():
        y0 = torch.ones(2, 2, dtype=torch.float64)
    for method in ("dopri5", "sdirk2", "implicit_midpoint"):
        assert float(ns.odeint(decay, y0, [0.0, 1.0], method=method, steps=50)[-1, 0, 0]) == pytest.approx(
            exp(-1), rel=1e-3
        )
        with torch.inference_mode():
            ns.odeint(decay, y0, [0.0, 1.0], method=method, steps=5)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_fn": lambda t, y: y.sum(), "return_stats": True}, "event_fn does not go with return_stats"),
        ({"steps": 10, "options": {"grid_constructor": lambda f, y, t: t}}, "not two of them"),
        ({"options": {"norm": "seminorm"}}, "norm 'seminorm' is of the backward pass"),
        ({"rtol": (1e-3, 1e-3)}, "a tuple of 2 tolerances needs a tuple state"),
        ({"atol": torch.tensor([-1.0])}, "atol must be a positive number or 0"),
        ({"adjoint": "continuous", "return_dense": True}, "return_dense keeps every step"),
        ({"adjoint": "reversible", "method": "euler", "options": {"perturb": True}}, "'perturb' does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ns.odeint(decay, ONE.clone().requires_grad_(), [0.0, 1.0], **arguments)
    for t in ([0.0], torch.zeros(0, 1), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"need at least two times|t must"):
            ns.odeint(decay, ONE, t, return_dense=True)


def test_zero_tolerances_error_control_options_and_one_time() -> None:
    for tolerances in ({"rtol": 0.0, "atol": 1e-8}, {"rtol": 1e-8, "atol": 0.0}):
        assert float(ns.odeint(decay, ONE, [0.0, 1.0], **tolerances)[-1]) == pytest.approx(exp(-1), rel=1e-6)
    # An option of error control asks for it, of a method without an estimate too.
    ys = ns.odeint(decay, ONE, [0.0, 3.0], method="rk4", options={"max_step": 0.5})
    assert float(ys[-1]) == pytest.approx(exp(-3), rel=1e-5)
    alone = ns.odeint(decay, ONE, [0.0])
    alone.zero_()
    assert float(ONE) == 1.0


def test_backend_says_what_odeint_does() -> None:
    torch.manual_seed(0)
    func, y0 = ns.MLPDynamics(3), torch.randn(2, 3)
    times = {"one interval": [0.0, 1.0], "two": [0.0, 0.5, 1.0], "own": torch.tensor([[0.0, 0.0], [0.5, 1.0]])}
    choices: list[dict[str, object]] = [
        {},
        {"method": "euler"},
        {"adjoint": "reversible"},
        {"adjoint": "reversible", "options": {"step_size": 0.3}},
        {"method": "euler", "options": {"step_size": 0.3}},
        {"method": "euler", "options": {"step_size": 0.25}},
        {"method": "euler", "options": {"max_step": 0.1}},
        {"method": "euler", "step_size": 0.3, "adjoint_params": ()},
    ]
    for name, t in times.items():
        for choice in choices:
            with CountCalls(func) as calls:
                ns.odeint(func, y0, t, **choice)
            assert ns.backend(func, y0, t, **choice).name == ("plain" if calls else "fused"), (name, choice)


def test_the_backward_solve_is_what_adjoint_options_say() -> None:
    k = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    solve = {"method": "rk4", "options": {"step_size": 0.5}}
    for backward in ({"adjoint_method": "dopri5", "adjoint_options": {}}, {"adjoint_options": {"step_size": 0.01}}):
        ys = ns.odeint_adjoint(
            lambda t, y: -k * y * (1 + 10 * cos(3 * float(t)) ** 2), ONE, [0.0, 2.0], **solve, **backward
        )
        (found,) = torch.autograd.grad(ys[-1].sum(), k)
        fine = ns.odeint(lambda t, y: -k * y * (1 + 10 * cos(3 * float(t)) ** 2), ONE, [0.0, 2.0], **solve)
        assert torch.isfinite(found) and float(ys[-1]) == float(fine[-1])
        rate = 2 + 10 * (1 + sin(12) / 12)  # the exact integral; y from the coarse solve
        assert float(found) == pytest.approx(-rate * float(ys[-1]), rel=0.5)


# ---- compilers and exporters -----------------------------------------------------------------------------------------


class Around(nn.Module):
    """A module that solves in its forward pass, as users write it."""

    def __init__(self, **solve: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
        self.solve = solve

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([y, t.expand(y.shape[0], 1)], dim=1))
        return out

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return ns.odeint(self.f, y, t, **self.solve)[-1]


@pytest.mark.parametrize(
    "solve",
    [
        {"method": "euler", "steps": 3},
        {"method": "rk4", "steps": 2},
        {"method": "dopri5", "steps": 1},
        {"method": "heun2"},
        {"method": "implicit_midpoint", "steps": 1, "options": {"max_stage_iterations": 6, "stage_tolerance": 1e-3}},
    ],
    ids=lambda solve: solve["method"],
)
def test_given_steps_compile_into_one_graph_and_export(solve: dict[str, object]) -> None:
    module, y, t = Around(**solve), torch.randn(3, 4), torch.tensor([0.0, 0.4, 1.0])
    expected = module(y, t)
    torch.autograd.backward(expected.square().sum())
    gradient = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(y, t)
    close = 1e-2 if "options" in solve else 1e-5
    torch.testing.assert_close(found, expected, rtol=close, atol=0.1 * close)
    found.square().sum().backward()
    assert relative_error([p.grad for p in module.parameters()], gradient) < 10 * close
    if solve["method"] != "implicit_midpoint":
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(module, (y, t), dynamic_shapes={"y": {0: batch}, "t": None})
        other = torch.randn(7, 4)
        torch.testing.assert_close(program.module()(other, t), module(other, t), rtol=1e-5, atol=1e-6)


def test_a_traced_stage_that_is_not_solved_is_not_a_number() -> None:
    torch._dynamo.reset()

    def stiff(y: Tensor) -> Tensor:
        rates = torch.tensor([1.0, 300.0, 7000.0, 2e5])
        options = {"max_stage_iterations": 3}
        return ns.odeint(lambda t, y: -rates * y, y, [0.0, 1.0], method="implicit_euler", steps=1, options=options)[-1]

    assert torch.compile(stiff, fullgraph=True, backend="aot_eager")(torch.ones(2, 4)).isnan().all()


def test_a_step_is_compiled_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    count = 0

    def counted(step: Callable[..., object], **how: object) -> object:
        nonlocal count
        count += 1
        return compiled(step, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", counted)
    torch.manual_seed(0)
    net = nn.Linear(4, 4).double()
    y0 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(net(y)) * t

    for state in (y0, (y0[:, :1], y0[:, 1:])):
        g = f if isinstance(state, Tensor) else lambda t, y: f(t, torch.cat(y, dim=1)).split([1, 3], dim=1)
        results = []
        for options in ({"compile": True}, {"compile": True}, {}):
            ys = ns.odeint(g, state, [0.0, 0.5, 1.0], method="rk4", steps=3, options=options)
            ys = ys if isinstance(ys, Tensor) else torch.cat(ys, dim=2)
            results.append([ys, *gradients(ys, (y0, net.weight))])
        assert relative_error(results[0], results[2]) < 1e-12 and relative_error(results[1], results[2]) < 1e-12
    assert count == 2  # once for each f
    with pytest.raises(ValueError, match="compiles given steps of explicit methods"):
        ns.odeint(f, y0, [0.0, 1.0], options={"compile": True})


# ---- what a second look found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"adjoint": "continuous"}, {"options": {"recompute": True}}])
def test_times_count_as_they_are_where_a_solve_is_traced(how: dict[str, object]) -> None:
    def end(y: Tensor, t: Tensor) -> Tensor:
        return ns.odeint(lambda t, y: -y * (1 + t), y, t, method="rk4", steps=10, **how)[-1]

    torch._dynamo.reset()
    y, t = torch.ones(2, 2, dtype=torch.float64), torch.tensor([0.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(torch.compile(end, backend="eager")(y, t), end(y, t))


def test_solves_are_freed_with_their_gradients() -> None:
    class Token:
        pass

    for method in ("implicit_midpoint", "trapezoid", "rk4", "dopri5"):
        layer = nn.Linear(3, 3).double()
        token = Token()

        def func(t: Tensor, y: Tensor, layer: nn.Linear = layer, token: Token = token) -> Tensor:
            return torch.tanh(layer(y))

        gone = weakref.ref(token)
        how = {} if method == "dopri5" else {"steps": 3}
        ns.odeint(func, torch.ones(2, 3, dtype=torch.float64), [0.0, 1.0], method=method, **how)[-1].sum().backward()
        del func, token
        gc.collect()
        assert gone() is None, method


def test_an_f_that_works_in_place_does_not_touch_events_or_own_times() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        y.neg_()
        return y

    y0 = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    time, ys = ns.odeint(func, y0, [0.0, 1.0], event_fn=lambda t, y: y.sum() - 1)
    assert float(ys[-1]) == pytest.approx(1.0) and float(torch.autograd.grad(time, y0)[0]) == pytest.approx(0.5)
    t = torch.tensor([[0.0, 0.0], [0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    ys = ns.odeint(func, torch.ones(2, 1, dtype=torch.float64), t)
    assert ys[-1, :, 0].tolist() == pytest.approx([exp(-0.5), exp(-1)])


def test_the_element_of_an_event_that_changed_its_sign_moves_it() -> None:
    y0 = ONE.clone().requires_grad_()
    for how in ({}, {"adjoint": "continuous"}, {"options": {"recompute": True}}):
        time, _ = ns.odeint(
            lambda t, y: -y * (1 + t.sin()),
            y0,
            [0.0, 1.0],
            event_fn=lambda t, y: torch.stack([1e3 * (y.sum() - 0.5), 1e-9 * (1 + t)]),
            **how,
        )
        assert float(torch.autograd.grad(time, y0)[0]) == pytest.approx(1 / (1 + sin(float(time))), rel=1e-4)
    time, ys = ns.odeint(  # without a slope at its zero: the value stands, the gradient is infinite
        lambda t, y: -torch.ones_like(y),
        y0,
        [0.0, 1.0],
        method="rk4",
        step_size=0.25,
        event_fn=lambda t, y: (y.sum() - 0.5) ** 3,
    )
    assert float(time) == pytest.approx(0.5, abs=1e-4) and float(ys[-1]) == pytest.approx(0.5, abs=1e-4)


def test_autocast_counts_as_it_was_in_the_forward_pass() -> None:
    torch.manual_seed(0)
    layer, y0 = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    for how in ({"options": {"recompute": True}}, {"adjoint": "reversible"}, {"adjoint": "continuous"}):
        seen: list[torch.dtype] = []

        def func(t: Tensor, y: Tensor, seen: list[torch.dtype] = seen) -> Tensor:
            out = layer(y)
            seen.append(out.dtype)
            return torch.tanh(out)

        with torch.autocast("cpu", torch.bfloat16):
            ys = ns.odeint(func, y0, [0.0, 1.0], method="euler", steps=2, **how)
        before = len(seen)
        with suppress(ns.StageSolveError):  # of a step that is undone, to the rounding of 8 bits
            ys.sum().backward()
        assert len(seen) > before and set(seen) == {torch.bfloat16}


def test_a_sample_that_is_not_finite_at_the_start_spoils_no_gradient() -> None:
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[2.0], [torch.nan]], dtype=torch.float64)
    for func in (lambda t, y: rate / y, lambda t, y: torch.log(rate * y)):
        alone = torch.autograd.grad(ns.odeint(func, y0[:1], [0.0, 1.0])[-1].sum(), rate)[0]
        ys = ns.odeint(func, y0, [0.0, 1.0], options={"on_failure": "nan"})
        (found,) = torch.autograd.grad(ys[-1, 0].sum(), rate)
        assert bool(ys[:, 1].isnan().all()) and float(found) == pytest.approx(float(alone), rel=1e-6)


def test_a_smallest_step_without_a_result_is_an_error_or_a_failed_sample() -> None:
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    for control in ("shared", "per_sample"):
        options = {"min_step": 1e-3, "step_control": control}
        with pytest.raises(ns.StepSizeError, match="min_step"):
            ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], options=options)
        options["on_failure"] = "nan"
        ys, stats = ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], options=options, return_stats=True)
        assert list(stats.failures) == [1] and float(ys[-1, 0]) == pytest.approx(1 / 9, rel=1e-3)
    alone = torch.tensor(2.0, dtype=torch.float64)  # no batch at all
    ys = ns.odeint(lambda t, y: y * y, alone, [0.0, 1.0], options={"on_failure": "nan"})
    assert bool(ys[-1].isnan())


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_each_stage_is_taken_anew_with_its_own_dropout_mask(method: str) -> None:
    torch.manual_seed(0)
    drop, layer = nn.Dropout(0.3), nn.Linear(4, 4).double()
    y0 = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return drop(torch.tanh(layer(y)))

    torch.manual_seed(5)
    options = {"recompute": True}
    ys = ns.odeint(func, y0, [0.0, 1.0], method=method, steps=4, options=options)
    (found,) = gradients(ys, (layer.weight,))
    for i, j in ((0, 0), (2, 3)):  # by differences, with the same masks
        ends = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                layer.weight[i, j] += shift
            torch.manual_seed(5)
            again = ns.odeint(func, y0, [0.0, 1.0], method=method, steps=4, options=options).detach()
            weights = torch.randn(ys.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            ends.append(float((again * weights).sum() + 0.5 * (again * again).sum()))
            with torch.no_grad():
                layer.weight[i, j] -= shift
        assert float(found[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_what_gradients_that_step_anew_do_not_take_is_refused() -> None:
    y0 = ONE.clone().requires_grad_()
    for options in ({"on_failure": "nan"}, {"jump_t": [0.5]}):
        with pytest.raises(ValueError, match=r"does not go with options={'recompute': True}"):
            ns.odeint(decay, y0, [0.0, 1.0], options={**options, "recompute": True})
    with pytest.raises(ValueError, match=r"'on_failure': 'nan'} does not go with return_dense"):
        ns.odeint(decay, y0, [0.0, 1.0], options={"on_failure": "nan"}, return_dense=True)
    with pytest.raises(RuntimeError, match=r"cannot be evaluated sample by sample .*'step_control': 'shared'"):
        options = {"step_control": "per_sample"}
        ns.odeint(lambda t, y: -y if t < 0.5 else y, torch.ones(2, 1), [0.0, 1.0], options=options)
