"""The training loop: AdamW, cross-entropy and a one-cycle rate, resumable at any batch with identical results.

Everything random is a function of (seed, epoch), so a checkpoint needs no random state. What is drawn for an image must
be a function of (seed, epoch, image) too, so that it does not depend on which process takes the image.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nodeshape._data.augment import apply_maps, random_maps
from nodeshape._data.datasets import Data
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training.evaluate import CALIBRATION_IMAGES, TEST_BATCH_SIZE, calibrate_batch_norm, classify
from nodeshape._training.processes import Processes
from nodeshape._training.recipe import Recipe, balanced

#: A batch of fewer images than the batch size divided by this counts as one of so many: its few images would otherwise
#: make a whole step. It leaves the report's last batches, of 60, 30 and 20 in 120, as they are.
SMALLEST_SHARE = 6
#: A terminal closes; None where there is no such signal.
HANGUP = getattr(signal, "SIGHUP", None)
#: The learning rate starts at its peak divided by this.
WARM_UP_FROM = 10


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        train_loss: mean cross-entropy over the epoch's images.
        test_accuracy: share of test images classified rightly, in [0, 1].
        seconds, test_seconds: wall-clock time of training and of testing.
        nfe_forward, nfe_backward: evaluations of f per image, mean over the epoch.
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
    """Where training stands: complete epochs, batches into the next one, and that one's sums over its images."""

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    nfe_forward: float = 0.0
    nfe_backward: float = 0.0
    seconds: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)


@dataclass(frozen=True)
class BatchDone:
    """One batch has been trained on.

    Attributes:
        step: batches so far, over all epochs.
        loss: mean over the batch's images.
        learning_rate: of the next batch.
    """

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class EpochDone:
    """All images have been trained on once more, and the model tested.

    Attributes:
        step: batches so far, over all epochs.
        metrics: of this epoch.
        model_is_best: no epoch before was more accurate.
    """

    step: int
    metrics: EpochMetrics
    model_is_best: bool


@dataclass(frozen=True)
class Stopped:
    """Training ends here, before its last epoch; no event follows.

    Attributes:
        interrupted: by Ctrl-C, SIGTERM or SIGHUP, after a whole batch; else the recipe's ``patience`` is over.
    """

    interrupted: bool


Event = BatchDone | EpochDone | Stopped


class Diverged(UserError):
    """The loss is no longer finite; raised in all processes at once."""


