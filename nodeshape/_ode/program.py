"""A dynamics as data: a program of layers over the elements of one sample, as csrc/program.h reads it, and as text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: As in csrc/program_plan.h.
FORMAT, MOST_DIMS = 1, 6
NUMBERS, CONSTANTS = 1 + 3 * MOST_DIMS, 3
KINDS = ("linear", "unary", "binary", "move", "norm", "conv", "matmul")
#: As in csrc/program.h, in its order.
UNARY = (
    *("affine", "tanh", "sigmoid", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "softplus", "mish", "sin"),
    *("cos", "exp", "log", "sqrt", "abs", "power", "reciprocal", "clamp", "erf", "square", "cube", "atan"),
    *("asinh", "log1p", "expm1"),
)
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "greater", "greater_equal", "keep")

MOVES = ("copy", "sum", "largest")

Shape = tuple[int, ...]
STATE, TIME = 0, 1  # buffers


@dataclass(frozen=True)
class Ref:
    """Elements of a buffer, or of weight ``-1 - buffer``, from ``offset`` on."""

    buffer: int
    offset: int = 0


NOTHING = Ref(0)


@dataclass(frozen=True)
class Program:
    """A finished program.

    Attributes:
        code: int64, as csrc/program_plan.h describes it.
        constants: float64.
        size: elements of a sample's state.
        lines: what each layer does, and its shape, and its multiplications.
        operations: of one evaluation, per sample.
        kept: elements per sample that the backward pass of one evaluation looks at.
        maps_kept: states that a step of one stage keeps for the backward pass, where it is more than one.
    """

    code: Tensor
    constants: Tensor
    size: int
    lines: tuple[tuple[str, str, int], ...]
    operations: int
    kept: int
    maps_kept: int = 1

    def __str__(self) -> str:
        width = max((len(line[0]) for line in self.lines), default=0)
        wide = max((len(line[1]) for line in self.lines), default=0)
        text = [f"{name:{width}}  {shape:{wide}}  {work:>10,}" for name, shape, work in self.lines]
        text.append(
            f"{self.operations:,} operations per evaluation and sample; per step it keeps {4 * self.size:,} bytes of a"
            f" sample, an evaluation of the backward pass works on {4 * self.kept:,} (float32)"
        )
        return "\n".join(text)


@dataclass
class Builder:
    """Puts a program together, layer by layer.

    Attributes:
        sizes: elements of each buffer; of the state and the time first.
        weights: how many there are.
    """

    sizes: list[int]
    weights: int = 0
    records: list[list[int]] = field(default_factory=list)
    constants: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    lines: list[tuple[str, str, int]] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    def buffer(self, shape: Sequence[int]) -> Ref:
        """A new buffer."""
        self.sizes.append(prod(shape))
        return Ref(len(self.sizes) - 1)

    def weight(self) -> int:
        """The number of a new weight."""
        self.weights += 1
        return self.weights - 1

    def add(
        self,
        kind: str,
        a: Ref,
        out: Ref,
        numbers: Sequence[int],
        name: str,
        shape: Sequence[int],
        work: int,
        *,
        function: int = 0,
        b: Ref = NOTHING,
        scratch: int = -1,
        weight: int = -1,
        bias: int = -1,
        constants: Sequence[float] = (),
    ) -> None:
        """Append a layer; ``name``, ``shape`` and ``work`` are for the reader."""
        first = 0
        if constants:
            first = len(self.constants)
            self.constants += [*constants, *[0.0] * (CONSTANTS - len(constants))]
        self.records.append(
            [
                *(KINDS.index(kind), function, a.buffer, a.offset, b.buffer, b.offset, out.buffer, out.offset),
                *(scratch, weight, bias, first, *numbers, *[0] * (NUMBERS - len(numbers))),
            ]
        )
        self.lines.append((name, "×".join(map(str, shape)) or "1", work))

    def unary(self, function: str, a: Ref, shape: Shape, constants: Sequence[float] = ()) -> Ref:
        """function(a), element by element."""
        out = self.buffer(shape)
        count = prod(shape)
        self.add("unary", a, out, [count], function, shape, count, function=UNARY.index(function), constants=constants)
        return out

    def binary(self, function: str, a: Ref, a_strides: Shape, b: Ref, b_strides: Shape, shape: Shape) -> Ref:
        """function(a, b) of elements that strides choose."""
        out = self.buffer(shape)
        numbers = strided(shape, a_strides, b_strides)
        self.add("binary", a, out, numbers, function, shape, prod(shape), b=b, function=BINARY.index(function))
        return out

    def linear(
        self, a: Ref, shape: Shape, inputs: int, weight: int, bias: int, row: int | None = None, column: int = 1
    ) -> Ref:
        """W x + b along the last dimension of the result's ``shape``; row and column are the strides of W."""
        out, outputs, positions = self.buffer(shape), shape[-1], prod(shape[:-1])
        numbers = [positions, inputs, outputs, inputs if row is None else row, column]
        name, work = f"linear {inputs} → {outputs}", positions * inputs * outputs
        self.add("linear", a, out, numbers, name, shape, work, weight=weight, bias=bias)
        return out

    def norm(
        self,
        a: Ref,
        shape: Shape,
        groups: int,
        weight: int,
        bias: int,
        *,
        inner: int,
        count: int,
        eps: float = 1e-5,
        name: str = "",
    ) -> Ref:
        """Of ``groups`` of neighbouring elements; element e has scale and shift number e // inner % count."""
        size = prod(shape)
        scratch, out = self.buffer((2 * groups,)), self.buffer(shape)
        self.add(
            "norm",
            a,
            out,
            [groups, size // groups, inner, count],
            name or f"group norm, {groups} groups",
            shape,
            6 * size,
            scratch=scratch.buffer,
            weight=weight,
            bias=bias,
            constants=[eps],
        )
        return out

    def conv(
        self,
        a: Ref,
        maps: Shape,
        shape: Shape,
        kernel: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        weight: int,
        bias: int,
    ) -> Ref:
        """A convolution of stride 1 of ``maps`` [channels, height, width]; ``shape`` is that of the result."""
        channels, height, width = maps
        framed = (channels, height + 2 * padding[0], width + 2 * padding[1])
        scratch = self.buffer(framed).buffer if any(padding) else -1
        out, outputs = self.buffer(shape), shape[0]
        numbers = [channels, height, width, outputs, *kernel, *padding, *dilation, groups]
        name = f"conv {channels} → {outputs}, {kernel[0]}×{kernel[1]}" + (f", {groups} groups" if groups > 1 else "")
        work = outputs * (channels // groups) * prod(kernel) * prod(shape[1:])
        self.add("conv", a, out, numbers, name, shape, work, scratch=scratch, weight=weight, bias=bias)
        return out

    def move(
        self,
        a: Ref,
        a_strides: Shape,
        out: Ref,
        out_strides: Shape,
        shape: Shape,
        name: str,
        *,
        scale: float = 1.0,
        function: int = 0,
    ) -> None:
        """Elements of a that strides choose, to where others say; those whose place is the same, by one of MOVES."""
        numbers = strided(shape, a_strides, out_strides)
        self.add("move", a, out, numbers, name, shape, 0, function=function, constants=[scale])

    def finish(self, result: Ref, maps_kept: int = 1) -> Program:
        """The program whose dy/dt is the whole buffer ``result``."""
        header = [FORMAT, len(self.sizes), len(self.records), result.buffer, self.weights, len(self.constants)]
        code = [*header, *self.sizes, *(number for record in self.records for number in record)]
        with nobodys():
            tensors = (
                torch.frombuffer(array("q", code), dtype=torch.int64),
                torch.frombuffer(array("d", self.constants), dtype=torch.float64),
            )
        return Program(
            *tensors,
            self.sizes[STATE],
            tuple(self.lines),
            sum(line[2] for line in self.lines),
            sum(self.sizes),
            maps_kept,
        )


@contextmanager
def nobodys() -> Iterator[None]:
    """Within, tensors are made that outlive whoever is recording, whose own they would be otherwise."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield


def dense(shape: Shape) -> Shape:
    """Strides of an array without gaps."""
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))


def strided(shape: Shape, a: Shape, b: Shape) -> list[int]:
    """A layer's numbers for two operands' strides, neighbouring dimensions put together where both allow it.

    Raises:
        ValueError: more dimensions are left than a layer has.
    """
    dims: list[tuple[int, int, int]] = []
    for size, sa, sb in zip(shape, a, b):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * sa and dims[-1][2] == size * sb:
            dims[-1] = (dims[-1][0] * size, sa, sb)
        else:
            dims.append((size, sa, sb))
    dims = dims or [(1, 1, 1)]
    if len(dims) > MOST_DIMS:
        raise ValueError(f"more than {MOST_DIMS} dimensions that do not go together")
    pad = [0] * (MOST_DIMS - len(dims))
    return [len(dims), *(column for k in range(3) for column in [*(dim[k] for dim in dims), *pad])]
