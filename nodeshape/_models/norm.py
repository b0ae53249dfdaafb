"""Batch normalisation of pooled features, and of batches that several processes share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class PooledNorm(nn.Module):
    """Batch normalisation of ``[batch, features]`` in which a batch of one image, having no spread, is left out.

    It is normalised by the running statistics, as in evaluation; the last batch of an epoch may be one image.

    Attributes:
        shared: whether other processes hold more of the batch, so that ``norm`` has to judge.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training and not self.shared and len(x) == 1:
            return nn.functional.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        normalised: Tensor = norm(x)
        return normalised


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SharedBatchNorm(_BatchNorm):
    """Batch normalisation with the mean and variance of all processes' samples, on CPU and GPU.

    PyTorch's SyncBatchNorm does this on GPUs only. Each process contributes count, sum and sum of squares (in float64,
    where their difference is exact enough), summed in a way that gradients pass through. A batch of a single value,
    which has no spread, is normalised by the running statistics.
    """

    @classmethod
    def of(cls, layer: _BatchNorm) -> SharedBatchNorm:
        """The same layer, its parameters and buffers shared."""
        shared = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        shared._parameters, shared._buffers = layer._parameters, layer._buffers
        return shared.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[batch, channels, ...]``, of which the batch may be empty here."""
        if not self.training:
            return super().forward(x)
        y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        own, others, shape = y.numel() // y.shape[1], [0, *range(2, y.dim())], (-1, *[1] * (y.dim() - 2))
        mean = y.sum(dim=others) / max(own, 1)
        spread = (y - mean.view(shape)).square().sum(dim=others).double()
        mean = mean.double()
        total, squares, count = _Sum.apply(
            torch.stack([mean * own, spread + own * mean.square(), torch.full_like(mean, own)])
        )
        if count[0] <= 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        mean = total / count
        variance = squares / count - mean.square()
        self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        scale = self.weight * (variance + self.eps).rsqrt().to(y.dtype)
        shift = self.bias - mean.to(y.dtype) * scale
        normalised: Tensor = (y * scale.view(shape) + shift.view(shape)).to(x.dtype)
        return normalised

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two on will do."""

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
