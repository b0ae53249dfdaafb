"""The parent paper's table 1 on other images: a perceptron beside ResNet, RK-Net and ODE-Net (Chen et al., 2018).

``python -m nodeshape._experiments.table1 NETWORK ADJOINT IMAGES BATCH`` measures a training step and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nodeshape._data.datasets import Data, Split, drawn_data
from nodeshape._data.shapes import CLASSES
from nodeshape._errors import UserError
from nodeshape._experiments.depth import _memory
from nodeshape._experiments.jobs import Job, Result, Store
from nodeshape._experiments.networks import RESIDUAL_BLOCKS, build
from nodeshape._experiments.training import CHANNELS, CPU, IMAGE_SIZE, _history, drawn_test_images
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.stats import SolverStats
from nodeshape._training.recipe import RECIPES
from nodeshape._training.trainer import Trainer

#: Rows, as network and gradient mode (none for autograd's), with the order of memory in depth that the paper gives.
ROWS = {
    ("mlp", ""): ("MLP of one hidden layer", "–"),
    ("resnet", ""): ("ResNet", "O(L)"),
    ("rknet", ""): ("RK-Net", "O(L̃)"),
    ("ode", "discrete"): ("ODE-Net, `discrete`", "O(L̃)"),
    ("ode", "reversible"): ("ODE-Net, `reversible`", "O(1)"),
}
#: Classes and side by images; the digits are scikit-learn's, enlarged from 8 pixels.
IMAGES = {"shapes": (len(CLASSES["single"]), IMAGE_SIZE), "digits": (10, 16)}
#: Of the perceptron, as in the paper's (LeCun et al., 1998).
HIDDEN = 300
#: Of the ODE-Net and the RK-Net; on the digits as many as the ResNet has blocks.
STEPS = {"shapes": 20, "digits": RESIDUAL_BLOCKS}
DIGITS_TEST_SIZE = 360
REPEATS = 5
SOURCES = ("_experiments.table1",)


class Perceptron(nn.Module):
    """Pixels, one hidden layer, logits.

    Attributes:
        ode: what the trainer asks for evaluations of f, of which there are none.
    """

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(image_size**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes)
        )
        self.ode = SimpleNamespace(stats=SolverStats.zeros(1, CPU))

    def forward(self, image: Tensor) -> Tensor:
        """Images ``[batch, 1, size, size]`` to logits ``[batch, num_classes]``."""
        logits: Tensor = self.layers(image)
        return logits


@dataclass(frozen=True)
class Comparison(Job):
    """Train one row's network by the public trainer.

    Attributes:
        network, adjoint: a row of :data:`ROWS`.
        images: ``"shapes"`` (single) or ``"digits"``.
        train_size, test_size: of the shapes; the digits are divided as they are.
        seed: of images, weights and order.
        epochs: passes over the training images.
    """

    network: str
    adjoint: str
    images: str
    train_size: int
    test_size: int
    seed: int
    epochs: int
    sources: ClassVar[tuple[str, ...]] = SOURCES

    @property
    def seconds(self) -> float:
        cost = {"mlp": 0.1e-3, "resnet": 2.5e-3, "rknet": 8e-3, "ode": 6e-3}[self.network]
        return self.epochs * cost * (self.train_size if self.images == "shapes" else 500)

    def compute(self, store: Store) -> Result:
        """Accuracy after the last epoch, and the number of parameters."""
        data = digits(self.seed) if self.images == "digits" else self._shapes()
        torch.manual_seed(self.seed)
        model = network(self.network, self.adjoint, self.images)
        history = _history(Trainer(model, data, replace(RECIPES["default"], epochs=self.epochs, seed=self.seed), CPU))
        return {"accuracy": history[-1].test_accuracy, "parameters": sum(p.numel() for p in model.parameters())}

    def _shapes(self) -> Data:
        data = drawn_data("single", self.train_size, 2, IMAGE_SIZE, CHANNELS, self.seed)
        data.test = drawn_test_images("single", self.test_size, self.seed)
        return data


@dataclass(frozen=True)
class Footprint(Job):
    """Memory and time of a training step of one row's network, in a process of its own.

    Attributes:
        network, adjoint: a row of :data:`ROWS`.
        images: ``"shapes"`` or ``"digits"``.
        batch_size: images in the step.
    """

    network: str
    adjoint: str
    images: str
    batch_size: int
    alone: ClassVar[bool] = True
    compiled: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = SOURCES

    @property
    def seconds(self) -> float:
        return 10

    def compute(self, store: Store) -> Result:
        """``peak_bytes`` (None where the system does not say) and processor ``seconds``."""
        arguments = [self.network, self.adjoint, self.images, str(self.batch_size)]
        command = [sys.executable, "-m", "nodeshape._experiments.table1", *arguments]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
        result: Result = json.loads(done.stdout)
        return result


def network(name: str, adjoint: str, images: str) -> Any:
    """The untrained network of a row, for images of one kind."""
    classes, size = IMAGES[images]
    if name == "mlp":
        return Perceptron(classes, size)
    if name == "ode":
        return ShapeClassifier(classes, size, steps=STEPS[images], method="euler", adjoint=adjoint)
    model = ShapeClassifier(classes, size)
    model.ode = build(name, classes, RESIDUAL_BLOCKS if name == "resnet" else STEPS[images]).ode
    return model


def digits(seed: int) -> Data:
    """scikit-learn's 1,797 handwritten digits at 16 × 16 pixels, 360 of them, which ``seed`` chooses, for testing.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise UserError("the digits of table 1 are scikit-learn's; run: pip install scikit-learn") from None
    loaded = load_digits()
    small = torch.from_numpy(loaded.images).float()[:, None] / 16
    size = IMAGES["digits"][1]
    images = nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    pixels, labels = (images * 255).round().to(torch.uint8), torch.from_numpy(loaded.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
    classes = [str(name) for name in loaded.target_names]
    return Data(classes, Split(pixels[train], labels[train]), Split(pixels[test], labels[test]), unreadable=[])


def measure(name: str, adjoint: str, images: str, batch_size: int) -> Result:
    """Peak resident memory of a training step beyond that before it, and the median processor time of later steps."""
    torch.manual_seed(0)
    model = network(name, adjoint, images)
    classes, size = IMAGES[images]

    def step(count: int) -> None:
        logits = model(torch.rand(count, 1, size, size))
        nn.functional.cross_entropy(logits, torch.arange(count) % classes).backward()

    step(2)  # loads libraries and makes the gradients
    before = _memory("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    step(batch_size)
    peak = _memory("VmHWM")
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        step(batch_size)
        seconds.append(time.process_time() - start)
    grown = None if before is None or peak is None else max(0, peak - before)
    return {"peak_bytes": grown, "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    name, adjoint, images, batch_size = sys.argv[1:]
    print(json.dumps(measure(name, adjoint, images, int(batch_size))))
