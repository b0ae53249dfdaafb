"""Drawn shape images: every image is a function of (task, split, seed, index, image size), the same on every machine.

Only operations that round alike everywhere are used: NumPy's raw random words, which it promises never to change
(NEP 19), and + − × ÷ √. No sine, no font, no rasteriser of a particular version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nodeshape._data.hand import KINDS, sketch
from nodeshape._data.random_stream import Stream

CLASSES: dict[str, tuple[str, ...]] = {
    "single": ("circle", "triangle", "rectangle"),
    "compound": (
        "blank",
        "circle",
        "triangle",
        "rectangle",
        "circle+triangle",
        "circle+rectangle",
        "triangle+rectangle",
    ),
    "hand": KINDS,
}
"""Class names of each task, by label."""

SPLITS = ("train", "test", "files")
"""Independent streams of images; ``files`` is for pictures written to disk, which no model has been trained on."""

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
"""Pixels. Below about 24, a circle and a square of a pair look alike."""

_TASKS = tuple(CLASSES)
_LABEL, _SCENE = 0, 1
_SAMPLES = 4  # per side: each pixel is the mean of 4 × 4 points


@dataclass(frozen=True)
class _Shape:
    """A circle, or a convex polygon inside the circle (x, y, radius). Lengths in image sides, y downwards.

    ``edges`` are (nx, ny, offset) with outward unit normals: a point is inside where nx x + ny y ≤ offset for all.
    ``line`` is the width of the outline, infinite for a filled shape; ``level`` is its grey value.
    """

    kind: str
    x: float
    y: float
    radius: float
    edges: tuple[tuple[float, float, float], ...]
    line: float
    level: float


@dataclass(frozen=True)
class _Scene:
    """What an image shows: a background level, shapes that neither touch nor leave the image, and noise."""

    background: float
    shapes: tuple[_Shape, ...]
    noise: float

    def render(self, image_size: int) -> NDArray[np.float64]:
        """The picture without its noise: grey values ``[image_size, image_size]``."""
        image = np.full((image_size, image_size), self.background)
        for shape in self.shapes:
            image += (shape.level - self.background) * _coverage(shape, image_size)
        return image


def draw(task: str, seed: int, index: int, image_size: int = 32, split: str = "train") -> tuple[NDArray[np.uint8], int]:
    """Draw image ``index`` of a stream; no other image need be drawn before it.

    The scene does not depend on ``image_size``: a larger image is the same picture in more detail.

    Returns:
        the grey image ``[image_size, image_size]`` and its label, an index of ``CLASSES[task]``.

    Raises:
        ValueError: unknown task or split, or a number out of range.
    """
    _check(task, split, seed, index, image_size)
    label, stream = _label_and_stream(task, split, seed, index)
    name = CLASSES[task][label]
    scene = sketch(name, stream) if task == "hand" else _scene(name, stream)
    image = scene.render(image_size) + scene.noise * stream.noise(image_size)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def draw_set(
    task: str, split: str, count: int, seed: int = 0, image_size: int = 32
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images 0 to ``count − 1`` of a stream.

    Splits draw from separate streams, and noise makes every image one of a kind, so no two sets share an image. Each
    block of as many images as there are classes holds every class once, in random order.

    Returns:
        images ``[count, 1, image_size, image_size]`` and labels ``[count]``.

    Raises:
        ValueError: unknown task or split, or a number out of range.
    """
    _check(task, split, seed, count, image_size)
    from tqdm import tqdm  # for large images; drawing one alone needs NumPy only

    images = np.empty((count, 1, image_size, image_size), np.uint8)
    labels = np.empty(count, np.int64)
    for index in tqdm(range(count), "drawing", unit=" images", delay=2, leave=False, disable=None):
        images[index, 0], labels[index] = draw(task, seed, index, image_size, split)
    return images, labels


def _check(task: str, split: str, seed: int, index: int, image_size: int) -> None:
    if task not in CLASSES:
        raise ValueError(f"unknown task {task!r}: choose {' or '.join(map(repr, CLASSES))}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    for name, value in (("seed", seed), ("image index or count", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name} must be 0 to {2**32 - 1}, got {value}")
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image size must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels, got {image_size}")


def _label_and_stream(task: str, split: str, seed: int, index: int) -> tuple[int, Stream]:
    """The label, from a permutation of the classes in each block of indices, and the stream the scene is drawn from."""
    key = (seed, _TASKS.index(task), SPLITS.index(split))
    classes = len(CLASSES[task])
    block, place = divmod(index, classes)
    label = int(Stream(*key, _LABEL, block).permutation(classes)[place])
    return label, Stream(*key, _SCENE, index)


