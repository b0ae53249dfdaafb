"""Dynamics with a fused kernel: the right-hand side f(t, y) of dy/dt = f(t, y) as an ``nn.Module``.

The forward passes here are the readable reference of the C++ kernels. Time enters as an extra input channel, so that
the layers keep their usual shapes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._ode.fused import KERNELS, Kernel
from nodeshape._ode.program import STATE, TIME, Builder, Program, Ref

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

    Raises:
        ValueError: ``channels`` is not 1 to 32 or a multiple of 32.
    """

    __module__ = "nodeshape"

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

    Raises:
        ValueError: an unknown activation, or a width below 1.
    """

    __module__ = "nodeshape"

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


# ---- what the kernels take of them -----------------------------------------------------------------------------------
# These look into the modules' dictionaries, because this is most of what a small solve costs in Python.

#: What a layer is set to where a kernel computes it.
_SETTINGS: dict[type[nn.Module], tuple[tuple[str, Any], ...]] = {
    nn.GroupNorm: (("eps", 1e-5),),
    nn.Conv2d: (
        ("stride", (1, 1)),
        ("padding", (1, 1)),
        ("dilation", (1, 1)),
        ("groups", 1),
        ("padding_mode", "zeros"),
    ),
    nn.Linear: (),
}


def _conv_weights(dynamics: ConvDynamics, compiling: bool) -> list[Tensor] | str:
    modules = dynamics.__dict__["_modules"]
    if _is_altered(dynamics):
        return "ConvDynamics has hooks or a forward of its own"
    weights: list[Tensor] = []
    for name in ("norm1", "conv1", "norm2", "conv2", "norm3"):
        layer: Any = modules[name]
        layer_class: type[nn.Module] = nn.GroupNorm
        if name.startswith("conv"):
            if type(layer) is not _TimeConv or _is_altered(layer):
                return "a _TimeConv was replaced or has hooks"
            layer, layer_class = layer._modules["_layer"], nn.Conv2d
        own = _layer_weights(layer, layer_class, compiling)
        if isinstance(own, str):
            return own
        if layer_class is nn.GroupNorm and layer.num_groups != min(32, len(own[0])):
            return "the settings of a GroupNorm were changed"
        weights += own
    return weights


def _mlp_weights(dynamics: MLPDynamics, compiling: bool) -> list[Tensor] | str:
    modules = dynamics.__dict__["_modules"]
    activation = modules["_activate"]
    if type(activation) is not ACTIVATIONS.get(dynamics.__dict__["activation"]) or _is_altered(activation):
        return "its activation was replaced"
    if type(activation) is nn.Softplus and (activation.beta, activation.threshold) != (1, 20):
        return "its activation was replaced"
    if _is_altered(dynamics):
        return "MLPDynamics has hooks or a forward of its own"
    weights: list[Tensor] = []
    for layer in modules["layers"]._modules.values():
        own = _layer_weights(layer, nn.Linear, compiling)
        if isinstance(own, str):
            return own
        weights += own
    return weights


def _layer_weights(layer: Any, layer_class: type[nn.Module], compiling: bool) -> list[Tensor] | str:
    """Weight and bias of a layer of ``layer_class``; or why it may not compute what its class does."""
    if type(layer) is not layer_class or _is_altered(layer):
        return f"a {layer_class.__name__} was replaced or has hooks"
    attributes = layer.__dict__
    for name, value in _SETTINGS[layer_class]:
        if attributes[name] != value:
            return f"the settings of a {layer_class.__name__} were changed"
    weights = [attributes["_parameters"].get(name) for name in ("weight", "bias")]
    for name, x in zip(("weight", "bias"), weights):
        if x is None or (type(x) is not nn.Parameter and type(x) is not Tensor and not compiling):
            return f"the {name} of a {layer_class.__name__} is a {type(x).__name__}"
    return weights


def _is_altered(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own may change what the module's class computes."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


# ---- them as programs ------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
#: For each stage of ConvDynamics: the stage and the outputs of both convolutions; csrc/problem.h's kConvMapsKept.
MAPS_KEPT = 3


@lru_cache(maxsize=64)
def conv_program(state: Shape, shapes: tuple[Shape, ...]) -> Program:
    """ConvDynamics of a sample ``[channels, height, width]``, for parameters of these shapes.

    Raises:
        ValueError: they do not fit together.
    """
    channels, height, width = state
    if height < 1 or width < 1:
        raise ValueError(f"y0 has an empty feature map: a sample is {list(state)}")
    for number, shape in enumerate(shapes):
        expected = (channels, channels + 1, 3, 3) if number in (2, 6) else (channels,)
        if tuple(shape) != expected:
            raise ValueError(
                f"y0 has {channels} channels, so parameter {number} of ConvDynamics must be {list(expected)}, got"
                f" {list(shape)}"
            )
    builder = Builder([channels * height * width, 1])

    def norm(value: Ref) -> Ref:
        weight, bias = builder.weight(), builder.weight()
        pixels = height * width
        return builder.norm(value, state, min(32, channels), weight, bias, inner=pixels, count=channels)

    value = norm(Ref(STATE))
    for _ in range(2):
        active, joined = builder.unary("relu", value, state), builder.buffer((channels + 1, height, width))
        builder.move(Ref(TIME), (0, 0), joined, (width, 1), (height, width), "time")
        behind = Ref(joined.buffer, height * width)
        dense = (height * width, width, 1)
        builder.move(active, dense, behind, dense, state, "state")
        weight, bias = builder.weight(), builder.weight()
        maps = (channels + 1, height, width)
        value = norm(builder.conv(joined, maps, state, (3, 3), (1, 1), (1, 1), 1, weight, bias))
    return builder.finish(value, MAPS_KEPT)


@lru_cache(maxsize=64)
def mlp_program(state: Shape, shapes: tuple[Shape, ...], activation: str) -> Program:
    """MLPDynamics of a sample ``[dim]``, for parameters of these shapes.

    Raises:
        ValueError: they do not fit together.
    """
    (dim,) = state
    if not shapes:
        raise ValueError("MLPDynamics has no layers")
    inputs, layers = dim + 1, len(shapes) // 2
    builder = Builder([dim, 1])
    value = builder.buffer((inputs,))
    builder.move(Ref(STATE), (1,), value, (1,), (dim,), "state")
    builder.move(Ref(TIME), (1,), Ref(value.buffer, dim), (1,), (1,), "time")
    for layer in range(layers):
        outputs = dim if layer + 1 == layers else shapes[2 * layer][0]
        found = [tuple(shape) for shape in shapes[2 * layer : 2 * layer + 2]]
        if found != [(outputs, inputs), (outputs,)]:
            raise ValueError(
                f"y0 has {dim} components, so weight and bias of layers.{layer} must be {[outputs, inputs]} and"
                f" {[outputs]}, got {list(found[0])} and {list(found[1])}"
            )
        if layer > 0:
            value = builder.unary(activation, value, (inputs,), (1.0, 20.0) if activation == "softplus" else ())
        value = builder.linear(value, (outputs,), inputs, builder.weight(), builder.weight())
        inputs = outputs
    return builder.finish(value)


@torch.compiler.assume_constant_result
def _conv_constant(state: Shape, shapes: tuple[Shape, ...]) -> Program:
    return conv_program(state, shapes)


@torch.compiler.assume_constant_result
def _mlp_constant(state: Shape, shapes: tuple[Shape, ...], activation: str) -> Program:
    return mlp_program(state, shapes, activation)


def _conv_of(dynamics: ConvDynamics, weights: list[Tensor], y0: Tensor) -> Program:
    return _conv_constant(*_sizes(weights, y0))  # type: ignore[no-any-return]


def _mlp_of(dynamics: MLPDynamics, weights: list[Tensor], y0: Tensor) -> Program:
    return _mlp_constant(*_sizes(weights, y0), dynamics.__dict__["activation"])  # type: ignore[no-any-return]


def _sizes(weights: list[Tensor], y0: Tensor) -> tuple[Shape, tuple[Shape, ...]]:
    """Of a sample and of the weights."""
    if not torch.compiler.is_compiling():
        return y0.shape[1:], tuple([x.shape for x in weights])
    # The length of a range is a number to a compiler, which compiles anew for another; a size is none.
    return tuple([len(range(n)) for n in y0.shape[1:]]), tuple(
        [tuple([len(range(n)) for n in x.shape]) for x in weights]
    )


KERNELS[ConvDynamics] = Kernel(4, _conv_weights, _conv_of)
KERNELS[MLPDynamics] = Kernel(2, _mlp_weights, _mlp_of)
