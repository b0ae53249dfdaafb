"""The folder of a run: checkpoints, metrics, pictures and logs, written so that a kill at any moment loses little."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nodeshape import __version__
from nodeshape._cli import picture
from nodeshape._files import PARTIAL, write_atomically
from nodeshape._training.checkpoint import load_checkpoint, save_checkpoint
from nodeshape._training.trainer import EpochMetrics, Trainer, predict

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: Within an epoch, last.pt is as old as this at most.
SAVE_SECONDS = 30.0


class RunFolder:
    """A run's files: config.json, metrics.jsonl, last.pt, best.pt, pictures and, if asked for, TensorBoard's log.

    Args:
        path: of the folder.
        config: what a checkpoint and config.json record of the run.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
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
        if self.config["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged after its checkpoint will be logged again.
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=trainer.steps + 1)

    def batch_done(self, trainer: Trainer, loss: float) -> None:
        """Save if that was long ago."""
        if self._tensorboard is not None:
            self._tensorboard.add_scalar("batch/loss", loss, trainer.steps)
            self._tensorboard.add_scalar("batch/learning_rate", trainer.schedule.get_last_lr()[0], trainer.steps)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save_last(trainer)

    def epoch_done(self, trainer: Trainer, metrics: EpochMetrics) -> None:
        """Record an epoch, print its line, and keep the model if none was more accurate."""
        history = trainer.progress.history
        if metrics.test_accuracy >= max(m.test_accuracy for m in history):
            save_checkpoint(
                self.path / "best.pt", {**self.config, "model": trainer.model.state_dict(), "epoch": metrics.epoch}
            )
        if self._tensorboard is not None:
            for name in ("train_loss", "test_accuracy", "seconds"):
                self._tensorboard.add_scalar(f"epoch/{name}", getattr(metrics, name), trainer.steps)
            self._tensorboard.flush()
        lines = "".join(json.dumps(asdict(m)) + "\n" for m in history)
        write_atomically(self.path / "metrics.jsonl", lines.encode())
        self.save_last(trainer)
        print(
            f"epoch {metrics.epoch}/{trainer.recipe.epochs}  loss {metrics.train_loss:.4f}  test accuracy"
            f" {100 * metrics.test_accuracy:6.2f}%  {metrics.seconds:.1f} s training"
            f", {metrics.test_seconds:.1f} s testing"
            f"  evaluations of f {metrics.nfe_forward:.1f} forward, {metrics.nfe_backward:.1f} backward",
            flush=True,
        )

    def save_last(self, trainer: Trainer) -> None:
        """Write the checkpoint that ``--resume`` continues from."""
        save_checkpoint(self.path / "last.pt", {**self.config, **trainer.state()})
        self._saved = time.monotonic()

    def finish(self, trainer: Trainer) -> None:
        """Say how good the best epoch's model is, draw its pictures, and say what to do next."""
        data = trainer.data
        best = load_checkpoint(self.path / "best.pt")
        trainer.model.load_state_dict(best["model"])
        probabilities = predict(trainer.model, data.test, trainer.device).softmax(dim=1)
        right = int((probabilities.argmax(dim=1) == data.test.labels).sum())
        score = f"{right} of {len(data.test)} test images right"
        if self._tensorboard is not None:
            self._tensorboard.close()
        print(f"best: {100 * right / len(data.test):.2f}% ({score}), epoch {best['epoch']}", flush=True)
        self._draw(trainer, probabilities, score)
        print(f"pictures and checkpoints are in {self.path}; export the best one with:")
        print(f"python -m nodeshape.export {shlex.quote(str(self.path / 'best.pt'))}")

    def _draw(self, trainer: Trainer, probabilities: Tensor, score: str) -> None:
        """Draw each picture of the finished run."""
        test, classes = trainer.data.test, trainer.data.classes
        what = self.config["task"] or Path(self.config["data"]).name
        title = f"{what}, {self.config['method']}, h={self.config['step_size']:g}"
        arguments: dict[str, tuple[Any, ...]] = {
            "learning_curve": (trainer.progress.history, title),
            "confusion_matrix": (test.labels, probabilities.argmax(dim=1), classes, f"{title}\n{score}"),
            "samples": (test.pixels, test.labels, probabilities, classes, f"{title}: {score}"),
        }
        for name, given in arguments.items():
            path = self.path / f"{name}.png"
            with picture(path):
                from nodeshape._training import plots  # matplotlib takes a second to import, and may lack what it needs

                getattr(plots, name)(*given, path)
