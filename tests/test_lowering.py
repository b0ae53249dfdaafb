"""Operations that people write in an f: each lowers, and solves as its f does; or is refused by name, with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

import nodeshape as ns


class Made(nn.Module):
    """f of a function of (self, t, y), with some layers and parameters to use."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Any], layer: Any = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer
        self.vector = nn.Parameter(torch.linspace(-1, 1, 6))
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 36).reshape(6, 6).sin())
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, False]))
        self.register_buffer("order", torch.tensor([2, 0, 1, 5, 3, 3]))

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.function(self, t, y)


def swapped(self: Any, t: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :3] = y[:, 3:].sin()
    out[:, 3] = y[:, 0] * t
    out[:, 4::1] = 1.5
    return out


def heat(self: Any, t: Tensor, y: Tensor) -> Tensor:
    return torch.roll(y, 1, 1) + torch.roll(y, -1, 1) - 2 * y


VECTOR, ROWS, MAP = (6,), (3, 6), (4, 5, 6)
Case = tuple[Callable[[Any, Tensor, Tensor], Any], tuple[int, ...]]
LOWERED: dict[str, Case] = {
    "where": (lambda f, t, y: torch.where(y > 0.1, y.sin(), y * y), VECTOR),
    "where, guarding a root": (lambda f, t, y: torch.where(y > 0, (y.abs() + 0.1).log(), f.vector), VECTOR),
    "where, of numbers": (lambda f, t, y: torch.where(y >= 0.1, 2.0, -1.0) * y, VECTOR),
    "where, of time": (lambda f, t, y: torch.where(t < 0.7, y, -y), VECTOR),
    "where, of a buffer": (lambda f, t, y: torch.where(f.mask, y, -y), VECTOR),
    "logic of comparisons": (
        lambda f, t, y: torch.where(((y > -1) & (y <= 1)) | ~(y < 2) ^ torch.isnan(y), y, 0.1 * y),
        VECTOR,
    ),
    "equal and not": (lambda f, t, y: torch.where(y == 0, 0.0, y) * (y != 1).to(y.dtype), VECTOR),
    "a mask as a factor": (lambda f, t, y: (y > 0) * y + (y < 0.5).float(), VECTOR),
    "masked_fill": (lambda f, t, y: y.masked_fill(y > 1, 0.5).masked_fill(f.mask, 0.1), VECTOR),
    "clamp by tensors": (lambda f, t, y: torch.clamp(y, -f.vector.abs(), f.vector.abs() + y.sin().square()), VECTOR),
    "clamp of one side": (lambda f, t, y: y.clamp(max=0.4) + y.clamp(min=-0.3), VECTOR),
    "minimum and maximum": (lambda f, t, y: torch.minimum(y, f.vector) - torch.maximum(y, 0 * y), VECTOR),
    "flip": (lambda f, t, y: y.flip(2, 3), MAP),
    "roll": (heat, VECTOR),
    "roll of two": (lambda f, t, y: y.roll((1, -2), (2, 3)), MAP),
    "index by a list": (lambda f, t, y: y[:, [2, 0, 1, 5, 3, 3]] - y[:, torch.tensor([0, 0, 0, 2, 2, 2])], VECTOR),
    "index_select": (lambda f, t, y: y.index_select(2, torch.tensor([5, 4, 3, 0, 1, 2])), ROWS),
    "embedding of a constant": (lambda f, t, y: y + f.layer(torch.tensor(2)), VECTOR),
    "stack, chunk, unbind": (
        lambda f, t, y: torch.stack([a.sin() for a in y.unbind(1)], 1) + torch.cat(y.chunk(2, 1)[::-1], 1),
        VECTOR,
    ),
    "repeat and expand": (lambda f, t, y: y[:, :2].repeat(1, 3) + y[:, :1].expand(-1, 6), VECTOR),
    "time repeated": (lambda f, t, y: torch.cat([y[:, :5], t.view(1, 1).repeat(y.shape[0], 1)], 1), VECTOR),
    "time of default type": (lambda f, t, y: torch.cat([y[:, :5], t * torch.ones(y.shape[0], 1)], 1), VECTOR),
    "repeat_interleave": (lambda f, t, y: y[:, :2].repeat_interleave(3, dim=1), VECTOR),
    "assignment": (swapped, VECTOR),
    "diagonal": (lambda f, t, y: y * (y[:, :, None] * y[:, None, :]).diagonal(dim1=1, dim2=2), VECTOR),
    "pad": (lambda f, t, y: F.pad(y, (1, 2), value=0.3)[:, 2:8], VECTOR),
    **{
        f"pad {mode}": (lambda f, t, y, mode=mode: F.pad(y, (1, 1, 1, 1), mode=mode)[:, :, 2:, 2:], MAP)
        for mode in ("circular", "reflect", "replicate")
    },
    "einsum": (lambda f, t, y: torch.einsum("bi,ij->bj", y, f.matrix), VECTOR),
    "einsum, weight first": (lambda f, t, y: torch.einsum("oi,bri->bro", f.matrix, y), ROWS),
    "einsum over channels": (lambda f, t, y: torch.einsum("bchw,cd->bdhw", y, f.matrix[:4, :4]), MAP),
    "einsum of states": (lambda f, t, y: torch.einsum("bij,bkj->bik", y, y.sin()) @ y, ROWS),
    "einsum to a trace": (lambda f, t, y: y * torch.einsum("bii->b", y[:, :, None] * f.matrix)[:, None], VECTOR),
    "bmm": (lambda f, t, y: torch.bmm(torch.bmm(y, y.transpose(1, 2)), y), ROWS),
    "bilinear": (lambda f, t, y: f.layer(y, y.sin()), VECTOR),
    "weights made of time": (lambda f, t, y: F.linear(y, f.layer(t[None]).view(6, 6), f.vector), VECTOR),
    "attention": (lambda f, t, y: F.scaled_dot_product_attention(y, y, y.sin()), ROWS),
    "norms": (lambda f, t, y: F.normalize(y, dim=1) + y / (1 + torch.linalg.vector_norm(y, 1, 1, True)), VECTOR),
    "cosine similarity": (lambda f, t, y: y * F.cosine_similarity(y, f.vector[None], dim=1)[:, None], VECTOR),
    "softmax": (lambda f, t, y: y.softmax(1) + y.log_softmax(1) * F.softmin(y, 1), VECTOR),
    "variance and mean": (
        lambda f, t, y: torch.var_mean(y, 1, keepdim=True)[0] - y / (1 + y.std(1, keepdim=True)),
        VECTOR,
    ),
    "prelu": (lambda f, t, y: f.layer(y), MAP),
    "hard functions": (
        lambda f, t, y: F.hardtanh(y) + F.hardswish(y) + F.hardsigmoid(y) + F.relu6(y) + F.hardshrink(y),
        VECTOR,
    ),
    "soft functions": (lambda f, t, y: F.softsign(y) + F.tanhshrink(y) + F.softshrink(y) + F.logsigmoid(y), VECTOR),
    "gates": (lambda f, t, y: F.glu(torch.cat([y, y.sin()], 1), 1), VECTOR),
    "trigonometry": (lambda f, t, y: torch.tan(0.3 * y) + torch.atan(y) + torch.asin(0.3 * y.sin()), VECTOR),
    "its inverse": (lambda f, t, y: torch.acos(0.9 * torch.tanh(y)) + torch.sinc(y), VECTOR),
    "hyperbolic": (lambda f, t, y: torch.sinh(y) - torch.cosh(y) + torch.asinh(y), VECTOR),
    "its inverses": (lambda f, t, y: torch.acosh(1.5 + y * y) + torch.atanh(0.5 * y.sin()), VECTOR),
    "logarithms": (lambda f, t, y: torch.log1p(y * y) + torch.log2(2 + y * y) - torch.log10(3 + y * y), VECTOR),
    "exponentials": (lambda f, t, y: torch.expm1(0.3 * y) + torch.exp2(0.3 * y) + torch.erfc(y), VECTOR),
    "roots and signs": (lambda f, t, y: torch.rsqrt(1 + y * y) * torch.sign(y) * y, VECTOR),
    "lerp and addcmul": (lambda f, t, y: torch.lerp(y, f.vector, t) + torch.addcmul(y, y, f.vector, value=0.5), VECTOR),
    "constants of its own": (
        lambda f, t, y: y * torch.arange(6) + y @ torch.eye(6) * torch.linspace(0, 1, 6) + torch.tensor([1, 2] * 3),
        VECTOR,
    ),
    "weights of its own making": (
        lambda f, t, y: y @ (f.matrix - f.matrix.T) - y @ torch.tril(f.matrix).exp() / 9,
        VECTOR,
    ),
    "average pool": (lambda f, t, y: F.avg_pool2d(y, 3, stride=1, padding=1) - F.adaptive_avg_pool2d(y, 1), MAP),
    "conv1d": (lambda f, t, y: f.layer(y), ROWS),
    "circular convolution": (lambda f, t, y: f.layer(y), MAP),
    "even kernel": (lambda f, t, y: f.layer(y), MAP),
    "batch norm in eval": (lambda f, t, y: f.layer(y), MAP),
    "dropout in eval": (lambda f, t, y: f.layer(y).sin(), VECTOR),
    "rms norm": (lambda f, t, y: f.layer(y), ROWS),
    "einsum without an arrow": (lambda f, t, y: torch.einsum("ba,ac", y, f.matrix), VECTOR),
    "addmm of a state": (lambda f, t, y: torch.addmm(y, y, f.matrix) + torch.addmm(f.vector[:1], y, f.matrix), VECTOR),
    "average pool along one side": (lambda f, t, y: F.avg_pool2d(y, (3, 1), stride=1, padding=(1, 0)), MAP),
    "parts written": (
        lambda f, t, y: torch.slice_scatter(y, y[:, :3] * 2, 1, 3, 6) + torch.slice_scatter(y, y.sin(), 0),
        VECTOR,
    ),
    "one, all and none written": (
        lambda f, t, y: (
            torch.select_scatter(y, y[:, 0] * 2, 1, -1)
            + torch.slice_scatter(y, y.sin(), 1)
            + torch.slice_scatter(y, y[:, :0], 1, 3, 3)
        ),
        VECTOR,
    ),
    "beside nothing, and beside time": (
        lambda f, t, y: torch.cat([y, y[:, :0].sin()], 1) + torch.cat([t * f.vector[:3], torch.zeros(1), f.vector[:2]]),
        VECTOR,
    ),
    "powers of a number": (lambda f, t, y: 2.0 ** (0.1 * y) + y**1.0, VECTOR),
    "rows and columns by numbers": (
        lambda f, t, y: y[:, torch.tensor([[0], [2], [1]]), torch.tensor([[0, 1, 5, 3, 4, 2]])],
        ROWS,
    ),
    "diagonals beside the main one": (
        lambda f, t, y: y * sum((y[:, :, None] * y[:, None]).diagonal(k, 1, 2).sum(1, True) for k in (-1, 2)),
        VECTOR,
    ),
    "clamp by one tensor": (
        lambda f, t, y: torch.clamp_max(y, f.vector) + y.clamp(max=f.vector) * y.clamp(min=f.vector),
        VECTOR,
    ),
    "variances": (
        lambda f, t, y: (
            y * y.var(1, unbiased=False, keepdim=True)
            + y * torch.var(y, (1,), keepdim=True)
            + torch.var(y, 1, correction=0)[:, None]
            - torch.var_mean(y, dim=1, correction=2)[1][:, None]
        ),
        VECTOR,
    ),
    "time for each sample": (
        lambda f, t, y: (
            y
            + (t * f.vector)[None].expand(y.shape[0], 6)
            + (t * f.vector[:2])[None].repeat(y.shape[0], 3)
            + (t * f.vector[:2]).repeat(3)
            + torch.zeros(6).repeat(y.shape[0], 1)
        ),
        VECTOR,
    ),
    "functions with numbers": (
        lambda f, t, y: F.gelu(y, approximate="tanh") + F.leaky_relu(y, 0.2) + F.softplus(y, 2.0, 10.0),
        VECTOR,
    ),
    "numbers first": (
        lambda f, t, y: 1 - y + 2 / (y * y + 1) + torch.rsub(y, 2.0, alpha=3) + torch.sub(y, y.sin(), alpha=2),
        VECTOR,
    ),
    "bounds that are full": (
        lambda f, t, y: torch.maximum(torch.full_like(y, 0.2), y) + torch.minimum(y, torch.full_like(y, 0.1)),
        VECTOR,
    ),
    "arithmetic of numbers alone": (
        lambda f, t, y: (
            y * torch.maximum(torch.full_like(y, 0.2), torch.full_like(y, 0.3)) / (torch.zeros_like(y) + 1 - 3)
            - torch.minimum(torch.full_like(y, 0.2), torch.full_like(y, 0.3)) * 2 / 4
            - (torch.full_like(y, 0.2) - torch.full_like(y, 0.3))
        ),
        VECTOR,
    ),
    "logsumexp": (
        lambda f, t, y: y * torch.logsumexp(y, 1, keepdim=True) + torch.logsumexp(y, (1,))[:, None],
        VECTOR,
    ),
    "norms without weights": (
        lambda f, t, y: (
            F.group_norm(y, 2) + F.instance_norm(y) + F.batch_norm(y, torch.zeros(4), torch.full((4,), 2.0))
        ),
        MAP,
    ),
    "a bias made of time": (lambda f, t, y: F.linear(y, f.matrix, f.vector * t), VECTOR),
    "bilinear without a bias": (
        lambda f, t, y: F.bilinear(y, y.sin(), f.matrix.view(6, 6, 1).expand(6, 6, 6).contiguous()),
        VECTOR,
    ),
    "einsum of three": (
        lambda f, t, y: (
            torch.einsum("bi,ij,bj->bi", y, f.matrix, y) + torch.einsum("ij,jk,bk->bi", f.matrix, f.matrix, y)
        ),
        VECTOR,
    ),
    "products of time": (
        lambda f, t, y: y @ (t * f.matrix) + (t * f.matrix) @ f.vector + y[:, :1] * ((t * f.vector) @ (t * f.matrix)),
        VECTOR,
    ),
    "parts of what time makes": (
        lambda f, t, y: (
            y * torch.stack([t, t * t])[1] + (t * f.vector)[2] + (t * f.matrix).T.sum(0) + f.matrix.diagonal()
        ),
        VECTOR,
    ),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "embedding of a constant": lambda: nn.Embedding(3, 6),
    "bilinear": lambda: nn.Bilinear(6, 6, 6),
    "weights made of time": lambda: nn.Linear(1, 36),
    "prelu": lambda: nn.PReLU(4),
    "conv1d": lambda: nn.Conv1d(3, 3, 3, padding=2, dilation=2, groups=3),
    "circular convolution": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "even kernel": lambda: nn.Conv2d(4, 4, 2, padding="same"),
    "batch norm in eval": lambda: nn.BatchNorm2d(4).eval(),
    "dropout in eval": lambda: nn.Dropout(0.5).eval(),
    "rms norm": lambda: nn.RMSNorm(6),
}


