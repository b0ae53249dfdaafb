"""MLPDynamics written in JAX, for diffrax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from nodeshape._models.dynamics import MLPDynamics

_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "softplus": jax.nn.softplus, "silu": jax.nn.silu}


def parameters(dynamics: MLPDynamics) -> list[Any]:
    """The parameters as JAX arrays, in the module's order."""
    return [jnp.asarray(x.detach().numpy()) for x in dynamics.parameters()]


def field(dynamics: MLPDynamics) -> Callable[[Any, Any, Any], Any]:
    """``f(t, y, parameters)``."""
    activate = _ACTIVATIONS[dynamics.activation]

    def f(t: Any, y: Any, weights: Any) -> Any:
        y = jnp.concatenate([y, jnp.full_like(y[:, :1], t)], axis=1)
        for i in range(0, len(weights), 2):
            y = (y if i == 0 else activate(y)) @ weights[i].T + weights[i + 1]
        return y

    return f
