"""``kfac``: preconditioning, trust region, weight decay, momentum, learning rate."""

from collections.abc import Sequence
from typing import Any

import optax

from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.optimizer.damping import (
    Adaptive,
    Damping,
    LevenbergMarquardt,
)
from kfac_jax_lite.optimizer.intervals import Interval
from kfac_jax_lite.optimizer.steps import (
    Guide,
    adapted,
    bounded,
    guided,
    heavy_ball,
)
from kfac_jax_lite.optimizer.transform import (
    ALL_REDUCE,
    EVERY_STEP,
    lag_of,
    scale_by_kfac,
)
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


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
