"""The settings of a run: what a command line, a checkpoint and config.json say of it, and what they may say."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nodeshape._cli import ArgumentType, one_of, positive_float, positive_int, seed, whole
from nodeshape._data.augment import AUGMENTATIONS
from nodeshape._data.images import CHANNELS
from nodeshape._data.shapes import CLASSES
from nodeshape._errors import UserError
from nodeshape._models.classifier import MIN_IMAGE_SIZE
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.options import ADJOINTS
from nodeshape._training.recipe import CLASS_WEIGHTS, RECIPES, Recipe

MAX_IMAGE_SIZE = 1024
MIN_STEP_SIZE = 1e-4
#: What ``--recipe`` sets where the flag itself is not given.
RECIPE_FLAGS = ("batch_size", "lr", "augment")
#: What may be given anew with ``--resume``.
CHANGEABLE = ("data", "epochs", "patience", "device", "tensorboard")
#: Settings that are paths, kept absolute.
PATHS = ("data", "init")

STEP_SIZE = ArgumentType(
    float, f"a finite number of at least {MIN_STEP_SIZE:g}", lambda h: MIN_STEP_SIZE <= h < math.inf
)
DEVICE = ArgumentType(
    str, "auto, cpu, cuda or cuda:N", lambda name: re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name) is not None
)
FLAG = ArgumentType(bool, "true or false", lambda value: True)
FOLDER = ArgumentType(str, "a folder", lambda value: True)
CHECKPOINT = ArgumentType(str, "a checkpoint", lambda value: True)


def _setting(default: Any, type_: ArgumentType[Any], *, optional: bool = False) -> Any:
    """A field of :class:`RunSettings`; None is a value of it too if it is ``optional`` or its ``default``."""
    return field(default=default, metadata={"type": type_, "optional": optional or default is None})


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, one per flag of ``python -m nodeshape.train``, in the order and form of config.json.

    Raises:
        UserError: a value is none of those that :meth:`validate` allows.
    """

    task: str | None = _setting("single", one_of(CLASSES), optional=True)
    data: str | None = _setting(None, FOLDER)
    method: str = _setting("euler", one_of(SOURCE_METHODS))
    step_size: float = _setting(0.05, STEP_SIZE)
    adjoint: str = _setting("discrete", one_of(ADJOINTS))
    init: str | None = _setting(None, CHECKPOINT)
    train_size: int | None = _setting(None, whole(2))
    test_size: int | None = _setting(None, whole(2))
    recipe: str = _setting("default", one_of(RECIPES))
    batch_size: int = _setting(Recipe.batch_size, positive_int)
    epochs: int = _setting(Recipe.epochs, positive_int)
    patience: int | None = _setting(Recipe.patience, positive_int)
    lr: float = _setting(Recipe.lr, positive_float)
    clip_norm: float | None = _setting(Recipe.clip_norm, positive_float)
    class_weights: str = _setting(Recipe.class_weights, one_of(CLASS_WEIGHTS))
    amp: bool = _setting(Recipe.amp, FLAG)
    dtype: str = _setting("float32", one_of(("float32", "float64")))
    augment: str = _setting(Recipe.augment, one_of(AUGMENTATIONS))
    seed: int = _setting(0, seed)
    image_size: int = _setting(32, whole(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE))
    channels: str = _setting("grey", one_of(CHANNELS))
    device: str = _setting("auto", DEVICE)
    strict: bool = _setting(False, FLAG)
    stream: bool = _setting(False, FLAG)
    tensorboard: bool = _setting(False, FLAG)

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_args(cls, given: Mapping[str, Any]) -> RunSettings:
        """A new run's: what is ``given``, by names of fields, over what its recipe sets, over the defaults.

        Raises:
            UserError: a value is not allowed, or two do not go together.
        """
        values = _with_absolute_paths(given)
        if values.get("data") is not None:
            if "task" in given:
                raise UserError("--task draws images and --data reads yours: give one of the two")
            values.update(task=None)
        recipe = RECIPES[values.get("recipe", cls.recipe)]
        return cls(**{**{name: getattr(recipe, name) for name in RECIPE_FLAGS}, **values})

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> RunSettings:
        """A resumed run's: what its checkpoint holds, with what is ``given`` anew.

        Args:
            state: the checkpoint.
            given: by names of fields; only ``CHANGEABLE`` ones may differ from the run's, and epochs be more.
            path: of the checkpoint, for the errors.

        Raises:
            UserError: the checkpoint's settings are not those of a run, or others are ``given``.
        """
        try:
            stored = cls(**{setting.name: state.get(setting.name, setting.default) for setting in fields(cls)})
        except UserError as error:
            raise UserError(f"{path}: its settings are not those of a run ({error}); start a new run") from error
        values = _with_absolute_paths(given)
        for name, value in values.items():
            own = getattr(stored, name)
            changeable = name in CHANGEABLE and not (name == "data" and own is None)  # drawn images have no place
            if not changeable and own != value:
                raise UserError(
                    f"{_flag(name)} {given[name]} differs from the run's {own}; leave it out, or start a new run"
                )
        if values.get("epochs", stored.epochs) < stored.epochs:
            raise UserError(
                f"--epochs {values['epochs']} is fewer than the run's {stored.epochs}; give more, or leave it out"
            )
        return replace(stored, **{name: values[name] for name in CHANGEABLE if name in values})

    def validate(self) -> None:
        """Check each value's type and range, and that the values go together.

        Raises:
            UserError: the first that is not allowed, by the name of its flag.
        """
        for setting in fields(self):
            value, type_ = getattr(self, setting.name), setting.metadata["type"]
            if not type_.admits(value) and not (value is None and setting.metadata["optional"]):
                raise UserError(f"{_flag(setting.name)}: expected {type_.expected}, got {reprlib.repr(value)}")
        if (self.task is None) == (self.data is None):
            raise UserError(f"--task {self.task} and --data {self.data}: expected one of the two")
        if self.stream and self.data is None:
            raise UserError("--stream reads the images of --data while training: give --data too")
        if self.amp and self.dtype != "float32":
            raise UserError(f"--amp is for float32: leave out --amp or --dtype {self.dtype}")

    @property
    def subject(self) -> str:
        """What the images are of: a task, or the name of a folder."""
        return self.task or Path(self.data or "").name

    def training_recipe(self) -> Recipe:
        """How the classifier is trained."""
        own = {setting.name for setting in fields(self)}
        return Recipe(**{part.name: getattr(self, part.name) for part in fields(Recipe) if part.name in own})


def _with_absolute_paths(given: Mapping[str, Any]) -> dict[str, Any]:
    paths = {name: str(Path(given[name]).resolve()) for name in PATHS if given.get(name) is not None}
    return {**given, **paths}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
