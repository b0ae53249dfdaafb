"""Any module with solves in it as a file that needs no nodeshape, ONNX, TorchScript or .pt2, compared with it."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nodeshape._errors import UserError
from nodeshape._files import partial_path
from nodeshape._ode.unrolled import Unrolled, unrolled

#: The oldest opset the exporter writes, so that as many runtimes as possible read it, and the IR version it came with.
OPSET, IR_VERSION = 18, 8
TOLERANCE = 1e-4
#: Most evaluations of f that an unrolled stage may take, and most steps in place of error control.
MAX_ITERATIONS, MAX_STEPS = 30, 512
#: The part of the tolerance that the choice of evaluations and steps keeps to on the examples.
MARGIN = 0.25

#: The input of a looped file that says how many steps to take.
STEPS = "steps"

#: Flat inputs to flat outputs.
Run = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the module.

    Attributes:
        path: of the file.
        batch_sizes: that it was run at beside the module.
        max_difference: the largest of an output; ``tolerance`` is what was allowed.
        nodes: operations in the file.
        bytes: its size.
        stage_iterations: evaluations of f of each implicit stage; None where there is none.
        steps: in each interval, where error control chose them in the module; else None.
    """

    __module__ = "nodeshape"

    path: Path
    batch_sizes: tuple[int, ...]
    max_difference: float
    tolerance: float
    nodes: int
    bytes: int
    stage_iterations: int | None
    steps: int | None

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = [
            f"{self.path}: {self.nodes} nodes, {self.bytes / 1e6:.2f} MB; within {self.max_difference:.1e} of the"
            f" module (tolerance {self.tolerance:g}) at batch sizes {sizes}"
        ]
        if self.stage_iterations is not None:
            lines.append(f"implicit stages take {self.stage_iterations} evaluations of f each")
        if self.steps is not None:
            lines.append(f"error control became {self.steps} equal steps in each interval")
        return "\n".join(lines)


