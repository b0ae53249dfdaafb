"""The fused dynamics written in JAX, for diffrax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from nodeshape._dynamics import ConvDynamics, MLPDynamics

_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "softplus": jax.nn.softplus, "silu": jax.nn.silu}


def parameters(dynamics: ConvDynamics | MLPDynamics) -> list[Any]:
    """The parameters as JAX arrays, in the module's order."""
    return [jnp.asarray(x.detach().numpy()) for x in dynamics.parameters()]


def field(dynamics: ConvDynamics | MLPDynamics) -> Callable[[Any, Any, Any], Any]:
    """``f(t, y, parameters)``."""
    if isinstance(dynamics, ConvDynamics):
        return _conv_field
    activate = _ACTIVATIONS[dynamics.activation]

    def mlp_field(t: Any, y: Any, weights: Any) -> Any:
        y = jnp.concatenate([y, jnp.full_like(y[:, :1], t)], axis=1)
        for i in range(0, len(weights), 2):
            y = (y if i == 0 else activate(y)) @ weights[i].T + weights[i + 1]
        return y

    return mlp_field


def _conv_field(t: Any, y: Any, weights: Any) -> Any:
    norm1, conv1, norm2, conv2, norm3 = (weights[i : i + 2] for i in range(0, 10, 2))
    y = _conv(t, jax.nn.relu(_group_norm(y, *norm1)), *conv1)
    y = _conv(t, jax.nn.relu(_group_norm(y, *norm2)), *conv2)
    return _group_norm(y, *norm3)


def _conv(t: Any, y: Any, weight: Any, bias: Any) -> Any:
    y = jnp.concatenate([jnp.full_like(y[:, :1], t), y], axis=1)
    y = jax.lax.conv_general_dilated(y, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + bias[:, None, None]


def _group_norm(y: Any, weight: Any, bias: Any) -> Any:
    groups = y.reshape(y.shape[0], min(32, y.shape[1]), -1)
    centred = groups - groups.mean(axis=2, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5)
    return normal.reshape(y.shape) * weight[:, None, None] + bias[:, None, None]
