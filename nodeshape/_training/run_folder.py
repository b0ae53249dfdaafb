"""The folder of a run: checkpoints, metrics, pictures and logs, written so that a kill at any moment loses little."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nodeshape import __version__
from nodeshape._cli import picture, say
from nodeshape._data.datasets import Data
from nodeshape._errors import UserError
from nodeshape._files import PARTIAL, locked, write_atomically
from nodeshape._training.checkpoint import load_checkpoint, save_checkpoint
from nodeshape._training.settings import RunSettings
from nodeshape._training.trainer import BatchDone, EpochDone, EpochMetrics, Event, Stopped, Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RUNS = Path("runs")
#: Within an epoch, last.pt is as old as this at most.
SAVE_SECONDS = 30.0


class RunFolder:
    """A run's files: config.json, metrics.jsonl, last.pt, best.pt, pictures and, if asked for, TensorBoard's log.

    Of a trainer it takes ``state()``, ``history`` and ``steps``, and nothing else.

    Args:
        path: of the folder.
        settings: of the run.
        made_of: what checkpoints and config.json say beyond the settings: architecture, classes, fingerprint.
    """

    def __init__(self, path: Path, settings: RunSettings, made_of: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.config = {**made_of, **asdict(settings)}
        self._tensorboard: SummaryWriter | None = None
        self._saved = 0.0

    def begin(self, trainer: Trainer) -> None:
        """Put what a resumed run needs into the folder, before the first step."""
        for left in self.path.glob(PARTIAL):
            if not left.is_dir():  # a folder is an export's, which may be under way
                left.unlink()
        if trainer.steps == 0:
            self.save_last(trainer)
        config = {**self.config, "nodeshape_version": __version__, "torch_version": str(torch.__version__)}
        write_atomically(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        if self.settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged after its checkpoint will be logged again.
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=trainer.steps + 1)

    def record(self, event: Event, trainer: Trainer) -> None:
        """Write what has changed by ``event``, the trainer's last."""
        match event:
            case BatchDone():
                self._log("batch", event.step, loss=event.loss, learning_rate=event.learning_rate)
                if time.monotonic() - self._saved >= SAVE_SECONDS:
                    self.save_last(trainer)
            case EpochDone():
                self._epoch_done(event, trainer)
            case Stopped(interrupted=True):
                self.save_last(trainer)

    def _epoch_done(self, event: EpochDone, trainer: Trainer) -> None:
        metrics = event.metrics
        if event.model_is_best:
            best = {**self.config, "model": trainer.state()["model"], "epoch": metrics.epoch}
            save_checkpoint(self.path / "best.pt", best)
        self._log(
            "epoch",
            event.step,
            train_loss=metrics.train_loss,
            test_accuracy=metrics.test_accuracy,
            seconds=metrics.seconds,
        )
        self._to_tensorboard(lambda log: log.flush())
        lines = "".join(json.dumps(asdict(epoch)) + "\n" for epoch in trainer.history)
        write_atomically(self.path / "metrics.jsonl", lines.encode())
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Write the checkpoint that ``--resume`` continues from."""
        save_checkpoint(self.last, {**self.config, **trainer.state()})
        self._saved = time.monotonic()

    @property
    def last(self) -> Path:
        """The checkpoint that ``--resume`` continues from."""
        return self.path / "last.pt"

    def load_best(self) -> dict[str, Any]:
        """The checkpoint of the most accurate epoch."""
        return load_checkpoint(self.path / "best.pt")

    def finish(self, history: list[EpochMetrics], data: Data, predict: Callable[[], Tensor], score: str) -> None:
        """End the log and draw each picture of the finished run; one that fails is a line, whatever failed.

        Args:
            history: of all epochs.
            data: whose test images are shown.
            predict: gives the probabilities of the test images by the best model, ``[images, classes]``.
            score: of the best model, in words.
        """
        self._to_tensorboard(lambda log: log.close())
        settings, test = self.settings, data.test
        title = f"{settings.subject}, {settings.method}, h={settings.step_size:g}"
        probabilities = cache(predict)
        arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
            "learning_curve": lambda: (history, title),
            "confusion_matrix": lambda: (
                test.labels,
                probabilities().argmax(dim=1),
                data.classes,
                title,
                score,
            ),
            "samples": lambda: (test.pixels, test.labels, probabilities(), data.classes, title, score),
        }
        for name, given in arguments.items():
            path = self.path / f"{name}.png"
            with picture(path):
                from nodeshape._training import plots  # matplotlib takes a second to import, and may lack what it needs

                getattr(plots, name)(*given(), path)

    def _log(self, prefix: str, step: int, **values: float) -> None:
        def add(log: SummaryWriter) -> None:
            for name, value in values.items():
                log.add_scalar(f"{prefix}/{name}", value, step)

        self._to_tensorboard(add)

    def _to_tensorboard(self, act: Callable[[SummaryWriter], object]) -> None:
        """Act on TensorBoard's log; a log that fails is one line, and the run goes on without it."""
        if self._tensorboard is None:
            return
        try:
            act(self._tensorboard)
        except Exception as error:  # a full disk, raised by a thread of tensorboard's, whatever it raises
            self._tensorboard = None
            say(f"{self.path / 'tensorboard'} is no longer written: {error}", error=True)


def check_new(out: Path) -> None:
    """Refuse, before any work, a run folder that cannot be made or would hide what is there."""
    if (out / "last.pt").exists():
        raise UserError(f"{out}: already holds a run; add --resume to continue it, or choose another --out")
    if out.is_dir() and not _is_empty(out):
        raise UserError(f"{out}: is a folder with other files; choose a new one with --out")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above}: is a file; choose a folder with --out")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above}: may not be written; choose another folder with --out")


def check_outside(out: Path, data: Path) -> None:
    """Refuse a run folder that would be taken for a class, or an image of one, by the next scan of ``data``."""
    scanned = (data / "train", data / "test") if (data / "train").is_dir() else (data,)
    for folder in scanned:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{out}: lies in {folder}, where it would become a class; name a folder outside with --out")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder within.

    Raises:
        UserError: another process trains there.
    """
    with locked(out) as mine:
        if mine is False:
            raise UserError(f"{out}: another process is training there; let it end, or name another folder with --out")
        if mine is None:
            say(f"{out}: its disk has no locks, so let no other training write there", error=True)
        yield


@contextmanager
def new_folder(settings: RunSettings, out: Path | None) -> Iterator[Path]:
    """A new folder for a run, ``out`` or the first of runs/NAME, runs/NAME-2, … that is not taken, held within.

    Raises:
        UserError: ``out`` is taken.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with held(out):
            check_new(out)
            yield out
        return
    name = f"{settings.subject}-{settings.method}"
    for number in count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file
            continue
        with ExitStack() as lock:
            try:
                lock.enter_context(held(path))
            except UserError:
                continue
            if _is_empty(path):
                yield path
                return


def _is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what a kill left half written."""
    return not set(folder.iterdir()) - set(folder.glob(PARTIAL))


def latest_folder() -> Path:
    """The run folder in runs/ that was written last."""
    runs = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"--resume: no run in {RUNS}/; name one with --out")
    return runs[-1].parent
