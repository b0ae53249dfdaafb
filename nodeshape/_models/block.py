"""``ODEBlock``: an ODE solve as a layer, features in, features at the final time out."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nodeshape._ode.odeint import odeint
from nodeshape._ode.stats import SolverStats
from nodeshape._ode.unrolled import is_exporting

DEFAULT_STEP_SIZE = 0.05


class ODEBlock(nn.Module):
    """Carry features from t=0 to t=1 along dy/dt = dynamics(t, y).

    Args:
        dynamics: module ``dynamics(t, y)``.
        method: any of :func:`nodeshape.odeint`.
        step_size: of equal steps (default 0.05 if neither steps nor tolerances are given).
        steps: number of equal steps, instead of ``step_size``.
        adjoint: ``"discrete"``, ``"reversible"`` or ``"continuous"``, see :func:`nodeshape.odeint`.
        rtol, atol: choose steps by error control instead.
        eval_rtol, eval_atol: other tolerances for evaluation mode.
        options: of :func:`nodeshape.odeint`.
        augment: features, or channels, of zeros that are appended to dimension 1 before the solve, so that trajectories
            have room to pass each other (Dupont et al., arXiv:1904.01681); the result keeps them.

    Attributes:
        stats: of the latest forward pass, with its backward pass once that has run; None before.

    Shapes: features ``[batch, n, ...]`` to ``[batch, n + augment, ...]``, which ``dynamics`` takes.

    Raises:
        ValueError: a setting of the solver is out of its range, or features of one dimension are to be augmented.

    A forward pass raises what :func:`nodeshape.odeint` raises.
    """

    __module__ = "nodeshape"
    if TYPE_CHECKING:

        def __call__(self, y: Tensor) -> Tensor: ...

    def __init__(
        self,
        dynamics: nn.Module,
        method: str = "euler",
        step_size: float | None = None,
        steps: int | None = None,
        adjoint: str = "discrete",
        rtol: float | None = None,
        atol: float | None = None,
        eval_rtol: float | None = None,
        eval_atol: float | None = None,
        options: Mapping[str, Any] | None = None,
        augment: int = 0,
    ) -> None:
        super().__init__()
        if type(augment) is not int or augment < 0:
            raise ValueError(f"augment must be a number of features, 0 or more, got {augment!r}")
        given = (
            step_size,
            steps,
            rtol,
            atol,
            eval_rtol,
            eval_atol,
            *map((options or {}).get, ("step_size", "grid_constructor")),
        )
        if all(x is None for x in given):
            step_size = DEFAULT_STEP_SIZE
        self.dynamics = dynamics
        self.method = method
        self.step_size = step_size
        self.steps = steps
        self.adjoint = adjoint
        self.rtol, self.atol = rtol, atol
        self.eval_rtol, self.eval_atol = eval_rtol, eval_atol
        self.options = dict(options or {})
        self.augment = augment
        self.stats: SolverStats | None = None
        self._check()

    def forward(self, y: Tensor) -> Tensor:
        """Map features ``y`` at t=0, with zeros for those to augment, to features at t=1.

        Under autocast the solve stays in float32: rounding to 16 bits in every step would add up over the steps.
        """
        if torch.is_autocast_enabled(y.device.type):
            with torch.autocast(y.device.type, enabled=False):
                return self.forward(y.float())
        if self.augment:
            if y.dim() < 2:
                raise ValueError(f"augment takes features [batch, n, ...], got shape {list(y.shape)}")
            y = torch.cat([y, y.new_zeros(y.shape[0], self.augment, *y.shape[2:])], dim=1)
        rtol, atol = self.rtol, self.atol
        if not self.training:
            rtol = rtol if self.eval_rtol is None else self.eval_rtol
            atol = atol if self.eval_atol is None else self.eval_atol
        found: Any = odeint(
            self.dynamics,
            y,
            (0.0, 1.0),
            method=self.method,
            steps=self.steps,
            step_size=self.step_size,
            rtol=rtol,
            atol=atol,
            adjoint=self.adjoint,
            options=self.options,
            return_stats=not is_exporting(),  # whose tensors are no module's to keep
        )
        if isinstance(found, Tensor):
            return found[-1]
        ys, self.stats = found
        end: Tensor = ys[-1]
        return end

    def __prepare_scriptable__(self) -> ODEBlock:
        raise RuntimeError(
            "torch.jit.script cannot take an ODEBlock, whose solver is Python: use ns.to_torchscript(module,"
            " example_inputs, path), whose file torch.jit.load and other scripted modules take"
        )

    def with_solver(
        self, method: str | None = None, steps: int | None = None, step_size: float | None = None
    ) -> ODEBlock:
        """The same dynamics, weights shared, under another method or number of steps (``step_size``: their length)."""
        block = sharing_weights(self)
        if method is not None:
            block.method = method
        if steps is not None or step_size is not None:
            block.steps, block.step_size = steps, step_size
        block.stats = None
        block._check()
        return block

    def extra_repr(self) -> str:
        """The solver, for ``print(model)``."""
        size = f"steps={self.steps}" if self.steps is not None else f"step_size={self.step_size}"
        augment = f", augment={self.augment}" if self.augment else ""
        return f"method={self.method!r}, {size}, adjoint={self.adjoint!r}{augment}"

    def _check(self) -> None:
        """Let odeint judge the settings now rather than in the first forward pass."""
        zero = torch.zeros(1)
        odeint(
            lambda t, y: y,
            zero,
            zero,
            method=self.method,
            steps=self.steps,
            step_size=self.step_size,
            rtol=self.rtol,
            atol=self.atol,
            adjoint=self.adjoint,
            options=self.options,
        )


Module = TypeVar("Module", bound=nn.Module)


def sharing_weights(module: Module) -> Module:
    """A copy of a module and all modules in it that holds the very parameters and buffers of the original.

    ``train()``, ``eval()``, hooks and replaced submodules concern one of the two only; a weight that changes in place
    changes in both. Scripted modules, which cannot be taken apart, are shared as they are.
    """
    copies: dict[nn.Module, nn.Module] = {}  # a module under two names stays one

    def of(original: nn.Module) -> nn.Module:
        if isinstance(original, torch.jit.ScriptModule):
            return original
        if original not in copies:
            if "dynamo_ctx" in original.__dict__:  # torch.compile's module, which calls the one that it was made with
                compiled: Any = type(original)
                copies[original] = compiled(of(original.__dict__["_modules"]["_orig_mod"]), original.dynamo_ctx)
                return copies[original]
            copies[original] = _own_dictionaries(original)
            children = copies[original].__dict__["_modules"]
            children.update({name: of(child) for name, child in children.items() if child is not None})
        return copies[original]

    return cast("Module", of(module))


def _own_dictionaries(original: nn.Module) -> nn.Module:
    """A module whose attributes are the original's, but for dictionaries and sets, which are copies.

    Those of parameters and buffers stay the very same, so that ``.to()`` of one module moves all the weights of both.
    Not ``copy.copy``, which a parametrised module refuses.
    """
    copied = type(original).__new__(type(original))
    for name, value in original.__dict__.items():
        own = isinstance(value, (dict, set)) and name not in ("_parameters", "_buffers")
        copied.__dict__[name] = copy(value) if own else value
    copied.__dict__["_compiled_call_impl"] = None  # of module.compile(), bound to the original
    return copied
