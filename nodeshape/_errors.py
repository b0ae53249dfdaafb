"""The errors that nodeshape raises for others to catch. Imports nothing of the package."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user, told in one line that says what to change. Anything else that is raised is a bug."""


class StageSolveError(RuntimeError):
    """An implicit stage was not solved to its tolerance.

    The message says how many samples failed, at which time and step, by how much, and what to change.
    """

    __module__ = "nodeshape"


class StepSizeError(RuntimeError):
    """Error control could not reach the end of an interval of ``t`` within ``min_step`` and ``max_steps``."""

    __module__ = "nodeshape"


class ReversalDriftError(RuntimeError):
    """The trajectory rebuilt for a ``"reversible"`` gradient left the one that was solved, by the drift it names."""

    __module__ = "nodeshape"