def to_onnx(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    loop: bool = False,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a module with solves in it, whatever their f and method, as ONNX that onnxruntime runs to the same numbers.

    Solves become plain operations: given steps as they are, error control as equal steps, implicit stages as a fixed
    number of evaluations of f, as few as give the outputs on the examples. The module is exported in evaluation mode.
    The file is run beside the module at several batch sizes and removed if it differs.

    Args:
        module: whose ``forward`` calls :func:`nodeshape.odeint` or modules such as :class:`nodeshape.ODEBlock`.
        example_inputs: a tensor, or a tuple of what ``forward`` takes: tensors, and tuples, lists and dictionaries of
            them. Their batch is the first dimension of the first tensor with at least two; tensors of the same first
            size share it, and it is left open in the file. Take examples of the kind that the file will see.
        path: of the file; one that is there is replaced once the new one is proven.
        loop: write one step in an ONNX ``Loop`` for each interval, instead of all steps one after the other: a smaller
            file. If all solves take the same number of steps it is an input of the file, ``steps``, int64, which may be
            left out.
        trajectory: also give the states of each solve after each step, ``trajectory``, ``[batch, steps + 1, ...]``; or
            what a module makes of each, such as the head of a classifier. Does not go with ``loop``.
        tolerance: largest allowed difference of an output.

    Returns:
        what was written and how it compares; print it. Inputs are named after the arguments of ``forward``, outputs
        ``output``, ``output_0`` ... or the keys of a dictionary.

    Raises:
        ValueError: an input or output that a file cannot have, a module that cannot be recorded, or a file that differs
            from it; nothing is written.
    """
    import onnx
    import onnxruntime

    subject = _Subject(module, example_inputs, tolerance, loop, trajectory)
    with _written(path) as partial, _quiet():
        program = torch.onnx.export(
            subject.program(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*subject.input_names, *([STEPS] if subject.default_steps else [])],
            output_names=subject.output_names,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
        proto.ir_version = IR_VERSION
        _tidy(proto.graph, subject.dimensions)
        if subject.default_steps:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(subject.default_steps), STEPS))
        onnx.checker.check_model(proto)
        onnx.save(proto, partial)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that steps may be given
        session = onnxruntime.InferenceSession(partial, options, providers=["CPUExecutionProvider"])
        taken = {x.name for x in session.get_inputs()}

        def run(inputs: list[Tensor]) -> list[Tensor]:
            named = zip(subject.input_names, inputs)
            found = session.run(None, {name: x.numpy() for name, x in named if name in taken})
            return [torch.from_numpy(x) if x.ndim else torch.tensor(x) for x in found]

        report = subject.report(Path(path), partial, sum(1 for _ in _nodes(proto.graph)), run)
    return report


to_onnx.__module__ = "nodeshape"


def to_torchscript(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a module with solves in it as TorchScript, which C++ and ``torch.jit.load`` run without nodeshape.

    Arguments, result and errors are those of :func:`to_onnx`. The loaded module takes the arguments of ``forward`` by
    position.
    """
    subject = _Subject(module, example_inputs, tolerance, False, trajectory)
    with _written(path) as partial, _quiet():
        with subject.recorded():
            traced = torch.jit.trace(subject.recordable, subject.traced_with, check_trace=False, strict=False)
        torch.jit.save(traced, partial)
        loaded = torch.jit.load(partial)
        nodes = sum(1 for node in loaded.inlined_graph.nodes() if node.kind() != "prim::Constant")
        report = subject.report(Path(path), partial, nodes, subject.structured(loaded))
    return report


to_torchscript.__module__ = "nodeshape"


def to_pt2(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a module with solves in it as a program of ``torch.export``, for ``torch.export.load`` and AOTInductor.

    Arguments, result and errors are those of :func:`to_onnx`; nodeshape is not needed to load it.
    """
    subject = _Subject(module, example_inputs, tolerance, False, trajectory)
    with _written(path) as partial, _quiet():
        torch.export.save(subject.program(), partial)
        loaded = torch.export.load(partial)
        nodes = sum(1 for node in loaded.graph.nodes if node.op == "call_function")
        report = subject.report(Path(path), partial, nodes, subject.structured(loaded.module()))
    return report


to_pt2.__module__ = "nodeshape"


class _Subject:
    """A module under export: its inputs, its outputs at several batch sizes, and what its solves take.

    Attributes:
        module: in evaluation mode.
        traced_with: its positional arguments as it is recorded.
        input_names, output_names: of the flat inputs and outputs.
        batch_sizes: at which it is compared; ``(1,)`` for a module without a batch.
        recordable: the module with what a file has besides.
        default_steps: of the input ``steps``; None where there is none.
        dimensions: what the recorded program calls its batch.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Any,
        tolerance: float,
        loop: bool = False,
        trajectory: bool | nn.Module = False,
        native: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"module must be an nn.Module, got {type(module).__name__}: put the call of odeint in one's forward"
            )
        if not tolerance > 0:
            raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
        if loop and trajectory is not False:
            raise ValueError("loop=True does not go with trajectory, whose states it does not keep: choose one")
        self.module, self.tolerance = module, tolerance
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.input_names = _input_names(module, arguments)
        self._flat, self._spec = pytree.tree_flatten(arguments)
        for name, x in zip(self.input_names, self._flat):
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"the input {name} is {type(x).__name__} {x!r}, but a file takes tensors only: make it a tensor, or"
                    " an attribute of the module"
                )
            if x.device.type != "cpu":
                raise ValueError(f"the input {name} is on {x.device}: export on the CPU, with module.cpu() and x.cpu()")
        wide = [x for x in self._flat if x.dim() >= 2]
        self._batch = len(wide[0]) if wide else None
        if self._batch == 0:
            raise ValueError("example_inputs hold no sample: their first dimension is 0")
        self._open = [x.dim() > 0 and len(x) == self._batch for x in self._flat]
        # PyTorch takes a size of 1 for a constant.
        size = None if self._batch is None else max(2, self._batch)
        self.traced_with: Any = pytree.tree_unflatten(self._sized(size), self._spec)
        self.output_names: list[str] = []
        self.dimensions: set[str] = set()
        self.batch_sizes = (1,) if self._batch is None else tuple(sorted({1, self._batch, 2 * self._batch + 1}))
        with _evaluating(module):
            self._expected = [self._outputs(self._sized(size)) for size in self.batch_sizes]
        for name, y in zip(self.output_names, self._expected[0]):
            if not isinstance(y, Tensor):
                raise ValueError(f"{name} of the module is {type(y).__name__}, but a file gives tensors only")
        self._how = Unrolled(iterations=MAX_ITERATIONS, steps=1, native=native)
        with _evaluating(module):
            self._choose()
        counts = self._how.counts
        self.default_steps = max(counts) if loop and len(counts) == 1 else None
        self._how.looped = loop
        self.recordable: nn.Module = module
        if loop:
            self.recordable = _Looped(module, self._how, self.default_steps is not None)
        elif trajectory is not False:
            self.recordable = _WithTrajectory(module, self._how, trajectory if trajectory is not True else None)
            self._add_trajectories()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within, calls of the module are recorded as plain operations."""
        with _evaluating(self.module), unrolled(self._how):
            yield

    def program(self) -> torch.export.ExportedProgram:
        """The module recorded by torch.export, with the batch size left open."""
        batch = torch.export.Dim("batch")
        shapes = pytree.tree_unflatten([{0: batch} if wide else None for wide in self._open], self._spec)
        arguments = self.traced_with
        if self.default_steps is not None:
            shapes, arguments = (*shapes, None), (*arguments, torch.tensor(self.default_steps))
        with self.recorded():
            by_argument = inspect.signature(self.recordable.forward).bind(*shapes).arguments
            program = torch.export.export(self.recordable, arguments, dynamic_shapes=tuple(by_argument.values()))
        self.dimensions = {str(symbol) for symbol in program.range_constraints}
        return program

    def structured(self, loaded: Any) -> Run:
        """A loaded module, which takes and gives what ours does, as a function of flat inputs."""
        return lambda inputs: pytree.tree_leaves(loaded(*pytree.tree_unflatten(inputs, self._spec)))

    def report(self, path: Path, partial: Path, nodes: int, run: Run) -> ExportReport:
        """Run a file beside the module; raise UserError if it differs."""
        worst = 0.0
        for size, expected in zip(self.batch_sizes, self._expected):
            inputs = self._sized(None if self._batch is None else size)
            where = f"at batch size {size}" if self._batch is not None else "on the examples"
            try:
                with torch.no_grad():
                    found = run(inputs)
            except Exception as error:
                raise UserError(f"{path.name} fails {where}: {_first_line(error)}; nothing was written") from error
            difference = _difference(found, expected)
            if not difference <= self.tolerance:
                raise UserError(
                    f"{path.name} differs from the module by {difference:.1e} {where}, tolerance {self.tolerance:g};"
                    " nothing was written: take more steps or a larger tolerance, and see that forward does not depend"
                    " on chance or on the numbers in its inputs"
                )
            worst = max(worst, difference)
        how = self._how
        return ExportReport(
            path=path,
            batch_sizes=self.batch_sizes,
            max_difference=worst,
            tolerance=self.tolerance,
            nodes=nodes,
            bytes=partial.stat().st_size,
            stage_iterations=how.iterations if how.implicit else None,
            steps=how.steps if how.adaptive else None,
        )

    def _choose(self) -> None:
        """Find as few steps and evaluations as give the outputs on the examples with a margin."""
        how, expected = self._how, self._expected[self.batch_sizes.index(self._batch or 1)]
        inputs = self._sized(self._batch)

        def difference() -> float:
            how.counts.clear()
            with unrolled(how):
                return _difference(self._outputs(inputs), expected)

        best = difference()
        while how.adaptive and best > MARGIN * self.tolerance and how.steps < MAX_STEPS:
            how.steps *= 2
            best = difference()
        if not best <= self.tolerance:
            parts = [f"{MAX_ITERATIONS} evaluations of f in each implicit stage"] if how.implicit else []
            parts += [f"{how.steps} steps in place of error control"] if how.adaptive else []
            raise UserError(
                f"with {' and '.join(parts) or 'plain operations'} the outputs come within {best:.1e} of the module's,"
                f" tolerance {self.tolerance:g}: take more steps, another method or a larger tolerance"
            )
        if how.implicit:
            for how.iterations in range(2, MAX_ITERATIONS + 1):
                if difference() <= max(best, MARGIN * self.tolerance):
                    return

    def _add_trajectories(self) -> None:
        """Enter the states among the expected outputs, those of stages that are solved as well as can be."""
        iterations, self._how.iterations = self._how.iterations, MAX_ITERATIONS
        with self.recorded(), torch.no_grad():
            for size, expected in zip(self.batch_sizes, self._expected):
                inputs = self._sized(None if self._batch is None else size)
                _, found = self.recordable(*pytree.tree_unflatten(inputs, self._spec))
                leaves, _ = pytree.tree_flatten_with_path(found)
                expected += [y for _, y in leaves]
        self._how.iterations = iterations
        alone = len(found) == 1
        self.output_names += ["_".join(["trajectory", *map(_key, path[1:] if alone else path)]) for path, _ in leaves]

    def _outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            outputs = self.module(*pytree.tree_unflatten([x.clone() for x in inputs], self._spec))
        with_paths, _ = pytree.tree_flatten_with_path(outputs)
        self.output_names = [_output_name(path) for path, _ in with_paths]
        return [y for _, y in with_paths]

    def _sized(self, size: int | None) -> list[Tensor]:
        """The flat inputs with a batch of ``size``: the examples, as often as needed."""
        if size is None or size == self._batch:
            return self._flat
        assert self._batch is not None
        rows = torch.arange(size) % self._batch
        return [x[rows] if wide else x for x, wide in zip(self._flat, self._open)]


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of an ONNX graph, those of loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _tidy(graph: Any, batch: set[str]) -> None:
    """Take out what runs nothing, such as lines of Python, and call the batch by its name."""
    used = {name for node in _nodes(graph) for name in node.input} | {x.name for x in graph.output}
    kept = [x for x in graph.initializer if x.name in used]
    del graph.initializer[:], graph.value_info[:], graph.metadata_props[:]
    graph.initializer.extend(kept)
    for x in (*graph.input, *graph.output, *graph.initializer):
        del x.metadata_props[:]
    for node in _nodes(graph):
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                del attribute.g.value_info[:], attribute.g.metadata_props[:]
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in batch:
                dimension.dim_param = "batch"


class _Looped(nn.Module):
    """A module whose solves take as many steps as its last argument says, if it ``takes_steps``."""

    def __init__(self, module: nn.Module, how: Unrolled, takes_steps: bool) -> None:
        super().__init__()
        self.module, self._how, self._takes_steps = module, how, takes_steps

    def forward(self, *arguments: Any) -> Any:
        if self._takes_steps:
            *arguments, self._how.given = arguments  # type: ignore[assignment]
        try:
            return self.module(*arguments)
        finally:
            self._how.given = None


class _WithTrajectory(nn.Module):
    """A module that also gives its solves' states, ``[batch, steps + 1, ...]``, or what ``head`` makes of them."""

    def __init__(self, module: nn.Module, how: Unrolled, head: nn.Module | None) -> None:
        super().__init__()
        self.module, self._how, self.head = module, how, head

    def forward(self, *arguments: Any) -> tuple[Any, list[Any]]:
        solves: list[list[Any]] = []
        self._how.states = solves.append
        try:
            outputs = self.module(*arguments)
        finally:
            self._how.states = None
        if not solves:
            raise UserError("trajectory: the module has no solve in given steps")
        return outputs, [self._stacked([x if self.head is None else self.head(x) for x in states]) for states in solves]

    def _stacked(self, states: list[Any]) -> Any:
        if isinstance(states[0], Tensor):
            return torch.stack(states, dim=min(1, states[0].dim()))
        return [torch.stack(parts, dim=min(1, parts[0].dim())) for parts in zip(*states)]


