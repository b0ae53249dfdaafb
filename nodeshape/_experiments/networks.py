"""What the ODE-Net is compared with: a ResNet and an RK-Net of the same stem and head (Chen et al., table 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._models.classifier import ShapeClassifier
from nodeshape._models.dynamics import ConvDynamics
from nodeshape._ode.stats import SolverStats

NETWORKS = {"resnet": "ResNet", "rknet": "RK-Net", "ode": "ODE-Net"}
RESIDUAL_BLOCKS = 6


def build(network: str, num_classes: int, depth: int, **solver: Any) -> ShapeClassifier:
    """A classifier whose middle is ``depth`` residual blocks, unrolled Euler steps, or steps of an ``ODEBlock``.

    Args:
        network: ``"resnet"``, ``"rknet"`` or ``"ode"``.
        num_classes: number of logits.
        depth: residual blocks, or steps of the solver.
        solver: of the ``ODEBlock``: ``method``, ``adjoint``.
    """
    if network == "ode":
        return ShapeClassifier(num_classes, steps=depth, **solver)
    model = ShapeClassifier(num_classes)
    middle = ResidualBlocks(model.width, depth) if network == "resnet" else UnrolledEuler(model.width, depth)
    model.ode = middle  # type: ignore[assignment]  # which only needs forward and stats
    return model


class ResidualBlock(nn.Module):
    """y + f(y), where f has the layers of :class:`ConvDynamics` without the time channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = min(32, channels)

        def norm() -> nn.Module:
            return nn.GroupNorm(groups, channels)

        def conv() -> nn.Module:
            return nn.Conv2d(channels, channels, kernel_size=3, padding=1)

        self.layers = nn.Sequential(norm(), nn.ReLU(), conv(), norm(), nn.ReLU(), conv(), norm())

    def forward(self, y: Tensor) -> Tensor:
        """Map features to features of the same shape."""
        out: Tensor = y + self.layers(y)
        return out


class ResidualBlocks(nn.Module):
    """``depth`` residual blocks, each with its own weights.

    Attributes:
        stats: evaluations of a block, as :class:`nodeshape.ODEBlock` counts those of f.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))
        self.stats = _stats(depth)

    def forward(self, y: Tensor) -> Tensor:
        """Map features to features of the same shape."""
        out: Tensor = self.blocks(y)
        return out


class UnrolledEuler(nn.Module):
    """``depth`` explicit Euler steps from t=0 to t=1 in plain PyTorch, whose gradient autograd takes step by step.

    Attributes:
        stats: evaluations of f.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.dynamics, self.depth = ConvDynamics(channels), depth
        self.stats = _stats(depth)

    def forward(self, y: Tensor) -> Tensor:
        """Map features at t=0 to features at t=1."""
        for t in torch.arange(self.depth) / self.depth:
            y = y + self.dynamics(t, y) / self.depth
        return y


def _stats(evaluations: int) -> SolverStats:
    stats = SolverStats.zeros(1, torch.device("cpu"))
    stats.nfe_forward += evaluations
    stats.nfe_backward += evaluations
    return stats
