"""What the solver of a trained model costs and allows: evaluations of f, and tests under another solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nodeshape._experiments.jobs import Job, Result, Store
from nodeshape._experiments.training import (
    CONTROLLED,
    CPU,
    REFUSALS,
    TEST_IMAGE,
    TEST_STEP,
    Training,
    accuracy_on,
    drawn_test_images,
    euler_steps,
)
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.options import ADJOINTS


@dataclass(frozen=True)
class Evaluations(Job):
    """Forward and backward evaluations of f by a trained model, in every gradient mode (Chen et al., figure 4).

    Attributes:
        trained: the run that trained it.
        images: number of test images in the batch.
        steps: numbers of equal steps.
        rtols: tolerances of error control.
    """

    trained: Training
    images: int
    steps: tuple[int, ...]
    rtols: tuple[float, ...]
    compiled: ClassVar[bool] = True

    @property
    def seconds(self) -> float:
        steps = sum(euler_steps(self.trained.method, n) for n in self.steps) + CONTROLLED * len(self.rtols)
        return 6 * len(ADJOINTS) * self.images * TEST_STEP * steps

    def compute(self, store: Store) -> Result:
        """A list of ``counts``: gradient mode, setting, and ``forward`` and ``backward``, None where refused."""
        run = self.trained
        images, labels = drawn_test_images(run.task, self.images, run.seed).batch(slice(None), CPU)
        counts = []
        settings: list[dict[str, Any]] = [{"steps": n} for n in self.steps] + [{"rtol": r} for r in self.rtols]
        for adjoint in ADJOINTS:
            for setting in settings:
                model = run.trained(store, method=run.method, adjoint=adjoint, **setting)
                count: dict[str, float | None] = {"forward": None, "backward": None}
                try:
                    nn.functional.cross_entropy(model(images), labels).backward()
                except REFUSALS:
                    pass
                else:
                    stats = model.ode.stats
                    assert stats is not None
                    count["forward"] = float(stats.nfe_forward.float().mean())
                    count["backward"] = float(stats.nfe_backward.float().mean())
                counts.append({"adjoint": adjoint, **setting, **count})
        return {"counts": counts}


@dataclass(frozen=True)
class OtherSolvers(Job):
    """Test a trained model under other methods, numbers of steps and tolerances than it was trained with.

    Attributes:
        trained: the run that trained it.
        images: number of test images.
        steps: numbers of equal steps, each with every method.
        rtols: tolerances of error control, by the implicit midpoint method.
    """

    trained: Training
    images: int
    steps: tuple[int, ...]
    rtols: tuple[float, ...]

    @property
    def seconds(self) -> float:
        steps = sum(euler_steps(method, n) for n in self.steps for method in SOURCE_METHODS) + CONTROLLED * len(
            self.rtols
        )
        return self.images * (TEST_IMAGE + TEST_STEP * steps)

    def compute(self, store: Store) -> Result:
        """``accuracy``: a list of shares in [0, 1], in the order of :meth:`settings`; None where refused.

        All are None if the training failed.
        """
        run = self.trained
        if "failed" in (store.get(run) or {}):
            return {"accuracy": [None for _ in self.settings()]}
        test = drawn_test_images(run.task, self.images, run.seed)
        accuracy: list[float | None] = []
        for setting in self.settings():
            try:
                accuracy.append(accuracy_on(run.trained(store, **setting), test))
            except REFUSALS:
                accuracy.append(None)
        return {"accuracy": accuracy}

    def settings(self) -> list[dict[str, Any]]:
        """Solvers it is tested under: equal steps by method, then error control."""
        equal: list[dict[str, Any]] = [{"method": method, "steps": n} for method in SOURCE_METHODS for n in self.steps]
        return equal + [{"method": "implicit_midpoint", "rtol": rtol} for rtol in self.rtols]
