"""Damping that is adapted by what the next gradient says of the last step.

With ``d`` the last step, ``r = dᵀ∇L₊ / dᵀ∇L`` compares the slope along it where it
ended, on the next batch, with the slope where it began. ``r = 1``: the step was far too
short; ``r = 0``: it ended at the minimum along its direction; ``r < 0``: it went too
far. Two inner products per step, no evaluation of the loss and no product with the
curvature.

References:
    Pflug, 1990, "Non-asymptotic confidence bounds for stochastic approximation
    algorithms with constant step size" (successive gradients' product turns negative
    where noise rules); Almeida et al., 1999, and Baydin et al., 2018, arXiv:1703.04782
    (the same product as the learning rate's hypergradient); Moré, 1978 (damping by how
    well the model predicts).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.damping import Adaptive
from kfac_jax_lite.refresh import gated
from kfac_jax_lite.tree import choose, find_states, vary, varying_axes
from kfac_jax_lite.types import Array


class AdaptedState(NamedTuple):
    """State of an optimiser whose damping is adapted.

    Attributes:
        inner: State of the optimiser.
        damping: ``λ`` in force.
        step: ``d``, the last update.
        slope: ``dᵀ∇L`` where it began, on its own batch; 0 before the first step.
        agreement: ``r`` of the last step; NaN before there is one.
    """

    inner: Any
    damping: Array
    step: Any
    slope: Array
    agreement: Array


def adapted(
    inner: optax.GradientTransformationExtraArgs,
    rule: Adaptive,
    lag: Any = 1,
    sign: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose damping follows a rule.

    Args:
        inner: It takes ``damping=`` in ``update``.
        rule: The rule.
        lag: Steps until a new damping is in force: the least number of steps between
            inversions where the inverses hold it.
        sign: That of ``dᵀ∇L`` for a step downhill: −1 for updates that are added to
            parameters, 1 for preconditioned gradients.

    Returns:
        The transformation. A batch that ``inner`` rejects changes nothing here.
    """

    def init_fn(params):
        numbers = [jnp.asarray(x, jnp.float32) for x in (rule.initial, 0, jnp.nan)]
        damping, slope, agreement = numbers
        step = jax.tree.map(jnp.zeros_like, params)
        return AdaptedState(inner.init(params), damping, step, slope, agreement)

    def update_fn(updates, state, params=None, **extra_args):
        grads = updates
        always = state.damping > 0
        end = slope_along(state.step, grads, always)
        agreement = jnp.where(state.slope * sign > 0, end / state.slope, -jnp.inf)
        agreement = jnp.where(state.slope == 0, jnp.nan, agreement)
        damping = rule.adjust(state.damping, agreement, lag)
        extra_args["damping"] = damping
        d, new = inner.update(grads, state.inner, params, **extra_args)
        pairs = zip(find_states(new), find_states(state.inner), strict=True)
        accepted = jnp.all(jnp.stack([n.skipped == o.skipped for n, o in pairs]))
        slope = slope_along(d, grads, always)
        found = AdaptedState((), damping, d, slope, agreement)
        kept = choose(accepted, found, state._replace(inner=()))
        return d, kept._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def slope_along(step: Any, grads: Any, flag: Array) -> Array:
    """``dᵀ∇L`` in a loop of one turn.

    All that leads to a scalar would else be compiled into every kernel that reads it.

    Args:
        step: ``d``.
        grads: ``∇L``.
        flag: True; a traced value, or XLA would unroll the loop.

    Returns:
        A float32 scalar.
    """
    axes = varying_axes((step, grads, flag))

    def product(_):
        return vary(jnp.asarray(optax.tree.vdot(step, grads), jnp.float32), axes)

    return gated(vary(flag, axes), product, vary(jnp.zeros((), jnp.float32), axes))
