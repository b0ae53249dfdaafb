"""Run torchdiffeq's own examples with torchdiffeq and with nodeshape in its place: losses and seconds per iteration.

    pip install torchdiffeq matplotlib scikit-learn
    git clone https://github.com/rtqichen/torchdiffeq
    python benchmarks/torchdiffeq_examples.py torchdiffeq/examples            # all, in about ten minutes
    python benchmarks/torchdiffeq_examples.py torchdiffeq/examples cnf        # those whose name begins so

The examples run as they are, with one seed, each in its own process: with nodeshape a module called torchdiffeq is put
before the real one that imports three functions from nodeshape. Instead of MNIST, which would have to be downloaded,
the digits of scikit-learn are shown. The two libraries take turns; seconds are medians.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 3


@dataclass(frozen=True)
class Example:
    """A file, its switch for the adjoint, other arguments, and the iterations to run; 0 where it does not train."""

    name: str
    iterations: int
    adjoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


EXAMPLES = [
    Example("ode_demo", 19),
    Example("ode_demo", 19, ("--adjoint",)),
    Example("latent_ode", 6),
    Example("latent_ode", 6, ("--adjoint", "True")),
    Example("cnf", 6),
    Example("cnf", 6, ("--adjoint",)),
    Example("bouncing_ball", 0),
    Example("learn_physics", 6),
    Example("odenet_mnist", 6, (), ("--test_batch_size", "100")),
    Example("odenet_mnist", 6, ("--adjoint", "True"), ("--test_batch_size", "100")),
]

IN_ITS_PLACE = "from nodeshape import odeint, odeint_adjoint, odeint_event\n"

#: What the example of images takes of torchvision.
TORCHVISION = {
    "__init__": "",
    "datasets": '''
import numpy as np
from sklearn.datasets import load_digits


class MNIST:
    """The digits of scikit-learn, 8×8, as images of 28×28 whose pixels are 0 to 255."""

    def __init__(self, root, train, download, transform):
        digits = load_digits()
        part = slice(0, 1500) if train else slice(1500, None)
        larger = np.kron(digits.images[part], np.ones((1, 3, 3)))
        self.images = np.pad(larger * (255 / 16), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
        self.targets, self.transform = digits.target[part], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), int(self.targets[i])
''',
    "transforms": """
import numpy as np
import torch


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(image).float()[None] / 255


class RandomCrop:
    def __init__(self, size, padding):
        self.size, self.padding = size, padding

    def __call__(self, image):
        top, left = torch.randint(0, 2 * self.padding + 1, (2,)).tolist()
        return np.pad(image, self.padding)[top : top + self.size, left : left + self.size]
""",
}


class Enough(BaseException):
    """Raised inside an example that has run long enough."""


def run_here(file: str, iterations: int, report: str, arguments: list[str]) -> None:
    """Run an example in this process; write its losses and the seconds of its iterations to ``report``.

    A loss is whatever calls ``backward``. An example without an optimiser is timed whole, until it draws.
    """
    import random
    import runpy

    import matplotlib.pyplot
    import numpy as np
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    losses: list[float] = []
    ends: list[float] = []
    backward = torch.Tensor.backward

    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(float(self.detach()))
        backward(self, *args, **kwargs)

    def stepped(*_: Any) -> None:
        ends.append(time.perf_counter())
        if len(ends) == iterations:
            raise Enough

    def drawn(*_: Any, **__: Any) -> None:
        raise Enough

    torch.Tensor.backward = noted  # type: ignore[assignment, method-assign]
    register_optimizer_step_post_hook(stepped)
    if iterations == 0:
        matplotlib.pyplot.figure = drawn  # type: ignore[assignment]
    sys.argv = [file, *arguments]
    start = time.perf_counter()
    with suppress(Enough):
        runpy.run_path(file, run_name="__main__")
    if not ends:
        ends = [start, time.perf_counter()]
    seconds = [after - before for before, after in zip(ends, ends[1:])]
    Path(report).write_text(json.dumps({"loss": losses[-1], "seconds": median(seconds)}))


def run(folder: Path, example: Example, library: str) -> dict[str, Any]:
    """Run an example with a library: ``loss`` and ``seconds``, or ``failure``, its last line."""
    with tempfile.TemporaryDirectory() as temporary:
        there = Path(temporary)
        (there / "shims" / "torchvision").mkdir(parents=True)
        for name, text in TORCHVISION.items():
            (there / "shims" / "torchvision" / f"{name}.py").write_text(text)
        if library == "nodeshape":
            (there / "shims" / "torchdiffeq.py").write_text(IN_ITS_PLACE)
        path = [str(there / "shims"), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(path), "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
        report = there / "report.json"
        command = [
            str(folder / f"{example.name}.py"),
            str(example.iterations),
            str(report),
            *example.adjoint,
            *example.arguments,
        ]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--run", *command],
            cwd=there,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return {"failure": (done.stderr.strip() or "no message").splitlines()[-1]}
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def alike(a: float, b: float) -> bool:
    """Whether two numbers agree to three significant digits."""
    return a == b or abs(a - b) < 0.5 * 10.0 ** (floor(log10(max(abs(a), abs(b)))) - 2)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        file, iterations, report, *arguments = sys.argv[2:]
        run_here(file, int(iterations), report, arguments)
        return
    if len(sys.argv) < 2 or not Path(sys.argv[1], "ode_demo.py").is_file():
        sys.exit("give the folder of torchdiffeq's examples, as in: torchdiffeq_examples.py torchdiffeq/examples")
    folder, chosen = Path(sys.argv[1]).resolve(), tuple(sys.argv[2:])
    print("torch", version("torch"), " torchdiffeq", version("torchdiffeq"))
    print(
        "\n| example | iterations | loss with torchdiffeq | with nodeshape | alike to 3 digits"
        " | seconds per iteration with torchdiffeq | with nodeshape | ratio |\n|---|---|---|---|---|---|---|---|"
    )
    for example in EXAMPLES:
        if chosen and not example.name.startswith(chosen):
            continue
        found: dict[str, list[dict[str, Any]]] = {"torchdiffeq": [], "nodeshape": []}
        for _ in range(ROUNDS):
            for library, runs in found.items():
                runs.append(run(folder, example, library))
        start = f"| {' '.join((example.name, *example.adjoint))} | {example.iterations or '–'}"
        failures = [(library, x["failure"]) for library, runs in found.items() for x in runs if "failure" in x]
        if failures:
            library, failure = failures[0]
            print(f"{start} | {library} fails: {failure} |", flush=True)
            continue
        theirs, ours = ([runs[0]["loss"], median(x["seconds"] for x in runs)] for runs in found.values())
        print(
            f"{start} | {theirs[0]:.6g} | {ours[0]:.6g}"
            f" | {'yes' if alike(theirs[0], ours[0]) else 'NO'} | {theirs[1]:.3f} | {ours[1]:.3f}"
            f" | {theirs[1] / ours[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
