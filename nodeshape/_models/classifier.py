"""``ShapeClassifier``: a convolutional stem turns the image into features, an ODE carries them, a head reads them."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nodeshape._models.block import ODEBlock, sharing_weights
from nodeshape._models.dynamics import ConvDynamics
from nodeshape._models.norm import PooledNorm

#: Channels of the stem's first layer.
FIRST_WIDTH = 16
#: Standard deviation of dy/dt before training, where the features' is about 1. The flow begins near the identity, as a
#: residual block does best (Goyal et al., arXiv:1706.02677, section 5.1), yet not at it, so that f learns at once.
FIRST_SPEED = 0.3
#: The stem halves the image until its side is at most this many pixels.
MAX_FEATURE_SIZE = 12
MIN_IMAGE_SIZE = 8


class ShapeClassifier(nn.Module):
    """Stem → ODEBlock → head (Chen et al., arXiv:1806.07366, section 3, with batch normalisation around the ODE).

    Batch normalisation stays outside the dynamics, which must be a function of one sample. The first one normalises
    the image itself, so that images go in with values in [0, 1].

    Args:
        num_classes: number of logits.
        image_size: side of the square images in pixels; decides how often the stem halves them.
        in_channels: 1 (grey) or 3 (RGB).
        width: channels of the ODE's state.
        method, step_size, steps, adjoint, rtol, atol, eval_rtol, eval_atol, options: the solver, as in
            :class:`nodeshape.ODEBlock`.

    Shapes: images ``[batch, in_channels, image_size, image_size]`` in [0, 1], or uint8, which are divided by 255, to
    logits ``[batch, num_classes]``.

    Raises:
        ValueError: an argument is out of its range, or images have another shape.
    """

    __module__ = "nodeshape"
    if TYPE_CHECKING:

        def __call__(self, image: Tensor) -> Tensor: ...

    def __init__(
        self,
        num_classes: int,
        image_size: int = 32,
        in_channels: int = 1,
        width: int = 64,
        *,
        method: str = "euler",
        step_size: float | None = None,
        steps: int | None = None,
        adjoint: str = "discrete",
        rtol: float | None = None,
        atol: float | None = None,
        eval_rtol: float | None = None,
        eval_atol: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE} pixels, got {image_size}")
        self.num_classes, self.image_size, self.in_channels, self.width = num_classes, image_size, in_channels, width
        self.stem = _stem(in_channels, width, halvings=max(0, ceil(log2(image_size / MAX_FEATURE_SIZE))))
        dynamics = ConvDynamics(width)
        nn.init.constant_(dynamics.norm3.weight, FIRST_SPEED)
        self.ode = ODEBlock(
            dynamics,
            method=method,
            step_size=step_size,
            steps=steps,
            adjoint=adjoint,
            rtol=rtol,
            atol=atol,
            eval_rtol=eval_rtol,
            eval_atol=eval_atol,
            options=options,
        )
        self.head = _head(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if image.dim() != 4 or image.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"ShapeClassifier expects images [batch, {sizes}], got {list(image.shape)}")
        if image.dtype == torch.uint8:
            image = image.to(next(self.parameters()).dtype) / 255
        logits: Tensor = self.head(self.ode(self.stem(image).contiguous()))
        return logits

    def with_solver(
        self, method: str | None = None, steps: int | None = None, step_size: float | None = None
    ) -> ShapeClassifier:
        """The same classifier, weights shared, its ODE solved by another method or number of steps."""
        model = sharing_weights(self)
        model.ode = model.ode.with_solver(method=method, steps=steps, step_size=step_size)
        return model


def _stem(in_channels: int, width: int, halvings: int) -> nn.Sequential:
    """Convolutions from ``in_channels`` to ``width`` channels, the side halved ``halvings`` times.

    The first layer is rectified by absolute value (Jarrett et al., ICCV 2009, doi:10.1109/ICCV.2009.5459469), so that
    an edge counts alike from dark to bright and from bright to dark. Maps are halved before they are normalised, on a
    quarter of the pixels, and channels lie next to each other in memory: together this halves the stem's time on a CPU.
    """
    widths = [FIRST_WIDTH, *[width] * max(1, halvings)]
    layers: list[nn.Module] = [nn.BatchNorm2d(in_channels)]
    for i, (before, after) in enumerate(zip([in_channels, *widths], widths)):
        layers.append(nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False))
        if i == 0:
            layers.append(_Abs())
        if i < halvings:
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.BatchNorm2d(after))
        if i > 0:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _head(width: int, num_classes: int) -> nn.Sequential:
    """Features to logits.

    The maximum of a channel says whether its feature is anywhere, the mean how much of it there is. Both have a mean
    over all images that outweighs their differences; batch normalisation takes it away, so that the last layer learns
    from the differences at once. Layer normalisation, which leaves it, is far behind after the first epochs.
    """
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(), _GlobalPool(), PooledNorm(2 * width), nn.Linear(2 * width, num_classes)
    )


class _Abs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class _GlobalPool(nn.Module):
    """Largest value and mean of each channel: ``[batch, channels, height, width]`` to ``[batch, 2 channels]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)
