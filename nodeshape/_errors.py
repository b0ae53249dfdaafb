"""The errors that nodeshape raises for others to catch. Imports nothing of the package."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user, told in one line that says what to change. Anything else that is raised is a bug."""


class StageSolveError(RuntimeError):
    """An implicit stage was not solved to its tolerance."""

    __module__ = "nodeshape"


class StepSizeError(RuntimeError):
    """Error control could not reach the end of the interval."""

    __module__ = "nodeshape"


class ReversalDriftError(RuntimeError):
    """The trajectory rebuilt for a ``reversible`` gradient left the one that was solved."""

    __module__ = "nodeshape"
