"""One call of ``python -m nodeshape.train``: from its settings to the last line that it prints."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nodeshape._cli import cores, say, shell_word, user_input
from nodeshape._data.datasets import DRAWN_TEST_SIZE, DRAWN_TRAIN_SIZE, Data, drawn_data, folder_data
from nodeshape._data.images import CHANNELS
from nodeshape._data.streaming import StreamedSplit
from nodeshape._errors import ReversalDriftError, StageSolveError, StepSizeError, UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.backend import backend
from nodeshape._training.checkpoint import load_checkpoint, start_from
from nodeshape._training.evaluate import predict
from nodeshape._training.processes import Processes, is_lost_contact
from nodeshape._training.run_folder import RUNS, RunFolder, check_new, check_outside, held, latest_folder, new_folder
from nodeshape._training.settings import RunSettings
from nodeshape._training.trainer import Diverged, EpochDone, EpochMetrics, Stopped, Trainer


def train(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Train as the command line says, as one process or as one of those that torchrun started.

    Of several processes only the first is heard, from the parsing of the arguments on.
    """
    processes = Processes.from_environment()
    with open(os.devnull, "w") as nowhere, ExitStack() as silence:
        if processes.count > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends what another process's end left waiting
        if not processes.first:
            silence.enter_context(redirect_stdout(nowhere))
        hold = silence.enter_context(ExitStack())
        try:
            with ExitStack() as startup:
                if not processes.first:
                    startup.enter_context(redirect_stderr(nowhere))
                trainer, folder = _prepare(vars(parser.parse_args(argv)), processes, hold)
        except UserError:
            processes.let_the_first_speak()
            raise
        _train(trainer, folder)


def _prepare(given: dict[str, Any], processes: Processes, hold: ExitStack) -> tuple[Trainer, RunFolder]:
    """The trainer that the arguments describe, at its start or where its run was left, and its run folder.

    Process 0 keeps the folder from other runs until ``hold`` is left.
    """
    out, resume = given.pop("out", None), given.pop("resume", False)
    state = None
    if resume:
        out = latest_folder() if out is None else out
        if processes.first and out.is_dir():
            hold.enter_context(held(out))
        state = load_checkpoint(out / "last.pt")
        settings = RunSettings.from_checkpoint(state, given, out / "last.pt")
        if settings.data is not None and not Path(settings.data).exists():
            raise UserError(f"{settings.data}: no such folder; if it has moved, say where to by --data")
    else:
        settings = RunSettings.from_args(given)
        if processes.first and out is not None:
            check_new(out)
    if settings.data is not None:
        check_outside(out if out is not None else RUNS, Path(settings.data))
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    device = _device(settings.device, processes)
    if settings.amp and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"--amp: {torch.cuda.get_device_name(device)} has no bfloat16; leave it out")
    with user_input():
        data = _load(settings, processes)
    fingerprint = data.fingerprint()
    torch.manual_seed(settings.seed)
    architecture: dict[str, Any] = {
        "num_classes": len(data.classes),
        "image_size": settings.image_size,
        "in_channels": CHANNELS[settings.channels],
        "method": settings.method,
        "step_size": settings.step_size,
        "adjoint": settings.adjoint,
    }
    with user_input():
        model = ShapeClassifier(**architecture)
    if settings.init is not None and state is None:
        say(start_from(Path(settings.init), model, data.classes))
    model = model.to(device, getattr(torch, settings.dtype))
    if processes.first and not resume:
        out = hold.enter_context(new_folder(settings, out))
    processes.connect(device)
    out = processes.of_the_first(out)
    trainer = Trainer(model, data, settings.training_recipe(), device, processes)
    if state is not None:
        if state.get("fingerprint") != fingerprint:
            images = "the drawn images" if settings.data is None else f"{settings.data}: its images"
            raise UserError(f"{images} have changed since the run began; bring them back, or start a new run")
        try:
            trainer.restore(state)
        except Exception as error:  # the file may hold anything
            raise UserError(
                f"{out / 'last.pt'}: its training state is damaged or another run's; start a new run"
            ) from error
    assert out is not None
    _announce(out, settings, trainer)
    made_of = {"architecture": architecture, "classes": data.classes, "fingerprint": fingerprint}
    return trainer, RunFolder(out, settings, made_of)


def _train(trainer: Trainer, folder: RunFolder) -> None:
    """Train to the end, or to where the user stops; process 0 writes the folder."""
    processes = trainer.processes
    resume = f"{processes.launcher} -m nodeshape.train --resume --out {shell_word(folder.path)}"
    try:
        if processes.first:
            folder.begin(trainer)
        for event in trainer.train():
            if processes.first:
                folder.record(event, trainer)
            match event:
                case EpochDone(metrics=metrics):
                    say(_line(metrics, trainer.recipe.epochs))
                case Stopped(interrupted=False):
                    say(f"stopped early: no better test accuracy in {trainer.recipe.patience} epochs")
                case Stopped():
                    done = f"after {trainer.progress.batch} of {trainer.batches} batches"
                    say(f"interrupted in epoch {trainer.progress.epoch + 1} {done}; continue with:")
                    say(resume)
                    processes.wait()  # the end of any process makes torchrun end the others
                    sys.exit(130)
        unreadable = _unreadable(trainer)
    except (StageSolveError, StepSizeError, ReversalDriftError) as error:
        if processes.first:
            folder.save_last(trainer)
        raise UserError(str(error)) from error
    except Diverged:
        processes.let_the_first_speak()
        raise
    except UserError as error:  # images that are read while training and no longer can be
        if processes.first:
            folder.save_last(trainer)
        processes.let_the_first_speak(10)
        raise UserError(f"{error}; what was trained is saved; continue with: {resume}") from error
    except OSError as error:  # a full disk
        if error.strerror is None or not folder.last.exists():
            raise
        raise UserError(
            f"{error.filename or folder.path}: {error.strerror}; {folder.last} is kept; continue with: {resume}"
        ) from error
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise UserError(
            f"process {processes.rank} of {processes.count} lost contact with the others: one of them ended or was"
            f" killed; continue with: {resume}"
        ) from error
    processes.disconnect()
    if processes.first:
        if unreadable:
            say(f"unreadable files passed over: {len(unreadable)}", error=True)
        _finish(trainer, folder)


