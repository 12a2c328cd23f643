"""Gates: work that a step does only where a flag is true."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array


def gated(flag: Array, function: Callable[[Any], Any], carry: Any) -> Any:
    """``function(carry)`` if ``flag``, else ``carry``, in place.

    A loop of at most one turn: XLA updates the carry of a ``while`` in its own buffers,
    where both branches of a ``cond`` would write a copy of everything they return.
    """

    def turn(loop: tuple[Array, Any]):
        _, carry = loop
        return jnp.zeros_like(flag), function(carry)

    return lax.while_loop(lambda loop: loop[0], turn, (flag, carry))[1]


def apart(
    flag: Array, function: Callable[[], Array], otherwise: Any, tree: Any
) -> Array:
    """A scalar, computed in a loop of one turn.

    All that leads to a scalar would else be compiled into every kernel that reads it.
    """
    axes = varying_axes((tree, flag))
    dtype = jax.eval_shape(function).dtype

    def compute(_: Any):
        return vary(function(), axes)

    return gated(vary(flag, axes), compute, vary(jnp.asarray(otherwise, dtype), axes))
