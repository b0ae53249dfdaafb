"""``python -m nodeshape``: the commands there are."""

from __future__ import annotations

import sys

from nodeshape._cli import run
from nodeshape._errors import UserError

COMMANDS = {
    "train": "train a classifier of drawn shapes, or of your own images",
    "export": "export a trained classifier to ONNX and TorchScript",
    "predict": "classify images with an exported model",
    "data": "draw images of shapes as PNG files",
    "bench": "measure the solver against its rivals",
    "paper": "repeat every experiment of the report",
}


def main() -> None:
    """Print them; say how a command is written if one follows."""
    given = sys.argv[1:]
    if given and given[0] in COMMANDS:
        raise UserError(f"a command is part of the module's name: python -m nodeshape.{' '.join(given)}")
    if given and given[0] not in ("-h", "--help"):
        raise UserError(f"no command {given[0]!r} (usage: python -m nodeshape)")
    print("Neural-ODE image classifiers. The commands, each with --help:")
    for name, what in COMMANDS.items():
        print(f"  python -m nodeshape.{name:<9}{what}")


if __name__ == "__main__":
    run(main)
