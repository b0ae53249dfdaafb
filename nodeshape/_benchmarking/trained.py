"""A classifier trained for one epoch: real weights and real features to measure with."""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nodeshape._benchmarking.contenders import Dynamics
from nodeshape._data.datasets import Data, drawn_data
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training.checkpoint import load_classifier
from nodeshape.train import main as train

IMAGE_SIZE = 32
QUICK = ["--train-size", "60", "--batch-size", "20", "--step-size", "0.5"]


def trained_dynamics(batch: int, quick: bool, device: torch.device) -> tuple[Dynamics, Tensor]:
    """The classifier's f, and the features its stem makes of ``batch`` images."""
    model = trained_classifier(quick).to(device)
    images, _ = images_of(batch).test.batch(slice(None), device)
    with torch.no_grad():
        return model.ode.dynamics, model.stem(images).contiguous()  # type: ignore[return-value]


@lru_cache
def checkpoint(quick: bool) -> Path:
    """``best.pt`` of a run of ``python -m nodeshape.train --epochs 1``, in a folder that goes with this process."""
    run = Path(_folder().name) / "run"
    arguments = ["--epochs", "1", "--test-size", "60", "--device", "cpu", "--out", str(run)]
    with contextlib.redirect_stdout(io.StringIO()):
        train([*arguments, *(QUICK if quick else [])])
    return run / "best.pt"


def trained_classifier(quick: bool) -> ShapeClassifier:
    """That run's model, in evaluation mode."""
    return load_classifier(checkpoint(quick))[0]


@lru_cache
def images_of(count: int) -> Data:
    """``count`` test images of the task that it was trained on."""
    return drawn_data("single", count, count, IMAGE_SIZE, "grey", seed=0)


@lru_cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nodeshape-bench-")
