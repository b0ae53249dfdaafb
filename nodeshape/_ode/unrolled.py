"""Solves as a fixed computation of plain operations, for compilers and exporters: when, and in how many evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Unrolled:
    """What solves take that cannot stop when they are done.

    Attributes:
        iterations: evaluations of f of each stage that is an equation.
        steps: in each interval, of solves that ask for error control.
        implicit, adaptive: whether a solve was met that needs the one, or the other.
        counts: of steps in an interval that solves were met with.
        looped: write one step, in a loop.
        given: how many steps that loop takes in each interval, a scalar; None for as many as the solve asks for.
        states: told the states of each solve in given steps, from the first time to the last; None for nobody.
        native: record a solve that has a kernel as its op, which the library of the ops runs.
    """

    iterations: int
    steps: int
    implicit: bool = False
    adaptive: bool = False
    counts: set[int] = field(default_factory=set)
    looped: bool = False
    given: Tensor | None = None
    states: Callable[[list[Any]], Any] | None = None
    native: bool = False


_current: Unrolled | None = None


@contextmanager
def unrolled(how: Unrolled) -> Iterator[None]:
    """Let all solves within be a fixed computation, whether it is recorded or only tried."""
    global _current
    before, _current = _current, how
    try:
        yield
    finally:
        _current = before


def current() -> Unrolled | None:
    """What :func:`unrolled` says here, if anything."""
    return _current


def is_tracing() -> bool:
    """Whether a compiler or an exporter records the solve, or it is done as if."""
    return is_exporting() or torch.compiler.is_compiling()


def is_exporting() -> bool:
    """The same for those whose record runs without nodeshape."""
    return _current is not None or torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def keeps_ops() -> bool:
    """Whether a record may hold the ops of the kernels: always, but where it must run without their library."""
    return not is_exporting() or (_current is not None and _current.native)
