"""What a computation reads out of its inputs into Python, where a record would hold it as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nodeshape._ode.unrolled import Unrolled

#: What makes numbers of a tensor.
NUMBERS = {
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__complex__,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
}
#: What says yes or no of one.
DECISIONS = {
    Tensor.__bool__,
    Tensor.__contains__,
    Tensor.allclose,
    Tensor.equal,
    Tensor.is_nonzero,
    torch.allclose,
    torch.equal,
    torch.is_nonzero,
}


@dataclass(frozen=True)
class Read:
    """Something that was read out of a tensor.

    Attributes:
        where: ``file:line`` of whoever reads.
        value: what.
        of_inputs: whether it follows from the inputs.
        decides: whether it only says yes or no, as a check does that stops bad inputs.
        times: whether it is the times of a solve.
    """

    where: str
    value: Any
    of_inputs: bool
    decides: bool
    times: bool


class Reads(TorchFunctionMode):
    """Within, what is read out of tensors, in order, and whether it follows from ``inputs``."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: list[Read] = []
        self._follow = {id(x): x for x in inputs}  # kept, so that no other gets their number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do as told, take down what is read, and what follows from what."""
        result = func(*args, **(kwargs or {}))
        follows = any(id(x) in self._follow for x in pytree.tree_leaves((args, kwargs)))
        if follows:
            changed = args[:1] if func is Tensor.__setitem__ else ()
            self._follow.update((id(x), x) for x in pytree.tree_leaves((result, changed)) if isinstance(x, Tensor))
        if func in NUMBERS or func in DECISIONS:
            times = sys._getframe(1).f_code is Unrolled.known.__code__
            self.found.append(Read(_reader(), result, follows, func in DECISIONS, times))
        return result


def _reader() -> str:
    """The innermost line of whoever reads a tensor that is neither PyTorch's nor of this package, if there is one."""
    inside = (Path(__file__).parents[1], Path(torch.__file__).parent)
    frame = sys._getframe(2)
    found = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        found = f"{path.name}:{frame.f_lineno}"
        if not any(path.is_relative_to(folder) for folder in inside):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return found


def different(reads: Sequence[Read], others: Sequence[Read]) -> str | None:
    """Where the first is read that is not the same in both, or by one only; None where all are."""
    for x, y in zip(reads, others):
        a, b = np.asarray(x.value), np.asarray(y.value)
        rounded = a.dtype.kind in "fc"
        same = a.shape == b.shape and (np.allclose(a, b, 1e-4, 0, equal_nan=True) if rounded else bool((a == b).all()))
        if not same:
            return x.where
    if len(reads) == len(others):
        return None
    return max(reads, others, key=len)[min(len(reads), len(others))].where


def others(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inputs of the same kind with other numbers: in the same order, of the other sign, large, all alike."""
    changes: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (lambda x: 0.75 * x + 0.3, lambda x: x + 1),
        (lambda x: x.sgn() * x.abs().sqrt(), lambda x: x + 2),
        (lambda x: -x - 0.1, lambda x: x.flip(0) if x.dim() else x // 2),
        (lambda x: 100.0 * x, lambda x: x // 2),
        (torch.ones_like, torch.ones_like),
    ]
    for number, whole in changes:
        yield [
            ~x
            if x.dtype is torch.bool
            else (number if x.is_floating_point() or x.is_complex() else whole)(x).to(x.dtype)
            for x in inputs
        ]
