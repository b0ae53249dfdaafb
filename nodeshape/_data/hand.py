"""Shapes as people draw them: wobbly, of any size and pen, not quite closed, ellipses for circles, bent sides.

As in ``shapes``, only + − × ÷ √ are used, each rounded alike everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nodeshape._data.random_stream import Stream

KINDS = ("circle", "triangle", "rectangle")

#: Radius of the circle about a shape, and width of its line, in image sides.
RADIUS, LINE = (0.055, 0.46), (0.008, 0.12)
#: No line is wider than this part of the radius: it would fill the shape.
WIDEST_LINE = 0.5
#: Largest sizes of what a hand does, in radii: each point off its place, the end off the start, a side off its corners.
WOBBLE, DRIFT, MISFIT = 0.05, 0.15, 0.08

_POINTS = 48  # of an outline; a multiple of 3 and 4, so that corners are points
_SAMPLES = 2  # per side of a pixel

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Sketch:
    """One shape drawn by hand.

    Attributes:
        background, level: grey values of the paper and of the pen.
        strokes: lines through points ``[n, 2]``, (x, y) in image sides, y downwards.
        line: width of the pen in image sides.
        filled: whether the first stroke's inside is filled, its end joined to its start.
        noise: standard deviation of the noise that the picture gets.
    """

    background: float
    level: float
    strokes: tuple[Points, ...]
    line: float
    filled: bool
    noise: float

    def render(self, image_size: int) -> NDArray[np.float64]:
        """The picture without its noise: grey values ``[image_size, image_size]``."""
        side = image_size * _SAMPLES
        ink = np.zeros((side, side))
        for stroke in self.strokes:
            for start, end in zip(stroke, stroke[1:]):
                _add_segment(ink, start * side, end * side, self.line * side)
        if self.filled:
            ink[_inside(self.strokes[0] * side, side)] = 1
        rows = ink[:, 0::2] + ink[:, 1::2]
        return self.background + (self.level - self.background) * ((rows[0::2] + rows[1::2]) / _SAMPLES**2)


def sketch(kind: str, stream: Stream) -> Sketch:
    """A random drawing of one of ``KINDS``."""
    bright_on_dark = stream.coin()
    dark = stream.uniform(0, 80) if stream.coin() else 0.0
    contrast = stream.uniform(100, 255 - dark) if stream.coin() else 255 - dark
    background = dark if bright_on_dark else 255 - dark
    level = background + contrast if bright_on_dark else background - contrast

    part = stream.uniform(0, 1)
    part = part * part if stream.coin() else part  # small ones are hardest to tell apart: more of them
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * part
    filled = stream.uniform(0, 1) < 0.4
    part = stream.uniform(0, 1)
    line = min(LINE[0] + (LINE[1] - LINE[0]) * part * part, WIDEST_LINE * radius)
    outline = _wobbly(_OUTLINES[kind](stream), stream)
    if filled:
        line = LINE[0]
        strokes = [np.concatenate([outline, outline[:1]])]
    elif stream.uniform(0, 1) < 0.7:
        strokes = [_one_stroke(outline, stream)]
    else:
        strokes = _side_by_side(outline, {"circle": 2, "triangle": 3, "rectangle": 4}[kind], stream)
    noise = stream.uniform(1, 8) if stream.coin() else 0.0
    strokes = _placed([stroke * radius for stroke in strokes], line, stream)
    return Sketch(background, level, tuple(strokes), line, filled, noise)


def _ellipse(stream: Stream) -> Points:
    aspect = stream.uniform(1, 1.1) if stream.coin() else stream.uniform(1, 1.5)
    points = _CIRCLE * np.array([1, 1 / aspect])
    return _turned(points, stream.direction())


def _triangle(stream: Stream) -> Points:
    """Corners on the unit circle, the smallest height 0.8 or more (1.5 is equilateral), so that none is a sliver."""
    while True:
        corners = [stream.direction() for _ in range(3)]
        (ax, ay), (bx, by), (cx, cy) = corners
        twice_area = abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
        sides = [(ax - bx, ay - by), (bx - cx, by - cy), (cx - ax, cy - ay)]
        if twice_area >= 0.8 * math.sqrt(max(x * x + y * y for x, y in sides)):
            return _polygon(corners)


def _rectangle(stream: Stream) -> Points:
    """A rectangle 1 to 2.6 times as long as wide in the unit circle, level or turned, its corners not quite right."""
    aspect = stream.uniform(1, 2.6)
    width = 1 / math.sqrt(1 + aspect * aspect)
    length = aspect * width
    skew = width * (0.15 if stream.coin() else 0.0)
    signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))
    corners = [(a * length + stream.uniform(-skew, skew), b * width + stream.uniform(-skew, skew)) for a, b in signs]
    x, y = stream.direction()
    if stream.coin():  # nearly level or upright, as most are drawn
        y *= 0.2
        norm = math.sqrt(x * x + y * y)
        x, y = (x / norm, y / norm) if stream.coin() else (y / norm, x / norm)
    return _turned(_polygon(corners), (x, y))


_OUTLINES = {"circle": _ellipse, "triangle": _triangle, "rectangle": _rectangle}


def _polygon(corners: list[tuple[float, float]]) -> Points:
    """``_POINTS`` points on the sides, as many on each."""
    count = _POINTS // len(corners)
    part = (np.arange(count) / count)[:, None]
    starts = [np.array(corner) for corner in corners]
    ends = starts[1:] + starts[:1]
    return np.concatenate([start + part * (end - start) for start, end in zip(starts, ends)])


def _turned(points: Points, direction: tuple[float, float]) -> Points:
    (x, y), (u, v) = points.T, direction
    return np.stack([x * u - y * v, x * v + y * u], axis=1)


def _wobbly(points: Points, stream: Stream) -> Points:
    """The outline with corners rounded a little and points off their places, in waves, the longer the larger."""
    for _ in range(int(stream.uniform(0, 3))):
        points = (np.roll(points, 1, axis=0) + 2 * points + np.roll(points, -1, axis=0)) / 4
    wobble = WOBBLE * stream.uniform(0, 1)
    for waves in (2, 3, 5, 8):
        cosine, sine = _CIRCLE[(waves * np.arange(_POINTS)) % _POINTS].T
        size = 2 * wobble / waves
        for axis in (0, 1):
            points[:, axis] += size * (stream.uniform(-1, 1) * cosine + stream.uniform(-1, 1) * sine)
    return points


def _one_stroke(outline: Points, stream: Stream) -> Points:
    """The outline from some point on, ended before it is closed, or after, and not quite where it began."""
    count = _POINTS + 1 + int(stream.uniform(-6, 5))
    start = int(stream.uniform(0, _POINTS))
    points = outline[(start + np.arange(count)) % _POINTS]
    drift = DRIFT * stream.uniform(0, 1)
    end = np.array([stream.uniform(-drift, drift), stream.uniform(-drift, drift)])
    drifted: Points = points + (np.arange(count) / count)[:, None] * end
    return drifted


def _side_by_side(outline: Points, sides: int, stream: Stream) -> list[Points]:
    """A stroke for each side, which may end before its corners or behind them."""
    count = _POINTS // sides
    strokes = []
    for i in range(sides):
        points = outline[(i * count + np.arange(count + 1)) % _POINTS]
        middle = (points[0] + points[-1]) / 2
        off = np.array([stream.uniform(-MISFIT, MISFIT), stream.uniform(-MISFIT, MISFIT)]) / 2
        strokes.append(middle + off + (points - middle) * stream.uniform(1 - MISFIT, 1 + MISFIT))
    return strokes


def _placed(strokes: list[Points], line: float, stream: Stream) -> list[Points]:
    """The strokes somewhere in the image, whole; made smaller if they would not fit."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    room = 0.98 - line
    scale = min(1.0, room / max(high - low))
    place = [stream.uniform(0, room - scale * float(size)) for size in high - low]
    return [(stroke - low) * scale + np.array(place) + (1 - room) / 2 for stroke in strokes]


