"""Checkpoints: plain tensors, numbers and strings, written atomically and loaded without executing anything."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from nodeshape._errors import UserError
from nodeshape._files import write_atomically
from nodeshape._models.classifier import ShapeClassifier


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain Python values) to ``path`` atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; it can hold data only, never code.

    Raises:
        UserError: there is no such file, or it is not a nodeshape checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with: python -m nodeshape.train")
    data = path.read_bytes()  # an OSError of its own, apart from those that damage leads to
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about a damaged file, which the error tells
            state = torch.load(_verified(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damage can make unpickling raise anything
        raise UserError(f"{path}: not a readable checkpoint, or a damaged one") from error
    if not isinstance(state, dict) or not {"model", "architecture", "classes"} <= state.keys():
        raise UserError(f"{path}: not a nodeshape checkpoint")
    return state


def _verified(data: bytes) -> io.BytesIO:
    """A checkpoint made anew of its records, each compared with its CRC-32.

    torch.save writes that sum and torch.load does not look at it, nor does it doubt the archive's directory: it gives
    other weights, or parts of its memory, for a file that is damaged there.

    Raises:
        Exception: a record differs from its sum, or the archive is no archive.
    """
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(whole, "w") as anew:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise zipfile.BadZipFile(f"{record.filename}: its sizes differ")
            anew.writestr(record.filename, archive.read(record))
    whole.seek(0)
    return whole


def start_from(path: Path, model: ShapeClassifier, classes: list[str]) -> str:
    """Give ``model``, a new classifier of ``classes``, the weights of a checkpoint; say in a line what it got.

    The last layer takes the rows of the classes that both know, by name, and keeps its own of the others.

    Raises:
        UserError: there is no such checkpoint, or its network is another up to the last layer.
    """
    trained, known = load_classifier(path)
    last = f"head.{len(model.head) - 1}."
    own, others = model.state_dict(), trained.state_dict()
    shapes = [{name: x.shape for name, x in state.items() if not name.startswith(last)} for state in (own, others)]
    if shapes[0] != shapes[1]:
        sizes = [f"{m.image_size} pixels, {m.in_channels} channels, width {m.width}" for m in (trained, model)]
        raise UserError(f"--init {path}: its network, for {sizes[0]}, has other weights than one for {sizes[1]}")
    for name, weight in own.items():
        if name.startswith(last):
            for row, label in enumerate(classes):
                if label in known:
                    weight[row] = others[name][known.index(label)]
        else:
            weight.copy_(others[name])
    new = [label for label in classes if label not in known]
    return f"starting from the weights of {path}" + (f"; classes it does not know: {len(new)}" if new else "")


def load_classifier(path: Path | str) -> tuple[ShapeClassifier, list[str]]:
    """Load the classifier of a checkpoint, in evaluation mode, and the names of its classes.

    Args:
        path: ``best.pt`` or ``last.pt`` of a run folder.

    Raises:
        UserError: there is no such file, or it is not a nodeshape checkpoint.
    """
    path = Path(path)
    state = load_checkpoint(path)
    try:
        model = ShapeClassifier(**state["architecture"])
        model.load_state_dict(state["model"])
        classes = [str(name) for name in state["classes"]]
    except Exception as error:  # they may be anything, of any type
        raise UserError(f"{path}: its weights do not fit its architecture") from error
    if len(classes) != model.num_classes:
        raise UserError(f"{path}: names {len(classes)} classes, its network has {model.num_classes}")
    return model.eval(), classes


load_classifier.__module__ = "nodeshape"
