"""Damping that is adapted by what the next gradient says of the last step.

With ``d`` the last step, ``r = dᵀ∇L₊ / dᵀ∇L`` compares the slope along it where it
ended, on the next batch, with the slope where it began. ``r = 1``: the step was far too
short; ``r = 0``: it ended at the minimum along its direction; ``r < 0``: it went too
far. Two inner products per step, no evaluation of the loss and no product with the
curvature.

A step that ended steeper uphill than any of late was steep is taken back: the update is
``−d``, the velocity is forgotten, the damping grows at once, and what was measured out
there is refused. Only then can a first damping be far too small, and momentum not carry
a run away whose new steps the trust region has made tiny.

References:
    Pflug, 1990, "Non-asymptotic confidence bounds for stochastic approximation
    algorithms with constant step size" (successive gradients' product turns negative
    where noise rules); Almeida et al., 1999, and Baydin et al., 2018, arXiv:1703.04782
    (the same product as the learning rate's hypergradient); Moré, 1978 (damping by how
    well the model predicts, steps that are refused); O'Donoghue & Candès, 2015,
    arXiv:1204.3982, Sec. 3.2 (momentum forgotten where the step points uphill).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.core.linalg import LARGEST
from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.pytree import choose, find_states
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.optimizer.damping import Adaptive

# Weight of the greatest slope before: that of a step long ago is no measure.
MEMORY = 0.9


class AdaptedState(NamedTuple):
    """State of an optimiser whose damping is adapted.

    Attributes:
        inner: State of the optimiser.
        step: ``d``, the last update.
        damping: ``λ`` in force.
        slope: ``dᵀ∇L`` where ``d`` began, on its own batch; 0 before the first step and
            after one that was taken back.
        scale: The greatest ``|dᵀ∇L|`` of late: ``σ ← max(|dᵀ∇L|, 0.9 σ)``.
        agreement: ``r`` of the last step; the largest float32 where there is none, and
            the most negative where the step began uphill.
        retreats: Steps that were taken back.
    """

    inner: Any
    step: Any
    damping: Array
    slope: Array
    scale: Array
    agreement: Array
    retreats: Array


def adapted(
    inner: optax.GradientTransformationExtraArgs,
    rule: Adaptive,
    lag: Any = 1,
    sign: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose damping follows a rule.

    Args:
        inner: It takes ``damping=`` and ``reject=`` in ``update``.
        sign: That of ``dᵀ∇L`` for a step downhill: −1 for updates that are added to
            parameters, 1 for preconditioned gradients, which cannot be taken back.
    """
    retreats = rule.retreat is not None and sign < 0

    def init_fn(params: Any):
        return AdaptedState(
            inner=inner.init(params),
            step=jax.tree.map(jnp.zeros_like, params),
            damping=jnp.asarray(rule.initial, jnp.float32),
            slope=jnp.zeros((), jnp.float32),
            scale=jnp.zeros((), jnp.float32),
            agreement=jnp.asarray(LARGEST, jnp.float32),
            retreats=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        grads = updates
        end = slope_along(state.step, grads)
        began, downhill = state.slope != 0, state.slope * sign > 0
        agreement = jnp.where(
            downhill, end / jnp.where(began, state.slope, 1), -LARGEST
        )
        agreement = jnp.where(began, agreement, LARGEST)
        damping, back = rule.adjust(state.damping, agreement, lag), jnp.asarray(False)
        if retreats:
            back = began & (end > state.scale)
            scale = jnp.where(began, state.scale, 1)
            raised = rule.raised(state.damping, end / scale)
            damping = jnp.where(back, raised, damping)
            extra_args["reject"] = back
        extra_args["damping"] = damping
        d, new = inner.update(grads, state.inner, params, **extra_args)
        pairs = zip(find_states(new), find_states(state.inner), strict=True)
        accepted = jnp.all(jnp.stack([n.skipped == o.skipped for n, o in pairs]))
        if retreats:
            d = choose(back, jax.tree.map(jnp.negative, state.step), d)
        slope = slope_along(d, grads)
        scale = jnp.maximum(jnp.abs(slope), MEMORY * state.scale)
        slope = jnp.where(back, 0, slope)
        scale = jnp.where(back, state.scale, scale)
        times = state.retreats + back
        found = AdaptedState((), d, damping, slope, scale, agreement, times)
        kept = choose(accepted | back, found, state._replace(inner=()))
        return d, kept._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def slope_along(step: Any, grads: Any) -> Array:
    """``dᵀ∇L``, a float32 scalar."""
    return jnp.asarray(automatic(optax.tree.vdot, step, grads), jnp.float32)
