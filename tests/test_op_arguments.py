"""What the ops of programs refuse, each limit from both sides: programs as integers, tensors, numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nodeshape._ode import adaptive_op, fused, program_op
from nodeshape._ode.method import METHODS
from nodeshape._ode.program import CONSTANTS, FORMAT, KINDS, MOST_DIMS, NUMBERS

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
MOST = 2**36  # elements of anything
ops = torch.ops.nodeshape


@dataclass(frozen=True)
class Layer:
    """As csrc/program_plan.h reads it."""

    kind: str
    numbers: tuple[int, ...]
    function: int = 0
    a: tuple[int, int] = (0, 0)
    b: tuple[int, int] = (0, 0)
    out: tuple[int, int] = (2, 0)
    scratch: int = -1
    weight: int = -1
    bias: int = -1
    constants: int = 0

    def code(self) -> list[int]:
        kind = KINDS.index(self.kind) if self.kind in KINDS else int(self.kind)
        head = [kind, self.function, *self.a, *self.b, *self.out, self.scratch, self.weight, self.bias, self.constants]
        return [*head, *self.numbers, *[0] * (NUMBERS - len(self.numbers))]


@dataclass(frozen=True)
class Case:
    """A program.

    Attributes:
        sizes: of the buffers.
        weights: shapes of the weights.
        result: the buffer of dy/dt, its last one by default.
    """

    sizes: tuple[int, ...]
    layers: tuple[Layer, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    result: int | None = None
    constants: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)

    def code(self) -> Tensor:
        result = len(self.sizes) - 1 if self.result is None else self.result
        header = [FORMAT, len(self.sizes), len(self.layers), result, len(self.weights), len(self.constants)]
        return torch.tensor([*header, *self.sizes, *(number for layer in self.layers for number in layer.code())])

    def tensors(self) -> list[Tensor]:
        torch.manual_seed(1)
        return [torch.randn(shape, dtype=torch.float64) for shape in self.weights]

    def state(self) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(3, self.sizes[0], dtype=torch.float64)

    def changed(self, layer: int = 0, numbers: dict[int, int] | None = None, **fields: Any) -> Case:
        """The program with a layer that is another in these fields, and these of its numbers."""
        new = list(self.layers[layer].numbers)
        for place, number in (numbers or {}).items():
            new[place] = number
        layers = list(self.layers)
        layers[layer] = replace(layers[layer], **{"numbers": tuple(new), **fields})
        return replace(self, layers=tuple(layers))


def strided(sizes: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a layer of strides."""
    return (len(sizes), *(x for row in (sizes, a, b) for x in (*row, *[0] * (MOST_DIMS - len(row)))))


SIZES, A, B = 1, 1 + MOST_DIMS, 1 + 2 * MOST_DIMS  # where they begin
#: Of the convolution's numbers.
NAMES = "in height width out kernel_height kernel_width pad_height pad_width dilation_height dilation_width groups"
IN, HEIGHT, WIDTH, OUT, KERNEL_HEIGHT, KERNEL_WIDTH, PAD_HEIGHT, PAD_WIDTH, DILATION_HEIGHT, DILATION_WIDTH, GROUPS = (
    range(len(NAMES.split()))
)
linear = Case(
    (6, 1, 8, 6),
    (
        Layer("linear", (2, 3, 4, 3, 1), weight=0, bias=1),
        Layer("linear", (2, 4, 3, 1, 3), a=(2, 0), out=(3, 0), weight=2, bias=3),
    ),
    ((4, 3), (4,), (4, 3), (3,)),
)
unary = Case((4, 1, 4), (Layer("unary", (4,), function=1),))
binary = Case((4, 1, 4), (Layer("binary", strided((2, 2), (2, 1), (0, 1)), function=2, b=(-1, 0)),), ((2,),))
transposed = Case((4, 1, 4), (Layer("move", strided((2, 2), (2, 1), (1, 2)), constants=3),))
summed = Case((4, 1, 4), (Layer("move", strided((2, 4), (0, 1), (0, 1)), function=1, constants=3),))
norm = Case((6, 1, 4, 6), (Layer("norm", (2, 3, 1, 3), out=(3, 0), scratch=2, weight=0, bias=1),), ((3,), (3,)))
conv = Case(
    (24, 1, 60, 24),
    (Layer("conv", (2, 3, 4, 2, 3, 3, 1, 1, 1, 1, 2), out=(3, 0), scratch=2, weight=0, bias=1),),
    ((2, 1, 3, 3), (2,)),
)
matmul = Case((8, 1, 8), (Layer("matmul", (2, 2, 2, 2, 4, 2, 1, 0, 2, 1), b=(-1, 0)),), ((2, 2),))

