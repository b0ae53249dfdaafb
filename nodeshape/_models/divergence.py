"""``WithDivergence``: a flow with the divergence of its field beside it, as continuous normalising flows need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

TRACES = ("exact", "hutchinson")
NOISES = ("rademacher", "gaussian")


class WithDivergence(nn.Module):
    """f of one state as dynamics of a tuple: (y, log density, …), with what regularises a flow as further states.

    Along dy/dt = f(t, y) the log density of samples changes by d log p(y(t))/dt = −∇·f (Chen et al., arXiv:1806.07366,
    theorem 1). So with ``z, change = odeint(flow, flow.state(x), t)[:2]``, at the last time, log p(x) is
    log p(z) − change. ``ns.fuse(flow, flow.state(x))`` solves all of it in the kernel, where f lowers.

    Args:
        f: module or function ``f(t, y)`` that treats each sample by itself.
        trace: ``"exact"``: the sum over the diagonal of the Jacobian, a vector–Jacobian product for each element of a
            sample. ``"hutchinson"``: εᵀJε, one product for all; right in the mean over ε (Hutchinson 1990; Grathwohl et
            al., arXiv:1810.01367). ε is a state, so that it is the same during a solve and new for each
            :meth:`state`.
        kinetic: a state that grows by ``|f|²``, the kinetic energy.
        jacobian: a state that grows by the squared Frobenius norm of the Jacobian, or by its estimate ``|εᵀJ|²``. Their
            means keep a flow straight and so cheap to solve (Finlay et al., arXiv:2002.02798, equation 9).
        noise: of ``"hutchinson"``, ``"rademacher"`` (ε = ±1, of least variance) or ``"gaussian"``.

    Shapes: y and dy/dt ``[batch, ...]``; the other states ``[batch, 1]``, but for ε, the last, which is like y.

    Raises:
        ValueError: an unknown ``trace`` or ``noise``; y of one dimension; f returns another shape than it was given.
    """

    __module__ = "nodeshape"
    if TYPE_CHECKING:

        def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        trace: str = "exact",
        kinetic: bool = False,
        jacobian: bool = False,
        noise: str = "rademacher",
    ) -> None:
        super().__init__()
        for name, value, known in (("trace", trace, TRACES), ("noise", noise, NOISES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        self.f = f
        self.trace, self.kinetic, self.jacobian, self.noise = trace, kinetic, jacobian, noise

    def state(self, y: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The state to solve from: ``y``, zeros for all that grows, and of ``"hutchinson"`` a new ε."""
        if y.dim() < 2:
            raise ValueError(f"y must be [batch, ...], got shape {list(y.shape)}")
        zeros = [y.new_zeros(y.shape[0], 1) for _ in range(1 + self.kinetic + self.jacobian)]
        if self.trace == "exact":
            return y, *zeros
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        if self.noise == "rademacher":
            noise = torch.where(noise < 0, -1.0, 1.0).to(y.dtype)
        return y, *zeros, noise

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The derivative of each state."""
        y, last = state[0], state[-1]
        expected = 2 + self.kinetic + self.jacobian + (self.trace == "hutchinson")
        if len(state) != expected or y.dim() < 2 or any(x.dim() < 2 for x in state[1:]):
            shapes = ", ".join(str(list(x.shape)) for x in state)
            raise ValueError(f"the state must be the {expected} tensors of WithDivergence.state(y), got {shapes}")
        made: Any = torch.func.vjp(lambda y: self.f(t, y), y)
        dy, pulled = made
        if dy.shape != y.shape:
            raise ValueError(f"f must return the shape of y, {list(y.shape)}, it returned {list(dy.shape)}")
        if self.trace == "hutchinson":
            rows = [(last, pulled(last)[0])]
        else:
            size = y[0].numel()
            units = torch.eye(size, dtype=y.dtype, device=y.device).reshape(size, *y.shape[1:])
            rows = [(unit.expand_as(y), pulled(unit.expand_as(y))[0]) for unit in units.unbind()]
        trace = _sums([unit * row for unit, row in rows])
        out: list[Tensor] = [dy, -trace]
        if self.kinetic:
            out.append(_sums([dy * dy]))
        if self.jacobian:
            out.append(_sums([row * row for _, row in rows]))
        if self.trace == "hutchinson":
            out.append(torch.zeros_like(last))
        return tuple(out)

    def extra_repr(self) -> str:
        """The settings, for ``print(flow)``."""
        return f"trace={self.trace!r}, kinetic={self.kinetic}, jacobian={self.jacobian}"


def _sums(terms: list[Any]) -> Tensor:
    """The sum of all over each sample, ``[batch, 1]``."""
    total: Tensor = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.flatten(1).sum(1, keepdim=True)
