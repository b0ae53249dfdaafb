"""A module as files whose solves stay the fused ops, beside the libraries of these: TorchScript, AOTInductor, ONNX."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nodeshape._cli import user_input
from nodeshape._errors import UserError
from nodeshape._exporting import custom_ops
from nodeshape._exporting.module import (
    TOLERANCE,
    ExportReport,
    Progress,
    Subject,
    _written,
    open_onnx,
    save_torchscript,
    write_onnx,
)
from nodeshape._exporting.verify import Classify
from nodeshape._files import write_atomically
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.fused import _LIBRARY

TORCHSCRIPT, PACKAGE, ONNX = "model.fused.ts", "model.fused.pt2", "model.fused.onnx"
FILES = {TORCHSCRIPT, PACKAGE, ONNX, _LIBRARY.name, custom_ops.LIBRARY.name}


def to_native(
    module: nn.Module,
    example_inputs: Any,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    package: bool = True,
    onnx: bool = True,
    tolerance: float = TOLERANCE,
) -> list[ExportReport]:
    """Write a module with solves in it as files that run them by nodeshape's kernels, in Python and C++.

    ``model.fused.ts`` is TorchScript; ``model.fused.pt2`` is compiled by AOTInductor for this kind of machine, which
    takes a C++ compiler and half a minute. Either needs the library beside them, ``libnodeshape_cpu.so``, loaded first,
    and nothing else of nodeshape::

        torch.ops.load_library("libnodeshape_cpu.so")
        model = torch.jit.load("model.fused.ts")  # or torch._inductor.aoti_load_package("model.fused.pt2")

    ``model.fused.onnx`` runs in onnxruntime by ``libnodeshape_onnxruntime.so``, without torch; it is written where that
    library was built, as docs/export.md says::

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library("libnodeshape_onnxruntime.so")
        session = onnxruntime.InferenceSession("model.fused.onnx", options)

    Implicit stages are solved as in the module, to its tolerance; solves that have no kernel become plain operations,
    as in :func:`nodeshape.to_torchscript`. Each file is run beside the module at several batch sizes.

    Args:
        module, example_inputs, tolerance: as in :func:`nodeshape.to_onnx`.
        folder: an existing one; files in it that have these names are replaced once the new ones are proven, or removed
            where this call leaves them out.
        package: whether to compile one, which needs a C++ compiler.
        onnx: whether to write the ONNX file where its library was built.
        metadata: texts to keep in the files: as extra files of the TorchScript, in the metadata of the others.

    Returns:
        what was written and how it compares, for each file.

    Raises:
        ValueError: no solve of the module has a kernel here, or what :func:`nodeshape.to_onnx` raises.
    """
    onnx = onnx and custom_ops.why_missing() is None
    return _write(module, example_inputs, Path(folder), dict(metadata or {}), package, {} if onnx else None, tolerance)


to_native.__module__ = "nodeshape"


def _write(
    module: nn.Module,
    example_inputs: Any,
    folder: Path,
    texts: dict[str, str],
    package: bool,
    onnx: Mapping[str, Any] | None,
    tolerance: float,
) -> list[ExportReport]:
    """Do as :func:`to_native`; ``onnx`` are further arguments of :func:`write_onnx`, None for no such file."""
    subject = Subject(module, example_inputs, tolerance, native=True).in_steps()
    with Progress(TORCHSCRIPT) as progress, _written(folder / TORCHSCRIPT) as partial, torch.no_grad():
        progress("recording")
        traced = subject.traced()
        if not any(node.kind().startswith("nodeshape::") for node in traced.inlined_graph.nodes()):
            raise UserError(
                "no solve of the module has a kernel, so native files would gain nothing: nodeshape.backend(...) says"
                " why; use nodeshape.to_torchscript"
            )
        loaded, nodes = save_torchscript(traced, partial, texts)
        reports = [subject.report(folder / TORCHSCRIPT, partial, nodes, subject.structured(loaded))]
        if package:
            reports.append(_compile(subject, folder / PACKAGE, texts))
        write_atomically(folder / _LIBRARY.name, _LIBRARY.read_bytes())
    if onnx is not None:
        how = {"metadata": texts, "tolerance": tolerance, **onnx}
        try:
            reports.append(write_onnx(module, example_inputs, folder / ONNX, native=True, **how)[0])
        except UserError as error:
            raise UserError(f"{error}; to_native(..., onnx=False) leaves {ONNX} out") from error
        write_atomically(folder / custom_ops.LIBRARY.name, custom_ops.LIBRARY.read_bytes())
    for name in {PACKAGE, ONNX} - {report.path.name for report in reports}:
        (folder / name).unlink(missing_ok=True)  # of a call before, perhaps of another model
    return reports


def _compile(subject: Subject, path: Path, texts: dict[str, str]) -> ExportReport:
    bar = tqdm(desc=f"compiling {path.name}, about half a minute", bar_format="{desc}", leave=False, disable=None)
    with bar, _written(path) as partial:
        program = subject.program()
        settings = {"aot_inductor.metadata": texts}
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=settings)
        nodes = sum(1 for node in program.graph.nodes if node.op == "call_function")
        return subject.report(path, partial, nodes, subject.structured(load_package(partial)))


def load_torchscript(path: Path) -> Classify:
    """Read a TorchScript file as a function of images."""
    model = torch.jit.load(path)

    def classify(batch: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = model(batch)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    return classify


def load_package(path: Path) -> Callable[..., Any]:
    """Read a package of AOTInductor as a function of the module's arguments."""
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return loaded


def load_onnx(path: Path) -> Classify:
    """Read an ONNX file, beside which the library of its ops lies, as a function of images."""
    session = open_onnx(path, library=path.with_name(custom_ops.LIBRARY.name))
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def write_native(
    folder: Path,
    model: ShapeClassifier,
    images: Tensor,
    metadata: Mapping[str, str],
    tolerance: float,
    named: Mapping[str, Any],
) -> list[tuple[str, Callable[[Path], Classify]]]:
    """Write a classifier's native files to a folder; their names, and what reads each as a function of images.

    Args:
        images: float32 ``[batch, channels, height, width]``, of which some are tried.
        metadata: as that of the ONNX file; ``classes`` is a JSON list.
        named: what the ONNX file calls its output and says of it and others; it is written where its library was built.

    Raises:
        UserError: as :func:`to_native`.
    """
    texts = {**metadata, "classes.txt": "\n".join(json.loads(metadata["classes"]))}
    with user_input():
        onnx = {"metadata": metadata, **named} if custom_ops.why_missing() is None else None
        written = _write(model, images[:7], folder, texts, True, onnx, tolerance)
    readers = {TORCHSCRIPT: load_torchscript, PACKAGE: load_package, ONNX: load_onnx}
    return [(report.path.name, readers[report.path.name]) for report in written]
