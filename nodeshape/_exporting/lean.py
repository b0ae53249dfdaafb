"""Modules that compute the same numbers in fewer operations while they are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nodeshape._models.dynamics import ConvDynamics
from nodeshape._models.norm import PooledNorm
from nodeshape._ode.fused import KERNELS


@contextmanager
def lean(module: nn.Module, native: bool = False) -> Iterator[None]:
    """Within, a module in evaluation mode computes the same as before in fewer operations.

    Its ``ConvDynamics`` have their time and scales in the weights, batch normalisations theirs in the layers before.
    If it is ``native``, dynamics stay as they are, since kernels know theirs by their modules.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    shared: dict[nn.Module, nn.Module] = {}
    try:
        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):
                if not native and child is not None and type(child) is ConvDynamics and _is_its_class(child):
                    replaced.append((parent, name, child))
                    parent._modules[name] = shared.setdefault(child, LeanConvDynamics(child))
            if type(parent) is nn.Sequential:
                replaced += _absorb(parent)
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child


def _is_its_class(dynamics: ConvDynamics) -> bool:
    """Whether it computes what its class does, in float32."""
    weights = KERNELS[ConvDynamics].weights(dynamics, False)
    return not isinstance(weights, str) and all(x is not None and x.dtype is torch.float32 for x in weights)


class LeanConvDynamics(nn.Module):
    """``ConvDynamics`` whose time channel, shifts and scales are in the convolutions or in one map added to each.

    A convolution of [t, y] is a convolution of y plus t times a map that the weights alone decide, a map and not a
    number per channel because of the padding. A scale g and shift b before a ReLU are relu(g n + b) = g (max(n, −b/g) +
    b/g) where g > 0 and g (min(n, −b/g) + b/g) where g < 0, so that g goes into the weights and b/g into the map.
    """

    def __init__(self, dynamics: ConvDynamics) -> None:
        super().__init__()
        self.groups = dynamics.norm1.num_groups
        self.convs = nn.ModuleList()
        for norm, conv in ((dynamics.norm1, dynamics.conv1), (dynamics.norm2, dynamics.conv2)):
            self.convs.append(_BoundedConv(norm, conv._layer))
        self.scale: Tensor
        self.shift: Tensor
        last = dynamics.norm3
        self.register_buffer("scale", last.weight.detach().reshape(-1, 1, 1).clone())
        self.register_buffer("shift", last.bias.detach().reshape(-1, 1, 1).clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt at time ``t`` and state ``y``."""
        for conv in self.convs:
            y = conv(t, nn.functional.group_norm(y, self.groups))
        return nn.functional.group_norm(y, self.groups) * self.scale + self.shift


class _BoundedConv(nn.Module):
    """conv([t, relu(g n + b)]) of a normalised n, ``[batch, channels, height, width]``."""

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        super().__init__()
        g, b = norm.weight.detach().double(), norm.bias.detach().double()
        flat = g == 0
        edge = torch.where(flat, 0.0, -b / torch.where(flat, 1.0, g))
        self.low: Tensor
        self.high: Tensor
        infinite = torch.full_like(edge, torch.inf)
        self.register_buffer("low", torch.where(g >= 0, edge, -infinite).float().reshape(-1, 1, 1))
        self.register_buffer("high", torch.where(g <= 0, edge, infinite).float().reshape(-1, 1, 1))
        self.bounded_above = bool((g <= 0).any())
        weight = conv.weight.detach().double()
        per_channel = weight[:, 1:]
        self.weight: Tensor
        self.register_buffer("weight", (per_channel * g.reshape(-1, 1, 1)).float())
        # What is added where t is 0 and 1: one number per channel and place, of which borders differ.
        rest = torch.where(flat, b.clamp_min(0.0), b)  # g (n + b/g) at n = 0
        self.still: Tensor
        self.moving: Tensor
        self.register_buffer("still", (per_channel * rest.reshape(-1, 1, 1)).sum(dim=1, keepdim=True).float())
        self.register_buffer("moving", weight[:, :1].float().clone())
        assert conv.bias is not None
        self.bias: Tensor
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, t: Tensor, n: Tensor) -> Tensor:
        """Convolve."""
        n = torch.maximum(n, self.low)
        if self.bounded_above:
            n = torch.minimum(n, self.high)
        # Of a constant; what runs the file computes it once, and it takes no place in it.
        ones = torch.ones(1, 1, *n.shape[2:])
        added = nn.functional.conv2d(ones, self.still + t * self.moving, self.bias, padding=1)
        return nn.functional.conv2d(n, self.weight, padding=1) + added


def _absorb(layers: nn.Sequential) -> list[tuple[nn.Module, str, nn.Module]]:
    """Take batch normalisations into the convolutions and linear layers beside them; what was replaced."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(name: str, new: nn.Module) -> None:
        old = layers._modules[name]
        assert old is not None
        replaced.append((layers, name, old))
        layers._modules[name] = new

    names = list(layers._modules)
    for i, name in enumerate(names):
        norm = _batch_norm(layers._modules[name])
        if norm is None:
            continue
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.detach().double()
        before = [layers._modules[x] for x in names[:i]]
        pooled = bool(before) and type(before[-1]) is nn.MaxPool2d and bool((scale > 0).all())
        at = i - 2 if pooled else i - 1
        if at >= 0 and type(before[at]) is nn.Conv2d:  # the largest of several is scaled as each is
            replace(names[at], _scaled(before[at], scale, shift))
            replace(name, nn.Identity())
        elif i + 1 < len(names) and type(layers._modules[names[i + 1]]) is nn.Linear:
            replace(names[i + 1], _shifted(layers._modules[names[i + 1]], scale, shift))
            replace(name, nn.Identity())
    return replaced


def _batch_norm(module: nn.Module | None) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
    """The batch normalisation by running statistics that a module is, if it is one."""
    norm = module.norm if type(module) is PooledNorm else module
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
        return None
    return None if norm.training or norm.running_mean is None else norm


def _scaled(conv: nn.Module | None, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """The convolution, then scaled and shifted."""
    assert isinstance(conv, nn.Conv2d)
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        dtype=conv.weight.dtype,
    )
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    with torch.no_grad():
        new.weight.copy_(conv.weight.double() * scale.reshape(-1, 1, 1, 1))
        assert new.bias is not None
        new.bias.copy_(bias * scale + shift)
    return new.eval().requires_grad_(False)


def _shifted(linear: nn.Module | None, scale: Tensor, shift: Tensor) -> nn.Linear:
    """The linear layer of what is scaled and shifted."""
    assert isinstance(linear, nn.Linear)
    new = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    weight = linear.weight.detach().double()
    bias = 0.0 if linear.bias is None else linear.bias.detach().double()
    with torch.no_grad():
        new.weight.copy_(weight * scale)
        new.bias.copy_(bias + weight @ shift)
    return new.eval().requires_grad_(False)
