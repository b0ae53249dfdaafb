"""A module as files whose solves stay the fused ops, TorchScript and AOTInductor, beside the library of these ops."""

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
from nodeshape._exporting.module import TOLERANCE, ExportReport, Progress, Subject, _written, save_torchscript
from nodeshape._exporting.verify import Classify
from nodeshape._files import write_atomically
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.fused import _LIBRARY

TORCHSCRIPT, PACKAGE = "model.fused.ts", "model.fused.pt2"
FILES = {TORCHSCRIPT, PACKAGE, _LIBRARY.name}


def to_native(
    module: nn.Module,
    example_inputs: Any,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    package: bool = True,
    tolerance: float = TOLERANCE,
) -> list[ExportReport]:
    """Write a module with solves in it as files that run them by nodeshape's kernels, in Python and C++.

    ``model.fused.ts`` is TorchScript; ``model.fused.pt2`` is compiled by AOTInductor for this kind of machine, which
    takes a C++ compiler and half a minute. Either needs the library beside them, ``libnodeshape_cpu.so``, loaded first,
    and nothing else of nodeshape::

        torch.ops.load_library("libnodeshape_cpu.so")
        model = torch.jit.load("model.fused.ts")  # or torch._inductor.aoti_load_package("model.fused.pt2")

    Implicit stages are solved as in the module, to its tolerance; solves that have no kernel become plain operations,
    as in :func:`nodeshape.to_torchscript`. Each file is run beside the module at several batch sizes.

    Args:
        module, example_inputs, tolerance: as in :func:`nodeshape.to_onnx`.
        folder: an existing one; files in it that have these names are replaced once the new ones are proven.
        package: whether to compile one, which needs a C++ compiler.
        metadata: texts to keep in the files: as extra files of the TorchScript, in the metadata of the package.

    Returns:
        what was written and how it compares, for each file.

    Raises:
        ValueError: no solve of the module has a kernel here, or what :func:`nodeshape.to_onnx` raises.
    """
    folder, texts = Path(folder), dict(metadata or {})
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
    return reports


to_native.__module__ = "nodeshape"


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


def write_native(
    folder: Path, model: ShapeClassifier, images: Tensor, metadata: Mapping[str, str], tolerance: float
) -> list[tuple[str, Callable[[Path], Classify]]]:
    """Write a classifier's native files to a folder; their names, and what reads each as a function of images.

    Args:
        images: float32 ``[batch, channels, height, width]``, of which some are tried.
        metadata: as that of the ONNX file; ``classes`` is a JSON list.

    Raises:
        UserError: as :func:`to_native`.
    """
    texts = {**metadata, "classes.txt": "\n".join(json.loads(metadata["classes"]))}
    with user_input():
        to_native(model, images[:7], folder, metadata=texts, tolerance=tolerance)
    return [(TORCHSCRIPT, load_torchscript), (PACKAGE, load_package)]
