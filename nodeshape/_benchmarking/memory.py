"""Peak memory of a training step, in bytes of live tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nodeshape as ns


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every storage made inside it while it lives.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._track(x.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


STATE_BYTES = 256 * 32 * 8


def bytes_of_training_step(method: str, adjoint: str, steps: int, **options: Any) -> tuple[int, int]:
    """Forward, loss and backward of one tanh layer on a state ``[256, 32]`` in float64.

    Args:
        options: of :func:`nodeshape.odeint`.

    Returns:
        the peak, and what is held between the forward and the backward pass.
    """
    torch.manual_seed(0)
    weight = nn.Parameter(0.1 * torch.randn(32, 32, dtype=torch.float64))
    y0 = torch.randn(256, 32, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0])
    with PeakMemory() as memory:
        solve: Any = {"method": method, "steps": steps, "adjoint": adjoint, "options": options}
        ys = ns.odeint(lambda t, y: torch.tanh(y @ weight), y0, t, **solve)
        held = memory.live
        ys[-1].square().sum().backward()
    return memory.peak, held
