"""``python -m nodeshape.predict``: classify image files with an exported model, without PyTorch.

Needs onnxruntime, NumPy and Pillow only.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nodeshape._cli import Parser, cores, positive_int, printable, run, say
from nodeshape._data.folder import images_below
from nodeshape._data.images import (
    CHANNELS,
    CONTACT_SHEET,
    MAX_IMAGE_SIZE,
    SUFFIXES,
    ImageError,
    is_empty,
    load_image,
    open_file,
)
from nodeshape._errors import UserError

#: Images, and values in them, that are in memory at a time.
BATCH, BATCH_VALUES = 64, 2**22
#: Types that a model's images may have.
INPUT_TYPES = ("tensor(float)", "tensor(uint8)")
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
    parser.add_argument("--threads", type=positive_int, metavar="N", help="of onnxruntime (default: one per core)")
    args = parser.parse_args(argv)

    model = load_model(args.model, args.threads)
    paths = [path for image in args.images for path in _expand(image)]
    unreadable = 0
    output = _json(paths, model) if args.json else _table(paths, model)
    for item in output:
        if isinstance(item, ImageError):
            unreadable += 1
            say(f"error: {item}", error=True)
        else:
            say(item)
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
        takes_bytes: whether its images are of uint8, rather than of float32 in [0, 1].
    """

    session: Any
    classes: list[str]
    image_size: int
    channels: str
    takes_bytes: bool

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The probability of every class, ``[batch, classes]``, of images ``[batch, channels, size, size]``.

        They are NaN where the model's logits are not finite.

        Raises:
            UserError: the model fails, or gives something else than logits of its classes.
        """
        given = images if self.takes_bytes else images.astype(np.float32) / 255
        try:
            (logits,) = self.session.run(["logits"], {"image": given})
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise UserError(f"the model fails: {error}") from error
        if logits.shape != (len(images), len(self.classes)):
            raise UserError(
                f"the model gives logits of shape {logits.shape}, expected {(len(images), len(self.classes))}"
            )
        # Where a logit is NaN or infinite, so are all of its image's probabilities.
        logits = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, np.nan)
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
                yield image if isinstance(image, ImageError) else _answer(path, next(probabilities), is_empty(image))

    def _load(self, path: Path) -> NDArray[np.uint8] | ImageError:
        try:
            return load_image(path, self.image_size, self.channels)
        except ImageError as error:
            return error


def load_model(path: Path, threads: int | None = None) -> Model:
    """Load an exported model into onnxruntime.

    Args:
        path: of the file, of which nothing is believed that is not checked.
        threads: that compute (default: one per core that this process may use).

    Raises:
        UserError: there is no such file, it is no ONNX model, or not one of ``python -m nodeshape.export``.
    """
    if not path.exists() or path.is_dir():
        what = "is a folder; name its model.onnx" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; write one with: python -m nodeshape.export")
    open_file(path).close()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and told below
    options.intra_op_num_threads = cores() if threads is None else threads
    try:
        with redirect_stdout(io.StringIO()):  # where onnxruntime prints of files that are not UTF-8
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        inputs, outputs = session.get_inputs(), session.get_outputs()
        [(x.name, x.shape) for x in (*inputs, *outputs)]  # which raises where a name is not UTF-8
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise UserError(f"{path}: not an ONNX model that onnxruntime can load") from error
    anew = "write it anew with: python -m nodeshape.export"
    missing = [key for key in ("classes", "image_size", "channels") if key not in metadata]
    if missing:
        raise UserError(f"{path}: lacks the metadata that nodeshape's models have ({', '.join(missing)}); {anew}")
    wrong = _wrong(metadata, inputs, outputs)
    if wrong:
        raise UserError(f"{path}: not a model of nodeshape's: {wrong}; {anew}")
    takes_bytes = inputs[0].type == "tensor(uint8)"
    return Model(
        session, json.loads(metadata["classes"]), int(metadata["image_size"]), metadata["channels"], takes_bytes
    )


def _wrong(metadata: Mapping[str, str], inputs: Sequence[Any], outputs: Sequence[Any]) -> str | None:
    """What in a model is not as nodeshape writes it, if something is."""
    try:
        classes = json.loads(metadata["classes"])
    except (ValueError, RecursionError):
        return "its classes are not JSON"
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        return "its classes are not a list of names"
    if len(set(classes)) < len(classes):
        return f"two of its classes are called {Counter(classes).most_common(1)[0][0]!r}"
    size, channels = metadata["image_size"], metadata["channels"]
    if not (size.isascii() and size.isdecimal() and len(size) < 6 and 1 <= int(size) <= MAX_IMAGE_SIZE):
        return f"expected an image size of 1 to {MAX_IMAGE_SIZE} pixels, got {size[:20]!r}"
    if channels not in CHANNELS:
        return f"expected channels to be one of {', '.join(CHANNELS)}, got {channels[:20]!r}"
    image = ("image", [CHANNELS[channels], int(size), int(size)])
    given = [(x.name, x.shape[1:]) for x in inputs]
    if given != [image] or inputs[0].type not in INPUT_TYPES or isinstance(inputs[0].shape[0], int):
        return f"expected the one input image [batch, {', '.join(map(str, image[1]))}] of float or uint8"
    logits = ("logits", "tensor(float)", [len(classes)])
    if logits not in [(x.name, x.type, x.shape[1:]) for x in outputs]:
        return f"expected an output logits [batch, {len(classes)}] of float, one per class"
    return None


def _answer(path: Path, probabilities: NDArray[np.float64], empty: bool) -> Answer | ImageError:
    if np.isnan(probabilities).any():
        return ImageError(path, "the model's logits of this image are not finite")
    return Answer(path, probabilities, empty)


def _table(paths: Sequence[Path], model: Model) -> Iterator[str | ImageError]:
    file_width = max(len(name) for name in ["file", *map(printable, paths)])
    class_width = max(len(name) for name in ["class", EMPTY, *map(printable, model.classes)])
    yield f"{'file':<{file_width}}  {'class':<{class_width}}  probability"
    for item in model.classify(paths):
        if isinstance(item, ImageError):
            yield item
            continue
        best = int(item.probabilities.argmax())
        name, probability = printable(model.classes[best]), f"{item.probabilities[best]:.4f}"
        if item.empty:
            name, probability = EMPTY, "-"
        yield f"{printable(item.path):<{file_width}}  {name:<{class_width}}  {probability:>11}"


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
        yield lead + _printable_json(entry)
        lead = ","
    yield "[]" if lead == "[" else "]"


def _printable_json(value: Any) -> str:
    """JSON that holds letters as they are and numbers for what a terminal does not show (:func:`printable`)."""
    text = json.dumps(value, ensure_ascii=False)
    return text if printable(text) == text else "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text)


def _expand(path: Path) -> list[Path]:
    """A file as it is; a folder as the images in it and its subfolders, hidden ones and contact sheets apart.

    Raises:
        UserError: the folder has no images.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in images_below(path) if file.name != CONTACT_SHEET)
    if not found:
        raise UserError(f"{path}: a folder without images ({', '.join(SUFFIXES)})")
    return found


if __name__ == "__main__":
    run(main)
