"""``python -m nodeshape.export``: a trained classifier as files that give PyTorch's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodeshape._cli import Parser, positive_float, positive_int, run, say, shell_word, user_input
from nodeshape._errors import UserError
from nodeshape._exporting.export_folder import EXAMPLE, INPUTS, ONNX, TOLERANCE, write_export_folder
from nodeshape._exporting.verify import IMAGES, IMPLICIT_IMAGES
from nodeshape._ode.method import SOURCE_METHODS, get_method
from nodeshape._training.checkpoint import load_checkpoint, load_classifier


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says, print the report and say what to type next."""
    parser = Parser(
        "export", "Write a trained classifier as ONNX, TorchScript and .pt2, and verify that they give its logits."
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: export/ in the run folder)")
    parser.add_argument(
        "--method", choices=tuple(SOURCE_METHODS), help="solve the ODE by another method than in training"
    )
    parser.add_argument("--steps", type=positive_int, metavar="N", help="solve it in another number of equal steps")
    parser.add_argument(
        "--max-difference",
        type=positive_float,
        default=TOLERANCE,
        metavar="D",
        help="largest allowed difference of a logit from PyTorch's (default: %(default)g)",
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        metavar="N",
        help=f"compare on so many (default: {IMAGES}, of implicit methods {IMPLICIT_IMAGES})",
    )
    parser.add_argument(
        "--tolerance",
        type=positive_float,
        metavar="T",
        help="try every solver and take the quickest whose logits are within T of a converged solve's",
    )
    parser.add_argument(
        "--input",
        choices=tuple(INPUTS),
        default="float32",
        help="what images the files take: float32 in [0, 1], or uint8 as they are read (default: %(default)s)",
    )
    parser.add_argument("--quantize", action="store_true", help="also write model.int8.onnx, of 8-bit integers")
    parser.add_argument("--half", action="store_true", help="also write model.half.onnx, of 16-bit floating point")
    parser.add_argument("--trajectory", action="store_true", help="give the states of the ODE as a second output")
    parser.add_argument(
        "--native",
        action="store_true",
        help="also write files that run nodeshape's own kernels, for Python and C++: TorchScript, a package of"
        " AOTInductor, ONNX where its library was built, and the libraries they need",
    )
    args = parser.parse_args(argv)

    out = args.checkpoint.parent / "export" if args.out is None else args.out
    if args.tolerance is not None and (args.method is not None or args.steps is not None):
        parser.error("--tolerance chooses method and steps: leave --method and --steps out")
    report = export(
        args.checkpoint,
        out,
        args.method,
        args.steps,
        args.max_difference,
        args.trajectory,
        quantize=args.quantize,
        half=args.half,
        native=args.native,
        tolerance=args.tolerance,
        images=args.images,
        input_type=args.input,
    )
    _print(report, args.checkpoint, out)


def export(
    checkpoint: Path,
    out: Path,
    method: str | None = None,
    steps: int | None = None,
    max_difference: float = TOLERANCE,
    trajectory: bool = False,
    *,
    quantize: bool = False,
    half: bool = False,
    native: bool = False,
    tolerance: float | None = None,
    images: int | None = None,
    input_type: str = "float32",
) -> dict[str, Any]:
    """Export a checkpoint, ``best.pt`` or ``last.pt`` of a run folder, as :func:`write_export_folder` does.

    Args:
        method, steps: solve the ODE otherwise than in training.
        tolerance: take the quickest solver whose logits are within it of a converged solve's instead.
        max_difference, trajectory, quantize, half, native: as there.
        images: its ``image_count``.
        input_type: as there.

    Raises:
        UserError: the checkpoint or ``out`` cannot be used, or an exported file disagrees with PyTorch.
    """
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint}: is a folder; name a checkpoint, such as {checkpoint / 'best.pt'}")
    state = load_checkpoint(checkpoint)
    model, classes = load_classifier(checkpoint)
    with user_input():
        model = model.with_solver(method, steps)
    return write_export_folder(
        out,
        model,
        classes,
        state,
        max_difference,
        trajectory,
        quantize=quantize,
        half=half,
        native=native,
        solver_tolerance=tolerance,
        image_count=images,
        input_type=input_type,
    )


def _print(report: dict[str, Any], checkpoint: Path, out: Path) -> None:
    if "solvers" in report:
        say(f"{'method':<18}{'steps':>6}{'difference':>13}{'same class':>13}{'accuracy':>11}{'one image':>13}")
        for x in report["solvers"]["tried"]:
            mark = " <-" if (x["method"], x["steps"]) == (report["method"], report["steps"]) else ""
            accuracy = "-" if x["accuracy"] is None else f"{x['accuracy']:.2%}"
            say(
                f"{x['method']:<18}{x['steps']:>6}{x['difference']:>13.1e}{x['same_class']:>13.2%}{accuracy:>11}"
                f"{x['milliseconds']:>10.2f} ms{mark}"
            )
    solver = f"{report['method']}, {report['steps']} steps"
    if not get_method(report["method"]).explicit:
        solver += f" of at most {report['stage_iterations']} evaluations of f"
    say(f"{checkpoint}: {solver}; compared with PyTorch on {report['images']['source']} images")
    say(f"{'':<18}{'largest difference':>20}{'same class':>18}{'size':>12}{'one image':>12}")
    for name, figures in report["files"].items():
        say(
            f"{name:<18}{figures['max_difference']:>20.1e}"
            f"{figures['same_class']:>10} of {figures['images']}"
            f"{figures['bytes'] / 1e6:>9.2f} MB"
            + (f"{figures['latency_ms']:>9.2f} ms" if "latency_ms" in figures else "")
        )
    say(f"{'PyTorch':<18}{'':>50}{report['pytorch_latency_ms']:>9.2f} ms")
    for name, reason in report["left_out"].items():
        say(f"{name} is left out: {reason}")
    ties = max(figures["ties"] for figures in report["files"].values())
    if ties:
        say(f"{ties} images are ties: their two largest logits are closer than the files differ")
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    say(f"Wrote {written} to {out} in {report['seconds']['total']:.1f} s; classify with:")
    say(f"python -m nodeshape.predict {shell_word(out / ONNX)} {shell_word(out / EXAMPLE)}")


if __name__ == "__main__":
    run(main, though_unheard=True)
