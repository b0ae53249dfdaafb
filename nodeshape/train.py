"""``python -m nodeshape.train``: train a classifier of shapes, or of a user's own images, into a run folder."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nodeshape import __version__
from nodeshape._augment import AUGMENTATIONS
from nodeshape._checkpoint import load_checkpoint, save_checkpoint, write_atomically
from nodeshape._classifier import MIN_IMAGE_SIZE, ShapeClassifier
from nodeshape._cli import Parser, UserError, positive_float, positive_int, run, seed, user_input, whole
from nodeshape._datasets import DRAWN_TEST_SIZE, DRAWN_TRAIN_SIZE, Data, drawn_data, folder_data
from nodeshape._error_control import StepSizeError
from nodeshape._images import CHANNELS
from nodeshape._method import METHODS
from nodeshape._shapes import CLASSES
from nodeshape._solve import ADJOINTS
from nodeshape._stage import StageSolveError
from nodeshape._sweep import ReversalDriftError
from nodeshape._training import RECIPES, EpochMetrics, Interrupted, Recipe, Trainer, predict

RUNS = Path("runs")
MIN_STEP_SIZE = 1e-4
DEFAULTS: dict[str, Any] = {
    "task": "single",
    "data": None,
    "method": "euler",
    "step_size": 0.05,
    "adjoint": "discrete",
    "train_size": None,
    "test_size": None,
    "recipe": "default",
    "batch_size": Recipe.batch_size,
    "epochs": Recipe.epochs,
    "lr": Recipe.lr,
    "augment": Recipe.augment,
    "seed": 0,
    "image_size": 32,
    "channels": "grey",
    "device": "auto",
    "strict": False,
}

#: Flags that --recipe sets where they are not given.
RECIPE_FLAGS = ("batch_size", "lr", "augment")


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    given = vars(_parser().parse_args(argv))
    out, resume = given.pop("out", None), given.pop("resume", False)
    if resume:
        out = _latest_run() if out is None else out
        state = load_checkpoint(out / "last.pt")
        config = _stored_config(out, given)
    else:
        state = None
        recipe = asdict(RECIPES[given.get("recipe", DEFAULTS["recipe"])])
        config = {**DEFAULTS, **{name: recipe[name] for name in RECIPE_FLAGS}, **given}
        if config["data"] is not None:
            if "task" in given:
                raise UserError("--task draws images and --data reads yours: give one of the two")
            config["data"], config["task"] = str(Path(config["data"]).resolve()), None
        out = _free_run(config) if out is None else out
        _check_out(out)
        if config["step_size"] < MIN_STEP_SIZE:
            raise UserError(f"--step-size must be at least {MIN_STEP_SIZE:g}, got {config['step_size']:g}")
    device = _device(config["device"])
    with user_input():
        data = _load(config)
    fingerprint = data.fingerprint()
    torch.manual_seed(config["seed"])
    architecture = {
        "num_classes": len(data.classes),
        "image_size": config["image_size"],
        "in_channels": CHANNELS[config["channels"]],
        "method": config["method"],
        "step_size": config["step_size"],
        "adjoint": config["adjoint"],
    }
    with user_input():
        model = ShapeClassifier(**architecture).to(device)
    settings = {name: config[name] for name in RECIPE_FLAGS}
    trainer = Trainer(model, data, Recipe(**settings, epochs=config["epochs"], seed=config["seed"]), device)
    if state is not None:
        if state.get("fingerprint") != fingerprint:
            raise UserError(f"{config['data']}: its images have changed since the run began; start a new run")
        try:
            trainer.restore(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{out / 'last.pt'}: holds no training state of this run; start a new run") from error
    record = {"architecture": architecture, "classes": data.classes, "fingerprint": fingerprint, **config}
    folder = RunFolder(out, record)
    folder.begin(trainer)
    _announce(out, config, data, model, device, trainer)
    try:
        trainer.run(lambda metrics: folder.epoch_done(trainer, metrics))
    except Interrupted:
        folder.save_last(trainer)
        done = trainer.progress
        print(f"interrupted in epoch {done.epoch + 1} after {done.batch} of {trainer.batches} batches; continue with:")
        print(f"python -m nodeshape.train --resume --out {shlex.quote(str(out))}")
        sys.exit(130)
    except (StageSolveError, StepSizeError, ReversalDriftError) as error:
        folder.save_last(trainer)
        raise UserError(str(error)) from error
    folder.finish(trainer)


class RunFolder:
    """A run's files: config.json, metrics.jsonl, last.pt, best.pt and pictures.

    Args:
        path: of the folder.
        config: what a checkpoint and config.json record of the run.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    def begin(self, trainer: Trainer) -> None:
        """Create the folder with what a resumed run needs, before the first step."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "nodeshape_version": __version__, "torch_version": str(torch.__version__)}
        write_atomically(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        if trainer.progress.epoch == trainer.progress.batch == 0:
            self.save_last(trainer)

    def epoch_done(self, trainer: Trainer, metrics: EpochMetrics) -> None:
        """Record an epoch, print its line, and keep the model if none was more accurate."""
        history = trainer.progress.history
        if metrics.test_accuracy >= max(m.test_accuracy for m in history):
            save_checkpoint(
                self.path / "best.pt", {**self.config, "model": trainer.model.state_dict(), "epoch": metrics.epoch}
            )
        lines = "".join(json.dumps(asdict(m)) + "\n" for m in history)
        write_atomically(self.path / "metrics.jsonl", lines.encode())
        self.save_last(trainer)
        print(
            f"epoch {metrics.epoch}/{trainer.recipe.epochs}  loss {metrics.train_loss:.4f}  test accuracy"
            f" {100 * metrics.test_accuracy:6.2f}%  {metrics.seconds:.1f} s training"
            f", {metrics.test_seconds:.1f} s testing"
            f"  evaluations of f {metrics.nfe_forward:.1f} forward, {metrics.nfe_backward:.1f} backward",
            flush=True,
        )

    def save_last(self, trainer: Trainer) -> None:
        """Write the checkpoint that ``--resume`` continues from."""
        save_checkpoint(self.path / "last.pt", {**self.config, **trainer.state()})

    def finish(self, trainer: Trainer) -> None:
        """Draw the pictures of the best epoch's model and say what to do next."""
        from nodeshape import _plots  # matplotlib takes a second to import

        history, data = trainer.progress.history, trainer.data
        best = load_checkpoint(self.path / "best.pt")
        trainer.model.load_state_dict(best["model"])
        probabilities = predict(trainer.model, data.test, trainer.device).softmax(dim=1)
        predicted = probabilities.argmax(dim=1)
        right = int((predicted == data.test.labels).sum())
        what = self.config["task"] or Path(self.config["data"]).name
        title = f"{what}, {self.config['method']}, h={self.config['step_size']:g}"
        score = f"{right} of {len(data.test)} test images right"
        _plots.learning_curve(history, title, self.path / "learning_curve.png")
        _plots.confusion_matrix(
            data.test.labels, predicted, data.classes, f"{title}\n{score}", self.path / "confusion_matrix.png"
        )
        _plots.samples(
            data.test.images,
            data.test.labels,
            probabilities,
            data.classes,
            f"{title}: {score}",
            self.path / "samples.png",
        )
        print(f"best: {100 * right / len(data.test):.2f}% ({score}), epoch {best['epoch']}")
        print(f"pictures and checkpoints are in {self.path}; export the best one with:")
        print(f"python -m nodeshape.export {shlex.quote(str(self.path / 'best.pt'))}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("train", "Train a Neural-ODE classifier of drawn shapes, or of your own images.")

    def add(flag: str, text: str, **settings: Any) -> None:
        default = DEFAULTS.get(flag.lstrip("-").replace("-", "_"))
        text += f" (default: {default})" if default not in (None, False) else ""
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **settings)

    add("--task", "shapes to draw: one a picture, or none, one or two", choices=list(CLASSES))
    add(
        "--data",
        "train on your own images: DIR/CLASS/*.png, or DIR/train/CLASS/*.png and DIR/test/CLASS/*.png",
        metavar="DIR",
    )
    add("--method", "solver of the ODE", choices=list(METHODS))
    add("--step-size", "step of the solver; the ODE runs from 0 to 1", type=positive_float, metavar="H")
    add("--adjoint", "how gradients are computed", choices=ADJOINTS)
    sizes = (
        (f"{DRAWN_TRAIN_SIZE} drawn, or all of yours", "train"),
        (f"{DRAWN_TEST_SIZE} drawn, or all of yours", "test"),
    )
    for default, name in sizes:
        add(f"--{name}-size", f"number of {name} images (default: {default})", type=whole(2), metavar="N")
    small = ", ".join(f"--{name.replace('_', '-')} {getattr(RECIPES['small'], name)}" for name in RECIPE_FLAGS)
    add("--recipe", f"small, for a few hundred images, stands for {small}", choices=list(RECIPES))
    add("--batch-size", "images a step", type=positive_int, metavar="N")
    add("--epochs", "passes over the training images", type=positive_int, metavar="N")
    add("--lr", "peak learning rate", type=positive_float)
    add("--augment", "shift: images move and grow a little; turn: also turn and mirror", choices=AUGMENTATIONS)
    add("--seed", "fixes images, weights and order", type=seed)
    add(
        "--image-size",
        "side of the images in pixels; yours are resized",
        type=whole(MIN_IMAGE_SIZE, 1024),
        metavar="PIXELS",
    )
    add("--channels", "colour of the images", choices=list(CHANNELS))
    add("--device", "auto, cpu, cuda or cuda:N")
    add("--strict", "stop at the first unreadable image instead of skipping it", action="store_true")
    add("--out", "run folder (default: runs/TASK-METHOD)", type=Path, metavar="DIR")
    add("--resume", "continue the run in --out, or the latest one", action="store_true")
    return parser


