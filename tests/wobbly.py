"""Thirty drawings of an unsteady hand, pictures of every kind and folders of them, for the tests of what reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nodeshape._data.shapes import draw

Stroke = list[tuple[float, float]]
KINDS = ("circle", "triangle", "rectangle")


@dataclass(frozen=True)
class Drawing:
    """Strokes through points (x, y) in sides of the paper, and the width of the pen, of which the paper has 512."""

    kind: str
    strokes: list[Stroke]
    pen: int


def wobbly_drawings() -> list[Drawing]:
    """Ten of each kind: pens of 1% to 9% of the side, radii of 0.09 to 0.42, some open, some in several strokes."""
    rng = np.random.default_rng(2021)
    pens = (5, 8, 12, 16, 20, 24, 28, 34, 40, 46)
    radii = (0.12, 0.2, 0.3, 0.42, 0.09, 0.15, 0.36, 0.25, 0.33, 0.28)
    drawings = []
    for kind in KINDS:
        for i, (pen, radius) in enumerate(zip(pens, radii)):
            drawings.append(Drawing(kind, _strokes(kind, radius, i, rng), min(pen, int(256 * radius))))
    return drawings


def _strokes(kind: str, radius: float, i: int, rng: np.random.Generator) -> list[Stroke]:
    centre = rng.uniform(radius + 0.05, 0.95 - radius, 2)
    turn = rng.uniform(0, 2 * math.pi)
    if kind == "circle":
        angles = np.linspace(0, 2 * math.pi, 60) + turn
        outline = np.stack([np.cos(angles), rng.uniform(0.8, 1) * np.sin(angles)], axis=1)
        corners = [0, 59]
    else:
        if kind == "triangle":
            angles = turn + np.array([0, 2.1, 4.2]) + rng.uniform(-0.3, 0.3, 3)
        else:
            half = math.atan(rng.uniform(0.5, 1))
            turn = rng.uniform(-0.2, 0.2) if i % 3 else turn
            angles = turn + np.array([half, math.pi - half, math.pi + half, -half]) + rng.uniform(-0.06, 0.06, 4)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = np.concatenate([points, points[:1]])
        part = np.linspace(0, 1, 20)[:, None]
        outline = np.concatenate([a + part * (b - a) for a, b in zip(points, points[1:])])
        corners = list(range(0, len(outline) + 1, 20))
    time = np.linspace(0, 2 * math.pi, len(outline))
    for axis in (0, 1):  # a hand that shakes slowly, and a little fast
        for waves in (2, 3, 7):
            size = rng.uniform(0, 0.06 if waves < 5 else 0.015)
            outline[:, axis] += size * np.sin(waves * time + rng.uniform(0, 2 * math.pi))
    outline = centre + radius * outline
    if i % 4 == 1:  # not closed
        return [[tuple(point) for point in outline[: -len(outline) // 14].tolist()]]
    if i % 4 == 3 and kind != "circle":  # a stroke for each side
        pieces = [outline[a:b] + radius * rng.uniform(-0.03, 0.03, 2) for a, b in zip(corners, corners[1:])]
        return [[tuple(point) for point in piece.tolist()] for piece in pieces]
    return [[tuple(point) for point in outline.tolist()]]


def picture(drawing: Drawing, side: int = 512) -> Image.Image:
    """The drawing in black on white, as the page's paper shows it."""
    fine = 2 * side
    image = Image.new("L", (fine, fine), 255)
    pen = ImageDraw.Draw(image)
    width = drawing.pen * fine // 512
    for stroke in drawing.strokes:
        points = [(x * fine, y * fine) for x, y in stroke]
        pen.line(points, 0, width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=0)
    return image.resize((side, side), Image.Resampling.BOX)


