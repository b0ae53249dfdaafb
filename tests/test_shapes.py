"""Drawn shapes: reproducible to the bit, balanced, disjoint between splits, and honest about what they show."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeshape._data import shapes as _shapes
from nodeshape._data.shapes import CLASSES, SPLITS, draw, draw_set

TASKS = tuple(CLASSES)
RULED = ("single", "compound")  # drawn with a ruler; hand.py draws the others


def scene_of(task, seed, index):
    """The label, the noise-free scene."""
    label, stream = _shapes._label_and_stream(task, "train", seed, index)
    return label, _shapes._scene(CLASSES[task][label], stream)


@pytest.mark.parametrize(
    ("task", "image_size", "digest"),
    [
        ("single", 32, "c40fe72812f44de2a5ac7c9b7dcb4a2f"),
        ("single", 48, "888ee186efef4d3e6bf534a779d1f5e2"),
        ("compound", 32, "6df579e545787e48ee08f8aecba53ce9"),
        ("compound", 48, "ef6959271ebd30792c5924313b92763e"),
    ],
)
def test_images_are_the_same_on_every_machine(task, image_size, digest):
    drawn = [draw(task, 7, index, image_size, "test") for index in range(20)]
    data = b"".join(image.tobytes() + bytes([label]) for image, label in drawn)
    assert hashlib.sha256(data).hexdigest()[:32] == digest


@pytest.mark.parametrize("task", TASKS)
def test_an_image_does_not_depend_on_the_order_of_drawing(task):
    images, labels = draw_set(task, "train", 40, seed=3)
    indices = list(range(40))
    random.Random(0).shuffle(indices)
    for index in indices:
        image, label = draw(task, 3, index)
        assert label == labels[index]
        np.testing.assert_array_equal(image, images[index, 0])


@pytest.mark.parametrize("task", TASKS)
def test_splits_and_seeds_share_no_image(task):
    sets = [draw_set(task, split, 700, seed)[0] for split in SPLITS for seed in (0, 1)]
    digests = {image.tobytes() for images in sets for image in images}
    assert len(digests) == len(sets) * 700


def test_the_default_train_and_test_images_are_all_different():
    images = np.concatenate([draw_set("compound", "train", 2700)[0], draw_set("compound", "test", 6000)[0]])
    assert len({image.tobytes() for image in images}) == 8700


@pytest.mark.parametrize("task", TASKS)
def test_every_block_of_indices_holds_each_class_once_in_an_order_of_its_own(task):
    classes = len(CLASSES[task])
    _, labels = draw_set(task, "train", 20 * classes)
    blocks = labels.reshape(20, classes)
    assert (np.sort(blocks, axis=1) == np.arange(classes)).all()
    assert len(np.unique(blocks, axis=0)) > 3


@pytest.mark.parametrize("task", TASKS)
def test_a_larger_image_shows_the_same_scene(task):
    for index in range(20):
        small, label = draw(task, 5, index, 32)
        large, large_label = draw(task, 5, index, 128)
        means = large.reshape(32, 4, 32, 4).mean(axis=(1, 3))
        assert label == large_label
        assert abs(means - small).mean() < 10  # two draws of noise, nothing else


@given(st.sampled_from(RULED), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_an_image_shows_the_shapes_of_its_class_whole_and_apart(task, seed, index):
    label, scene = scene_of(task, seed, index)
    name = CLASSES[task][label]
    assert "+".join(shape.kind for shape in scene.shapes) == name.replace("blank", "")

    covers = [_shapes._coverage(shape, 32) for shape in scene.shapes]
    for cover in covers:
        assert cover.sum() > 15, "too small to name"
        assert cover[0].max() == cover[-1].max() == cover[:, 0].max() == cover[:, -1].max() == 0, "cut by the frame"
    finely = [_shapes._coverage(shape, 128) for shape in scene.shapes]
    assert count_components(sum(finely, np.zeros((128, 128))) > 0) == len(finely)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_every_shape_stands_out_from_its_background(seed, index):
    _, scene = scene_of("compound", seed, index)
    for shape in scene.shapes:
        assert 0 <= shape.level <= 255
        assert abs(shape.level - scene.background) >= 100 > 10 * scene.noise


@given(st.integers(0, 2**32 - 1))
def test_triangles_are_no_slivers_and_rectangles_have_right_angles(seed):
    stream = _shapes.Stream(seed)
    a, b, c = (np.array(corner) for corner in _shapes._triangle(stream))
    sides = [np.linalg.norm(p - q) for p, q in ((a, b), (b, c), (c, a))]
    area = abs(np.linalg.det(np.stack([b - a, c - a]))) / 2
    assert 2 * area / max(sides) >= 0.9 - 1e-9

    a, b, c, d = (np.array(corner) for corner in _shapes._rectangle(stream))
    assert abs((b - a) @ (c - b)) < 1e-12
    np.testing.assert_allclose(a - b, d - c)
    assert 1 <= np.linalg.norm(c - b) / np.linalg.norm(b - a) <= 2.2 + 1e-9 or (
        1 <= np.linalg.norm(b - a) / np.linalg.norm(c - b) <= 2.2 + 1e-9
    )


def test_coverage_is_the_area_of_the_shape():
    circle = _shapes._Shape("circle", 0.5, 0.5, 0.3, (), float("inf"), 255)
    ring = _shapes._Shape("circle", 0.5, 0.5, 0.3, (), 0.1, 255)
    assert _shapes._coverage(circle, 64).mean() == pytest.approx(np.pi * 0.3**2, rel=1e-2)
    assert _shapes._coverage(ring, 64).mean() == pytest.approx(np.pi * (0.3**2 - 0.2**2), rel=1e-2)


def test_images_vary_in_polarity_and_outline():
    scenes = [scene_of("single", 0, index)[1] for index in range(200)]
    shapes = [scene.shapes[0] for scene in scenes]
    bright = np.mean([shape.level > scene.background for shape, scene in zip(shapes, scenes, strict=True)])
    outlined = np.mean([np.isfinite(shape.line) for shape in shapes])
    assert 0.35 < bright < 0.65
    assert 0.35 < outlined < 0.65


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("double", 0, 0, 32, "train"), "unknown task 'double'"),
        (("single", 0, 0, 32, "valid"), "unknown split 'valid'"),
        (("single", -1, 0, 32, "train"), "seed must be 0 to"),
        (("single", 2**32, 0, 32, "train"), "seed must be 0 to"),
        (("single", 0, -1, 32, "train"), "must be 0 to"),
        (("single", 0, 0, 0, "train"), "image size must be 8 to 1024"),
        (("single", 0, 0, 20_000, "train"), "image size must be 8 to 1024"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


def test_drawing_never_imports_torch():
    code = (
        "import sys, nodeshape._data.shapes, nodeshape._data.images, nodeshape.data; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def count_components(mask):
    """Number of regions of true pixels, diagonal neighbours joined."""
    left = {tuple(pixel) for pixel in np.argwhere(mask).tolist()}
    count = 0
    while left:
        count += 1
        frontier = [left.pop()]
        while frontier:
            i, j = frontier.pop()
            near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & left
            left -= near
            frontier += near
    return count
