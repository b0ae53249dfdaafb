"""What the examples share: a command line, a progress bar, a picture, a JSON file of figures, and speed beside a rival.

An example is a file with ``Example(...).main()`` at its end; ``python examples/NAME.py --help`` says what it takes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an installation too

from nodeshape._benchmarking.timing import alternate as alternate
from nodeshape._cli import Parser, picture, positive_int, run, say, seed, whole

T = TypeVar("T")


def progress(steps: Iterable[T], name: str) -> Iterator[T]:
    """The steps, with a bar on the terminal that says how long they will take."""
    yield from tqdm(steps, desc=name, leave=False, disable=None, mininterval=0.5)


@dataclass(frozen=True)
class Example:
    """One program of the gallery.

    Attributes:
        name: of the file, without its ending; the picture and the figures are called so too.
        claim: what it tests, in one sentence.
        train: trains with a seed, only a little if told ``quick``; returns figures by name, and what ``draw`` draws.
        draw: draws what ``train`` of the first seed returned into a picture file.
        speed: figures by name: how many times as fast as on the rival a training iteration is (:func:`alternate`).
        verdict: says in a sentence or two what the mean figures of all seeds show.
        arguments: adds arguments of the example's own to the command line; ``train`` then takes, third, what they were.
        rival: whose time ``speed`` compares with.
    """

    name: str
    claim: str
    train: Callable[..., tuple[dict[str, float], Any]]
    draw: Callable[[Any, Path], None]
    speed: Callable[[], dict[str, float]] | None
    verdict: Callable[[dict[str, float]], str]
    arguments: Callable[[Parser], None] | None = None
    rival: str = "torchdiffeq"

    def main(self) -> None:
        """Run the command line and exit."""
        run(self._main)

    def _main(self) -> None:
        parser = Parser("", self.claim)
        parser.prog = f"python examples/{self.name}.py"
        parser.add_argument(
            "--seeds", type=positive_int, default=1, help="train so many times, from other numbers each"
        )
        parser.add_argument("--seed", type=seed, default=0, help="the first seed")
        parser.add_argument("--quick", action="store_true", help="train for seconds, to see it run")
        parser.add_argument(
            "--threads", type=whole(1, 1024), default=None, help="cores to use, all of them if not given"
        )
        parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the picture and figures")
        if self.speed is not None:
            parser.add_argument(
                "--speed", action="store_true", help=f"time an iteration beside {self.rival}, and no more"
            )
        if self.arguments is not None:
            self.arguments(parser)
        args = parser.parse_args()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"argument --out: {args.out} is a file; name a folder")
        args.out.mkdir(parents=True, exist_ok=True)
        say(self.claim)
        if self.speed is not None and args.speed:
            ratios = self.speed()
            for name, ratio in ratios.items():
                say(f"  {name}: {ratio:.1f} times as fast as {self.rival}")
            self._write(args.out / f"{self.name}.speed.json", {"figures": ratios})
            return
        begin = time.perf_counter()
        runs: list[dict[str, float]] = []
        shown = None
        for k in range(args.seeds):
            own = () if self.arguments is None else (args,)
            figures, drawn = self.train(args.seed + k, args.quick, *own)
            runs.append(figures)
            shown = drawn if k == 0 else shown
        means = {name: mean(values) for name, values in _by_name(runs).items()}
        for name, values in _by_name(runs).items():
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            say(f"  {name}: {means[name]:.4g}{spread}")
        say(self.verdict(means))
        if args.quick:
            say("That was --quick, which is too short to judge by: leave it out.")
        seconds = time.perf_counter() - begin
        self._write(
            args.out / f"{self.name}.json",
            {
                "claim": self.claim,
                "verdict": self.verdict(means),
                "seeds": [args.seed + k for k in range(args.seeds)],
                "quick": args.quick,
                "seconds": round(seconds, 1),
                "figures": _by_name(runs),
            },
        )
        drawing = args.out / f"{self.name}.png"
        with picture(drawing):
            self.draw(shown, drawing)
            say(f"Look at it: {drawing}")

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        content["versions"] = {name: version(name) for name in ("torch", "numpy")}
        path.write_text(json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n", "utf-8")
        say(f"Figures: {path}")


def _by_name(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [run[name] for run in runs] for name in runs[0]}


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
