"""The pictures of a run: learning curve, confusion matrix, samples with the predicted class."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from nodeshape._files import write_atomically
from nodeshape._training.lettering import lettering
from nodeshape._training.trainer import EpochMetrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

GOOD, BAD, INK, GREY = "#1a7f37", "#c62828", "#1f2933", "#5b6570"
#: Most classes that the confusion matrix shows; of more, those that are most often confused.
CONFUSION_CLASSES = 30
SAMPLES_ACROSS, SAMPLES_DOWN = 8, 5


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def learning_curve(history: list[EpochMetrics], title: str, path: Path) -> None:
    """Training loss and test accuracy over the epochs."""
    epochs = [m.epoch for m in history]
    accuracy = [100 * m.test_accuracy for m in history]
    with lettering(title, ()) as (title, _):
        figure, left = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        right = left.twinx()
        left.plot(epochs, accuracy, "o-", color=GOOD, label="test accuracy")
        right.plot(epochs, [m.train_loss for m in history], "s--", color="#8a94a0", ms=4, label="training loss")
        left.set(xlabel="epoch", ylim=(min([*accuracy, 90]) - 2, 101))
        left.set_title(f"{title}\n{accuracy[-1]:.2f}% after epoch {epochs[-1]}", fontsize=10)
        left.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        left.set_ylabel("test accuracy, %", color=GOOD)
        right.set_ylabel("training loss", color=GREY)
        right.set_ylim(bottom=0)
        left.grid(axis="y", alpha=0.3)
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
        save(figure, path)


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: list[str], title: str, score: str, path: Path) -> None:
    """Counts of true against predicted class; rows are shaded by their share.

    Of more than ``CONFUSION_CLASSES`` classes those with the most mistakes are shown, the others as one.
    """
    shown, note = list(range(len(classes))), ""
    if len(classes) > CONFUSION_CLASSES:
        wrong = labels != predicted
        mistakes = (labels[wrong].bincount(minlength=len(classes)), predicted[wrong].bincount(minlength=len(classes)))
        order = (mistakes[0] + mistakes[1]).argsort(descending=True, stable=True)
        shown = sorted(order[:CONFUSION_CLASSES].tolist())
        note = f"\nthe {len(shown)} most confused of {len(classes):,} classes"
    n = len(shown)
    place = torch.full((len(classes),), n)
    place[shown] = torch.arange(n)
    size = n + (n < len(classes))
    counts = (place[labels] * size + place[predicted]).bincount(minlength=size * size).reshape(size, size).numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with lettering(title, [classes[i] for i in shown]) as (title, names):
        names += ["all others"] * (size - n)
        side = 2.6 + 0.62 * max(size, 3)
        figure, axes = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[i, j] > 0.5 else INK
                axes.text(j, i, _brief(count), ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(size), names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{title}\n{score}{note}", fontsize=10)
        save(figure, path)


def _brief(count: int) -> str:
    """A count in at most four characters, so that it fits its cell."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k" if count < 10**6 else f"{count / 1e6:.0f}M"


def samples(
    images: Callable[[list[int]], Tensor],
    labels: Tensor,
    probabilities: Tensor,
    classes: list[str],
    title: str,
    score: str,
    path: Path,
) -> None:
    """Test images with their predicted class: mistakes first, the most confident at the top, then others.

    Args:
        images: gives the images at some indices, uint8 ``[n, channels, height, width]``.
        labels: ``[images]``.
        probabilities: ``[images, classes]``.
        classes: their names.
        title, score: of the picture.
        path: to write it to.
    """
    confidence, predicted = probabilities.max(dim=1)
    wrong = predicted != labels
    mistakes = wrong.nonzero()[:, 0]
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)]
    room = SAMPLES_ACROSS * SAMPLES_DOWN
    right = (~wrong).nonzero()[:, 0]
    right = right[:: max(1, len(right) // room)]  # from all classes, in whose order a folder's images come
    chosen = [*mistakes[:room].tolist(), *right.tolist()][:room]
    down = -(-len(chosen) // SAMPLES_ACROSS)
    size = (1.45 * SAMPLES_ACROSS, 1.75 * down + 0.5)
    with lettering(title, classes, longest=18) as (title, names):
        figure, grid = plt.subplots(down, SAMPLES_ACROSS, figsize=size, layout="constrained", squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, i, shown in zip(grid.flat, chosen, images(chosen)):
            image = shown.permute(1, 2, 0).numpy()
            axes.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            text = f"{names[int(predicted[i])]} {100 * float(confidence[i]):.0f}%"
            if wrong[i]:
                text += f"\n(is {names[int(labels[i])]})"
            axes.set_title(text, fontsize=7, color=BAD if wrong[i] else GOOD)
        figure.suptitle(f"{title}: {score}", fontsize=11)
        save(figure, path)
