"""Error control inside the fused solver: every sample its own steps, as the plain loop takes them."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import nodeshape as ns

METHODS = ["dopri5", "tsit5", "bosh3", "adaptive_heun", "fehlberg2"]
DECLARED = {"step_control": "per_sample", "fused": False}


class Perceptron(nn.Module):
    """Also of t, which may be a number or one for each sample."""

    def __init__(self, size: int = 5, width: int = 11) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(y) + torch.sin(2 * t))) - 0.1 * y


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(y)))


def problem(name: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(batch)
    if name == "map":
        return Map().to(dtype), torch.randn(batch, 3, 5, 4, dtype=dtype)
    # Samples of several speeds take different numbers of steps.
    return Perceptron().to(dtype), (torch.randn(batch, 5) * torch.logspace(-1, 1, batch)[:, None]).to(dtype)


def gradients(f: nn.Module, y0: Tensor, ys: Tensor, weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((ys * weights).sum(), [y0, *f.parameters()], allow_unused=True))


@pytest.mark.parametrize("batch", [1, 2, 5, 16, 33, 150])
@pytest.mark.parametrize("method", METHODS)
def test_steps_values_and_gradients_are_those_of_the_plain_loop(method: str, batch: int) -> None:
    f, y0 = problem("perceptron", batch)
    y0.requires_grad_()
    fused = ns.fuse(f, y0)
    t = torch.tensor([0.5, 0.9, 1.0, 1.7, 2.5])
    tight = {"rtol": 1e-6, "atol": 1e-8} if method in METHODS[:2] else {"rtol": 1e-4, "atol": 1e-5}
    assert ns.backend(fused, y0, t, method=method, **tight).name == "fused"
    ys, stats = ns.odeint(fused, y0, t, method=method, return_stats=True, **tight)
    plain, expected = ns.odeint(f, y0, t, method=method, options=DECLARED, return_stats=True, **tight)
    assert stats.step_control == expected.step_control == "per sample"
    torch.testing.assert_close(stats.accepted, expected.accepted, rtol=0, atol=0)
    torch.testing.assert_close(stats.rejected, expected.rejected, rtol=0, atol=0)
    torch.testing.assert_close(ys, plain, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(ys)
    for ours, theirs in zip(gradients(f, y0, ys, weights), gradients(f, y0, plain, weights)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert bool((stats.nfe_backward > 0).all())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["perceptron", "map"])
def test_instruction_sets(isa: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESHAPE_ISA", isa)
    for batch in (2, 40):
        f, y0 = problem(name, batch, dtype)
        y0.requires_grad_()
        t = torch.tensor([1.0, 0.4, 0.0])  # backwards in time
        try:
            ys = ns.odeint(ns.fuse(f, y0), y0, t, rtol=1e-5, atol=1e-6)
        except RuntimeError as error:
            if "does not have it" in str(error):
                pytest.skip(f"this processor has no {isa}")
            raise
        plain = ns.odeint(f, y0, t, rtol=1e-5, atol=1e-6, options=DECLARED)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(ys, plain, **close)
        weights = torch.randn_like(ys)
        for ours, theirs in zip(gradients(f, y0, ys, weights), gradients(f, y0, plain, weights)):
            torch.testing.assert_close(ours, theirs, rtol=50 * close["rtol"], atol=50 * close["atol"])


@pytest.mark.parametrize(
    "options",
    [{"first_step": 0.3}, {"max_step": 0.05}, {"min_step": 0.2}, {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.5}],
)
def test_options_of_the_steps(options: dict[str, Any]) -> None:
    f, y0 = problem("perceptron", 12)
    ys, stats = ns.odeint(ns.fuse(f, y0), y0, [0.0, 1.0], options=options, return_stats=True)
    plain, expected = ns.odeint(f, y0, [0.0, 1.0], options={**options, **DECLARED}, return_stats=True)
    torch.testing.assert_close(stats.accepted, expected.accepted, rtol=0, atol=0)
    torch.testing.assert_close(ys, plain, rtol=1e-9, atol=1e-10)


def test_many_observations_cost_no_evaluation() -> None:
    f, y0 = problem("perceptron", 20)
    fused = ns.fuse(f, y0)
    few, at_few = ns.odeint(fused, y0, [0.0, 3.0], return_stats=True)
    many, at_many = ns.odeint(fused, y0, torch.linspace(0, 3, 1000), return_stats=True)
    torch.testing.assert_close(at_few.nfe_forward, at_many.nfe_forward, rtol=0, atol=0)
    torch.testing.assert_close(many[-1], few[-1], rtol=1e-12, atol=1e-12)


def explodes(t: Tensor, y: Tensor) -> Tensor:
    return y * y


@pytest.mark.parametrize("batch", [3, 40])
def test_samples_that_fail(batch: int) -> None:
    y0 = torch.full((batch, 2), -1.0, dtype=torch.float64)
    y0[1] = 5.0  # gets to infinity at t = 0.2
    y0[2, 0] = torch.nan
    fused = ns.fuse(explodes, torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(
        ns.StepSizeError, match=r"2 of \d+ samples \(the first is number 1\) failed: sample 1 cannot be"
    ):
        ns.odeint(fused, y0, [0.0, 0.1, 1.0])
    y0.requires_grad_()
    ys, stats = ns.odeint(fused, y0, [0.0, 0.1, 1.0], options={"on_failure": "nan"}, return_stats=True)
    assert set(stats.failures) == {1, 2}
    assert "the state of sample 2 at t=0 is not finite" in stats.failures[2]
    torch.testing.assert_close(ys[1, 1], torch.full((2,), 10.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(ys[2, 1].isnan().all()) and bool(ys[1:, 2].isnan().all())
    torch.testing.assert_close(
        ys[:, 0], (y0[0] / (1 - torch.tensor([[0.0], [0.1], [1.0]]) * y0[0])).detach(), rtol=1e-6, atol=0
    )
    ys[1, :2].sum().backward()
    assert y0.grad is not None
    exact = 1 / (1 - 0.1 * y0.detach()[:2]) ** 2
    torch.testing.assert_close(y0.grad[:2], exact, rtol=1e-5, atol=0)


def test_a_state_that_is_not_finite_is_an_error_in_the_plain_loop_too() -> None:
    f, y0 = problem("perceptron", 4)
    y0[2, 1] = torch.inf
    for func, options in ((ns.fuse(f, y0), {}), (f, DECLARED)):
        with pytest.raises(ns.StepSizeError, match=r"1 of 4 samples .the first is number 2.*is not finite"):
            ns.odeint(func, y0, [0.0, 1.0], options=options)


def test_too_many_attempts() -> None:
    f, y0 = problem("perceptron", 4)
    with pytest.raises(ns.StepSizeError, match="has made 3 attempts, as many as allowed"):
        ns.odeint(ns.fuse(f, y0), y0, [0.0, 50.0], options={"max_num_steps": 3})


def test_threads_and_company_change_nothing() -> None:
    f, y0 = problem("perceptron", 300)
    fused = ns.fuse(f, y0)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y0.requires_grad_().grad = None
        f.zero_grad()
        ys = ns.odeint(fused, y0, [0.0, 1.0])
        ys[-1].square().sum().backward()
        found.append([ys.detach(), y0.grad, *(p.grad for p in f.parameters())])
    torch.set_num_threads(2)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert torch.equal(ns.odeint(fused, y0[100:164], [0.0, 1.0]), found[0][0][:, 100:164])


def test_what_takes_the_plain_loop_says_so() -> None:
    f, y0 = problem("perceptron", 3)
    fused = ns.fuse(f, y0)
    t = torch.tensor([0.0, 1.0])
    for asked, why in [
        ({"method": "dopri8"}, ""),
        ({"method": "sdirk2", "rtol": 1e-4}, "sdirk2"),
        ({"method": "rk4", "rtol": 1e-4}, "rk4"),
        ({"adjoint": "continuous"}, "without a record"),
        ({"options": {"step_control": "shared"}}, "share"),
        ({"rtol": torch.full((5,), 1e-3)}, "each element"),
        ({"options": {"jump_t": [0.5]}}, "jump_t"),
        ({"return_dense": True}, "dense output"),
    ]:
        chosen = ns.backend(fused, y0, t, **asked)
        assert chosen.name == ("plain" if why else "fused")
        assert why in chosen.reason
    moved = t.double().requires_grad_()
    assert "times are differentiated" in ns.backend(fused, y0, moved).reason
    ns.odeint(fused, y0, moved)[-1].sum().backward()
    torch.testing.assert_close(moved.grad[1], f(moved[1], ns.odeint(f, y0, t)[-1]).sum().detach(), rtol=1e-5, atol=0)


def test_checkpointed_and_recorded_gradients() -> None:
    f, y0 = problem("perceptron", 6)
    y0.requires_grad_()
    fused = ns.fuse(f, y0)

    def loss(y: Tensor) -> Tensor:
        return ns.odeint(fused, y, [0.0, 1.0])[-1].square().sum()

    (plainly,) = torch.autograd.grad(loss(y0), y0)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, y0, use_reentrant=False), y0)
    (recorded,) = torch.autograd.grad(loss(y0), y0, create_graph=True)
    assert torch.equal(plainly, again)
    assert torch.equal(plainly, recorded)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        recorded.sum().backward()