#: Programs and the f that they are.
CASES: dict[str, tuple[Case, Any]] = {
    "linear": (linear, lambda y, w: ((y.view(-1, 2, 3) @ w[0].T + w[1]) @ w[2] + w[3]).flatten(1)),
    "unary": (unary, lambda y, w: y.tanh()),
    "binary": (binary, lambda y, w: (y.view(-1, 2, 2) * w[0]).flatten(1)),
    "move": (transposed, lambda y, w: y.view(-1, 2, 2).transpose(1, 2).flatten(1)),
    "sum": (summed, lambda y, w: 2 * y),
    "norm": (norm, lambda y, w: F.layer_norm(y.view(-1, 2, 3), (3,), w[0], w[1], eps=0.0).flatten(1)),
    "conv": (conv, lambda y, w: F.conv2d(y.view(-1, 2, 3, 4), w[0], w[1], padding=1, groups=2).flatten(1)),
    "matmul": (matmul, lambda y, w: (y.view(-1, 2, 2, 2) @ w[0]).flatten(1)),
    # what lies at a limit
    "an empty buffer": (replace(unary, sizes=(4, 1, 0, 4)).changed(out=(3, 0)), lambda y, w: y.tanh()),
    "a layer of nothing": (
        replace(unary, sizes=(4, 1, 0, 4), layers=(replace(unary.layers[0], numbers=(0,)), *unary.layers)).changed(
            1, out=(3, 0)
        ),
        lambda y, w: y.tanh(),
    ),
    "the first function of two": (
        binary.changed(function=0),
        lambda y, w: (y.view(-1, 2, 2) + w[0]).flatten(1),
    ),
    "a part of the state": (
        replace(unary, sizes=(4, 1, 2, 4), layers=(replace(unary.layers[0], numbers=(2,), a=(0, 2)), *summed.layers))
        .changed(1, a=(2, 0), numbers={A + 1: 0}, out=(3, 0))
        .changed(1, numbers=dict(enumerate(strided((2, 2, 2), (0, 0, 1), (0, 2, 1))))),
        lambda y, w: 2 * y[:, 2:].tanh().repeat(1, 2),
    ),
    "a second operand that nobody reads": (unary.changed(b=(2, 0)), lambda y, w: y.tanh()),
    "the last constants": (replace(unary.changed(function=0, constants=3)), lambda y, w: y),
    "the last functions": (unary.changed(function=26), lambda y, w: y.expm1()),
    "the last function of two": (binary.changed(function=8), lambda y, w: y),
    "six dimensions": (
        transposed.changed(numbers=dict(enumerate(strided((1,) * 4 + (2, 2), (0,) * 4 + (2, 1), (0,) * 4 + (1, 2))))),
        lambda y, w: y.view(-1, 2, 2).transpose(1, 2).flatten(1),
    ),
    "a stride that is never taken": (
        binary.changed(numbers=dict(enumerate(strided((1, 2, 2), (MOST, 2, 1), (MOST, 0, 1))))),
        lambda y, w: (y.view(-1, 2, 2) * w[0]).flatten(1),
    ),
    "places that overlap": (
        transposed.changed(numbers=dict(enumerate(strided((4, 1), (1, 0), (1, 1))))),
        lambda y, w: y,
    ),
    "no bias": (
        linear.changed(bias=-1).changed(1, bias=-1),
        lambda y, w: (y.view(-1, 2, 3) @ w[0].T @ w[2]).flatten(1),
    ),
    "one matrix twice": (
        linear.changed(1, weight=0, numbers={3: 1, 4: 3}),
        lambda y, w: ((y.view(-1, 2, 3) @ w[0].T + w[1]) @ w[0] + w[3]).flatten(1),
    ),
    "neither scale nor shift": (
        norm.changed(weight=-1, bias=-1),
        lambda y, w: F.layer_norm(y.view(-1, 2, 3), (3,), eps=0.0).flatten(1),
    ),
    "one scale for all": (
        replace(norm, weights=((1,), (1,))).changed(numbers={2: 1, 3: 1}),
        lambda y, w: (F.layer_norm(y.view(-1, 2, 3), (3,), eps=0.0) * w[0] + w[1]).flatten(1),
    ),
    "as much frame as kernel": (
        replace(conv, sizes=(6, 1, 30, 24, 6), weights=((1, 1, 2, 2), (4,)), layers=(*conv.layers, summed.layers[0]))
        .changed(numbers=dict(enumerate((1, 2, 3, 1, 2, 2, 1, 1, 1, 1, 1))), bias=-1, out=(3, 0))
        .changed(1, a=(3, 0), out=(4, 0), numbers=dict(enumerate(strided((6,), (1,), (1,))))),
        lambda y, w: F.conv2d(y.view(-1, 1, 2, 3), w[0], padding=1).flatten(1)[:, :6],
    ),
    "a kernel as large as its image": (
        replace(conv, sizes=(6, 1, 1, 6), weights=((1, 1, 2, 2), (4,)), layers=(*conv.layers, summed.layers[0]))
        .changed(numbers=dict(enumerate((1, 2, 3, 1, 2, 2, 0, 0, 1, 2, 1))), bias=-1, out=(2, 0), scratch=-1)
        .changed(1, a=(2, 0), out=(3, 0), numbers=dict(enumerate(strided((6,), (0,), (1,))))),
        lambda y, w: F.conv2d(y.view(-1, 1, 2, 3), w[0], dilation=(1, 2)).flatten(1).expand(-1, 6),
    ),
    "the largest": (
        replace(summed, sizes=(4, 1, 2, 4), layers=(*summed.layers, *binary.layers), weights=((1,),))
        .changed(function=2, numbers=dict(enumerate(strided((2, 2), (1, 2), (1, 0)))))
        .changed(1, a=(2, 0), out=(3, 0), numbers=dict(enumerate(strided((2, 2), (1, 0), (0, 0))))),
        lambda y, w: y.view(-1, 2, 2).amax(1).repeat_interleave(2, 1) * w[0],
    ),
}


def solve(case: Case, **changed: Any) -> Any:
    """One step of Euler's method, or what else is asked for."""
    given = {
        "y0": case.state(),
        "t": torch.tensor([0.0, 1.0], dtype=torch.float64),
        "weights": case.tensors(),
        "program": case.code(),
        "constants": torch.tensor(case.constants, dtype=torch.float64),
        "tableau": program_op.tableau_of(METHODS["euler"])[0],
        "steps": [1],
        "tolerance": 1e-6,
        "max_iterations": 10,
        "adjoint": 0,
        "kept_per_step": 1,
        "checkpoint_every": 0,
        "drift_tolerance": 1e-3,
        **changed,
    }
    return ops.solve(*given.values())


