"""``ShapeClassifier``: a convolutional stem turns the image into features, an ODE carries them, a head reads them."""

from __future__ import annotations

from copy import copy
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._block import ODEBlock
from nodeshape._dynamics import ConvDynamics

#: The stem halves the image until its side is at most this many pixels.
MAX_FEATURE_SIZE = 12


class ShapeClassifier(nn.Module):
    """Stem → ODEBlock → head (Chen et al., arXiv:1806.07366, section 3, with batch normalisation around the ODE).

    Batch normalisation stays outside the dynamics, which must be a function of one sample.

    Args:
        num_classes: number of logits.
        image_size: side of the square images in pixels; decides how often the stem halves them.
        in_channels: 1 (grey) or 3 (RGB).
        width: channels of the ODE's state.
        solver: keyword arguments of :class:`nodeshape.ODEBlock`: ``method``, ``step_size``, ``adjoint``, ….

    Shapes: images ``[batch, in_channels, image_size, image_size]`` in [0, 1] to logits ``[batch, num_classes]``.
    """

    def __init__(
        self, num_classes: int, image_size: int = 32, in_channels: int = 1, width: int = 64, **solver: Any
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, got {image_size}")
        self.num_classes, self.image_size, self.in_channels, self.width = num_classes, image_size, in_channels, width
        halvings = max(0, ceil(log2(image_size / MAX_FEATURE_SIZE)))
        layers: list[nn.Module] = [nn.BatchNorm2d(in_channels)]
        channels = in_channels
        for i in range(halvings + 1):
            following = max(16, width >> (halvings - i))
            layers += [
                nn.Conv2d(channels, following, kernel_size=3, stride=1 if i == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.ReLU(),
            ]
            channels = following
        self.stem = nn.Sequential(*layers)
        self.ode = ODEBlock(ConvDynamics(width), **solver)
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if image.dim() != 4 or image.shape[1:] != expected:
            raise ValueError(f"ShapeClassifier: expected images [batch, {', '.join(map(str, expected))}], got {tuple(image.shape)}")
        logits: Tensor = self.head(self.ode(self.stem(image)))
        return logits

    def with_solver(
        self, method: str | None = None, steps: int | None = None, step_size: float | None = None
    ) -> ShapeClassifier:
        """The same classifier, weights shared, its ODE solved by another method or number of steps."""
        model = copy(self)
        model._modules = dict(self._modules)
        model.ode = self.ode.with_solver(method=method, steps=steps, step_size=step_size)
        return model
