"""Error control: steps that all samples share, or each sample's own where it is known or declared not to matter."""

from __future__ import annotations

from math import e, pi

import pytest
import torch
from problems import METHODS, dynamics_and_state, gradients, relative_error
from torch import Tensor, nn

import nodeshape as ns

OWN = {"options": {"step_control": "per_sample"}}


def spiral(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-0.3 * y[:, 0] + 2 * y[:, 1], -2 * y[:, 0] - 0.3 * y[:, 1]], dim=1) * (1 + 0.5 * torch.cos(t))


def spiral_solution(y0: Tensor, t: float) -> Tensor:
    s = torch.tensor(t, dtype=torch.float64)
    s = s + 0.5 * torch.sin(s)
    turn = torch.stack([torch.stack([s.mul(2).cos(), s.mul(2).sin()]), torch.stack([-s.mul(2).sin(), s.mul(2).cos()])])
    return torch.exp(-0.3 * s) * y0 @ turn.T


@pytest.mark.parametrize("method", METHODS)
def test_the_error_follows_the_tolerance(method: str) -> None:
    y0 = torch.tensor([[1.0, 0.5], [-3.0, 2.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    exact = torch.stack([spiral_solution(y0, float(x)) for x in t])
    errors, steps = [], []
    for rtol in (1e-1, 1e-2, 1e-3):
        ys, stats = ns.odeint(spiral, y0, t, method=method, rtol=rtol, atol=rtol / 10, return_stats=True, **OWN)
        errors.append(float((ys - exact).abs().max()))
        steps.append(int(stats.accepted.max()))
        assert stats.step_control == "per sample"
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1
    assert steps[0] < steps[1] < steps[2]


def test_every_observation_time_is_hit_exactly() -> None:
    y0 = torch.zeros(2, 1, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.1000001, 2.0, 7.3], dtype=torch.float64)
    for times in (t, -t):  # dy/dt = 1: y is the time integrated over
        ys = ns.odeint(lambda t, y: torch.ones_like(y), y0, times)
        torch.testing.assert_close(ys[:, 0, 0], times, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adjoint", ["discrete", "reversible"])
def test_gradients_are_those_of_the_steps_taken(method: str, adjoint: str) -> None:
    func, y0 = dynamics_and_state("mlp")
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    tolerances = {"rtol": 1e-2, "atol": 1e-3}
    found = gradients(ns.odeint(func, y0, t, method=method, adjoint=adjoint, **tolerances), inputs)
    # Steps to be undone end at every observation; the same steps by autograd's own record.
    options = {"step_t": t} if adjoint == "reversible" else {}
    ys = ns.odeint(func, y0, t, method=method, options=options, **tolerances)
    graphed = torch.autograd.grad((ys * _weights(ys)).sum() + 0.5 * (ys * ys).sum(), inputs, create_graph=True)
    expected = [x.detach() for x in graphed]
    assert relative_error(found, expected) < 1e-10


def _weights(ys: Tensor) -> Tensor:
    return torch.randn(ys.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_continuous_gradients_follow_their_own_tolerance() -> None:
    func, y0 = dynamics_and_state("mlp")
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    exact = gradients(ns.odeint(func, y0, t, steps=400), inputs)
    errors = []
    for tolerance in (1e-1, 1e-3, 1e-6):
        options = {"adjoint_rtol": tolerance, "adjoint_atol": tolerance}
        ys = ns.odeint(func, y0, t, method="bosh3", rtol=1e-9, atol=1e-9, adjoint="continuous", options=options)
        errors.append(relative_error(gradients(ys, inputs), exact))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def test_continuous_gradients_of_conv_dynamics_take_error_control() -> None:
    torch.manual_seed(0)
    func, y0 = ns.ConvDynamics(4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (y0, *func.parameters())
    expected = gradients(ns.odeint(func, y0, [0.0, 1.0], steps=100), inputs)
    ys = ns.odeint(func, y0, [0.0, 1.0], rtol=1e-6, atol=1e-7, adjoint="continuous")
    assert relative_error(gradients(ys, inputs), expected) < 5e-2


def test_each_sample_takes_its_own_steps() -> None:
    rates = torch.tensor([[-0.1], [-5.0], [-200.0]], dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:  # the rate rides along in the state
        return torch.cat([y[:, 1:] * y[:, :1], torch.zeros_like(y[:, 1:])], dim=1)

    y0 = torch.cat([torch.ones_like(rates), rates], dim=1)
    for method in (*METHODS, "bosh3", "dopri5", "trbdf2"):
        solve = {"method": method, "rtol": 1e-3, "atol": 1e-5}
        ys, stats = ns.odeint(func, y0, [0.0, 1.0], return_stats=True, **solve, **OWN)
        assert stats.accepted[0] < stats.accepted[1] < stats.accepted[2]
        assert (stats.nfe_forward > stats.accepted).all()
        torch.testing.assert_close(ys[-1, :, :1], torch.exp(rates), rtol=2e-2, atol=1e-3)


def test_known_dynamics_take_steps_of_their_own_without_being_told() -> None:
    torch.manual_seed(0)
    func = ns.MLPDynamics(3, hidden=(5,)).double()
    y0 = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)[:, None]
    ys, stats = ns.odeint(func, y0, [0.0, 3.0], return_stats=True)
    assert stats.step_control == "per sample" and len(set(stats.accepted.tolist())) > 1
    for i in range(4):  # as each alone
        alone, own = ns.odeint(func, y0[i : i + 1], [0.0, 3.0], return_stats=True, **OWN)
        assert int(own.accepted) == int(stats.accepted[i])
        torch.testing.assert_close(alone[:, 0], ys[:, i], rtol=1e-13, atol=1e-14)
    func.register_forward_hook(lambda module, inputs, output: output - output.mean(dim=0))  # now it couples them
    _, stats = ns.odeint(func, y0, [0.0, 1.0], return_stats=True)
    assert stats.step_control == "shared"


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "implicit_midpoint", "kvaerno3"])
def test_steps_of_their_own_give_states_between_them_and_exact_gradients(method: str) -> None:
    func, y0 = dynamics_and_state("hand-written")
    t = torch.linspace(0.0, 1.5, 12, dtype=torch.float64).requires_grad_()
    inputs = (y0, t, *func.parameters())
    exact = ns.odeint(func, y0, t, rtol=1e-11, atol=1e-12, method="dopri8")
    expected = gradients(exact, inputs)
    for adjoint in ("discrete", "reversible") if method == "implicit_midpoint" else ("discrete",):
        tolerances = {"rtol": 1e-5, "atol": 1e-6}
        ys, stats = ns.odeint(func, y0, t, method=method, return_stats=True, adjoint=adjoint, **tolerances, **OWN)
        _, few = ns.odeint(func, y0, t[[0, -1]], method=method, return_stats=True, **tolerances, **OWN)
        assert adjoint == "reversible" or stats.accepted.tolist() == few.accepted.tolist()
        assert relative_error([ys], [exact]) < 1e-3
        assert relative_error(gradients(ys, inputs), expected) < 1e-2
        direction, size = torch.randn_like(y0), 1e-6

        def loss(y0: Tensor, adjoint: str = adjoint) -> Tensor:
            solve = {"method": method, "adjoint": adjoint, "rtol": 1e-5, "atol": 1e-6, **OWN}
            return ns.odeint(func, y0, t.detach(), **solve)[[3, -1]].sin().sum()

        to_y0 = torch.autograd.grad(loss(y0), y0)[0]
        difference = (loss(y0 + size * direction) - loss(y0 - size * direction)) / (2 * size)
        assert float((to_y0 * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


def test_recomputed_steps_of_their_own_give_autograds_gradient() -> None:
    func, y0 = dynamics_and_state("hand-written")
    t = torch.tensor([0.0, 0.4, 1.5], dtype=torch.float64)
    inputs = (y0, *func.parameters())
    options = {"step_control": "per_sample", "step_t": t}
    expected = gradients(ns.odeint(func, y0, t, rtol=1e-6, options=options), inputs)
    options = {"step_control": "per_sample", "recompute": True}
    assert relative_error(gradients(ns.odeint(func, y0, t, rtol=1e-6, options=options), inputs), expected) < 1e-11


def test_what_cannot_be_stepped_sample_by_sample_is_refused_with_the_remedy() -> None:
    y0 = torch.ones(4, 2, dtype=torch.float64)
    offsets = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match=r"of one sample it got .* and returned .*'step_control': 'shared'"):
        ns.odeint(lambda t, y: -y * offsets, y0, [0.0, 1.0], **OWN)
    for arguments in ({"return_dense": True}, {"event_fn": lambda t, y: y.sum() - 1}):
        with pytest.raises(ValueError, match=r"'per_sample'} is not possible: an event_fn, return_dense"):
            ns.odeint(lambda t, y: -y, y0, [0.0, 1.0], **arguments, **OWN)
    with pytest.raises(ValueError, match="the state has no batch of samples"):
        ns.odeint(lambda t, y: -y, y0[0], [0.0, 1.0], **OWN)


def test_a_step_shared_by_the_batch_is_stopped_by_a_sample_that_is_not_finite_unless_it_may_fail() -> None:
    offsets = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]  # [batch, 1]: no meaning for one sample alone

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y * (1 + 10 * offsets)

    y0 = torch.ones(4, 2, dtype=torch.float64)
    y0[1, 0] = torch.nan
    with pytest.raises(ns.StepSizeError, match=r"not finite.*'on_failure': 'nan'"):
        ns.odeint(func, y0, [0.0, 1.0])
    for method in (*METHODS, "dopri5"):
        solve = {"method": method, "rtol": 1e-3, "atol": 1e-4, "options": {"on_failure": "nan"}}
        ys, stats = ns.odeint(func, y0, [0.0, 1.0], return_stats=True, **solve)
        assert stats.step_control == "shared" and list(stats.failures) == [1]
        assert len(set(stats.accepted.tolist())) == 1
        exact = torch.exp(-(1 + 10 * offsets)).expand(4, 2)
        assert ys[-1, 1].isnan().all()
        keep = [0, 2, 3]
        torch.testing.assert_close(ys[-1, keep], exact[keep], rtol=0.0, atol=1e-2)


def test_f_that_couples_its_samples_only_later_shares_one_step() -> None:
    y0 = torch.tensor([[1.0, 2.0], [0.0, -3.0], [0.5, 0.1]], dtype=torch.float64)
    for late in (False, True):  # at t=0 nothing shows that it couples them

        def func(t: Tensor, y: Tensor, late: bool = late) -> Tensor:
            return y - y.mean(dim=0) if not late else -y + t * y.mean(dim=0)

        ys, stats = ns.odeint(func, y0, [0.0, 1.0], return_stats=True)
        assert stats.step_control == "shared" and len(set(stats.accepted.tolist())) == 1
        mean = y0.mean(dim=0)  # m' = (t − 1) m, (y − m)' = −(y − m)
        exact = mean + e * (y0 - mean) if not late else mean * e**-0.5 + (y0 - mean) / e
        torch.testing.assert_close(ys[-1], exact, rtol=1e-6, atol=1e-7)


def test_a_solution_that_blows_up_raises_instead_of_hanging() -> None:
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)  # y' = y² ends at t = 1 / y0
    for method in ("euler", "dopri5"):
        solve = {"method": method, "rtol": 1e-2, "atol": 1e-2}
        with pytest.raises(ns.StepSizeError, match=r"1 of 2 samples \(the first is number 1\).*t=0\.(5|4)"):
            ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], **solve, **OWN)
        with pytest.raises(ns.StepSizeError, match=r"cannot get past t=0\.(5|4)"):
            ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], **solve)
        for control in ("per_sample", "shared"):
            options = {"on_failure": "nan", "step_control": control}
            ys, stats = ns.odeint(lambda t, y: y * y, y0, [0.0, 1.0], options=options, return_stats=True, **solve)
            assert list(stats.failures) == [1] and "t=0." in stats.failures[1] and bool(ys[-1, 1].isnan())
            assert float(ys[-1, 0]) == pytest.approx(1 / 9, rel=2e-2)


