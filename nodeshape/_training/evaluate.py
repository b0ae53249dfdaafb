"""A classifier between epochs and after them: its batch normalisation made ready, its logits of whole splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from nodeshape._data.datasets import Split
from nodeshape._data.streaming import StreamedSplit

TEST_BATCH_SIZE = 300
#: Training images whose mean and variance become the batch normalisation's after each epoch.
CALIBRATION_IMAGES = 960


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, batches: Iterator[Tensor]) -> None:
    """Set the statistics of batch normalisation to their mean over ``batches``, for the weights as they now are.

    The usual moving average lags behind weights that change fast, by a lot after a few dozen steps (Wu & Johnson,
    *Rethinking "Batch" in BatchNorm*, arXiv:2105.07576, section 3).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean
    model.train()
    for images in batches:
        model(images)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


def classify(
    model: nn.Module, split: Split | StreamedSplit, indices: Iterable[Tensor], device: torch.device, show: bool
) -> Iterator[Tensor]:
    """For each of the index tensors, the logits of its images, ``[len(index), classes]``, on the CPU.

    Args:
        show: a progress bar, if it takes over two seconds.
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    indices = list(indices)
    bar = tqdm(total=len(indices), desc="testing", unit="batch", leave=False, delay=2, disable=None if show else True)
    with bar, closing(split.batches(indices, device)) as batches:
        for images, _ in batches:
            with torch.inference_mode():
                logits = model(images.to(dtype)).cpu()
            bar.update()
            yield logits


def predict(model: nn.Module, split: Split | StreamedSplit, device: torch.device) -> Tensor:
    """Logits of every image of a split, ``[n, classes]``, on the CPU."""
    indices = torch.arange(len(split)).split(TEST_BATCH_SIZE)
    return torch.cat(list(classify(model, split, indices, device, show=True)))