@pytest.mark.parametrize("name", CASES)
def test_a_program_within_its_limits_is_solved(name: str) -> None:
    case, f = CASES[name]
    y0, weights = case.state(), case.tensors()
    torch.testing.assert_close(solve(case)[0][1], y0 + f(y0, weights))


#: A number of layers whose records are together one integer long, as 64 bits count.
WRAPPED = pow(NUMBERS + 12, -1, 2**64)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ([], "it is of another version"),
        ([FORMAT, 2, 0, 2, 0], "it is of another version"),
        ([FORMAT + 1, 3, 0, 2, 0, 3, 4, 1, 4], "it is of another version"),
        ([FORMAT - 1, 3, 0, 2, 0, 3, 4, 1, 4], "it is of another version"),
        ([FORMAT, 0, 0, 0, 0, 3], "its length does not fit its header"),
        ([FORMAT, 1, 0, 2, 0, 3, 4], "its length does not fit its header"),
        ([FORMAT, NUMBERS + 12, -1, 2, 0, 3], "its length does not fit its header"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1], "its length does not fit its header"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1, 4, 0], "its length does not fit its header"),
        ([FORMAT, 2**20 + 1, 0, 2, 0, 3, *[4] * (2**20 + 1)], "its length does not fit its header"),
        ([FORMAT, 2**20, 0, 2, 0, 3, *[4] * 2**20], "time is one element"),
        ([FORMAT, 2, 0, 2, 0, 3, 4, 1], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, 2, 1, 3, 4, 1, 4], "it is for 1 weights, got 0"),
        ([FORMAT, 3, 0, 2, 0, 4, 4, 1, 4], "it is for another number of constants"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1, -1], "a buffer is too large"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1, MOST + 1], "a buffer is too large"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1, MOST], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 2, 4], "time is one element"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 0, 4], "time is one element"),
        ([FORMAT, 3, 0, 0, 0, 3, 4, 1, 4], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, 1, 0, 3, 1, 1, 1], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, -1, 0, 3, 4, 1, 4], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, 3, 0, 3, 4, 1, 4], "its result is no buffer of the state's size"),
        ([FORMAT, 3, 0, 2, 0, 3, 4, 1, 5], "its result is no buffer of the state's size"),
        ([FORMAT, 3, WRAPPED if WRAPPED < 2**63 else WRAPPED - 2**64, 2, 0, 3, 4, 1, 4, 0], "its length does not fit"),
    ],
)
def test_a_program_whose_header_is_wrong_is_refused(code: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^program: {message}"):
        solve(unary, program=torch.tensor(code, dtype=torch.int64), constants=torch.zeros(CONSTANTS).double())


KIND, SPAN, RANGE = (
    "a layer is of an unknown kind",
    "a layer reaches beyond its buffer",
    "strides are out of their range",
)
LARGE, WEIGHT, PLACE = (
    "a layer is too large",
    "a layer's weight is of another size",
    "a reference is outside its buffers",
)
NO_WEIGHT, SCRATCH = "a reference is to a weight that there is not, or may not be", "a layer's scratch is no buffer"
FUNCTION, DENSE, DIMS = "a function is unknown", "a matrix is not dense", "a layer has too many dimensions"
CONV, OWN = "a convolution's sizes are out of their range", "a layer writes the state or the time"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        # of any layer
        (unary.changed(kind="-1"), KIND),
        (unary.changed(kind="7"), KIND),
        (unary.changed(constants=-1), "a layer's constants are missing"),
        (unary.changed(constants=4), "a layer's constants are missing"),
        (unary.changed(out=(0, 0)), OWN),
        (unary.changed(out=(1, 0)), OWN),
        (unary.changed(out=(-1, 0)), NO_WEIGHT),
        (unary.changed(out=(3, 0)), PLACE),
        (unary.changed(out=(2, 1)), SPAN),
        (unary.changed(out=(2, -1)), PLACE),
        (unary.changed(scratch=-2), SCRATCH),
        (unary.changed(scratch=0), SCRATCH),
        (unary.changed(scratch=1), SCRATCH),
        (unary.changed(scratch=3), SCRATCH),
        (replace(unary, sizes=(4, 1, 4, 4)).changed(a=(3, 0), out=(2, 0)), "a layer reads the result"),
        (replace(binary, sizes=(4, 1, 4, 4)).changed(b=(3, 0)), "a layer reads the result"),
        (replace(matmul, sizes=(8, 1, 8, 8)).changed(b=(3, 0)), "a layer reads the result"),
        (replace(matmul, sizes=(8, 1, 8, 8)).changed(a=(3, 0)), "a layer reads the result"),
        # of one element
        (unary.changed(function=-1), FUNCTION),
        (unary.changed(function=27), FUNCTION),
        (replace(unary, weights=((4,),)).changed(a=(-1, 0)), NO_WEIGHT),
        (unary.changed(a=(0, MOST)), SPAN),
        (unary.changed(a=(0, MOST + 1)), PLACE),
        (unary.changed(a=(0, 2**63 - 1)), PLACE),
        (unary.changed(a=(0, -1)), PLACE),
        (unary.changed(a=(3, 0)), PLACE),
        (unary.changed(a=(0, 1)), SPAN),
        (unary.changed(a=(1, 0)), SPAN),
        (unary.changed(numbers={0: -1}), SPAN),
        (unary.changed(numbers={0: 5}), SPAN),
        (unary.changed(a=(0, 1), numbers={0: 2**63 - 1}), SPAN),
        (replace(unary, sizes=(4, 1, 3, 4)), SPAN),
        # linear
        (replace(linear, weights=((4, 3), (4,), (4, 3), (3,))).changed(a=(-1, 0)), NO_WEIGHT),
        (linear.changed(a=(0, 1)), SPAN),
        (linear.changed(out=(2, 1)), SPAN),
        (linear.changed(numbers={0: -1}), LARGE),
        (linear.changed(numbers={0: 3}), SPAN),
        (linear.changed(numbers={0: MOST, 1: 1}), SPAN),
        (linear.changed(numbers={0: MOST + 1, 1: 0}), LARGE),
        (linear.changed(numbers={0: 2**18, 1: 2**18}), SPAN),
        (linear.changed(numbers={0: 2**18, 1: 2**18 + 1}), LARGE),
        (linear.changed(numbers={0: 4097, 1: 16773121}), LARGE),  # 2^36 + 1
        (linear.changed(numbers={0: MOST, 1: MOST}), LARGE),
        (linear.changed(weight=-1), WEIGHT),
        (linear.changed(weight=4), WEIGHT),
        (linear.changed(weight=1), WEIGHT),
        (linear.changed(bias=-2), WEIGHT),
        (linear.changed(bias=4), WEIGHT),
        (linear.changed(bias=0), WEIGHT),
        (linear.changed(numbers={3: 3, 4: 4}), DENSE),
        (linear.changed(numbers={3: 5, 4: 1}), DENSE),
        (linear.changed(numbers={3: 1, 4: 5}), DENSE),
        (linear.changed(numbers={3: 5, 4: 4}), DENSE),
        (linear.changed(numbers={3: 4, 4: 3}), DENSE),
        (linear.changed(1, weight=0, numbers={3: 4, 4: 1}), "a matrix is used in two shapes"),
        # of strides
        (binary.changed(function=-1), FUNCTION),
        (binary.changed(function=9), FUNCTION),
        (binary.changed(numbers={0: 0}), DIMS),
        (binary.changed(numbers={0: MOST_DIMS + 1}), DIMS),
        (binary.changed(numbers={SIZES: 0}), RANGE),
        (binary.changed(numbers={SIZES + 1: 0}), RANGE),
        (binary.changed(numbers={SIZES: MOST + 1}), RANGE),
        (binary.changed(numbers={SIZES: MOST, A: 0}), SPAN),
        (binary.changed(numbers={SIZES: MOST, SIZES + 1: MOST, A: 0, A + 1: 0, B + 1: 0}), LARGE),
        (binary.changed(numbers={A: -1}), RANGE),
        (binary.changed(numbers={A: MOST + 1}), RANGE),
        (binary.changed(numbers={A: MOST}), SPAN),
        (binary.changed(numbers={SIZES: 3, A: MOST}), LARGE),
        (binary.changed(numbers={SIZES: 1, A: MOST + 1}), RANGE),
        (binary.changed(numbers={B: -1}), RANGE),
        (binary.changed(numbers={B: 1}), SPAN),
        (binary.changed(numbers={A: 3}), SPAN),
        (binary.changed(b=(-2, 0)), NO_WEIGHT),
        (binary.changed(b=(-1, 1)), SPAN),
        (binary.changed(a=(-2, 0)), NO_WEIGHT),
        (binary.changed(a=(-(2**63), 0)), NO_WEIGHT),
        (binary.changed(a=(0, 1)), SPAN),
        (binary.changed(out=(2, 1)), SPAN),
        (transposed.changed(function=-1), FUNCTION),
        (transposed.changed(function=3), FUNCTION),
        (transposed.changed(out=(2, 1)), SPAN),
        (transposed.changed(a=(0, 1)), SPAN),
        (transposed.changed(numbers={B: 2}), SPAN),
        # places of a sum count each for itself, where those of a copy may be one
        (summed.changed(numbers=dict(enumerate(strided((2, 3), (0, 1), (1, 1))))), SPAN),
        (summed.changed(function=2, numbers=dict(enumerate(strided((2, 3), (0, 1), (1, 1))))), SPAN),
        # norm
        (norm.changed(a=(-1, 0)), NO_WEIGHT),
        (norm.changed(a=(0, 1)), SPAN),
        (norm.changed(out=(3, 1)), SPAN),
        (norm.changed(numbers={0: 3}), SPAN),
        (norm.changed(numbers={0: -1}), LARGE),
        (norm.changed(numbers={1: 0}), "a norm is empty"),
        (norm.changed(numbers={2: 0}), "a norm is empty"),
        (norm.changed(numbers={3: 0}), "a norm is empty"),
        (norm.changed(numbers={3: 2}), WEIGHT),
        (norm.changed(weight=-2), WEIGHT),
        (norm.changed(bias=-2), WEIGHT),
        (replace(norm, weights=((3,), (2,))), WEIGHT),
        (norm.changed(scratch=-1), "a norm has no scratch"),
        (replace(norm, sizes=(6, 1, 3, 6)), "a norm has no scratch"),
        # convolution
        (conv.changed(a=(-1, 0)), NO_WEIGHT),
        *((conv.changed(numbers={k: 0}), CONV) for k in range(11) if k not in (PAD_HEIGHT, PAD_WIDTH)),
        *((conv.changed(numbers={k: -1}), CONV) for k in range(11)),
        (conv.changed(numbers={IN: 3}), CONV),
        (conv.changed(numbers={OUT: 3}), CONV),
        (conv.changed(numbers={HEIGHT: MOST + 1}), CONV),
        (conv.changed(numbers={WIDTH: MOST + 1}), CONV),
        (conv.changed(numbers={HEIGHT: MOST, IN: 1, WIDTH: 1, OUT: 1, GROUPS: 1, KERNEL_WIDTH: 1, PAD_WIDTH: 0}), SPAN),
        (
            conv.changed(numbers={WIDTH: MOST, IN: 1, HEIGHT: 1, OUT: 1, GROUPS: 1, KERNEL_HEIGHT: 1, PAD_HEIGHT: 0}),
            SPAN,
        ),
        (conv.changed(numbers={KERNEL_HEIGHT: MOST + 2}), LARGE),
        (conv.changed(numbers={KERNEL_WIDTH: MOST + 2}), LARGE),
        (conv.changed(numbers={DILATION_HEIGHT: MOST + 1}), LARGE),
        (conv.changed(numbers={PAD_HEIGHT: 3}), "a convolution is padded beyond its kernel"),
        (conv.changed(numbers={PAD_WIDTH: 3}), "a convolution is padded beyond its kernel"),
        (conv.changed(numbers={PAD_HEIGHT: 2}), SPAN),
        (conv.changed(numbers={HEIGHT: 2, PAD_HEIGHT: 0}), "a convolution has no output"),
        (conv.changed(numbers={WIDTH: 2, PAD_WIDTH: 0}), "a convolution has no output"),
        (conv.changed(a=(0, 1)), SPAN),
        (conv.changed(out=(3, 1)), SPAN),
        (conv.changed(weight=-1), WEIGHT),
        (conv.changed(weight=1), WEIGHT),
        (conv.changed(bias=0), WEIGHT),
        (conv.changed(scratch=-1), "a convolution has no scratch"),
        (conv.changed(scratch=-1, numbers={HEIGHT: 1, PAD_HEIGHT: 0, KERNEL_HEIGHT: 1}, weight=1, bias=-1), WEIGHT),
        (replace(conv, sizes=(24, 1, 59, 24)), "a convolution has no scratch"),
        (
            replace(conv, weights=((2, 1, 1, 3), (2,))).changed(numbers={KERNEL_HEIGHT: 1, PAD_HEIGHT: 0}, scratch=-1),
            "a convolution has no scratch",
        ),
        (
            replace(conv, weights=((2, 1, 3, 1), (2,))).changed(numbers={KERNEL_WIDTH: 1, PAD_WIDTH: 0}, scratch=-1),
            "a convolution has no scratch",
        ),
        # products
        (matmul.changed(a=(-2, 0)), NO_WEIGHT),
        (matmul.changed(b=(-2, 0)), NO_WEIGHT),
        (matmul.changed(a=(0, 1)), SPAN),
        (matmul.changed(b=(-1, 1)), SPAN),
        (matmul.changed(out=(2, 1)), SPAN),
        *((matmul.changed(numbers={k: 0}), RANGE) for k in range(4)),
        *((matmul.changed(numbers={k: -1}), RANGE) for k in range(10)),
        *((matmul.changed(numbers={k: 3}), SPAN) for k in range(1, 4)),
    ],
)
def test_a_layer_that_is_out_of_its_limits_is_refused(case: Case, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^program: .*{message}"):
        solve(case)


def tableau(stages: int) -> Tensor:
    """Steps of Euler's method by one stage of several."""
    x = torch.zeros(stages + 2, stages, dtype=torch.float64)
    x[stages, 0] = 1.0
    return x


def above_the_diagonal() -> Tensor:
    x = tableau(2)
    x[0, 1] = 0.5
    return x


t = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y0": torch.ones(3, 4, dtype=torch.float16)}, "y0 must be float32 or float64"),
        ({"y0": torch.ones(3, 5).double()}, "a sample of y0 has 5 elements but the program expects 4"),
        ({"y0": torch.ones(3, 2, 3).double()}, "a sample of y0 has 6 elements but the program expects 4"),
        ({"y0": torch.ones(4).double()}, "a sample of y0 has 1 elements but the program expects 4"),
        ({"y0": torch.empty(0, MOST - 8).double()}, f"a sample of y0 has {MOST - 8} elements but"),
        ({"y0": torch.empty(0, MOST - 7).double()}, r"a sample of y0, \[0, 68719476729\], is too large"),
        ({"y0": torch.empty(0, 2**33, 2**29).double()}, "a sample of y0, .*, is too large"),
        ({"t": t.int()}, "t must be a one-dimensional float32 or float64 tensor"),
        ({"t": t.half()}, "t must be a one-dimensional float32 or float64 tensor"),
        ({"t": t[:, None]}, "t must be a one-dimensional float32 or float64 tensor"),
        ({"t": t[0]}, "t must be a one-dimensional float32 or float64 tensor"),
        ({"t": t[:0]}, "t must be a one-dimensional float32 or float64 tensor"),
        ({"t": t[:1]}, "got 1 step counts for 1 observation times"),
        ({"steps": []}, "got 0 step counts for 2 observation times"),
        ({"steps": [1, 1]}, "got 2 step counts for 2 observation times"),
        ({"steps": [0]}, "every interval needs at least 1 step, got 0"),
        ({"steps": [10_000_001]}, "an interval may have at most 10000000 steps, got 10000001"),
        ({"t": torch.tensor([0.0, torch.nan])}, "t must be finite"),
        ({"t": torch.tensor([torch.inf, 0.0])}, "t must be finite"),
        ({"t": torch.tensor([0.0, 0.0])}, "t must increase or decrease strictly"),
        ({"t": torch.tensor([0.0, 1.0, 0.5]), "steps": [1, 1]}, "t must increase or decrease strictly"),
        ({"t": torch.tensor([1.0, 0.0, 0.5]), "steps": [1, 1]}, "t must increase or decrease strictly"),
        ({"t": torch.tensor([-1e308, 1e308], dtype=torch.float64)}, "an interval of t must have a finite length"),
        ({"t": torch.tensor([0.0, 5e-324], dtype=torch.float64), "steps": [2]}, "2 steps from 0 to .* have length 0"),
        ({"tolerance": 0.0}, "tolerance must be positive and finite, got 0"),
        ({"tolerance": float("inf")}, "tolerance must be positive and finite, got inf"),
        ({"tolerance": float("nan")}, "tolerance must be positive and finite, got nan"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"adjoint": -1}, "unknown adjoint -1"),
        ({"adjoint": 4}, "unknown adjoint 4"),
        ({"checkpoint_every": -1}, "checkpoint_every must be a number of steps, or 0 for none, got -1"),
        ({"drift_tolerance": 0.0}, "drift_tolerance must be positive"),
        ({"drift_tolerance": float("nan")}, "drift_tolerance must be positive"),
        ({"tableau": torch.tensor([[0.3], [1.0], [0.3]]).double()}, "theta must be 0"),
        ({"tableau": torch.zeros(3, 1)}, "tableau must be a dense CPU tensor of its type"),
        ({"tableau": torch.zeros(4, 4).double()[:, ::2]}, "tableau must be a dense CPU tensor of its type"),
        ({"tableau": torch.zeros(3).double()}, "tableau must be .* for at most 16 stages, got .3."),
        ({"tableau": torch.zeros(2, 0).double()}, "tableau must be .* for at most 16 stages, got .2, 0."),
        ({"tableau": torch.zeros(2, 1).double()}, "tableau must be .* for at most 16 stages"),
        ({"tableau": torch.zeros(4, 1).double()}, "tableau must be .* for at most 16 stages"),
        ({"tableau": tableau(17)}, "tableau must be .* for at most 16 stages"),
        ({"tableau": above_the_diagonal()}, "tableau must be lower triangular"),
        ({"tableau": tableau(2), "adjoint": 2}, "only steps of one stage can be undone, the tableau has 2"),
        ({"tableau": tableau(2), "adjoint": 3}, "only steps of one stage can be undone, the tableau has 2"),
        ({"program": unary.code().int()}, "program must be a dense CPU tensor of its type"),
        ({"program": unary.code().repeat_interleave(2)[::2]}, "program must be a dense CPU tensor of its type"),
        ({"constants": torch.zeros(6)}, "constants must be a dense CPU tensor of its type"),
        ({"constants": torch.zeros(12).double()[::2]}, "constants must be a dense CPU tensor of its type"),
        ({"weights": [torch.ones(2)]}, "weights.0 must have the dtype of y0"),
        ({"weights": [torch.ones(2).double(), torch.ones(2)]}, "weights.1 must have the dtype of y0"),
    ],
)
def test_an_argument_out_of_its_limits_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^solve: .*{message}"):
        solve(unary, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"tolerance": 5e-324},
        {"max_iterations": 1},
        {"adjoint": 1},
        {"adjoint": 2, "checkpoint_every": 1},
        {"adjoint": 3},
        {"adjoint": 1, "tableau": tableau(2)},
        {"tableau": tableau(16)},
        {"t": t.float()},
        {"drift_tolerance": 5e-324},
        {"y0": unary.state().reshape(3, 2, 2)},
    ],
)
def test_an_argument_at_its_limit_is_taken(changed: dict[str, Any]) -> None:
    y0 = unary.state()
    torch.testing.assert_close(solve(unary, **changed)[0][1].reshape(y0.shape), y0 + y0.tanh())


