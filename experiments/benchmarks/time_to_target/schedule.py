"""The learning rate's schedule, the same for all optimisers."""

from typing import Any

import jax
import jax.numpy as jnp

WARM_UP, LAST = 0.05, 0.05


def rate_at(values: dict[str, Any], number: Any) -> jax.Array:
    """The learning rate of a step.

    ``η · min(1, (n + 1) / (w h)) · (f + (1 − f) (1 + cos(π min(1, n / h))) / 2)`` with
    the horizon ``h`` and ``w = f = 1/20``.
    """
    horizon = jnp.asarray(values["horizon"], jnp.float32)
    n = jnp.asarray(number, jnp.float32)
    warm = jnp.minimum(1.0, (n + 1) / jnp.maximum(1.0, WARM_UP * horizon))
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(1.0, n / horizon)))
    return values["learning_rate"] * warm * (LAST + (1 - LAST) * cosine)
