"""Any module with solves in it as a file that needs no nodeshape, ONNX, TorchScript or .pt2, compared with it."""

from __future__ import annotations

import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from nodeshape import __version__ as nodeshape_version
from nodeshape._errors import UserError
from nodeshape._exporting.lean import lean
from nodeshape._exporting.numbers import Read, Reads, different, others
from nodeshape._files import partial_path
from nodeshape._ode.stage import ANDERSON_MEMORY
from nodeshape._ode.unrolled import Unrolled, unrolled

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: The oldest opset the exporter writes, so that as many runtimes as possible read it, and the IR version it came with.
OPSET, IR_VERSION = 18, 8
TOLERANCE = 1e-4
#: Most evaluations of f that an unrolled stage may take, and most steps in place of error control.
MAX_ITERATIONS, MAX_STEPS = 30, 512
#: The part of the tolerance that the choice of evaluations and steps keeps to on the examples.
MARGIN = 0.25
#: Tolerances of stages that are tried before the solve's own, and the differences kept where so few do as well as many.
STAGE_TOLERANCES, FEW_DIFFERENCES = (1e-4, 5e-5, 2e-5, 1e-5, 7e-6, 5e-6, 3e-6), 2

HELD_NUMBER = (
    "the module cannot be recorded: {} reads a number out of {}, which a file would hold as it is in the"
    " examples: compute with tensors there, and at times that are an input give odeint steps=... instead of"
    " step_size=..."
)

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
        stage_iterations: evaluations of f of each implicit stage, or the most of one on the examples where it ends when
            it is solved; None where there is none.
        stage_tolerance: relative residual at which such a stage ends; else None.
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
    stage_tolerance: float | None
    steps: int | None

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = [
            f"{self.path}: {self.nodes} nodes, {self.bytes / 1e6:.2f} MB; within {self.max_difference:.1e} of the"
            f" module (tolerance {self.tolerance:g}) at batch sizes {sizes}"
        ]
        if self.stage_iterations is not None:
            ends = self.stage_tolerance is not None
            until = f" at most, until their residual is {self.stage_tolerance:.0e}" if ends else " each"
            lines.append(f"implicit stages take {self.stage_iterations} evaluations of f{until}")
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

    Solves become plain operations: given steps as they are, error control as equal steps, implicit stages as loops that
    end when all samples are solved, to a tolerance that the examples decide. The module is exported in evaluation mode.
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
    return write_onnx(module, example_inputs, path, loop=loop, trajectory=trajectory, tolerance=tolerance)[0]


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
    return write_torchscript(module, example_inputs, path, trajectory=trajectory, tolerance=tolerance)[0]


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
    return write_pt2(module, example_inputs, path, trajectory=trajectory, tolerance=tolerance)[0]


to_pt2.__module__ = "nodeshape"


def write_onnx(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    loop: bool = False,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
    output: str = "output",
    metadata: Mapping[str, str] | None = None,
    docs: Mapping[str, str] | None = None,
    subject: Subject | None = None,
    native: bool = False,
) -> tuple[ExportReport, Run]:
    """Do as :func:`to_onnx`.

    Args:
        output: the name of a lone output.
        metadata: the file's ``metadata_props``.
        docs: of inputs and outputs, by name.
        subject: of these arguments, where several files share one.
        native: keep the ops of the kernels, which the library of :mod:`custom_ops` runs.

    Returns:
        its report, and the file as a function.
    """
    outputs = {"output": output}
    import onnx

    from nodeshape._exporting import custom_ops
    from nodeshape._exporting.graph import nodes, simplify, tidy

    with Progress(Path(path).name) as progress:
        subject = subject or Subject(module, example_inputs, tolerance, trajectory, loop, native)
        with _written(path) as partial:
            progress("recording")
            with subject.recorded():
                program = torch.onnx.export(
                    subject.program(),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[*subject.input_names, *([STEPS] if subject.default_steps else [])],
                    output_names=[outputs.get(name, name) for name in subject.output_names],
                    verbose=False,
                    custom_translation_table=custom_ops.translations() if native else None,
                )
            assert program is not None
            progress("writing")
            proto = program.model_proto
            proto.ir_version = IR_VERSION
            if subject.default_steps:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(subject.default_steps), STEPS))
            simplify(proto.graph, unroll=not loop)
            tidy(proto.graph, lambda name: "batch" if name in subject.dimensions else name)
            _describe(proto, metadata or {}, docs or {})
            onnx.checker.check_model(proto)
            onnx.save(proto, partial)
            session = open_onnx(partial, library=custom_ops.LIBRARY if native else None)
            taken = {x.name for x in session.get_inputs()}

            def run(inputs: list[Tensor]) -> list[Tensor]:
                named = zip(subject.input_names, inputs)
                found = session.run(None, {name: x.numpy() for name, x in named if name in taken})
                return [torch.from_numpy(x) if x.ndim else torch.tensor(x) for x in found]

            progress("comparing")
            return subject.report(Path(path), partial, sum(1 for _ in nodes(proto.graph)), run), run


