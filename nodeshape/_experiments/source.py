"""What the 2021 report measured, as data: its four training tables, and the parent paper's table that it quotes.

"Project Neural Ordinary Differential Equations", after Chen et al., *Neural Ordinary Differential Equations*
(arXiv:1806.07366v4). Its protocol: Adam, cross-entropy, batches of 120, 6,000 test images, five epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nodeshape._ode.method import SOURCE_METHODS

METHOD_TITLES = dict(zip(SOURCE_METHODS, ("explicit Euler", "implicit Euler", "implicit midpoint")))


def solver_title(solver: Mapping[str, Any]) -> str:
    """A solver's ``steps``, ``step_size`` or ``rtol`` for people: ``20 steps``, ``h = 0.05``, ``rtol 0.1``."""
    if "steps" in solver:
        return f"{solver['steps']} step{'s' * (solver['steps'] > 1)}"
    return f"h = {solver['step_size']:g}" if "step_size" in solver else f"rtol {solver['rtol']:g}"


@dataclass(frozen=True)
class Experiment:
    """One training table of the report.

    Attributes:
        task: the images.
        train_size: number of training images.
        step_size: of the solver, over an interval of length 1.
        accuracy: percent of the test images after each epoch, by method.
        seconds: an epoch, by method, on a hosted notebook; empty where the report gives none.
    """

    task: str
    train_size: int
    step_size: float
    accuracy: dict[str, tuple[float, ...]] = field(hash=False)
    seconds: dict[str, float] = field(hash=False)

    @property
    def name(self) -> str:
        """For files: ``single-2700``."""
        return f"{self.task}-{self.train_size}"

    @property
    def title(self) -> str:
        """For people: ``Single, 2,700 images, h = 0.05``."""
        return f"{self.task.capitalize()}, {self.train_size:,} images, h = {self.step_size:g}"


def _experiment(
    task: str, train_size: int, step_size: float, columns: tuple[tuple[float, ...], ...], seconds: tuple[float, ...]
) -> Experiment:
    return Experiment(
        task, train_size, step_size, dict(zip(SOURCE_METHODS, columns)), dict(zip(SOURCE_METHODS, seconds))
    )


EXPERIMENTS = (
    _experiment(
        "single",
        2700,
        0.05,
        (
            (43.483, 83.883, 96.617, 99.633, 99.633),
            (66.150, 95.067, 100.000, 100.000, 100.000),
            (65.933, 90.717, 94.283, 94.067, 91.650),
        ),
        (61, 71, 74),
    ),
    _experiment(
        "compound",
        2700,
        0.05,
        (
            (61.617, 97.550, 98.917, 99.950, 94.567),
            (60.217, 77.917, 96.033, 97.450, 99.417),
            (62.333, 94.283, 98.117, 99.800, 97.500),
        ),
        (61, 66, 66),
    ),
    _experiment(
        "single",
        500,
        0.01,
        (
            (33.533, 32.850, 32.883, 62.400, 63.717),
            (33.600, 33.600, 42.067, 34.933, 43.633),
            (33.400, 43.717, 33.400, 70.533, 91.383),
        ),
        (93, 81, 81),
    ),
    _experiment(
        "single",
        1350,
        0.025,
        (
            (33.700, 61.283, 66.033, 97.900, 93.367),
            (51.367, 58.667, 58.417, 96.083, 99.883),
            (32.917, 32.917, 58.100, 49.700, 90.417),
        ),
        (),
    ),
)

#: Chen et al., table 1, on MNIST: model, test error, parameters, memory, time; L layers, L̃ evaluations of f.
PARENT_TABLE = (
    ("MLP of one hidden layer", "1.60%", "0.24 M", "–", "–"),
    ("ResNet", "0.41%", "0.60 M", "O(L)", "O(L)"),
    ("RK-Net", "0.47%", "0.22 M", "O(L̃)", "O(L̃)"),
    ("ODE-Net", "0.42%", "0.22 M", "O(1)", "O(L̃)"),
)
