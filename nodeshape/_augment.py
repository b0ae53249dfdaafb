"""Augmentation: the images of a batch shifted, scaled, turned and mirrored at random, for want of more images."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

AUGMENTATIONS = ("none", "shift", "turn")
#: Largest shift of an image, in image sides, and the largest factor by which it grows or shrinks.
MAX_SHIFT, MAX_SCALE = 0.06, 1.12


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Change each image of a batch at random; what moves in from outside is the nearest pixel of the border.

    Args:
        images: float ``[batch, channels, height, width]``.
        kind: ``"shift"`` shifts and scales a little, which changes the class of hardly any picture; ``"turn"`` also
            turns by any angle and mirrors, for classes that have no up and down; ``"none"`` returns ``images``.
        generator: on the CPU, so that every device draws the same numbers.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
    if kind == "none":
        return images
    shift_x, shift_y, scale, angle, side = torch.rand(5, len(images), generator=generator) * 2 - 1
    cos, sin, mirror = torch.ones_like(angle), torch.zeros_like(angle), torch.ones_like(angle)
    if kind == "turn":
        cos, sin, mirror = (pi * angle).cos(), (pi * angle).sin(), torch.where(side < 0, -1.0, 1.0)
    size = MAX_SCALE**scale
    rows = (
        torch.stack([mirror * size * cos, -size * sin, 2 * MAX_SHIFT * shift_x], dim=1),
        torch.stack([mirror * size * sin, size * cos, 2 * MAX_SHIFT * shift_y], dim=1),
    )
    maps = torch.stack(rows, dim=1).to(images.device)  # of places in the new image to places in the old one
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
