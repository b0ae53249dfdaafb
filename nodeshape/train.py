"""``python -m nodeshape.train``: train a classifier of shapes, or of a user's own images, into a run folder."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import sys
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nodeshape._cli import Parser, positive_float, positive_int, run, seed, user_input, whole
from nodeshape._data.augment import AUGMENTATIONS
from nodeshape._data.datasets import (
    DRAWN_TEST_SIZE,
    DRAWN_TRAIN_SIZE,
    MEMORY_BYTES,
    MEMORY_FILES,
    Data,
    drawn_data,
    folder_data,
)
from nodeshape._data.images import CHANNELS
from nodeshape._data.shapes import CLASSES
from nodeshape._data.streaming import StreamedSplit
from nodeshape._errors import ReversalDriftError, StageSolveError, StepSizeError, UserError
from nodeshape._files import PARTIAL
from nodeshape._models.classifier import MIN_IMAGE_SIZE, ShapeClassifier
from nodeshape._ode.method import METHODS
from nodeshape._ode.problem import ADJOINTS
from nodeshape._training.checkpoint import load_checkpoint
from nodeshape._training.processes import Processes, ending_at_once, is_lost_contact
from nodeshape._training.run_folder import RunFolder
from nodeshape._training.trainer import CLASS_WEIGHTS, RECIPES, Diverged, Interrupted, Recipe, Trainer

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
    "patience": Recipe.patience,
    "lr": Recipe.lr,
    "clip_norm": Recipe.clip_norm,
    "class_weights": Recipe.class_weights,
    "amp": Recipe.amp,
    "dtype": "float32",
    "augment": Recipe.augment,
    "seed": 0,
    "image_size": 32,
    "channels": "grey",
    "device": "auto",
    "strict": False,
    "stream": False,
    "tensorboard": False,
}
#: May be given anew with --resume.
CHANGEABLE = ("device", "tensorboard")

#: Flags that --recipe sets where they are not given.
RECIPE_FLAGS = ("batch_size", "lr", "augment")


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says, as one process or as one of those that torchrun started."""
    processes = Processes.from_environment()
    with open(os.devnull, "w") as nowhere, ExitStack() as silence:
        if processes.count > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends what another process's end left waiting
        if not processes.first:
            silence.enter_context(redirect_stdout(nowhere))
        try:
            with ExitStack() as startup:
                if not processes.first:
                    startup.enter_context(redirect_stderr(nowhere))
                trainer, folder = _prepare(argv, processes)
        except UserError:
            processes.let_the_first_speak()
            raise
        _train(trainer, folder)


def _prepare(argv: list[str] | None, processes: Processes) -> tuple[Trainer, RunFolder]:
    """The trainer that the command line describes, at its start or where its run was left, and its run folder."""
    given = vars(_parser().parse_args(argv))
    out, resume = given.pop("out", None), given.pop("resume", False)
    if resume:
        out = _latest_run() if out is None else out
        state = load_checkpoint(out / "last.pt")
        config = _stored_config(state, given, out / "last.pt")
    else:
        state = None
        recipe = RECIPES[given.get("recipe", DEFAULTS["recipe"])]
        config = {**DEFAULTS, **{name: getattr(recipe, name) for name in RECIPE_FLAGS}, **given}
        if config["data"] is not None:
            if "task" in given:
                raise UserError("--task draws images and --data reads yours: give one of the two")
            config["data"], config["task"] = str(Path(config["data"]).resolve()), None
        elif config["stream"]:
            raise UserError("--stream reads the images of --data while training: give --data too")
        out = _free_run(config) if out is None else out
        if processes.first:
            _check_out(out)
        if config["step_size"] < MIN_STEP_SIZE:
            raise UserError(f"--step-size must be at least {MIN_STEP_SIZE:g}, got {config['step_size']:g}")
    if config["amp"] and config["dtype"] != "float32":
        raise UserError(f"--amp is for float32: leave out --amp or --dtype {config['dtype']}")
    if config["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    device = _device(config["device"], processes)
    if config["amp"] and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"--amp: {torch.cuda.get_device_name(device)} has no bfloat16; leave it out")
    with user_input():
        data = _load(config, processes)
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
        model = ShapeClassifier(**architecture).to(device, getattr(torch, config["dtype"]))
    settings = {field.name: config[field.name] for field in fields(Recipe) if field.name in config}
    processes.connect(device)
    trainer = Trainer(model, data, Recipe(**settings), device, processes)
    if state is not None:
        if state.get("fingerprint") != fingerprint:
            images = "the drawn images" if config["data"] is None else f"{config['data']}: its images"
            raise UserError(f"{images} have changed since the run began; start a new run")
        try:
            trainer.restore(state)
        except Exception as error:  # the file may hold anything
            raise UserError(f"{out / 'last.pt'}: holds no training state of this run; start a new run") from error
    _announce(out, config, trainer)
    return trainer, RunFolder(
        out, {"architecture": architecture, "classes": data.classes, "fingerprint": fingerprint, **config}
    )


