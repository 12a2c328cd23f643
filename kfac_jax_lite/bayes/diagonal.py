"""VOGN and IVON: diagonal posteriors, trained by a variational Newton method.

VOGN's curvature are the squares of single examples' gradients. IVON's comes from the
noise: the derivative of a gradient along the noise is the Hessian, by Stein's identity
``E[∇²L(w)] = E[∇L(w) (w − μ)] / σ²`` entry by entry, so that no example's gradient is
needed, only the batch's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.bayes.posterior import Number, noise_like, scale_of
from kfac_jax_lite.core.linalg import norms_finite
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    LayerTag,
    ScaleShiftStatistics,
    SquareStatistics,
    accumulation_dtype,
    computed,
)
from kfac_jax_lite.distributed.reduction import reduce_statistics, summed_already
from kfac_jax_lite.kronecker.masking import is_masked, present_layers
from kfac_jax_lite.kronecker.precondition import assemble
from kfac_jax_lite.kronecker.state import moving_average
from kfac_jax_lite.optimizer.transform import ALL_REDUCE

# ------------------------------------------------------------------------- both


def check_decays(method: str, momentum: float, decay: float) -> None:
    """Weights of old averages must be at least 0 and less than 1."""
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0 <= value < 1:
            raise ValueError(f"{method}: {name} must be in [0, 1), got {value!r}.")


def initial_state(
    kind: Callable[..., Any], params: Any, rate: Any, scale: Any, curvature: Number
) -> Any:
    """The state before the first step, with a curvature everywhere the same."""
    averages = averages_like(params), averages_like(params, curvature)
    numbers = [jnp.asarray(x, jnp.float32) for x in scale]
    return kind(jnp.zeros((), jnp.int32), *averages, rate.init(params), *numbers)


def averages_like(params: Any, value: Number = 0.0) -> Any:
    """What averages over steps start from: shaped like the parameters, but float32.

    Of a bfloat16 model, too: there ``h + (1 − β)(ĥ − h)`` is ``h`` for any slow ``β``.
    """

    def start(x: Any):
        return jnp.full_like(x, value, dtype=accumulation_dtype(x.dtype))

    return jax.tree.map(start, params)


def accepted_step(
    rate: Any, steps: Any, params: Any, state: Any, new: Any, seen: Any
) -> tuple[Any, Any]:
    """A step and the state after it; zeros and the old state where it was refused."""
    steps, rates = rate.update(steps, state.rate, params)
    accepted, zeros = norms_finite(seen), optax.tree.zeros_like(steps)
    new = new._replace(rate=rates)
    return choose(accepted, steps, zeros), choose(accepted, new, state)


def diagonal_draw(params: Any, key: Any, variances: Any) -> Any:
    """Independent normal weights around ``μ``."""

    def moved(variance: Any, mean: Any, e: Any):
        if is_masked(variance):
            return mean
        return mean + (e * jnp.sqrt(variance).astype(e.dtype)).astype(mean.dtype)

    trees = variances, params, noise_like(params, key)
    return jax.tree.map(moved, *trees, is_leaf=is_masked)


# ------------------------------------------------------------------------- VOGN


class VOGNState(NamedTuple):
    """State of ``vogn``.

    Attributes:
        count: Batches accepted.
        gradient: Averaged ``∇L + δ μ``, bias-corrected.
        squares: ``s``, averaged squares of single examples' gradients, bias-corrected.
        rate: State of the learning rate.
        variance: ``τ/N``.
        damping: ``δ``.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    gradient: Any
    squares: Any
    rate: Any
    variance: Array
    damping: Array

    def draw(self, params: Any, key: Any) -> Any:
        """``μ + √(τ/N) e / √(s + δ)``; the mean before the first step."""
        scale = jnp.where(self.count > 0, self.variance, 0)
        variances = jax.tree.map(lambda s: scale / (s + self.damping), self.squares)
        return diagonal_draw(params, key, variances)