def test_times_may_decrease_and_there_may_be_one() -> None:
    y0 = unary.state()
    torch.testing.assert_close(solve(unary, t=t.flip(0))[0][1], y0 - y0.tanh())
    assert torch.equal(solve(unary, t=t[:1], steps=[])[0], y0[None])
    one = Case((1, 1, 1), (Layer("unary", (1,), function=1),))
    torch.testing.assert_close(solve(one, y0=y0[:, 0])[0][1], y0[:, 0] + y0[:, 0].tanh())
    with pytest.raises(RuntimeError, match=r"^solve: a sample of y0 has 1 elements but the program expects 1"):
        solve(one, y0=y0[0, 0])


def test_the_most_steps_are_taken() -> None:
    """And refused for another reason, so that they need not be waited for."""
    with pytest.raises(RuntimeError, match=r"^solve: a sample of y0 has 4 elements but the program expects 6"):
        solve(linear, y0=torch.ones(1, 4).double(), steps=[10_000_000])


@pytest.mark.parametrize(("what", "adjoint"), [("stages", 1), ("ys", 0)])
def test_what_cannot_be_counted_is_refused(what: str, adjoint: int) -> None:
    """The batch is one sample seen many times."""
    rows = 10_000_000 if what == "stages" else 2
    y0 = unary.state()[:1].expand((2**63 - 1) // (4 * rows), 4)
    with pytest.raises(RuntimeError, match=rf"^solve: {what} of size .* would take more than 2\^63 bytes"):
        solve(unary, y0=y0, steps=[rows], adjoint=adjoint)


def backward(case: Case, **changed: Any) -> Any:
    """The gradient of the sum of the states after two steps, with everything kept."""
    y0, kept_per_step = changed.pop("y0", case.state()), changed.get("kept_per_step", 1)
    ys, stages, *_ = solve(case, y0=y0, steps=[2], adjoint=1, kept_per_step=kept_per_step)
    given = {
        "grad_ys": torch.ones_like(ys),
        "ys": ys,
        "stages": stages,
        "t": t,
        "weights": case.tensors(),
        "program": case.code(),
        "constants": torch.tensor(case.constants, dtype=torch.float64),
        "tableau": program_op.tableau_of(METHODS["euler"])[0],
        "steps": [2],
        "tolerance": 1e-6,
        "max_iterations": 10,
        "adjoint": 1,
        "kept_per_step": 1,
        "checkpoint_every": 0,
        "drift_tolerance": 1e-3,
        **changed,
    }
    return ops.solve_backward(*given.values())


@pytest.mark.parametrize("kept_per_step", [1, 0, -1])
@pytest.mark.parametrize("samples", [3, 60])
def test_the_backward_pass_takes_what_the_forward_pass_left(samples: int, kept_per_step: int) -> None:
    y0 = torch.linspace(-2, 2, 4 * samples, dtype=torch.float64).reshape(samples, 4).requires_grad_()
    middle = y0 + y0.tanh() / 2
    (y0 + middle + middle.tanh() / 2).sum().backward()
    assert y0.grad is not None
    torch.testing.assert_close(backward(unary, y0=y0.detach(), kept_per_step=kept_per_step)[0], y0.grad)


def test_tapes_of_another_size_are_refused() -> None:
    y0 = torch.ones(60, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^solve_backward: stages is \[5\] but must be \["):
        backward(unary, y0=y0, kept_per_step=-1, stages=torch.ones(5).double())


wrong = torch.ones(2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ys": wrong[0, 0]}, "ys must hold at least one observation, got .4."),
        ({"ys": wrong[:0]}, "ys must hold at least one observation, got .0, 3, 4."),
        ({"ys": wrong[:1]}, "ys is .1, 3, 4. but must be .2, 3, 4."),
        ({"grad_ys": wrong[:1]}, "grad_ys is .1, 3, 4. but must be .2, 3, 4."),
        ({"grad_ys": wrong.float()}, "grad_ys must have the dtype of y0"),
        ({"stages": wrong[:1]}, "stages is .1, 3, 4. but must be .2, 3, 4."),
        ({"stages": wrong.float()}, "stages must have the dtype of y0"),
        ({"stages": wrong.flatten()}, "stages has one dimension, but this solve stores no tapes"),
        ({"adjoint": 0, "stages": wrong[:0]}, "the forward solve was asked for no gradient"),
        ({"steps": [0]}, "every interval needs at least 1 step"),
    ],
)
def test_a_backward_pass_that_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^solve_backward: {message}"):
        backward(unary, **changed)


# ---- error control ---------------------------------------------------------------------------------------------------

BOSH3 = adaptive_op._embedded["bosh3"]


def adaptive(**changed: Any) -> Any:
    """y' = tanh(y) from 0 to 1, its steps recorded."""
    given = {
        "y0": unary.state(),
        "t": t,
        "weights": [],
        "program": unary.code(),
        "constants": torch.tensor(unary.constants, dtype=torch.float64),
        "tableau": BOSH3,
        "rtol": 1e-6,
        "atol": 1e-6,
        "first_step": 0.0,
        "min_step": 0.0,
        "max_step": 1e300,
        "safety": 0.9,
        "grow": 10.0,
        "shrink": 0.2,
        "order": 3,
        "most_attempts": 1000,
        "record": True,
        **changed,
    }
    return ops.solve_adaptive(*given.values())


def exact(y: Tensor) -> Tensor:
    """sinh(y) grows by e."""
    return torch.asinh(y.sinh() * torch.e)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rtol": 0.0},
        {"atol": 0.0},
        {"min_step": 0.01},
        {"first_step": 0.1},
        {"t": t.float()},
        {"record": False},
        {"order": 1, "most_attempts": 100_000},
    ],
)
def test_error_control_within_its_limits_solves(changed: dict[str, Any]) -> None:
    ys = adaptive(**changed)[0]
    torch.testing.assert_close(ys[1], exact(unary.state()), rtol=1e-4, atol=1e-4)


