"""WithDivergence: traces, regularisers and log densities beside autograd's Jacobian and direct formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nodeshape as ns


class Field(nn.Module):
    """Of three features, with time in it."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([y, torch.ones_like(y[:, :1]) * t], dim=1))
        return out


class Swirl(nn.Module):
    """Of maps [2, 3, 3], which no layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * torch.sin(y.flip(1) * (1 + t)) + y * y.mean((1, 2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def jacobians(f: Any, t: Tensor, y: Tensor) -> Tensor:
    """Of each sample by itself, ``[batch, n, n]``."""
    n = y[0].numel()
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda x: f(t, x[None])[0], x).reshape(n, n) for x in y.unbind()]
    )


@pytest.mark.parametrize("f, shape", [(Field(), (3,)), (Field(nn.SiLU), (3,)), (Swirl(), (2, 3, 3))])
def test_the_exact_trace_and_regularisers_are_those_of_the_jacobian(f: nn.Module, shape: tuple[int, ...]) -> None:
    f, y, t = f.double(), torch.randn(4, *shape).double(), torch.tensor(0.3).double()
    flow = ns.WithDivergence(f, kinetic=True, jacobian=True)
    dy, change, kinetic, jacobian = flow(t, flow.state(y))
    j = jacobians(f, t, y)
    assert torch.allclose(dy, f(t, y), rtol=1e-12)
    assert torch.allclose(change[:, 0], -j.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-10)
    assert torch.allclose(kinetic[:, 0], f(t, y).square().flatten(1).sum(1), rtol=1e-10)
    assert torch.allclose(jacobian[:, 0], j.square().sum((1, 2)), rtol=1e-10)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_estimators_have_the_trace_and_the_norm_as_mean(noise: str) -> None:
    f, t = Field().double(), torch.tensor(0.3).double()
    y, many = torch.randn(3).double(), 40_000
    flow = ns.WithDivergence(f, "hutchinson", jacobian=True, noise=noise)
    with torch.no_grad():
        found = [x[:, 0] for x in flow(t, flow.state(y.expand(many, 3)))[1:3]]
    j = jacobians(f, t, y[None])[0]
    for estimates, expected in zip(found, (-j.trace(), j.square().sum())):
        assert abs(float(estimates.mean() - expected)) < 4 * float(estimates.std()) / many**0.5 + 1e-12
        assert float(estimates.std()) > 1e-3


def test_hutchinsons_noise_is_fixed_in_a_solve_and_new_in_each() -> None:
    f = Field()
    flow = ns.WithDivergence(f, "hutchinson")
    y = torch.randn(6, 3)
    fused = ns.fuse(flow, flow.state(y))
    first, second = flow.state(y), flow.state(y)
    assert set(first[-1].unique().tolist()) == {-1.0, 1.0} and not torch.equal(first[-1], second[-1])
    changes = []
    for start in (first, first, second):
        solved = ns.odeint(fused, start, [0.0, 1.0], method="rk4", steps=3)
        assert torch.equal(solved[-1][1], start[-1])
        plain = ns.odeint(flow, start, [0.0, 1.0], method="rk4", steps=3)
        assert torch.allclose(solved[1], plain[1], atol=1e-5)
        changes.append(solved[1][-1])
    assert torch.equal(changes[0], changes[1]) and not torch.allclose(changes[0], changes[2], atol=1e-4)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(flow.state(y, generator)[-1] for generator in generators))


@pytest.mark.parametrize("how", [{}, {"trace": "hutchinson"}])
def test_gradients_of_a_solve_are_those_of_differences(how: dict[str, Any]) -> None:
    f = Field().double()
    flow = ns.WithDivergence(f, kinetic=True, jacobian=True, **how)
    y = torch.randn(2, 3).double().requires_grad_()
    noise = flow.state(y)[4:]

    def solve(y: Tensor, *weights: Tensor) -> Any:
        start = (*flow.state(y)[:4], *noise)
        return tuple(s[-1] for s in ns.odeint(flow, start, [0.0, 0.7], method="midpoint", steps=2)[:4])

    assert torch.autograd.gradcheck(solve, (y, *f.parameters()), fast_mode=True)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.SiLU])
@pytest.mark.parametrize("how", [{}, {"trace": "hutchinson", "kinetic": True, "jacobian": True}])
def test_fused_it_is_the_same_with_the_same_gradients(activation: type[nn.Module], how: dict[str, Any]) -> None:
    f = Field(activation).double()
    flow = ns.WithDivergence(f, **how)
    start = flow.state(torch.randn(5, 3).double())
    fused = ns.fuse(flow, start)
    assert ns.backend(fused, start, [0.0, 1.0], method="rk4", steps=2).name == "fused"
    found = []
    for dynamics in (fused, flow):
        y, *others = (x.clone() for x in start)
        y.requires_grad_()
        ys = ns.odeint(dynamics, (y, *others), [0.0, 1.0], method="rk4", steps=2)
        loss = sum((x[-1] * torch.arange(x[-1].numel()).reshape_as(x[-1])).sum() for x in ys)
        found.append([*(x.detach() for x in ys), *torch.autograd.grad(loss, [y, *f.parameters()], allow_unused=True)])
    for a, b in zip(*found):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-9)


class Handwritten(nn.Module):
    """As torchdiffeq's cnf example takes the trace."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = state[0]
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            dy = self.f(t, y)
            trace = torch.zeros_like(y[:, 0])
            for i in range(y.shape[1]):
                trace = trace + torch.autograd.grad(dy[:, i].sum(), y, create_graph=True)[0][:, i]
        return dy, -trace[:, None]