def open_onnx(path: Path, threads: int = 0, library: Path | None = None) -> onnxruntime.InferenceSession:
    """Read an ONNX file, to run in so many threads (0 for as many as there are cores); a library has ops of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of inputs that may be left out, and of constants that it cannot compute
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _describe(proto: onnx.ModelProto, metadata: Mapping[str, str], docs: Mapping[str, str]) -> None:
    """Say what the file is, and what its inputs and outputs are."""
    proto.producer_name, proto.producer_version = "nodeshape", nodeshape_version
    proto.graph.name = "nodeshape"
    for name, value in metadata.items():
        proto.metadata_props.add(key=name, value=value)
    for x in (*proto.graph.input, *proto.graph.output):
        sizes = [d.dim_param or str(d.dim_value) for d in x.type.tensor_type.shape.dim]
        x.doc_string = docs.get(x.name, f"[{', '.join(sizes)}]")


def write_torchscript(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
    files: Mapping[str, str] | None = None,
    subject: Subject | None = None,
) -> tuple[ExportReport, Run]:
    """Do as :func:`to_torchscript`, with further ``files`` in the file; its report, and the file as a function."""
    with Progress(Path(path).name) as progress:
        subject = (subject or Subject(module, example_inputs, tolerance, trajectory)).in_steps()
        with _written(path) as partial:
            progress("recording")
            traced = subject.traced()
            progress("writing")
            loaded, count = save_torchscript(traced, partial, files or {})
            progress("comparing")
            run = subject.structured(loaded)
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # which takes many times as long as the comparison
                return subject.report(Path(path), partial, count, run), run


def save_torchscript(traced: torch.jit.ScriptModule, path: Path, files: Mapping[str, str]) -> tuple[Any, int]:
    """Save a trace with further ``files`` in it; what the file loads as, and its operations."""
    _save(path, lambda to: torch.jit.save(traced, to, _extra_files=dict(files)))
    loaded = torch.jit.load(path)
    return loaded, sum(1 for node in loaded.inlined_graph.nodes() if node.kind() != "prim::Constant")


def _save(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write a file by way of memory: torch's own writer aborts the process where the disk is full."""
    buffer = io.BytesIO()
    write(buffer)
    path.write_bytes(buffer.getbuffer())


def write_pt2(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    trajectory: bool | nn.Module = False,
    tolerance: float = TOLERANCE,
    files: Mapping[str, str] | None = None,
    subject: Subject | None = None,
) -> tuple[ExportReport, Run]:
    """Do as :func:`to_pt2`, with further ``files`` in the file; its report, and the file as a function."""
    with Progress(Path(path).name) as progress:
        subject = subject or Subject(module, example_inputs, tolerance, trajectory)
        with _written(path) as partial:
            progress("recording")
            program = subject.program()
            progress("writing")
            with subject.recorded():  # weights that are not differentiated, so that its loops are not
                _save(partial, lambda to: torch.export.save(program, to, extra_files=dict(files or {})))
            loaded = torch.export.load(partial)
            graphs = [x for x in loaded.graph_module.modules() if isinstance(x, torch.fx.GraphModule)]
            count = sum(1 for graph in graphs for node in graph.graph.nodes if node.op == "call_function")
            progress("comparing")
            run = subject.structured(loaded.module())
            return subject.report(Path(path), partial, count, run), run


