"""``fuse``: a program computes what its f computes, in every method and mode, and says why where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn

import nodeshape as ns

FIXED = ("euler", "midpoint", "heun3", "rk4", "dopri5")
IMPLICIT = ("implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "kvaerno3")


class MLP(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 64, activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, dim)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class TimeMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.Softplus(), nn.Linear(7, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, torch.ones_like(y[:, :1]) * t], dim=1))


class CubicMLP(nn.Module):
    """Of torchdiffeq's ode_demo."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


class LatentODE(nn.Module):
    """Of torchdiffeq's latent_ode, as it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.elu = nn.ELU(inplace=True)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        self.nfe = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        out = self.fc1(x)
        out = self.elu(out)
        out = self.fc2(out)
        out = self.elu(out)
        return self.fc3(out)


class SiluConv(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.conv2(nn.functional.silu(self.conv1(y)))


class ConcatConv(nn.Module):
    """The block of torchdiffeq's odenet_mnist, as it is written there."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(2, dim) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(dim + 1, dim, 3, 1, 1), nn.Conv2d(dim + 1, dim, 3, 1, 1)

    def timed(self, conv: nn.Module, t: Tensor, x: Tensor) -> Tensor:
        tt = torch.ones_like(x[:, :1, :, :]) * t
        return conv(torch.cat([tt, x], 1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(x))
        out = self.relu(self.norm2(self.timed(self.conv1, t, out)))
        return self.norm3(self.timed(self.conv2, t, out))


class AugmentedConv(nn.Module):
    """Of augmented neural ODEs (Dupont et al. 2019): 1×1, 3×3, 1×1, the time as a channel of each."""

    def __init__(self, channels: int = 5, hidden: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, hidden, 1)
        self.conv2 = nn.Conv2d(hidden + 1, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden + 1, channels, 1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for i, conv in enumerate((self.conv1, self.conv2, self.conv3)):
            x = conv(torch.cat([torch.ones_like(x[:, :1]) * t, x if i == 0 else torch.relu(x)], 1))
        return x


class GRUODE(nn.Module):
    """Of GRU-ODE-Bayes (De Brouwer et al. 2019), without input."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.r, self.z, self.h = (nn.Linear(hidden, hidden, bias=bias) for bias in (True, False, True))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.r(h)), torch.sigmoid(self.z(h))
        return (1 - z) * (torch.tanh(self.h(r * h)) - h)


class GRUCellODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.cell(torch.zeros_like(h[:, :3]), h) - h


class LotkaVolterra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.5, 1.0]))
        self.coupling = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        prey, predator = y[..., 0], y[..., 1]
        met = prey * predator
        up = self.rates[0] * prey - self.coupling[0] * met
        down = -self.rates[1] * predator + self.coupling[1] * met
        return torch.stack([up, down], dim=-1)


class Hamiltonian(nn.Module):
    """A pendulum with a learned potential: a tuple state, and a time-dependent drive."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(0.7))
        self.mix = nn.Linear(3, 3, bias=False)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, p = state
        return p, -self.stiffness * torch.sin(q) - self.mix(q) * torch.cos(2 * t)


class NormMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y + self.down(nn.functional.gelu(self.up(self.norm(y)))) - 0.5 * y * t


class Separable(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)
        self.norm = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.point(nn.functional.gelu(self.norm(self.depth(y)), approximate="tanh"))


class Shared(nn.Module):
    """Tied, frozen and buffered weights, a reparametrised layer, and a matrix used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.matrix = nn.Parameter(torch.randn(4, 4) / 4)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.a(torch.tanh(y @ self.matrix)) + self.frozen * t
        return self.a(self.scale * y) @ self.matrix.t() - y.mean(dim=1, keepdim=True)


class Attention(nn.Module):
    """Products of values, sums inside a sample, permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        scores = torch.exp(torch.tanh(self.q(y) @ self.k(y).transpose(1, 2)))
        return scores / scores.sum(dim=-1, keepdim=True) @ self.v(y)


class Odds(nn.Module):
    """What is left: functions of one element, slices with steps, powers, padding, maxima."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.split([2, 2, 2], dim=1)
        a = torch.sqrt(1 + a.square()) * torch.reciprocal(2 + torch.sin(b)) + c.abs() ** 1.5
        b = torch.log(3 + torch.tanh(b)) / (1 + torch.exp(-c)) + nn.functional.leaky_relu(b, 0.2)
        c = nn.functional.mish(c) + torch.clamp(b, -0.3, 0.4) - torch.maximum(a, c) + 2.0**b
        out = torch.cat([nn.functional.pad(a[:, :1], (0, 1)), b, c], dim=1)
        return out - y[:, ::2].sum(dim=1, keepdim=True) / (4 + t)


CASES: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "mlp": (MLP, lambda n: torch.randn(n, 8)),
    "time": (TimeMLP, lambda n: torch.randn(n, 3)),
    "cubic": (CubicMLP, lambda n: torch.randn(n, 2)),
    "latent": (LatentODE, lambda n: torch.randn(n, 4)),
    "conv": (SiluConv, lambda n: torch.randn(n, 4, 5, 6)),
    "concat conv": (ConcatConv, lambda n: torch.randn(n, 4, 4, 4)),
    "augmented conv": (AugmentedConv, lambda n: torch.randn(n, 5, 3, 3)),
    "gru": (GRUODE, lambda n: torch.randn(n, 6)),
    "gru cell": (GRUCellODE, lambda n: torch.randn(n, 5)),
    "lotka-volterra": (LotkaVolterra, lambda n: torch.rand(n, 2) + 0.5),
    "hamiltonian": (Hamiltonian, lambda n: (torch.randn(n, 3), torch.randn(n, 3))),
    "norm": (NormMLP, lambda n: torch.randn(n, 6)),
    "separable": (Separable, lambda n: torch.randn(n, 6, 4, 5)),
    "shared": (Shared, lambda n: torch.randn(n, 4)),
    "attention": (Attention, lambda n: torch.randn(n, 3, 4)),
    "odds": (Odds, lambda n: torch.randn(n, 6)),
}


def problem(name: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(5)
    make, state = CASES[name]
    f, y0 = make(), state(batch)
    f = f.to(dtype) if isinstance(f, nn.Module) else f
    y0 = tuple(x.to(dtype) for x in y0) if isinstance(y0, tuple) else y0.to(dtype)
    return f, y0


@cache
def fused_problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A fused f and f, which share their weights; no test changes them."""
    f, y0 = problem(name, dtype=dtype)
    return ns.fuse(f, y0), f


def solved(f: Any, y0: Any, t: Tensor, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Observations, and the gradients of a loss that weighs each of them differently, by y0, t and weights."""
    leaves = [x.detach().clone().requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    t = t.clone().requires_grad_()
    ys = ns.odeint(f, tuple(leaves) if isinstance(y0, tuple) else leaves[0], t, **settings)
    ys = list(ys) if isinstance(ys, tuple) else [ys]
    generator = torch.Generator().manual_seed(11)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() + 0.5 * (y * y).sum()
        for y in ys
    )
    weights = [x for x in f.parameters() if x.requires_grad]
    grads = torch.autograd.grad(loss, [*leaves, t, *weights], allow_unused=True)
    return [y.detach() for y in ys], [
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*leaves, t, *weights])
    ]


def assert_same(fused: Any, f: Any, y0: Any, values: float = 1e-12, gradients: float = 1e-10, **settings: Any) -> None:
    first = y0[0] if isinstance(y0, tuple) else y0
    t = torch.tensor([0.1, 0.4, 1.0], dtype=first.dtype)
    chosen = {name: settings[name] for name in ("method", "steps", "adjoint", "options") if name in settings}
    assert ns.backend(fused, y0, **chosen).name == "fused", ns.backend(fused, y0, **chosen)
    found, expected = solved(fused, y0, t, **settings), solved(f, y0, t, **settings)
    assert relative_error(found[0], expected[0]) < values
    assert relative_error(found[1], expected[1]) < gradients


TIGHT = {"stage_tolerance": 1e-13, "max_stage_iterations": 200}


@pytest.mark.parametrize("name", CASES)
def test_a_program_solves_as_its_f_does(name: str) -> None:
    fused, f = fused_problem(name)
    smooth = name not in ("odds", "concat conv")  # stages with kinks are not solved to the last digit
    for method in (*FIXED, *(IMPLICIT if smooth else ())):
        assert_same(fused, f, problem(name)[1], method=method, steps=2, options=TIGHT if method in IMPLICIT else None)


@pytest.mark.parametrize("batch", [1, 2, 7, 33, 150])
@pytest.mark.parametrize("name", ["mlp", "conv", "hamiltonian"])
def test_any_batch_will_do(name: str, batch: int) -> None:
    fused, f = fused_problem(name)
    for method in ("euler", "rk4", "implicit_midpoint"):
        y0 = problem(name, batch)[1]
        assert_same(fused, f, y0, method=method, steps=2, options=TIGHT if method in IMPLICIT else None)


@pytest.mark.parametrize("name", CASES)
def test_in_float32_a_program_is_as_exact_as_its_f(name: str) -> None:
    fused, f = fused_problem(name, torch.float32)
    y0 = problem(name, 20, torch.float32)[1]
    assert_same(fused, f, y0, values=2e-5, gradients=2e-4, method="rk4", steps=2)


@pytest.mark.parametrize("adjoint", ["reversible", "continuous"])
@pytest.mark.parametrize("name", ["mlp", "augmented conv", "hamiltonian"])
def test_methods_of_one_stage_have_all_gradient_modes(name: str, adjoint: str) -> None:
    fused, f = fused_problem(name)
    for method in ("euler", "implicit_euler", "implicit_midpoint"):
        for extra in ({}, {"checkpoint_every": 2}) if adjoint == "reversible" else ({},):
            options = TIGHT | extra
            y0 = problem(name)[1]
            assert_same(fused, f, y0, gradients=1e-9, method=method, steps=4, adjoint=adjoint, options=options)
