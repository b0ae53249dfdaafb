"""The folder of a run: checkpoints, metrics, pictures and logs, written so that a kill at any moment loses little."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nodeshape import __version__
from nodeshape._cli import picture
from nodeshape._data.datasets import Data
from nodeshape._errors import UserError
from nodeshape._files import PARTIAL, write_atomically
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
        """Create the folder with what a resumed run needs, before the first step."""
        self.path.mkdir(parents=True, exist_ok=True)
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
        if self._tensorboard is not None:
            self._tensorboard.flush()
        lines = "".join(json.dumps(asdict(epoch)) + "\n" for epoch in trainer.history)
        write_atomically(self.path / "metrics.jsonl", lines.encode())
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Write the checkpoint that ``--resume`` continues from."""
        save_checkpoint(self.path / "last.pt", {**self.config, **trainer.state()})
        self._saved = time.monotonic()

    def load_best(self) -> dict[str, Any]:
        """The checkpoint of the most accurate epoch."""
        return load_checkpoint(self.path / "best.pt")

    def finish(self, history: list[EpochMetrics], data: Data, probabilities: Tensor, score: str) -> None:
        """End the log and draw each picture of the finished run.

        Args:
            history: of all epochs.
            data: whose test images are shown.
            probabilities: of the test images by the best model, ``[images, classes]``.
            score: of the best model, in words.
        """
        if self._tensorboard is not None:
            self._tensorboard.close()
        settings, test = self.settings, data.test
        title = f"{settings.subject}, {settings.method}, h={settings.step_size:g}"
        arguments: dict[str, tuple[Any, ...]] = {
            "learning_curve": (history, title),
            "confusion_matrix": (test.labels, probabilities.argmax(dim=1), data.classes, f"{title}\n{score}"),
            "samples": (test.pixels, test.labels, probabilities, data.classes, f"{title}: {score}"),
        }
        for name, given in arguments.items():
            path = self.path / f"{name}.png"
            with picture(path):
                from nodeshape._training import plots  # matplotlib takes a second to import, and may lack what it needs

                getattr(plots, name)(*given, path)

    def _log(self, prefix: str, step: int, **values: float) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)


def free_folder(settings: RunSettings) -> Path:
    """The first of runs/NAME, runs/NAME-2, … that is not taken."""
    name = f"{settings.subject}-{settings.method}"
    number = 1
    while (path := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def check_new(out: Path) -> None:
    """Refuse, before any work, a run folder that cannot be made or would hide what is there."""
    if (out / "last.pt").exists():
        raise UserError(f"{out}: already holds a run; add --resume to continue it, or choose another --out")
    if out.is_dir() and set(out.iterdir()) - set(out.glob(PARTIAL)):
        raise UserError(f"{out}: is a folder with other files; choose a new one with --out")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above}: is a file; choose a folder with --out")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above}: may not be written; choose another folder with --out")


def latest_folder() -> Path:
    """The run folder in runs/ that was written last."""
    runs = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"--resume: no run in {RUNS}/; name one with --out")
    return runs[-1].parent