def test_gradients_of_the_samples_that_live_on_are_finite_and_right() -> None:
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    good = ns.odeint(lambda t, y: rate * y * y, y0[:1], [0.0, 1.0], rtol=1e-9, atol=1e-9)
    (expected,) = torch.autograd.grad(good[-1].sum(), rate)
    for control in ("per_sample", "shared"):
        options = {"on_failure": "nan", "step_control": control}
        ys = ns.odeint(lambda t, y: rate * y * y, y0, [0.0, 1.0], rtol=1e-9, atol=1e-9, options=options)
        (found,) = torch.autograd.grad(ys[-1][~ys[-1].isnan()].sum(), rate)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
    stage = {"max_stage_iterations": 4, "on_failure": "nan"}  # the second sample's stage is not solved
    ys, stats = ns.odeint(lambda t, y: rate * y * y, y0, [0.0, 1.0], steps=40, options=stage, return_stats=True)
    assert list(stats.failures) == [1] and "stage equation" in stats.failures[1] and bool(ys[-1, 1].isnan())
    (found,) = torch.autograd.grad(ys[-1, 0].sum(), rate)
    assert float(found) == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((method, {}) for method in ("euler", "midpoint", "rk4", "dopri5", "implicit_midpoint", "trapezoid")),
        ("rk4", {"compile": True}),
    ],
)
def test_a_sample_that_overflows_in_given_steps_spoils_no_gradient(
    method: str, more: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step: step)
    torch.manual_seed(0)
    layer = nn.Linear(2, 2).double()
    y0 = torch.tensor([[0.1, 0.2], [30.0, 40.0], [0.3, -0.1]], dtype=torch.float64)
    solve = {"method": method, "steps": 6}
    results = []
    for start, options in ((y0, {"on_failure": "nan", **more}), (y0[::2], {})):
        start = start.clone().requires_grad_()
        ys, stats = ns.odeint(
            lambda t, y: layer(y) + y**3, start, [0.0, 0.5, 1.0], options=options, return_stats=True, **solve
        )
        lives = ys[:, ::2] if options else ys
        results.append([lives, *torch.autograd.grad(lives.square().sum(), [start, *layer.parameters()])])
        if options:
            assert list(stats.failures) == [1] and bool(ys[1:, 1].isnan().all())
    (found, of_y0, *of_layer), (expected, expected_y0, *expected_layer) = results
    assert not bool(of_y0[1].any())
    assert relative_error([found, of_y0[::2], *of_layer], [expected, expected_y0, *expected_layer]) < 1e-12


