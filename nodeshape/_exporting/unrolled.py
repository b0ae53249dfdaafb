"""The classifier as a fixed computation of plain operators, to script and export: no solver, no loop that stops early.

An implicit stage gets a fixed number of evaluations of f, spent as ``_ode/stage.py`` spends them: on Anderson
acceleration, sample by sample, where a sample that has reached the tolerance stays put.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from nodeshape._models.classifier import ShapeClassifier
from nodeshape._models.dynamics import ConvDynamics
from nodeshape._ode.method import get_method
from nodeshape._ode.options import steps_of
from nodeshape._ode.stage import DEPENDENT, STAGE_TOLERANCE


class UnrolledClassifier(nn.Module):
    """A trained classifier whose ODE is solved by equal steps, each with the same number of evaluations of f.

    Args:
        model: in evaluation mode, on the CPU; its weights are copied.
        iterations: evaluations of f in the stage of an implicit method; an explicit one takes 1.

    Shapes: images ``[batch, in_channels, image_size, image_size]`` in [0, 1] to logits ``[batch, num_classes]``.

    Raises:
        ValueError: the model chooses its steps by error control, or its method cannot take ``iterations``.
    """

    def __init__(self, model: ShapeClassifier, iterations: int = 1) -> None:
        super().__init__()
        if model.ode.steps is None and model.ode.step_size is None:
            raise ValueError(
                "an exported classifier takes a fixed number of steps, this one's are chosen by error control: give it"
                " a number, by --steps or model.with_solver(steps=...)"
            )
        method = get_method(model.ode.method)
        self.stem, self.head = deepcopy(model.stem), deepcopy(model.head)
        self.steps = model.ode.steps or steps_of(1.0, model.ode.step_size or 1.0)
        with torch.no_grad():
            features = model.stem(torch.zeros(1, model.in_channels, model.image_size, model.image_size))
            self.step = UnrolledStep(model.ode.dynamics, features.shape, method.theta, 1.0 / self.steps, iterations)
        times = [(k + method.theta) / self.steps for k in range(self.steps)]
        self.times: Tensor
        self.register_buffer("times", torch.tensor(times, dtype=torch.float32))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        y = self.stem(image)
        slope = torch.zeros_like(y)
        for k in range(self.steps):
            y, slope = self.step(y, slope, self.times[k])
        logits: Tensor = self.head(y)
        return logits


class UnrolledTrajectory(nn.Module):
    """An :class:`UnrolledClassifier` that also returns the states, ``[batch, steps + 1, channels, height, width]``."""

    def __init__(self, model: UnrolledClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a batch of images, and the states from t=0 to t=1."""
        y = self.model.stem(image)
        slope = torch.zeros_like(y)
        states = [y]
        for k in range(self.model.steps):
            y, slope = self.model.step(y, slope, self.model.times[k])
            states.append(y)
        return self.model.head(y), torch.stack(states, dim=1)


class UnrolledStep(nn.Module):
    """One step of the theta family: ``(y, slope of the previous step, t of the stage)`` to ``(y, slope)`` after it.

    Args:
        dynamics: f.
        shape: of a batch of states.
        theta, h: of the method and its step.
        iterations: evaluations of f.
    """

    def __init__(self, dynamics: nn.Module, shape: torch.Size, theta: float, h: float, iterations: int) -> None:
        super().__init__()
        if iterations < 1 or (theta == 0.0 and iterations != 1):
            raise ValueError(f"iterations must be 1 for an explicit method and at least 1 for others, got {iterations}")
        if not isinstance(dynamics, ConvDynamics):
            raise ValueError(f"only a ConvDynamics can be exported, got {type(dynamics).__name__}")
        self.dynamics = _UnrolledDynamics(dynamics, shape)
        self.h, self.c, self.iterations = h, theta * h, iterations
        self.tolerance, self.dependent = STAGE_TOLERANCE[torch.float32], DEPENDENT

    def forward(self, y: Tensor, slope: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Step from ``y``."""
        slope = self.dynamics(t, y) if self.c == 0.0 else self.stage(y, slope, t)
        return y + self.h * slope, slope

    def stage(self, base: Tensor, slope: Tensor, t: Tensor) -> Tensor:
        """F(Y) of the stage Y = base + c F(Y), started from base + c slope; see ``anderson_stage``."""
        value = base + self.c * slope
        slope = self.dynamics(t, value)
        residual = base + self.c * slope - value
        directions: list[Tensor] = []  # orthonormal differences of residuals
        moves: list[Tensor] = []  # the matching steps of the iterate
        for _ in range(1, self.iterations):
            size = torch.maximum(_dot(base, base), _dot(value, value))
            moving = _dot(residual, residual) > self.tolerance**2 * size
            step = residual
            for q, x in zip(directions, moves):
                step = step - _dot(q, residual) * (x + q)
            moved = torch.where(moving, step, torch.zeros_like(step))
            value = value + moved
            slope = self.dynamics(t, value)
            latest = base + self.c * slope - value

            difference = torch.where(moving, latest - residual, torch.zeros_like(step))
            residual = latest
            q, x = difference, moved
            for old_q, old_x in zip(directions, moves):
                overlap = _dot(old_q, q)
                q, x = q - overlap * old_q, x - overlap * old_x
            # A difference within the span of the older ones, or of a sample that stays put, teaches nothing.
            whole, length = _dot(difference, difference).sqrt(), _dot(q, q).sqrt()
            useful = length > self.dependent * whole
            scale = torch.where(useful, 1.0 / torch.where(useful, length, torch.ones_like(length)), 0.0)
            directions.append(q * scale)
            moves.append(x * scale)
        return slope


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The dot product of each sample's states, ``[batch, 1, 1, 1]``."""
    return (x * y).sum(dim=[1, 2, 3], keepdim=True)


class _UnrolledDynamics(nn.Module):
    """``ConvDynamics`` with its time channel taken out of the convolutions.

    A convolution of [t, y] is a convolution of y plus t times a map that the weights alone decide; a map and not a
    number per channel, because of the padding.
    """

    def __init__(self, dynamics: ConvDynamics, shape: torch.Size) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = map(deepcopy, (dynamics.norm1, dynamics.norm2, dynamics.norm3))
        self.conv1, map1 = _split_time(dynamics.conv1._layer, shape)
        self.conv2, map2 = _split_time(dynamics.conv2._layer, shape)
        self.map1: Tensor
        self.map2: Tensor
        self.register_buffer("map1", map1)
        self.register_buffer("map2", map2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(y))) + t * self.map1
        y = self.conv2(torch.relu(self.norm2(y))) + t * self.map2
        out: Tensor = self.norm3(y)
        return out


def _split_time(layer: nn.Conv2d, shape: torch.Size) -> tuple[nn.Conv2d, Tensor]:
    """The convolution without its first input channel, and what that channel adds where it is 1: ``[1, C, H, W]``."""
    channels = shape[1]
    conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
    conv.weight = nn.Parameter(layer.weight[:, 1:].detach().clone())
    assert layer.bias is not None
    conv.bias = nn.Parameter(layer.bias.detach().clone())
    ones = torch.ones(1, 1, *shape[2:])
    return conv, torch.nn.functional.conv2d(ones, layer.weight[:, :1].detach(), padding=1)
