"""``python -m nodeshape.train``: train a classifier of shapes, or of a user's own images, into a run folder."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from nodeshape._cli import Parser, run
from nodeshape._data.datasets import DRAWN_TEST_SIZE, DRAWN_TRAIN_SIZE, MEMORY_BYTES, MEMORY_FILES
from nodeshape._training.processes import ending_at_once
from nodeshape._training.recipe import RECIPES
from nodeshape._training.session import train
from nodeshape._training.settings import RECIPE_FLAGS, RunSettings


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    train(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "train",
        "Train a Neural-ODE classifier of drawn shapes, or of your own images. Several processes share the work when"
        " started by: torchrun --nproc-per-node=N -m nodeshape.train ...",
    )
    settings = {setting.name: setting for setting in fields(RunSettings)}

    def add(flag: str, text: str, metavar: str | None = None) -> None:
        setting = settings[flag.removeprefix("--").replace("-", "_")]
        type_, default = setting.metadata["type"], setting.default
        text += f" (default: {default})" if default not in (None, False) else ""
        if type_.kind is bool:
            parser.add_argument(flag, help=text, default=argparse.SUPPRESS, action="store_true")
        else:
            metavar = f"{{{','.join(type_.options)}}}" if type_.options else metavar
            parser.add_argument(flag, help=text, default=argparse.SUPPRESS, type=type_, metavar=metavar)

    add("--task", "shapes to draw: one per picture; none, one or two; or one as people draw it, by hand")
    add(
        "--data",
        "train on your own images: DIR/CLASS/*.png, or DIR/train/CLASS/*.png and DIR/test/CLASS/*.png",
        metavar="DIR",
    )
    add("--method", "solver of the ODE")
    add("--step-size", "step of the solver; the ODE runs from 0 to 1", metavar="H")
    add("--adjoint", "how gradients are computed")
    add(
        "--init",
        "start from the weights of a trained model, such as best.pt of another run; classes may be others",
        metavar="CHECKPOINT",
    )
    sizes = (
        (f"{DRAWN_TRAIN_SIZE} drawn, or all of yours", "train"),
        (f"{DRAWN_TEST_SIZE} drawn, or all of yours", "test"),
    )
    for default, name in sizes:
        add(f"--{name}-size", f"number of {name} images (default: {default})", metavar="N")
    small = ", ".join(f"--{name.replace('_', '-')} {getattr(RECIPES['small'], name)}" for name in RECIPE_FLAGS)
    add("--recipe", f"small, for a few hundred images, stands for {small}")
    add("--batch-size", "images per step, over all processes", metavar="N")
    add("--epochs", "passes over the training images", metavar="N")
    add("--patience", "stop after N epochs without a better test accuracy", metavar="N")
    add("--lr", "peak learning rate")
    add("--clip-norm", "scale gradients down to this norm", metavar="NORM")
    add("--class-weights", "balanced: every class counts the same, however few images it has")
    add("--amp", "bfloat16 in stem and head (the ODE stays in float32)")
    add("--dtype", "of weights and states; float64 to compare runs without rounding")
    add("--augment", "shift: images move and grow a little; turn: also turn and mirror")
    add("--seed", "fixes images, weights and order")
    add("--image-size", "side of the images in pixels; yours are resized", metavar="PIXELS")
    add("--channels", "colour of the images")
    add("--device", "auto, cpu, cuda or cuda:N")
    add("--strict", "stop at an unreadable image, or at anything else of --data that is left out, instead of saying so")
    add(
        "--stream",
        "read images while training rather than before (what a folder of more than"
        f" {MEMORY_FILES:,} images or {MEMORY_BYTES >> 30} GiB of pixels does anyway)",
    )
    add("--tensorboard", "also log to RUN/tensorboard")
    parser.add_argument(
        "--out",
        help="run folder (default: runs/TASK-METHOD or runs/FOLDER-METHOD, with -2, -3, ... where that is taken)",
        default=argparse.SUPPRESS,
        type=Path,
        metavar="DIR",
    )
    parser.add_argument(
        "--resume",
        help="continue the run in --out, or the latest one",
        default=argparse.SUPPRESS,
        action="store_true",
    )
    return parser


if __name__ == "__main__":
    with ending_at_once() if os.environ.get("WORLD_SIZE", "1") != "1" else nullcontext():
        run(main, though_unheard=True)
