"""``kfac``: preconditioning, trust region, weight decay, momentum, learning rate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.core.control import apart
from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import Array, LayerTag, accumulation_dtype
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.kronecker.state import KFACState
from kfac_jax_lite.optimizer.damping import (
    Adaptive,
    Damping,
    LevenbergMarquardt,
    value_at,
)
from kfac_jax_lite.optimizer.intervals import Interval
from kfac_jax_lite.optimizer.steps import Guide, adapted, guided
from kfac_jax_lite.optimizer.transform import (
    ALL_REDUCE,
    EVERY_STEP,
    lag_of,
    scale_by_kfac,
)
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


class KFACChainState(NamedTuple):
    """State of ``kfac``.

    Attributes:
        kfac: State of ``scale_by_kfac``.
        tail: State of the optax transformations behind it.
        trust: Factor ``ν`` of the trust region at the last step; 1 where it is slack.
    """

    kfac: KFACState
    tail: Any
    trust: Array


def kfac(
    layers: Sequence[LayerTag] | TaggedLoss,
    learning_rate: optax.ScalarOrSchedule | str,
    *,
    damping: Damping | Adaptive | LevenbergMarquardt = 1e-3,
    momentum: optax.ScalarOrSchedule | None = 0.9,
    weight_decay: float | Array = 0.0,
    kl_clip: optax.ScalarOrSchedule | None = 1e-3,
    factor_decay: float | Array = 0.95,
    interval: Interval = EVERY_STEP,
    inverse: str | Method = "cholesky",
    inverse_interval: int | Array = 1,
    axis_name: Any = None,
    reduction: Reduction = ALL_REDUCE,
    stagger: bool = False,
    packed: bool = False,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with a trust region, decoupled weight decay and momentum.

    ``u = ν (F + λ I)⁻¹ ∇L`` with ``ν = min(1, √(κ / (η² Σ uᵀ∇L)))``, which bounds the
    model's estimate of the squared step in the Fisher metric, ``η² uᵀ F u``; then
    optax: ``add_decayed_weights``, ``trace``, ``scale_by_learning_rate``. Schedules
    are functions of the number of batches accepted before.

    Args:
        layers: ``tagged.layers``, or the tagged loss itself.
        learning_rate: ``η``, a number or an optax schedule; or ``"auto"``: learning
            rate and momentum minimise the quadratic model, ``update`` then needs
            ``model=kfac.quadratic_model(tagged, params, *batch)``, and ``momentum`` and
            ``kl_clip`` play no part.
        damping: ``λ``; see ``scale_by_kfac``, as for the arguments not listed here.
        momentum: Decay ``m`` of the accumulated update (heavy ball,
            ``v ← m v + u``, ``−η v`` is the step), a number or a schedule; or None.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        kl_clip: ``κ``, a number or a schedule, or None for no trust region. It bounds
            the step before momentum, which may lengthen a lasting direction up to
            ``1 / (1 − m)`` times.
        factor_decay: Weight of the *old* statistics.
        interval: Refresh rule.
        inverse: Inversion method.
        inverse_interval: Least number of steps between inversions.
        axis_name: Mapped axes to average statistics over.
        reduction: How statistics travel.
        stagger: Spread refreshes and inversions over steps.
        packed: Keep factors as triangles.
        mask: Which parameters decay, as in ``optax.adamw``: a tree of booleans with the
            structure of the parameters or a prefix of it, or a function of the
            parameters that returns one; None: all.

    Returns:
        An optax transformation; pass ``statistics=`` (and ``params``, with weight
        decay) to ``update``. A batch with NaN or Inf gives zero updates and leaves
        momentum and schedules as they were.

    Raises:
        ValueError: A value is out of range.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6; Ba et al., 2017, "Distributed
        second-order optimization using Kronecker-factored approximations", Sec. 5
        (the trust region); Loshchilov & Hutter, 2019, arXiv:1711.05101.
    """
    check(learning_rate, momentum, weight_decay, kl_clip)
    rule = damping if isinstance(damping, Adaptive) else None
    given = damping.initial if isinstance(damping, Adaptive) else damping
    precondition = scale_by_kfac(
        layers,
        damping=given.initial if isinstance(given, LevenbergMarquardt) else given,
        factor_decay=factor_decay,
        interval=interval,
        inverse=inverse,
        inverse_interval=inverse_interval,
        axis_name=axis_name,
        reduction=reduction,
        stagger=stagger,
        packed=packed,
    )
    automatic = isinstance(learning_rate, str)
    if automatic or isinstance(given, LevenbergMarquardt):
        mapped = axis_name if reduction.mesh is None else None
        chosen = (given, learning_rate, momentum, weight_decay, mask, mapped)
        tx = guided(precondition, Guide(automatic, *chosen))
    else:
        decays = not isinstance(weight_decay, (int, float)) or weight_decay != 0
        tail = optax.chain(
            optax.add_decayed_weights(weight_decay, mask)
            if decays
            else optax.identity(),
            optax.identity() if momentum is None else heavy_ball(momentum),
            optax.scale_by_learning_rate(learning_rate),
        )
        tx = bounded(precondition, tail, learning_rate, kl_clip)
    return adapted(tx, rule, lag_of(inverse, inverse_interval)) if rule else tx


