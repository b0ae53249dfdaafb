"""Let every operation with which a command changes files fail once, or kill the process there; look at what is left.

``python tests/faults/sweep.py train export data [--stride K]`` takes, for each command, every K-th of its operations,
three times: it fails as on a full disk, it and all after it do, and the process is killed there (kill -9), in a write
when half is written. What then holds:

- the command ends with exit code 0, or with 2 and one line, never with a traceback;
- nothing that was there before is lost: the earlier export is whole, or the new one is; a folder of images is whole or
  not there;
- the same command, or --resume, then ends well, with the same weights as a run that nothing happened to, and leaves
  nothing half written.

Operations are counted and failed by faults.c, preloaded; each trial is a forked process: torch is imported once.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMALL = ["--train-size", "20", "--test-size", "10", "--batch-size", "10", "--step-size", "0.5", "--epochs", "2"]
SMALL += ["--image-size", "16", "--device", "cpu"]
#: What an operation does: its errno (0: kill), and whether all after it do the same.
KINDS = {"fails": (errno.ENOSPC, False), "all fail": (errno.ENOSPC, True), "killed": (0, False)}


class Train:
    """A new run of two epochs that saves after every batch."""

    def prepare(self, folder: Path) -> None:
        """Nothing is there."""

    def command(self, folder: Path) -> None:
        from nodeshape import train
        from nodeshape._training import run_folder

        run_folder.SAVE_SECONDS = 0.0
        resume = (folder / "run" / "last.pt").exists()
        train.main([*(["--resume"] if resume else SMALL), "--out", str(folder / "run")])

    def kept(self, folder: Path) -> None:
        from nodeshape._training.checkpoint import load_classifier

        for path in folder.glob("run/*.pt"):
            load_classifier(path)

    def result(self, folder: Path) -> Any:
        import torch

        assert not list(folder.glob("run/.*")), "something half written is left"
        assert {"learning_curve.png", "confusion_matrix.png", "samples.png"} <= set(os.listdir(folder / "run"))
        state = torch.load(folder / "run" / "last.pt", weights_only=True)
        return {name: value.double().sum().item().hex() for name, value in state["model"].items()}


class Export:
    """An export in the place of an earlier one."""

    def prepare(self, folder: Path) -> None:
        from nodeshape import export, train

        train.main([*SMALL, "--epochs", "1", "--out", str(folder)])
        export.main([str(folder / "best.pt")])

    def command(self, folder: Path) -> None:
        from nodeshape import export
        from nodeshape._exporting import verify

        verify.IMAGES = 20
        export.main([str(folder / "best.pt"), "--steps", "3"])

    def kept(self, folder: Path) -> None:
        report = json.loads((folder / "export" / "report.json").read_text())
        assert set(os.listdir(folder / "export")) == {"model.onnx", "model.ts", "report.json", "example.png"}
        assert report["steps"] in (2, 3)
        for name, figures in report["files"].items():
            assert (folder / "export" / name).stat().st_size == figures["bytes"], "files of two exports"

    def result(self, folder: Path) -> Any:
        self.kept(folder)
        assert not list(folder.glob(".*")), "something half written is left"
        return json.loads((folder / "export" / "report.json").read_text())["steps"]


class Data:
    """Drawn images in a new folder."""

    def prepare(self, folder: Path) -> None:
        """Nothing is there."""

    def command(self, folder: Path) -> None:
        from nodeshape import data

        if not (folder / "images").is_dir() or not self._classes(folder):
            data.main(["--count", "9", "--out", str(folder / "images")])

    def kept(self, folder: Path) -> None:
        if self._classes(folder):
            assert len(list(folder.glob("images/*/*.png"))) == 9

    def result(self, folder: Path) -> Any:
        assert not list(folder.glob(".*")) + list(folder.glob("images/.*")), "something half written is left"
        return sorted(str(path.relative_to(folder)) for path in folder.glob("images/*/*.png"))

    def _classes(self, folder: Path) -> list[Path]:
        return list(folder.glob("images/[!.]*"))


class DataHere(Data):
    """Drawn images in an empty folder that was there before, and that stays the same one."""

    def prepare(self, folder: Path) -> None:
        (folder / "images").mkdir()

    def command(self, folder: Path) -> None:
        from nodeshape import data
        from nodeshape._errors import UserError

        try:
            data.main(["--count", "9", "--out", str(folder / "images")])
        except UserError as error:
            if "all there now" not in str(error) and "is not empty" not in str(error):
                raise

    def kept(self, folder: Path) -> None:
        if self._classes(folder) and not (folder / "images" / ".images.drawn").exists():
            super().kept(folder)


COMMANDS: dict[str, Callable[[], Any]] = {"train": Train, "export": Export, "data": Data, "data-here": DataHere}


def forked(act: Callable[[], object], log: Path) -> int:
    """The exit code, or minus the signal, of a process that acts; what it prints goes to ``log``."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(to, 1), os.dup2(to, 2)
            act()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def sweep(name: str, stride: int) -> int:
    """Try a command's operations; say how many trials there were, and fail with what went wrong in one."""
    from nodeshape import _cli

    scenario, faults = COMMANDS[name](), ctypes.CDLL(None)
    with tempfile.TemporaryDirectory() as home:
        at, log, note = Path(home).resolve(), Path(home, "log"), Path(home, "note")

        def commanded(folder: Path, number: int, error: int, lasting: bool) -> None:
            def main() -> None:
                faults.faults_arm(os.fsencode(folder), ctypes.c_long(number), error, lasting)
                try:
                    scenario.command(folder)
                finally:
                    count = faults.faults_count()
                    faults.faults_arm(b"", ctypes.c_long(0), 0, False)
                    note.write_text(str(count))

            _cli.run(main)

        def stopped(trial: str, folder: Path) -> None:
            print(log.read_text(), *sorted(folder.rglob("*")), sep="\n")
            sys.exit(f"{name}, {trial}")

        def checked(trial: str, folder: Path, act: Callable[[], object], expected: tuple[int, ...] = (0,)) -> str:
            log.unlink(missing_ok=True)
            code = forked(act, log)
            said = log.read_text()
            if code not in expected or "Traceback" in said or (code == 2) != (said.count("error: ") == 1):
                stopped(f"{trial}: exit code {code}", folder)
            return said

        before = at / "before"
        before.mkdir()
        checked("preparing", before, lambda: scenario.prepare(before))
        whole = shutil.copytree(before, at / "whole", symlinks=True)
        checked("nothing fails", whole, lambda: commanded(whole, 0, 0, False))
        count = int(note.read_text())
        expected = checked("result", whole, lambda: print(scenario.result(whole)))
        trials = 0
        for kind, (error, lasting) in KINDS.items():
            for number in range(1, count + 1, stride):
                trial, folder = f"operation {number} of {count} {kind}", shutil.copytree(before, at / "trial")
                ends = (-signal.SIGKILL,) if kind == "killed" else (0, 2)
                checked(trial, folder, lambda: commanded(folder, number, error, lasting), ends)  # noqa: B023
                checked(f"{trial}, kept", folder, lambda: scenario.kept(folder))  # noqa: B023
                checked(f"{trial}, again", folder, lambda: commanded(folder, 0, 0, False))  # noqa: B023
                found = checked(f"{trial}, result", folder, lambda: print(scenario.result(folder)))  # noqa: B023
                if found != expected:
                    stopped(f"{trial}: the result is another", folder)
                shutil.rmtree(folder)
                trials += 1
        print(f"{name}: {count} operations, {trials} trials, all well", flush=True)
    return trials


def main() -> None:
    """Compile and preload faults.c, then sweep the commands that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=list(COMMANDS))
    parser.add_argument("--stride", type=int, default=1, help="take every so many-th operation")
    args = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as home:
            library = f"{home}/libfaults.so"
            compiler = os.environ.get("CC", "cc")
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-O2", str(HERE / "faults.c"), "-ldl", "-o", library], check=True
            )
            environment = {**os.environ, "LD_PRELOAD": library, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    from nodeshape._training import plots  # noqa: F401

    for name in args.commands:
        sweep(name, args.stride)


if __name__ == "__main__":
    main()
