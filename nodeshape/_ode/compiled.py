"""Steps that torch.compile has made one function of: ``options={"compile": True}``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.field import Field, State
from nodeshape._ode.method import Method
from nodeshape._ode.step import end, stages

#: One step: ``(y, times of the stages, h) -> y at its end``.
Step = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]

#: The latest functions and methods with their steps; a function is held, so that its id stays its own.
_KEPT: OrderedDict[tuple[Any, ...], tuple[Any, Step]] = OrderedDict()
MOST_KEPT = 32


def compiled_step(func: Callable[[Tensor, Any], Any], y0: State, method: Method) -> Step:
    """A step of an explicit method, compiled when it is first taken."""
    field = Field(func, y0)  # of its own, which knows nothing of one solve
    key = (id(func), method.name, field.layout)
    if key not in _KEPT:

        def evaluate(t: Tensor, y: Tensor) -> Tensor:
            return field.evaluate(t, y.clone())  # which f may change

        def step(y: Tensor, times: Sequence[Tensor], h: Tensor) -> Tensor:
            return end(method, y, h, stages(evaluate, method, y, times, h))

        _KEPT[key] = func, torch.compile(step)
        if len(_KEPT) > MOST_KEPT:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key][1]
