"""``python -m nodeshape.export``: write a trained classifier as ONNX and TorchScript files that provably agree."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Sequence
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
from nodeshape._cli import Parser, positive_float, positive_int, run, user_input
from nodeshape._errors import StageSolveError, UserError
from nodeshape._exporting.onnx import OPSET, to_onnx
from nodeshape._exporting.unrolled import UnrolledClassifier, UnrolledTrajectory
from nodeshape._exporting.verify import (
    BATCH_SIZES,
    Agreement,
    check_images,
    classify_all,
    compare,
    load_onnx,
    load_torchscript,
    milliseconds,
)
from nodeshape._files import partial_folder, partial_path
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.method import METHODS, get_method
from nodeshape._training.checkpoint import load_checkpoint, load_classifier

TOLERANCE = 1e-4
ONNX, TORCHSCRIPT, REPORT, EXAMPLE = "model.onnx", "model.ts", "report.json", "example.png"
FILES = {ONNX, TORCHSCRIPT, REPORT, EXAMPLE}
#: Most evaluations of f that an unrolled stage may take.
MAX_ITERATIONS = 30
#: Images that decide whether a number of evaluations is tried on all, and the part of the tolerance it must keep to.
TRIAL_IMAGES, TRIAL_MARGIN = 100, 0.25
PREPROCESSING = (
    "Scale the picture to fit a square of image_size pixels, aspect kept, centred on its border's median colour; grey"
    " or RGB values as float32 in [0, 1], [batch, channels, image_size, image_size]. Normalisation is in the model."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says, print the proof and say what to type next."""
    parser = Parser(
        "export", "Write a trained classifier as ONNX and TorchScript, and prove that they give its logits."
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: export/ in the run folder)")
    parser.add_argument("--method", choices=tuple(METHODS), help="another solver than the one trained with")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="another number of steps")
    parser.add_argument(
        "--tolerance", type=positive_float, default=TOLERANCE, help="largest allowed difference of a logit"
    )
    parser.add_argument("--trajectory", action="store_true", help="also give the states of the ODE as an output")
    args = parser.parse_args(argv)

    out = args.checkpoint.parent / "export" if args.out is None else args.out
    report = export(args.checkpoint, out, args.method, args.steps, args.tolerance, args.trajectory)
    solver = f"{report['method']}, {report['steps']} steps"
    if not get_method(report["method"]).explicit:
        solver += f" of {report['stage_iterations']} evaluations of f"
    print(f"{args.checkpoint}: {solver}; compared with PyTorch on {report['images']['source']} images")
    print(f"{'':<12}{'largest difference':>20}{'same class':>18}{'size':>12}{'one image':>12}")
    for name, figures in report["files"].items():
        print(
            f"{name:<12}{figures['max_difference']:>20.1e}"
            f"{figures['same_class']:>10} of {figures['images']}"
            f"{figures['bytes'] / 1e6:>9.2f} MB{figures['latency_ms']:>9.2f} ms"
        )
    print(f"{'PyTorch':<12}{'':>50}{report['pytorch_latency_ms']:>9.2f} ms")
    ties = max(figures["ties"] for figures in report["files"].values())
    if ties:
        print(f"{ties} images are ties: their two largest logits are closer than the files differ")
    print(f"Wrote {', '.join(sorted(FILES))} to {out} in {report['seconds']['total']:.1f} s; classify with:")
    print(f"python -m nodeshape.predict {shlex.quote(str(out / ONNX))} {shlex.quote(str(out / EXAMPLE))}")


def export(
    checkpoint: Path,
    out: Path,
    method: str | None = None,
    steps: int | None = None,
    tolerance: float = TOLERANCE,
    trajectory: bool = False,
) -> dict[str, Any]:
    """Write ``model.onnx``, ``model.ts``, ``report.json`` and ``example.png`` to the folder ``out``: all, or nothing.

    Args:
        checkpoint: ``best.pt`` or ``last.pt`` of a run folder.
        out: a new or empty folder, or an earlier export, which is replaced.
        method, steps: solve the ODE otherwise than in training.
        tolerance: largest allowed difference of a logit between PyTorch and an exported file.
        trajectory: give the models a second output, the states ``[batch, steps + 1, channels, height, width]``.

    Returns:
        the report.

    Raises:
        UserError: the checkpoint or ``out`` cannot be used, or an exported file disagrees with PyTorch.
    """
    start = perf_counter()
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint}: is a folder; name a checkpoint, such as {checkpoint / 'best.pt'}")
    state = load_checkpoint(checkpoint)
    model, classes = load_classifier(checkpoint)
    out = _free(out)
    with user_input():
        model = model.with_solver(method, steps)
    home = next(folder for folder in out.parents if folder.is_dir())
    with partial_folder(home / out.name) as partial:
        try:
            report = _write(partial, model, classes, state, tolerance, trajectory)
        except StageSolveError as error:
            raise UserError(str(error)) from error
        report["seconds"]["total"] = perf_counter() - start
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        _move(partial, out)
    return report


def _write(
    folder: Path, model: ShapeClassifier, classes: list[str], state: dict[str, Any], tolerance: float, trajectory: bool
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
    _save_torchscript(UnrolledTrajectory(unrolled) if trajectory else unrolled, metadata, folder / TORCHSCRIPT)
    pixels = (images[0] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels[0] if channels == "grey" else pixels.transpose(1, 2, 0)).save(folder / EXAMPLE)
    seconds["writing"] = perf_counter() - start

    start = perf_counter()
    files = {}
    for name, load in ((ONNX, load_onnx), (TORCHSCRIPT, load_torchscript)):
        classify = load(folder / name)
        by_batch_size = {}
        with tqdm(total=3 * len(images), desc=f"{name}'s logits", unit=" images", delay=2, disable=None) as progress:
            for size in BATCH_SIZES:
                agreement = compare(classify_all(classify, images, size, progress), reference)
                _judge(name, size, agreement, tolerance)
                by_batch_size[str(size)] = asdict(agreement)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "images": len(images),
            "max_difference": max(figures["max_difference"] for figures in by_batch_size.values()),
            "same_class": min(figures["same_class"] for figures in by_batch_size.values()),
            "ties": max(figures["ties"] for figures in by_batch_size.values()),
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
    """Unroll with the fewest evaluations of f a stage that give PyTorch's logits with a margin.

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
        " images differs; nothing was written"
    )


def _save_torchscript(module: torch.nn.Module, metadata: dict[str, str], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        extra = {"metadata.json": json.dumps(metadata), "classes.txt": "\n".join(json.loads(metadata["classes"]))}
        torch.jit.save(torch.jit.script(module), path, _extra_files=extra)


def _free(out: Path) -> Path:
    """The folder to write, absolute; it may be new, empty, or an earlier export."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - FILES)):
        raise UserError(f"--out {out}: holds other files ({others[0]}); name a new folder")
    return out


def _move(folder: Path, out: Path) -> None:
    """Put a finished folder in the place of ``out``."""
    old = partial_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    run(main)
