"""Which jobs make up which table: the whole paper, or a small one that runs the same code in a minute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nodeshape._experiments.depth import Depth
from nodeshape._experiments.jobs import Job
from nodeshape._experiments.networks import NETWORKS
from nodeshape._experiments.solvers import Evaluations, OtherSolvers
from nodeshape._experiments.source import EXPERIMENTS, Experiment
from nodeshape._experiments.table1 import IMAGES, ROWS, Comparison, Footprint
from nodeshape._experiments.training import Epoch, Training
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.options import ADJOINTS


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        seeds: of images, weights and order; every training is repeated with each.
        epochs: passes over the training images.
        test_size: test images after each epoch.
        largest: training images at most; smallest_step: of the solver (both for the quick plan).
        sweep_sizes, sweep_steps: data sizes and step sizes of the sweep; sweep_limit: of images times steps
            in a cell; sweep_test_size: its test images.
        depths: residual blocks or steps whose memory and time are measured; batch_size: images in such a step.
        solver_steps, rtols, solver_images: under which trained models are tested, and on how many images.
        train_rtols: tolerances under which further models are trained for these tests.
        count_steps, count_rtols, count_images: under which evaluations are counted.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 5
    test_size: int = 6000
    largest: int = 2700
    smallest_step: float = 0.01
    sweep_sizes: tuple[int, ...] = (250, 500, 2700)
    sweep_steps: tuple[float, ...] = (0.1, 0.05, 0.01)
    sweep_limit: int = 27_000
    sweep_test_size: int = 1000
    depths: tuple[int, ...] = (6, 12, 25, 50, 100)
    batch_size: int = 120
    solver_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    rtols: tuple[float, ...] = (1.0, 1e-1, 1e-2)
    train_rtols: tuple[float, ...] = (1e-1, 1e-2)
    solver_images: int = 300
    count_steps: tuple[int, ...] = (5, 10, 20, 40)
    count_rtols: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    count_images: int = 12

    def training(self, task: str, train_size: int, step_size: float, method: str, seed: int) -> Training:
        """A run of the report's protocol, or the quick plan's miniature of it."""
        size, step = min(train_size, self.largest), max(step_size, self.smallest_step)
        return Training(task, size, step, method, seed, self.epochs, self.test_size)

    def experiment(self, experiment: Experiment, method: str) -> list[Training]:
        """The runs of one column of the report's table, a seed each."""
        task, size, step = experiment.task, experiment.train_size, experiment.step_size
        return [self.training(task, size, step, method, seed) for seed in self.seeds]

    def small(self, method: str) -> list[Training]:
        """The runs of 500 images under the recipe for few images, a seed each."""
        return [replace(self.training("single", 500, 0.01, method, s), recipe="small") for s in self.seeds]

    def network(self, network: str, task: str) -> list[Training]:
        """The runs of a network under the protocol of 2,700 images, a seed each."""
        return [replace(self.training(task, 2700, 0.05, "euler", seed), network=network) for seed in self.seeds]

    def networks(self) -> dict[str, tuple[str, ...]]:
        """Networks that are compared, by task; the RK-Net, slow and equal to the ODE-Net, on one task only."""
        return {"single": tuple(NETWORKS), "compound": ("resnet", "ode")}

    def sweep(self, train_size: int, step_size: float, method: str) -> list[Training] | None:
        """The runs of a cell of the sweep, a seed each; None for a cell that is left out for its cost.

        A cell that is one of the report's experiments is taken from there, with its larger number of test images.
        """
        if any((e.task, e.train_size, e.step_size) == ("single", train_size, step_size) for e in EXPERIMENTS):
            return [self.training("single", train_size, step_size, method, seed) for seed in self.seeds]
        if train_size / step_size > self.sweep_limit:
            return None
        return [
            replace(self.training("single", train_size, step_size, method, seed), test_size=self.sweep_test_size)
            for seed in self.seeds
        ]

    def depth_lines(self) -> list[tuple[str, str]]:
        """Networks whose memory and time are measured, with their gradient mode (none for autograd's)."""
        return [("resnet", ""), ("rknet", ""), *(("ode", adjoint) for adjoint in ADJOINTS)]

    def depth(self, network: str, adjoint: str, depth: int) -> Depth:
        """The measurement at one depth."""
        return Depth(network, adjoint, depth, self.batch_size)

    def evaluations(self, method: str) -> Evaluations:
        """The counts of a model trained on 2,700 images."""
        trained = self.training("single", 2700, 0.05, method, self.seeds[0])
        return Evaluations(trained, self.count_images, self.count_steps, self.count_rtols)

    def controlled(self) -> list[Training]:
        """The runs of 500 images under error control, a tolerance each."""
        run = self.training("single", 500, 0.05, "implicit_midpoint", self.seeds[0])
        return [replace(run, rtol=rtol, test_size=self.solver_images) for rtol in self.train_rtols]

    def other_solvers(self) -> list[OtherSolvers]:
        """The tests of models trained on 500 images: of cells of the sweep, and under error control."""
        cells = [self.sweep(500, step_size, method) for method in SOURCE_METHODS for step_size in self.sweep_steps]
        trained = [*(cell[0] for cell in cells if cell), *self.controlled()]
        return [OtherSolvers(run, self.solver_images, self.solver_steps, self.rtols) for run in trained]

    def epoch(self, method: str) -> Epoch:
        """The time of the default epoch."""
        return Epoch("single", min(2700, self.largest), max(0.05, self.smallest_step), method)

    def comparison(self, network: str, adjoint: str, images: str) -> list[Comparison]:
        """The runs of a row of the parent paper's table 1, a seed each; none for one that is another table's too."""
        if images == "shapes" and (network in ("resnet", "rknet") or adjoint == "discrete"):
            return []
        size = min(2700, self.largest)
        return [Comparison(network, adjoint, images, size, self.test_size, seed, self.epochs) for seed in self.seeds]

    def footprint(self, network: str, adjoint: str, images: str) -> Footprint:
        """The measurement of such a row."""
        return Footprint(network, adjoint, images, self.batch_size)

    def table1(self) -> tuple[list[Job], list[Job]]:
        """What the parent paper's table 1 needs besides the other tables: trainings and timings."""
        cells = [(*row, images) for images in IMAGES for row in ROWS]
        return [run for cell in cells for run in self.comparison(*cell)], [self.footprint(*cell) for cell in cells]

    def trainings(self) -> list[Job]:
        """Every training run, once."""
        return [*dict.fromkeys(self._trainings()), *self.table1()[0]]

    def analyses(self) -> list[Job]:
        """What is measured on trained models."""
        return [
            *(self.evaluations(method) for method in SOURCE_METHODS),
            *self.other_solvers(),
        ]

    def timings(self) -> list[Job]:
        """What is measured with the machine to itself."""
        return [
            *(self.epoch(method) for method in SOURCE_METHODS),
            *(self.depth(*line, depth) for line in self.depth_lines() for depth in self.depths),
            *self.table1()[1],
        ]

    def _trainings(self) -> Iterator[Training]:
        for method in SOURCE_METHODS:
            for experiment in EXPERIMENTS:
                yield from self.experiment(experiment, method)
            for size in self.sweep_sizes:
                for step in self.sweep_steps:
                    yield from self.sweep(size, step, method) or ()
            yield from self.small(method)
        yield from self.controlled()
        for task, networks in self.networks().items():
            for network in networks:
                yield from self.network(network, task)


FULL = Plan()
QUICK = Plan(
    seeds=(0,),
    epochs=1,
    test_size=60,
    largest=120,
    smallest_step=0.05,
    sweep_sizes=(60, 500),
    sweep_steps=(0.1, 0.05),
    sweep_test_size=60,
    depths=(2, 4),
    batch_size=8,
    solver_steps=(2, 4),
    rtols=(1e-1,),
    train_rtols=(1.0,),
    solver_images=30,
    count_steps=(2, 4),
    count_rtols=(1e-1,),
    count_images=2,
)