class Trainer:
    """A classifier in training on ``data``: ``for event in trainer.train(): ...``.

    Args:
        model: on ``device``, float32 or float64; several processes replace its batch normalisation by one they share.
        data: its images stay where they are; batches move to ``device``.
        processes: among which every batch is shared.

    Attributes:
        batches: per epoch.
        progress: where training stands.
    """

    def __init__(
        self,
        model: ShapeClassifier,
        data: Data,
        recipe: Recipe,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008 (it is immutable)
    ) -> None:
        self.model, self.data, self.recipe, self.device, self.processes = model, data, recipe, device, processes
        self.dtype = next(model.parameters()).dtype
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
        self._parallel = processes.parallel(model)
        self._class_weights = None
        if recipe.class_weights == "balanced":
            self._class_weights = balanced(data.train.labels, len(data.classes)).to(device, self.dtype)

    @property
    def steps(self) -> int:
        """Batches trained on so far."""
        return self.progress.epoch * self.batches + self.progress.batch

    @property
    def history(self) -> list[EpochMetrics]:
        """Metrics of the epochs done."""
        return self.progress.history

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.epoch >= self.recipe.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the last ``patience`` epochs were no better than one before them."""
        accuracies = [m.test_accuracy for m in self.history]
        if self.recipe.patience is None or not accuracies:
            return False
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= self.recipe.patience

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, as plain values and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; anything else raises one error or another."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._restore_schedule(state["schedule"])
        progress = dict(state["progress"])
        history = [EpochMetrics(**metrics) for metrics in progress.pop("history")]
        self.progress = Progress(**progress, history=history)
        if not (0 <= self.progress.epoch <= self.recipe.epochs and 0 <= self.progress.batch <= self.batches):
            raise ValueError(f"no such place in training: {self.progress}")

    def _restore_schedule(self, state: dict[str, Any]) -> None:
        """Take a schedule's place; where it was planned for fewer epochs, on the schedule of all of them now."""
        whole = self.schedule.state_dict()
        self.schedule.load_state_dict(state)
        if self.schedule.total_steps != whole["total_steps"]:
            done = self.schedule.last_epoch
            # Its count of steps is there for a warning alone, of a first step before any of the optimiser's.
            self.schedule.load_state_dict({**whole, "last_epoch": done - 1, "_step_count": done + 2})
            self.schedule.step()

    def train(self) -> Generator[Event, None, None]:
        """Train the remaining epochs, yielding what happens; :meth:`state` may be taken at every event.

        All processes see the same events. From the first one until the generator ends or is closed, Ctrl-C, SIGTERM
        and SIGHUP let the batch at hand be finished and then stop training, in all processes; a second Ctrl-C or
        SIGTERM interrupts at once.

        Raises:
            Diverged: the loss is no longer finite.
        """
        with _interruptible() as asked_to_stop:
            while not self.finished:
                order = self._order()
                interrupted = yield from self._train_epoch(order, asked_to_stop)
                if interrupted:
                    yield Stopped(interrupted=True)
                    return
                metrics = self._finish_epoch(order)
                best = max(m.test_accuracy for m in self.history)
                yield EpochDone(self.steps, metrics, model_is_best=metrics.test_accuracy >= best)
            if self.stopped_early:
                yield Stopped(interrupted=False)

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.recipe.seed * 100_003 + self.progress.epoch)
        return torch.randperm(len(self.data.train), generator=generator)

    def _augmented(self, images: Tensor, count: int, batch: int) -> Tensor:
        """This process's share of a batch of ``count``, changed by random numbers that seed, epoch and batch decide."""
        if self.recipe.augment == "none":
            return images
        words = np.random.SeedSequence((self.recipe.seed, self.progress.epoch, batch)).generate_state(1)
        maps = random_maps(self.recipe.augment, count, torch.Generator().manual_seed(int(words[0])))
        return apply_maps(images, self.processes.share(maps))

    def _train_epoch(self, order: Tensor, asked_to_stop: Callable[[], bool]) -> Generator[BatchDone, None, bool]:
        """Train on the epoch's batches that are left; return whether training is to stop after one of them."""
        progress = self.progress
        self.model.train()
        whole = order.split(self.recipe.batch_size)[progress.batch :]
        own = map(self.processes.share, whole)
        start = time.perf_counter()
        with (
            closing(self.data.train.batches(own, self.device)) as batches,
            self._bar(f"epoch {progress.epoch + 1}/{self.recipe.epochs}", self.batches, progress.batch) as bar,
        ):
            for index, (images, labels) in zip(whole, batches):
                images = self._augmented(images, len(index), progress.batch)
                loss = self._step(images, labels, len(index))
                now = time.perf_counter()
                mean_loss, stop = self._add(loss, len(index), now - start, asked_to_stop())
                start = now
                seen = min(progress.batch * self.recipe.batch_size, len(order))
                bar.set_postfix(loss=f"{progress.loss / seen:.3f}")
                bar.update()
                yield BatchDone(self.steps, mean_loss, float(self.schedule.get_last_lr()[0]))
                if stop:
                    return True
        return False

    def _step(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        """One step of the optimiser with this process's share of a batch of ``count``; its sum of losses."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
            logits = self._parallel(images.to(self.dtype))
        loss = nn.functional.cross_entropy(logits.to(self.dtype), labels, self._class_weights, reduction="sum")
        mean = loss / max(count, self.recipe.batch_size / SMALLEST_SHARE)
        self.optimizer.zero_grad(set_to_none=True)
        (mean * self.processes.count).backward()  # the mean of gradients over the processes is now their sum
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _add(self, loss: Tensor, count: int, seconds: float, asked_to_stop: bool) -> tuple[float, bool]:
        """Count a batch in; its mean loss, and whether any process was asked to stop."""
        progress, stats = self.progress, self.model.ode.stats
        assert stats is not None
        own = [float(loss), float(stats.nfe_forward.sum()), float(stats.nfe_backward.sum()), float(asked_to_stop)]
        total, forward, backward, stop = self.processes.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        if not math.isfinite(total):
            raise Diverged(
                f"the loss is {total} in epoch {progress.epoch + 1}: lower --lr (now {self.recipe.lr:g}) or --step-size"
            )
        progress.batch += 1
        progress.loss += total
        progress.nfe_forward += forward
        progress.nfe_backward += backward
        progress.seconds += seconds
        return total / count, stop > 0

    def _finish_epoch(self, order: Tensor) -> EpochMetrics:
        start = time.perf_counter()
        some = map(self.processes.share, order[:CALIBRATION_IMAGES].split(self.recipe.batch_size))
        with closing(self.data.train.batches(some, self.device)) as batches:
            calibrate_batch_norm(self.model, (images.to(self.dtype) for images, _ in batches))
        middle = time.perf_counter()
        accuracy = self._test()
        done, images = self.progress, len(order)
        metrics = EpochMetrics(
            epoch=done.epoch + 1,
            train_loss=done.loss / images,
            test_accuracy=accuracy,
            seconds=done.seconds + middle - start,
            test_seconds=time.perf_counter() - middle,
            nfe_forward=done.nfe_forward / images,
            nfe_backward=done.nfe_backward / images,
        )
        self.progress = Progress(epoch=done.epoch + 1, history=[*done.history, metrics])
        return metrics

    def _test(self) -> float:
        """The share of test images classified rightly; every process classifies some of them."""
        test = self.data.test
        indices = torch.arange(len(test)).split(TEST_BATCH_SIZE)[self.processes.rank :: self.processes.count]
        right = torch.zeros((), dtype=torch.float64)
        for logits, index in zip(classify(self.model, test, indices, self.device, self.processes.first), indices):
            right += (logits.argmax(1) == test.labels[index]).sum()
        return float(self.processes.sum(right)) / len(test)

    def _bar(self, label: str, total: int, initial: int) -> Any:
        hidden = None if self.processes.first else True
        return tqdm(total=total, initial=initial, desc=label, unit="batch", leave=False, disable=hidden)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C, SIGTERM or SIGHUP makes the yielded function true; a second Ctrl-C or SIGTERM interrupts.

    A terminal that closes may send SIGHUP several times, and other signals with it. Signals that are ignored stay so,
    as SIGHUP is under nohup.
    """
    asked: set[int] = set()

    def ask(signum: int, frame: Any) -> None:
        if signum != HANGUP and asked - {HANGUP}:
            raise KeyboardInterrupt
        asked.add(signum)

    kinds = [
        kind
        for kind in (signal.SIGINT, signal.SIGTERM, HANGUP)
        if kind is not None and signal.getsignal(kind) is not signal.SIG_IGN
    ]
    try:
        before = [signal.signal(kind, ask) for kind in kinds]
    except ValueError:  # not in the main thread, where no signal arrives
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