def test_a_trace_by_autograd_inside_f_fuses_too() -> None:
    f = Field()
    y = torch.randn(5, 3)
    fused, flow = ns.fuse(Handwritten(f), (y, y[:, :1])), ns.WithDivergence(f)
    assert ns.backend(fused, flow.state(y), [0.0, 1.0], method="rk4", steps=2).name == "fused"
    with torch.no_grad():
        found, expected = (
            ns.odeint(dynamics, flow.state(y), [0.0, 1.0], method="rk4", steps=2) for dynamics in (fused, flow)
        )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))


def test_the_gradient_of_an_energy_fuses() -> None:
    class Hamiltonian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda y: self.energy(y).sum())(y)
            return torch.stack([gradient[:, 1], -gradient[:, 0]], dim=1)

    f, y = Hamiltonian().double(), torch.randn(5, 2).double()
    fused = ns.fuse(f, y)
    ys = ns.odeint(fused, y, [0.0, 1.0], method="rk4", steps=20)
    assert torch.allclose(ys[-1], ns.odeint(f, y, [0.0, 1.0], method="rk4", steps=20)[-1], atol=1e-12)
    assert torch.allclose(f.energy(ys[-1]), f.energy(y), atol=1e-7) and not torch.allclose(ys[-1], y, atol=1e-2)


def test_an_f_that_detaches_the_derivative_it_takes_is_refused() -> None:
    class Detached(Handwritten):
        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            dy, change = super().forward(t, state)
            return dy, change.detach()

    y = torch.randn(5, 3)
    with pytest.raises(ns.FuseError, match="detach"):
        ns.fuse(Detached(Field()), (y, y[:, :1]))


