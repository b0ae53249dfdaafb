"""An export: a classifier as files that give PyTorch's logits, a report and an example image."""

from __future__ import annotations

import json
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
from nodeshape._cli import picture
from nodeshape._errors import StageSolveError, UserError
from nodeshape._exporting import custom_ops
from nodeshape._exporting import native as native_files
from nodeshape._exporting.module import (
    OPSET,
    ExportReport,
    Progress,
    Run,
    Subject,
    write_onnx,
    write_pt2,
    write_torchscript,
)
from nodeshape._exporting.smaller import STAGE_TOLERANCE, judge, judge_time, logits_of, write_half, write_int8
from nodeshape._exporting.solvers import plot_solvers, try_solvers
from nodeshape._exporting.verify import (
    BATCH_SIZES,
    MOST_BATCHES,
    Agreement,
    Classify,
    check_images,
    classify_all,
    compare,
    milliseconds,
)
from nodeshape._files import partial_folder, put_back, put_in_place
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.options import steps_of

TOLERANCE = 1e-4
ONNX, TORCHSCRIPT, PT2, REPORT, EXAMPLE = "model.onnx", "model.ts", "model.pt2", "report.json", "example.png"
#: The file of which that of integers is made, where stages end at another tolerance there.
LOOSE = "model.loose.onnx"
INT8, HALF, SOLVERS = "model.int8.onnx", "model.half.onnx", "solvers.png"
FILES = {ONNX, TORCHSCRIPT, PT2, REPORT, EXAMPLE}
#: Those, and what is written where it is asked for.
ALL_FILES = FILES | {INT8, HALF, SOLVERS} | native_files.FILES
#: Images of the training set that say what ranges integers stand for.
RANGE_IMAGES = 300
#: Images that solvers are tried on.
SOLVER_IMAGES = 200
#: Images that decide how few evaluations of f an implicit stage takes.
TRIAL_IMAGES = 100
Writer = Callable[..., tuple[ExportReport, Run]]
#: Types of the images that files take, and what the values of their pixels are.
INPUTS = {"float32": "float32 in [0, 1]", "uint8": "uint8"}
PREPROCESSING = (
    "Scale the picture to fit a square of image_size pixels, aspect kept, centred on its border's median colour; grey"
    " or RGB values as {}, [batch, channels, image_size, image_size]. Normalisation is in the model."
)