class Subject:
    """A module under export: its inputs, its outputs at several batch sizes, and what its solves take.

    It is recorded with steps in a scan, or in a loop, and with implicit stages that stop when they are solved.

    Attributes:
        module: in evaluation mode.
        traced_with: its positional arguments as it is recorded.
        input_names, output_names: of the flat inputs and outputs.
        batch_sizes: at which it is compared, that of the examples among them; ``(1,)`` for a module without a batch.
        recordable: the module with what a file has besides.
        default_steps: of the input ``steps``; None where there is none.
        dimensions: what the recorded program calls its batch.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Any,
        tolerance: float,
        trajectory: bool | nn.Module = False,
        loop: bool = False,
        native: bool = False,
        batch_sizes: Collection[int] = (),
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"module must be an nn.Module, got {type(module).__name__}: put the call of odeint in one's forward"
            )
        if not tolerance > 0:
            raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
        if loop and trajectory is not False:
            raise ValueError("loop=True does not go with trajectory, whose states it does not keep: choose one")
        if not isinstance(trajectory, (bool, nn.Module)):
            raise ValueError(
                f"trajectory must be True or a module to apply to each state, got {type(trajectory).__name__}"
            )
        self.module, self.tolerance = module, tolerance
        self._reserved = (STEPS,) if loop else ()
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.input_names = _input_names(module, arguments)
        if any(name in self._reserved for name in self.input_names):
            raise ValueError(
                f"loop=True gives the file an input {STEPS}, as an argument of forward is called: rename it"
            )
        self._flat, self._spec = pytree.tree_flatten(arguments)
        for name, x in zip(self.input_names, self._flat):
            if not isinstance(x, Tensor):
                shown = " ".join(repr(x).split())
                shown = shown if len(shown) < 40 else f"{shown[:36]} ..."
                raise ValueError(
                    f"the input {name} is {type(x).__name__} {shown}, but a file takes tensors only: make it a tensor,"
                    " or an attribute of the module"
                )
            if x.layout is not torch.strided:
                raise ValueError(f"the input {name} is sparse, but a file takes dense tensors only: x.to_dense()")
            if x.device.type != "cpu":
                raise ValueError(f"the input {name} is on {x.device}: export on the CPU, with module.cpu() and x.cpu()")
        wide = [x for x in self._flat if x.dim() >= 2]
        self._batch = len(wide[0]) if wide else None
        if self._batch == 0:
            raise ValueError("example_inputs hold no sample: their first dimension is 0")
        self._open = [x.dim() > 0 and len(x) == self._batch for x in self._flat]
        # PyTorch takes a size of 1 for a constant; a program keeps what it was recorded with.
        size = None if self._batch is None else 2
        self.traced_with: Any = pytree.tree_unflatten(self._sized(size), self._spec)
        self.output_names: list[str] = []
        self.dimensions: set[str] = set()
        self.recordable: nn.Module = module
        form = "loop" if loop else "scan"
        self._how = Unrolled(iterations=MAX_ITERATIONS, steps=1, form=form, stops=True, native=native)
        self._program: torch.export.ExportedProgram | None = None
        if self._batch is None:
            self.batch_sizes: tuple[int, ...] = (1,)
        else:
            self.batch_sizes = tuple(sorted(batch_sizes or {1, self._batch, 2 * self._batch + 1}))
        with _evaluating(module):
            self._expected = [self._module_at(size if wide else None) for size in self.batch_sizes]
        for name, y in zip(self.output_names, self._expected[0]):
            if not isinstance(y, Tensor):
                raise ValueError(f"{name} of the module is {type(y).__name__}, but a file gives tensors only")
        self._is_leaner = self._is_same_when_lean()
        with _evaluating(module), self._thinned():
            self._choose_steps()
            if trajectory is not False:
                head = trajectory if trajectory is not True else None
                self.recordable = _WithTrajectory(module, self._how, head)
                for size, expected in zip(self.batch_sizes, self._expected):
                    expected += self._outputs(self._sized(size if wide else None))[len(expected) :]
            self._choose_stages()
        counts = self._how.counts
        self.default_steps = max(counts) if loop and len(counts) == 1 else None
        if loop:
            self.recordable = _Looped(module, self._how, self.default_steps is not None)

    def in_steps(self) -> Subject:
        """The same with steps one after the other and stages of as many evaluations each: what a trace can hold."""
        other = self._with(form="steps", stops=False)
        how = other._how
        if how.implicit:
            how.iterations = max(how.most, 2) + 1  # others may be harder than the examples, and a trace does not look
            with _evaluating(self.module), self._thinned(), unrolled(how):
                while other._difference() > self._allowed and how.iterations < MAX_ITERATIONS:
                    how.iterations += 1
        return other

    def exact(self) -> Subject | None:
        """The same with implicit stages solved to the solve's own tolerance; None where nothing is to be gained."""
        if not self._how.implicit or self._how.tolerance == 0.0:
            return None
        other = self._with(tolerance=0.0, memory=ANDERSON_MEMORY)
        with _evaluating(self.module), self._thinned(), unrolled(other._how):
            other._allowed = other._difference()
        return other

    def loose(self, tolerance: float) -> Subject | None:
        """The same with implicit stages solved to a tolerance and nothing compared; None where there is no stage."""
        if not self._how.implicit:
            return None
        other = self._with(tolerance=tolerance)
        other.tolerance = float("inf")
        return other

    def _with(self, **changes: Any) -> Subject:
        other = copy(self)
        other._how = replace(self._how, counts=set(), **changes)
        other._program = None
        if isinstance(self.recordable, _WithTrajectory):
            other.recordable = _WithTrajectory(self.module, other._how, self.recordable.head)
        return other

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within, calls of the module are recorded as plain operations."""
        with _evaluating(self.module), self._thinned(), unrolled(self._how):
            yield

    def _thinned(self) -> AbstractContextManager[None]:
        """The module with less to compute, where that is the same."""
        return lean(self.module, self._how.native) if self._is_leaner else nullcontext()

    def _is_same_when_lean(self) -> bool:
        try:
            with _evaluating(self.module), lean(self.module, self._how.native):
                return self._difference() <= MARGIN * self.tolerance
        except Exception:  # whatever layers raise that follow each other in another way than lean takes them to
            return False

    def traced(self) -> torch.jit.ScriptModule:
        """The module recorded by torch.jit.trace."""
        try:
            with self.recorded():
                traced: torch.jit.ScriptModule = torch.jit.trace(
                    self.recordable, self.traced_with, check_trace=False, strict=False
                )
        except RuntimeError as error:
            if "Tracer cannot infer type" not in str(error):
                raise
            raise UserError(
                "the module cannot be recorded: TorchScript's dictionaries hold values of one type only, and forward"
                " takes or gives one of several: let it be of tensors alone, or write another file"
            ) from error
        self._refuse_held_numbers(traced)
        return traced

    def _refuse_held_numbers(self, traced: torch.jit.ScriptModule) -> None:
        """Raise UserError where forward reads numbers out of its inputs, which a trace holds as they were.

        That is where the trace differs from the module on inputs of which something else is read, and where no such
        inputs are found although a number follows from them. What only says yes or no may be a check of the inputs.
        """
        found, runs = self._reads()
        for inputs, expected, reads in runs:
            where = different(found, reads)
            if where is None:
                continue
            try:
                with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                    outputs = self.structured(traced)(inputs)
            except Exception:  # what follows from numbers that do not fit
                outputs = []
            if not _difference(outputs, expected) <= self.tolerance:
                raise UserError(HELD_NUMBER.format(where, "the inputs"))
        for i, read in enumerate(found):
            changes = any(different([read], reads[i : i + 1]) is not None for _, _, reads in runs)
            if read.of_inputs and not read.decides and not changes:
                raise UserError(HELD_NUMBER.format(read.where, "the inputs"))

    def _reader(self, error: BaseException) -> tuple[str, str] | None:
        """Where forward reads the number that recording it failed by, if it did, and out of what."""
        found, runs = self._reads()
        followed = (read.where for read in found if read.of_inputs and not read.decides)
        changed = (different(found, reads) for _, _, reads in runs)
        where = next((x for x in (*followed, *changed) if x is not None), None)
        if where is not None:
            return where, "the inputs"
        if not isinstance(_first(error), torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
            return None
        return (found[0].where, "a tensor") if found else None

    def _reads(self) -> tuple[list[Read], list[tuple[list[Tensor], list[Tensor], list[Read]]]]:
        """What forward reads in the examples; other inputs, its outputs, and what it reads of them."""

        def read(inputs: list[Tensor]) -> tuple[list[Tensor], list[Read]]:
            given = [x.clone() for x in inputs]
            arguments = pytree.tree_unflatten(given, self._spec)
            more = () if self.default_steps is None else (torch.tensor(self.default_steps),)
            with Reads(given) as reads:
                outputs: list[Tensor] = pytree.tree_leaves(alone.recordable(*arguments, *more))
            return outputs, reads.found

        few = self._sized(None if self._batch is None else min(self._batch, 2))
        runs: list[tuple[list[Tensor], list[Tensor], list[Read]]] = []
        # Stages one after the other, as loops read whether they are done.
        alone = self._with(form="steps", stops=False)
        with alone.recorded():
            _, found = read(few)
            for inputs in others(few) if found else ():
                try:
                    runs.append((inputs, *read(inputs)))
                except Exception:  # whatever forward raises on inputs that are not for it
                    continue
        return found, runs

    def program(self) -> torch.export.ExportedProgram:
        """The module recorded by torch.export, with the batch size left open."""
        if self._program is None:
            self._program = self._recorded_program()
        return self._program

    def _recorded_program(self) -> torch.export.ExportedProgram:
        batch = torch.export.Dim("batch")
        shapes = pytree.tree_unflatten([{0: batch} if wide else None for wide in self._open], self._spec)
        arguments = self.traced_with
        if self.default_steps is not None:
            shapes, arguments = (*shapes, None), (*arguments, torch.tensor(self.default_steps))
        self._how.taken = 0
        with self.recorded():
            by_argument = inspect.signature(self.recordable.forward).bind(*shapes).arguments
            # It prints graphs to stderr where it fails; transformers' fast path is one operation that ONNX lacks.
            try:
                with redirect_stderr(io.StringIO()), _without_fast_path():
                    program = torch.export.export(
                        self.recordable, arguments, dynamic_shapes=tuple(by_argument.values())
                    )
            except Exception as error:
                if isinstance(_first(error), ValueError):  # of this package, or of forward
                    raise
                if "Constraints violated" in str(error):
                    raise UserError(
                        "the module cannot be recorded: forward makes a number of the batch's size, or takes one size"
                        " only: use x.shape[0] as it is, not len(x), and see that no layer fixes the batch"
                    ) from error
                if (read := self._reader(error)) is not None:
                    raise UserError(HELD_NUMBER.format(*read)) from error
                raise
        if self._how.taken:
            for x in self._reads()[0]:
                if x.times and x.of_inputs:
                    raise UserError(HELD_NUMBER.format(x.where, "the inputs"))
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
                    " on chance or on the numbers in its inputs, and reads sizes as x.shape[0], not len(x)"
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
            stage_iterations=(how.most if how.stops else how.iterations) if how.implicit else None,
            stage_tolerance=how.tolerance if how.implicit and how.stops else None,
            steps=how.steps if how.adaptive else None,
        )

    def _difference(self) -> float:
        """Of the outputs on the examples, as the solves are told to be done now."""
        self._how.counts.clear()
        self._how.times.clear()
        self._how.evaluations = self._how.most = 0
        size = self._batch or 1
        return _difference(self._outputs(self._sized(self._batch)), self._expected[self.batch_sizes.index(size)])

    def _choose_steps(self) -> None:
        """Find as few steps in place of error control as give the outputs on the examples with a margin."""
        how = self._how
        with unrolled(how):
            best = self._difference()
            while how.adaptive and best > MARGIN * self.tolerance and how.steps < MAX_STEPS:
                how.steps *= 2
                best = self._difference()
        if not best <= self.tolerance:
            parts = [f"{MAX_ITERATIONS} evaluations of f in each implicit stage"] if how.implicit else []
            parts += [f"{how.steps} steps in place of error control"] if how.adaptive else []
            raise UserError(
                f"with {' and '.join(parts) or 'plain operations'} the outputs come within {best:.1e} of the module's,"
                f" tolerance {self.tolerance:g}: take more steps, another method or a larger tolerance"
            )

    def _choose_stages(self) -> None:
        """Find how few evaluations of f in implicit stages give the outputs on the examples with a margin."""
        how = self._how
        if not how.implicit:
            return
        with unrolled(how):
            allowed = max(self._difference(), MARGIN * self.tolerance)
            tolerances = (*STAGE_TOLERANCES, 0.0)  # the last of which is taken where no other will do
            first, last = 0, len(tolerances) - 1
            while first < last:
                middle = (first + last) // 2
                how.tolerance = tolerances[middle]
                first, last = (first, middle) if self._difference() <= allowed else (middle + 1, last)
            how.tolerance = tolerances[last]
            self._allowed = allowed = max(self._difference(), allowed)
            evaluations, most, how.memory = how.evaluations, how.most, FEW_DIFFERENCES
            if self._difference() > allowed or how.evaluations > evaluations:
                how.memory, how.most = ANDERSON_MEMORY, most

    def _outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), unrolled(self._how) if self.recordable is not self.module else nullcontext():
            outputs = self.recordable(*pytree.tree_unflatten([x.clone() for x in inputs], self._spec))
        leaves, _ = pytree.tree_flatten_with_path(outputs)
        paths = [path for path, _ in leaves]
        self.output_names = [_output_name(path) for path in paths]
        if isinstance(self.recordable, _WithTrajectory):
            own = [path[1:] for path in paths if _key(path[0]) == "0"]
            of_solves = [(int(_key(path[0])) - 1, *path[1:]) for path in paths[len(own) :]]
            states = [path[1:] for path in of_solves] if len(outputs) == 2 else of_solves
            self.output_names = [_output_name(path) for path in own]
            self.output_names += ["_".join(["trajectory", *map(_key, path)]) for path in states]
        self.output_names = _distinct(self.output_names, {*self.input_names, *self._reserved})
        return [y for _, y in leaves]

    def _module_at(self, size: int | None) -> list[Tensor]:
        """The module's outputs at a batch size; raises UserError where it takes the examples at their size only."""
        inputs = self._sized(size)
        try:
            return self._outputs(inputs)
        except Exception as error:  # whatever forward raises
            self._outputs(self._flat)
            names = [name for name, wide in zip(self.input_names, self._open) if wide]
            raise UserError(
                f"forward takes the examples, but not a batch of {size} ({_first_line(error)}): the batch is taken to"
                f" be the first dimension of {', '.join(names)}; if it is not of all of these, give examples of a"
                " batch size that is none of their other sizes"
            ) from error

    def _sized(self, size: int | None) -> list[Tensor]:
        """The flat inputs with a batch of ``size``: the examples, as often as needed."""
        if size is None or size == self._batch:
            return self._flat
        assert self._batch is not None
        rows = torch.arange(size) % self._batch
        return [x[rows] if wide else x for x, wide in zip(self._flat, self._open)]


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

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        solves: list[Any] = []
        self._how.states = solves.append
        try:
            outputs = self.module(*arguments)
        finally:
            self._how.states = None
        if not solves:
            raise UserError("trajectory: the module has no solve in given steps")
        return outputs, *(pytree.tree_map(_batch_first, self._read(states)) for states in solves)

    def _read(self, states: Any) -> Any:
        """What the head makes of states ``[steps + 1, batch, ...]``, all of them in one batch."""
        if self.head is None:
            return states
        if not isinstance(states, Tensor) or states.dim() < 3:
            return pytree.tree_map(lambda *parts: torch.stack(parts), *map(self.head, _each(states)))
        found = self.head(states.flatten(0, 1))
        return pytree.tree_map(lambda x: x.unflatten(0, (len(states), -1)), found)


