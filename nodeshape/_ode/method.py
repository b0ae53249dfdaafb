"""The three methods: one-stage Runge–Kutta methods that differ in a single number, theta.

    stage    Y       = y_k + theta h f(t_k + theta h, Y)
    update   y_{k+1} = y_k + h f(t_k + theta h, Y)

The method whose theta is ``1 - theta``, run with ``-h`` from ``y_{k+1}``, passes through the same stage and returns to
``y_k``: it is the adjoint method (Hairer, Lubich & Wanner, *Geometric Numerical Integration*, II.3).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A one-stage Runge–Kutta method.

    Attributes:
        name: the word users type.
        theta: where in the step the stage lies, 0 (start), 1/2 (middle) or 1 (end).
        order: of convergence for smooth problems.
    """

    name: str
    theta: float
    order: int

    @property
    def explicit(self) -> bool:
        """Whether the stage needs no equation to be solved."""
        return self.theta == 0.0


METHODS = {
    method.name: method
    for method in (
        Method("euler", theta=0.0, order=1),
        Method("implicit_euler", theta=1.0, order=1),
        Method("implicit_midpoint", theta=0.5, order=2),
    )
}


def get_method(name: str | Method) -> Method:
    """Return the method called ``name``; raise ValueError naming the known ones if there is none."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
