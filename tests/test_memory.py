"""Solves leave no memory behind: a server that solves for weeks stays as small as it was after its first solves.

Each case runs in a process of its own, whose resident memory nothing else moves.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nodeshape._ode import fused

pytestmark = [
    pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing)),
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2"),
]

SCRIPT = """
import ctypes, gc, os, sys
import torch
from torch import nn
import nodeshape as ns

torch.set_num_threads(1)
torch.manual_seed(0)
name, ways = sys.argv[1], [way.split(":") for way in sys.argv[2:]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, t, y):
        return self.net(y)


f, shape = {
    "fused": lambda: (ns.fuse(Net(), torch.zeros(2, 8)), (8,)),
    "mlp": lambda: (ns.MLPDynamics(2, (16,)), (2,)),
    "conv": lambda: (ns.ConvDynamics(4), (4, 3, 3)),
}[name]()
arguments = {"method": "euler", "steps": 2}
starts = [torch.randn(batch, *shape) for batch in (1, 7, 2, 33, 64, 3)]
assert ns.backend(f, starts[0], **arguments).name == "fused"
t = torch.tensor([0.0, 1.0])


def forward(y0):
    with torch.no_grad():
        ns.odeint(f, y0, t, **arguments)


def training(y0):
    f.zero_grad()
    ns.odeint(f, y0, t, **arguments).sum().backward()


def fails(y0):
    try:
        ns.odeint(f, y0, t, steps=2, options={"max_stage_iterations": 1, "stage_tolerance": 1e-12})
    except ns.StageSolveError:
        return
    raise AssertionError("solved")


class Heap(ctypes.Structure):  # of glibc's mallinfo2()
    names = "arena ordblks smblks hblks mapped usmblks fsmblks used fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def memory():
    # Bytes resident, and bytes that malloc has given out: a small leak first fills the holes of the heap.
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap
    heap = mallinfo()
    return resident, heap.used + heap.mapped


def run(way, solves):
    solve = {"forward": forward, "training": training, "fails": fails}[way]
    for k in range(solves):
        solve(starts[k % len(starts)])
    gc.collect()
    return memory()


for way, _ in ways:
    run(way, 1000)
for way, solves in ways:
    before = run(way, 1000)
    print(max(now - then for now, then in zip(run(way, int(solves)), before)))
"""


def growth(name: str, *ways: str) -> list[int]:
    """Bytes by which memory grows in each of ``ways`` ("forward:10000"), after two thousand such solves."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, name, *ways]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in out.split()]


@pytest.mark.parametrize("name", ["fused", "mlp", "conv"])
def test_memory_stays_flat(name: str) -> None:
    # A string of 54 bytes that leaks in each of 10,000 solves is half a megabyte.
    forward, training, failed = growth(name, "forward:10000", "training:5000", "fails:1000")
    assert max(forward, training, failed) <= 384 << 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "mlp", "conv"])
def test_memory_stays_flat_in_a_hundred_thousand_solves(name: str) -> None:
    assert max(growth(name, "forward:100000", "training:20000", "fails:5000")) <= 1 << 20