def _train(trainer: Trainer, folder: RunFolder) -> None:
    """Train to the end; process 0 writes the folder."""
    processes = trainer.processes
    resume = f"{processes.launcher} -m nodeshape.train --resume --out {shlex.quote(str(folder.path))}"
    try:
        if processes.first:
            folder.begin(trainer)
            trainer.run(
                lambda metrics: folder.epoch_done(trainer, metrics), lambda loss: folder.batch_done(trainer, loss)
            )
        else:
            trainer.run(lambda metrics: None)
        splits = trainer.data.train, trainer.data.test
        unreadable = processes.union(
            {path for split in splits if isinstance(split, StreamedSplit) for path in split.unreadable}
        )
    except Interrupted:
        if processes.first:
            folder.save_last(trainer)
        done = trainer.progress
        print(f"interrupted in epoch {done.epoch + 1} after {done.batch} of {trainer.batches} batches; continue with:")
        print(resume)
        sys.exit(130)
    except (StageSolveError, StepSizeError, ReversalDriftError) as error:
        if processes.first:
            folder.save_last(trainer)
        raise UserError(str(error)) from error
    except Diverged:
        processes.let_the_first_speak()
        raise
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise UserError(
            f"process {processes.rank} of {processes.count} lost contact with the others: one of them ended or was"
            f" killed; continue with: {resume}"
        ) from error
    processes.disconnect()
    if processes.first:
        if trainer.stopped_early:
            print(f"stopped early: no better test accuracy in {trainer.recipe.patience} epochs")
        if unreadable:
            print(f"unreadable files passed over: {len(unreadable)}", file=sys.stderr)
        folder.finish(trainer)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "train",
        "Train a Neural-ODE classifier of drawn shapes, or of your own images. Several processes share the work when"
        " started by: torchrun --nproc-per-node=N -m nodeshape.train ...",
    )

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
    add("--patience", "stop after N epochs without a better test accuracy", type=positive_int, metavar="N")
    add("--lr", "peak learning rate", type=positive_float)
    add("--clip-norm", "scale gradients down to this norm", type=positive_float, metavar="NORM")
    add("--class-weights", "balanced: every class counts the same, however few images it has", choices=CLASS_WEIGHTS)
    add("--amp", "bfloat16 in stem and head (the ODE stays in float32)", action="store_true")
    add("--dtype", "of weights and states; float64 to compare runs without rounding", choices=("float32", "float64"))
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
    add(
        "--stream",
        "read images while training rather than before (what a folder of more than"
        f" {MEMORY_FILES:,} images or {MEMORY_BYTES >> 30} GiB of pixels does anyway)",
        action="store_true",
    )
    add("--tensorboard", "also log to RUN/tensorboard", action="store_true")
    add(
        "--out",
        "run folder (default: runs/TASK-METHOD or runs/FOLDER-METHOD, with -2, -3, ... where that is taken)",
        type=Path,
        metavar="DIR",
    )
    add("--resume", "continue the run in --out, or the latest one", action="store_true")
    return parser


def _load(config: dict[str, Any], processes: Processes) -> Data:
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
    strict, stream = config["strict"], config["stream"]
    readers = max(1, (os.cpu_count() or 1) // processes.local_count)  # processes of one machine share its cores
    data = folder_data(Path(config["data"]), train_size, test_size, image_size, channels, seed, strict, stream, readers)
    for error in data.unreadable[:10]:
        print(f"skipped {error}", file=sys.stderr)
    if data.unreadable:
        print(f"skipped {len(data.unreadable)} unreadable files", file=sys.stderr)
    return data


def _announce(out: Path, config: dict[str, Any], trainer: Trainer) -> None:
    data, processes = trainer.data, trainer.processes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    streamed = ", streamed from disk" if isinstance(data.train, StreamedSplit) else ""
    print(
        f"{len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes"
        f" ({', '.join(data.classes[:8])}{', …' if len(data.classes) > 8 else ''}){streamed}"
    )
    print(
        f"{parameters:,} parameters, {config['method']} with h={config['step_size']:g}, gradient {config['adjoint']},"
        f" on {trainer.device}{f', {processes.count} processes' if processes.count > 1 else ''}; run folder {out}",
        flush=True,
    )
    if trainer.finished:
        print("this run is finished; drawing its pictures again", flush=True)
    elif trainer.steps:
        print(f"resuming in epoch {trainer.progress.epoch + 1} after batch {trainer.progress.batch}", flush=True)


def _device(name: str, processes: Processes) -> torch.device:
    own = f"cuda:{processes.local_rank}" if processes.count > 1 else "cuda"
    if name == "auto":
        return torch.device(own if torch.cuda.device_count() >= processes.local_count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if gpu is None:
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    index = None if gpu[1] is None else int(gpu[1])
    if index is not None and processes.count > 1:
        raise UserError(f"--device {name}: {processes.count} processes need a GPU each; give --device cuda")
    if (processes.local_count if index is None else index + 1) > torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return torch.device(own if index is None else f"cuda:{index}")  # an index that torch has room for


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
    if out.is_dir() and set(out.iterdir()) - set(out.glob(PARTIAL)):
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


def _stored_config(state: dict[str, Any], given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings in a checkpoint, with what may be given anew."""
    config = {name: state.get(name, default) for name, default in DEFAULTS.items()}
    if not _is_config(config):
        raise UserError(f"{path}: its settings are not those of a run; start a new run")
    for name, value in given.items():
        if name in CHANGEABLE:
            config[name] = value
        elif name == "data" and str(Path(value).resolve()) == config["data"]:
            continue
        elif value != config[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} differs from the run's {config[name]}; leave it out, or start a new run")
    return config


def _is_config(config: dict[str, Any]) -> bool:
    """Whether the command line takes these settings, either ``task`` or ``data`` among them."""
    given = {name: value for name, value in config.items() if value is not None and value is not False}
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    try:
        parsed = vars(_parser().parse_args(flags))
    except UserError:
        return False
    absent = {name: DEFAULTS[name] for name in DEFAULTS.keys() - parsed.keys()}
    if config["data"] is not None:
        absent["task"] = None
    return {**absent, **parsed} == config and (config["task"] is None) != (config["data"] is None)


if __name__ == "__main__":
    with ending_at_once() if Processes.from_environment().count > 1 else nullcontext():
        run(main)
