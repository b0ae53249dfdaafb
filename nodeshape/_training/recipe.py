"""How a classifier is trained: the report's protocol, and what ``--recipe`` chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        lr: peak of the one-cycle learning rate.
        warm_up: part of the steps in which the rate rises to its peak; it falls to zero in the rest.
        betas: of AdamW. A short memory of the gradient, because a few dozen steps must do.
        weight_decay: of AdamW.
        augment: one of ``AUGMENTATIONS``.
        seed: fixes the order of the images and their augmentation.
        patience: stop after so many epochs without a better test accuracy; None to train them all.
        clip_norm: gradients are scaled down to this Euclidean norm; None for no limit.
        class_weights: ``"balanced"`` weighs images so that every class counts the same, however many it has.
        amp: bfloat16 autocast in stem and head; the ODE is solved in float32.
    """

    epochs: int = 5
    batch_size: int = 120
    lr: float = 0.01
    warm_up: float = 0.15
    betas: tuple[float, float] = (0.8, 0.999)
    weight_decay: float = 1e-4
    augment: str = "none"
    seed: int = 0
    patience: int | None = None
    clip_norm: float | None = None
    class_weights: str = "none"
    amp: bool = False


#: What ``--recipe`` chooses from: the report's protocol, and one for a few hundred images.
RECIPES = {"default": Recipe(), "small": Recipe(batch_size=20, lr=0.005, augment="turn")}


def balanced(labels: Tensor, classes: int) -> Tensor:
    """Weights of the classes, ``[classes]``, that give them equal sums over ``labels`` and a mean of 1."""
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1)).float()