def _add_segment(ink: NDArray[np.float64], start: Points, end: Points, line: float) -> None:
    """Draw a line with round ends on ``ink``, all in samples; one thinner than a sample is fainter instead."""
    reach = line / 2 + 1
    (x0, y0), (x1, y1) = np.maximum(np.minimum(start, end) - reach, 0).astype(int), np.maximum(start, end) + reach
    box = ink[y0 : int(y1) + 1, x0 : int(x1) + 1]
    x = np.arange(x0, x0 + box.shape[1]) + 0.5 - start[0]
    y = (np.arange(y0, y0 + box.shape[0]) + 0.5 - start[1])[:, None]
    u, v = end - start
    square = u * u + v * v
    along = np.clip((x * u + y * v) / (square or 1.0), 0, 1)
    dx, dy = x - along * u, y - along * v
    cover = np.minimum(line / 2 + 0.5 - np.sqrt(dx * dx + dy * dy), min(1.0, line))
    np.maximum(box, cover, out=box)


def _inside(points: Points, side: int) -> NDArray[np.bool_]:
    """The samples within a closed line, by the number of times that a ray to the left crosses it."""
    inside = np.zeros((side, side), bool)
    x, y = np.arange(side) + 0.5, np.arange(side) + 0.5
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 == y1:
            continue
        rows = np.flatnonzero((y > min(y0, y1)) & (y <= max(y0, y1)))
        crossing = x0 + (y[rows] - y0) * ((x1 - x0) / (y1 - y0))
        inside[rows] ^= x > crossing[:, None]
    return inside


def _circle() -> Points:
    """Points of the unit circle, 7.5° apart, by turning one point after the other."""
    cosine, sine = 0.9914448613738104, 0.13052619222005157
    x, y, points = 1.0, 0.0, []
    for _ in range(_POINTS):
        points.append((x, y))
        x, y = x * cosine - y * sine, x * sine + y * cosine
    return np.array(points)


_CIRCLE = _circle()