def clean_shape(kind: str, radius: float, filled: bool, rng: np.random.Generator, side: int = 320) -> Image.Image:
    """A shape drawn with a ruler, in a circle of ``radius`` sides, anywhere, dark on bright or bright on dark."""
    fine = 3 * side
    paper, ink = (255, 0) if rng.random() < 0.7 else (0, 255)
    image = Image.new("L", (fine, fine), paper)
    pen = ImageDraw.Draw(image)
    r = radius * fine
    x, y = rng.uniform(r + 6, fine - r - 6, 2)
    line = max(1, round(min(rng.uniform(0.01, 0.08), 0.4 * radius) * fine))
    if kind == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=ink if filled else None, outline=ink, width=line)
        return image.resize((side, side), Image.Resampling.BOX)
    while True:
        if kind == "triangle":
            angles = np.sort(rng.uniform(0, 2 * math.pi, 3))
        else:
            half, turn = math.atan(rng.uniform(1 / 2.2, 1)), rng.uniform(0, 2 * math.pi)
            angles = turn + np.array([half, math.pi - half, math.pi + half, -half])
        corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
        a, b = corners[1] - corners[0], corners[2] - corners[0]
        if kind == "rectangle" or abs(a[0] * b[1] - a[1] * b[0]) >= 0.9 * sides.max():  # no slivers
            break
    points = [(x + r * u, y + r * v) for u, v in corners]
    if filled:
        pen.polygon(points, fill=ink)
    else:
        pen.line([*points, *points[:2]], ink, line, joint="curve")
    return image.resize((side, side), Image.Resampling.BOX)


def write_photos(folder: Path, count: int) -> Path:
    """Drawn shapes of three classes as a user's folder of images."""
    for index in range(count):
        image, label = draw("single", 5, index, 20)
        path = folder / f"class{label}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_pictures(folder: Path, count: int = 100) -> list[Path]:
    """Image files of every kind: formats, modes, sizes, transparency, palettes, 16 bits, EXIF rotations, empty ones."""
    folder.mkdir()
    files = []
    for i in range(count):
        image = Image.fromarray(draw("hand", 11, i, 60 + 37 * (i % 9), "files")[0])
        if i % 3:  # not square: more of the background on two sides
            wide = Image.new("L", (image.width + 13 * (i % 7), image.height + 17 * (i % 5)), image.getpixel((0, 0)))
            wide.paste(image, (wide.width - image.width, (wide.height - image.height) // 2))
            image = wide
        image, suffix, options = _KINDS[i % len(_KINDS)](image, i)
        files.append(folder / f"{i:03d}{suffix}")
        image.save(files[-1], **options)
    return files


def _turned(i: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 1 + i // len(_KINDS) % 8
    return exif


def _see_through(image: Image.Image, mode: str) -> Image.Image:
    """The drawing as ink of that opacity on nothing."""
    ink = image if image.getpixel((0, 0)) < 128 else Image.eval(image, lambda value: 255 - value)
    clear = Image.new(mode, image.size, (30, 0) if mode == "LA" else (10, 60, 90, 0))
    clear.putalpha(ink)
    return clear


def _wide_values(image: Image.Image) -> Image.Image:
    return Image.fromarray(
        (np.asarray(image).astype(np.uint16) * 257 + np.arange(image.width, dtype=np.uint16) % 100) // 2
    )


def _coloured(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", (image, Image.eval(image, lambda v: v // 2 + 40), Image.eval(image, lambda v: 255 - v)))


_KINDS = (
    lambda image, i: (image, ".png", {}),
    lambda image, i: (image.convert("RGB"), ".jpg", {"quality": 92, "exif": _turned(i)}),
    lambda image, i: (_see_through(image, "RGBA"), ".png", {}),
    lambda image, i: (_wide_values(image), ".png", {}),
    lambda image, i: (_coloured(image), ".webp", {"lossless": True}),
    lambda image, i: (_coloured(image), ".bmp", {}),
    lambda image, i: (_see_through(image, "LA"), ".png", {}),
    lambda image, i: (_coloured(image).quantize(16), ".png", {"transparency": 0} if i % 2 else {}),
    lambda image, i: (image, ".png", {"exif": _turned(i)}),
    lambda image, i: (image, ".jpg", {"quality": 80, "exif": _turned(i)}),
    lambda image, i: (_coloured(image), ".webp", {"quality": 90}),
    lambda image, i: (_see_through(image, "RGBA"), ".webp", {"lossless": True, "exif": _turned(i)}),
    lambda image, i: (Image.new("L", image.size, 2 * i), ".png", {}),
    lambda image, i: (_coloured(image).resize((1500, 900)), ".jpg", {"quality": 90}),
)
