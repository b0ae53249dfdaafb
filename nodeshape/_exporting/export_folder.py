"""An export: a classifier as ONNX and TorchScript files that give PyTorch's logits, a report and an example image."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx
import onnxruntime
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nodeshape import __version__
from nodeshape._cli import user_input
from nodeshape._errors import StageSolveError, UserError
from nodeshape._exporting import native as native_files
from nodeshape._exporting.onnx import OPSET, to_onnx
from nodeshape._exporting.unrolled import UnrolledClassifier, UnrolledTrajectory
from nodeshape._exporting.verify import (
    BATCH_SIZES,
    MOST_BATCHES,
    Agreement,
    Classify,
    check_images,
    classify_all,
    compare,
    load_onnx,
    load_torchscript,
    milliseconds,
)
from nodeshape._files import partial_folder, put_back, put_in_place
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.method import get_method

TOLERANCE = 1e-4
ONNX, TORCHSCRIPT, REPORT, EXAMPLE = "model.onnx", "model.ts", "report.json", "example.png"
FILES = {ONNX, TORCHSCRIPT, REPORT, EXAMPLE}
#: What a folder may hold of an earlier export.
ALL_FILES = FILES | native_files.FILES
#: Most evaluations of f that an unrolled stage may take.
MAX_ITERATIONS = 30
#: Images that decide whether a number of evaluations is tried on all, and the part of the tolerance it must keep to.
TRIAL_IMAGES, TRIAL_MARGIN = 100, 0.25
PREPROCESSING = (
    "Scale the picture to fit a square of image_size pixels, aspect kept, centred on its border's median colour; grey"
    " or RGB values as float32 in [0, 1], [batch, channels, image_size, image_size]. Normalisation is in the model."
)


def write_export_folder(
    out: Path,
    model: ShapeClassifier,
    classes: Sequence[str],
    state: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    trajectory: bool = False,
    native: bool = False,
) -> dict[str, Any]:
    """Write ``model.onnx``, ``model.ts``, ``report.json`` and ``example.png`` to the folder ``out``: all, or nothing.

    Args:
        out: a new or empty folder, or an earlier export, which is replaced.
        model: in evaluation mode, with the solver to export.
        classes: their names, by index of the logits.
        state: the checkpoint, for the images it was trained on, see :func:`check_images`.
        tolerance: largest allowed difference of a logit between PyTorch and an exported file.
        trajectory: give the models a second output, the states ``[batch, steps + 1, channels, height, width]``.
        native: also write the files of :func:`nodeshape.to_native`, which give the logits alone.

    Returns:
        the report.

    Raises:
        UserError: ``out`` cannot be used, the model has no fixed steps or a stage that is not solved, or an exported
            file disagrees with PyTorch.
    """
    start = perf_counter()
    out = _free(out)
    put_back(out)
    home = next(folder for folder in out.parents if folder.is_dir())
    with partial_folder(home / out.name) as partial:
        try:
            report = _write(partial, model, list(classes), state, tolerance, trajectory, native)
        except StageSolveError as error:
            raise UserError(str(error)) from error
        report["seconds"]["total"] = perf_counter() - start
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        put_in_place(partial, out)
    return report


def _write(
    folder: Path,
    model: ShapeClassifier,
    classes: list[str],
    state: Mapping[str, Any],
    tolerance: float,
    trajectory: bool,
    native: bool,
) -> dict[str, Any]:
    images, source = check_images(model, state)
    seconds = {}
    with tqdm(total=len(images), desc="PyTorch's logits", unit=" images", delay=2, disable=None) as progress:
        start = perf_counter()
        reference = classify_all(model, images, TRIAL_IMAGES, progress)
        seconds["reference"] = perf_counter() - start
    start = perf_counter()
    with user_input():
        unrolled = _unroll(model, images, reference, tolerance)
    seconds["choosing_iterations"] = perf_counter() - start
    channels = "grey" if model.in_channels == 1 else "rgb"
    metadata = {
        "classes": json.dumps(classes),
        "image_size": str(model.image_size),
        "channels": channels,
        "method": model.ode.method,
        "steps": str(unrolled.steps),
        "nodeshape_version": __version__,
        "preprocessing": PREPROCESSING,
    }
    start = perf_counter()
    shape = (model.in_channels, model.image_size, model.image_size)
    onnx.save(to_onnx(unrolled, shape, metadata, trajectory), folder / ONNX)
    save_torchscript(UnrolledTrajectory(unrolled) if trajectory else unrolled, metadata, folder / TORCHSCRIPT)
    pixels = (images[0] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels[0] if channels == "grey" else pixels.transpose(1, 2, 0)).save(folder / EXAMPLE)
    readers: list[tuple[str, Callable[[Path], Classify]]] = [(ONNX, load_onnx), (TORCHSCRIPT, load_torchscript)]
    if native:
        readers += native_files.write_native(folder, model, images, metadata, tolerance)
    seconds["writing"] = perf_counter() - start

    start = perf_counter()
    files = {}
    for name, load in readers:
        classify = load(folder / name)
        by_batch_size = {}
        counts = [min(len(images), MOST_BATCHES * size) for size in BATCH_SIZES]
        with tqdm(total=sum(counts), desc=f"{name}'s logits", unit=" images", delay=2, disable=None) as progress:
            for size, count in zip(BATCH_SIZES, counts):
                agreement = compare(classify_all(classify, images[:count], size, progress), reference[:count])
                _judge(name, size, agreement, tolerance)
                by_batch_size[str(size)] = asdict(agreement)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "images": len(images),
            "max_difference": max(figures["max_difference"] for figures in by_batch_size.values()),
            "same_class": agreement.same_class,
            "ties": agreement.ties,
            "latency_ms": milliseconds(classify, images[:1]),
            "by_batch_size": by_batch_size,
        }
    seconds["proof"] = perf_counter() - start
    return {
        **{key: metadata[key] for key in ("nodeshape_version", "channels", "method")},
        "classes": classes,
        "image_size": model.image_size,
        "steps": unrolled.steps,
        "stage_iterations": unrolled.step.iterations,
        "trajectory": trajectory,
        "tolerance": tolerance,
        "images": {"count": len(images), "source": source},
        "files": files,
        "pytorch_latency_ms": milliseconds(model, images[:1]),
        "opset": OPSET,
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "seconds": seconds,
    }


def _unroll(model: ShapeClassifier, images: Tensor, reference: Tensor, tolerance: float) -> UnrolledClassifier:
    """Unroll with the fewest evaluations of f per stage that give PyTorch's logits with a margin.

    A few images decide whether a number is tried on all; where it fails there, the worst ones decide from then on.

    Raises:
        UserError: ``MAX_ITERATIONS`` evaluations do not give them to the tolerance itself.
    """
    if get_method(model.ode.method).explicit:
        return UnrolledClassifier(model)
    few = torch.arange(min(TRIAL_IMAGES, len(images)))
    for iterations in range(2, MAX_ITERATIONS + 1):
        unrolled = UnrolledClassifier(model, iterations)
        with tqdm(desc=f"trying {iterations} evaluations", unit=" images", delay=2, disable=None) as progress:
            logits = classify_all(unrolled, images[few], TRIAL_IMAGES, progress)
            least = compare(logits, reference[few]).max_difference
            if least > TRIAL_MARGIN * tolerance:
                continue
            logits = classify_all(unrolled, images, TRIAL_IMAGES, progress)
        if compare(logits, reference).max_difference <= TRIAL_MARGIN * tolerance:
            return unrolled
        few = (logits - reference).abs().amax(dim=1).topk(len(few)).indices
    if least <= tolerance:
        return unrolled
    raise UserError(
        f"unrolled stages of {model.ode.method} come within {least:.1e} of PyTorch's logits in {MAX_ITERATIONS}"
        f" evaluations of f, not within --tolerance {tolerance:g}; raise it, or take more --steps"
    )


def _judge(name: str, batch_size: int, agreement: Agreement, tolerance: float) -> None:
    if agreement.holds(tolerance):
        return
    different = agreement.images - agreement.same_class - agreement.ties
    raise UserError(
        f"{name} disagrees with PyTorch at batch size {batch_size}: logits differ by up to"
        f" {agreement.max_difference:.1e} (--tolerance {tolerance:g}), the class of {different} of {agreement.images}"
        " images differs; nothing was written; take more --steps, another --method or a larger --tolerance"
    )


def save_torchscript(module: torch.nn.Module, metadata: Mapping[str, str], path: Path) -> None:
    """Script ``module`` and save it with its metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        extra = {**metadata, "metadata.json": json.dumps(metadata)}
        extra["classes.txt"] = "\n".join(json.loads(metadata["classes"]))
        buffer = io.BytesIO()  # torch's own writer aborts the process where the disk is full
        torch.jit.save(torch.jit.script(module), buffer, _extra_files=extra)
    path.write_bytes(buffer.getvalue())


def _free(out: Path) -> Path:
    """The folder to write, absolute; it may be new, empty, or an earlier export."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - ALL_FILES)):
        raise UserError(f"--out {out}: holds other files ({others[0]}); name a new folder")
    return out
