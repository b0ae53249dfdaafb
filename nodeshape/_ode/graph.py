"""Autograd's record of a computation: what it was computed from, and Jacobians by products with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


def refuse_untracked(out: Tensor, known: Sequence[Tensor]) -> None:
    """Raise RuntimeError if ``out``, a value of f, was computed from a tensor that gets no gradient.

    Args:
        known: the tensors that get one.
    """
    ids = {id(x) for x in known}
    if any(id(x) not in ids for x in leaves(out)):
        raise RuntimeError(
            "func depends on a tensor that is not among its parameters, nor used by its first evaluation, so the"
            " gradient would lack it: make func an nn.Module that owns it, pass adjoint_params=[every tensor func"
            " depends on], or use adjoint='discrete'"
        )