def _scene(name: str, stream: Stream) -> _Scene:
    names = () if name == "blank" else tuple(name.split("+"))
    bright_on_dark = stream.coin()
    dark = stream.uniform(0, 100)
    background = dark if bright_on_dark else 255 - dark
    shapes = []
    for own, place in zip(names, _places(len(names), stream), strict=True):
        contrast = stream.uniform(100, 255 - dark)
        level = background + contrast if bright_on_dark else background - contrast
        line = stream.uniform(0.045, 0.08) if stream.coin() else math.inf
        shapes.append(_Shape(own, *place, _edges(own, *place, stream), line, level))
    return _Scene(background, tuple(shapes), stream.uniform(2, 8))


def _places(count: int, stream: Stream) -> list[tuple[float, float, float]]:
    """Circles (x, y, radius) for ``count`` ≤ 2 shapes: inside the image and clear of each other."""
    margin = 1 / 32
    if count == 0:
        return []
    if count == 1:
        r = stream.uniform(0.22, 0.42)
        return [(stream.uniform(r + margin, 1 - r - margin), stream.uniform(r + margin, 1 - r - margin), r)]
    while True:  # one in the left half, the other in the right; then top and bottom or the order may be swapped
        r0, r1 = stream.uniform(0.22, 0.27), stream.uniform(0.22, 0.27)
        x0, x1 = stream.uniform(r0 + margin, 0.5), stream.uniform(0.5, 1 - r1 - margin)
        y0, y1 = stream.uniform(r0 + margin, 1 - r0 - margin), stream.uniform(r1 + margin, 1 - r1 - margin)
        if math.sqrt((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0)) >= r0 + r1 + margin:
            break
    pair = [(x0, y0, r0), (x1, y1, r1)]
    if stream.coin():
        pair.reverse()
    return [(y, x, r) for x, y, r in pair] if stream.coin() else pair


def _edges(kind: str, x: float, y: float, radius: float, stream: Stream) -> tuple[tuple[float, float, float], ...]:
    """The sides of a random polygon whose corners lie on the circle (x, y, radius); none for a circle."""
    if kind == "circle":
        return ()
    corners = _triangle(stream) if kind == "triangle" else _rectangle(stream)
    edges = []
    for i, (x0, y0) in enumerate(corners):
        (x1, y1), (inner_x, inner_y) = corners[i - 1], corners[i - 2]
        nx, ny = y1 - y0, x0 - x1
        norm = math.sqrt(nx * nx + ny * ny)
        if nx * (inner_x - x0) + ny * (inner_y - y0) > 0:
            norm = -norm  # turn the normal outwards
        nx, ny = nx / norm, ny / norm
        edges.append((nx, ny, (nx * x0 + ny * y0) * radius + nx * x + ny * y))
    return tuple(edges)


def _triangle(stream: Stream) -> list[tuple[float, float]]:
    """Corners on the unit circle. The smallest height is 0.9 or more (1.5 is equilateral), so that none is a sliver."""
    while True:
        corners = [stream.direction() for _ in range(3)]
        (ax, ay), (bx, by), (cx, cy) = corners
        twice_area = abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
        sides = [(ax - bx, ay - by), (bx - cx, by - cy), (cx - ax, cy - ay)]
        longest = math.sqrt(max(x * x + y * y for x, y in sides))
        if twice_area >= 0.9 * longest:
            return corners


def _rectangle(stream: Stream) -> list[tuple[float, float]]:
    """Corners on the unit circle, in order, of a rectangle 1 to 2.2 times as long as wide."""
    ux, uy = stream.direction()
    aspect = stream.uniform(1, 2.2)
    width = 1 / math.sqrt(1 + aspect * aspect)
    length = aspect * width
    signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))
    return [(a * length * ux - b * width * uy, a * length * uy + b * width * ux) for a, b in signs]


def _coverage(shape: _Shape, image_size: int) -> NDArray[np.float64]:
    """The part of each pixel that the shape covers, 0 to 1, ``[image_size, image_size]``."""
    side = image_size * _SAMPLES
    x = (np.arange(side) + 0.5) / side
    y = x[:, None]
    if shape.edges:  # depth: how far inside the outline a point lies, negative outside
        nx, ny, offset = shape.edges[0]
        depth = (offset - nx * x) - ny * y
        for nx, ny, offset in shape.edges[1:]:
            np.minimum(depth, (offset - nx * x) - ny * y, out=depth)
    else:
        depth = shape.radius - np.sqrt((x - shape.x) ** 2 + (y - shape.y) ** 2)
    inside = (depth >= 0) & (depth <= shape.line)
    rows = inside.reshape(side, image_size, _SAMPLES).sum(axis=2, dtype=np.uint8)
    coverage: NDArray[np.float64] = rows.reshape(image_size, _SAMPLES, image_size).sum(axis=1) / _SAMPLES**2
    return coverage
