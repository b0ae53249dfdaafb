"""Verification of an export: the exported files' logits beside PyTorch's, on real images, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nodeshape._data.folder import scan_folder
from nodeshape._data.images import load_folder
from nodeshape._data.shapes import MIN_IMAGE_SIZE, draw_set
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier

IMAGES = 1000
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
) -> tuple[Tensor, str]:
    """Images of the kind a checkpoint was trained on, ``count`` or ``IMAGES``, float32 in [0, 1], and what they are.

    They are drawn images of its task; or those of the user's folder, those of the ``split`` first, and as many drawn
    shapes as are missing.
    """
    count = IMAGES if count is None else count
    parts, sources = [], []
    task, seed = state.get("task"), state.get("seed", 0)
    if task is None and state.get("data"):
        try:
            folder = scan_folder(state["data"], seed)
            first, last = (folder.test, folder.train) if split == "test" else (folder.train, folder.test)
            files = list(islice(chain(first, last), count))
            own = load_folder(files, model.image_size, "grey" if model.in_channels == 1 else "rgb").images
        except UserError as error:
            sources.append(f"none of the user's own ({error})")
        else:
            parts.append(torch.from_numpy(own))
            sources.append(f"{len(own)} of the user's own")
    missing = count - sum(map(len, parts))
    if missing:
        side, task = model.image_size, task or "compound"
        drawn = draw_set(task, split, missing, seed, max(side, MIN_IMAGE_SIZE))[0][:, :, :side, :side]
        parts.append(torch.from_numpy(drawn).expand(-1, model.in_channels, -1, -1))
        sources.append(f"{missing} drawn ({task})")
    return torch.cat(parts).to(torch.float32) / 255, ", ".join(sources)


def milliseconds(classify: Classify, image: Tensor, budget: float = 0.5) -> float:
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