def _load(config: dict[str, Any]) -> Data:
    image_size, channels, seed = config["image_size"], config["channels"], config["seed"]
    train_size, test_size = config["train_size"], config["test_size"]
    if config["data"] is None:
        print(
            f"drawing {train_size or DRAWN_TRAIN_SIZE} training and {test_size or DRAWN_TEST_SIZE} test images",
            flush=True,
        )
        return drawn_data(
            config["task"], train_size or DRAWN_TRAIN_SIZE, test_size or DRAWN_TEST_SIZE, image_size, channels, seed
        )
    data = folder_data(Path(config["data"]), train_size, test_size, image_size, channels, seed, config["strict"])
    for error in data.unreadable[:10]:
        print(f"skipped {error}", file=sys.stderr)
    if data.unreadable:
        print(f"skipped {len(data.unreadable)} unreadable files", file=sys.stderr)
    return data


def _announce(
    out: Path, config: dict[str, Any], data: Data, model: ShapeClassifier, device: torch.device, trainer: Trainer
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes"
        f" ({', '.join(data.classes[:8])}{', …' if len(data.classes) > 8 else ''})"
    )
    print(
        f"{parameters:,} parameters, {config['method']} with h={config['step_size']:g}, gradient {config['adjoint']},"
        f" on {device}; run folder {out}"
    )
    if trainer.progress.epoch or trainer.progress.batch:
        print(f"resuming in epoch {trainer.progress.epoch + 1} after batch {trainer.progress.batch}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def _free_run(config: dict[str, Any]) -> Path:
    """The first of runs/NAME, runs/NAME-2, … that is not taken."""
    what = config["task"] or Path(config["data"]).name
    name = f"{what}-{config['method']}"
    number = 1
    while (path := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _check_out(out: Path) -> None:
    """Refuse, before any work, a run folder that cannot be made or would hide what is there."""
    if (out / "last.pt").exists():
        raise UserError(f"{out}: already holds a run; add --resume to continue it, or choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is a folder with other files; choose a new one with --out")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above}: is a file; choose a folder with --out")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above}: may not be written; choose another folder with --out")


def _latest_run() -> Path:
    runs = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"--resume: no run in {RUNS}/; name one with --out")
    return runs[-1].parent


def _stored_config(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    try:
        stored = json.loads((out / "config.json").read_text())
        config = {name: stored[name] for name in DEFAULTS}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out / 'config.json'}: not readable; the run cannot be resumed") from error
    for name, value in given.items():
        if name == "device":
            config[name] = value
        elif name == "data" and str(Path(value).resolve()) == config["data"]:
            continue
        elif value != config[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} differs from the run's {config[name]}; leave it out, or start a new run")
    return config


if __name__ == "__main__":
    run(main)
