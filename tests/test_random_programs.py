"""Random f: a program solves as its f does, whatever it is made of; and random integers in its place harm nobody."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from fused_reference import instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import nodeshape as ns
from nodeshape._ode import program_op
from nodeshape._ode.method import METHODS

#: How many: quick, nightly, or as many as are asked for.
EXAMPLES = int(os.environ.get("NODESHAPE_RANDOM_PROGRAMS") or (25 if settings.default.max_examples < 100 else 2000))  # type: ignore[union-attr]
ISAS = instruction_sets() or ["portable"]
MOST_ELEMENTS = 150

FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.tanh, torch.sigmoid, torch.relu, torch.sin, torch.cos, torch.abs, torch.atan, torch.asinh, torch.sign),
    *(F.silu, F.gelu, F.elu, F.selu, F.softplus, F.mish, F.leaky_relu, F.hardswish, F.hardtanh, F.softsign),
    *(F.logsigmoid, F.softshrink, torch.erf),
    lambda a: F.gelu(a, approximate="tanh"),
    lambda a: torch.exp(torch.tanh(a)),
    lambda a: torch.expm1(torch.sin(a)),
    lambda a: torch.log(2 + torch.cos(a)),
    lambda a: torch.log1p(a.abs()),
    lambda a: torch.sqrt(1 + a * a),
    lambda a: torch.rsqrt(1 + a * a),
    lambda a: torch.sinh(torch.tanh(a)) - torch.cosh(torch.sin(a)),
    lambda a: torch.tan(0.5 * torch.tanh(a)),
    lambda a: torch.tanh(a) ** 3 - torch.sin(a).square(),
    lambda a: (1.5 + torch.tanh(a)) ** -1.5,
    lambda a: a.clamp(-0.3, 0.7),
    lambda a: 1 - a / 3,
    lambda a: 2 / (3 + a.abs()),
    lambda a: torch.where(a > 0.123, a, 0.5 * a + 0.0615),
    lambda a: (a < 0.321) * (a - 0.321),
)
PAIRS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: a + 0.5 * b,
    lambda a, b: a - b,
    lambda a, b: a * torch.tanh(b),
    lambda a, b: a / (1 + b * b),
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(b > 0.123, a, a - b + 0.123),
    lambda a, b: a.clamp(min=b),
)


class Random(nn.Module):
    """Values made of earlier ones, by operations that integers choose; the state is a tensor or a pair."""

    def __init__(self, shapes: list[list[int]], plan: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.shapes, self.plan = shapes, plan
        self.weights = nn.ParameterList()
        self.complete = False
        torch.manual_seed(len(plan))
        with torch.no_grad():
            self(torch.zeros(()), self.state(2))
        self.complete = True

    def state(self, batch: int) -> Any:
        generator = torch.Generator().manual_seed(batch)
        parts = tuple(torch.randn(batch, *shape, generator=generator) for shape in self.shapes)
        return parts if len(parts) > 1 else parts[0]

    def weight(self, *shape: int) -> Tensor:
        if not self.complete:
            self.weights.append(torch.randn(shape) / max(1, prod(shape[1:])) ** 0.5)
            return self.weights[-1]
        self.used += 1
        return self.weights[self.used - 1]

    def forward(self, t: Tensor, y: Any) -> Any:
        self.used = 0
        parts = y if isinstance(y, tuple) else (y,)
        values = list(parts)
        for kind, first, second, number in self.plan:
            a, b = values[first % len(values)], values[second % len(values)]
            out = self.operation(kind, t, a, b, number)
            if out.dim() >= 2 and out[0].numel() <= MOST_ELEMENTS:
                values.append(out)
        slopes = tuple(torch.tanh(fitted(values[-1 - i], x)) - 0.1 * x for i, x in enumerate(parts))
        return slopes if isinstance(y, tuple) else slopes[0]

    def operation(self, kind: int, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        operations = (self.pointwise, self.timed, self.placed, self.reduced, self.mixed, self.normed, self.convolved)
        return operations[kind % len(operations)](t, a, b, number)

    def pointwise(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        if number % 3:
            return FUNCTIONS[number % len(FUNCTIONS)](a)
        pair = PAIRS[number // 3 % len(PAIRS)]
        if number % 2:
            return pair(a, fitted(b, a))
        return pair(a, b.flatten(1).mean(1).reshape(-1, *[1] * (a.dim() - 1)))  # broadcast

    def timed(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        channel = torch.ones_like(a[:, :1]) * t
        return [a * t, a + torch.sin(t), torch.cat([a, channel], 1), a + self.weight(*a.shape[1:]) * t][number % 4]

    def placed(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        """Elements put elsewhere."""
        d = 1 + number % (a.dim() - 1)
        size, choice = a.shape[d], number // 3 % 14
        if choice == 0:
            return torch.cat([a, fitted(b, a)], d)
        if choice == 1:
            return torch.stack([a, fitted(b, a)], d)
        if choice == 2:
            return torch.cat([part * (i + 1) for i, part in enumerate(a.chunk(2, d))][::-1], d)
        if choice == 3:
            return torch.stack([x.sin() for x in a.unbind(d)], d)
        if choice == 4:
            return a.narrow(d, size // 2, size - size // 2)
        if choice == 5:
            return a[:, ::2] if number % 2 else a[..., 1::2] if a.shape[-1] > 1 else a
        if choice == 6:
            return a.flatten(1)
        if choice == 7:
            return a.transpose(1, -1)
        if choice == 8:
            return a.flip(d)
        if choice == 9:
            return a.roll(number % 5 - 2, d)
        if choice == 10:
            return a.repeat(1, 2, *[1] * (a.dim() - 2))
        if choice == 11:
            return F.pad(a, (number % 3, 1), value=0.3)
        if choice == 12:
            return a.index_select(d, torch.tensor([(i * 7 + number) % size for i in range(size)]))
        out = a.clone()
        out[:, 0] = fitted(b, a[:, 0]) if a.dim() > 2 else 0.5
        return out

    def reduced(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        d = 1 + number % (a.dim() - 1)
        return [
            lambda: a - a.mean(d, keepdim=True),
            lambda: a + 0.1 * a.sum(d, keepdim=True),
            lambda: a / (1 + a.var(d, keepdim=True, unbiased=False)),
            lambda: a / (1 + torch.linalg.vector_norm(a, dim=d, keepdim=True)),
            lambda: F.softmax(a, d),
            lambda: F.log_softmax(a, d),
            lambda: a - torch.logsumexp(a, d, keepdim=True),
            lambda: a.mean(d) if a.dim() > 2 else a,
        ][number // 3 % 8]()

    def mixed(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        """Products."""
        size, out, choice = a.shape[-1], 1 + number % 5, number // 5 % 6
        if choice == 0:
            return F.linear(a, self.weight(out, size), self.weight(out))
        if choice == 1:
            return a @ self.weight(size, out)
        if choice == 2:
            return torch.einsum(
                "bi...,io->bo...".replace("...", "xyzuv"[: a.dim() - 2]), a, self.weight(a.shape[1], out)
            )
        if choice == 3 and a.dim() == 3:
            return torch.bmm(torch.bmm(a, fitted(b, a).transpose(1, 2)), a)
        if choice == 4 and a.dim() == 3:
            return F.scaled_dot_product_attention(a, fitted(b, a), a)
        if choice == 5 and a.dim() == 3:
            return self.weight(out, a.shape[1]) @ a
        return a * self.weight(*a.shape[1:]) + self.weight(size)

    def normed(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        size, channels = a.shape[-1], a.shape[1]
        if number % 4 == 0:
            return F.layer_norm(a, (size,), self.weight(size), self.weight(size), eps=0.1)
        groups = [n for n in (1, 2, 3) if channels % n == 0][-1]
        if number % 4 == 1 and a[0].numel() > groups:  # torch refuses less, of one sample
            return F.group_norm(a, groups, self.weight(channels), eps=0.1)
        if number % 4 == 2 and a.dim() > 2 and a[0, 0].numel() > 1:
            return F.instance_norm(a, eps=0.1)
        return F.layer_norm(a, a.shape[1:], eps=0.1)

    def convolved(self, t: Tensor, a: Tensor, b: Tensor, number: int) -> Tensor:
        channels, space = a.shape[1], a.dim() - 2
        groups = [n for n in (1, 2, channels) if channels % n == 0][number % 3 - 1]
        out = groups * (1 + number // 3 % 2)
        kernel, dilation = 1 + number // 2 % 3, 1 + number // 7 % 2
        padding = min(number // 5 % 3, dilation * (kernel - 1))
        if space not in (1, 2) or min(a.shape[2:]) + 2 * padding <= dilation * (kernel - 1):
            return torch.tanh(a)
        if space == 2 and number % 11 == 0:
            return F.avg_pool2d(a, 3, stride=1, padding=1)
        convolve = F.conv1d if space == 1 else F.conv2d
        weight = self.weight(out, channels // groups, *[kernel] * space)
        bias = self.weight(out) if number % 2 else None
        return convolve(a, weight, bias, padding=padding, dilation=dilation, groups=groups)


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """The elements of a sample of x, repeated or cut to the shape of ``like``."""
    size, x = like[0].numel(), x.flatten(1)
    if x.shape[1] < size:
        x = torch.cat([x] * -(-size // x.shape[1]), dim=1)
    return x[:, :size].reshape(-1, *like.shape[1:])


def solved(f: Any, y0: Any, **arguments: Any) -> list[Tensor] | str:
    """Observations and gradients; or the error of a solve that did not succeed."""
    leaves = [x.detach().clone().requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    t = torch.tensor([0.1, 0.3, 0.6], dtype=leaves[0].dtype, requires_grad=True)
    weights = list(f.parameters())
    try:
        ys = ns.odeint(f, tuple(leaves) if isinstance(y0, tuple) else leaves[0], t, **arguments)
        ys = list(ys) if isinstance(ys, tuple) else [ys]
        generator = torch.Generator().manual_seed(11)
        loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in ys)
        grads = torch.autograd.grad(loss, [*leaves, t, *weights], allow_unused=True)
    except (ns.StageSolveError, ns.ReversalDriftError) as error:
        return str(error)
    return [
        *(y.detach() for y in ys),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*leaves, t, *weights])),
    ]


sizes = st.integers(1, 5)
shapes = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(st.integers(1, 4), sizes, sizes)).map(list)
numbers = st.integers(0, 999)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(shapes, min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9), numbers), min_size=1, max_size=6),
    st.integers(1, 20),
    st.sampled_from(sorted(METHODS)),
    st.integers(1, 3),
    st.sampled_from(["discrete", "discrete", "reversible", "continuous"]),
    st.booleans(),
    st.sampled_from(ISAS),
)
def test_random_programs(
    shapes: list[list[int]],
    plan: list[tuple[int, int, int, int]],
    batch: int,
    method: str,
    steps: int,
    adjoint: str,
    single: bool,
    isa: str,
) -> None:
    f = Random(shapes, plan)
    y0 = f.state(batch)
    fused = ns.fuse(f, y0)
    if adjoint == "reversible" and not METHODS[method].one_stage:  # which have no reverse
        adjoint = "discrete"
    arguments: dict[str, Any] = {"method": method, "steps": steps, "adjoint": adjoint}
    if not METHODS[method].explicit or adjoint == "reversible":
        arguments["options"] = {"stage_tolerance": 1e-6 if single else 1e-12, "max_stage_iterations": 200}
    taken = adjoint == "discrete" or METHODS[method].one_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODESHAPE_ISA", isa)
        in_float32 = [solved(g, y0, **arguments) for g in (fused, f)] if single else None
        assert (ns.backend(fused, y0, **arguments).name == "fused") == taken
        if single:
            arguments["options"] = arguments.get("options", {}) | {"stage_tolerance": 1e-12}
        f.double()
        y0 = tuple(x.double() for x in y0) if isinstance(y0, tuple) else y0.double()
        exact = solved(f, y0, **arguments)
        found = solved(fused, y0, **arguments)
    if isinstance(exact, str) or isinstance(found, str):  # a stage that has no solution, or several
        assert "options" in arguments
        return
    assert relative_error(found, exact) < (1e-9 if arguments.get("options") is None else 1e-6)
    if in_float32 is not None and not any(isinstance(x, str) for x in in_float32):
        mine, plain = (relative_error(x, exact) for x in in_float32)  # type: ignore[arg-type]
        assert mine < 30 * plain + 1e-3, (mine, plain)


#: Between them are buffers that are allowed and only cost memory.
NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 1000, 2**37, 2**40, -(2**62), 2**63 - 1)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(shapes, min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9), numbers), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(NUMBERS), st.integers(-2, 2)), min_size=20, max_size=20),
    st.sampled_from(["euler", "rk4", "implicit_midpoint"]),
    st.sampled_from(ISAS),
)
def test_a_changed_program_is_refused_or_solved(
    shapes: list[list[int]], plan: list[Any], changes: list[tuple[int, int, int]], method: str, isa: str
) -> None:
    """Each change by itself, and all together: an error or the right shapes, and no access out of bounds."""
    f = Random(shapes, plan)
    y0 = f.state(3)
    fused, scheme = ns.fuse(f, y0), METHODS[method]
    weights = fused.weights_for(y0)
    packed, t = fused.pack(y0), torch.tensor([0.0, 0.5])
    original = fused.program.code
    together = original.clone()
    programs = []
    for place, number, shift in changes:
        changed, place = original.clone(), place % len(original)
        for code in (changed, together):
            code[place] = code[place] + shift if shift else number
        programs.append(changed)
    ops = torch.ops.nodeshape
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("NODESHAPE_ISA", isa)
        for code in [*programs, together]:
            rest = (code, fused.program.constants, program_op.tableau_of(scheme)[0], [1], 1e-3, 10, 1, 1, 0, 1e-3)
            try:
                ys, stages, *_ = ops.solve(packed, t, weights, *rest)
                grad_y0, _, grads, _ = ops.solve_backward(torch.ones_like(ys), ys, stages, t, weights, *rest)
            except RuntimeError as error:
                assert str(error).startswith(("program: ", "solve", "StageSolveError: ")), error
                continue
            assert ys.shape == (2, *packed.shape) and grad_y0.shape == packed.shape
            assert [x.shape for x in grads] == [x.shape for x in weights]