def write_export_folder(
    out: Path,
    model: ShapeClassifier,
    classes: Sequence[str],
    state: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    trajectory: bool = False,
    *,
    quantize: bool = False,
    half: bool = False,
    native: bool = False,
    solver_tolerance: float | None = None,
    image_count: int | None = None,
    input_type: str = "float32",
) -> dict[str, Any]:
    """Write ``FILES`` to the folder ``out``: all, or nothing.

    Args:
        out: a new or empty folder, or an earlier export, which is replaced.
        model: in evaluation mode, with the solver to export.
        classes: their names, by index of the logits.
        state: the checkpoint, for the images it was trained on, see :func:`check_images`.
        tolerance: largest allowed difference of a logit between PyTorch and an exported file.
        trajectory: give the models a second output, the states ``[batch, steps + 1, channels, height, width]``.
        quantize, half: write the ONNX file in 8-bit integers, or 16-bit floating point, too.
        solver_tolerance: take the quickest solver whose logits are within it of a converged solve's.
        native: also write the files of :func:`nodeshape.to_native`, which give the logits alone.
        image_count: images to compare the files on; None for 1,000, or 300 where the method is implicit.
        input_type: of the files' images, of ``INPUTS``.

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
            chosen: dict[str, Any] = {}
            if solver_tolerance is not None:
                tried, best = try_solvers(model, check_images(model, state, SOLVER_IMAGES), solver_tolerance)
                with picture(partial / SOLVERS):
                    plot_solvers(tried, solver_tolerance, partial / SOLVERS)
                model = model.with_solver(best.method, best.steps)
                chosen["solvers"] = {"tolerance": solver_tolerance, "tried": [asdict(x) for x in tried]}
            checked = check_images(model, state, image_count)
            images = checked.typed(input_type)
            ranges = check_images(model, state, RANGE_IMAGES, "train").typed(input_type) if quantize else None
            how = (tolerance, trajectory, native, ranges, half)
            report = _write(partial, model, list(classes), images, checked.labels, *how) | chosen
            report["images"] = {"count": len(images), "source": checked.source}
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
    images: Tensor,
    labels: Tensor,
    tolerance: float,
    trajectory: bool,
    native: bool,
    ranges: Tensor | None,
    half: bool,
) -> dict[str, Any]:
    metadata = metadata_of(model, classes, _input_type(images))
    seconds = dict.fromkeys(("reference", "choice", "writing", "proof"), 0.0)
    with tqdm(total=len(images), desc="PyTorch's logits", unit=" images", delay=2, disable=None) as progress:
        start = perf_counter()
        reference = classify_all(model, images, TRIAL_IMAGES, progress)
        seconds["reference"] = perf_counter() - start
    pixels = (images[0] if images.dtype == torch.uint8 else (images[0] * 255).round().to(torch.uint8)).numpy()
    grey = model.in_channels == 1
    Image.fromarray(pixels[0] if grey else pixels.transpose(1, 2, 0)).save(folder / EXAMPLE)

    files: dict[str, dict[str, Any]] = {}

    def prove(name: str, classify: Classify) -> None:
        start = perf_counter()
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
        seconds["proof"] += perf_counter() - start

    start = perf_counter()
    trials = images[:TRIAL_IMAGES]
    with Progress("files"):
        # The proof takes other sizes, of more images.
        subject = Subject(model, trials, tolerance, trajectory, batch_sizes={1, len(trials)})
    seconds["choice"] = perf_counter() - start
    for name, write in WRITERS.items():
        while True:
            start = perf_counter()
            written, run = write(model, trials, folder / name, metadata, trajectory, tolerance, subject)
            seconds["writing"] += perf_counter() - start

            def classify(batch: Tensor, run: Run = run) -> Tensor:
                return run([batch])[0]

            try:
                prove(name, classify)
            except _Disagreement:  # on images that are harder than those that the stages' tolerance was chosen on
                if (exact := subject.exact()) is None:
                    raise
                subject = exact
            else:
                break
        files[name] |= {"nodes": written.nodes, "stage_iterations": written.stage_iterations}
    if native:
        start = perf_counter()
        readers = native_files.write_native(folder, model, images, metadata, tolerance, _named(images))
        seconds["writing"] += perf_counter() - start
        for name, load in readers:
            prove(name, load(folder / name))
    smaller, loose = [], None
    if ranges is not None:
        smaller.append(INT8)
        source, loose = folder / ONNX, subject.loose(STAGE_TOLERANCE)
        if loose is not None:
            source = folder / LOOSE
            write_classifier_onnx(model, trials, source, metadata, trajectory, tolerance, loose)
        write_int8(source, folder / INT8, ranges)
    if half:
        smaller.append(HALF)
        write_half(folder / ONNX, folder / HALF)
    if smaller:
        of_onnx = logits_of(folder / ONNX, images)
        files |= {name: judge(folder / name, images, labels, of_onnx) for name in smaller}
    if loose is not None:
        judge_time(folder / INT8, folder / ONNX, images[:1], files[INT8])
        (folder / LOOSE).unlink()
    reason = custom_ops.why_missing() if native else None
    return {
        **{key: metadata[key] for key in ("nodeshape_version", "channels", "input", "method")},
        "classes": classes,
        "image_size": model.image_size,
        "steps": int(metadata["steps"]),
        "stage_iterations": files[ONNX]["stage_iterations"] or 1,
        "trajectory": trajectory,
        "tolerance": tolerance,
        "files": files,
        "left_out": {native_files.ONNX: reason} if reason else {},
        "pytorch_latency_ms": milliseconds(model, images[:1]),
        "opset": OPSET,
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "seconds": seconds,
    }


def metadata_of(model: ShapeClassifier, classes: Sequence[str], input_type: str) -> dict[str, str]:
    """What a program needs to know of a classifier's file, whose images are of a type of ``INPUTS``.

    Raises:
        UserError: the model chooses its steps by error control.
    """
    if model.ode.steps is None and model.ode.step_size is None:
        raise UserError(
            "an exported classifier takes a fixed number of steps, this one's are chosen by error control: give it a"
            " number, by --steps or model.with_solver(steps=...)"
        )
    return {
        "classes": json.dumps(list(classes)),
        "image_size": str(model.image_size),
        "channels": "grey" if model.in_channels == 1 else "rgb",
        "input": input_type,
        "method": model.ode.method,
        "steps": str(model.ode.steps or steps_of(1.0, model.ode.step_size or 1.0)),
        "nodeshape_version": __version__,
        "preprocessing": PREPROCESSING.format(INPUTS[input_type]),
    }


def _input_type(images: Tensor) -> str:
    """The name of the images' type, in ``INPUTS``."""
    return str(images.dtype).removeprefix("torch.")


