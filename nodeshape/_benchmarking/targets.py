"""Targets: a ratio that a run should reach, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nodeshape._benchmarking.cases import Result


class Target(Protocol):
    """A named bound on a figure of a run."""

    @property
    def name(self) -> str:
        """One line."""

    @property
    def bound(self) -> str:
        """The bound, to print."""

    def measured(self, results: Sequence[Result]) -> float | None:
        """The figure; None if the run does not have it."""

    def met(self, figure: float) -> bool:
        """Whether the figure keeps the bound."""


@dataclass(frozen=True)
class _Ratio:
    """Time of ``contender`` over that of ``base`` in the case ``row`` of ``section``.

    Attributes:
        of: the section of the base; None for the contender's.
    """

    name: str
    limit: float
    section: str
    row: str
    contender: str
    base: str
    of: str | None = None

    def measured(self, results: Sequence[Result]) -> float | None:
        """The ratio."""
        result, beside = (_find(results, section, self.row) for section in (self.section, self.of or self.section))
        if result is None or beside is None:
            return None
        time, base = result.time(self.contender), beside.time(self.base)
        return None if time is None or base is None else time / base


@dataclass(frozen=True)
class AtLeast(_Ratio):
    """The contender takes at least ``limit`` times as long as the base."""

    @property
    def bound(self) -> str:
        """The bound, to print."""
        return f"≥ {self.limit:g}×"

    def met(self, figure: float) -> bool:
        """Whether the ratio is large enough."""
        return figure >= self.limit


@dataclass(frozen=True)
class AtMost(_Ratio):
    """The contender takes at most ``limit`` times as long as the base."""

    @property
    def bound(self) -> str:
        """The bound, to print."""
        return f"≤ {self.limit:g}×"

    def met(self, figure: float) -> bool:
        """Whether the ratio is small enough."""
        return figure <= self.limit


@dataclass(frozen=True)
class Limit:
    """A figure that a case keeps beside its times is at most ``limit``."""

    name: str
    limit: float
    section: str
    row: str
    figure: str

    @property
    def bound(self) -> str:
        """The bound, to print."""
        return f"≤ {self.limit:g}"

    def measured(self, results: Sequence[Result]) -> float | None:
        """The figure."""
        result = _find(results, self.section, self.row)
        return None if result is None else result.figures.get(self.figure)

    def met(self, figure: float) -> bool:
        """Whether the figure is small enough."""
        return figure <= self.limit


def _find(results: Sequence[Result], section: str, row: str) -> Result | None:
    return next((r for r in results if (r.section, r.name) == (section, row)), None)