def _each(states: Any) -> Iterator[Any]:
    """The states one by one."""
    return iter(states) if isinstance(states, Tensor) else zip(*states)


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1) if x.dim() > 1 else x


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


def _distinct(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names, with ``output_`` before those that are taken, by inputs or by each other."""
    found: list[str] = []
    for name in names:
        while name in taken or name in found:
            name = f"output_{name}"
        found.append(name)
    return found


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
    """In evaluation mode, nothing differentiated; module by module as they were afterwards."""
    training = [x for x in module.modules() if x.training]
    learning = [x for x in module.parameters() if x.requires_grad]
    for x in training:
        x.training = False
    for y in learning:
        y.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for x in training:
            x.training = True
        for y in learning:
            y.requires_grad_(True)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """PyTorch's transformers and attention as plain operations, which they are where gradients are recorded."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` if all goes well; what goes wrong is told in one line."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
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
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise UserError(f"the module cannot be recorded: {_first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _first(error: BaseException) -> BaseException:
    """The error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    """What went wrong, of the error that began it."""
    error = _first(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class Progress:
    """A bar of what is being done, shown once it takes two seconds; without what tracers say about others' code."""

    def __init__(self, name: str) -> None:
        # What comes first is the choice of steps and evaluations.
        self._bar = tqdm(
            total=4, desc=f"{name}: choosing", delay=2, disable=None, leave=False, bar_format="{desc} {bar}"
        )
        self._name = name
        # The one warns of torchvision's absence, the other of what an error says anyway.
        self._logs = [logging.getLogger(log) for log in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
        self._quiet = warnings.catch_warnings()

    def __enter__(self) -> Progress:
        self._levels = [log.level for log in self._logs]
        for log in self._logs:
            log.setLevel(logging.ERROR)
        self._quiet.__enter__()
        warnings.simplefilter("ignore")
        return self

    def __call__(self, doing: str) -> None:
        """Say what comes next."""
        self._bar.set_description(f"{self._name}: {doing}")
        self._bar.update()

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._quiet.__exit__(None, None, None)
        for log, level in zip(self._logs, self._levels):
            log.setLevel(level)
