"""Peak memory and time of a training step against depth, each depth in a process of its own.

``python -m nodeshape._experiments.depth NETWORK ADJOINT DEPTH BATCH`` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from nodeshape._errors import UserError
from nodeshape._experiments.jobs import Job, Result, Store
from nodeshape._experiments.networks import build

STATUS = Path("/proc/self/status")
CLASSES, SIZE, METHOD = 3, 32, "euler"
REPEATS = 3


@dataclass(frozen=True)
class Depth(Job):
    """A training step (forward, loss, backward) of one network at one depth, explicit Euler where it has a solver.

    Attributes:
        network: ``"resnet"``, ``"rknet"`` or ``"ode"``.
        adjoint: gradient mode of the ODE-Net.
        depth: residual blocks, or steps.
        batch_size: images.
    """

    network: str
    adjoint: str
    depth: int
    batch_size: int
    alone: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    @property
    def seconds(self) -> float:
        return 5 + (1 + REPEATS) * self.batch_size * self.depth * (0.14e-3 if self.network == "ode" else 0.35e-3)

    def compute(self, store: Store) -> Result:
        """``peak_bytes`` (None where the system does not say) and ``seconds``."""
        arguments = [self.network, self.adjoint, str(self.depth), str(self.batch_size)]
        command = [sys.executable, "-m", "nodeshape._experiments.depth", *arguments]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
        result: Result = json.loads(done.stdout)
        return result


def measure(network: str, adjoint: str, depth: int, batch_size: int) -> Result:
    """Peak resident memory of a training step beyond that before it, and the median time of the steps after it."""
    torch.manual_seed(0)
    solver = {"method": METHOD, "adjoint": adjoint} if network == "ode" else {}
    model = build(network, CLASSES, depth, **solver)
    _step(model, 2)  # loads libraries and makes the gradients
    before = _memory("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    _step(model, batch_size)
    peak = _memory("VmHWM")
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        _step(model, batch_size)
        seconds.append(time.perf_counter() - start)
    grown = None if before is None or peak is None else peak - before
    return {"peak_bytes": grown, "seconds": statistics.median(seconds)}


def _step(model: nn.Module, batch_size: int) -> None:
    images = torch.rand(batch_size, 1, SIZE, SIZE)
    labels = torch.arange(batch_size) % CLASSES
    nn.functional.cross_entropy(model(images), labels).backward()


def _memory(name: str) -> int | None:
    """Bytes of a line of /proc/self/status: ``VmRSS`` is resident now, ``VmHWM`` at most so far."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    network, adjoint, depth, batch_size = sys.argv[1:]
    print(json.dumps(measure(network, adjoint, int(depth), int(batch_size))))
