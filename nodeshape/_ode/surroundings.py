"""What f depends on besides: random numbers, autocast, and the weights, buffers and mode of its modules.

A backward pass that evaluates f again does so among the surroundings of the forward pass, and leaves none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """Random state and buffers before a step; equal ones are the same objects."""

    random: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]


class Surroundings:
    """The modules of f, watched from the first step of a solve to its backward pass.

    Args:
        func: f; its modules are found where it is one, holds some, or closes over some.
        device: of the state, whose random numbers count besides the CPU's.
    """

    def __init__(self, func: Callable[..., Any], device: torch.device) -> None:
        self._device = device
        self._modules = list(dict.fromkeys(x for module in modules_of(func) for x in module.modules()))
        self._modes = [module.training for module in self._modules]
        self._parameters = [dict(module._parameters) for module in self._modules]
        self._buffer_names = [
            (module, name) for module in self._modules for name, x in module._buffers.items() if x is not None
        ]
        self._frozen = [x for x in self._tensors() if not x.requires_grad]
        self._frozen_versions = [x._version for x in self._frozen]
        kind = device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._latest: Snapshot | None = None
        self._seen: list[tuple[int, int]] = []

    def snapshot(self) -> Snapshot:
        """What a step is about to see."""
        random = self._random()
        buffers = [module._buffers[name] for module, name in self._buffer_names]
        seen = [(id(x), x._version) for x in buffers if x is not None]
        last = self._latest
        if last is not None and seen == self._seen:
            kept = last.buffers
        else:
            kept, self._seen = tuple(x.detach().clone() for x in buffers if x is not None), seen
        if last is not None and all(map(torch.equal, random, last.random)):
            random = last.random
        if last is None or random is not last.random or kept is not last.buffers:
            self._latest = last = Snapshot(random, kept)
        return last

    def check_weights(self) -> None:
        """Raise RuntimeError if weights without gradients, which autograd does not watch, have changed in place."""
        if [x._version for x in self._frozen] != self._frozen_versions:
            raise RuntimeError(
                "a frozen weight of func has been changed in place since the forward pass, so the gradient would be"
                " wrong: call backward() before changing it, or use adjoint='discrete', which keeps what it needs"
            )

    @contextmanager
    def restored(self) -> Iterator[Callable[[Snapshot | None], None]]:
        """A context in which modules have the weights and mode of the forward pass; yields what restores a snapshot."""
        random = self._random()
        modes = [module.training for module in self._modules]
        parameters = [dict(module._parameters) for module in self._modules]
        buffers = [module._buffers[name] for module, name in self._buffer_names]
        try:
            for module, mode, own in zip(self._modules, self._modes, self._parameters):
                module.training = mode
                module._parameters.update(own)
            enabled, kind = self._autocast
            with torch.autocast(self._device.type, dtype=kind, enabled=enabled):
                yield self._restore
        finally:
            self._set_random(random)
            for module, mode, own in zip(self._modules, modes, parameters):
                module.training = mode
                module._parameters.update(own)
            for (module, name), x in zip(self._buffer_names, buffers):
                module._buffers[name] = x

    def _restore(self, snapshot: Snapshot | None) -> None:
        if snapshot is None:
            return
        self._set_random(snapshot.random)
        for (module, name), x in zip(self._buffer_names, snapshot.buffers):
            module._buffers[name] = x.clone()  # which f may change, as it did in the forward pass

    def _random(self) -> tuple[Tensor, ...]:
        if self._device.type == "cuda":
            return torch.get_rng_state(), torch.cuda.get_rng_state(self._device)
        return (torch.get_rng_state(),)

    def _set_random(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    def _tensors(self) -> list[Tensor]:
        return [x for module in self._modules for x in module._parameters.values() if x is not None]


def modules_of(func: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a function is, is bound to, closes over, or holds as attributes, in lists and dictionaries."""
    if isinstance(func, nn.Module):
        return [func]
    if depth == 0 or func is None or isinstance(func, (Tensor, str, bytes, int, float, complex, type)):
        return []
    inner: list[Any] = []
    if isinstance(func, partial):
        inner += [func.func, *func.args, *func.keywords.values()]
    elif isinstance(func, (list, tuple)):
        inner += func
    elif isinstance(func, dict):
        inner += func.values()
    else:
        inner.append(getattr(func, "__self__", None))
        for cell in getattr(func, "__closure__", None) or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                continue
        inner += getattr(func, "__dict__", {}).values()
    return list(dict.fromkeys(module for x in inner for module in modules_of(x, depth - 1)))