def _input_names(module: nn.Module, arguments: Sequence[Any]) -> list[str]:
    """Names of the flat inputs, after the arguments of forward; raises ValueError where it does not take them."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*arguments).arguments
    except TypeError as error:
        raise ValueError(
            f"example_inputs are {len(arguments)} arguments, but forward{signature} does not take them ({error}): give"
            " a tuple of its arguments"
        ) from error
    found, _ = pytree.tree_flatten_with_path(dict(bound))
    return ["_".join(map(_key, path)) for path, _ in found]


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))


def _output_name(path: Sequence[Any]) -> str:
    """``output``, ``output_0`` ..., or after the key of a dictionary."""
    named = bool(path) and isinstance(path[0], pytree.MappingKey)
    return "_".join([*([] if named else ["output"]), *map(_key, path)])


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of an output; infinite where shapes differ or one only is not a number."""
    if [x.shape for x in found] != [y.shape for y in expected]:
        return float("inf")
    worst = 0.0
    for x, y in zip(found, expected):
        if x.numel():
            same = (x == y) | (x.isnan() & y.isnan())
            difference = torch.where(same, 0.0, (x.double() - y.double()).abs()).nan_to_num(float("inf"))
            worst = max(worst, float(difference.max()))
    return worst


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, module by module as they were afterwards."""
    training = [x for x in module.modules() if x.training]
    for x in training:
        x.training = False
    try:
        yield
    finally:
        for x in training:
            x.training = True


@contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` if all goes well; what goes wrong is told in one line."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    partial = partial_path(path)
    partial = partial.with_name(partial.name + path.suffix)  # which torch wants to be .pt2
    try:
        yield partial
        os.replace(partial, path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the module cannot be recorded: {_first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    """What went wrong, of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracers say about others' code."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision's absence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
