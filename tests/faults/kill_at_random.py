"""Kill (kill -9) the commands at random moments and see that nothing is lost but the epoch in flight.

``python tests/faults/kill_at_random.py COUNT [--seed N]`` kills trainings of drawn images, trainings that stream a
folder, drawings of a folder and exports, in turn, COUNT times in all. A training is killed again and again until it is
done; then its weights must be those of one that nobody killed, and its epochs may never go back.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

SMALL = ["--batch-size", "20", "--step-size", "0.5", "--epochs", "3", "--image-size", "16", "--device", "cpu"]
DRAWN = ["--train-size", "400", "--test-size", "40"]
EXPORTED = {"model.onnx", "model.ts", "report.json", "example.png"}


class Failure(Exception):
    """What should have held does not."""


def holds(condition: object, what: str) -> None:
    """Fail with ``what`` unless the condition holds."""
    if not condition:
        raise Failure(what)


def run(command: str, *arguments: str, cwd: Path, seconds: float | None = None) -> tuple[bool, float]:
    """Run a command, killed after some seconds; whether it was, and for how long it ran."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", f"nodeshape.{command}", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    killed = process.returncode == -signal.SIGKILL
    holds(killed or process.returncode == 0, f"{command} {' '.join(arguments)}: {process.returncode}\n{said}")
    return killed, time.monotonic() - start


class Training:
    """A run that is killed until it is done."""

    def __init__(self, home: Path, name: str, *arguments: str) -> None:
        self.home, self.run, self.arguments = home, home / name, [*SMALL, *arguments]
        _, self.seconds = run("train", *self.arguments, "--out", "whole-" + name, cwd=home)
        self.whole = torch.load(home / f"whole-{name}" / "last.pt", weights_only=True)
        self.place = (0, 0)
        self.finished = 0

    def kill(self, chance: random.Random) -> bool:
        resume = (self.run / "last.pt").exists()
        arguments = ["--resume"] if resume else self.arguments
        seconds = chance.uniform(0, self.seconds)
        killed, _ = run("train", *arguments, "--out", self.run.name, cwd=self.home, seconds=seconds)
        if not killed:
            self.done()
            return False
        if (self.run / "last.pt").exists():
            state = torch.load(self.run / "last.pt", weights_only=True)
            place = (state["progress"]["epoch"], state["progress"]["batch"])
            holds(place >= self.place, f"the run went back from {self.place} to {place}")
            self.place = place
        else:
            holds(not resume, "last.pt is gone")
        return True

    def done(self) -> None:
        if (self.run / "last.pt").exists():
            run("train", "--resume", "--out", self.run.name, cwd=self.home)
        else:
            run("train", *self.arguments, "--out", self.run.name, cwd=self.home)
        state = torch.load(self.run / "last.pt", weights_only=True)
        for name, value in self.whole["model"].items():
            holds(torch.equal(value, state["model"][name]), f"{self.run.name}: {name} is another")
        holds(not list(self.run.glob(".*")), f"{self.run.name}: something half written is left")
        for path in sorted(self.run.rglob("*"), reverse=True):
            path.unlink()
        self.run.rmdir()
        self.place = (0, 0)
        self.finished += 1


class Drawing:
    """A folder of drawn images, new each time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        _, self.seconds = run("data", "--count", "3000", "--out", "whole", cwd=home)

    def kill(self, chance: random.Random) -> bool:
        out = self.home / "drawn"
        seconds = chance.uniform(0, self.seconds)
        killed, _ = run("data", "--count", "3000", "--out", "drawn", cwd=self.home, seconds=seconds)
        holds(killed or out.exists(), "no folder")
        if out.exists():
            holds(len(list(out.glob("*/*.png"))) == 3000, "a part of the images")
            out.rename(self.home / f"drawn-{time.monotonic_ns()}")
        return killed

    def done(self) -> None:
        if not (self.home / "drawn").exists():
            run("data", "--count", "30", "--out", "drawn", cwd=self.home)
        holds(not list(self.home.glob(".drawn*")), "something half written is left")


class Exporting:
    """An export that replaces an earlier one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        run("train", *SMALL, *DRAWN, "--epochs", "1", "--out", "model", cwd=home)
        _, self.seconds = run("export", "model/best.pt", cwd=home)

    def kill(self, chance: random.Random) -> bool:
        steps = str(chance.randrange(2, 5))
        seconds = chance.uniform(0, self.seconds)
        killed, _ = run("export", "model/best.pt", "--steps", steps, cwd=self.home, seconds=seconds)
        self._whole()
        return killed

    def done(self) -> None:
        run("export", "model/best.pt", cwd=self.home)
        self._whole()
        holds(not list((self.home / "model").glob(".*")), "something half written is left")

    def _whole(self) -> None:
        export = self.home / "model" / "export"
        holds({path.name for path in export.iterdir()} == EXPORTED, "an export without some of its files")
        for name, figures in json.loads((export / "report.json").read_text())["files"].items():
            holds((export / name).stat().st_size == figures["bytes"], f"{name} is of another export")


def main() -> None:
    """Kill as often as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run("data", "--count", "440", "--image-size", "16", "--out", "images", cwd=home)
        victims = {
            "training": Training(home, "drawn-run", *DRAWN),
            "streaming": Training(home, "streamed-run", "--data", "images", "--stream"),
            "drawing": Drawing(home),
            "exporting": Exporting(home),
        }
        kills = dict.fromkeys(victims, 0)
        with tqdm(total=args.count, unit=" kills", disable=None) as bar:
            while sum(kills.values()) < args.count:
                name = min(kills, key=lambda victim: kills[victim])
                killed = victims[name].kill(chance)
                kills[name] += killed
                bar.update(killed)
        for victim in victims.values():
            victim.done()
        for name, victim in victims.items():
            print(f"{name}: killed {kills[name]} times")
            if isinstance(victim, Training):
                print(f"  {victim.finished} of its runs came to their end, with the weights of one that nobody killed")
    print(f"{sum(kills.values())} kills, nothing lost")


if __name__ == "__main__":
    main()