def _finish(trainer: Trainer, folder: RunFolder) -> None:
    """Say how good the best epoch's model is, draw its pictures, and say what to do next."""
    test = trainer.data.test
    best = max(trainer.history, key=lambda metrics: (metrics.test_accuracy, metrics.epoch))
    score = f"{round(best.test_accuracy * len(test))} of {len(test)} test images right"
    say(f"best: {100 * best.test_accuracy:.2f}% ({score}), epoch {best.epoch}")

    def probabilities() -> Tensor:
        trainer.model.load_state_dict(folder.load_best()["model"])
        return predict(trainer.model, test, trainer.device).softmax(dim=1)

    folder.finish(trainer.history, trainer.data, probabilities, score)
    say(f"pictures and checkpoints are in {folder.path}; export the best one with:")
    say(f"python -m nodeshape.export {shell_word(folder.path / 'best.pt')}")


def _load(settings: RunSettings, processes: Processes) -> Data:
    image_size, channels, seed = settings.image_size, settings.channels, settings.seed
    train_size, test_size = settings.train_size, settings.test_size
    if settings.task is not None:
        train_size, test_size = train_size or DRAWN_TRAIN_SIZE, test_size or DRAWN_TEST_SIZE
        say(f"drawing {train_size} training and {test_size} test images")
        return drawn_data(settings.task, train_size, test_size, image_size, channels, seed)
    readers = max(1, cores() // processes.local_count)  # processes of one machine share its cores
    root, strict, stream = Path(settings.data or ""), settings.strict, settings.stream
    data = folder_data(root, train_size, test_size, image_size, channels, seed, strict, stream, readers)
    for line in data.left_out[:20]:
        say(line, error=True)
    if len(data.left_out) > 20:
        say(f"and {len(data.left_out) - 20} more lines of what is left out", error=True)
    for error in data.unreadable[:10]:
        say(f"skipped {error}", error=True)
    if data.unreadable:
        say(f"skipped {len(data.unreadable)} unreadable files", error=True)
    return data


def _unreadable(trainer: Trainer) -> set[Path]:
    """Files that some process passed over while training or testing."""
    splits = trainer.data.train, trainer.data.test
    own = {path for split in splits if isinstance(split, StreamedSplit) for path in split.unreadable}
    return trainer.processes.union(own)


def _announce(out: Path, settings: RunSettings, trainer: Trainer) -> None:
    data, processes = trainer.data, trainer.processes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    streamed = ", streamed from disk" if isinstance(data.train, StreamedSplit) else ""
    say(
        f"{len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes"
        f" ({', '.join(data.classes[:8])}{', …' if len(data.classes) > 8 else ''}){streamed}"
    )
    say(
        f"{parameters:,} parameters, {settings.method} with h={settings.step_size:g}, gradient {settings.adjoint},"
        f" on {trainer.device}{f', {processes.count} processes' if processes.count > 1 else ''}; run folder {out}",
    )
    state = torch.zeros(1, trainer.model.width, 8, 8, dtype=trainer.dtype, device=trainer.device)
    solver: dict[str, Any] = {key: getattr(settings, key) for key in ("method", "step_size", "adjoint")}
    path = backend(trainer.model.ode.dynamics, state, **solver)
    if path.name == "plain":
        say(f"the ODE is solved by the plain loop, which is slow: {path.reason}")
    if trainer.finished:
        say("this run is finished; drawing its pictures again")
    elif trainer.steps:
        say(f"resuming in epoch {trainer.progress.epoch + 1} after batch {trainer.progress.batch}")


def _line(metrics: EpochMetrics, epochs: int) -> str:
    return (
        f"epoch {metrics.epoch}/{epochs}  loss {metrics.train_loss:.4f}  test accuracy"
        f" {100 * metrics.test_accuracy:6.2f}%  {metrics.seconds:.1f} s training, {metrics.test_seconds:.1f} s testing"
        f"  evaluations of f {metrics.nfe_forward:.1f} forward, {metrics.nfe_backward:.1f} backward"
    )


def _device(name: str, processes: Processes) -> torch.device:
    """The device of this process for a ``--device``."""
    own = f"cuda:{processes.local_rank}" if processes.count > 1 else "cuda"
    if name == "auto":
        return torch.device(own if torch.cuda.device_count() >= processes.local_count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    _, colon, number = name.partition(":")
    if colon and processes.count > 1:
        raise UserError(f"--device {name}: {processes.count} processes need a GPU each; give --device cuda")
    if (int(number) + 1 if colon else processes.local_count) > torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return torch.device(f"cuda:{int(number)}" if colon else own)
