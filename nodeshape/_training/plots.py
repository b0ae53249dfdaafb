"""The pictures of a run: learning curve, confusion matrix, samples with the predicted class."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from nodeshape._files import write_atomically
from nodeshape._training.trainer import EpochMetrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

GOOD, BAD, INK = "#1a7f37", "#c62828", "#1f2933"
SAMPLES_ACROSS, SAMPLES_DOWN = 8, 5


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def learning_curve(history: list[EpochMetrics], title: str, path: Path) -> None:
    """Training loss and test accuracy over the epochs."""
    figure, left = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    right = left.twinx()
    epochs = [m.epoch for m in history]
    accuracy = [100 * m.test_accuracy for m in history]
    left.plot(epochs, accuracy, "o-", color=GOOD)
    right.plot(epochs, [m.train_loss for m in history], "s--", color="#8a94a0", markersize=4)
    left.set(
        xlabel="epoch",
        title=f"{title}: {accuracy[-1]:.2f}% after epoch {epochs[-1]}",
        ylim=(min([*accuracy, 90]) - 2, 101),
    )
    left.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    left.set_ylabel("test accuracy, %", color=GOOD)
    right.set_ylabel("training loss", color="#5b6570")
    right.set_ylim(bottom=0)
    left.grid(axis="y", alpha=0.3)
    save(figure, path)


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: list[str], title: str, path: Path) -> None:
    """Counts of true against predicted class; rows are shaded by their share."""
    n = len(classes)
    counts = np.bincount((labels * n + predicted).numpy(), minlength=n * n).reshape(n, n)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.62 * n
    figure, axes = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 30:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, str(count), ha="center", va="center", color="white" if share[i, j] > 0.5 else INK, fontsize=8
                )
    axes.set_xticks(range(n), classes, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(n), classes, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=10)
    save(figure, path)


def samples(
    images: Callable[[list[int]], Tensor],
    labels: Tensor,
    probabilities: Tensor,
    classes: list[str],
    title: str,
    path: Path,
) -> None:
    """Test images with their predicted class: mistakes first, the most confident at the top, then others.

    Args:
        images: gives the images at some indices, uint8 ``[n, channels, height, width]``.
        labels: ``[images]``.
        probabilities: ``[images, classes]``.
        classes: their names.
        title: of the picture.
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
    figure, grid = plt.subplots(
        down, SAMPLES_ACROSS, figsize=(1.45 * SAMPLES_ACROSS, 1.75 * down + 0.5), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, i, shown in zip(grid.flat, chosen, images(chosen)):
        image = shown.permute(1, 2, 0).numpy()
        axes.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        name = f"{classes[int(predicted[i])]} {100 * float(confidence[i]):.0f}%"
        text = f"{name}\n(is {classes[int(labels[i])]})" if wrong[i] else name
        axes.set_title(text, fontsize=7, color=BAD if wrong[i] else GOOD)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
