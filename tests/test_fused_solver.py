"""The numbers of the fused solver: against the plain loop in float64, and against themselves, bit for bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from fused_reference import ADJOINTS, METHODS, ON_HOST, instruction_sets, most_threads, pairwise, random_conv, solve
from hypothesis import assume, given
from hypothesis import strategies as st

import nodeshape as ns
from nodeshape._ode import fused

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
ISAS = instruction_sets()
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-11)}  # forward, gradients
OPTIONS = {"drift_tolerance": 1e-2}
CHANNELS = [1, 2, 3, 8] if ON_HOST else [1, 2, 3, 8, 17, 31, 32, 64]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("NODESHAPE_ISA", request.param)
    return request.param


def assert_agrees(f, y0, t, dtypes=tuple(LIMITS), isas=tuple(ISAS), plain=None, **arguments):
    """On every instruction set and in every dtype the fused solve is the plain float64 one."""
    plain = plain or solve(f, y0, t, fused=False, dtype=torch.float64, **arguments)
    for isa in isas:
        for dtype in dtypes:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NODESHAPE_ISA", isa)
                fused = solve(f, y0, t, fused=True, dtype=dtype, **arguments)
            forward, gradients = LIMITS[dtype]
            to_ys, to_y0, to_t, to_parameters = fused.distance(plain)
            assert to_ys < forward, (isa, dtype)
            assert to_y0 < gradients, (isa, dtype)
            assert to_parameters < gradients, (isa, dtype)
            assert to_t < 10 * gradients, (isa, dtype)  # a small difference of large sums


def small_mlp(hidden):
    return ns.MLPDynamics(3, hidden)


@cache
def problem(dynamics, width, shape, method, adjoint, steps):
    """f and y0 with their plain solve, which takes longer than the fused ones that are compared with it."""
    torch.manual_seed(0)
    f, y0 = dynamics(width), torch.randn(shape, dtype=torch.float64)
    arguments = {"method": method, "adjoint": adjoint, "steps": steps, "options": OPTIONS}
    return f, y0, arguments | {"plain": solve(f, y0, TIMES, fused=False, dtype=torch.float64, **arguments)}


@pytest.mark.parametrize(
    ("shape", "method", "adjoint", "isa", "dtype"),
    pairwise([(3, 16, 8, 8), (2, 24, 8, 8), (2, 5, 7, 9)], METHODS, ADJOINTS, ISAS, [*LIMITS]),
    ids=str,
)
def test_conv_agrees_with_the_plain_loop(shape, method, adjoint, isa, dtype):
    f, y0, arguments = problem(random_conv, shape[1], shape, method, adjoint, steps=3)
    assert_agrees(f, y0, TIMES, (dtype,), (isa,), **arguments)


@pytest.mark.parametrize(
    ("hidden", "method", "adjoint", "isa", "dtype"),
    pairwise([(), (16,), (33, 7)], METHODS, ADJOINTS, ISAS, [*LIMITS]),
    ids=str,
)
def test_mlp_agrees_with_the_plain_loop(hidden, method, adjoint, isa, dtype):
    f, y0, arguments = problem(small_mlp, hidden, (19, 3), method, adjoint, steps=5)
    assert_agrees(f, y0, TIMES, (dtype,), (isa,), **arguments)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus", "silu"])
def test_every_activation_agrees_with_the_plain_loop(activation):
    torch.manual_seed(0)
    f, y0 = ns.MLPDynamics(5, (24,), activation), 4 * torch.randn(33, 5, dtype=torch.float64)
    assert_agrees(f, y0, TIMES, method="euler", steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (2, 32, 14, 14), (1, 128, 5, 6)], ids=str)
def test_wide_conv_agrees_after_twenty_steps(shape, method):
    torch.manual_seed(0)
    f, y0 = random_conv(shape[1]), torch.randn(shape, dtype=torch.float64)
    for adjoint in ("discrete", "reversible"):
        arguments = {"method": method, "adjoint": adjoint, "steps": 20, "options": OPTIONS}
        assert_agrees(f, y0, TIMES[[0, 2]], dtypes=(torch.float32,), **arguments)


@given(
    batch=st.integers(1, 6),
    channels=st.sampled_from(CHANNELS),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    method=st.sampled_from(METHODS),
    isa=st.sampled_from(ISAS or ["portable"]),
    seed=st.integers(0, 1000),
)
def test_any_feature_map_agrees_with_the_plain_loop(batch, channels, height, width, method, isa, seed):
    assume(batch * height * width * channels > min(32, channels))  # torch refuses such a GroupNorm
    torch.manual_seed(seed)
    f, y0 = random_conv(channels).double(), torch.randn(batch, channels, height, width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODESHAPE_ISA", isa)
        arguments = {"method": method, "steps": 3, "options": {"stage_tolerance": 1e-12}}
        try:
            plain = solve(f, y0, TIMES / 4, fused=False, dtype=torch.float64, **arguments)
        except ns.StageSolveError:  # the norms of tiny maps can be as good as discontinuous
            assume(False)
        fused = solve(f, y0, TIMES / 4, fused=True, dtype=torch.float64, **arguments)
    to_ys, to_y0, _, to_parameters = fused.distance(plain)
    # A group of one number has no variance, and its gradient is all rounding.
    single = height * width * channels == min(32, channels)
    assert to_ys < 1e-10
    assert single or max(to_y0, to_parameters) < 1e-8


@given(
    batch=st.integers(1, 40),
    dim=st.integers(1, 20),
    hidden=st.lists(st.integers(1, 40), max_size=3),
    activation=st.sampled_from(["tanh", "softplus", "silu"]),
    method=st.sampled_from(METHODS),
    isa=st.sampled_from(ISAS or ["portable"]),
)
def test_any_mlp_agrees_with_the_plain_loop(batch, dim, hidden, activation, method, isa):
    torch.manual_seed(0)
    f, y0 = ns.MLPDynamics(dim, tuple(hidden), activation), torch.randn(batch, dim, dtype=torch.float64)
    assert_agrees(f, y0, TIMES, (torch.float32,), (isa,), method=method, steps=4)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_time_may_run_backwards(adjoint):
    torch.manual_seed(0)
    f, y0 = random_conv(6), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    for method in METHODS:
        assert_agrees(f, y0, TIMES.flip(0), (torch.float64,), method=method, adjoint=adjoint, steps=2, options=OPTIONS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dynamics", "shape"),
    [(lambda: random_conv(4), (3, 4, 6, 6)), (lambda: ns.MLPDynamics(3, (20,)), (37, 3))],
    ids=["conv", "mlp"],
)
def test_checkpoints_do_not_change_the_reversible_gradient(isa, dynamics, shape, method):
    torch.manual_seed(0)
    f, y0 = dynamics(), torch.randn(shape, dtype=torch.float64)
    results = [
        solve(f, y0, TIMES, fused=True, dtype=torch.float64, method=method, adjoint="reversible", steps=7, options=o)
        for o in (OPTIONS, OPTIONS | {"checkpoint_every": 1}, OPTIONS | {"checkpoint_every": 3})
    ]
    for other in results[1:]:
        assert max(other.distance(results[0])) < 1e-11


def test_times_may_be_float32_and_so_is_their_gradient():
    torch.manual_seed(0)
    f, y0 = ns.MLPDynamics(3), torch.randn(5, 3)
    grads = []
    for dtype in (torch.float32, torch.float64):
        t = TIMES.to(dtype).requires_grad_()
        ns.odeint(f, y0, t, method="implicit_midpoint", steps=3).square().sum().backward()
        assert t.grad.dtype == dtype
        grads.append(t.grad.double())
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


def test_one_observation_time_is_the_initial_state(isa):
    y0 = torch.randn(3, 4, 5, 5, requires_grad=True)
    ys = ns.odeint(ns.ConvDynamics(4), y0, torch.zeros(1), method="euler", steps=1)
    assert torch.equal(ys[0], y0)
    ys.sum().backward()
    assert torch.equal(y0.grad, torch.ones_like(y0))


def test_an_empty_batch_gives_an_empty_solution(isa):
    for f, shape in ((ns.ConvDynamics(4), (0, 4, 5, 5)), (ns.MLPDynamics(3), (0, 3))):
        y0 = torch.zeros(shape, requires_grad=True)
        ys = ns.odeint(f, y0, TIMES, steps=2)
        ys.sum().backward()
        assert ys.shape == (3, *shape)
        assert all(not x.grad.any() for x in f.parameters())


def test_evaluations_are_no_more_than_those_of_the_plain_loop(isa, monkeypatch):
    torch.manual_seed(0)
    f, y0 = random_conv(8).double(), torch.randn(4, 8, 8, 8, dtype=torch.float64)
    counts = []
    for switch in ("1", "0"):
        monkeypatch.setenv("NODESHAPE_FUSED", switch)
        y = y0.clone().requires_grad_()
        ys, stats = ns.odeint(
            f, y, TIMES, method="implicit_midpoint", steps=5, options={"stage_tolerance": 1e-8}, return_stats=True
        )
        ys.square().sum().backward()
        counts.append((stats.nfe_forward, stats.nfe_backward))
    assert torch.equal(counts[0][0], counts[1][0])
    assert (counts[0][1] <= counts[1][1]).all()  # the last product of a stage also gives the parameters' gradient


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_company(isa, method):
    torch.manual_seed(0)
    for f, y0 in (
        (random_conv(16), torch.randn(7, 16, 8, 8)),
        (random_conv(5), torch.randn(5, 5, 9, 3)),
        (ns.MLPDynamics(3, (20,)), torch.randn(37, 3)),
    ):
        with torch.no_grad():
            together = ns.odeint(f, y0, TIMES, method=method, steps=4)
            for size in (1, 2, 3):
                apart = torch.cat([ns.odeint(f, y, TIMES, method=method, steps=4) for y in y0.split(size)], dim=1)
                assert torch.equal(together, apart)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_threads_do_not_change_a_bit(isa, adjoint):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        for f, y0, method in (
            (random_conv(16), torch.randn(21, 16, 8, 8), "implicit_midpoint"),
            (ns.MLPDynamics(3, (20,)), torch.randn(3001, 3), "implicit_midpoint"),
            (ns.MLPDynamics(3, (20,)), torch.randn(3001, 3), "euler"),
        ):
            results = []
            arguments = {"method": method, "adjoint": adjoint, "steps": 3, "options": OPTIONS}
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                most_threads()  # of what came before
                results.append(solve(f, y0, TIMES, fused=True, dtype=torch.float32, **arguments))
                assert most_threads() == threads
            for other in results[1:]:
                assert other.distance(results[0]) == (0.0, 0.0, 0.0, 0.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [128, 160], ids=lambda c: f"{c} channels")
def test_threads_that_share_a_lone_wide_sample_do_not_change_a_bit(isa, channels, method):
    torch.manual_seed(0)
    f, y0 = random_conv(channels), torch.randn(2, channels, 7, 7)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            together = ns.odeint(f, y0, TIMES, method=method, steps=1)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                most_threads()  # of what came before
                for _ in range(3):  # who takes which piece of the work is a matter of chance
                    assert torch.equal(ns.odeint(f, y0[:1], TIMES, method=method, steps=1), together[:, :1])
                assert ON_HOST or most_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_nan_stays_with_its_sample(isa):
    torch.manual_seed(0)
    for f, y0 in ((random_conv(4), torch.randn(4, 4, 5, 5)), (ns.MLPDynamics(3), torch.randn(4, 3))):
        broken = y0.clone()
        broken[2].view(-1)[0] = torch.nan
        for method in METHODS:
            with torch.no_grad():
                good = ns.odeint(f, y0, TIMES, method=method, steps=3)
                ys = ns.odeint(f, broken, TIMES, method=method, steps=3)
            others = [0, 1, 3]
            assert torch.equal(ys[:, others], good[:, others])
            assert ys[-1, 2].isnan().any()


@pytest.mark.parametrize("adjoint", ["discrete", "reversible"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_gives_its_own_gradient_alone(isa, method, adjoint):
    torch.manual_seed(0)
    for f, y0 in ((random_conv(4), torch.randn(3, 4, 5, 5)), (ns.MLPDynamics(3), torch.randn(3, 3))):
        gradients = []
        for broken in (False, True):
            y = y0.clone()
            y[1].view(-1)[0] = torch.nan if broken else 0.0
            y.requires_grad_()
            ns.odeint(f, y, TIMES, method=method, adjoint=adjoint, steps=3, options=OPTIONS).sum().backward()
            gradients.append(y.grad)
        assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]])
        assert gradients[1][1].isnan().any()


def test_float32_activations_are_accurate_to_rounding(isa):
    """f = a(y) / 8 of one unit, so one Euler step shows the activation itself."""
    x = torch.cat([torch.linspace(-30, 30, 40001), torch.logspace(-30, 1, 1001), -torch.logspace(-30, 1, 1001)])
    for activation, function in (
        ("tanh", torch.tanh),
        ("softplus", torch.nn.functional.softplus),
        ("silu", torch.nn.functional.silu),
    ):
        f = ns.MLPDynamics(2, (1,), activation)
        with torch.no_grad():
            for parameter in f.parameters():
                parameter.zero_()
            f.layers[0].weight[0, 0] = 1.0  # activation of the first component ...
            f.layers[1].weight[1, 0] = 1.0  # ... is the slope of the second
            y0 = torch.stack([x, torch.zeros_like(x)], dim=1)
            y1 = ns.odeint(f, y0, [0.0, 1.0], method="euler", steps=1)[-1, :, 1]
        exact = function(x.double())
        error = (y1.double() - exact).abs() / exact.abs().clamp_min(1e-36)
        assert float(error.max()) < 4e-7