def embedded(row: int, column: int, value: float) -> Tensor:
    x = BOSH3.clone()
    x[row, column] = value
    return x


REFUSED_TABLEAU = "tableau must be .stages . 7, stages. for 2 to 16 stages, got"
NOT_SUCH = "tableau must be explicit, begin with the slope at the start and end with that at the end of a step"
TIMES, NO_ORDER = "t must be a float32 or float64 tensor of at least two times", "t must be finite and strictly"
TOLERANCES, BOUNDS = "rtol and atol must be finite, not negative and not both 0", "what bounds the steps may not be"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y0": torch.ones(3, 4, dtype=torch.float16)}, "y0 must be float32 or float64 on the CPU"),
        ({"y0": torch.ones(3, 5).double()}, "a sample of y0 has 5 elements but the program expects 4"),
        ({"y0": unary.state()[:1].expand(2**57, 4)}, "the solution is too large"),
        ({"t": t[:1]}, TIMES),
        ({"t": t[:, None]}, TIMES),
        ({"t": t.half()}, TIMES),
        ({"t": t.long()}, TIMES),
        ({"t": torch.tensor([0.0, 0.0])}, NO_ORDER),
        ({"t": torch.tensor([torch.nan, 0.0])}, NO_ORDER),
        ({"t": torch.tensor([0.0, torch.inf])}, NO_ORDER),
        ({"t": torch.tensor([-torch.inf, 0.0])}, NO_ORDER),
        ({"t": torch.tensor([0.0, 1.0, 1.0])}, NO_ORDER),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, NO_ORDER),
        ({"t": torch.tensor([1.0, 0.0, 0.5])}, NO_ORDER),
        ({"t": torch.tensor([-1e308, 1e308], dtype=torch.float64)}, NO_ORDER),
        ({"tableau": BOSH3[:-1]}, REFUSED_TABLEAU),
        ({"tableau": BOSH3[0]}, REFUSED_TABLEAU),
        ({"tableau": torch.zeros(8, 1).double()}, REFUSED_TABLEAU),
        ({"tableau": torch.zeros(24, 17).double()}, REFUSED_TABLEAU),
        ({"tableau": torch.zeros(23, 16).double()}, NOT_SUCH),
        ({"tableau": torch.zeros(9, 2).double()}, NOT_SUCH),
        ({"tableau": BOSH3.float()}, "tableau must be a dense CPU tensor of its type"),
        ({"tableau": BOSH3.repeat_interleave(2, 1)[:, ::2]}, "tableau must be a dense CPU tensor of its type"),
        ({"tableau": embedded(0, 0, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(3, 3, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(0, 1, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(2, 3, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(3, 0, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(4, 3, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(5, 0, 0.5)}, NOT_SUCH),
        ({"tableau": embedded(5, 3, 0.5)}, NOT_SUCH),
        ({"rtol": 0.0, "atol": 0.0}, TOLERANCES),
        ({"rtol": -1.0}, TOLERANCES),
        ({"atol": -1.0}, TOLERANCES),
        ({"rtol": float("inf")}, TOLERANCES),
        ({"atol": float("inf")}, TOLERANCES),
        ({"rtol": float("nan")}, TOLERANCES),
        ({"first_step": -0.1}, BOUNDS),
        ({"min_step": -0.1}, BOUNDS),
        ({"max_step": -0.1}, BOUNDS),
        ({"safety": 0.0}, BOUNDS),
        ({"grow": 0.0}, BOUNDS),
        ({"shrink": 0.0}, BOUNDS),
        ({"order": 0}, "order and most_attempts must be at least 1"),
        ({"most_attempts": 0}, "order and most_attempts must be at least 1"),
    ],
)
def test_error_control_out_of_its_limits_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^solve_adaptive: {message}"):
        adaptive(**changed)


def test_the_largest_solution_that_can_be_counted_is_only_too_large_for_the_memory() -> None:
    with pytest.raises(RuntimeError, match="empty_strided"):
        adaptive(y0=unary.state()[:1].expand(2**57 - 1, 4))


def test_one_attempt_may_be_enough_and_no_step_may_be_the_longest() -> None:
    ys, *_, counts, outcomes, _ = adaptive(rtol=1e3, most_attempts=1)
    assert counts[0].tolist() == [1, 1, 1] and ys.isfinite().all()
    *_, outcomes, _ = adaptive(max_step=0.0, most_attempts=1)
    assert outcomes.tolist() != [0, 0, 0]


def adaptive_backward(**changed: Any) -> Any:
    ys, states, spans, before, last, *_ = adaptive()
    recorded = {"states": states, "spans": spans, "before": before, "last": last}
    for name, change in changed.items():
        if callable(change):
            recorded[name] = change(recorded[name].clone())
    given = {
        "grad_ys": torch.ones_like(ys),
        **recorded,
        "t": t,
        "weights": [],
        "program": unary.code(),
        "constants": torch.tensor(unary.constants, dtype=torch.float64),
        "tableau": BOSH3,
        **{name: change for name, change in changed.items() if not callable(change)},
    }
    return ops.solve_adaptive_backward(*given.values())


def test_the_gradient_of_the_recorded_steps_is_that_of_the_solution() -> None:
    y0 = unary.state().requires_grad_()
    (y0 + exact(y0)).sum().backward()
    assert y0.grad is not None
    torch.testing.assert_close(adaptive_backward()[0], y0.grad, rtol=1e-4, atol=1e-4)


def put(place: tuple[int, ...], value: float) -> Any:
    """A change of a tensor."""

    def change(x: Tensor) -> Tensor:
        x[place] = value
        return x

    return change


OF_ONE = "states, spans, before and last are not of one solve"
IN_ORDER = "before or spans do not go through steps in their order"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_ys": torch.ones(3, 3, 4).double()}, "grad_ys must have as many times as t"),
        ({"grad_ys": torch.ones(2, 2, 4).double()}, OF_ONE),
        ({"grad_ys": torch.ones(2, 3, 4)}, OF_ONE),
        ({"states": lambda x: x.float()}, OF_ONE),
        ({"states": lambda x: x.repeat_interleave(2, 1)[:, ::2]}, OF_ONE),
        ({"states": lambda x: x[1:]}, OF_ONE),
        ({"states": lambda x: x[:, 1:].contiguous()}, OF_ONE),
        ({"states": lambda x: x.flatten()}, OF_ONE),
        ({"states": lambda x: x[:, :, None]}, OF_ONE),
        ({"spans": lambda x: x[1:]}, OF_ONE),
        ({"before": lambda x: x[1:]}, OF_ONE),
        ({"last": lambda x: x[1:]}, OF_ONE),
        ({"before": lambda x: x.int()}, "before must be a dense CPU tensor of its type"),
        ({"last": lambda x: x.int()}, "last must be a dense CPU tensor of its type"),
        ({"spans": lambda x: x.float()}, "spans must be a dense CPU tensor of its type"),
        ({"before": put((0,), -2)}, IN_ORDER),
        ({"before": put((0,), 0)}, IN_ORDER),
        ({"before": put((4,), 4)}, IN_ORDER),
        ({"spans": put((0, 0), -0.1)}, IN_ORDER),
        ({"spans": put((0, 1), 0.0)}, IN_ORDER),
        ({"t": t.flip(0)}, IN_ORDER),
        ({"last": put((0,), -2)}, "last is beyond the steps"),
        ({"last": put((0,), 1000)}, "last is beyond the steps"),
        ({"last": lambda x: x * 0 + len(adaptive()[3])}, "last is beyond the steps"),
    ],
)
def test_a_record_that_is_not_one_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^solve_adaptive_backward: {message}"):
        adaptive_backward(**changed)


def test_a_sample_without_steps_has_a_gradient_without_them() -> None:
    """As of one that failed at once: what it was observed at there counts, and nothing else."""
    whole, cut = adaptive_backward()[0], adaptive_backward(last=put((0,), -1))[0]
    assert torch.equal(cut[1:], whole[1:]) and not torch.equal(cut[0], whole[0])
