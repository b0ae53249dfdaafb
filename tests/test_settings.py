"""The settings of a run: from arguments, from checkpoints, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from nodeshape._errors import UserError
from nodeshape._training.recipe import RECIPES, Recipe
from nodeshape._training.settings import RunSettings

PATH = Path("run/last.pt")


def test_the_defaults_are_those_of_checkpoints_and_config_files_there_are() -> None:
    assert list(asdict(RunSettings()).items()) == [
        ("task", "single"),
        ("data", None),
        ("method", "euler"),
        ("step_size", 0.05),
        ("adjoint", "discrete"),
        ("init", None),
        ("train_size", None),
        ("test_size", None),
        ("recipe", "default"),
        ("batch_size", 120),
        ("epochs", 5),
        ("patience", None),
        ("lr", 0.01),
        ("clip_norm", None),
        ("class_weights", "none"),
        ("amp", False),
        ("dtype", "float32"),
        ("augment", "none"),
        ("seed", 0),
        ("image_size", 32),
        ("channels", "grey"),
        ("device", "auto"),
        ("strict", False),
        ("stream", False),
        ("tensorboard", False),
    ]


def test_what_is_given_comes_before_the_recipe_and_this_before_defaults() -> None:
    settings = RunSettings.from_args({"recipe": "small", "lr": 0.002, "epochs": 7})
    small = RECIPES["small"]
    assert (settings.lr, settings.batch_size, settings.augment) == (0.002, small.batch_size, small.augment)
    assert settings.training_recipe() == replace(small, lr=0.002, epochs=7)
    assert RunSettings.from_args({}).training_recipe() == Recipe()


def test_a_folder_is_kept_as_an_absolute_path_and_its_run_has_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = RunSettings.from_args({"data": "photos"})
    assert settings.data == str(tmp_path / "photos") and settings.task is None and settings.subject == "photos"
    assert RunSettings.from_checkpoint(asdict(settings), {"data": "photos"}, PATH) == settings
    moved = RunSettings.from_checkpoint(asdict(settings), {"data": "elsewhere"}, PATH)
    assert moved == replace(settings, data=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"^--data elsewhere differs from the run's None"):
        RunSettings.from_checkpoint(asdict(RunSettings()), {"data": "elsewhere"}, PATH)


def test_a_checkpoint_gives_back_its_settings_with_defaults_for_those_it_is_too_old_for() -> None:
    settings = RunSettings.from_args({"method": "implicit_midpoint", "patience": 3})
    state = {**asdict(settings), "model": {}, "fingerprint": "of the images"}
    del state["amp"]
    assert RunSettings.from_checkpoint(state, {}, PATH) == settings


def test_a_folder_that_is_not_a_text_is_refused_in_a_checkpoint() -> None:
    with pytest.raises(UserError, match="--data: expected a folder, got 3"):
        RunSettings.from_checkpoint({**asdict(RunSettings()), "task": None, "data": 3}, {}, PATH)


def test_only_where_how_long_and_with_what_log_a_run_goes_on_may_be_changed() -> None:
    state = asdict(RunSettings())
    longer = RunSettings.from_checkpoint(state, {"epochs": 40, "patience": 3}, PATH)
    assert longer == RunSettings(epochs=40, patience=3)
    with pytest.raises(UserError, match=r"^--epochs 4 is fewer than the run's 5; give more, or leave it out$"):
        RunSettings.from_checkpoint(state, {"epochs": 4}, PATH)
    changed = RunSettings.from_checkpoint(state, {"device": "cpu", "tensorboard": True, "lr": 0.01}, PATH)
    assert changed == RunSettings(device="cpu", tensorboard=True)
    with pytest.raises(UserError, match=r"^--lr 0.1 differs from the run's 0.01; leave it out, or start a new run$"):
        RunSettings.from_checkpoint(state, {"lr": 0.1}, PATH)


WRONG = [
    ("task", "triple", "one of single, compound, hand, got 'triple'"),
    ("method", ["euler"], "one of euler, implicit_euler, implicit_midpoint, got ['euler']"),
    ("step_size", 1e-5, "a finite number of at least 0.0001, got 1e-05"),
    ("step_size", "0.5", "a finite number of at least 0.0001, got '0.5'"),
    ("train_size", 1, "a whole number of at least 2, got 1"),
    ("batch_size", None, "a whole number of at least 1, got None"),
    ("batch_size", True, "a whole number of at least 1, got True"),
    ("epochs", 2.0, "a whole number of at least 1, got 2.0"),
    ("lr", math.nan, "a finite number above 0, got nan"),
    ("clip_norm", math.inf, "a finite number above 0, got inf"),
    ("amp", 1, "true or false, got 1"),
    ("seed", 2**32, "a whole number from 0 to 4294967295, got 4294967296"),
    ("image_size", 1025, "to 1024, got 1025"),
    ("device", "cuda:-1", "auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
    ("device", "cpu\n", r"auto, cpu, cuda or cuda:N, got 'cpu\n'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{name}={value}" for name, value, _ in WRONG])
def test_a_wrong_value_is_named_with_what_was_expected(name: str, value: Any, message: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError) as from_args:
        RunSettings.from_args({name: value})
    assert str(from_args.value).startswith(f"{flag}: expected ") and str(from_args.value).endswith(message)
    with pytest.raises(UserError) as from_checkpoint:
        RunSettings.from_checkpoint({**asdict(RunSettings()), name: value}, {}, PATH)
    assert str(from_checkpoint.value).startswith(f"{PATH}: ") and message in str(from_checkpoint.value)


def test_none_is_a_value_of_those_that_say_so_alone() -> None:
    for setting in fields(RunSettings):
        if setting.metadata["optional"]:
            RunSettings(**{setting.name: None, **({"data": "photos"} if setting.name == "task" else {})})
        else:
            with pytest.raises(UserError, match="got None"):
                RunSettings(**{setting.name: None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "single", "data": "photos"}, "give one of the two"),
        ({"stream": True}, "give --data too"),
        ({"amp": True, "dtype": "float64"}, "--amp is for float32"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunSettings.from_args(given)
    with pytest.raises(UserError, match=r"^run/last\.pt: "):
        RunSettings.from_checkpoint({**asdict(RunSettings()), **given}, {}, PATH)