@pytest.mark.parametrize("y0", [[[50.0], [60.0]], 50.0], ids=["a batch", "no batch"])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_where_every_sample_overflows_gradients_stay_finite(method: str, y0: object) -> None:
    rate = torch.tensor(2.0, requires_grad=True)
    start = torch.tensor(y0, requires_grad=True)
    ys, stats = ns.odeint(
        lambda t, y: rate * y**3,
        start,
        [0.0, 1.0],
        method=method,
        steps=10,
        options={"on_failure": "nan"},
        return_stats=True,
    )
    assert bool(ys[-1].isnan().all()) and len(stats.failures) == start.numel()
    loss = ys[0].sum() + ys[-1].nan_to_num().sum()
    of_y0, of_rate = torch.autograd.grad(loss, [start, rate], materialize_grads=True)
    assert torch.equal(of_y0, torch.ones_like(start)) and float(of_rate) == 0.0


def test_too_many_steps_raise_with_the_remedy() -> None:
    y0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ns.StepSizeError, match=r"as many attempts as allowed.*use an implicit method"):
        ns.odeint(lambda t, y: -1000 * y, y0, [0.0, 1.0], method="euler", rtol=1e-4, options={"max_steps": 30})


@pytest.mark.parametrize("method", [*METHODS, "bosh3"])
def test_a_rejected_attempt_is_counted_and_does_not_touch_the_solution(method: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:  # a bump, where the second column says, that long steps run into
        nonlocal calls
        calls += 1
        return torch.cat([10 * torch.exp(-((10 * (t - y[:, 1:])) ** 2)), torch.zeros_like(y[:, 1:])], dim=1)

    y0 = torch.tensor([[1.0, 0.5], [1.0, 0.4]], dtype=torch.float64)
    solve = {"method": method, "rtol": 1e-4, "atol": 1e-6, "return_stats": True}
    _, alone = ns.odeint(func, y0[:1], [0.0, 1.0], **solve)
    assert int(alone.nfe_forward) == calls
    _, own = ns.odeint(func, y0[:1], [0.0, 1.0], **solve, **OWN)
    assert int(own.accepted) == int(alone.accepted) and int(own.rejected) == int(alone.rejected)
    ys, stats = ns.odeint(func, y0, [0.0, 1.0], **solve, **OWN)
    assert stats.step_control == "per sample" and (stats.rejected > 0).all() and stats.rejected[0] == alone.rejected[0]
    torch.testing.assert_close(ys[-1, :, 0], torch.full((2,), 1 + pi**0.5, dtype=torch.float64), rtol=2e-3, atol=0.0)


def test_tolerances_work_in_float32_and_for_an_empty_batch() -> None:
    func, y0 = dynamics_and_state("conv", torch.float32)
    ys = ns.odeint(func, y0, [0.0, 1.0], rtol=1e-3, atol=1e-3)
    fine = ns.odeint(func, y0, [0.0, 1.0], steps=50)
    assert ys.dtype == torch.float32 and float((ys - fine).abs().max()) < 5e-2
    assert ns.odeint(func, y0[:0], [0.0, 1.0]).shape == (2, 0, *y0.shape[1:])


class Rooted(nn.Module):
    """dy/dt = w √(y - 0.5), which is not a number below."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.w * torch.sqrt(y - 0.5)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("control", ["per_sample", "shared"])
@pytest.mark.parametrize("bad", [0.3, float("nan"), float("inf")])
def test_a_sample_that_fails_leaves_the_gradients_of_the_others(method: str, control: str, bad: float) -> None:
    f = Rooted()
    y0 = torch.tensor([[1.0], [bad], [2.0]], dtype=torch.float64, requires_grad=True)
    options = {"step_control": control, "on_failure": "nan", "max_num_steps": 200}
    found = []
    for start in (y0, y0.detach()[::2].requires_grad_()):
        ys = ns.odeint(f, start, [0.0, 0.5, 1.0], method=method, rtol=1e-8, atol=1e-8, options=options)
        good = ys[:, [0, -1]]
        found.append((good.detach(), *torch.autograd.grad(good.square().sum(), [start, f.w])))
    assert float(found[0][1][1].abs().max()) == 0.0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1][::2], found[1][1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-6, atol=1e-6)
