"""Make the page's model and examples: train on shapes as people draw them, export, fill ``public/``.

``python export/web/model.py`` takes a few minutes; an interrupted run goes on, a finished one is exported again.
With ``--checkpoint best.pt`` it exports another run's model instead, such as one of your own images.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

import nodeshape as ns
from nodeshape._data.images import load_image
from nodeshape._data.shapes import CLASSES, draw

PUBLIC = Path(__file__).resolve().parent / "public"
TASK, IMAGE_SIZE = "hand", 64
TRAIN = f"--task {TASK} --image-size {IMAGE_SIZE} --step-size 0.1 --train-size 15000 --test-size 1500 --epochs 5"
#: Drawings of each class that the page offers, and their side in pixels.
EXAMPLES, EXAMPLE_SIZE = 4, 320


def main() -> None:
    """Train if need be, export, write the examples; say what to type next."""
    parser = argparse.ArgumentParser(description="Train and export the page's model into public/.")
    parser.add_argument("--checkpoint", type=Path, metavar="best.pt", help="export this one instead of training")
    parser.add_argument("--run", type=Path, default=Path("runs/web"), metavar="DIR", help="run folder (runs/web)")
    args = parser.parse_args()

    checkpoint = args.checkpoint or train(args.run)
    export = checkpoint.parent / "export-web"
    command("export", checkpoint, "--trajectory", "--out", export)
    PUBLIC.mkdir(exist_ok=True)
    shutil.copy(export / "model.onnx", PUBLIC)
    write_head(checkpoint, export / "example.png", PUBLIC / "head.onnx")
    write_examples(PUBLIC / "examples")
    print(f"Wrote {PUBLIC}; now build and look: cd {PUBLIC.parent} && npm ci && npm run build && npm start")


def train(run: Path) -> Path:
    """The best checkpoint of a run, begun, continued or found finished."""
    if not (run / "best.pt").is_file() or not (run / "confusion_matrix.png").is_file():  # the last thing that it writes
        command("train", *(["--resume"] if (run / "last.pt").is_file() else TRAIN.split()), "--out", run)
    return run / "best.pt"


def command(name: str, *arguments: object) -> None:
    """Run a command of nodeshape; end with its exit code if it fails."""
    line = [sys.executable, "-m", f"nodeshape.{name}", *map(str, arguments)]
    print(f"python -m nodeshape.{name} {' '.join(map(str, arguments))}", flush=True)
    code = subprocess.run(line, check=False).returncode
    if code:
        sys.exit(code)


def write_head(checkpoint: Path, example: Path, path: Path) -> None:
    """The head alone, states to logits: what the answer would be if the ODE stopped at any of them."""
    model, _ = ns.load_classifier(checkpoint)
    image = load_image(example, model.image_size, "grey" if model.in_channels == 1 else "rgb")
    with torch.no_grad():
        state = model.stem(torch.tensor(image)[None] / 255)
    ns.to_onnx(model.head, state.repeat(2, 1, 1, 1), path)


def write_examples(folder: Path) -> None:
    """A few drawings of each class, in turn, that no model has been trained on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = CLASSES[TASK]
    for index in range(EXAMPLES * len(names)):
        image, label = draw(TASK, 3, index, EXAMPLE_SIZE, split="files")
        Image.fromarray(image).save(folder / f"{names[label]}-{index + 1}.png")


if __name__ == "__main__":
    main()