@pytest.mark.parametrize("name", LOWERED)
def test_it_lowers(name: str) -> None:
    torch.manual_seed(1)
    function, shape = LOWERED[name]
    f = Made(lambda f, t, y: torch.tanh(function(f, t, y)), LAYERS[name]() if name in LAYERS else None)
    fused = ns.fuse(f, torch.randn(2, *shape))  # in float32, as most are
    f.double()
    y0 = torch.randn(3, *shape, dtype=torch.float64)
    exact = 1e-10 if name != "hard functions" else 1e-7  # torch has hardsigmoid's 1/6 in float32
    torch.set_default_dtype(torch.float64)  # f makes constants of its own
    try:
        assert_same(fused, f, y0, gradients=exact, method="midpoint", steps=2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_where_leaves_out_may_be_infinite() -> None:
    f = Made(lambda f, t, y: torch.where(y > 0, y.sqrt(), 1 / (y - y)))
    y0 = torch.rand(2, 6, dtype=torch.float64) + 0.5
    fused = ns.fuse(f.double(), y0)
    ys = ns.odeint(fused, y0, [0.0, 0.5], method="rk4", steps=2)
    assert torch.isfinite(ys).all() and torch.equal(
        ns.odeint(f, y0, [0.0, 0.5], method="rk4", steps=2).isfinite(), ys.isfinite()
    )


def test_a_norm_has_gradient_zero_at_zero() -> None:
    f = Made(lambda f, t, y: torch.linalg.vector_norm(y, dim=1, keepdim=True) * f.vector)
    y0 = torch.zeros(2, 6, dtype=torch.float64)
    y0[1] = 1
    assert_same(ns.fuse(f.double(), torch.ones_like(y0)), f, y0, method="euler", steps=1)


def test_tensors_that_belong_to_nobody_are_constants() -> None:
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    class Spiral(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.mm(y**3, matrix)

    f, y0 = Spiral(), torch.tensor([[0.4, -0.3], [1.0, 0.5], [-0.7, 0.2]])
    fused = ns.fuse(f, y0)
    found, expected = (ns.odeint(g, y0, [0.0, 1.0], method="rk4", steps=4) for g in (fused, f))
    assert ns.backend(fused, y0, method="rk4", steps=4).name == "fused"
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.get_default_dtype() == torch.float32


REFUSED: dict[str, tuple[Case, str]] = {
    "remainder": ((lambda f, t, y: torch.remainder(y, 1.0), VECTOR), r"aten.remainder.*sin and cos"),
    "round": ((lambda f, t, y: torch.round(y) * y, VECTOR), r"aten.round.*jumps"),
    "maximum of a sample": ((lambda f, t, y: y - y.amax(1, keepdim=True), VECTOR), r"aten.amax.*logsumexp"),
    "max pool": ((lambda f, t, y: F.max_pool2d(y, 3, 1, 1), MAP), r"max_pool2d.*use a mean"),
    "average pool of stride 2": ((lambda f, t, y: F.avg_pool2d(y, 2), MAP), "stride is not 1.*keeps its size"),
    "transposed convolution": ((lambda f, t, y: f.layer(y), MAP), "transposed.*use Conv2d with padding"),
    "strided convolution": ((lambda f, t, y: F.pad(f.layer(y), (0, 3, 0, 2)), MAP), "stride is not 1"),
    "conv3d": ((lambda f, t, y: f.layer(y), (1, 2, 2, 2)), "3 dimensions of space; 1 and 2 lower"),
    "index in a buffer": ((lambda f, t, y: y[:, f.order], VECTOR), r"aten.index .*use a list of numbers"),
    "power of a power": ((lambda f, t, y: (1 + y * y) ** f.vector, VECTOR), r"torch.exp\(b \* torch.log\(a\)\)"),
    "cumsum": ((lambda f, t, y: y.cumsum(1), VECTOR), "aten.cumsum.*triangular"),
    "cast": ((lambda f, t, y: y.float().sin(), VECTOR), "computes in torch.float32, .*use y.dtype"),
    "fft": ((lambda f, t, y: torch.fft.rfft(y).real.repeat(1, 2)[:, :6], VECTOR), "buffers of cosines"),
    "dropout": ((lambda f, t, y: f.layer(y), VECTOR), r"native_dropout.*f.eval\(\)"),
    "dropout of channels": ((lambda f, t, y: f.layer(y), MAP), r"bernoulli.*f.eval\(\)"),
    "batch norm in training": (
        (lambda f, t, y: f.layer(y), MAP),
        r"changes layer.running_mean .*f.eval\(\).*GroupNorm",
    ),
    "spectral norm in training": ((lambda f, t, y: f.layer(y), VECTOR), r"in place: call f.eval\(\).*spectral_norm"),
    "old weight norm": ((lambda f, t, y: f.layer(y), VECTOR), "use those of torch.nn.utils.parametrizations"),
    "softmax over the batch": ((lambda f, t, y: y.softmax(0), VECTOR), "softmax.*along the batch"),
    "roll of the batch": ((lambda f, t, y: y.roll(1, 0), VECTOR), "roll.*along the batch"),
    "flip of the batch": ((lambda f, t, y: y.flip(0), VECTOR), "flip.*along the batch"),
    "mean of all": ((lambda f, t, y: y - y.mean(), VECTOR), "name the dimensions of a sample"),
    "one sample": ((lambda f, t, y: y + y[0], VECTOR), "select.*along the batch"),
    "covariance": ((lambda f, t, y: y @ (y.T @ y), VECTOR), "out of the first dimension"),
    "einsum over the batch": ((lambda f, t, y: torch.einsum("bi,cj->bj", y, y), VECTOR), "letter of the batch"),
    "repeated samples": ((lambda f, t, y: y.repeat(2, 1)[: y.shape[0]], VECTOR), "repeats samples"),
    "written samples": ((lambda f, t, y: y.index_fill(0, torch.tensor([0]), 0.0), VECTOR), "does not lower"),
    "len": ((lambda f, t, y: y * len(y), VECTOR), "y.shape.0., not len"),
    "time as a number": ((lambda f, t, y: y * float(t), VECTOR), "does not look at their values"),
    "autograd": (
        (lambda f, t, y: torch.autograd.grad(y.sin().sum(), y, create_graph=True)[0], VECTOR),
        "does not require grad.*torch.func.vjp, which can be traced",
    ),
    "torch.func": (
        (lambda f, t, y: torch.func.vmap(torch.func.jacrev(torch.sin))(y).sum(1), VECTOR),
        "diagonal_scatter does not lower",
    ),
    "complex constant": (
        (lambda f, t, y: (y * torch.complex(f.vector, f.vector)).real, VECTOR),
        "a constant is complex: keep its real and imaginary parts apart",
    ),
    "division that rounds": ((lambda f, t, y: y + torch.div(y, 2.0, rounding_mode="floor"), VECTOR), "no layer for it"),
    "addmm with factors": ((lambda f, t, y: torch.addmm(f.vector, y, f.matrix, beta=2.0), VECTOR), "are not 1"),
    "a bias of one number": ((lambda f, t, y: F.linear(y, f.matrix, f.vector[:1]), VECTOR), "bias is not a vector"),
    "samples and rows in one": (
        (lambda f, t, y: torch.matmul(y.view(-1, 2, 3), y.view(-1, 3, 2)).reshape(-1, 12)[:, :1, None] * y, ROWS),
        "the batch and another dimension in one: keep them apart",
    ),
    "leading dimensions": (
        (lambda f, t, y: torch.matmul(y[:, None], torch.stack([y.mT, y.mT], 1)).sum((1, 3))[:, :, None] * y, ROWS),
        "leading dimensions are not alike: expand them",
    ),
    "einsum of a size 1": ((lambda f, t, y: torch.einsum("bi,bi->bi", y[:, :1], y), VECTOR), "is 1.*expand it"),
    "einsum with an ellipsis": ((lambda f, t, y: torch.einsum("b...,b...->b...", y, y), VECTOR), "name all dimensions"),
    "masked attention": (
        (lambda f, t, y: F.scaled_dot_product_attention(y, y, y, attn_mask=torch.ones(3, 3)), ROWS),
        "it has a mask, dropout or groups of heads: write it with @ and softmax",
    ),
    "average pool without padding": (
        (lambda f, t, y: F.avg_pool2d(y, 3, 1, 1, count_include_pad=False), MAP),
        "count_include_pad=True",
    ),
    "convolution by time": ((lambda f, t, y: F.conv2d(y, f.layer.weight * t, padding=1), MAP), "on state or time"),
    "wide padding": (
        (lambda f, t, y: F.conv2d(y, f.layer.weight, padding=3)[:, :, 2:-2, 2:-2], MAP),
        "pad by at most dilation",
    ),
    "layer norm by time": ((lambda f, t, y: F.layer_norm(y, (6,), f.vector * t), VECTOR), "on state or time"),
    "layer norm of time": ((lambda f, t, y: y * F.layer_norm(t * f.vector, (6,)), VECTOR), "along the batch"),
    "group norm of time": ((lambda f, t, y: y + F.group_norm((t * f.vector)[None], 2), VECTOR), "has no batch"),
    "instance norm of a run": ((lambda f, t, y: f.layer(y), MAP), "use InstanceNorm with track_running_stats=False"),
    "slice of samples written": ((lambda f, t, y: torch.slice_scatter(y, y[:1] * 2, 0, 0, 1), VECTOR), "some samples"),
    "roll of all": ((lambda f, t, y: y.roll(1), VECTOR), "it rolls all elements, of all samples"),
    "norm of order 3": (
        (lambda f, t, y: torch.linalg.vector_norm(y, 3, 1, True) * y, VECTOR),
        "order 3; 1 and 2 lower",
    ),
    "negative base": ((lambda f, t, y: (-2.0) ** y, VECTOR), "base must be positive, got -2"),
    "logic of numbers": ((lambda f, t, y: torch.logical_and(y, y) * y, VECTOR), "of numbers, not of comparisons"),
    "single elements": ((lambda f, t, y: y * y[:, [0, 1], [1, 2]].sum(1)[:, None, None], ROWS), "single elements"),
    "negative padding": ((lambda f, t, y: F.pad(y, (-1, 1)), VECTOR), "pads by less than nothing"),
    "size of the batch": ((lambda f, t, y: y * y.shape[0], VECTOR), "it depends on the size of the batch"),
    "no derivative": ((lambda f, t, y: torch.heaviside(y, torch.zeros(())), VECTOR), "cannot be differentiated"),
}
REFUSED_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "strided convolution": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(1, 1, 3, padding=1),
    "convolution by time": lambda: nn.Conv2d(4, 4, 3),
    "wide padding": lambda: nn.Conv2d(4, 4, 3),
    "instance norm of a run": lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
    "batch norm in training": lambda: nn.BatchNorm2d(4),
    "spectral norm in training": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight norm
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str) -> None:
    (function, shape), message = REFUSED[name]
    f = Made(function, REFUSED_LAYERS[name]() if name in REFUSED_LAYERS else None)
    with pytest.raises(ns.FuseError, match=message):
        ns.fuse(f, torch.randn(3, *shape))
