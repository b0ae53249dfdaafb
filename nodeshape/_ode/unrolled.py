"""Solves as a fixed computation of plain operations, for compilers and exporters: when, and in how many evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor


@dataclass
class Unrolled:
    """What solves take that cannot stop when they are done.

    Attributes:
        iterations: most evaluations of f of each stage that is an equation.
        steps: in each interval, of solves that ask for error control.
        form: how steps are recorded: one after the other (``"steps"``), one in a scan over their times (``"scan"``), or
            one in a loop (``"loop"``).
        tolerance: of stages, where the solve's own is smaller.
        memory: differences of residuals that a stage keeps.
        stops: whether a stage ends when all samples are solved, in a loop, or takes all its evaluations.
        implicit, adaptive: whether a solve was met that needs the one, or the other.
        counts: of steps in an interval that solves were met with.
        evaluations, most: of f in stages so far, and in one of them, where nothing is recorded.
        given: how many steps a loop takes in each interval, a scalar; None for as many as the solve asks for.
        states: told the states of each solve in given steps, from the first time to the last, ``[steps + 1, ...]``;
            None for nobody.
        native: record a solve that has a kernel as its op, which the library of the ops runs.
        times: numbers of the tensors of times that solves were given in turn, where nothing is recorded.
        taken: how many of them a record has taken.
    """

    iterations: int
    steps: int
    form: str = "steps"
    tolerance: float = 0.0
    memory: int = 5
    stops: bool = False
    implicit: bool = False
    adaptive: bool = False
    counts: set[int] = field(default_factory=set)
    evaluations: int = 0
    most: int = 0
    given: Tensor | None = None
    states: Callable[[Any], Any] | None = None
    native: bool = False
    times: list[list[float]] = field(default_factory=list)
    taken: int = 0

    def known(self, t: Tensor) -> Tensor | list[float]:
        """The times of the next solve whose numbers matter; a record, which has no numbers, takes those of before."""
        if not is_recording():
            self.times.append(t.tolist())
        elif self.taken < len(self.times):
            self.taken += 1
            return self.times[self.taken - 1]
        return t


_current: Unrolled | None = None
_thread = 0


@contextmanager
def unrolled(how: Unrolled) -> Iterator[None]:
    """Let all solves of this thread within be a fixed computation, whether it is recorded or only tried."""
    global _current, _thread
    before = _current, _thread
    _current, _thread = how, get_ident()
    try:
        yield
    finally:
        _current, _thread = before


def current() -> Unrolled | None:
    """What :func:`unrolled` says here, if anything."""
    return _current if _current is not None and _is_here() else None


def _is_here() -> bool:
    return get_ident() == _thread


_is_here._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result does


def is_tracing() -> bool:
    """Whether a compiler or an exporter records the solve, or it is done as if."""
    return is_exporting() or torch.compiler.is_compiling()


def is_exporting() -> bool:
    """The same for those whose record runs without nodeshape."""
    return current() is not None or torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def keeps_ops() -> bool:
    """Whether a record may hold the ops of the kernels: always, but where it must run without their library."""
    how = current()
    return not is_exporting() or (how is not None and how.native)


def is_recording() -> bool:
    """Whether torch.export records the solve, so that its loops are operators."""
    return torch.compiler.is_exporting()
