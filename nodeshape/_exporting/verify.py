"""Verification of an export: the exported files' logits beside PyTorch's, on real images, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nodeshape._data.folder import Folder, scan_folder
from nodeshape._data.images import load_folder
from nodeshape._data.shapes import MIN_IMAGE_SIZE, draw_set
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.method import get_method

#: Images that are compared; of implicit methods, each of which takes several evaluations of f per step, fewer.
IMAGES, IMPLICIT_IMAGES = 1000, 300
#: All images go through in the largest batches; of smaller ones, which show that the batch is open, some do.
BATCH_SIZES = (1, 7, 300)
MOST_BATCHES = 20

#: Images float32 ``[batch, channels, height, width]`` to logits ``[batch, classes]``.
Classify = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How the logits of an exported file compare with PyTorch's.

    Attributes:
        images: compared.
        max_difference: of a logit; NaN if a logit is.
        same_class: images of the same class in both.
        ties: images of different classes whose two logits are closer than the differences, so that either is right.
    """

    images: int
    max_difference: float
    same_class: int
    ties: int

    def holds(self, tolerance: float) -> bool:
        """Whether all logits agree to ``tolerance`` and all classes, ties apart, agree."""
        return self.max_difference <= tolerance and self.same_class + self.ties == self.images


def compare(logits: Tensor, reference: Tensor) -> Agreement:
    """Compare logits ``[images, classes]`` with PyTorch's."""
    difference = (logits - reference).abs().amax(dim=1)
    ours, theirs = logits.argmax(dim=1, keepdim=True), reference.argmax(dim=1, keepdim=True)
    same = ours == theirs
    margin = reference.gather(1, theirs) - reference.gather(1, ours)
    ties = ~same[:, 0] & (margin[:, 0] <= 2 * difference)
    return Agreement(len(logits), float(difference.max()), int(same.sum()), int(ties.sum()))


@dataclass(frozen=True)
class CheckImages:
    """Images of the kind that a checkpoint was trained on.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``, of the checkpoint's classes; -1 where the image is of none or was trained on.
        source: what they are.
    """

    images: Tensor
    labels: Tensor
    source: str

    def typed(self, input_type: str) -> Tensor:
        """The images as they are, or float32 in [0, 1]."""
        return self.images if input_type == "uint8" else self.images.to(torch.float32) / 255

    def accuracy(self, logits: Tensor) -> float | None:
        """Part of the images with labels whose class the logits give; None where there are none."""
        known = self.labels >= 0
        right = logits.argmax(dim=1)[known] == self.labels[known]
        return float(right.double().mean()) if len(right) else None


def image_count(model: ShapeClassifier) -> int:
    """How many images a model's files are compared on where nobody says."""
    return IMAGES if get_method(model.ode.method).explicit else IMPLICIT_IMAGES


@torch.no_grad()
def classify_all(classify: Classify, images: Tensor, batch_size: int, progress: Any) -> Tensor:
    """The logits of all images, taken ``batch_size`` at a time."""
    logits = []
    for batch in _batches(images, batch_size):
        logits.append(classify(batch))
        progress.update(len(batch))
    return torch.cat(logits)


def check_images(
    model: ShapeClassifier, state: Mapping[str, Any], count: int | None = None, split: str = "test"
) -> CheckImages:
    """Images of the kind a checkpoint was trained on, ``count``, or as many as :func:`image_count` says.

    They are drawn images of its task; or those of the user's folder, those of the ``split`` first, and as many drawn
    shapes as are missing.
    """
    count = image_count(model) if count is None else count
    images: list[Tensor] = []
    labels: list[Tensor] = []
    sources = []
    task, seed = state.get("task"), state.get("seed", 0)
    if task is None and state.get("data"):
        try:
            folder = scan_folder(state["data"], seed)
            own, known = _users_own(folder, state, count, split, model)
        except UserError as error:
            sources.append(f"none of the user's own ({error})")
        else:
            images.append(own)
            labels.append(known)
            sources.append(f"{len(own)} of the user's own")
    missing = count - sum(map(len, images))
    if missing:
        side, of = model.image_size, task or "compound"
        drawn, known_of = draw_set(of, split, missing, seed, max(side, MIN_IMAGE_SIZE))
        images.append(torch.from_numpy(drawn[:, :, :side, :side]).expand(-1, model.in_channels, -1, -1))
        labels.append(torch.from_numpy(known_of) if task and split == "test" else torch.full((missing,), -1))
        sources.append(f"{missing} drawn ({of})")
    return CheckImages(torch.cat(images), torch.cat(labels), ", ".join(sources))


def _users_own(
    folder: Folder, state: Mapping[str, Any], count: int, split: str, model: ShapeClassifier
) -> tuple[Tensor, Tensor]:
    """At most ``count`` images of a user's folder, those of the split first, and their labels."""
    channels = "grey" if model.in_channels == 1 else "rgb"
    classes = list(state["classes"])
    indices = [classes.index(name) if name in classes else -1 for name in folder.classes]
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for files in (folder.test, folder.train) if split == "test" else (folder.train, folder.test):
        taken = min(len(files), count - sum(map(len, images)))
        if not taken:
            continue
        evenly = [i * len(files) // taken for i in range(taken)]  # they lie class by class
        loaded = load_folder(files.take(evenly), model.image_size, channels)
        images.append(torch.from_numpy(loaded.images))
        seen = files is folder.train
        labels.append(torch.tensor([-1 if seen else indices[label] for label in loaded.labels.tolist()]))
    return torch.cat(images), torch.cat(labels)


def milliseconds(classify: Classify, image: Tensor, budget: float = 0.25) -> float:
    """The median time of one call, over calls of ``budget`` seconds in all after some to warm up."""
    with torch.no_grad():
        for _ in range(3):
            classify(image)
        times: list[float] = []
        while len(times) < 5 or sum(times) < budget:
            start = perf_counter()
            classify(image)
            times.append(perf_counter() - start)
    return 1e3 * median(times)


def _batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size].contiguous()
