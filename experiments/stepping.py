"""One step of training, the same for first-order optimisers and for K-FAC."""

from typing import Any

import jax
import optax

import kfac_jax_lite as kfac


def step(
    loss: Any,
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    args: tuple,
    has_aux: bool = False,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Gradient, statistics if the loss is tagged, update.

    Args:
        loss: a function of parameters and `args`, or a tagged one.
        tx: the optimiser.
        params: parameters.
        state: of the optimiser.
        args: the loss's further arguments.
        has_aux: whether a function returns more than its value.
        **options: further arguments of ``TaggedLoss.value_and_grad``; ``key`` may be
            given for any loss.

    Returns:
        The new parameters and state, and the value, as the loss returns it.
    """
    more = {}
    if isinstance(loss, kfac.TaggedLoss):
        value, grads, more["statistics"] = loss.value_and_grad(
            params, *args, opt_state=state, **options
        )
    else:
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(params, *args)
    updates, state = tx.update(grads, state, params, **more)
    return optax.apply_updates(params, updates), state, value