def vogn(
    layers: Sequence[LayerTag],
    num_data: Number,
    learning_rate: optax.ScalarOrSchedule,
    *,
    prior_precision: Number = 1.0,
    temperature: Number = 1.0,
    augmentation: Number = 1.0,
    damping: Number = 1e-3,
    momentum: float = 0.9,
    decay: float = 0.999,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Variational online Gauss-Newton.

    With weights drawn from ``N(μ, (τ/N) / (s + δ))`` and the loss's gradient and the
    squares ``h = (1/B) Σ_n g_n²`` of single examples' gradients taken there,

    ``m ← β₁ m + (1 − β₁)(∇L + δ μ)``, ``s ← β₂ s + (1 − β₂) h``,
    ``μ ← μ − η m / (s + δ + γ)``,

    both averages bias-corrected. (Osawa et al. write ``τ`` into the average,
    ``s ← (1 − τβ) s + β h``; here ``s`` stays the curvature and ``τ`` is in the
    variance and in ``δ``: the fixed point, ``Σ⁻¹ = N s / τ + p``, is the same.)

    Args:
        layers: Of a loss tagged with ``statistics="squares"``. Parameters that fell
            back to a diagonal take the square of their mean gradient times ``B``.
        num_data: As for ``noisy_kfac``, as are the next four.
        learning_rate: ``η``, a number or an optax schedule.
        prior_precision: ``p``.
        temperature: ``τ``.
        augmentation: ``ρ``.
        damping: ``γ``, of the steps alone.
        momentum: ``β₁``.
        decay: ``β₂``, weight of the *old* squares.
        axis_name: Mapped axes to average the squares over.

    Returns:
        An optax transformation; ``update`` wants ``params`` and ``statistics=``, from
        ``kfac.bayes.value_and_grad``. A batch with NaN or Inf, or with gradients or
        squares whose squared norm overflows, changes nothing.

    Raises:
        ValueError: A value is out of range; at ``update``, ``params`` are missing, or
            the statistics are not squares.

    References:
        Khan, Nielsen, Tangkaratt, Lin, Gal & Srivastava, 2018, arXiv:1806.04854,
        Sec. 3.3; Osawa, Swaroop, Jain, Eschenhagen, Turner, Yokota & Khan, 2019,
        "Practical deep learning with Bayesian principles", arXiv:1906.02506, Alg. 1.
    """
    scale = scale_of(num_data, prior_precision, temperature, augmentation)
    check_decays("vogn", momentum, decay)
    if isinstance(damping, (int, float)) and not damping >= 0:
        raise ValueError(f"vogn: damping must not be negative, got {damping!r}.")
    rate, layers = optax.scale_by_learning_rate(learning_rate), tuple(layers)

    def init_fn(params: Any):
        return initial_state(VOGNState, params, rate, scale, 0.0)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        statistics = extra_args.get("statistics")
        if params is None or statistics is None:
            raise ValueError("vogn: update wants params and statistics=.")
        fresh = squares(layers, statistics, params, axis_name)
        grads = optax.tree.add_scale(updates, state.damping, params)
        count = state.count + 1
        mean = moving_average(state.gradient, grads, 1 - momentum**count, momentum)
        average = moving_average(state.squares, fresh, 1 - decay**count, decay)
        shift = state.damping + damping
        steps = jax.tree.map(
            lambda m, s, mu: (m / (s + shift)).astype(mu.dtype), mean, average, params
        )
        new = state._replace(count=count, gradient=mean, squares=average)
        return accepted_step(rate, steps, params, state, new, (updates, average))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def squares(
    layers: Sequence[LayerTag], statistics: Any, params: Any, axis_name: Any = None
) -> Any:
    """``h = (1/B) Σ_n g_n²`` as a tree.

    Args:
        layers: The layers.
        statistics: Of ``TaggedLoss.value_and_grad``, tagged with
            ``statistics="squares"``.
        params: What the tree is to look like.
        axis_name: Mapped axes to average over.

    Returns:
        The squares, shaped like the parameters, in float32 or wider.

    Raises:
        ValueError: The statistics are factors.
    """
    layers = tuple(layers)
    found = computed(statistics)
    found = tuple(found[layer.name] for layer in layers)
    if axis_name is not None:
        found = reduce_statistics(layers, found, axis_name, ALL_REDUCE)
    pairs = zip(layers, found, strict=True)
    blocks = {layer.name: block_squares(layer, value) for layer, value in pairs}
    here = present_layers(layers, params)
    blocks = {layer.name: part_of_block(layer, blocks[layer.name]) for layer in here}
    return assemble(here, blocks, averages_like(params))


def part_of_block(layer: LayerTag, block: Array) -> Array:
    """What a layer keeps of its block when ``optax.masked`` hides the rest."""
    if layer.kronecker:
        size = layer.sizes[0]
        return block[..., -1:, :] if layer.roles == ("bias",) else block[..., :size, :]
    if layer.unitwise and block.shape[-1] > len(layer.roles):
        i = ("scale", "shift").index(layer.roles[0])
        return block[..., i : i + 1]
    return block


def block_squares(layer: LayerTag, statistics: Any) -> Array:
    """A layer's squares, shaped like its block."""
    if isinstance(statistics, SquareStatistics):
        return statistics.squares
    if isinstance(statistics, ScaleShiftStatistics):
        return jnp.diagonal(statistics.blocks, axis1=-2, axis2=-1)
    if isinstance(statistics, DiagonalStatistics):
        return statistics.num_examples * jnp.square(statistics.gradient)
    raise ValueError(
        f"layer {layer.name} has {type(statistics).__name__}, wanted SquareStatistics: "
        'tag the loss with statistics="squares".'
    )


# ------------------------------------------------------------------------- IVON


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

        def one(variance: Any, g: Any, w: Any, mean: Any):
            if is_masked(variance):
                return variance
            return g.astype(variance.dtype) * (w - mean) / variance

        # What ``optax.masked`` hides of the variances stays hidden.
        trees = self.variances, grads, weights, params
        return ReparameterisedStatistics(jax.tree.map(one, *trees, is_leaf=is_masked))


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
        ``kfac.bayes.value_and_grad``. A batch with NaN or Inf, or with gradients or
        curvature whose squared norm overflows, changes nothing.

    Raises:
        ValueError: A value is out of range; at ``update``, ``params`` or statistics are
            missing.

    References:
        Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan &
        Möllenhoff, 2024, arXiv:2402.17641, Alg. 1; Lin, Schmidt & Khan, 2020,
        arXiv:2002.10060, Sec. 3 (the correction that keeps the precision positive).
    """
    scale = scale_of(num_data, prior_precision, temperature, augmentation)
    check_decays("ivon", momentum, decay)
    if isinstance(initial, (int, float)) and not initial > 0:
        raise ValueError(f"ivon: initial must be positive, got {initial!r}.")
    rate = optax.scale_by_learning_rate(learning_rate)

    def init_fn(params: Any):
        return initial_state(IVONState, params, rate, scale, initial)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        statistics = extra_args.get("statistics")
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

        def average(h: Array, seen: Array):
            # With r = (1 − β)(ĥ − h) / (h + δ) the new h + δ is positive whatever ĥ is:
            # (h + δ)(1 + r + r²/2).
            change = (1 - decay) * (seen.astype(h.dtype) - h)
            return h + change + 0.5 * jnp.square(change) / (h + shift).astype(h.dtype)

        def step(m: Array, mu: Array, h: Array):
            return ((m + shift * mu) / (h + shift)).astype(mu.dtype)

        hessian = jax.tree.map(average, state.hessian, fresh)
        steps = jax.tree.map(step, mean, params, hessian)
        new = state._replace(count=count, gradient=mean, hessian=hessian)
        return accepted_step(rate, steps, params, state, new, (updates, hessian))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def device_mean(x: Array, axis_name: Any) -> Array:
    """The mean over the devices of what is proportional to their gradients."""
    mean = lax.pmean(x, axis_name)
    summed = summed_already(x, axis_name)
    return mean / lax.axis_size(axis_name) if summed else mean