def heavy_ball(momentum: Any) -> optax.GradientTransformation:
    """``optax.trace``, whose decay may be a schedule.

    ``optax.inject_hyperparams(optax.trace)`` would do, but for its state, another than
    that of a number, and for a decay in the widest type of the parameters, which then
    becomes the type of every velocity.
    """
    if not callable(momentum):
        return optax.trace(momentum)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        count: Any = None,
        **extra_args: Any,
    ):
        del params, extra_args
        decay = value_at(momentum, count)
        velocity = jax.tree.map(
            lambda u, v: u + decay.astype(v.dtype) * v, updates, state.trace
        )
        return velocity, optax.TraceState(velocity)

    return optax.GradientTransformationExtraArgs(optax.trace(0.0).init, update_fn)


def bounded(
    precondition: optax.GradientTransformationExtraArgs,
    tail: optax.GradientTransformationExtraArgs,
    learning_rate: Any,
    kl_clip: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditioning, the trust region, and what optax does behind them."""

    def init_fn(params: Any):
        inner: Any = precondition.init(params)
        return KFACChainState(inner, tail.init(params), jnp.ones((), jnp.float32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        grads = updates
        inner: Any
        updates, inner = precondition.update(grads, state.kfac, params, **extra_args)
        accepted, count = inner.skipped == state.kfac.skipped, state.kfac.count
        trust = jnp.ones((), jnp.float32)
        if kl_clip is not None:
            rate = value_at(learning_rate, count)
            clip = value_at(kl_clip, count) if callable(kl_clip) else kl_clip
            trust = automatic(region, accepted, updates, grads, rate, clip)
            # In their own dtype: the momentum's must not change.
            updates = jax.tree.map(lambda u: (trust * u).astype(u.dtype), updates)
        updates, new_tail = tail.update(updates, state.tail, params, count=count)
        kept = without_velocity(state.tail, extra_args.get("reject", False))
        new_tail = choose(accepted, new_tail, kept)
        updates = jax.tree.map(lambda u: jnp.where(accepted, u, 0), updates)
        trust = jnp.where(accepted, trust, state.trust).astype(jnp.float32)
        return updates, KFACChainState(inner, new_tail, trust)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def without_velocity(tail: Any, flag: Any) -> Any:
    """The state of ``tail`` with a velocity of zero where ``flag``."""
    if flag is False:
        return tail

    def is_velocity(x: Any):
        return isinstance(x, optax.TraceState)

    def forget(x: Any):
        return jax.tree.map(lambda v: jnp.where(flag, 0, v), x) if is_velocity(x) else x

    return jax.tree.map(forget, tail, is_leaf=is_velocity)


def check(learning_rate: Any, momentum: Any, weight_decay: Any, kl_clip: Any) -> None:
    """Raises for values that cannot be right; traced values pass."""
    if isinstance(kl_clip, (int, float)) and not kl_clip > 0:
        raise ValueError(f"kl_clip must be positive or None, got {kl_clip!r}.")
    if isinstance(weight_decay, (int, float)) and not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}.")
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}.")
    if isinstance(learning_rate, str) and learning_rate != "auto":
        raise ValueError('learning_rate must be a number, a schedule or "auto".')
    if isinstance(learning_rate, (int, float)) and learning_rate < 0:
        raise ValueError(f"learning_rate must not be negative, got {learning_rate!r}.")


def region(accepted: Array, updates: Any, grads: Any, rate: Any, clip: Any) -> Array:
    """The trust region's factor, 1 for a batch that was rejected."""

    def factor():
        return trust_region(updates, grads, rate, clip)

    return apart(accepted, factor, 1, updates)


def trust_region(updates: Any, grads: Any, rate: Any, kl_clip: Any) -> Array:
    """``ν = min(1, √(κ / (η² Σ uᵀ∇L)))``.

    Args:
        grads: ``∇L``.
    """

    def product(u: Any, g: Any):
        dtype = accumulation_dtype(u.dtype)
        return jnp.sum(u.astype(dtype) * g.astype(dtype))

    products = jax.tree.map(product, updates, grads)
    size = jnp.square(rate) * sum(jax.tree.leaves(products))
    bounded = jnp.sqrt(kl_clip / jnp.where(size > 0, size, 1))
    return jnp.where(size > 0, jnp.minimum(1.0, bounded), 1.0)
