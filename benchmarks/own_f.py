"""Time a user's own f beside torchdiffeq: ``python benchmarks/own_f.py [--fused] [--quick]``.

By itself f is one that no kernel knows; with ``--fused`` ours solves ``nodeshape.fuse(f, y0)``. Prints ratios,
torchdiffeq's time over ours (above 1 is better for us), medians of alternating runs on one thread: forward, a training
step against backpropagation through torchdiffeq, and against its adjoint method.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._benchmarking.timing import alternate

SAMPLES = {"quick": 9, "full": 41}


class MLP(nn.Module):
    """8-64-64-8, of the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(y)
        return out


class Conv(nn.Module):
    """Two 3×3 convolutions of 32 channels with SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(y)
        return out


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = SAMPLES["quick" if "--quick" in sys.argv else "full"]
    t = torch.tensor([0.0, 1.0])
    cases = [
        ("MLP 8-64-64-8, batch 1", MLP(), torch.randn(1, 8)),
        ("MLP 8-64-64-8, batch 128", MLP(), torch.randn(128, 8)),
        ("conv 32×8×8, batch 1", Conv(), torch.randn(1, 32, 8, 8)),
        ("conv 32×8×8, batch 64", Conv(), torch.randn(64, 32, 8, 8)),
    ]
    print("| f | method | forward | training, backpropagation | training, adjoint |\n|---|---|---|---|---|")
    for name, f, y0 in cases:
        start = y0.clone().requires_grad_()
        ours = ns.fuse(f, y0) if "--fused" in sys.argv else f

        def solve_ours(_: nn.Module, *arguments: Any, f: Any = ours, **how: Any) -> Any:
            return ns.odeint(f, *arguments, **how)

        for method in ("euler", "midpoint", "heun3", "rk4", "dopri5"):
            how = {"rtol": 1e-5, "atol": 1e-5} if method == "dopri5" else {"options": {"step_size": 0.05}}

            def forward(
                solve: Callable[..., Tensor], f: nn.Module = f, y0: Tensor = y0, how=how, method=method
            ) -> None:  # type: ignore[no-untyped-def]
                with torch.no_grad():
                    solve(f, y0, t, method=method, **how)

            def train(
                solve: Callable[..., Tensor], f: nn.Module = f, y0: Tensor = start, how=how, method=method
            ) -> None:  # type: ignore[no-untyped-def]
                f.zero_grad()
                solve(f, y0, t, method=method, **how)[-1].square().mean().backward()

            few = samples if "conv" not in name or "64" not in name else max(5, samples // 4)
            ratios = (
                alternate(lambda: forward(solve_ours), lambda: forward(torchdiffeq.odeint), few),
                alternate(lambda: train(solve_ours), lambda: train(torchdiffeq.odeint), few),
                alternate(lambda: train(solve_ours), lambda: train(torchdiffeq.odeint_adjoint), few),
            )
            print(f"| {name} | {method} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
