"""IVON: a diagonal posterior whose curvature comes from the noise itself.

The derivative of a gradient along the noise is the Hessian: by Stein's identity
``E[∇²L(w)] = E[∇L(w) (w − μ)] / σ²`` entry by entry, so that no example's gradient is
needed, only the batch's.

References:
    Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan &
    Möllenhoff, 2024, "Variational learning is effective for large deep networks",
    arXiv:2402.17641, Alg. 1; Lin, Schmidt & Khan, 2020, arXiv:2002.10060, Sec. 3 (the
    correction that keeps the precision positive).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.bayes.posterior import (
    Number,
    accepted_step,
    averages_like,
    diagonal_draw,
    scale_of,
    visible,
)
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.distributed.reduction import summed_already
from kfac_jax_lite.kronecker.state import moving_average


class ReparameterisedStatistics(NamedTuple):
    """What the noise of a draw says of the curvature.

    Attributes:
        hessian: ``ĥ = ∇L(w) (w − μ) / σ²``, shaped like the parameters.
    """

    hessian: Any


class IVONState(NamedTuple):
    """State of ``ivon``.

    Attributes:
        count: Batches accepted.
        gradient: Averaged ``∇L``, bias-corrected.
        hessian: ``h``.
        rate: State of the learning rate.
        variance: ``τ/N``.
        damping: ``δ``.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    gradient: Any
    hessian: Any
    rate: Any
    variance: Array
    damping: Array

    @property
    def variances(self) -> Any:
        """``σ² = (τ/N) / (h + δ)``."""
        scale, shift = self.variance, self.damping
        return jax.tree.map(lambda h: scale / (h + shift), self.hessian)

    def draw(self, params: Any, key: Any) -> Any:
        """``μ + σ e``."""
        return diagonal_draw(params, key, self.variances)

    def observed(self, params: Any, weights: Any, grads: Any) -> Any:
        """The statistics of one draw."""

        def one(g: Any, w: Any, mean: Any, variance: Array):
            return g.astype(variance.dtype) * (w - mean) / variance

        variances = self.variances
        trees = [visible(tree, variances) for tree in (grads, weights, params)]
        return ReparameterisedStatistics(jax.tree.map(one, *trees, variances))


def ivon(
    num_data: Number,
    learning_rate: optax.ScalarOrSchedule,
    *,
    prior_precision: Number = 1.0,
    temperature: Number = 1.0,
    augmentation: Number = 1.0,
    initial: Number = 0.1,
    momentum: float = 0.9,
    decay: float = 0.99999,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Improved variational online Newton.

    With weights ``w`` drawn from ``N(μ, σ²)``, ``σ² = (τ/N) / (h + δ)``, the gradient
    ``∇L(w)`` and ``ĥ = ∇L(w) (w − μ) / σ²``,

    ``m ← β₁ m + (1 − β₁) ∇L(w)``,
    ``h ← β₂ h + (1 − β₂) ĥ + ½ (1 − β₂)² (h − ĥ)² / (h + δ)``,
    ``μ ← μ − η (m / (1 − β₁ᵗ) + δ μ) / (h + δ)``

    with the new ``h``. It needs neither layers nor statistics of examples: any loss.

    Args:
        num_data: As for ``noisy_kfac``, as are the next four.
        learning_rate: ``η``, a number or an optax schedule.
        prior_precision: ``p``.
        temperature: ``τ``.
        augmentation: ``ρ``.
        initial: ``h₀ > 0``, the curvature before the first step.
        momentum: ``β₁``.
        decay: ``β₂``, weight of the *old* curvature.
        axis_name: Mapped axes to average ``ĥ`` over.

    Returns:
        An optax transformation; ``update`` wants ``params`` and ``statistics=``, from
        ``kfac.bayes.value_and_grad``. A batch with NaN or Inf,
        or with gradients or curvature whose squared norm overflows, changes nothing.

    Raises:
        ValueError: A value is out of range; at ``update``, ``params`` or statistics are
            missing.

    References:
        Shen et al., 2024, arXiv:2402.17641, Alg. 1.
    """
    scale = scale_of(num_data, prior_precision, temperature, augmentation)
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0 <= value < 1:
            raise ValueError(f"ivon: {name} must be in [0, 1), got {value!r}.")
    if isinstance(initial, (int, float)) and not initial > 0:
        raise ValueError(f"ivon: initial must be positive, got {initial!r}.")
    rate = optax.scale_by_learning_rate(learning_rate)

    def init_fn(params: Any):
        zeros, start = averages_like(params), averages_like(params, initial)
        numbers = [jnp.asarray(x, jnp.float32) for x in scale]
        first, count = rate.init(params), jnp.zeros((), jnp.int32)
        return IVONState(count, zeros, start, first, *numbers)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = None,
        **_: Any,
    ):
        if params is None or not isinstance(statistics, ReparameterisedStatistics):
            raise ValueError(
                "ivon: update wants params and statistics= of kfac.bayes."
                "value_and_grad."
            )
        fresh = statistics.hessian
        if axis_name is not None:
            fresh = jax.tree.map(lambda h: device_mean(h, axis_name), fresh)
        count, shift = state.count + 1, state.damping
        mean = moving_average(state.gradient, updates, 1 - momentum**count, momentum)
        hessian = jax.tree.map(
            lambda h, seen: positive_average(h, seen, shift, decay),
            state.hessian,
            fresh,
        )
        steps = jax.tree.map(
            lambda m, mu, h: ((m + shift * mu) / (h + shift)).astype(mu.dtype),
            mean,
            params,
            hessian,
        )
        new = state._replace(count=count, gradient=mean, hessian=hessian)
        return accepted_step(rate, steps, params, state, new, (updates, hessian))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def device_mean(x: Array, axis_name: Any) -> Array:
    """The mean over the devices of what is proportional to their gradients."""
    mean = lax.pmean(x, axis_name)
    summed = summed_already(x, axis_name)
    return mean / lax.axis_size(axis_name) if summed else mean


def positive_average(h: Array, seen: Array, shift: Array, decay: float) -> Array:
    """``β h + (1 − β) ĥ + ½ (1 − β)² (h − ĥ)² / (h + δ)``.

    With ``r = (1 − β)(ĥ − h) / (h + δ)`` the new ``h + δ`` is
    ``(h + δ)(1 + r + r²/2)``, which is positive whatever ``ĥ`` is.
    """
    change = (1 - decay) * (seen.astype(h.dtype) - h)
    return h + change + 0.5 * jnp.square(change) / (h + shift).astype(h.dtype)
