"""The user's f(t, y) as a function of rows: one flat row per sample, whatever the state's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]
Time = float | Tensor  # one number for the batch, or one per sample, [samples]


class System:
    """dy/dt = f(t, y) on rows ``[samples, size]``.

    The first dimension of the state is the batch if every tensor of the state has at least two dimensions and the same
    first size; otherwise the whole state is one sample.

    Attributes:
        samples, size: of the rows.
        parameters: what f depends on and that requires grad. If not given: the parameters of f, if it is a module, and
            every leaf of the graph of the first evaluation; None before that.
    """

    def __init__(self, func: Callable[[Tensor, Any], Any], y0: State, parameters: Sequence[Tensor] | None) -> None:
        self._func = func
        self._tuple = isinstance(y0, tuple)
        tensors = y0 if isinstance(y0, tuple) else (y0,)
        self._shapes = [x.shape for x in tensors]
        self._batched = all(x.dim() >= 2 and x.shape[0] == tensors[0].shape[0] for x in tensors)
        self.samples = tensors[0].shape[0] if self._batched else 1
        self._sizes = [prod(x.shape[1:]) if self._batched else x.numel() for x in tensors]
        self.size = sum(self._sizes)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self.discovers = parameters is None
        self.parameters = None if parameters is None else tuple(x for x in parameters if x.requires_grad)

    def rows(self, state: State) -> Tensor:
        """Flatten a state into ``[samples, size]``."""
        tensors = state if isinstance(state, tuple) else (state,)
        flat = [x.reshape(self.samples, size) for x, size in zip(tensors, self._sizes)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def state(self, rows: Tensor) -> State:
        """Undo :meth:`rows`; leading dimensions before ``[samples, size]`` are kept."""
        lead = rows.shape[:-2]
        parts = torch.split(rows, self._sizes, dim=-1)
        tensors = tuple(x.reshape((*lead, *shape)) for x, shape in zip(parts, self._shapes))
        return tensors if self._tuple else tensors[0]

    def time(self, t: Time) -> Tensor:
        """A time in the dtype and on the device of the state."""
        if isinstance(t, Tensor):
            return t.to(self.dtype)
        return torch.tensor(t, dtype=self.dtype, device=self.device)

    def __call__(self, t: Time, rows: Tensor) -> Tensor:
        """Evaluate f at time ``t``, a number or one per sample."""
        time = self.time(t)
        if self.parameters is not None:
            return self._evaluate(time, rows)
        # The first evaluation also finds what f depends on, so that no extra one is spent on it.
        with torch.enable_grad():
            out = self._evaluate(time.detach(), rows.detach())
        own = self._func.parameters() if isinstance(self._func, nn.Module) else ()
        self.parameters = tuple(dict.fromkeys((*(x for x in own if x.requires_grad), *leaves(out))))
        return out.detach()

    def _evaluate(self, time: Tensor, rows: Tensor) -> Tensor:
        rows = rows.contiguous()  # the adjoint's are a part of wider rows, which group normalisation under vmap refuses
        if time.dim():
            each: Tensor = torch.func.vmap(self._one_sample)(time, rows)
            return each
        out = self._func(time, self.state(rows))
        self._check(out)
        return self.rows(out)

    def _one_sample(self, time: Tensor, row: Tensor) -> Tensor:
        """f of one sample [size], which f itself sees as a batch of one."""
        parts = torch.split(row, self._sizes)
        shapes = [(1, *shape[1:]) if self._batched else shape for shape in self._shapes]
        tensors = tuple(x.reshape(shape) for x, shape in zip(parts, shapes))
        out = self._func(time, tensors if self._tuple else tensors[0])
        outs = out if isinstance(out, tuple) else (out,)
        for x, expected in zip(outs, tensors):
            if x.shape != expected.shape:
                raise ValueError("f does not take one sample at a time")
        return torch.cat([x.reshape(-1) for x in outs])

    def separable(self, t: float, rows: Tensor) -> bool:
        """Whether f, given one sample alone, returns what it returns for it in the batch. Evaluates f twice."""
        times = torch.full((self.samples,), t, dtype=self.dtype, device=self.device)
        try:
            alone = self(times, rows)
        except Exception:  # whatever vmap or f itself objects to: the answer is no
            return False
        together = self(t, rows)
        finite = torch.isfinite(alone).all(dim=1) & torch.isfinite(together).all(dim=1)
        difference = (alone - together).abs().amax(dim=1)[finite]
        size = together.abs().amax(dim=1)[finite]
        return bool((difference <= 1e-3 * size + 1e-6 * size.sum()).all())

    def jacobian(self, t: Time, rows: Tensor) -> Tensor:
        """∂f/∂y of every sample, ``[samples, size, size]``."""
        times = self.time(t).expand(self.samples)
        try:
            each: Tensor = torch.func.vmap(torch.func.jacrev(self._one_sample, argnums=1))(times, rows)
            return each
        except Exception:  # f mixes batch-sized constants or resists vmap
            return jacobian_by_rows(lambda y: self(t, y), rows)

    def _check(self, out: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        shapes = [tuple(x.shape) for x in outs]
        expected = [tuple(s) for s in self._shapes]
        if self._tuple != isinstance(out, tuple) or shapes != expected:
            raise ValueError(f"func must return dy/dt in the shapes of y: it got {expected} and returned {shapes}")


class Linearisation:
    """f at one point, with its vector–Jacobian products: one evaluation serves all of them."""

    def __init__(self, system: System, t: Time, rows: Tensor, with_time: bool) -> None:
        self._parameters = system.parameters or ()
        with torch.enable_grad():
            self._t = system.time(t).detach().requires_grad_(with_time)
            self._y = rows.detach().requires_grad_()
            self._f = system(self._t, self._y)
        if system.discovers:
            self._refuse_untracked_leaves(t)
        self.value = self._f.detach()

    def _refuse_untracked_leaves(self, t: Time) -> None:
        """Raise if f depends on something here that it did not depend on when its parameters were looked for."""
        known = {id(x) for x in (self._t, self._y, *self._parameters)}
        if any(id(x) not in known for x in leaves(self._f)):
            raise RuntimeError(
                "func depends on a tensor that its first evaluation did not use, so the gradient would lack it: make"
                " func an nn.Module that owns it, or pass adjoint_params=[every tensor func depends on]"
            )

    def transposed(self, w: Tensor) -> Tensor:
        """wᵀ ∂f/∂y, ``[samples, size]``."""
        to_y: Tensor = self._products(w, [self._y])[0]
        return to_y

    def products(self, w: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """wᵀ ∂f/∂y, wᵀ ∂f/∂t (scalar, or ``[samples]``; None unless asked for) and wᵀ ∂f/∂p for each parameter."""
        inputs = [self._y, *([self._t] if self._t.requires_grad else []), *self._parameters]
        to_y, *rest = self._products(w, inputs)
        to_t = rest.pop(0) if self._t.requires_grad else None
        return to_y, to_t, rest

    def _products(self, w: Tensor, inputs: list[Tensor]) -> list[Any]:
        if not self._f.requires_grad:
            grads: list[Any] = [None] * len(inputs)
        else:
            # Graphs built outside f may be shared between evaluations, so none is freed here.
            grads = list(torch.autograd.grad(self._f, inputs, w, retain_graph=True, allow_unused=True))
        if grads[0] is None and inputs[0] is self._y:
            grads[0] = torch.zeros_like(self._y)
        if len(grads) > 1 and self._t.requires_grad and grads[1] is None:
            grads[1] = torch.zeros_like(self._t)
        return grads


def jacobian_by_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The Jacobian of every sample, ``[samples, size, size]``, one vector–Jacobian product a component."""
    with torch.enable_grad():
        point = rows.detach().requires_grad_()
        out = function(point)
        if not out.requires_grad:
            return rows.new_zeros(*rows.shape, rows.shape[1])
        grads = [
            torch.autograd.grad(out[:, i].sum(), point, retain_graph=True, allow_unused=True)[0]
            for i in range(rows.shape[1])
        ]
    return torch.stack([torch.zeros_like(rows) if x is None else x for x in grads], dim=1)


def leaves(out: Tensor, end: Tensor | None = None) -> tuple[Tensor, ...]:
    """The leaf tensors that ``out`` was computed from and that require grad, in the order of a depth-first walk.

    What ``end`` was computed from does not count.
    """
    if out.requires_grad and out.grad_fn is None:
        return (out,)
    found: dict[Tensor, None] = {}
    seen = set() if end is None or end.grad_fn is None else {end.grad_fn}
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[leaf] = None
        stack.extend(parent for parent, _ in reversed(node.next_functions))
    return tuple(found)
