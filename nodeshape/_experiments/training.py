"""A training run of the paper: one network on one task's images, by one method and seed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from nodeshape._benchmarking.timing import QUICK, machine, torch_threads
from nodeshape._data.datasets import Split, drawn_data
from nodeshape._data.shapes import CLASSES
from nodeshape._errors import ReversalDriftError, StageSolveError, StepSizeError, UserError
from nodeshape._experiments.jobs import Job, Result, Store
from nodeshape._experiments.networks import RESIDUAL_BLOCKS, build
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training.checkpoint import save_checkpoint
from nodeshape._training.trainer import CALIBRATION_IMAGES, RECIPES, EpochMetrics, Interrupted, Recipe, Trainer, predict

IMAGE_SIZE, CHANNELS = 32, "grey"
CPU = torch.device("cpu")
#: What a solver raises rather than return a wrong number.
REFUSALS = (StageSolveError, StepSizeError, ReversalDriftError)
#: Seconds a training and a test image cost outside the ODE, and each Euler step inside it, on one core.
TRAIN_IMAGE, TRAIN_STEP = 1.2e-3, 0.12e-3
TEST_IMAGE, TEST_STEP = 0.25e-3, 0.032e-3
#: Euler steps that a step of a method, and a solve besides, cost as much as: small steps take fewer stage iterations.
STEP_COST = {"euler": (1.0, 0), "implicit_euler": (1.5, 22), "implicit_midpoint": (1.55, 14)}
PLAIN_STEP = 2.5
#: Fused Euler steps that a solve under error control costs as much as.
CONTROLLED = 700


@dataclass(frozen=True)
class Training(Job):
    """Train one network by the public trainer.

    Attributes:
        task, train_size, step_size, method, seed: as in ``python -m nodeshape.train``.
        epochs: passes over the training images.
        test_size: test images, after each epoch.
        network: ``"ode"``, ``"resnet"`` or ``"rknet"``.
        recipe: as in ``--recipe``.
        rtol: of error control, which then chooses the steps instead of ``step_size``; the ODE-Net's alone.
    """

    task: str
    train_size: int
    step_size: float
    method: str
    seed: int
    epochs: int
    test_size: int
    network: str = "ode"
    recipe: str = "default"
    rtol: float | None = None

    @property
    def depth(self) -> int:
        """Steps of the solver, or residual blocks."""
        return RESIDUAL_BLOCKS if self.network == "resnet" else round(1 / self.step_size)

    @property
    def seconds(self) -> float:
        if self.rtol is not None:
            steps: float = CONTROLLED
        else:
            steps = euler_steps(self.method, self.depth) if self.network == "ode" else PLAIN_STEP * self.depth
        train_image, test_image = TRAIN_IMAGE + TRAIN_STEP * steps, TEST_IMAGE + TEST_STEP * steps
        looks = min(self.train_size, CALIBRATION_IMAGES) + self.test_size
        return self.epochs * (self.train_size * train_image + looks * test_image)

    def compute(self, store: Store) -> Result:
        """Accuracies and seconds by epoch, or why it ``failed``; the weights are left in the store."""
        data = drawn_data(self.task, self.train_size, 2, IMAGE_SIZE, CHANNELS, self.seed)
        data.test = drawn_test_images(self.task, self.test_size, self.seed)
        torch.manual_seed(self.seed)
        model = self.model()
        trainer = Trainer(model, data, replace(RECIPES[self.recipe], epochs=self.epochs, seed=self.seed), CPU)
        history: list[EpochMetrics] = []
        try:
            trainer.run(history.append)
        except (*REFUSALS, UserError) as error:  # a step too large for the stage equation; a loss that is not finite
            return {"failed": str(error)}
        except Interrupted:  # the command is over, and so is this worker
            sys.exit()
        save_checkpoint(store.path(self, ".pt"), model.state_dict())
        return {
            "accuracy": [epoch.test_accuracy for epoch in history],
            "seconds": [epoch.seconds for epoch in history],
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def model(self) -> ShapeClassifier:
        """The untrained network."""
        if self.rtol is not None:
            return ShapeClassifier(len(CLASSES[self.task]), method=self.method, rtol=self.rtol)
        return build(self.network, len(CLASSES[self.task]), self.depth, **self._solver())

    def trained(self, store: Store, **solver: Any) -> ShapeClassifier:
        """The ODE-Net that this run left in the store, its ODE solved as ``solver`` says."""
        model = ShapeClassifier(len(CLASSES[self.task]), **solver)
        model.load_state_dict(torch.load(store.path(self, ".pt"), weights_only=True))
        return model.eval()

    def _solver(self) -> dict[str, str]:
        return {"method": self.method} if self.network == "ode" else {}


@dataclass(frozen=True)
class Epoch(Job):
    """The time of a first epoch, by itself on all cores."""

    task: str
    train_size: int
    step_size: float
    method: str
    alone: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    @property
    def seconds(self) -> float:
        return Training(self.task, self.train_size, self.step_size, self.method, 0, epochs=1, test_size=2).seconds

    def compute(self, store: Store) -> Result:
        """Seconds of training, and what they were measured on.

        Raises:
            UserError: the solver refused, or the loss is no longer finite.
        """
        data = drawn_data(self.task, self.train_size, 2, IMAGE_SIZE, CHANNELS, seed=0)
        torch.manual_seed(0)
        model = ShapeClassifier(len(data.classes), method=self.method, step_size=self.step_size)
        history: list[EpochMetrics] = []
        try:
            Trainer(model, data, Recipe(epochs=1), CPU).run(history.append)
        except REFUSALS as error:
            raise UserError(f"{self.task}, {self.train_size} images, {self.method}, one epoch: {error}") from error
        except Interrupted:
            sys.exit()
        return {"seconds": history[0].seconds, "machine": machine(QUICK)}


@lru_cache(maxsize=8)
def drawn_test_images(task: str, size: int, seed: int) -> Split:
    """The test images of a task and seed; kept, as most runs share them."""
    test = drawn_data(task, 2, size, IMAGE_SIZE, CHANNELS, seed).test
    assert isinstance(test, Split)  # drawn images are in memory
    return test


def euler_steps(method: str, steps: int) -> float:
    """How many fused Euler steps a solve costs as much as."""
    a_step, a_solve = STEP_COST[method]
    return a_step * steps + a_solve


def slowness() -> float:
    """How many times as long a training step takes here, on one thread, as it did where the costs were measured."""
    images, labels = torch.rand(60, 1, IMAGE_SIZE, IMAGE_SIZE), torch.arange(60) % 3
    model = ShapeClassifier(3)
    with torch_threads(1):
        for _ in range(2):
            start = time.perf_counter()
            nn.functional.cross_entropy(model(images), labels).backward()
            seconds = time.perf_counter() - start
    return seconds / (len(images) * (TRAIN_IMAGE + 20 * TRAIN_STEP))


def accuracy_on(model: ShapeClassifier, test: Split) -> float:
    """The share of images that a model classifies rightly, in [0, 1]."""
    return float((predict(model, test, CPU).argmax(1) == test.labels).double().mean())
