"""``odeint`` as an interface: states, times, options, statistics, and moving over from torchdiffeq."""

from __future__ import annotations

import pytest
import torch
from problems import ADJOINTS, METHODS, dynamics_and_state, gradients, relative_error
from torch import Tensor

import nodeshape as ns
from nodeshape._ode.method import get_method

T = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choice", [{"steps": 4}, {"step_size": 0.1}, {"rtol": 1e-3}])
def test_the_solution_has_a_row_per_time_and_the_shape_and_dtype_of_the_state(
    shape: tuple[int, ...], dtype: torch.dtype, choice: dict[str, float]
) -> None:
    y0 = torch.ones(shape, dtype=dtype, requires_grad=True)
    for method in METHODS:
        ys = ns.odeint(lambda t, y: -y * t, y0, T, method=method, **choice)
        assert ys.shape == (3, *shape) and ys.dtype == dtype
        torch.testing.assert_close(ys[-1], torch.full(shape, 0.6065, dtype=dtype), rtol=0.2, atol=0.0)
        ys.sum().backward()
        assert y0.grad is not None and y0.grad.shape == y0.shape


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_tuple_states_equal_the_states_side_by_side(adjoint: str) -> None:
    func, y0 = dynamics_and_state("mlp")
    a, b = (x.detach().clone().requires_grad_() for x in (y0[:, :1], y0[:, 1:]))

    def split(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = func(t, torch.cat(y, dim=1))
        return out[:, :1], out[:, 1:]

    # Under error control a tuple's error is the largest of its parts', so that other steps are taken.
    for choice, close in (({"steps": 6}, 1e-12), ({"method": "implicit_midpoint", "rtol": 1e-3}, 1e-2)):
        solution = ns.odeint(split, (a, b), T, adjoint=adjoint, **choice)
        assert isinstance(solution, tuple) and [x.shape for x in solution] == [(3, 2, 1), (3, 2, 2)]
        expected = ns.odeint(func, y0, T, adjoint=adjoint, **choice)
        together = torch.cat(solution, dim=2)
        assert relative_error([together], [expected]) < close
        to_a, to_b = gradients(together, (a, b))
        assert (
            relative_error([torch.cat([to_a, to_b], dim=1)], gradients(expected, (y0,))) < 1e3 * close
            if close < 1e-3
            else close
        )


def test_a_tuple_of_unequal_batches_is_one_sample() -> None:
    y0 = (torch.ones(2, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    (a, b), stats = ns.odeint(lambda t, y: (-y[0], -y[1]), y0, T, return_stats=True, options={"stage_solver": "newton"})
    assert a.shape == (3, 2, 3) and b.shape == (3, 4) and stats.accepted.shape == (1,)


@pytest.mark.parametrize("adjoint", ["discrete", "reversible"])
@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_what_a_counter_in_f_counts(method: str, adjoint: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(y) * t

    y0 = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    ys, stats = ns.odeint(func, y0, T, method=method, steps=10, adjoint=adjoint, return_stats=True)
    assert int(stats.nfe_forward) == calls
    calls -= adjoint == "reversible"  # which looks for what f depends on first
    assert int(stats.accepted) == 20 and int(stats.rejected) == 0 and stats.step_control == "fixed"
    if method == "euler":
        assert calls == 20 and int(stats.stage_iterations) == 0
    else:
        assert int(stats.stage_iterations) == calls and 0 < float(stats.residual) <= 1e-13
    assert int(stats.nfe_backward) == 0
    ys.sum().backward()
    products = int(stats.nfe_backward)
    assert products == 20 if (method, adjoint) == ("euler", "discrete") else products > 20


def test_code_written_for_torchdiffeq_runs_by_changing_the_import() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    func, y0 = dynamics_and_state("mlp")
    t = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    calls = [
        {"method": "euler", "options": {"step_size": 0.05}},
        {
            "method": "euler",
            "options": {"step_size": 0.05},
            "rtol": 1e-3,
            "atol": 1e-3,
            "adjoint_params": tuple(func.parameters()),
        },
        {
            "method": "euler",
            "options": {"step_size": 0.1},
            "adjoint_options": {"step_size": 0.1},
            "adjoint_method": "euler",
        },
        {
            "rtol": 1e-6,
            "atol": 1e-8,
            "method": None,
            "adjoint_rtol": 1e-6,
            "adjoint_atol": 1e-8,
            "adjoint_options": {"norm": "seminorm"},
        },
    ]
    for arguments in calls:
        ours, theirs = (solve(func, y0, t, **arguments) for solve in (ns.odeint_adjoint, torchdiffeq.odeint_adjoint))
        assert relative_error([ours], [theirs]) < 1e-5
        assert (
            relative_error(gradients(ours, (y0, *func.parameters())), gradients(theirs, (y0, *func.parameters())))
            < 1e-4
        )
    pair = (y0, torch.zeros(2, 1, dtype=torch.float64))
    fields = lambda t, y: (func(t, y[0]), y[0].sum(dim=1, keepdim=True))  # noqa: E731
    ours, theirs = (
        solve(fields, pair, t, method="euler", options={"step_size": 0.05}) for solve in (ns.odeint, torchdiffeq.odeint)
    )
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri6"}, "unknown method 'dopri6': choose one of euler, implicit_euler, implicit_midpoint, "),
        ({"method": "explicit_adams"}, "'explicit_adams' is not offered: use rk4 or dopri5"),
        (
            {"method": "rk4", "adjoint": "reversible"},
            "not of rk4: use adjoint='discrete', with options=.*'recompute': True.* or 'continuous'",
        ),
        ({"adjoint": "exact"}, "unknown adjoint 'exact'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2, "step_size": 0.1}, "not both"),
        ({"step_size": -0.1}, "step_size must be a positive number, got -0.1"),
        ({"step_size": 0.1, "options": {"step_size": 0.2}}, "step_size is given twice"),
        ({"rtol": -1.0}, "rtol must be a positive number or 0"),
        ({"rtol": 0.0, "atol": 0.0}, "rtol and atol may not both be 0"),
        ({"options": {"frist_step": 0.1}}, "unknown option 'frist_step': known are step_size"),
        ({"options": {"checkpoint_every": 0}}, "checkpoint_every"),
        ({"options": {"stage_solver": "gauss"}}, "choose 'anderson', 'newton' or 'krylov'"),
    ],
)
def test_a_wrong_argument_is_named_with_the_values_allowed(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ns.odeint(lambda t, y: y, torch.ones(1), [0.0, 1.0], **arguments)


@pytest.mark.parametrize("t", [[0.0, 0.0], [0.0, 1.0, 0.5], [0.0, float("nan")], [[0.0, 1.0]], []])
def test_times_that_do_not_move_one_way_are_refused(t: list[float]) -> None:
    with pytest.raises(ValueError, match="t must"):
        ns.odeint(lambda t, y: y, torch.ones(1), torch.tensor(t))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("t", "arguments", "message"),
    [
        ([-1e308, 1e308], {"steps": 1}, "finite intervals"),
        ([0.0, 1e308, -1e308], {"steps": 1}, "increasing or decreasing"),
        ([1e308, -1e308], {"step_size": 1.0}, "finite intervals"),
        ([0.0, 1.0, 2.0, 3.0, 4.0], {"steps": 2**62}, "steps must be at most 10000000"),
        ([0.0, 1.0], {"steps": 10**400}, "steps must be at most 10000000|too large"),
        ([0.0, 1.0], {"steps": float("inf")}, "steps must be a whole number"),
        ([0.0, 1.0], {"steps": float("nan")}, "steps must be a whole number"),
        ([0.0, 1.0], {"step_size": 1e-308}, "step_size 1e-308 cuts an interval"),
        ([0.0, 1.0], {"steps": 2, "options": {"checkpoint_every": 2**62}}, "'checkpoint_every' must be at most"),
        ([0.0, 1.0], {"steps": 2, "options": {"max_stage_iterations": 2**63}}, "'max_stage_iterations' must be at"),
    ],
    ids=str,
)
def test_times_and_counts_beyond_all_bounds_are_refused(
    t: list[float], arguments: dict[str, object], message: str, fused: bool
) -> None:
    func = ns.MLPDynamics(8) if fused else torch.nn.Linear(8, 8)
    f = func if fused else lambda t, y: func(y)
    with pytest.raises(ValueError, match=message):
        ns.odeint(f, torch.randn(2, 8), t, method="euler", **arguments)


def test_a_wrong_state_or_slope_is_refused() -> None:
    for y0 in (
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        (torch.ones(1), torch.ones(1).double()),
    ):
        with pytest.raises(ValueError, match="y0"):
            ns.odeint(lambda t, y: y, y0, [0.0, 1.0], steps=1)
    with pytest.raises(TypeError, match="y0 must be a tensor or a tuple of tensors, got list"):
        ns.odeint(lambda t, y: y, [torch.ones(1)], [0.0, 1.0], steps=1)
    with pytest.raises(ValueError, match=r"it got \[\(2, 3\)\] and returned \[\(2, 1\)\]"):
        ns.odeint(lambda t, y: y[:, :1], torch.ones(2, 3), [0.0, 1.0], steps=1)


def test_what_func_returns_or_changes_is_checked_at_each_call() -> None:
    y0, calls = torch.ones(2, 3), [0]

    def late(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return y.neg_() if calls[0] > 2 else -y

    with pytest.raises(TypeError, match="func must return a tensor as its state is one, got tuple"):
        ns.odeint(lambda t, y: (y,), y0, [0.0, 1.0], method="rk4", steps=2)
    with pytest.raises(RuntimeError, match="changed its state in place, which it did not in its first call"):
        ns.odeint(late, y0, [0.0, 1.0], method="rk4", steps=4)


def test_an_event_is_looked_for_in_given_or_chosen_steps() -> None:
    def falling(t: Tensor, y: Tensor) -> Tensor:
        return -torch.ones_like(y)

    y0 = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="an event is looked for in steps of a given size: pass step_size"):
        ns.odeint_event(falling, y0, 0.0, event_fn=lambda t, y: y[0], method="rk4", steps=4)
    time, states = ns.odeint_event(falling, y0, 0.0, event_fn=lambda t, y: y[0], method="rk4", step_size=0.3)
    assert float(time) == pytest.approx(1.0) and states[-1].item() == pytest.approx(0.0, abs=1e-9)


def test_implicit_methods_and_one_stage_are_for_those_that_have_them() -> None:
    with pytest.raises(ValueError, match=r"implicit_euler solves equations for real states only, got torch.complex64"):
        ns.odeint(
            lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex64), [0.0, 1.0], method="implicit_euler", steps=2
        )
    with pytest.raises(ValueError, match="rk4 has 4 stages; only methods of one stage have a theta"):
        _ = get_method("rk4").theta


def test_the_tensors_of_a_state_share_their_type_and_times_have_one_dimension() -> None:
    with pytest.raises(ValueError, match=r"share dtype and device, got torch.float32 on cpu, torch.float64 on cpu"):
        ns.odeint(lambda t, y: y, (torch.ones(2), torch.ones(2, dtype=torch.float64)), [0.0, 1.0], steps=2)
    with pytest.raises(ValueError, match=r"t must have one dimension, \[times\], got shape \[\]"):
        ns.odeint(lambda t, y: y, torch.ones(2), torch.tensor(1.0), steps=2)
    with pytest.raises(
        ValueError, match=r"\[times, batch\] for a state \[batch, ...\]: got t \[2, 3\] and y0 \[2, 1\]"
    ):
        ns.odeint(lambda t, y: y, torch.ones(2, 1), torch.zeros(2, 3), steps=2)
    with pytest.raises(ValueError, match=r"t must hold at least one time, got shape \[0, 2\]"):
        ns.odeint(lambda t, y: y, torch.ones(2, 1), torch.zeros(0, 2), steps=2)
    with pytest.raises(ValueError, match=r"does not go with event_fn or return_dense"):
        ns.odeint(lambda t, y: y, torch.ones(2, 1), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), return_dense=True)
    with pytest.raises(ValueError, match="strictly increasing or decreasing, all one way"):
        ns.odeint(lambda t, y: y, torch.ones(2, 1), torch.tensor([[0.0, 0.0], [1.0, -2.0]]), step_size=0.1)
    with pytest.raises(ValueError, match=r"differ by sample.*give step_size"):
        ns.odeint(lambda t, y: y, torch.ones(2, 1), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interp": "spline"}, "unknown interp 'spline': choose 'linear' or 'cubic'"),
        ({"perturb": 1}, "perturb must be True or False, got 1"),
        ({"stage_solver": "none"}, "unknown stage_solver 'none': choose 'anderson', 'newton' or 'krylov'"),
        ({"norm": "rms"}, "norm must be a function, got 'rms'"),
        ({"step_t": ["now"]}, r"step_t must be finite times, \[n\]"),
        ({"min_step": -1.0}, "min_step must be a number of at least 0"),
        ({"adjoint_options": {"first_step": 0.0}}, "first_step must be a positive number"),
    ],
)
def test_options_say_what_they_take(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ns.odeint(lambda t, y: y, torch.ones(2), [0.0, 1.0], steps=2, options=options)
