"""Steps chosen by the quadratic model: learning rate, momentum and damping.

``d = −α u + μ d_prev`` with ``u`` the preconditioned gradient. ``α, μ`` minimise
``M(d) = ∇Lᵀ d + ½ dᵀ (C + λ I) d``, a system of two unknowns, and ``λ`` follows the
Levenberg-Marquardt rule. The model is asked at every step; a part of the batch
may be enough for it.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Secs. 6.4, 6.5, 7.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.damping import LevenbergMarquardt
from kfac_jax_lite.factors.state import KFACState
from kfac_jax_lite.types import Array


class GuidedState(NamedTuple):
    """State of K-FAC with steps from the quadratic model.

    Attributes:
        kfac: State of ``scale_by_kfac``.
        velocity: Last update ``d``.
        damping: ``λ``.
        learning_rate: ``α`` in force.
        momentum: ``μ`` in force.
        ratio: Reduction ratio ``ρ`` at the last consultation; NaN before.
    """

    kfac: KFACState
    velocity: Any
    damping: Array
    learning_rate: Array
    momentum: Array
    ratio: Array


def guided(
    precondition: optax.GradientTransformationExtraArgs,
    learning_rate: Any,
    momentum: Any,
    damping: Any,
    weight_decay: Any,
    axis_name: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC whose step the quadratic model decides, wholly or in part.

    Args:
        precondition: ``scale_by_kfac(…)``.
        learning_rate: ``"auto"`` or a number: then ``α`` and ``μ`` are given.
        momentum: ``μ`` where the learning rate is given.
        damping: A number, or ``levenberg_marquardt(…)``.
        weight_decay: Decoupled, multiplied by ``α``.
        axis_name: Mapped axes over which the model is averaged.

    Returns:
        The transformation; ``update`` needs ``statistics=`` and ``model=``.
    """
    automatic = isinstance(learning_rate, str)
    adaptive = isinstance(damping, LevenbergMarquardt)
    first = damping.initial if adaptive else damping

    def init_fn(params):
        number = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
        inner_state: Any = precondition.init(params)
        return GuidedState(
            inner_state,
            jax.tree.map(jnp.zeros_like, params),
            number(first),
            number(0 if automatic else learning_rate),
            number(0 if automatic or momentum is None else momentum),
            number(jnp.nan),
        )

    def consult(state, count, model, params, grads, u):
        vectors = (jax.tree.map(jnp.negative, u), state.velocity)
        loss, slopes, gram = mean((model.products(vectors)), axis_name)
        dots = jnp.stack([inner(grads, v) for v in vectors])
        squares = jnp.stack(
            [jnp.stack([inner(v, w) for w in vectors]) for v in vectors]
        )
        curvature = gram + state.damping * squares
        weights = jnp.stack([state.learning_rate, state.momentum])
        if automatic:
            weights = minimise(curvature, dots)
        d = combine(weights, vectors)
        predicted = slopes @ weights + 0.5 * weights @ curvature @ weights
        new_loss = mean(model.loss(optax.apply_updates(params, d)), axis_name)
        ratio = (new_loss - loss) / jnp.where(predicted < 0, predicted, jnp.nan)
        new = state.damping
        if adaptive:
            due = count % damping.interval == 0
            new = jnp.where(due, damping.adjust(new, ratio), new)
        return state._replace(
            damping=new.astype(jnp.float32),
            learning_rate=weights[0].astype(jnp.float32),
            momentum=weights[1].astype(jnp.float32),
            ratio=ratio.astype(jnp.float32),
        )

    def update_fn(updates, state, params=None, *, model=None, **extra_args):
        if model is None or params is None:
            raise ValueError(
                'learning_rate="auto" and levenberg_marquardt need params and model=: '
                "pass tx.update(grads, opt_state, params, statistics=statistics, "
                "model=kfac.quadratic_model(tagged, params, *batch))."
            )
        grads, count = updates, state.kfac.count
        extra_args["damping"] = state.damping
        inner_state: Any
        u, inner_state = precondition.update(grads, state.kfac, params, **extra_args)
        accepted = inner_state.skipped == state.kfac.skipped
        asked = lax.cond(
            accepted,
            lambda s: consult(s, count, model, params, grads, u),
            lambda s: s,
            state._replace(kfac=()),
        )
        weights = jnp.stack([asked.learning_rate, asked.momentum])
        d = combine(weights, (jax.tree.map(jnp.negative, u), state.velocity))
        if weight_decay:
            rate = weight_decay * asked.learning_rate
            d = jax.tree.map(lambda x, p: x - (rate * p).astype(x.dtype), d, params)
        keep = lambda x, y: jnp.where(accepted, x, y)  # noqa: E731
        velocity = jax.tree.map(keep, d, state.velocity)
        d = jax.tree.map(lambda x: jnp.where(accepted, x, 0), d)
        return d, asked._replace(kfac=inner_state, velocity=velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def inner(x: Any, y: Any) -> Array:
    """``xᵀ y`` of two trees, in float32 or better."""
    return jnp.asarray(optax.tree.vdot(x, y))


def mean(tree: Any, axis_name: Any) -> Any:
    """Mean over devices, if there are mapped axes."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def combine(weights: Array, vectors: tuple[Any, ...]) -> Any:
    """``Σ w_i v_i``."""
    return jax.tree.map(
        lambda *xs: sum(
            (w * x).astype(x.dtype) for w, x in zip(weights, xs, strict=True)
        ),
        *vectors,
    )


def minimise(curvature: Array, slopes: Array) -> Array:
    """Minimises ``slopesᵀ w + ½ wᵀ K w`` over two weights.

    Where the second direction vanishes or is parallel to the first, only the first is
    used.

    Args:
        curvature: ``K [2, 2]``.
        slopes: ``[2]``.

    Returns:
        ``w [2]``; zeros where the curvature along the first direction is not positive.
    """
    (a, b), (_, d) = curvature
    determinant = a * d - b * b
    proper = determinant > 1e-6 * a * d
    safe = jnp.where(proper, determinant, 1)
    both = jnp.stack([b * slopes[1] - d * slopes[0], b * slopes[0] - a * slopes[1]])
    alone = jnp.stack([-slopes[0] / jnp.where(a > 0, a, 1), jnp.zeros_like(a)])
    w = jnp.where(proper, both / safe, alone)
    return jnp.where(a > 0, w, 0)