def test_what_has_no_layer_is_named_with_its_line_inside_a_derivative_too() -> None:
    class Sorted(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y.sort(dim=1)[0]

    flow = ns.WithDivergence(Sorted())
    with pytest.raises(ns.FuseError, match=r"sort does not lower at .*test_divergence.py.*y.sort"):
        ns.fuse(flow, flow.state(torch.randn(5, 3)))


def test_the_log_density_of_a_linear_flow_is_that_of_its_normal_distribution() -> None:
    a = torch.tensor([[0.4, -1.0], [0.3, -0.2]]).double()
    flow = ns.WithDivergence(lambda t, y: y @ a.T)
    x = torch.randn(7, 2).double()
    z, change = ns.odeint(flow, flow.state(x), [0.0, 1.0], method="rk4", steps=100)
    m = torch.linalg.matrix_exp(a)
    assert torch.allclose(z[-1], x @ m.T, atol=1e-8)
    assert torch.allclose(change[-1], torch.full_like(change[-1], -float(torch.logdet(m))), atol=1e-8)
    covariance = torch.linalg.inv(m) @ torch.linalg.inv(m).T
    expected = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(x)
    found = -0.5 * z[-1].square().sum(1) - math.log(2 * math.pi) - change[-1, :, 0]
    assert torch.allclose(found, expected, atol=1e-8)


def test_the_reverse_solve_undoes_the_flow_and_its_change_of_density() -> None:
    flow = ns.WithDivergence(Field().double())
    x = torch.randn(4, 3).double()
    fused = ns.fuse(flow, flow.state(x))
    with torch.no_grad():
        there = tuple(s[-1] for s in ns.odeint(fused, flow.state(x), [0.0, 1.0], method="rk4", steps=60))
        back = tuple(s[-1] for s in ns.odeint(fused, there, [1.0, 0.0], method="rk4", steps=60))
    assert torch.allclose(back[0], x, atol=1e-8) and float(back[1].abs().max()) < 1e-8
    assert float(there[1].abs().min()) > 1e-3


@pytest.mark.parametrize(
    "how",
    [
        {"method": "midpoint", "steps": 2},
        pytest.param({"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}, marks=pytest.mark.slow),
    ],
)
def test_a_fused_log_density_runs_in_onnxruntime(how: dict[str, Any], tmp_path: Path) -> None:
    import onnxruntime

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = ns.fuse(ns.WithDivergence(ns.MLPDynamics(2, (8,))), (torch.zeros(2, 2), torch.zeros(2, 1)))

        def forward(self, x: Tensor) -> Tensor:
            z, change = ns.odeint(self.flow, self.flow.func.state(x), [0.0, 1.0], **how)
            return -0.5 * z[-1].square().sum(1) - change[-1, :, 0]

    density, x = Density(), torch.randn(9, 2)
    ns.to_onnx(density, x, tmp_path / "density.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "density.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found), density(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("trace", [pytest.param("exact", marks=pytest.mark.slow), "hutchinson"])
def test_a_fused_divergence_is_torchscript_for_any_batch(trace: str, tmp_path: Path) -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = ns.WithDivergence(ns.MLPDynamics(2, (8,)), trace, kinetic=True, jacobian=True)
            self.fused = ns.fuse(self.flow, self.flow.state(torch.zeros(2, 2)))

        def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
            return tuple(x[-1] for x in ns.odeint(self.fused, state, [0.0, 1.0], method="euler", steps=2))

    flow = Flow()
    few, many = (flow.flow.state(torch.randn(batch, 2)) for batch in (3, 11))
    ns.to_torchscript(flow, few, tmp_path / "flow.ts")
    loaded = torch.jit.load(tmp_path / "flow.ts")
    with torch.no_grad():
        for found, expected in zip(loaded(*many), flow(*many)):
            assert torch.allclose(found, expected, atol=1e-5)


def test_wrong_settings_and_states_are_said() -> None:
    with pytest.raises(ValueError, match="unknown trace 'exakt': choose one of exact, hutchinson"):
        ns.WithDivergence(Field(), "exakt")
    with pytest.raises(ValueError, match="unknown noise 'normal'"):
        ns.WithDivergence(Field(), "hutchinson", noise="normal")
    flow = ns.WithDivergence(Field(), "hutchinson")
    with pytest.raises(ValueError, match=r"y must be \[batch"):
        flow.state(torch.zeros(3))
    with pytest.raises(ValueError, match="the 3 tensors of"):
        flow(torch.tensor(0.0), (torch.zeros(2, 3), torch.zeros(2, 1)))
    short = ns.WithDivergence(lambda t, y: y[:, :2])
    with pytest.raises(ValueError, match=r"the shape of y, \[2, 3\], it returned \[2, 2\]"):
        short(torch.tensor(0.0), short.state(torch.zeros(2, 3)))


def test_a_log_density_without_a_column_is_refused() -> None:
    y = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"the 2 tensors of WithDivergence.state\(y\), got \[5, 2\], \[5\]"):
        ns.WithDivergence(lambda t, y: -y)(torch.zeros(()), (y, torch.zeros(5)))