def _named(images: Tensor) -> dict[str, Any]:
    """What the ONNX file of a classifier of such images calls its output, and says of it and others."""
    return {
        "output": "logits",
        "docs": {
            "image": PREPROCESSING.format(INPUTS[_input_type(images)]),
            "logits": "[batch, classes]; their softmax are the probabilities of the classes in the metadata",
            "trajectory": "states of the ODE from t=0 to t=1, [batch, steps + 1, channels, height, width]",
        },
    }


def write_classifier_onnx(
    model: ShapeClassifier,
    images: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    trajectory: bool = False,
    tolerance: float = TOLERANCE,
    subject: Subject | None = None,
) -> tuple[ExportReport, Run]:
    """ONNX, ``image`` to ``logits``; ``subject`` is one of the model and these images, where files share it."""
    settings: dict[str, Any] = {"trajectory": trajectory, "tolerance": tolerance, "subject": subject}
    return write_onnx(model, images, path, metadata=metadata, **settings, **_named(images))


def _with_texts(write: Writer) -> Writer:
    """A writer whose files hold the texts of their metadata."""

    def written(
        model: ShapeClassifier,
        images: Tensor,
        path: Path,
        metadata: Mapping[str, str],
        trajectory: bool = False,
        tolerance: float = TOLERANCE,
        subject: Subject | None = None,
    ) -> tuple[ExportReport, Run]:
        classes = "\n".join(json.loads(metadata["classes"]))
        files = {**metadata, "metadata.json": json.dumps(metadata), "classes.txt": classes}
        settings: dict[str, Any] = {"trajectory": trajectory, "tolerance": tolerance, "subject": subject}
        return write(model, images, path, files=files, **settings)

    return written


#: TorchScript and a program of torch.export, images to logits.
write_classifier_torchscript, write_classifier_pt2 = _with_texts(write_torchscript), _with_texts(write_pt2)

WRITERS: dict[str, Writer] = {
    ONNX: write_classifier_onnx,
    TORCHSCRIPT: write_classifier_torchscript,
    PT2: write_classifier_pt2,
}


class _Disagreement(UserError):
    """A file whose logits are not PyTorch's."""


def _judge(name: str, batch_size: int, agreement: Agreement, tolerance: float) -> None:
    if agreement.holds(tolerance):
        return
    different = agreement.images - agreement.same_class - agreement.ties
    raise _Disagreement(
        f"{name} disagrees with PyTorch at batch size {batch_size}: logits differ by up to"
        f" {agreement.max_difference:.1e} (--max-difference {tolerance:g}), the class of {different} of"
        f" {agreement.images} images differs; nothing was written: take more --steps, another --method or a larger"
        " --max-difference"
    )


def _free(out: Path) -> Path:
    """The folder to write, absolute; it may be new, empty, or an earlier export."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - ALL_FILES)):
        raise UserError(f"--out {out}: holds other files ({others[0]}); name a new folder")
    return out
