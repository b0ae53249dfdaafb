"""From a traced f to a program: each operation that torch.export records becomes layers over one sample.

A value of the trace is the same for all samples (``FREE``), or has the batch as its first dimension (``BATCHED``), or
as part of it, ``[batch * n, ...]`` (``MERGED``). The program knows the sample alone: its shape is that of the value
without the batch.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log, pi, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from nodeshape._ode.program import MOVES, STATE, TIME, Builder, Program, Ref, Shape, dense

FREE, BATCHED, MERGED = "free", "batched", "merged"
aten = torch.ops.aten


class FuseError(ValueError):
    """A function that ``fuse`` cannot take: the message names the operation, its file and line, and what to do."""

    __module__ = "nodeshape"


class NotLowered(Exception):
    """Why an operation does not lower, and what to write instead."""


@dataclass(frozen=True)
class Value:
    """Elements of a buffer, in order."""

    ref: Ref
    shape: Shape
    kind: str


@dataclass(frozen=True)
class Filled:
    """A number, everywhere."""

    number: float
    shape: Shape
    kind: str


@dataclass(frozen=True)
class Static:
    """What does not depend on state or time: computed by PyTorch before a solve, from weights and constants."""

    node: fx.Node
    shape: Shape
    kind: str = FREE


Operand = Value | Filled | Static

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
}
FILLS = {aten.full.default, aten.full_like.default, aten.scalar_tensor.default}
#: Tensors to be written to, whatever they hold.
EMPTIES = {aten.empty.memory_format, aten.empty_permuted.default, aten.empty_like.default}
UNARIES: dict[Any, str] = {
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.mish.default: "mish",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.abs.default: "abs",
    aten.reciprocal.default: "reciprocal",
    aten.erf.default: "erf",
    aten.square.default: "square",
    aten.atan.default: "atan",
    aten.asinh.default: "asinh",
    aten.log1p.default: "log1p",
    aten.expm1.default: "expm1",
}
BINARIES: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "subtract",
    aten.mul.Tensor: "multiply",
    aten.div.Tensor: "divide",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.add.Scalar: "add",
    aten.sub.Scalar: "subtract",
    aten.mul.Scalar: "multiply",
    aten.div.Scalar: "divide",
    aten.rsub.Scalar: "rsub",
}
#: What to write instead of operations that people ask for and that do not lower.
ADVICE = {
    "native_dropout": "call f.eval() before fuse, or leave dropout out of f",
    "bernoulli": "call f.eval() before fuse, or leave dropout out of f",
    **dict.fromkeys(
        ("rand", "randn", "rand_like", "randn_like"),
        "an ODE's f is not random: draw the numbers before the solve and keep them in a buffer",
    ),
    "_native_batch_norm_legit": "call f.eval(), which freezes the statistics, or use GroupNorm or LayerNorm",
    "_native_batch_norm_legit_functional": "call f.eval(), which freezes the statistics, or use GroupNorm or LayerNorm",
    "batch_norm": "call f.eval(), which freezes the statistics, or use GroupNorm or LayerNorm",
    "detach": "let gradients through, or make what is detached a buffer",
    **dict.fromkeys(
        ("max_pool2d_with_indices", "amax", "amin", "max", "min", "argmax", "argmin", "topk", "median"),
        "use a mean or logsumexp, or torch.maximum of slices",
    ),
    **dict.fromkeys(("sort", "argsort"), "f would have kinks where elements meet: write it with sums or softmax"),
    **dict.fromkeys(
        ("floor", "ceil", "round", "trunc", "frac", "remainder", "fmod", "floor_divide"),
        "its jumps cost any method its order: write what is periodic with sin and cos, what is switched with"
        " torch.where and times at the jumps",
    ),
    "embedding": "look embeddings up before the solve and make them part of the state",
    **dict.fromkeys(("gather", "scatter", "index_put"), "choose elements by slices, or by a list of numbers"),
    **dict.fromkeys(
        ("cumsum", "cumprod", "prod"), "write it as products of slices, or @ with a triangular buffer of ones"
    ),
    "pow": "write torch.exp(b * torch.log(a)), which needs a positive a",
    "atan2": "write torch.atan(a / b) where b is positive",
    **dict.fromkeys(("_adaptive_avg_pool2d", "avg_pool3d"), "use a convolution, or the mean over the whole map"),
    **dict.fromkeys(
        ("upsample_nearest2d", "upsample_bilinear2d"), "use repeat_interleave; a state keeps its size anyway"
    ),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r", "complex"), "use @ with buffers of cosines and sines"),
    "convolution_backward": "take the derivative of Linear layers, or write that of the convolution out",
}


@dataclass
class Lowered:
    """A program and where its weights come from.

    Attributes:
        weights: for each of the program's weights the name of an input of the trace, or the number of a result of
            ``prelude``.
        paths, constants: where to find the inputs of the trace: from the module, or as they were.
        differentiates: whether f takes derivatives of itself.
        prelude: computes weights on a device from inputs of the trace, named by ``prelude_inputs``; None where none is
            computed.
    """

    program: Program
    weights: tuple[str | int, ...]
    prelude: fx.GraphModule | None
    prelude_inputs: tuple[str, ...]
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    differentiates: bool = False


def lower(
    graph: fx.Graph, weights: set[str], constants: dict[str, Tensor], y_inputs: Sequence[str], t_input: str
) -> Lowered:
    """Lower a graph whose inputs are weights, constants, the state's tensors, and the time.

    Raises:
        FuseError: an operation does not lower.
    """
    return Lowering(graph, {*weights, *constants}, constants, y_inputs, t_input).run()


@dataclass
class Lowering:
    """The state of one call of :func:`lower`."""

    graph: fx.Graph
    static_inputs: set[str]
    constants: dict[str, Tensor]
    y_inputs: Sequence[str]
    t_input: str
    values: dict[fx.Node, Any] = field(default_factory=dict)
    weight_numbers: dict[fx.Node, int] = field(default_factory=dict)
    batch: Any = None
    current: Any = None

    def run(self) -> Lowered:
        """The program."""
        self._bind_inputs()
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                result = self._result(node)
            elif node.op != "placeholder":
                raise self._error(node, NotLowered("it is not an operation on tensors"))
        program = self.builder.finish(result)
        return self._with_prelude(program)

    # ---- inputs and outputs ------------------------------------------------------------------------------------------

    def _bind_inputs(self) -> None:
        named = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        shapes = []
        for name in self.y_inputs:
            shape = named[name].meta["val"].shape
            if shape and not isinstance(shape[0], int):
                self.batch = shape[0].node.expr
            shapes.append(shape)
        offset = 0
        for name in self.y_inputs:
            kind, shape = self.classify(named[name].meta["val"])
            self.values[named[name]] = Value(Ref(STATE, offset), shape, kind)
            offset += prod(shape)
        self.builder = Builder([offset, 1])
        for name, node in named.items():
            if name == self.t_input:
                self.values[node] = Value(Ref(TIME), (), FREE)
            elif name in self.static_inputs:
                self.values[node] = Static(node, tuple(node.meta["val"].shape))

    def _result(self, node: fx.Node) -> Ref:
        (outputs,) = node.args
        found: list[Any] = [self.values.get(x) if isinstance(x, fx.Node) else None for x in outputs]  # type: ignore[union-attr]
        found = found[-len(self.y_inputs) :]  # behind tokens that order effects
        inputs = [self.values[n] for n in self.graph.nodes if n.op == "placeholder" and n.name in self.y_inputs]
        if len(found) != len(inputs) or any(
            x is None or x.kind != y.kind or x.shape != y.shape for x, y in zip(found, inputs)
        ):
            shapes = [getattr(x, "shape", type(x).__name__) for x in found]
            raise FuseError(
                f"f must return the shape of its state: samples are {[y.shape for y in inputs]}, it returned {shapes}"
            )
        parts = [self.value(x) for x in found]
        out = self.builder.buffer((self.builder.sizes[STATE],))
        offset = 0
        for part in parts:
            self.builder.move(part.ref, (1,), Ref(out.buffer, offset), (1,), (prod(part.shape),), "dy/dt")
            offset += prod(part.shape)
        return self._without_last_copy(out, found)

    def _without_last_copy(self, out: Ref, found: list[Any]) -> Ref:
        """The last layer's own buffer, where the result is that and nothing else reads it."""
        builder = self.builder
        (last,) = builder.records[-1:]
        source = last[2]
        if len(found) > 1 or source in (STATE, TIME) or source < 0 or builder.sizes[source] != builder.sizes[STATE]:
            return out
        for record in builder.records[:-1]:
            reads = [record[2], *([record[4]] if record[0] in (2, 6) else []), record[8]]
            if source in reads:
                return out
        del builder.records[-1], builder.lines[-1], builder.sizes[-1]
        return Ref(source)

    def _with_prelude(self, program: Program) -> Lowered:
        weights: list[str | int] = []
        outputs: list[fx.Node] = []
        for node in self.weight_numbers:
            if node.op == "placeholder" and node.meta["val"].is_floating_point():
                weights.append(node.name)
            else:
                weights.append(len(outputs))
                outputs.append(node)
        if not outputs:
            return Lowered(program, tuple(weights), None, ())
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                if node.op == "placeholder":
                    raise AssertionError(node.name)
                for needed in node.all_input_nodes:
                    copy(needed)
                copies[node] = graph.node_copy(node, lambda n: copies[n])
            return copies[node]

        def inputs_of(node: fx.Node) -> None:
            if node.op == "placeholder":
                needed.setdefault(node)
                return
            for other in node.all_input_nodes:
                inputs_of(other)

        needed: dict[fx.Node, None] = {}
        for node in outputs:
            inputs_of(node)
        device = graph.placeholder("device")
        for node in needed:
            copies[node] = graph.placeholder(node.name)
        graph.output(tuple(copy(node) for node in outputs))
        for node in graph.nodes:
            node.meta.clear()
            if "device" in node.kwargs:  # that f was traced on
                node.kwargs = {**node.kwargs, "device": device}
        prelude = fx.GraphModule(torch.nn.Module(), graph)
        return Lowered(program, tuple(weights), prelude, tuple(node.name for node in needed))

    # ---- values ------------------------------------------------------------------------------------------------------

    def classify(self, example: Tensor) -> tuple[str, Shape]:
        """The kind of a value, and the shape of a sample of it.

        Raises:
            NotLowered: the batch is not in its first dimension.
        """
        shape = list(example.shape)
        if not shape or isinstance(shape[0], int):
            if not all(isinstance(size, int) for size in shape):
                raise NotLowered("it moves the batch out of the first dimension: keep samples along the first")
            return FREE, tuple(shape)
        if not all(isinstance(size, int) for size in shape[1:]):
            raise NotLowered("it moves the batch out of the first dimension: keep samples along the first")
        share = shape[0].node.expr / self.batch
        if share == 1:
            return BATCHED, tuple(shape[1:])
        if not share.is_Integer:
            raise NotLowered("it takes samples of the batch apart: f must treat them all alike")
        return MERGED, (int(share), *shape[1:])

    def value(self, x: Operand) -> Value:
        """``x`` as elements of a buffer."""
        if isinstance(x, Value):
            return x
        out = self.builder.buffer(x.shape)
        zeros = (0,) * len(x.shape)
        if isinstance(x, Filled):
            one = self.builder.unary("affine", Ref(TIME), (), [0.0, x.number])
            self.builder.move(one, zeros, out, dense(x.shape), x.shape, "fill")
        else:
            self.builder.move(self.weight(x), dense(x.shape), out, dense(x.shape), x.shape, "weight")
        return Value(out, x.shape, x.kind)

    def weight(self, x: Static) -> Ref:
        """A static value as a weight."""
        return Ref(-1 - self.number(x.node))

    def number(self, node: fx.Node) -> int:
        """The number of the weight that a static node is."""
        if node not in self.weight_numbers:
            if node.meta["val"].is_complex():
                raise NotLowered("a constant is complex: keep its real and imaginary parts apart")
            self.weight_numbers[node] = self.builder.weight()
        return self.weight_numbers[node]

    def derived(self, target: Any, args: tuple[Any, ...], shape: Shape, **keywords: Any) -> Static:
        """A tensor that PyTorch computes before a solve, as the operations that are all of static values."""
        with self.graph.inserting_before(self.current):
            node = self.graph.call_function(target, args, keywords)
        node.meta["val"] = torch.empty(shape, device="meta")
        return Static(node, shape)

    def known(self, x: fx.Node) -> Tensor | None:
        """The value of a static node, where it depends on constants alone."""
        if x.op == "placeholder":
            return self.constants.get(x.name)
        inputs = {node: self.known(node) for node in x.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args, keywords = fx.node.map_arg((x.args, x.kwargs), lambda node: inputs[node])
        return x.target(*args, **keywords)  # type: ignore[operator, no-any-return]

    def operand(self, x: Operand) -> Ref:
        """Where a layer that reads weights too finds ``x``."""
        return self.weight(x) if isinstance(x, Static) else self.value(x).ref

    def spread(self, x: Operand, kind: str, shape: Shape) -> Shape:
        """Strides of ``x`` as broadcast to a value of ``kind`` with samples of ``shape``."""
        own = x.shape
        rank = len(shape) + (kind == BATCHED)
        own_rank = len(own) + (x.kind == BATCHED)
        if x.kind == FREE and kind == BATCHED and own_rank == rank:
            if own[0] != 1:
                raise NotLowered("it combines samples with something of one fixed batch size")
            own = own[1:]
        elif x.kind != FREE and (x.kind != kind or own_rank != rank):
            raise NotLowered("it combines one sample with others: give both operands the batch as first dimension")
        strides = list(dense(own))
        for d, size in enumerate(own):
            if size == 1:
                strides[d] = 0
        return (*[0] * (len(shape) - len(own)), *strides)

    def dimension(self, x: Operand, d: int) -> int:
        """The dimension of a sample that is dimension d of the value.

        Raises:
            NotLowered: it is the batch.
        """
        rank = len(x.shape) + (x.kind == BATCHED)
        d = d + rank if d < 0 else d
        if x.kind == FREE:
            return d
        if d == 0:
            raise NotLowered("it works along the batch, so samples would mix: f must treat each sample by itself")
        return d - (x.kind == BATCHED)

    # ---- operations --------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        self.current = node
        if node.target is aten._assert_tensor_metadata.default or _name(node) == "with_effects":
            return  # checks
        if node.target is operator.getitem:
            source, index = node.args
            if source not in self.values:
                return
            whole = self.values[source]  # type: ignore[index]
            self.values[node] = Static(node, _shape(node)) if isinstance(whole, Static) else whole[index]
            return
        example = node.meta.get("val")
        inputs = [self.values.get(x) for x in node.all_input_nodes]
        if isinstance(example, (torch.SymInt, int)):
            return  # a size, which is known from shapes
        made = not inputs and node.target not in FILLS | EMPTIES and _name(node) not in ADVICE
        made = made or (bool(inputs) and all(isinstance(x, Static) for x in inputs))
        if made and (not isinstance(example, Tensor) or all(isinstance(size, int) for size in example.shape)):
            self.values[node] = Static(node, _shape(node))
            return
        try:
            self.values[node] = self._lower(node)
        except NotLowered as why:
            raise self._error(node, why) from None
        except ValueError as why:
            if isinstance(why, FuseError):
                raise
            raise self._error(node, NotLowered(str(why))) from None

    def _lower(self, node: fx.Node) -> Any:
        target: Any = node.target
        args = [self._argument(x) for x in node.args]
        keywords = {name: self._argument(x) for name, x in node.kwargs.items()}
        rule = RULES.get(target)
        if rule is None:
            advice = ADVICE.get(
                _name(node), "solve this f without fuse, or write it with operations that the reference of fuse lists"
            )
            raise NotLowered(f"there is no layer for it: {advice}")
        return rule(self, node, args, keywords)

    def _argument(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self.values.get(x)
        if isinstance(x, (list, tuple)):
            return [self._argument(item) for item in x]
        return x

    def _error(self, node: fx.Node, why: NotLowered) -> FuseError:
        name = str(node.target).removesuffix(".default").removesuffix(".Tensor")
        return FuseError(f"{name} does not lower{place_of(node)}: {why}")

    def _as_shape(self, x: Operand, kind: str, shape: Shape) -> Operand:
        if isinstance(x, Filled):
            return Filled(x.number, shape, kind)
        value = self.value(x)
        if prod(value.shape) != prod(shape):
            raise NotLowered("it moves samples along the batch: reshape each sample by itself")
        return Value(value.ref, shape, kind)

    def _unary(self, function: str, x: Operand, constants: Sequence[float] = ()) -> Value:
        value = self.value(x)
        return Value(self.builder.unary(function, value.ref, value.shape, constants), value.shape, value.kind)

    def affine(self, x: Operand, scale: float, shift: float) -> Operand:
        """Scale x, then shift it."""
        if isinstance(x, Filled):
            return Filled(scale * x.number + shift, x.shape, x.kind)
        if (scale, shift) == (1.0, 0.0):
            return x
        return self._unary("affine", x, [scale, shift])

    def _binary(self, node: fx.Node, function: str, args: list[Any], keywords: dict[str, Any]) -> Operand:
        a, b = args[0], args[1]
        factor = float(keywords.get("alpha", args[2] if len(args) > 2 else 1))
        if function == "rsub":
            function, a, b = "subtract", b, a
        kind, shape = self.classify(node.meta["val"])
        number_a, number_b = (x.number if isinstance(x, Filled) else x for x in (a, b))
        if isinstance(number_b, (int, float)):
            b_number = float(number_b)
            if isinstance(number_a, (int, float)):
                both: dict[str, Callable[[float, float], float]] = {
                    "add": lambda p, q: p + factor * q,
                    "subtract": lambda p, q: p - factor * q,
                    "multiply": lambda p, q: p * q,
                    "divide": lambda p, q: p / q,
                    "maximum": max,
                    "minimum": min,
                }
                return Filled(both[function](float(number_a), b_number), shape, kind)
            wide = self._broadcast(a, kind, shape)
            if function in ("add", "subtract"):
                return self.affine(wide, 1.0, factor * b_number if function == "add" else -factor * b_number)
            if function in ("multiply", "divide"):
                return self.affine(wide, b_number if function == "multiply" else 1 / b_number, 0.0)
            bounds = [b_number, float("inf")] if function == "maximum" else [float("-inf"), b_number]
            return self._unary("clamp", wide, bounds)
        if isinstance(number_a, (int, float)):
            a_number = float(number_a)
            wide = self._broadcast(b, kind, shape)
            if function in ("add", "subtract"):
                return self.affine(wide, factor if function == "add" else -factor, a_number)
            if function == "multiply":
                return self.affine(wide, a_number, 0.0)
            if function == "divide":
                return self.affine(self._unary("reciprocal", wide), a_number, 0.0)
            bounds = [a_number, float("inf")] if function == "maximum" else [float("-inf"), a_number]
            return self._unary("clamp", wide, bounds)
        if factor != 1.0:
            b = self.affine(b, factor, 0.0)
        return self.combine(function, a, b, kind, shape)

    def combine(self, function: str, a: Operand | float, b: Operand | float, kind: str, shape: Shape) -> Value:
        """function(a, b), both broadcast to a value of ``kind`` with samples of ``shape``."""
        if a is None or b is None:
            raise NotLowered("it depends on the size of the batch, so samples would not be solved each by itself")
        a, b = (x if isinstance(x, Operand) else Filled(float(x), (), FREE) for x in (a, b))
        out = self.builder.binary(
            function, self.operand(a), self.spread(a, kind, shape), self.operand(b), self.spread(b, kind, shape), shape
        )
        return Value(out, shape, kind)

    def _broadcast(self, x: Operand, kind: str, shape: Shape) -> Operand:
        if x.kind == kind and x.shape == shape:
            return x
        if isinstance(x, Filled):
            return Filled(x.number, shape, kind)
        strides = self.spread(x, kind, shape)
        out = self.builder.buffer(shape)
        self.builder.move(self.operand(x), strides, out, dense(shape), shape, "expand")
        return Value(out, shape, kind)


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _shape(node: fx.Node) -> Shape:
    example = node.meta.get("val")
    return tuple(example.shape) if isinstance(example, Tensor) else ()


def place_of(node: fx.Node) -> str:
    """Where in the user's code a node comes from: the innermost line that is not PyTorch's."""
    trace = node.meta.get("stack_trace") or ""
    torch_folder = str(Path(torch.__file__).parent)
    lines = trace.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        line = lines[i].strip()
        if line.startswith("File ") and torch_folder not in line:
            where = line.removeprefix("File ").split(", in ")[0].replace('"', "").replace(", line ", ":")
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f" at {where}" + (f" ({code})" if code and not code.startswith("File ") else "")
    return ""


def place_of_error(error: BaseException) -> str:
    """Where in the user's code an error comes from: the innermost line that is neither PyTorch's nor ours."""
    others = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and Path(frame.filename).exists():
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


# ---- rules: each from (lowering, node, arguments, keywords) to a value -----------------------------------------------

Rule = Callable[[Lowering, fx.Node, list[Any], dict[str, Any]], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _get(args: list[Any], keywords: dict[str, Any], index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else keywords.get(name, default)


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.dropout.default,
)
def _same(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    if node.target is aten.dropout.default and args[2]:
        raise NotLowered(f"it is random: {ADVICE['native_dropout']}")
    given, made = (x.meta["val"].dtype for x in (node.args[0], node))  # type: ignore[union-attr]
    if made not in (given, torch.float64) and given != torch.bool:
        raise NotLowered(f"it computes in {made}, whatever the type of the state: leave it out, or use y.dtype")
    return args[0]


@rule(*FILLS)
def _fill(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    number = args[0] if node.target is aten.scalar_tensor.default else args[1]
    return Filled(float(number), shape, kind)


@rule(*EMPTIES)
def _empty(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    return Filled(0.0, shape, kind)


@rule(*VIEWS)
def _view(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._as_shape(args[0], *low.classify(node.meta["val"]))


@rule(*UNARIES)
def _function(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary(UNARIES[node.target], args[0])


@rule(*BINARIES)
def _arithmetic(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._binary(node, BINARIES[node.target], args, keywords)


@rule(aten.neg.default)
def _neg(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low.affine(args[0], -1.0, 0.0)


@rule(aten.rsqrt.default)
def _rsqrt(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary("reciprocal", low._unary("sqrt", args[0]))


@rule(aten.tan.default)
def _tan(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    sine, cosine = low._unary("sin", x), low._unary("cos", x)
    strides = dense(x.shape)
    return Value(low.builder.binary("divide", sine.ref, strides, cosine.ref, strides, x.shape), x.shape, x.kind)


@rule(aten.sinh.default, aten.cosh.default)
def _hyperbolic(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    sinh = node.target is aten.sinh.default
    function = "expm1" if sinh else "exp"
    up, down = low._unary(function, args[0]), low._unary(function, low.affine(args[0], -1.0, 0.0))
    return low.affine(_with(low, "subtract" if sinh else "add", up, down), 0.5, 0.0)


@rule(aten.asin.default, aten.acos.default)
def _arc(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    other = low._unary("sqrt", low.affine(low._unary("square", x), -1.0, 1.0))
    sine = low._unary("atan", _with(low, "divide", x, other))
    return sine if node.target is aten.asin.default else low.affine(sine, -1.0, pi / 2)


@rule(aten.acosh.default)
def _acosh(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    root = low._unary("sqrt", low.affine(low._unary("square", x), 1.0, -1.0))
    return low._unary("log", _with(low, "add", root, x))


@rule(aten.atanh.default)
def _atanh(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    up, down = low._unary("log1p", args[0]), low._unary("log1p", low.affine(args[0], -1.0, 0.0))
    return low.affine(_with(low, "subtract", up, down), 0.5, 0.0)


@rule(aten.log2.default, aten.log10.default)
def _logarithm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low.affine(low._unary("log", args[0]), 1 / log(2.0 if node.target is aten.log2.default else 10.0), 0.0)


@rule(aten.exp2.default)
def _exp2(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary("exp", low.affine(args[0], log(2.0), 0.0))


@rule(aten.erfc.default)
def _erfc(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low.affine(low._unary("erf", args[0]), -1.0, 1.0)


@rule(aten.leaky_relu.default)
def _leaky_relu(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary("leaky_relu", args[0], [float(_get(args, keywords, 1, "negative_slope", 0.01))])


@rule(aten.elu.default)
def _elu(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    alpha, scale, inner = (
        float(_get(args, keywords, i, name, 1.0)) for i, name in enumerate(("alpha", "scale", "input_scale"), 1)
    )
    return low._unary("elu", args[0], [alpha * scale, scale, inner])


@rule(aten.celu.default)
def _celu(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    alpha = float(_get(args, keywords, 1, "alpha", 1.0))
    return low._unary("elu", args[0], [alpha, 1.0, 1 / alpha])


@rule(aten.gelu.default)
def _gelu(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary("gelu_tanh" if _get(args, keywords, 1, "approximate", "none") == "tanh" else "gelu", args[0])


@rule(aten.softplus.default)
def _softplus(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    beta, threshold = (float(_get(args, keywords, i, name, d)) for i, name, d in ((1, "beta", 1), (2, "threshold", 20)))
    return low._unary("softplus", args[0], [beta, threshold])


@rule(aten.hardtanh.default, aten.clamp.default)
def _clamp(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    hard = node.target is aten.hardtanh.default
    least = _get(args, keywords, 1, "min_val" if hard else "min", -1.0 if hard else None)
    most = _get(args, keywords, 2, "max_val" if hard else "max", 1.0 if hard else None)
    least = float("-inf") if least is None else float(least)
    return low._unary("clamp", args[0], [least, float("inf") if most is None else float(most)])


@rule(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor)
def _clamp_by_tensors(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    x, least, most = args[0], _get(args, keywords, 1, "min", None), _get(args, keywords, 2, "max", None)
    if node.target is aten.clamp_max.Tensor:
        least, most = None, _get(args, keywords, 1, "max", None)
    x = x if least is None else low.combine("maximum", x, least, kind, shape)
    return x if most is None else low.combine("minimum", x, most, kind, shape)


@rule(aten.clamp_min.default)
def _clamp_min(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._unary("clamp", args[0], [float(args[1]), float("inf")])


@rule(aten.pow.Tensor_Scalar)
def _pow(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    power = float(args[1])
    named = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -1.0: "reciprocal"}
    if power == 1.0:
        return args[0]
    return low._unary(named[power], args[0]) if power in named else low._unary("power", args[0], [power])


@rule(aten.pow.Scalar)
def _pow_of_number(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    if not float(args[0]) > 0:
        raise NotLowered(f"the base must be positive, got {args[0]}")
    return low._unary("exp", low.affine(args[1], log(float(args[0])), 0.0))


# ---- masks: 1 where something holds, else 0 --------------------------------------------------------------------------

COMPARISONS = {
    getattr(getattr(aten, name), kind): name
    for name in ("gt", "lt", "ge", "le", "eq", "ne")
    for kind in ("Scalar", "Tensor")
}


@rule(*COMPARISONS)
def _comparison(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    name, (a, b) = COMPARISONS[node.target], args
    if name in ("lt", "le"):
        name, a, b = "gt" if name == "lt" else "ge", b, a
    if name in ("gt", "ge"):
        return low.combine("greater" if name == "gt" else "greater_equal", a, b, kind, shape)
    neither = [low.combine("greater_equal", *pair, kind, shape) for pair in ((a, b), (b, a))]
    equal = _with(low, "multiply", *neither)
    return equal if name == "eq" else low.affine(equal, -1.0, 1.0)


@rule(aten.isnan.default)
def _isnan(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    return low.affine(_with(low, "greater_equal", x, x), -1.0, 1.0)


LOGIC = {
    aten.logical_and.default: "multiply",
    aten.bitwise_and.Tensor: "multiply",
    aten.logical_or.default: "maximum",
    aten.bitwise_or.Tensor: "maximum",
    aten.logical_xor.default: "subtract",
    aten.bitwise_xor.Tensor: "subtract",
}


@rule(*LOGIC, aten.logical_not.default, aten.bitwise_not.default)
def _logic(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    if any(x.meta["val"].dtype != torch.bool for x in node.all_input_nodes):
        raise NotLowered("it is of numbers, not of comparisons")
    kind, shape = low.classify(node.meta["val"])
    target: Any = node.target
    function = LOGIC.get(target)
    if function is None:
        return low.affine(args[0], -1.0, 1.0)
    out = low.combine(function, args[0], args[1], kind, shape)
    return low._unary("abs", out) if function == "subtract" else out


@rule(aten.where.self)
def _where(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    """What is not chosen is left out, not multiplied by 0, as it may be infinite."""
    kind, shape = low.classify(node.meta["val"])
    mask = low.value(args[0])
    chosen = low.combine("keep", args[1], mask, kind, shape)
    other = low.combine("keep", args[2], low.affine(mask, -1.0, 1.0), kind, shape)
    return _with(low, "add", chosen, other)


@rule(aten.sign.default)
def _sign(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    up, down = low.combine("greater", x, 0.0, x.kind, x.shape), low.combine("greater", 0.0, x, x.kind, x.shape)
    return _with(low, "subtract", up, down)


# ---- where elements are ----------------------------------------------------------------------------------------------


@rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    x = args[0]
    if isinstance(x, Filled):
        return Filled(x.number, shape, kind)
    rank = len(x.shape) + (x.kind == BATCHED)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in args[1]]
    else:
        first, second = (d % rank for d in (args[1:] if node.target is aten.transpose.int else (0, 1)))
        order[first], order[second] = order[second], order[first]
    if x.kind != FREE:
        if order[0] != 0:
            raise NotLowered("it moves the batch out of the first dimension: keep samples along the first")
        if x.kind == BATCHED:
            order = [d - 1 for d in order[1:]]
    value = low.value(x)
    strides = dense(value.shape)
    out = low.builder.buffer(shape)
    low.builder.move(value.ref, tuple(strides[d] for d in order), out, dense(shape), shape, "permute")
    return Value(out, shape, kind)


@rule(aten.expand.default)
def _expand(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    x = args[0]
    if isinstance(x, Value) and x.kind == FREE and kind == BATCHED and x.shape == (1, *shape):
        return Value(x.ref, shape, kind)
    return low._broadcast(x, kind, shape)


def _sliced(low: Lowering, x: Operand, d: int, start: int, count: int, step: int) -> Operand:
    shape = (*x.shape[:d], count, *x.shape[d + 1 :])
    if isinstance(x, Filled):
        return Filled(x.number, shape, x.kind)
    value = low.value(x)
    strides = dense(value.shape)
    first = Ref(value.ref.buffer, value.ref.offset + start * strides[d])
    if step == 1 and prod(shape[:d]) == 1:
        return Value(first, shape, x.kind)
    out = low.builder.buffer(shape)
    chosen = tuple(stride * (step if i == d else 1) for i, stride in enumerate(strides))
    low.builder.move(first, chosen, out, dense(shape), shape, "slice")
    return Value(out, shape, x.kind)


@rule(aten.slice.Tensor)
def _slice(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = args[0]
    along, start, end, step = (
        _get(args, keywords, i, name, default)
        for i, (name, default) in enumerate((("dim", 0), ("start", None), ("end", None), ("step", 1)), 1)
    )
    rank = len(x.shape) + (x.kind == BATCHED)
    if x.kind != FREE and along % rank == 0:
        if start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= 2**31)):
            return x
        raise NotLowered("it takes some samples of the batch: f must treat them all alike")
    d = low.dimension(x, along)
    first, last, _ = slice(start, end, step).indices(x.shape[d])
    return _sliced(low, x, d, first, max(0, -(-(last - first) // step)), step)


def _chosen(low: Lowering, x: Operand, d: int, numbers: Sequence[int]) -> Operand:
    """The elements with these numbers along dimension ``d``: a layer for each run of equal steps."""
    shape = (*x.shape[:d], len(numbers), *x.shape[d + 1 :])
    if isinstance(x, Filled):
        return Filled(x.number, shape, x.kind)
    value = low.value(x)
    out, strides, to = low.builder.buffer(shape), dense(value.shape), dense(shape)
    first = 0
    while first < len(numbers):
        end = first + 1
        step = numbers[end] - numbers[first] if end < len(numbers) else 1
        while step >= 0 and end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        source = Ref(value.ref.buffer, value.ref.offset + numbers[first] * strides[d])
        steps = tuple(stride * max(step, 0) if i == d else stride for i, stride in enumerate(strides))
        run = (*shape[:d], end - first, *shape[d + 1 :])
        low.builder.move(source, steps, Ref(out.buffer, first * to[d]), to, run, "choose")
        first = end
    return Value(out, shape, x.kind)


@rule(aten.flip.default)
def _flip(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = args[0]
    for along in args[1]:
        d = low.dimension(x, along)
        x = _chosen(low, x, d, range(x.shape[d])[::-1])
    return x


@rule(aten.roll.default)
def _roll(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, shifts, dims = args[0], args[1], _get(args, keywords, 2, "dims", [])
    if not dims:
        raise NotLowered("it rolls all elements, of all samples: name the dimensions of a sample")
    for shift, along in zip(shifts, dims):
        d = low.dimension(x, along)
        x = _chosen(low, x, d, [(i - shift) % x.shape[d] for i in range(x.shape[d])])
    return x


def _numbers(low: Lowering, x: Operand, size: int) -> list[int]:
    """The numbers that a static index holds, of elements along a dimension of ``size``."""
    value = low.known(x.node) if isinstance(x, Static) else None
    if value is None:
        raise NotLowered(
            "its index is not known before the solve, as a buffer or a value may change: use a list of numbers, or @"
            " with a matrix of zeros and ones"
        )
    if value.dtype == torch.bool:
        value = value.nonzero().flatten()
    return [int(n) % size for n in value.flatten()]


@rule(aten.index_select.default)
def _index_select(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    d = low.dimension(args[0], args[1])
    return _chosen(low, args[0], d, _numbers(low, args[2], args[0].shape[d]))


@rule(aten.index.Tensor)
def _index(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, indices = args[0], args[1]
    used = [along for along, index in enumerate(indices) if index is not None]
    across = max(len(indices[along].shape) for along in used)
    for k, along in enumerate(used):
        shape = (1,) * (across - len(indices[along].shape)) + indices[along].shape
        if across != len(used) or used[-1] - used[0] != across - 1 or any(n != 1 for n in shape[:k] + shape[k + 1 :]):
            raise NotLowered(
                "it chooses single elements of several dimensions: choose along one dimension after another"
            )
    for along in used:
        d = low.dimension(x, along)
        x = _chosen(low, x, d, _numbers(low, indices[along], x.shape[d]))
    return x


@rule(aten.diagonal.default)
def _diagonal(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    offset, first, second = (
        _get(args, keywords, i, name, i - 2 if i > 1 else 0) for i, name in enumerate(("offset", "dim1", "dim2"), 1)
    )
    x = low.value(args[0])
    kind, shape = low.classify(node.meta["val"])
    d, e = low.dimension(x, first), low.dimension(x, second)
    strides = dense(x.shape)
    start = Ref(x.ref.buffer, x.ref.offset + (offset * strides[e] if offset > 0 else -offset * strides[d]))
    kept = tuple(stride for i, stride in enumerate(strides) if i not in (d, e))
    out = low.builder.buffer(shape)
    low.builder.move(start, (*kept, strides[d] + strides[e]), out, dense(shape), shape, "diagonal")
    return Value(out, shape, kind)


@rule(aten.copy.default)
def _copy(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    return low._broadcast(args[1], *low.classify(node.meta["val"]))


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    """x but for some elements along a dimension: both put together, so that what is replaced has no gradient."""
    x, part = args[:2]
    if node.target is aten.select_scatter.default:
        d = low.dimension(x, args[2])
        replaced = [args[3] % x.shape[d]]
    else:
        along, start, end, step = (
            _get(args, keywords, i, name, default)
            for i, (name, default) in enumerate((("dim", 0), ("start", None), ("end", None), ("step", 1)), 2)
        )
        if x.kind != FREE and along % (len(x.shape) + (x.kind == BATCHED)) == 0:
            if start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= 2**31)):
                return low._broadcast(part, x.kind, x.shape)
            raise NotLowered("it writes to some samples of the batch: f must treat them all alike")
        d = low.dimension(x, along)
        replaced = list(range(*slice(start, end, step).indices(x.shape[d])))
    if not replaced:
        return x
    shape = (*x.shape[:d], len(replaced), *x.shape[d + 1 :])
    part = low.value(low._as_shape(part, x.kind, shape))
    kept = [i for i in range(x.shape[d]) if i not in replaced]
    pieces = [low.value(_chosen(low, x, d, kept)), part] if kept else [part]
    places = {number: place for place, number in enumerate([*kept, *replaced])}
    both = _joined(low, pieces, d)
    return _chosen(low, both, d, [places[i] for i in range(x.shape[d])])


def _joined(low: Lowering, pieces: Sequence[Value], d: int) -> Value:
    """Values of one kind beside each other along dimension ``d``."""
    shape = list(pieces[0].shape)
    shape[d] = sum(piece.shape[d] for piece in pieces)
    out, strides, start = low.builder.buffer(shape), dense(tuple(shape)), 0
    for piece in pieces:
        ref = Ref(out.buffer, start * strides[d])
        low.builder.move(piece.ref, dense(piece.shape), ref, strides, piece.shape, "cat")
        start += piece.shape[d]
    return Value(out, tuple(shape), pieces[0].kind)


@rule(aten.repeat.default)
def _repeat(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    x, times = args[0], list(args[1])
    if isinstance(x, Filled):
        return Filled(x.number, shape, kind)
    own = list(x.shape)
    if kind == MERGED or x.kind == MERGED or (x.kind == BATCHED and (times[0] != 1 or len(times) != len(own) + 1)):
        raise NotLowered("it repeats samples, so they would mix: repeat inside a sample")
    if kind == BATCHED:
        times = times[1:]
        if x.kind == FREE and len(own) > len(times):
            if own[0] != 1:
                raise NotLowered("it repeats something of one fixed batch size")
            own = own[1:]
    own = [1] * (len(times) - len(own)) + own
    value = low.value(x)
    strides = dense(tuple(own))
    parts = tuple(size for pair in zip(times, own) for size in pair)
    steps = tuple(step for stride in strides for step in (0, stride))
    out = low.builder.buffer(shape)
    low.builder.move(value.ref, steps, out, dense(parts), parts, "repeat")
    return Value(out, shape, kind)


@rule(aten.select.int)
def _select(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, along, index = args
    d = low.dimension(x, along)
    kind, shape = low.classify(node.meta["val"])
    return low._as_shape(_sliced(low, x, d, index % x.shape[d], 1, 1), kind, shape)


@rule(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int)
def _split(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = args[0]
    unbind = node.target is aten.unbind.int
    d = low.dimension(x, _get(args, keywords, 1 if unbind else 2, "dim", 0))
    parts, start = [], 0
    for example in node.meta["val"]:
        kind, shape = low.classify(example)
        count = 1 if unbind else shape[d]
        parts.append(low._as_shape(_sliced(low, x, d, start, count, 1), kind, shape))
        start += count
    return parts


@rule(aten.cat.default)
def _cat(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    pieces, along = args[0], _get(args, keywords, 1, "dim", 0)
    kind, shape = low.classify(node.meta["val"])
    whole = Filled(0.0, shape, kind)
    d = low.dimension(whole, along)
    out, strides, start = low.builder.buffer(shape), dense(shape), 0
    for piece in pieces:
        if piece.kind != kind:
            raise NotLowered("it puts samples beside something of one fixed batch size: expand that to the batch")
        if prod(piece.shape) == 0:
            continue
        ref = Ref(out.buffer, start * strides[d])
        if isinstance(piece, Filled):
            one = low.builder.unary("affine", Ref(TIME), (), [0.0, piece.number])
            low.builder.move(one, (0,) * len(shape), ref, strides, piece.shape, "cat")
        else:
            low.builder.move(low.operand(piece), dense(piece.shape), ref, strides, piece.shape, "cat")
        start += piece.shape[d]
    return Value(out, shape, kind)


@rule(aten.constant_pad_nd.default)
def _pad(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, pads = args[0], args[1]
    number = float(_get(args, keywords, 2, "value", 0.0))
    rank = len(x.shape) + (x.kind == BATCHED)
    for i in range(0, len(pads), 2):
        if pads[i] == 0 == pads[i + 1]:
            continue
        d = low.dimension(x, rank - 1 - i // 2)
        if min(pads[i], pads[i + 1]) < 0:
            raise NotLowered("it pads by less than nothing")
        value = low.value(x)
        shape = (*value.shape[:d], value.shape[d] + pads[i] + pads[i + 1], *value.shape[d + 1 :])
        out, strides = low.builder.buffer(shape), dense(shape)
        one = low.builder.unary("affine", Ref(TIME), (), [0.0, number])
        for start, count in ((0, pads[i]), (pads[i] + value.shape[d], pads[i + 1])):
            if count:
                edge = (*value.shape[:d], count, *value.shape[d + 1 :])
                low.builder.move(one, (0,) * len(shape), Ref(out.buffer, start * strides[d]), strides, edge, "pad")
        inner = Ref(out.buffer, pads[i] * strides[d])
        low.builder.move(value.ref, dense(value.shape), inner, strides, value.shape, "pad")
        x = Value(out, shape, value.kind)
    return x


def _along(low: Lowering, x: Operand, along: Any) -> set[int]:
    """Dimensions of a sample; all that a value has where none are named."""
    rank = len(x.shape) + (x.kind == BATCHED)
    if along is None or along == []:
        along = range(rank)
    return {low.dimension(x, d) for d in (along if isinstance(along, (list, tuple, range)) else [along])}


def _reduced(low: Lowering, x: Operand, dims: set[int], function: str) -> Value:
    """The sum, mean or largest of ``x`` along some dimensions, which stay as 1; of "largest" without a gradient."""
    value = low.value(x)
    kept = tuple(1 if d in dims else size for d, size in enumerate(value.shape))
    out = low.builder.buffer(kept)
    strides = tuple(0 if d in dims else stride for d, stride in enumerate(dense(kept)))
    scale = 1 / prod(value.shape[d] for d in dims) if function == "mean" else 1.0
    mode = MOVES.index("largest" if function == "largest" else "sum")
    low.builder.move(value.ref, dense(value.shape), out, strides, value.shape, function, scale=scale, function=mode)
    return Value(out, kept, value.kind)


def _with(low: Lowering, function: str, a: Value, b: Value) -> Value:
    """function(a, b), b broadcast to a."""
    out = low.builder.binary(function, a.ref, dense(a.shape), b.ref, low.spread(b, a.kind, a.shape), a.shape)
    return Value(out, a.shape, a.kind)


def _exponentials(low: Lowering, x: Operand, dims: set[int]) -> tuple[Value, Value, Value]:
    """The largest m of x, e^(x - m), and its sum: of which nothing depends on m, so that it needs no gradient."""
    value = low.value(x)
    peak = _reduced(low, value, dims, "largest")
    powers = low._unary("exp", _with(low, "subtract", value, peak))
    return peak, powers, _reduced(low, powers, dims, "sum")


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    _, powers, total = _exponentials(low, args[0], _along(low, args[0], args[1]))
    return _with(low, "divide", powers, total)


@rule(aten._log_softmax.default)
def _log_softmax(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    peak, _, total = _exponentials(low, x, _along(low, x, args[1]))
    return _with(low, "subtract", _with(low, "subtract", x, peak), low._unary("log", total))


@rule(aten.logsumexp.default)
def _logsumexp(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    peak, _, total = _exponentials(low, args[0], _along(low, args[0], args[1]))
    return low._as_shape(_with(low, "add", low._unary("log", total), peak), *low.classify(node.meta["val"]))


@rule(aten.linalg_vector_norm.default)
def _vector_norm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    order = float(_get(args, keywords, 1, "ord", 2))
    if order not in (1, 2):
        raise NotLowered(f"it is of order {order:g}; 1 and 2 lower")
    dims = _along(low, args[0], _get(args, keywords, 2, "dim", None))
    total = _reduced(low, low._unary("square" if order == 2 else "abs", args[0]), dims, "sum")
    if order == 2:  # the root of 1 in place of that of 0, whose slope is infinite: at 0 the gradient is 0
        nothing = low.affine(low.combine("greater", total, 0.0, total.kind, total.shape), -1.0, 1.0)
        root = low._unary("sqrt", _with(low, "add", total, low.value(nothing)))
        total = _with(low, "keep", root, total)
    return low._as_shape(total, *low.classify(node.meta["val"]))


@rule(aten.var.correction, aten.var.dim, aten.var_mean.correction)
def _variance(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = low.value(args[0])
    dims = _along(low, x, _get(args, keywords, 1, "dim", None))
    count = prod(x.shape[d] for d in dims)
    if node.target is aten.var.dim:
        correction = float(bool(_get(args, keywords, 2, "unbiased", True)))
    else:
        given = keywords.get("correction")
        correction = 1.0 if given is None else float(given)
    mean = _reduced(low, x, dims, "mean")
    spread = _reduced(low, low._unary("square", _with(low, "subtract", x, mean)), dims, "mean")
    variance = low.affine(spread, count / (count - correction), 0.0)
    if node.target is aten.var_mean.correction:
        return [low._as_shape(out, *low.classify(example)) for out, example in zip((variance, mean), node.meta["val"])]
    return low._as_shape(variance, *low.classify(node.meta["val"]))


@rule(aten.sum.dim_IntList, aten.mean.dim)
def _sum(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    dims = _along(low, args[0], _get(args, keywords, 1, "dim", None))
    out = _reduced(low, args[0], dims, "mean" if node.target is aten.mean.dim else "sum")
    return Value(out.ref, shape, kind)


@rule(aten.sum.default, aten.mean.default)
def _sum_of_all(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    raise NotLowered("it sums over the batch, so samples would mix: name the dimensions of a sample, dim=(1, ...)")


# ---- products --------------------------------------------------------------------------------------------------------


def _matrix(low: Lowering, x: Static) -> tuple[int, bool]:
    """The weight that a static matrix is, and whether it is that transposed."""
    node = x.node
    swapped = (
        node.op == "call_function"
        and (
            (node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2]))  # type: ignore[arg-type]
            or node.target is aten.t.default
            or (node.target is aten.transpose.int and sorted(d % 2 for d in node.args[1:]) == [0, 1])  # type: ignore[operator]
        )
    )
    if swapped:
        return low.number(node.args[0]), True  # type: ignore[arg-type]
    return low.number(node), False


def _linear(low: Lowering, x: Operand, weight: Static, bias: Static | None, outputs_first: bool) -> tuple[Ref, Shape]:
    """x Wᵀ + bias along the last dimension, for W [out, in]; of W [in, out] where not ``outputs_first``."""
    number, swapped = _matrix(low, weight)
    outputs, inputs = weight.shape if outputs_first else weight.shape[::-1]
    row, column = (inputs, 1) if outputs_first != swapped else (1, outputs)
    value = low.value(x)
    shape = (*value.shape[:-1], outputs)
    if bias is not None and bias.shape != (outputs,):
        raise NotLowered("its bias is not a vector")
    own = -1 if bias is None else low.number(bias.node)
    return low.builder.linear(value.ref, shape, inputs, number, own, row, column), shape


@rule(aten.linear.default)
def _linear_rule(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, weight = args[:2]
    bias = _get(args, keywords, 2, "bias", None)
    kind, shape = low.classify(node.meta["val"])
    if not isinstance(weight, Static) or len(weight.shape) != 2 or not (bias is None or isinstance(bias, Static)):
        if len(weight.shape) != 2 or weight.kind != FREE or x.kind == FREE:
            raise NotLowered("its weight differs from sample to sample: use torch.matmul or torch.einsum")
        rest = list(range(len(x.shape) - 1))
        product = _contraction(low, [(x, [*rest, -1]), (weight, [-2, -1])], [*rest, -2], kind)
        return product if bias is None else low.combine("add", product, bias, kind, shape)
    out, _ = _linear(low, x, weight, bias, True)
    return Value(out, shape, kind)


@rule(aten.addmm.default)
def _addmm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    bias, x, weight = args[:3]
    kind, shape = low.classify(node.meta["val"])
    if keywords.get("beta", 1) != 1 or keywords.get("alpha", 1) != 1:
        raise NotLowered("beta and alpha are not 1")
    if isinstance(weight, Static) and isinstance(bias, Static) and bias.shape == shape[-1:] and x.kind != FREE:
        return Value(_linear(low, x, weight, bias, False)[0], shape, kind)
    product = _product(low, x, weight, kind, shape)
    strides = low.spread(bias, kind, shape)
    out = low.builder.binary("add", low.operand(bias), strides, product.ref, dense(shape), shape)
    return Value(out, shape, kind)


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default)
def _matmul(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    return _product(low, args[0], args[1], kind, shape)


def _product(low: Lowering, a: Operand, b: Operand, kind: str, shape: Shape) -> Value:
    """torch.matmul of two values or weights."""
    a_rank, b_rank = (len(x.shape) + (x.kind == BATCHED) for x in (a, b))
    if isinstance(b, Static) and b_rank == 2 and a_rank >= 2:
        return Value(_linear(low, a, b, None, False)[0], shape, kind)
    if MERGED in (a.kind, b.kind):
        raise NotLowered("it multiplies what has the batch and another dimension in one: keep them apart")
    if b.kind == BATCHED and (b_rank < 3 or (a.kind == FREE and a_rank > 2)):
        raise NotLowered("it contracts the batch, so samples would mix")
    a_dims, b_dims = list(a.shape), list(b.shape)
    a_steps, b_steps = list(dense(a.shape)), list(dense(b.shape))
    if a_rank == 1 or (a.kind == BATCHED and a_rank == 2):  # one row
        if a.kind == BATCHED and b.kind == BATCHED:
            raise NotLowered("it multiplies every sample by every other")
        a_dims, a_steps = [1, *a_dims], [0, *a_steps]
    if b_rank == 1:
        b_dims, b_steps = [*b_dims, 1], [*b_steps, 0]
    lead_a, lead_b = a_dims[:-2], b_dims[:-2]
    lead = lead_a if len(lead_a) >= len(lead_b) else lead_b
    if any(x not in ([], lead) for x in (lead_a, lead_b)) or len(a_dims) < 2 or len(b_dims) < 2:
        raise NotLowered("its leading dimensions are not alike: expand them")
    batch = prod(lead)
    rows, depth, columns = a_dims[-2], a_dims[-1], b_dims[-1]
    step_a, step_b = (prod(dims[-2:]) if own else 0 for dims, own in ((a_dims, lead_a), (b_dims, lead_b)))
    out = low.builder.buffer((batch, rows, columns))
    numbers = [batch, rows, depth, columns, step_a, *a_steps[-2:], step_b, *b_steps[-2:]]
    name = f"matmul {rows}×{depth}×{columns}"
    work = batch * rows * depth * columns
    low.builder.add("matmul", low.operand(a), out, numbers, name, shape, work, b=low.operand(b))
    return Value(out, shape, kind)


Labelled = tuple[Operand, list[Any]]  # a label for each dimension of a sample


def _summed(low: Lowering, x: Labelled, wanted: list[Any]) -> Labelled:
    """x with its dimensions in the order of ``wanted``, the sum over all others, the diagonal of labels that repeat."""
    operand, labels = x
    if labels == wanted:
        return x
    size = dict(zip(labels, operand.shape))
    order = [*wanted, *(label for label in size if label not in wanted)]
    value, shape = low.value(operand), tuple(size[label] for label in wanted)
    strides = dense(value.shape)
    steps = tuple(sum(s for s, own in zip(strides, labels) if own == label) for label in order)
    out, whole = low.builder.buffer(shape), tuple(size[label] for label in order)
    to = (*dense(shape), *[0] * (len(order) - len(wanted)))
    low.builder.move(value.ref, steps, out, to, whole, "permute", function=MOVES.index("sum"))
    return Value(out, shape, value.kind), wanted


def _contraction(low: Lowering, operands: list[Labelled], wanted: list[Any], kind: str) -> Value:
    """Einstein's sum: products of operands over equal labels, summed over labels that are not ``wanted``."""
    if len(operands) > 2:
        first, second, *others = operands
        later = {label for _, labels in others for label in labels}.union(wanted)
        inner = [label for label in dict.fromkeys([*first[1], *second[1]]) if label in later]
        both = BATCHED if BATCHED in (first[0].kind, second[0].kind) else FREE
        return _contraction(low, [(_contraction(low, [first, second], inner, both), inner), *others], wanted, kind)
    if len(operands) == 1:
        return replace(low.value(_summed(low, operands[0], wanted)[0]), kind=kind)
    if isinstance(operands[0][0], Static):
        operands = operands[::-1]
    (a, a_labels), (b, b_labels) = operands
    size = {**dict(zip(a_labels, a.shape)), **dict(zip(b_labels, b.shape))}
    if any(size[label] != n for x, labels in operands for label, n in zip(labels, x.shape)):
        raise NotLowered("a dimension of one operand is 1, that of another is not: expand it")
    batch = [label for label in size if label in a_labels and label in b_labels and label in wanted]
    rows = [label for label in size if label in a_labels and label not in b_labels and label in wanted]
    depth = [label for label in size if label in a_labels and label in b_labels and label not in wanted]
    columns = [label for label in size if label not in a_labels and label in wanted]

    def count(labels: list[Any]) -> int:
        return prod(size[label] for label in labels)

    a = _summed(low, (a, a_labels), [*batch, *rows, *depth])[0]
    if isinstance(b, Static) and not batch and len(set(b_labels)) == len(b_labels) == len(columns + depth):
        order = [b_labels.index(label) for label in [*columns, *depth]]
        turned = low.derived(aten.permute.default, (b.node, order), tuple(b.shape[d] for d in order))
        shape = (count(columns), count(depth))
        weight = low.derived(aten.reshape.default, (turned.node, list(shape)), shape)
        flat = replace(low.value(a), shape=(count(rows), count(depth)))
        out = _linear(low, flat, weight, None, True)[0]
    else:
        b = low.value(_summed(low, (b, b_labels), [*batch, *depth, *columns])[0])
        n = [count(labels) for labels in (batch, rows, depth, columns)]
        out = low.builder.buffer((n[0], n[1], n[3]))
        numbers = [*n, n[1] * n[2], n[2], 1, n[2] * n[3], n[3], 1]
        name, work = f"matmul {n[1]}×{n[2]}×{n[3]}", prod(n)
        low.builder.add("matmul", low.operand(a), out, numbers, name, (n[0], n[1], n[3]), work, b=b.ref)
    labels = [*batch, *rows, *columns]
    made = Value(out, tuple(size[label] for label in labels), kind)
    return replace(low.value(_summed(low, (made, labels), wanted)[0]), kind=kind)


@rule(aten.einsum.default)
def _einsum(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, _ = low.classify(node.meta["val"])
    equation = args[0].replace(" ", "")
    if "." in equation:
        raise NotLowered("it has an ellipsis: name all dimensions")
    sides, _, out = equation.partition("->")
    terms = sides.split(",")
    if "->" not in equation:
        out = "".join(sorted(c for c in set(sides) - {","} if sides.count(c) == 1))
    batches = {term[0] for term, x in zip(terms, args[1]) if x.kind == BATCHED}
    if any(x.kind == MERGED for x in args[1]) or len(batches) != 1:
        raise NotLowered("samples would mix: let all states begin with the letter of the batch")
    (batch,) = batches
    operands = [(x, list(term[1:] if x.kind == BATCHED else term)) for term, x in zip(terms, args[1])]
    if out[:1] != batch or any(batch in labels for labels in [out[1:], *(labels for _, labels in operands)]):
        raise NotLowered("samples would mix: the result, as all states, must begin with the letter of the batch")
    return _contraction(low, operands, list(out[1:]), kind)


@rule(aten.bilinear.default)
def _bilinear(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    (a, b, weight), bias = args[:3], _get(args, keywords, 3, "bias", None)
    rest = list(range(len(shape) - 1))
    operands: list[Labelled] = [(a, [*rest, "a"]), (weight, ["out", "a", "b"]), (b, [*rest, "b"])]
    out = _contraction(low, operands, [*rest, "out"], kind)
    return out if bias is None else low.combine("add", out, bias, kind, shape)


@rule(aten.scaled_dot_product_attention.default)
def _attention(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    kind, shape = low.classify(node.meta["val"])
    q, k, v = args[:3]
    mask, dropout, causal = (
        _get(args, keywords, i, name, default)
        for i, (name, default) in enumerate((("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)), 3)
    )
    if mask is not None or dropout or causal or len({x.shape[:-2] for x in (q, k, v)}) > 1:
        raise NotLowered("it has a mask, dropout or groups of heads: write it with @ and softmax")
    scale = keywords.get("scale")
    rest = list(range(len(shape) - 2))
    scores = _contraction(low, [(q, [*rest, "q", "d"]), (k, [*rest, "k", "d"])], [*rest, "q", "k"], kind)
    scaled = low.affine(scores, q.shape[-1] ** -0.5 if scale is None else float(scale), 0.0)
    _, powers, total = _exponentials(low, scaled, {len(shape) - 1})
    weights = _with(low, "divide", powers, total)
    return _contraction(low, [(weights, [*rest, "q", "k"]), (v, [*rest, "k", "d"])], [*rest, "q", "d"], kind)


@rule(aten.avg_pool2d.default)
def _avg_pool(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    """As a convolution of each channel by itself."""
    x, kernel = args[0], list(args[1])
    kernel = kernel * 2 if len(kernel) == 1 else kernel
    stride, padding, _, include, divisor = (
        _get(args, keywords, i, name, default)
        for i, (name, default) in enumerate(
            (
                ("stride", []),
                ("padding", [0, 0]),
                ("ceil_mode", False),
                ("count_include_pad", True),
                ("divisor_override", None),
            ),
            2,
        )
    )
    if any(n != 1 for n in (stride or kernel)):
        raise NotLowered("its stride is not 1, so it changes the size of a map; a state keeps its size anyway")
    if any(padding) and not include:
        raise NotLowered("it counts no padding: use count_include_pad=True")
    weight = (x.shape[0], 1, *kernel)
    number = 1.0 / (divisor or prod(kernel))
    part = low.derived(aten.full.default, (list(weight), number), weight, dtype=torch.float64)
    padding = list(padding) * 2 if len(padding) == 1 else list(padding)
    return _convolution(low, x, part, None, padding, [1, 1], x.shape[0], *low.classify(node.meta["val"]))


@rule(aten.convolution.default, aten.conv2d.default, aten.conv1d.default)
def _conv(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, weight = args[:2]
    general = node.target is aten.convolution.default
    bias = _get(args, keywords, 2, "bias", None)
    kind, shape = low.classify(node.meta["val"])
    if not isinstance(weight, Static) or not (bias is None or isinstance(bias, Static)):
        raise NotLowered("its weight depends on state or time")
    planes = len(weight.shape) - 2
    if x.kind == MERGED:
        raise NotLowered(
            "samples and channels are in one dimension: keep them apart, and convolve with groups=channels"
        )
    if planes not in (1, 2):
        raise NotLowered(f"it has {planes} dimensions of space; 1 and 2 lower")
    if general and args[6]:
        raise NotLowered("it is transposed, which changes the size of a map: use Conv2d with padding")
    stride, padding, dilation = (
        _get(args, keywords, i, name, default)
        for i, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1)), 3)
    )
    groups = _get(args, keywords, 8 if general else 6, "groups", 1)

    def pair(value: Any) -> list[int]:
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = numbers * planes if len(numbers) == 1 else numbers
        return [int(n) for n in numbers]

    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    if any(n != 1 for n in stride):
        raise NotLowered("its stride is not 1, so it changes the size of a map; a state keeps its size anyway")
    return _convolution(low, x, weight, bias, padding, dilation, groups, kind, shape)


def _convolution(
    low: Lowering,
    x: Operand,
    weight: Static,
    bias: Static | None,
    padding: list[int],
    dilation: list[int],
    groups: int,
    kind: str,
    shape: Shape,
) -> Value:
    """Of stride 1, over one or two dimensions of space."""
    kernel, planes = list(weight.shape[2:]), len(weight.shape) - 2
    if planes == 1:
        kernel, padding, dilation = [1, *kernel], [0, *padding], [1, *dilation]
    if any(p > (k - 1) * d for p, k, d in zip(padding, kernel, dilation)):
        raise NotLowered("its padding is wider than its kernel reaches: pad by at most dilation * (kernel - 1)")
    value = low.value(x)
    channels, *space = value.shape
    height, width = [1, *space] if planes == 1 else space
    own = low.number(weight.node), -1 if bias is None else low.number(bias.node)
    out = low.builder.conv(value.ref, (channels, height, width), shape, kernel, padding, dilation, groups, *own)
    return Value(out, shape, kind)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _norm(
    low: Lowering, x: Operand, groups: int, weight: Any, bias: Any, inner: int, count: int, eps: float, name: str
) -> Value:
    if not all(item is None or isinstance(item, Static) for item in (weight, bias)):
        raise NotLowered("its weight depends on state or time")
    value = low.value(x)
    own = [low.number(item.node) if item is not None else -1 for item in (weight, bias)]
    out = low.builder.norm(value.ref, value.shape, groups, *own, inner=inner, count=count, eps=eps, name=name)
    return Value(out, value.shape, value.kind)


@rule(aten.layer_norm.default, aten.native_layer_norm.default)
def _layer_norm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, normal = args[0], args[1]
    weight, bias = _get(args, keywords, 2, "weight", None), _get(args, keywords, 3, "bias", None)
    if len(normal) > len(x.shape) or x.kind == FREE:
        raise NotLowered("it normalises along the batch, so samples would mix")
    size = prod(normal)
    eps = float(_get(args, keywords, 4, "eps", 1e-5))
    out = _norm(low, x, prod(x.shape) // size, weight, bias, 1, size, eps, "layer norm")
    return out if node.target is aten.layer_norm.default else [out, None, None]


@rule(aten.group_norm.default, aten.native_group_norm.default)
def _group_norm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x = args[0]
    if node.target is aten.group_norm.default:
        groups, weight, bias, eps = (
            _get(args, keywords, i, name, default)
            for i, (name, default) in enumerate((("num_groups", 1), ("weight", None), ("bias", None), ("eps", 1e-5)), 1)
        )
    else:
        weight, bias, groups, eps = args[1], args[2], args[6], args[7]
    if x.kind != BATCHED:
        raise NotLowered("its input has no batch")
    channels = x.shape[0]
    out = _norm(low, x, groups, weight, bias, prod(x.shape[1:]), channels, float(eps), f"group norm, {groups} groups")
    return out if node.target is aten.group_norm.default else [out, None, None]


@rule(aten.instance_norm.default)
def _instance_norm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    x, weight, bias, mean, _, own_statistics, _, eps = args[:8]
    if not own_statistics or mean is not None:
        raise NotLowered("it has running statistics: use InstanceNorm with track_running_stats=False")
    channels = x.shape[0]
    return _norm(low, x, channels, weight, bias, prod(x.shape[1:]), channels, float(eps), "instance norm")


@rule(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(low: Lowering, node: fx.Node, args: list[Any], keywords: dict[str, Any]) -> Any:
    """Of frozen statistics: (x - mean) / sqrt(variance + eps), scaled and shifted, channel by channel."""
    x, weight, bias, mean, variance, _, eps = args[:7]
    columns = (x.shape[0], *(1 for _ in x.shape[1:]))

    def column(part: Operand) -> Value:
        return replace(low.value(part), shape=columns)

    deviation = low._unary("sqrt", low.affine(column(variance), 1.0, float(eps)))
    out = _with(low, "divide", _with(low, "subtract", low.value(x), column(mean)), deviation)
    if weight is not None:
        out = _with(low, "multiply", out, column(weight))
    if bias is not None:
        out = _with(low, "add", out, column(bias))
    return [out, None, None]
