"""Cases: contenders for one problem, compared with each other before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nodeshape._benchmarking.contenders import Call, Problem, Unavailable
from nodeshape._benchmarking.timing import CPU, Effort, Timing, measure, sgemm, torch_threads
from nodeshape._errors import ReversalDriftError, StageSolveError
from nodeshape._models.dynamics import ConvDynamics

#: Largest relative difference between contenders that solve the same equations in float32.
AGREEMENT = 1e-3
DIRECT_LIMIT = "direct limit"


@dataclass(frozen=True)
class Contender:
    """A contender of a case.

    Attributes:
        build: makes its call; raises Unavailable if it cannot take part.
        like: the contender, earlier in the case, whose numbers it must give; None if they are its own.
    """

    build: Callable[[], Call]
    like: str | None = None


@dataclass(frozen=True)
class Case:
    """A row of a table: one problem, several contenders.

    Attributes:
        section: title of its table.
        name: of the row.
        contenders: by name, in the order of the columns; ratios are to the first.
        scale: what a plot has on its horizontal axis, or None.
        direct: operations of the direct convolutions, 0 if there are none: adds the column ``direct limit``.
        threads: of torch; None for all.
        device: where the contenders compute.
        describe: figures to keep beside the times, asked for after them.
    """

    section: str
    name: str
    contenders: Mapping[str, Contender]
    scale: float | None = None
    direct: float = 0.0
    threads: int | None = None
    device: torch.device = CPU
    describe: Callable[[], dict[str, float]] = dict


@dataclass
class Result:
    """What a case gave.

    Attributes:
        section, name, scale, threads: of the case.
        seconds: of each contender that took part.
        skipped: why each of the others did not.
        difference: relative, of a contender's numbers from those it must give.
        direct_limit: seconds of the direct convolutions' arithmetic at the rate of the sgemm timed with the case.
        figures: other figures.
    """

    section: str
    name: str
    scale: float | None
    threads: int
    seconds: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    direct_limit: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def time(self, contender: str) -> float | None:
        """Median seconds; None if it did not take part."""
        if contender == DIRECT_LIMIT:
            return self.direct_limit
        timing = self.seconds.get(contender)
        return None if timing is None else timing.median


def run_case(case: Case, effort: Effort) -> Result:
    """Build, compare and time a case's contenders."""
    with torch_threads(case.threads or torch.get_num_threads()):
        result = Result(case.section, case.name, case.scale, torch.get_num_threads())
        calls: dict[str, Callable[[], object]] = {}
        numbers: dict[str, np.ndarray[Any, Any]] = {}
        for name, contender in case.contenders.items():
            try:
                call = contender.build()
                numbers[name] = _flat(call())
            except (Unavailable, StageSolveError, ReversalDriftError) as error:
                result.skipped[name] = str(error)
                continue
            if contender.like in numbers:
                difference = _relative(numbers[name], numbers[contender.like])
                result.difference[name] = difference
                if not difference <= AGREEMENT:
                    result.skipped[name] = f"differs from {contender.like} by {difference:.1e} (relative)"
                    continue
            calls[name] = call
        if case.direct:
            calls[DIRECT_LIMIT], operations = sgemm(effort, case.device)
            calls[DIRECT_LIMIT]()
        result.seconds = measure(calls, effort)
        if case.direct:
            result.direct_limit = result.seconds.pop(DIRECT_LIMIT).median * case.direct / operations
        result.figures = case.describe()
    return result


def direct_operations(problem: Problem) -> float:
    """Operations of the convolutions of a solve by explicit Euler, done directly: 2·2·N·H·W·9·C·(C+1) an evaluation."""
    assert isinstance(problem.dynamics, ConvDynamics)
    samples, channels, height, width = problem.y0.shape
    return problem.steps * 2.0 * 2 * samples * height * width * 9 * channels * (channels + 1)


def _flat(tensors: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x).ravel() for x in tensors])


def _relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
