"""What a computation reads out of tensors into Python, and would read of other inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: What makes numbers of a tensor, which a trace holds as they were.
READS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__complex__,
    Tensor.__array__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
}


class Reads(TorchFunctionMode):
    """Within, what is read out of tensors, in order: ``(file:line of whoever reads, what)``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do as told, and take down what is read."""
        result = func(*args, **(kwargs or {}))
        if func in READS:
            self.found.append((_reader(), result))
        return result


def _reader() -> str:
    """The innermost line of whoever reads a tensor that is neither PyTorch's nor of this package, if there is one."""
    ours = Path(__file__).parents[1]
    frame = sys._getframe(2)
    found = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        found = f"{path.name}:{frame.f_lineno}"
        if not path.is_relative_to(ours) and "torch" not in path.parts:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return found


def different(reads: Sequence[tuple[str, Any]], others: Sequence[tuple[str, Any]]) -> str | None:
    """Where the first is read that is not the same in both; None where all are."""
    for (where, x), (_, y) in zip(reads, others):
        if not np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind in "fc"):
            return where
    if len(reads) == len(others):
        return None
    return max(reads, others, key=len)[min(len(reads), len(others))][0]


def others(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inputs of the same kind with other numbers: smaller ones, in the same order, and ones of the other sign."""
    for fraction, whole, truth in (
        (lambda x: x * 0.75, lambda x: x // 2, lambda x: x),
        (lambda x: -x, lambda x: x.flip(0) if x.dim() else x, lambda x: ~x),
    ):
        kinds: dict[bool | None, Callable[[Tensor], Tensor]] = {True: fraction, False: whole, None: truth}
        yield [kinds[None if x.dtype is torch.bool else x.is_floating_point() or x.is_complex()](x) for x in inputs]
