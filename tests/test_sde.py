"""Stochastic differential equations: the path, the orders of the methods, their calculus, gradients and errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import exp, log2
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nodeshape as ns

ITO = ("euler_maruyama", "implicit_euler_maruyama")
STRATONOVICH = ("heun", "midpoint", "implicit_midpoint")
METHODS = (*ITO, *STRATONOVICH)
F64 = torch.float64
MU, SIGMA = 0.5, 0.8


def slope(errors: list[float]) -> float:
    """The order that errors at steps halved each time show: the slope of a line through their logarithms."""
    n = len(errors)
    x = [k - (n - 1) / 2 for k in range(n)]
    return -sum(a * log2(e) for a, e in zip(x, errors)) / sum(a * a for a in x)


def path_of(shape: tuple[int, ...], finest: int, seed: int = 0) -> ns.BrownianPath:
    return ns.BrownianPath(shape, 0.0, 1.0, seed=seed, dtype=F64, grid=torch.linspace(0, 1, finest + 1, dtype=F64))


# ---- the path --------------------------------------------------------------------------------------------------------


def test_a_path_is_the_same_in_any_order_and_at_any_steps() -> None:
    times = [0.1 * k for k in range(1, 10)] + [0.123456, 1 / 3]
    first, second = (ns.BrownianPath((3,), 0.0, 1.0, seed=7, dtype=F64) for _ in range(2))
    forwards = {t: first(t) for t in times}
    for t in [*reversed(times), *times]:
        assert torch.equal(second(t), forwards[t])
    coarse = first(0.1, 0.7)
    fine = sum(second(0.1 + 0.006 * k, 0.1 + 0.006 * (k + 1)) for k in range(100))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-6)
    assert torch.equal(first(0.7, 0.1), -coarse)
    assert torch.equal(first([0.1, 0.5]), torch.stack([first(0.1), first(0.5)]))


def test_times_next_to_a_node_take_its_value_whatever_was_asked_before() -> None:
    def path() -> ns.BrownianPath:
        return ns.BrownianPath((), 0.0, 1.0, seed=3, dtype=F64, resolution=0.1)  # leaves of 1/16

    for node in (0.0, 0.5, 9 / 16, 1.0):
        for before in (node - 0.03, node + 0.03):
            asked, near = path(), min(max(node - 0.01, 0.0), 1.0)
            asked(min(max(before, 0.0), 1.0), node)
            for x in (near, min(node + 0.01, 1.0)):
                assert asked(node, x) == path()(node, x) == 0.0
                assert asked(0.3, x) == path()(0.3, x) == path()(0.3, node)


def test_a_path_outlives_pickling_and_in_place_use_of_its_values() -> None:
    path = path_of((4, 2), 8)
    before = path(0.25, 0.5).clone()
    path(0.25, 0.5).zero_()
    assert torch.equal(path(0.25, 0.5), before)
    assert torch.equal(pickle.loads(pickle.dumps(path))(0.25, 0.5), before)


def test_the_random_numbers_are_those_of_numpys_counter_based_generator() -> None:
    path = ns.BrownianPath((5,), 0.0, 1.0, seed=2**62 + 3, dtype=F64)
    for node in (0, 1, 2**40, 7):
        words = np.random.Philox(key=path.seed, counter=node << 128)
        assert path._normal(node).tolist() == np.random.Generator(words).standard_normal(5).tolist()


@pytest.mark.cuda
def test_a_portable_path_is_the_same_on_the_gpu_and_any_path_there_is_repeatable() -> None:
    portable = ns.BrownianPath((3,), 0.0, 1.0, seed=1, dtype=F64, device="cuda", portable=True)
    torch.testing.assert_close(portable(0.2, 0.7).cpu(), ns.BrownianPath((3,), 0.0, 1.0, seed=1, dtype=F64)(0.2, 0.7))
    own = [ns.BrownianPath((3,), 0.0, 1.0, seed=1, device="cuda") for _ in range(2)]
    assert torch.equal(own[0](0.2, 0.7), own[1](0.2, 0.7))
    y0 = torch.rand(4, 3, device="cuda", dtype=F64)
    path = ns.BrownianPath(y0, 0.0, 1.0, seed=1, portable=True)
    for method in METHODS:
        f, g = lambda t, y: -y, lambda t, y: torch.cos(y)
        there = ns.sdeint(f, g, y0, [0.0, 1.0], method=method, steps=4, path=path)
        host = ns.BrownianPath(y0.cpu(), 0.0, 1.0, seed=1)
        here = ns.sdeint(f, g, y0.cpu(), [0.0, 1.0], method=method, steps=4, path=host)
        torch.testing.assert_close(there.cpu(), here)


def test_threads_may_ask_one_path() -> None:
    times = [k / 97 for k in range(1, 97)]
    alone, shared = path_of((3,), 10), path_of((3,), 10)
    expected = [alone(t) for t in times]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [shared(t) for t in times], range(8)):
            assert all(map(torch.equal, found, expected))


def test_a_path_kept_in_inference_mode_serves_autograd() -> None:
    path = path_of((2,), 4)
    with torch.inference_mode():
        path(0.5)
    y = torch.ones(2, dtype=F64, requires_grad=True)
    (y * path.increment(0.0, 0.5)).sum().backward()


def test_float32_sees_the_float64_path_and_more_samples_leave_the_first_alone() -> None:
    wide, narrow, more = (
        ns.BrownianPath((n, 3), 0.0, 2.0, seed=1, dtype=kind) for n, kind in ((5, F64), (5, torch.float32), (9, F64))
    )
    torch.testing.assert_close(narrow(0.3, 1.7), wide(0.3, 1.7).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(more(0.3, 1.7)[:5], wide(0.3, 1.7))


@pytest.mark.parametrize("finest", [1, 3, 64])
def test_increments_have_the_variances_of_brownian_motion_and_are_independent(finest: int) -> None:
    n = 40_000
    path = ns.BrownianPath((n,), 1.0, 4.0, seed=3, dtype=F64, grid=torch.linspace(1, 4, finest + 1, dtype=F64))
    times = [1.0, 1.0 + 1 / 7, 2.0, 2.0 + 1e-4, 2.7182818, 3.5, 4.0]
    steps = torch.stack([path(s, t) for s, t in zip(times, times[1:])])
    lengths = torch.tensor([t - s for s, t in zip(times, times[1:])], dtype=F64)
    units = steps / lengths.sqrt()[:, None]
    correlations = units @ units.mT / n
    torch.testing.assert_close(correlations, torch.eye(6, dtype=F64), rtol=0, atol=5 * (2 / n) ** 0.5)
    assert float(units.mean(dim=1).abs().max()) < 5 / n**0.5
    assert float((units**4).mean(dim=1).sub(3).abs().max()) < 5 * (96 / n) ** 0.5
    values = torch.stack([path(t) for t in times[1:]])
    at = torch.tensor(times[1:], dtype=F64) - 1
    torch.testing.assert_close(values @ values.mT / n, torch.minimum(at[:, None], at), rtol=0, atol=0.1)


def test_times_between_two_known_ones_are_a_brownian_bridge() -> None:
    path = path_of((40_000,), 5)
    ends, middle = path(0.2, 0.4), path(0.2, 0.27)
    left = middle - 0.35 * ends
    assert float(left.var()) == pytest.approx(0.2 * 0.35 * 0.65, rel=0.04)
    assert abs(float((left * ends).mean())) < 5 * (0.2 * 0.2 * 0.35 * 0.65 / 40_000) ** 0.5


def test_values_closer_than_the_resolution_are_each_exact_in_law() -> None:
    path = ns.BrownianPath((40_000,), 0.0, 1.0, seed=5, dtype=F64, resolution=0.3)
    assert float(path(0.11).var()) == pytest.approx(0.11, rel=0.04)
    assert float(path(0.4, 0.9).var()) == pytest.approx(0.5, rel=0.04)


def test_steps_in_order_draw_one_number_each(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    normal = ns.BrownianPath._normal
    monkeypatch.setattr(ns.BrownianPath, "_normal", lambda self, node: drawn.append(node) or normal(self, node))
    grid = [k / 100 for k in range(101)]
    path = ns.BrownianPath((2,), 0.0, 1.0, seed=0, grid=grid)
    for s, t in zip(grid, grid[1:]):
        path(s, t)
    assert len(drawn) == 100


# ---- orders ----------------------------------------------------------------------------------------------------------


def geometric(
    method: str, mu: float = MU, sigma: float = SIGMA
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """f, g and the exact solution at t = 1, of W(1), of geometric Brownian motion from 1."""
    correction = 0.5 * sigma**2 if method in ITO else 0.0
    return lambda t, y: mu * y, lambda t, y: sigma * y, lambda w: torch.exp((mu - correction) + sigma * w)


@pytest.mark.parametrize("method", METHODS)
def test_strong_order_of_geometric_brownian_motion(method: str) -> None:
    f, g, exact = geometric(method)
    path = path_of((2000, 1), 256)
    y0, errors = torch.ones(2000, 1, dtype=F64), []
    for steps in (16, 32, 64, 128, 256):
        y = ns.sdeint(f, g, y0, [0.0, 1.0], method=method, steps=steps, path=path)[-1]
        errors.append(float((y - exact(path(1.0))).abs().mean()))
    assert slope(errors) == pytest.approx(0.5 if method in ITO else 1.0, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_weak_order_of_geometric_brownian_motion(method: str) -> None:
    # Numbers of which the error is not a difference of two, and far above what chance makes of so many paths.
    f, g, exact = geometric(method, 1.5, 0.3) if method in ITO else geometric(method, 0.5, 0.8)
    half = path_of((5000, 1), 128)

    def path(s: float, t: float) -> Tensor:  # and its mirror image, so that fewer will do
        change = half(s, t)
        return torch.cat([change, -change])

    y0, errors = torch.ones(10_000, 1, dtype=F64), []
    for steps in (16, 32, 64, 128) if method in ITO else (8, 16, 32, 64):
        y = ns.sdeint(f, g, y0, [0.0, 1.0], method=method, steps=steps, path=path)[-1]
        errors.append(abs(float((y - exact(path(0.0, 1.0))).mean())))
    assert slope(errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("commutes", [True, False])
@pytest.mark.parametrize("method", ["heun", "midpoint"])
def test_strong_order_of_general_noise_is_one_only_where_it_commutes(method: str, commutes: bool) -> None:
    path = path_of((2000, 2), 2048)
    mix = torch.tensor([[0.6, -0.3], [0.2, 0.5]], dtype=F64)

    def g(t: Tensor, y: Tensor) -> Tensor:
        if commutes:
            return y[:, :, None] * mix
        one, zero = torch.ones_like(y[:, 0]), torch.zeros_like(y[:, 0])
        return torch.stack([torch.stack([one, zero], dim=1), torch.stack([zero, y[:, 0]], dim=1)], dim=1)

    def solved(steps: int) -> Tensor:
        y0 = torch.ones(2000, 2, dtype=F64)
        zero = lambda t, y: torch.zeros_like(y)  # noqa: E731
        return ns.sdeint(zero, g, y0, [0.0, 1.0], method=method, noise="general", steps=steps, path=path)[-1]

    reference = torch.exp(path(1.0) @ mix.mT) if commutes else solved(2048)
    errors = [float((solved(steps) - reference).abs().mean()) for steps in (8, 16, 32, 64)]
    assert slope(errors) == pytest.approx(1.0 if commutes else 0.5, abs=0.1)


def test_additive_noise_lifts_the_strong_order_of_euler_maruyama_to_one() -> None:
    path = path_of((2000, 1), 2048)
    y0, f, g = torch.ones(2000, 1, dtype=F64), lambda t, y: torch.sin(3 * y), lambda t, y: 0.5 * torch.ones_like(y)
    solved = {n: ns.sdeint(f, g, y0, [0.0, 1.0], steps=n, path=path)[-1] for n in (16, 32, 64, 128, 2048)}
    errors = [float((solved[n] - solved[2048]).abs().mean()) for n in (16, 32, 64, 128)]
    assert slope(errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_ornstein_uhlenbeck_has_its_mean_and_variance(method: str) -> None:
    theta, level, sigma, n = 2.0, 1.0, 0.8, 20_000
    y0 = torch.full((n, 1), -1.0, dtype=F64)
    path = path_of((n, 1), 100)
    f, g = lambda t, y: theta * (level - y), lambda t, y: sigma * torch.ones_like(y)
    for t, y in zip((0.5, 1.0), ns.sdeint(f, g, y0, [0.0, 0.5, 1.0], method=method, steps=50, path=path)[1:]):
        mean, variance = level + (-1 - level) * exp(-theta * t), sigma**2 / (2 * theta) * (1 - exp(-2 * theta * t))
        assert float(y.mean()) == pytest.approx(mean, abs=0.02)
        assert float(y.var()) == pytest.approx(variance, rel=0.06)


# ---- stability and calculus ------------------------------------------------------------------------------------------


def test_the_drift_implicit_methods_stay_where_euler_maruyama_blows_up() -> None:
    rate, sigma = 1000.0, 1.0  # rate × step = 50
    f, g = lambda t, y: -rate * (y - torch.cos(t)), lambda t, y: sigma * torch.ones_like(y)
    y0, path = torch.ones(200, 2), ns.BrownianPath((200, 2), 0.0, 1.0, seed=0)
    t = torch.linspace(0, 1, 21)
    solved = {m: ns.sdeint(f, g, y0, t, method=m, steps=1, path=path) for m in METHODS}
    for method in ("euler_maruyama", "heun", "midpoint"):
        assert float(solved[method][5].abs().max()) > 1e5
    for method in ("implicit_euler_maruyama", "implicit_midpoint"):
        assert float((solved[method] - torch.cos(t)[:, None, None]).abs().max()) < 2.0
    # Of the law the step cannot resolve implicit Euler keeps the mean.
    mean = solved["implicit_euler_maruyama"][-1].mean()
    assert float(mean) == pytest.approx(float(torch.cos(torch.ones(()))), abs=0.02)


@pytest.mark.parametrize("drift_ito", [0.5 * SIGMA**2, 0.0])
def test_ito_with_the_corrected_drift_is_stratonovich(drift_ito: float) -> None:
    path, y0 = path_of((1000, 1), 1024), torch.ones(1000, 1, dtype=F64)
    g = lambda t, y: SIGMA * y  # noqa: E731
    ito = ns.sdeint(lambda t, y: (MU + drift_ito) * y, g, y0, [0.0, 1.0], steps=1024, path=path)[-1]
    other = ns.sdeint(lambda t, y: MU * y, g, y0, [0.0, 1.0], method="heun", steps=1024, path=path)[-1]
    difference = float((ito - other).abs().mean() / other.mean())
    assert difference < 0.03 if drift_ito else difference > 0.2


@pytest.mark.parametrize("method", STRATONOVICH)
def test_stratonovich_methods_run_back_along_the_same_path(method: str) -> None:
    path, y0 = path_of((50, 2), 256), torch.rand(50, 2, dtype=F64) + 0.5
    f, g = lambda t, y: torch.sin(y + t), lambda t, y: 0.5 * torch.cos(y)
    there = ns.sdeint(f, g, y0, [0.0, 1.0], method=method, steps=256, path=path)[-1]
    back = ns.sdeint(f, g, there, [1.0, 0.0], method=method, steps=256, path=path)[-1]
    torch.testing.assert_close(back, y0, rtol=0, atol=1e-2)
    assert float((there - y0).abs().max()) > 0.3


def test_without_noise_the_methods_are_those_of_odeint() -> None:
    y0 = torch.rand(3, 2, dtype=F64)
    f, g = lambda t, y: torch.sin(y + t), lambda t, y: torch.zeros_like(y)
    names = ("euler", "implicit_euler", "heun2", "midpoint", "implicit_midpoint")
    for method, name in zip(METHODS, names):
        found = ns.sdeint(f, g, y0, [0.0, 0.4, 1.0], method=method, steps=3)
        torch.testing.assert_close(found, ns.odeint(f, y0, [0.0, 0.4, 1.0], method=name, steps=3))


# ---- states and noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (4, 2, 3, 3)])
@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_a_state_may_have_any_shape(shape: tuple[int, ...], noise: str) -> None:
    y0 = torch.rand(shape)
    columns = torch.tensor([0.5, -0.2])

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * y if noise == "diagonal" else y[..., None] * columns

    assert ns.sdeint(lambda t, y: -y, g, y0, [0.0, 0.5, 1.0], noise=noise, steps=4).shape == (3, *shape)


def test_general_noise_of_a_diagonal_matrix_is_diagonal_noise() -> None:
    y0, path = torch.rand(5, 3, dtype=F64), path_of((5, 3), 8)
    f, g = lambda t, y: -y, lambda t, y: torch.sin(y)
    diagonal = ns.sdeint(f, g, y0, [0.0, 1.0], steps=8, path=path)
    general = ns.sdeint(f, lambda t, y: torch.diag_embed(g(t, y)), y0, [0.0, 1.0], noise="general", steps=8, path=path)
    torch.testing.assert_close(general, diagonal)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_a_tuple_state_is_solved_as_its_parts_together(method: str, noise: str) -> None:
    y0 = torch.rand(4, 3, dtype=F64)
    path = path_of((4, 3) if noise == "diagonal" else (4, 2), 8)
    mix = torch.rand(3, 2, dtype=F64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y) - y.sum(dim=1, keepdim=True)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * torch.cos(y) if noise == "diagonal" else y[..., None] * mix

    def parts(h: Callable[..., Tensor]) -> Callable[..., Any]:
        return lambda t, y: tuple(h(t, torch.cat(y, dim=1)).split([1, 2], dim=1))

    how: dict[str, Any] = {"method": method, "noise": noise, "steps": 8, "path": path}
    whole = ns.sdeint(f, g, y0, [0.0, 1.0], **how)
    split = ns.sdeint(parts(f), parts(g), tuple(y0.split([1, 2], dim=1)), [0.0, 1.0], **how)
    torch.testing.assert_close(torch.cat(split, dim=2), whole)


def test_bfloat16_states_are_added_up_in_float32() -> None:
    y0 = torch.ones(50, 2)
    path = ns.BrownianPath(y0, 0.0, 1.0, seed=0)
    how: dict[str, Any] = {"steps": 100, "path": path}
    wide, narrow = (ns.sdeint(lambda t, y: -y, lambda t, y: 0.3 * y, x, [0.0, 1.0], **how) for x in (y0, y0.bfloat16()))
    assert narrow.dtype is torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.03, atol=0.03)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    y0, f, g = torch.rand(6, 3), lambda t, y: torch.sin(y), lambda t, y: torch.cos(y)
    paths = [ns.BrownianPath((n, 3), 0.0, 1.0, seed=2) for n in (6, 2)]
    both = [ns.sdeint(f, g, x, [0.0, 1.0], steps=5, path=p)[-1] for x, p in zip((y0, y0[:2]), paths)]
    torch.testing.assert_close(both[0][:2], both[1])


def test_manual_seed_repeats_a_solve_and_solves_differ_without_it() -> None:
    def solved() -> Tensor:
        return ns.sdeint(lambda t, y: -y, lambda t, y: y, torch.ones(3, 2), [0.0, 1.0], steps=4)

    torch.manual_seed(0)
    first, second = solved(), solved()
    torch.manual_seed(0)
    assert torch.equal(solved(), first)
    assert not torch.equal(first, second)


def test_f_and_g_may_work_in_place() -> None:
    path, y0 = path_of((2, 2), 4), torch.rand(2, 2, dtype=F64)
    how: dict[str, Any] = {"steps": 4, "path": path, "method": "heun"}
    plain = ns.sdeint(lambda t, y: 2 * y, lambda t, y: 0.5 * y, y0, [0.0, 1.0], **how)
    torch.testing.assert_close(
        ns.sdeint(lambda t, y: y.mul_(2), lambda t, y: y.mul_(0.5), y0, [0.0, 1.0], **how), plain
    )


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("noise", ["diagonal", "general"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_exact(method: str, noise: str, recompute: bool) -> None:
    torch.manual_seed(0)
    y0, a, b = (torch.rand(shape, dtype=F64, requires_grad=True) for shape in ((2, 3), (3, 3), (3, 2)))
    path = path_of((2, 3) if noise == "diagonal" else (2, 2), 6)

    def solved(y0: Tensor, a: Tensor, b: Tensor) -> Tensor:
        def g(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(y @ b @ b.mT) if noise == "diagonal" else torch.cos(y)[..., None] * b

        options = {"recompute": True} if recompute else None
        f = lambda t, y: torch.tanh(y @ a) * (1 + t)  # noqa: E731
        how: dict[str, Any] = {"method": method, "noise": noise, "steps": 3, "path": path, "options": options}
        return ns.sdeint(f, g, y0, [0.0, 0.5, 1.0], **how)

    assert torch.autograd.gradcheck(solved, (y0, a, b), fast_mode=True)


@pytest.mark.parametrize("method", ["euler_maruyama", "heun", "implicit_euler_maruyama"])
def test_second_derivatives_are_exact(method: str) -> None:
    y0, a = torch.rand(2, 2, dtype=F64, requires_grad=True), torch.rand(2, 2, dtype=F64, requires_grad=True)
    path = path_of((2, 2), 2)

    def solved(y0: Tensor, a: Tensor) -> Tensor:
        f, g = lambda t, y: torch.tanh(y @ a), lambda t, y: torch.sin(y @ a.mT)
        return ns.sdeint(f, g, y0, [0.0, 1.0], method=method, steps=2, path=path)[-1]

    assert torch.autograd.gradgradcheck(solved, (y0, a), fast_mode=True)


def test_recompute_stores_less_and_gives_the_same_gradient() -> None:
    torch.manual_seed(0)
    f, g = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()).double(), nn.Linear(8, 8).double()
    y0, path = torch.rand(4, 8, dtype=F64), path_of((4, 8), 64)
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        f.zero_grad()
        stored = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal stored
            stored += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = ns.sdeint(
                lambda t, y: f(y),
                lambda t, y: g(y),
                y0,
                [0.0, 1.0],
                steps=64,
                path=path,
                options={"recompute": recompute},
            )
        kept.append(stored)
        torch.manual_seed(5)
        y.square().sum().backward()
        found.append(f[0].weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize("what", ["weight", "attribute", "path"])
def test_recompute_refuses_what_has_changed(what: str) -> None:
    g, scale = nn.Linear(2, 2), [1.0]
    random = torch.Generator().manual_seed(0)

    def path(s: float, t: float) -> Tensor:
        return torch.randn(2, 2, generator=random)

    y0, options = torch.ones(2, 2), {"recompute": True}
    y = ns.sdeint(
        lambda t, y: -y,
        lambda t, y: scale[0] * g(y),
        y0,
        [0.0, 1.0],
        steps=4,
        path=path if what == "path" else None,
        options=options,
    )
    if what == "weight":
        with torch.no_grad():
            g.weight.add_(1e-6)
    elif what == "attribute":
        scale[0] = 1.1
    with pytest.raises(RuntimeError, match="not what it was in the forward pass"):
        y.sum().backward()


def test_torch_func_takes_gradients_and_maps() -> None:
    path, y0 = path_of((3,), 4), torch.rand(5, 3, dtype=F64)

    def loss(y: Tensor, rate: Tensor) -> Tensor:
        how: dict[str, Any] = {"method": "heun", "steps": 4, "path": path}
        return ns.sdeint(lambda t, y: -rate * y, lambda t, y: 0.3 * y, y, [0.0, 1.0], **how)[-1].sum()

    rate = torch.tensor(2.0, dtype=F64)
    mapped = torch.func.vmap(torch.func.grad(loss), (0, None))(y0, rate)
    each = torch.stack([torch.func.grad(loss)(y, rate) for y in y0])
    torch.testing.assert_close(mapped, each)


def test_torch_compile_leaves_sdeint_as_it_is() -> None:
    path, y0 = path_of((2, 3), 4), torch.rand(2, 3, dtype=F64)

    def solved(y: Tensor) -> Tensor:
        return ns.sdeint(lambda t, y: -y, lambda t, y: 0.3 * y, 2 * y, [0.0, 1.0], steps=4, path=path) + 1

    torch.testing.assert_close(torch.compile(solved, backend="eager")(y0), solved(y0))


# ---- fused -----------------------------------------------------------------------------------------------------------


class Terms(nn.Module):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self.drift, self.diffusion = nn.Linear(3, 3), nn.Linear(3, 3 if noise == "diagonal" else 6)
        self.noise = noise

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.drift(y)) * (1 + t)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = torch.sigmoid(self.diffusion(y))
        return g if self.noise == "diagonal" else g.reshape(-1, 3, 2)


@pytest.mark.parametrize("noise", ["diagonal", "general"])
@pytest.mark.parametrize("method", ["euler_maruyama", "midpoint"])
def test_fused_terms_take_the_same_steps_and_give_the_same_gradients(method: str, noise: str) -> None:
    torch.manual_seed(0)
    terms, y0 = Terms(noise).double(), torch.rand(5, 3, dtype=F64, requires_grad=True)
    f, g = ns.fuse_sde(terms.f, terms.g, y0, noise=noise)
    path = ns.BrownianPath((5, 3 if noise == "diagonal" else 2), 0.0, 2.0, seed=0, dtype=F64)
    how: dict[str, Any] = {"method": method, "noise": noise, "steps": 20, "path": path}
    plain = ns.sdeint(terms.f, terms.g, y0, [0.0, 0.3, 2.0], **how)
    f.func = g.func = None  # not called in the kernel
    fused = ns.sdeint(f, g, y0, [0.0, 0.3, 2.0], **how)
    torch.testing.assert_close(fused, plain)
    wanted = (y0, *terms.parameters())
    grads = (torch.autograd.grad(ys[1:].square().sum(), wanted) for ys in (fused, plain))
    for ours, exact in zip(*grads):
        torch.testing.assert_close(ours, exact)


def test_fused_terms_of_other_solves_take_the_loop() -> None:
    terms, y0 = Terms("diagonal"), torch.rand(5, 3)
    f, g = ns.fuse_sde(terms.f, terms.g, y0)
    path = ns.BrownianPath((5, 3), 0.0, 1.0, seed=0)
    changes: list[dict[str, Any]] = [
        {"method": "heun"},
        {"method": "midpoint", "t": [1.0, 0.0]},
        {"options": {"recompute": True}},
        {"y0": y0[0], "path": None},
    ]
    for change in changes:
        how: dict[str, Any] = {"y0": y0, "t": [0.0, 1.0], "steps": 4, "path": path, **change}
        torch.manual_seed(0)
        fused = ns.sdeint(f, g, **how)
        torch.manual_seed(0)
        torch.testing.assert_close(fused, ns.sdeint(terms.f, terms.g, **how))
    with torch.no_grad():  # weights may change
        terms.drift.weight.mul_(2.0)
    how = {"y0": y0[:2], "t": [0.0, 1.0], "steps": 4, "path": ns.BrownianPath((2, 3), 0.0, 1.0, seed=0)}
    torch.testing.assert_close(ns.sdeint(f, g, **how), ns.sdeint(terms.f, terms.g, **how))


@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_a_batch_may_be_empty(noise: str) -> None:
    terms, y0 = Terms(noise), torch.rand(5, 3)
    for f, g in ((terms.f, terms.g), ns.fuse_sde(terms.f, terms.g, y0, noise=noise)):
        assert ns.sdeint(f, g, y0[:0], [0.0, 1.0], noise=noise, steps=3).shape == (2, 0, 3)


def test_fuse_sde_says_what_it_does_not_take() -> None:
    terms, y0 = Terms("diagonal"), torch.rand(5, 3)
    with pytest.raises(ValueError, match=r"one tensor \[batch, ...\]"):
        ns.fuse_sde(terms.f, terms.g, y0[0])
    with pytest.raises(ValueError, match="noise must be"):
        ns.fuse_sde(terms.f, terms.g, y0, noise="scalar")
    for returned in (lambda t, y: y[:, :1], lambda t, y: y.sum()):  # which would broadcast
        with pytest.raises(ValueError, match="g must return y's shape"):
            ns.fuse_sde(terms.f, returned, y0)
        with pytest.raises(ValueError, match="g must return"):
            ns.fuse_sde(terms.f, returned, y0, noise="general")
        with pytest.raises(ValueError, match="f must return the shape"):
            ns.fuse_sde(returned, terms.g, y0)
    with pytest.raises(TypeError, match="g must return tensors"):
        ns.fuse_sde(terms.f, lambda t, y: 0.5, y0)
    general = Terms("general")
    f, g = ns.fuse_sde(general.f, general.g, y0, noise="general")
    with pytest.raises(ValueError, match="2 columns, but the path is of 1"):
        ns.sdeint(f, g, y0, [0.0, 1.0], noise="general", steps=2, path=ns.BrownianPath((5, 1), 0.0, 1.0))
    with pytest.raises(ns.FuseError):
        ns.fuse_sde(terms.f, lambda t, y: y.sort(dim=1).values, y0)


# ---- beside torchsde -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["diagonal", "general"])
@pytest.mark.parametrize("method", ["euler_maruyama", "heun", "midpoint"])
def test_the_numbers_are_torchsdes_on_the_same_path(method: str, noise: str) -> None:
    torchsde = pytest.importorskip("torchsde")
    y0, steps = torch.rand(4, 3, dtype=F64), 8
    ours = path_of((4, 3) if noise == "diagonal" else (4, 2), steps)
    mix = torch.rand(3, 2, dtype=F64)

    class Equation:
        noise_type, sde_type = noise, "ito" if method in ITO else "stratonovich"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(y) * (1 + t)

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.5 * torch.cos(y + t) if noise == "diagonal" else y[..., None] * mix

    class Path(torchsde.BaseBrownian):  # type: ignore[misc]
        shape, dtype, device, levy_area_approximation = ours.shape, F64, torch.device("cpu"), "none"

        def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
            return ours(float(ta), float(tb))

        def __repr__(self) -> str:
            return "ours"

    sde = Equation()
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    name = {"euler_maruyama": "euler"}.get(method, method)
    theirs = torchsde.sdeint(sde, y0, t, bm=Path(), method=name, dt=1 / steps)
    found = ns.sdeint(sde.f, sde.g, y0, t, method=method, noise=noise, steps=steps // 2, path=ours)
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["euler", "milstein", "srk", "heun", "midpoint", "reversible_heun"])
def test_torchsde_has_no_method_for_a_stiff_drift(name: str) -> None:
    torchsde = pytest.importorskip("torchsde")
    y0, t, rate = torch.ones(20, 2), torch.tensor([0.0, 0.5]), 1000.0  # rate × step = 50

    class Equation:
        noise_type, sde_type = "diagonal", "ito" if name in ("euler", "milstein", "srk") else "stratonovich"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return -rate * (y - torch.cos(t))

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.ones_like(y)

    sde = Equation()
    theirs = torchsde.sdeint(sde, y0, t, method=name, dt=0.05)[-1]
    ours = ns.sdeint(sde.f, sde.g, y0, t, method="implicit_euler_maruyama", step_size=0.05)[-1]
    assert not float(theirs.abs().max()) < 1e5
    assert float((ours - torch.cos(t[-1])).abs().max()) < 0.2


# ---- errors ----------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "rk4"}, "unknown method 'rk4': choose one of euler_maruyama"),
        ({"noise": "scalar"}, "scalar noise is 'general' with m = 1"),
        ({"noise": "additive"}, "a g that does not depend on y"),
        ({"calculus": "stratonovich"}, "use 'heun', 'midpoint' or 'implicit_midpoint', or add the drift"),
        ({"calculus": "ito", "method": "heun"}, "use 'euler_maruyama' or 'implicit_euler_maruyama', or subtract"),
        ({"calculus": "strat"}, "calculus must be"),
        ({"steps": None}, "no error control: give steps"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"step_size": 0.1}, "give steps or step_size, not both"),
        ({"options": {"step_size": 0.1}}, "give step_size"),
        ({"options": {"rtol": 0.1}}, "unknown option"),
        ({"options": {"max_step": 0.1}}, "those of sdeint are recompute"),
        ({"t": [1.0, 0.0]}, "no meaning back in time"),
        ({"t": [0.0, 0.0]}, "strictly increasing"),
        ({"t": torch.ones(2, 2)}, "one dimension"),
        ({"t": torch.tensor([0.0, 1.0], requires_grad=True)}, "t.detach"),
        ({"y0": ONES.long()}, "floating-point"),
        ({"y0": ONES.cfloat()}, "real states"),
        ({"g": lambda t, y: y[..., None]}, "use noise='general'"),
        ({"g": lambda t, y: y[:, :1]}, "y's shape for diagonal noise"),
        ({"noise": "general"}, "use noise='diagonal'"),
        ({"f": lambda t, y: y[0]}, "shape of its state"),
        ({"path": ns.BrownianPath((2, 2), 0.0, 1.0)}, r"must be of shape \[2, 3\]"),
        ({"path": ns.BrownianPath((2, 3), 0.0, 0.5)}, "outside of the path's"),
        ({"path": ns.BrownianPath((2, 3), 0.0, 1.0, dtype=F64)}, "must be torch.float32"),
        ({"path": 3}, "BrownianPath or a function"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"f": lambda t, y: -y, "g": lambda t, y: y, "y0": ONES, "t": [0.0, 1.0], "steps": 2}
    arguments.update(changed)
    f, g, y0, t = (arguments.pop(name) for name in ("f", "g", "y0", "t"))
    with pytest.raises(ValueError, match=message) as error:
        ns.sdeint(f, g, y0, t, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t1": 0.0}, "t0 must be before t1"),
        ({"t1": float("inf")}, "t0 must be before t1"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"dtype": torch.int64}, "float32 or float64"),
        ({"grid": [0.0, 0.5]}, "grid must go from"),
        ({"grid": [0.0, 0.5, 0.5, 1.0]}, "strictly increasing"),
        ({"grid": [0.0, 0.5, float("nan"), 1.0]}, "strictly increasing"),
        ({"resolution": 0.0}, "resolution must be more than"),
        ({"t0": 1e15, "t1": 1e15 + 8}, "count time from the start"),
    ],
)
def test_a_path_that_cannot_be_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ns.BrownianPath((2,), **{"t0": 0.0, "t1": 1.0, **arguments})


def test_vmap_asks_for_a_path_and_exporters_for_the_drift() -> None:
    def solved(y: Tensor) -> Tensor:
        return ns.sdeint(lambda t, y: -y, lambda t, y: y, y, [0.0, 1.0], steps=2)

    with pytest.raises(ValueError, match="give path="):
        torch.func.vmap(solved)(ONES)
    with pytest.raises(ValueError, match="export the drift alone"):
        torch.jit.trace(solved, ONES)


def test_an_unsolved_stage_says_what_to_do() -> None:
    with pytest.raises(ns.StageSolveError, match="take smaller steps"):
        ns.sdeint(
            lambda t, y: y.square() + 10.0, lambda t, y: y, ONES, [0.0, 1.0], method="implicit_euler_maruyama", steps=1
        )


def test_what_is_no_function_and_no_shape_is_said() -> None:
    with pytest.raises(TypeError, match=r"g must be a function of \(t, y\), got None; odeint solves without noise"):
        ns.sdeint(lambda t, y: y, None, torch.zeros(2, 1), [0.0, 1.0], steps=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"like must be a tensor, or a shape, of one value of the path, got 0\.0"):
        ns.BrownianPath(0.0, 1.0, 2.0)  # type: ignore[arg-type]


def test_what_sdeint_does_not_solve_is_refused_with_what_to_write() -> None:
    def solve(y0: Any = ONES, **how: Any) -> Any:
        return ns.sdeint(lambda t, y: y, lambda t, y: y, y0, [0.0, 1.0], **{"steps": 2, **how})

    with pytest.raises(ValueError, match=r"real states, got torch.complex64: give real and imaginary part as a tuple"):
        solve(torch.ones(2, 1, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"option 'step_size' is odeint's: give step_size=\.\.\."):
        solve(options={"step_size": 0.1})
    with pytest.raises(ValueError, match="option 'perturb' is odeint's: those of sdeint are"):
        solve(options={"perturb": True})
    with pytest.raises(ValueError, match="got 'scalar': scalar noise is 'general' with m = 1"):
        solve(noise="scalar")
    with pytest.raises(ValueError, match="got 'additive': additive noise is either"):
        solve(noise="additive")
    with pytest.raises(ValueError, match=r"in Stratonovich's sense: use .*'midpoint'.*, or add the drift"):
        solve(method="euler_maruyama", calculus="stratonovich")
    with pytest.raises(ValueError, match=r"in Itô's sense: use .*, or subtract the drift"):
        solve(method="heun", calculus="ito")
    with pytest.raises(ValueError, match="calculus must be 'ito' or 'stratonovich', got 'both'"):
        solve(calculus="both")
    with pytest.raises(
        ValueError, match=r"the path must be torch.float64 on cpu, as the state, got torch.float32 on cpu"
    ):
        solve(ONES.double(), path=lambda s, t: torch.zeros(ONES.shape))
    with pytest.raises(ValueError, match=r"path must be a BrownianPath or a function \(s, t\), got float"):
        solve(path=1.0)
    with pytest.raises(ValueError, match="noise must be 'diagonal' or 'general', got 'scalar'"):
        ns.fuse_sde(lambda t, y: y, lambda t, y: y, torch.ones(2, 1), noise="scalar")
    with pytest.raises(ValueError, match=r"states of one tensor \[batch, ...\]"):
        ns.fuse_sde(lambda t, y: y, lambda t, y: y, torch.ones(2))
    with pytest.raises(
        ValueError, match=r"f must return the shape of its state: it got \(1, 1\) and returned \(1, 2\)"
    ):
        ns.fuse_sde(lambda t, y: torch.cat([y, y], 1), lambda t, y: y, torch.ones(2, 1))
    with pytest.raises(ValueError, match="and returned NoneType"):
        ns.fuse_sde(lambda t, y: None, lambda t, y: y, torch.ones(2, 1))  # type: ignore[arg-type,return-value]
