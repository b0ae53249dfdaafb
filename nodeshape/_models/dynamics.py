"""Dynamics with a fused kernel: the right-hand side f(t, y) of dy/dt = f(t, y) as an ``nn.Module``.

The forward passes here are the readable reference of the C++ kernels. Time enters as an extra input channel, so that
the layers keep their usual shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus, "silu": nn.SiLU}


class _TimeConv(nn.Module):
    """A 3×3 convolution of [t, y], the time channel first.

    The parameters are called ``_layer.weight`` and ``_layer.bias``, as in torchdiffeq's MNIST example, so that weights
    trained there load here.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._layer = nn.Conv2d(channels + 1, channels, kernel_size=3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time = torch.ones_like(y[:, :1]) * t
        out: Tensor = self._layer(torch.cat([time, y], dim=1))
        return out


class ConvDynamics(nn.Module):
    """GN–ReLU–Conv3×3–GN–ReLU–Conv3×3–GN, the ODE function of Chen et al.'s MNIST network (arXiv:1806.07366, sec. 3).

    Args:
        channels: of the state; GroupNorm uses ``min(32, channels)`` groups, which must divide it.

    Shapes: ``t`` is a scalar, ``y`` and the result are ``[batch, channels, height, width]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = min(32, channels)
        if channels < 1 or channels % groups:
            raise ValueError(f"channels must be 1 to 32 or a multiple of 32, got {channels}")
        self.channels = channels
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = _TimeConv(channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = _TimeConv(channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt at time ``t`` and state ``y``."""
        y = self.conv1(t, torch.relu(self.norm1(y)))
        y = self.conv2(t, torch.relu(self.norm2(y)))
        y = self.norm3(y)
        return y


class MLPDynamics(nn.Module):
    """A chain of Linear layers and activations on [y, t], the last layer linear.

    Args:
        dim: size of the state.
        hidden: widths of the hidden layers; ``()`` is one linear layer, dy/dt = W [y, t] + b.
        activation: ``"tanh"``, ``"relu"``, ``"softplus"`` or ``"silu"``.

    Shapes: ``t`` is a scalar, ``y`` and the result are ``[batch, dim]`` (or ``[dim]``).
    """

    def __init__(self, dim: int, hidden: tuple[int, ...] = (64,), activation: str = "tanh") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if dim < 1 or any(width < 1 for width in hidden):
            raise ValueError(f"dim and hidden widths must be at least 1, got dim={dim}, hidden={tuple(hidden)}")
        self.dim = dim
        self.activation = activation
        widths = [dim + 1, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self._activate = ACTIVATIONS[activation]()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt at time ``t`` and state ``y``."""
        time = torch.ones_like(y[..., :1]) * t
        y = torch.cat([y, time], dim=-1)
        for i, layer in enumerate(self.layers):
            y = layer(y if i == 0 else self._activate(y))
        return y
