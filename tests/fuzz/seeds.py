"""Programs that solve.cpp begins with, in its numbers: python tests/fuzz/seeds.py FOLDER."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_fuse import CASES, problem

import nodeshape as ns
from nodeshape._ode.method import METHODS
from nodeshape._ode.program_op import tableau_of

#: Method, adjoint, states kept per step, steps between checkpoints.
SOLVES = (
    ("euler", 1, 0, 0),
    ("implicit_midpoint", 2, 0, 1),
    ("implicit_euler", 3, 0, 0),
    ("rk4", 1, -1, 0),
    ("trbdf2", 1, 3, 0),
)


def number(value: float) -> bytes:
    """As solve.cpp reads it: one byte, or eight behind one."""
    if value == int(value) and -120 <= value <= 127:
        return struct.pack("b", int(value))
    return b"\x80" + struct.pack("<q" if isinstance(value, int) else "<d", value)


def written(f: nn.Module, y0: Tensor, method: str, double: bool, adjoint: int, kept: int, every: int) -> bytes:
    """One solve of a fused f."""
    weights = f.weights_for(y0)
    assert not isinstance(weights, str), weights
    packed, tableau = f.pack(y0), tableau_of(METHODS[method])[0]
    numbers = [int(double), adjoint, kept, every, 20, 1e-3, 0.5]
    numbers += [3, 0.0, 0.5, 1.0, 2, 1, 2, packed.dim(), *packed.shape]
    numbers += [tableau.shape[1] - 1, *tableau.reshape(-1).tolist(), len(weights), *(x.numel() for x in weights)]
    constants, code = f.program.constants.tolist(), f.program.code.tolist()
    return b"".join(map(number, [*numbers, len(constants), *constants, len(code), *code]))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    problems = {name: problem(name, 3) for name in CASES}
    problems["conv dynamics, small"] = ns.ConvDynamics(2).double(), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    for name, (f, y0) in problems.items():
        fused = ns.fuse(f, y0)
        if len(fused.program.code) >= 1200 or len(fused.program.constants) >= 100:
            continue
        for k, (method, *scheme) in enumerate(SOLVES):
            (folder / f"{name.replace(' ', '-')}-{k}").write_bytes(written(fused, y0, method, True, *scheme))
    print(f"{len(list(folder.iterdir()))} seeds in {folder}")


if __name__ == "__main__":
    main()
