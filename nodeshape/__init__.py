"""Neural-ODE image classifiers: trained fast, exact gradients, exported to run anywhere onnxruntime runs.

The names below load on first use, so that ``nodeshape.predict`` runs without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodeshape._backend import Backend as Backend
    from nodeshape._backend import backend as backend
    from nodeshape._block import ODEBlock as ODEBlock
    from nodeshape._checkpoint import load_classifier as load_classifier
    from nodeshape._classifier import ShapeClassifier as ShapeClassifier
    from nodeshape._dynamics import ConvDynamics as ConvDynamics
    from nodeshape._dynamics import MLPDynamics as MLPDynamics
    from nodeshape._error_control import StepSizeError as StepSizeError
    from nodeshape._fewest_steps import FewestSteps as FewestSteps
    from nodeshape._fewest_steps import fewest_steps as fewest_steps
    from nodeshape._odeint import odeint as odeint
    from nodeshape._odeint import odeint_adjoint as odeint_adjoint
    from nodeshape._stage import StageSolveError as StageSolveError
    from nodeshape._stats import SolverStats as SolverStats
    from nodeshape._sweep import ReversalDriftError as ReversalDriftError

__version__ = "0.1.0"

_HOME = {
    "backend": "_backend",
    "Backend": "_backend",
    "odeint": "_odeint",
    "odeint_adjoint": "_odeint",
    "ODEBlock": "_block",
    "FewestSteps": "_fewest_steps",
    "fewest_steps": "_fewest_steps",
    "ConvDynamics": "_dynamics",
    "MLPDynamics": "_dynamics",
    "ShapeClassifier": "_classifier",
    "load_classifier": "_checkpoint",
    "SolverStats": "_stats",
    "StageSolveError": "_stage",
    "StepSizeError": "_error_control",
    "ReversalDriftError": "_sweep",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nodeshape' has no attribute {name!r}")
    value = getattr(import_module(f"nodeshape.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
