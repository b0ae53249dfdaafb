"""Ctrl-C during a long solve, and solves that do not fit into memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import nodeshape as ns
from nodeshape._ode import fused

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))

SCRIPT = """
import time, torch, nodeshape as ns
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, t, y):
        return self.net(y)

f, y0 = {case}
with torch.no_grad():
    ns.odeint(f, y0, [0.0, 1.0], method="euler", steps=1)
    print("ready", flush=True)
    ns.odeint(f, y0, [0.0, 1.0], method="euler", steps=10_000_000)
"""


@pytest.mark.parametrize(
    "case",
    [
        "ns.ConvDynamics(8), torch.zeros(40, 8, 8, 8)",
        "ns.ConvDynamics(64), torch.zeros(1, 64, 16, 16)",
        "ns.MLPDynamics(2, (16,)), torch.zeros(1000, 2)",
        "ns.fuse(Net(), torch.zeros(2, 3)), torch.zeros(1000, 3)",
    ],
    ids=["conv", "one map", "mlp", "program"],
)
def test_ctrl_c_ends_a_long_solve(case: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(case=case)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)  # a second on a machine of one's own
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("adjoint", ["discrete", "reversible"])
def test_a_handler_that_does_not_raise_leaves_the_solve_right(adjoint: str) -> None:
    f = ns.MLPDynamics(2, (16,))
    t = torch.tensor([0.0, 1.0])
    y0 = torch.randn(500, 2)

    def solved() -> list[torch.Tensor]:
        start = y0.clone().requires_grad_()
        ys = ns.odeint(f, start, t, method="euler", steps=4000, adjoint=adjoint, options={"drift_tolerance": 1e3})
        return [ys.detach(), *torch.autograd.grad(ys[-1].sum(), (start, *f.parameters()))]

    expected, signals = solved(), []
    before = signal.signal(signal.SIGINT, lambda *_: signals.append(1))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.03) and len(signals) < 3:
            signal.raise_signal(signal.SIGINT)

    disturber = threading.Thread(target=disturb)
    try:
        disturber.start()
        while len(signals) < 3:
            found = solved()
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    finally:
        stop.set()
        disturber.join()
        signal.signal(signal.SIGINT, before)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(y)
        return out


@pytest.mark.parametrize("kind", ["conv", "mlp", "program"])
def test_what_does_not_fit_is_said_before_it_begins(kind: str) -> None:
    f, y0 = {
        "conv": lambda: (ns.ConvDynamics(64), torch.zeros(100, 64, 8, 8)),
        "mlp": lambda: (ns.MLPDynamics(8, (16,)), torch.zeros(50_000, 8)),
        "program": lambda: (ns.fuse(Wide(), torch.zeros(2, 8)), torch.zeros(50_000, 8)),
    }[kind]()
    message = r"would keep .* GB for the backward pass and .* GB are free: use adjoint='reversible'"
    with pytest.raises(MemoryError, match=message):
        ns.odeint(f, y0.requires_grad_(), [0.0, 1.0], method="euler", steps=10_000_000)
