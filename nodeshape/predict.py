"""``python -m nodeshape.predict``: classify image files with an exported model, without PyTorch.

Needs onnxruntime, NumPy and Pillow only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nodeshape._cli import Parser, run
from nodeshape._data.images import CHANNELS, CONTACT_SHEET, SUFFIXES, ImageError, is_empty, load_image
from nodeshape._errors import UserError

#: Images, and values in them, that are in memory at a time.
BATCH, BATCH_VALUES = 64, 2**22
#: What stands in the table for the class of a picture with nothing on it.
EMPTY = "(empty)"


def main(argv: Sequence[str] | None = None) -> None:
    """Classify the images of the command line; exit with 2 if some cannot be read."""
    parser = Parser("predict", "Classify images with an exported model.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="written by python -m nodeshape.export")
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="PNG, JPEG, WebP or BMP of any size, or a folder of them (hidden files and contact sheets left out)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON list with the probability of every class; of an empty picture the class is null",
    )
    args = parser.parse_args(argv)

    model = load_model(args.model)
    paths = [path for image in args.images for path in _expand(image)]
    unreadable = 0
    output = _json(paths, model) if args.json else _table(paths, model)
    for item in output:
        if isinstance(item, ImageError):
            unreadable += 1
            sys.stdout.flush()
            print(f"error: {item}", file=sys.stderr, flush=True)
        else:
            print(item, flush=True)
    if unreadable:
        sys.exit(2)


@dataclass(frozen=True)
class Answer:
    """What a model makes of an image file.

    Attributes:
        probabilities: of every class, ``[classes]``.
        empty: whether nothing is on the picture, so that the probabilities mean nothing.
    """

    path: Path
    probabilities: NDArray[np.float64]
    empty: bool


@dataclass(frozen=True)
class Model:
    """An exported classifier.

    Attributes:
        session: of onnxruntime.
        classes: names, by index of the logits.
        image_size: side of its square images in pixels.
        channels: ``"grey"`` or ``"rgb"``.
    """

    session: Any
    classes: list[str]
    image_size: int
    channels: str

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The probability of every class, ``[batch, classes]``, of images ``[batch, channels, size, size]``."""
        (logits,) = self.session.run(["logits"], {"image": images.astype(np.float32) / 255})
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities

    def classify(self, paths: Sequence[Path]) -> Iterator[Answer | ImageError]:
        """Yield the answer for each path, or why it cannot be read, in order.

        A batch of images is in memory at a time, however many paths there are.
        """
        size = min(BATCH, max(1, BATCH_VALUES // (CHANNELS[self.channels] * self.image_size**2)))
        for start in range(0, len(paths), size):
            loaded = [self._load(path) for path in paths[start : start + size]]
            images = [image for image in loaded if not isinstance(image, ImageError)]
            probabilities = iter(self.probabilities(np.stack(images)) if images else ())
            for path, image in zip(paths[start:], loaded):
                yield image if isinstance(image, ImageError) else Answer(path, next(probabilities), is_empty(image))

    def _load(self, path: Path) -> NDArray[np.uint8] | ImageError:
        try:
            return load_image(path, self.image_size, self.channels)
        except ImageError as error:
            return error


def load_model(path: Path) -> Model:
    """Load an exported model into onnxruntime.

    Raises:
        UserError: there is no such file, it is no ONNX model, or not one of ``python -m nodeshape.export``.
    """
    if not path.is_file():
        what = "is a folder; name its model.onnx" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; write one with: python -m nodeshape.export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and told below
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise UserError(f"{path}: not an ONNX model that onnxruntime can load") from error
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        classes = [str(name) for name in json.loads(metadata["classes"])]
        model = Model(session, classes, int(metadata["image_size"]), metadata["channels"])
        expected = ["batch", CHANNELS[model.channels], model.image_size, model.image_size]
        fits = session.get_inputs()[0].shape[1:] == expected[1:] and session.get_outputs()[0].shape[1] == len(classes)
    except (KeyError, ValueError, TypeError, IndexError):
        fits = False
    if not fits:
        raise UserError(
            f"{path}: lacks the metadata that nodeshape's models have (classes, image_size, channels); write it anew"
            " with: python -m nodeshape.export"
        )
    return model


def _table(paths: Sequence[Path], model: Model) -> Iterator[str | ImageError]:
    file_width = max(len(name) for name in ["file", *map(str, paths)])
    class_width = max(len(name) for name in ["class", EMPTY, *model.classes])
    yield f"{'file':<{file_width}}  {'class':<{class_width}}  probability"
    for item in model.classify(paths):
        if isinstance(item, ImageError):
            yield item
            continue
        best = int(item.probabilities.argmax())
        name, probability = model.classes[best], f"{item.probabilities[best]:.4f}"
        if item.empty:
            name, probability = EMPTY, "-"
        yield f"{item.path!s:<{file_width}}  {name:<{class_width}}  {probability:>11}"


def _json(paths: Sequence[Path], model: Model) -> Iterator[str | ImageError]:
    """A JSON list, one entry per line, that begins before the last image is read."""
    lead = "["
    for item in model.classify(paths):
        if isinstance(item, ImageError):
            yield item
            continue
        best = int(item.probabilities.argmax())
        entry = {
            "file": str(item.path),
            "class": None if item.empty else model.classes[best],
            "probability": None if item.empty else float(item.probabilities[best]),
            "probabilities": dict(zip(model.classes, item.probabilities.tolist())),
            "empty": item.empty,
        }
        yield lead + json.dumps(entry, ensure_ascii=False)
        lead = ","
    yield "[]" if lead == "[" else "]"


def _expand(path: Path) -> list[Path]:
    """A file as it is; a folder as the images in it and its subfolders, hidden ones and contact sheets apart.

    Raises:
        UserError: the folder has no images.
    """
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.name != CONTACT_SHEET
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"{path}: a folder without images ({', '.join(SUFFIXES)})")
    return found


if __name__ == "__main__":
    run(main)
