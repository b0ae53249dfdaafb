"""Augmentation: what it leaves alone, what it may change, and that few images train well with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nodeshape._data.augment import apply_maps, random_maps
from nodeshape._data.datasets import drawn_data
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training.trainer import RECIPES, Recipe, Trainer
from nodeshape.train import main


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def augment(images: torch.Tensor, kind: str) -> torch.Tensor:
    return apply_maps(images, random_maps(kind, len(images), generator()))


@pytest.mark.parametrize("kind", ["shift", "turn"])
def test_the_generator_decides_and_every_image_has_its_own_change(kind: str) -> None:
    image = torch.rand(1, 3, 16, 16)
    images = augment(image.expand(6, -1, -1, -1), kind)
    assert torch.equal(images, augment(image.expand(6, -1, -1, -1), kind))
    assert images.shape == (6, 3, 16, 16)
    assert all(not torch.equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize("kind", ["shift", "turn"])
def test_no_value_comes_from_outside_the_image(kind: str) -> None:
    images = 0.25 + 0.5 * torch.rand(50, 1, 12, 12)
    changed = augment(images, kind)
    assert changed.min() >= 0.25 and changed.max() <= 0.75
    torch.testing.assert_close(augment(torch.full_like(images, 0.3), kind), torch.full_like(images, 0.3))


def test_a_shift_keeps_left_and_right_but_a_turn_does_not() -> None:
    images = torch.zeros(100, 1, 16, 16)
    images[..., :4] = 1  # bright on the left
    for kind, always in (("shift", True), ("turn", False)):
        changed = augment(images, kind)
        left = changed[..., :8].sum(dim=(1, 2, 3)) > changed[..., 8:].sum(dim=(1, 2, 3))
        assert bool(left.all()) == always
    assert 20 < int(left.sum()) < 80


def test_turning_and_mirroring_keeps_a_disc() -> None:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    disc = ((x**2 + y**2) < 0.25).float().expand(40, 1, -1, -1)
    area = augment(disc, "turn").mean(dim=(1, 2, 3)) / disc[0].mean()
    assert area.min() > 1 / 1.3 and area.max() < 1.3  # of a scale up to 1.12, squared


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="one of shift, turn, got 'flip'"):
        random_maps("flip", 1, generator())


def test_the_small_recipe_beats_the_default_on_few_images() -> None:
    accuracy = {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = ShapeClassifier(3, image_size=24, width=32, step_size=0.5)
        data = drawn_data("single", 300, 300, 24, "grey", seed=0)
        trainer = Trainer(model, data, recipe, torch.device("cpu"))
        trainer.run(lambda metrics: None)
        accuracy[name] = trainer.progress.history[-1].test_accuracy
    assert accuracy["small"] > accuracy["default"] + 0.05
    assert accuracy["small"] > 0.9


def test_a_recipe_sets_the_flags_that_are_not_given(tmp_path: Path) -> None:
    few = ["--train-size", "20", "--test-size", "10", "--image-size", "16", "--step-size", "0.5", "--epochs", "1"]
    main([*few, "--recipe", "small", "--lr", "0.002", "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    small = RECIPES["small"]
    assert (config["recipe"], config["batch_size"], config["augment"]) == ("small", small.batch_size, small.augment)
    assert config["lr"] == 0.002


def test_the_default_recipe_is_the_protocol() -> None:
    assert RECIPES["default"] == Recipe()
    assert (Recipe.batch_size, Recipe.epochs, Recipe.augment) == (120, 5, "none")
