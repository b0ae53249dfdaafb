"""The training loop: Adam, cross-entropy and a one-cycle rate, resumable at any batch with identical results.

Everything random is a function of (seed, epoch), so a checkpoint needs no random state.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nodeshape._augment import augment
from nodeshape._classifier import ShapeClassifier
from nodeshape._cli import UserError
from nodeshape._datasets import Data, Split

TEST_BATCH_SIZE = 300
#: Training images whose mean and variance become the batch normalisation's after each epoch.
CALIBRATION_IMAGES = 960
#: The learning rate starts at its peak divided by this.
WARM_UP_FROM = 10


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak of the one-cycle learning rate.
        warm_up: part of the steps in which the rate rises to its peak; it falls to zero in the rest.
        betas: of AdamW. A short memory of the gradient, because a few dozen steps must do.
        weight_decay: of AdamW.
        augment: one of ``AUGMENTATIONS``.
        seed: fixes the order of the images and their augmentation.
    """

    epochs: int = 5
    batch_size: int = 120
    lr: float = 0.01
    warm_up: float = 0.15
    betas: tuple[float, float] = (0.8, 0.999)
    weight_decay: float = 1e-4
    augment: str = "none"
    seed: int = 0


#: What ``--recipe`` chooses from: the report's protocol, and one for a few hundred images.
RECIPES = {"default": Recipe(), "small": Recipe(batch_size=20, lr=0.005, augment="turn")}


@dataclass
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        train_loss: mean cross-entropy over the epoch's batches.
        test_accuracy: share of test images classified rightly, in [0, 1].
        seconds, test_seconds: wall-clock time of training and of testing.
        nfe_forward, nfe_backward: evaluations of f an image, mean over the epoch.
    """

    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float
    test_seconds: float
    nfe_forward: float
    nfe_backward: float


@dataclass
class Progress:
    """Where training stands: complete epochs, batches into the next one, and that one's running sums."""

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    nfe_forward: float = 0.0
    nfe_backward: float = 0.0
    seconds: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)


class Interrupted(Exception):
    """The user asked to stop; the trainer's state is that after a whole number of batches."""


class Trainer:
    """A classifier in training on ``data``.

    Args:
        model: on ``device``.
        data: its images stay where they are; batches move to ``device``.
    """

    def __init__(self, model: ShapeClassifier, data: Data, recipe: Recipe, device: torch.device) -> None:
        self.model, self.data, self.recipe, self.device = model, data, recipe, device
        self.batches = -(-len(data.train) // recipe.batch_size)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            recipe.lr,
            total_steps=max(2, recipe.epochs * self.batches),
            pct_start=recipe.warm_up,
            div_factor=WARM_UP_FROM,
            cycle_momentum=False,
        )
        self.progress = Progress()

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, as plain values and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        progress = dict(state["progress"])
        history = [EpochMetrics(**metrics) for metrics in progress.pop("history")]
        self.progress = Progress(**progress, history=history)

    def run(self, epoch_done: Callable[[EpochMetrics], None]) -> None:
        """Train the remaining epochs; ``epoch_done`` sees each one's metrics.

        Raises:
            Interrupted: on Ctrl-C, after the batch at hand.
            UserError: the loss is no longer finite.
        """
        with _interruptible() as stop_if_asked:
            while self.progress.epoch < self.recipe.epochs:
                order = self._order()
                self._train_epoch(order, stop_if_asked)
                metrics = self._finish_epoch(order)
                epoch_done(metrics)

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.recipe.seed * 100_003 + self.progress.epoch)
        return torch.randperm(len(self.data.train), generator=generator)

    def _augmented(self, images: Tensor, batch: int) -> Tensor:
        """A batch augmented, by random numbers that are a function of the seed, the epoch and the batch."""
        words = np.random.SeedSequence((self.recipe.seed, self.progress.epoch, batch)).generate_state(1)
        return augment(images, self.recipe.augment, torch.Generator().manual_seed(int(words[0])))

    def _batch(self, order: Tensor, i: int) -> tuple[Tensor, Tensor]:
        size = self.recipe.batch_size
        return self.data.train.batch(order[i * size : (i + 1) * size], self.device)

    def _train_epoch(self, order: Tensor, stop_if_asked: Callable[[], None]) -> None:
        progress = self.progress
        self.model.train()
        label = f"epoch {progress.epoch + 1}/{self.recipe.epochs}"
        with tqdm(
            total=self.batches, initial=progress.batch, desc=label, unit="batch", leave=False, disable=None
        ) as bar:
            while progress.batch < self.batches:
                stop_if_asked()
                start = time.perf_counter()
                images, labels = self._batch(order, progress.batch)
                images = self._augmented(images, progress.batch)
                loss = nn.functional.cross_entropy(self.model(images), labels)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self._add(float(loss.detach()), time.perf_counter() - start)
                bar.set_postfix(loss=f"{progress.loss / progress.batch:.3f}")
                bar.update()

    def _add(self, loss: float, seconds: float) -> None:
        progress, stats = self.progress, self.model.ode.stats
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise UserError(
                f"the loss is {loss} in epoch {progress.epoch + 1}: lower --lr (now {self.recipe.lr:g}) or --step-size"
            )
        assert stats is not None
        progress.batch += 1
        progress.loss += loss
        progress.nfe_forward += float(stats.nfe_forward.float().mean())
        progress.nfe_backward += float(stats.nfe_backward.float().mean())
        progress.seconds += seconds

    def _finish_epoch(self, order: Tensor) -> EpochMetrics:
        start = time.perf_counter()
        batches = min(self.batches, -(-CALIBRATION_IMAGES // self.recipe.batch_size))
        calibrate_batch_norm(self.model, (self._batch(order, i)[0] for i in range(batches)))
        middle = time.perf_counter()
        accuracy = float(
            (predict(self.model, self.data.test, self.device).argmax(1) == self.data.test.labels).float().mean()
        )
        done = self.progress
        metrics = EpochMetrics(
            epoch=done.epoch + 1,
            train_loss=done.loss / self.batches,
            test_accuracy=accuracy,
            seconds=done.seconds + middle - start,
            test_seconds=time.perf_counter() - middle,
            nfe_forward=done.nfe_forward / self.batches,
            nfe_backward=done.nfe_backward / self.batches,
        )
        self.progress = Progress(epoch=done.epoch + 1, history=[*done.history, metrics])
        return metrics


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, batches: Iterator[Tensor]) -> None:
    """Set the statistics of batch normalisation to their mean over ``batches``, for the weights as they now are.

    The usual moving average lags behind weights that change fast, by a lot after a few dozen steps (Wu & Johnson,
    *Rethinking "Batch" in BatchNorm*, arXiv:2105.07576, section 3).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean
    model.train()
    for images in batches:
        model(images)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


@torch.inference_mode()
def predict(model: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Logits of every image of a split, ``[n, classes]``, on the CPU."""
    model.eval()
    starts = range(0, len(split), TEST_BATCH_SIZE)
    bar = tqdm(starts, desc="testing", unit="batch", leave=False, delay=2, disable=None)
    return torch.cat([model(split.batch(slice(i, i + TEST_BATCH_SIZE), device)[0]).cpu() for i in bar])


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Within it, Ctrl-C makes the yielded function raise Interrupted; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def stop_if_asked() -> None:
        if asked:
            raise Interrupted

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, where no signal arrives
        yield stop_if_asked
        return
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)
