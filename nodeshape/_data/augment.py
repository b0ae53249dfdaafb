"""Augmentation: the images of a batch shifted, scaled, turned and mirrored at random, for want of more images."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

AUGMENTATIONS = ("none", "shift", "turn")
#: Largest shift of an image, in image sides, and the largest factor by which it grows or shrinks.
MAX_SHIFT, MAX_SCALE = 0.06, 1.12


def random_maps(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """For each of ``count`` images a random affine map, of places in the new image to places in the old one.

    Args:
        kind: ``"shift"`` shifts and scales a little, which changes the class of hardly any picture; ``"turn"`` also
            turns by any angle and mirrors, for classes that have no up and down.
        generator: on the CPU, so that every device draws the same numbers.

    Returns:
        float32 ``[count, 2, 3]``, in units of half an image side.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in AUGMENTATIONS[1:]:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS[1:])}, got {kind!r}")
    shift_x, shift_y, scale, angle, side = torch.rand(5, count, generator=generator) * 2 - 1
    cos, sin, mirror = torch.ones_like(angle), torch.zeros_like(angle), torch.ones_like(angle)
    if kind == "turn":
        cos, sin, mirror = (pi * angle).cos(), (pi * angle).sin(), torch.where(side < 0, -1.0, 1.0)
    size = MAX_SCALE**scale
    rows = (
        torch.stack([mirror * size * cos, -size * sin, 2 * MAX_SHIFT * shift_x], dim=1),
        torch.stack([mirror * size * sin, size * cos, 2 * MAX_SHIFT * shift_y], dim=1),
    )
    return torch.stack(rows, dim=1)


def apply_maps(images: Tensor, maps: Tensor) -> Tensor:
    """Change each image by its map; what moves in from outside is the nearest pixel of the border.

    Args:
        images: float ``[batch, channels, height, width]``.
        maps: ``[batch, 2, 3]``, of :func:`random_maps`.
    """
    if len(images) == 0:
        return images
    grid = torch.nn.functional.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
