"""Shapes as people draw them: of every size and pen, whole, reproducible; a model of them knows what people draw."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeshape._data import hand
from nodeshape._data.random_stream import Stream
from nodeshape._data.shapes import CLASSES, draw


@pytest.mark.parametrize(
    ("image_size", "digest"), [(32, "c4ed54970c1ab4d4166cada93687c589"), (64, "223f1b5482ddd6f2916442cd366e6e13")]
)
def test_drawings_are_the_same_on_every_machine(image_size, digest):
    drawn = [draw("hand", 7, index, image_size, "test") for index in range(20)]
    data = b"".join(image.tobytes() + bytes([label]) for image, label in drawn)
    assert hashlib.sha256(data).hexdigest()[:32] == digest


@given(st.sampled_from(CLASSES["hand"]), st.integers(0, 2**32 - 1))
def test_a_drawing_lies_whole_on_the_paper_and_stands_out(kind, seed):
    drawing = hand.sketch(kind, Stream(seed))
    points = np.concatenate(drawing.strokes)
    assert (points - drawing.line / 2).min() >= 0.005 and (points + drawing.line / 2).max() <= 0.995
    assert 0 <= drawing.level <= 255 and abs(drawing.level - drawing.background) >= 100
    picture = drawing.render(64)
    assert np.ptp(picture) >= 20
    border = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert np.median(np.concatenate(border)) == pytest.approx(drawing.background)


def test_drawings_vary_in_size_pen_fill_and_strokes():
    drawings = [hand.sketch(kind, Stream(seed)) for seed in range(200) for kind in hand.KINDS]
    extents = np.array([np.ptp(np.concatenate(drawing.strokes), axis=0).max() / 2 for drawing in drawings])
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.45)):
        assert 0.08 < ((extents >= low) & (extents < high)).mean() < 0.5
    lines = [drawing for drawing in drawings if not drawing.filled]
    assert 0.5 < len(lines) / len(drawings) < 0.7
    widths = np.array([drawing.line for drawing in lines])
    assert (widths < 0.015).mean() > 0.1 and (widths > 0.06).mean() > 0.05
    assert 0.2 < np.mean([len(drawing.strokes) > 1 for drawing in lines]) < 0.4
    closed = [np.linalg.norm(drawing.strokes[0][0] - drawing.strokes[0][-1]) < drawing.line / 2 for drawing in lines]
    assert 0.1 < np.mean(closed) < 0.9
    assert 0.4 < np.mean([drawing.level < drawing.background for drawing in drawings]) < 0.6


def test_the_inside_of_a_filled_drawing_is_the_inside_of_its_line():
    square = np.array([(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75), (0.25, 0.25)])
    drawing = hand.Sketch(0, 255, (square,), 0.001, True, 0)
    assert drawing.render(64).mean() / 255 == pytest.approx(0.25, abs=0.005)
    ring = hand.Sketch(0, 255, (square,), 0.1, False, 0)
    assert ring.render(64).mean() / 255 == pytest.approx(0.6**2 - 0.4**2 - (4 - np.pi) * 0.05**2, rel=0.02)


def test_what_is_inside_a_square_with_level_sides():
    square = [(1.0, 1.0), (4.0, 1.0), (4.0, 4.0), (1.0, 4.0), (1.0, 1.0)]
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    np.testing.assert_array_equal(hand._inside(square, 6), expected)
