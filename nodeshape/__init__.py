"""Neural-ODE image classifiers: trained fast, exact gradients, exported to run anywhere onnxruntime runs.

The names below load on first use, so that ``nodeshape.predict`` runs without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodeshape._errors import ReversalDriftError as ReversalDriftError
    from nodeshape._errors import StageSolveError as StageSolveError
    from nodeshape._errors import StepSizeError as StepSizeError
    from nodeshape._exporting.module import ExportReport as ExportReport
    from nodeshape._exporting.module import to_onnx as to_onnx
    from nodeshape._exporting.module import to_pt2 as to_pt2
    from nodeshape._exporting.module import to_torchscript as to_torchscript
    from nodeshape._exporting.native import to_native as to_native
    from nodeshape._models.block import ODEBlock as ODEBlock
    from nodeshape._models.classifier import ShapeClassifier as ShapeClassifier
    from nodeshape._models.divergence import WithDivergence as WithDivergence
    from nodeshape._models.dynamics import ConvDynamics as ConvDynamics
    from nodeshape._models.dynamics import MLPDynamics as MLPDynamics
    from nodeshape._models.fewest_steps import FewestSteps as FewestSteps
    from nodeshape._models.fewest_steps import fewest_steps as fewest_steps
    from nodeshape._ode.backend import Backend as Backend
    from nodeshape._ode.backend import backend as backend
    from nodeshape._ode.brownian import BrownianPath as BrownianPath
    from nodeshape._ode.fuse import Fused as Fused
    from nodeshape._ode.fuse import fuse as fuse
    from nodeshape._ode.interpolation import DenseSolution as DenseSolution
    from nodeshape._ode.lowering import FuseError as FuseError
    from nodeshape._ode.odeint import odeint as odeint
    from nodeshape._ode.odeint import odeint_adjoint as odeint_adjoint
    from nodeshape._ode.odeint_event import odeint_event as odeint_event
    from nodeshape._ode.sde_fused import fuse_sde as fuse_sde
    from nodeshape._ode.sdeint import sdeint as sdeint
    from nodeshape._ode.stats import SolverStats as SolverStats
    from nodeshape._training.checkpoint import load_classifier as load_classifier

__version__ = "0.1.0"

_HOME = {
    "backend": "_ode.backend",
    "Backend": "_ode.backend",
    "fuse": "_ode.fuse",
    "Fused": "_ode.fuse",
    "FuseError": "_ode.lowering",
    "odeint": "_ode.odeint",
    "odeint_event": "_ode.odeint_event",
    "sdeint": "_ode.sdeint",
    "fuse_sde": "_ode.sde_fused",
    "BrownianPath": "_ode.brownian",
    "DenseSolution": "_ode.interpolation",
    "odeint_adjoint": "_ode.odeint",
    "ODEBlock": "_models.block",
    "FewestSteps": "_models.fewest_steps",
    "fewest_steps": "_models.fewest_steps",
    "WithDivergence": "_models.divergence",
    "ConvDynamics": "_models.dynamics",
    "MLPDynamics": "_models.dynamics",
    "ShapeClassifier": "_models.classifier",
    "ExportReport": "_exporting.module",
    "to_native": "_exporting.native",
    "to_onnx": "_exporting.module",
    "to_pt2": "_exporting.module",
    "to_torchscript": "_exporting.module",
    "load_classifier": "_training.checkpoint",
    "SolverStats": "_ode.stats",
    "StageSolveError": "_errors",
    "StepSizeError": "_errors",
    "ReversalDriftError": "_errors",
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
