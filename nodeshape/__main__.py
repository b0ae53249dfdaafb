"""``python -m nodeshape``: the commands there are."""

from __future__ import annotations

COMMANDS = {
    "train": "train a classifier of drawn shapes, or of your own images",
    "export": "export a trained classifier to ONNX and TorchScript",
    "predict": "classify images with an exported model",
    "data": "draw images of shapes as PNG files",
    "bench": "measure the solver against its rivals",
    "paper": "repeat every experiment of the report",
}


def main() -> None:
    """Print them."""
    print("Neural-ODE image classifiers. The commands, each with --help:")
    for name, what in COMMANDS.items():
        print(f"  python -m nodeshape.{name:<9}{what}")


if __name__ == "__main__":
    main()
