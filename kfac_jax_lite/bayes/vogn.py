"""VOGN: variational inference with a diagonal Gauss-Newton approximation.

References:
    Khan, Nielsen, Tangkaratt, Lin, Gal & Srivastava, 2018, arXiv:1806.04854, Sec. 3.3;
    Osawa, Swaroop, Jain, Eschenhagen, Turner, Yokota & Khan, 2019, "Practical deep
    learning with Bayesian principles", arXiv:1906.02506, Alg. 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.bayes.posterior import (
    Number,
    accepted_step,
    averages_like,
    diagonal_draw,
    scale_of,
)
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    LayerTag,
    ScaleShiftStatistics,
    SquareStatistics,
    computed,
)
from kfac_jax_lite.distributed.reduction import reduce_statistics
from kfac_jax_lite.kronecker.masking import present_layers
from kfac_jax_lite.kronecker.precondition import assemble
from kfac_jax_lite.kronecker.state import moving_average
from kfac_jax_lite.optimizer.transform import ALL_REDUCE


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
        ``kfac.bayes.value_and_grad``. A batch with NaN or Inf,
        or with gradients or squares whose squared norm overflows, changes nothing.

    Raises:
        ValueError: A value is out of range; at ``update``, ``params`` are missing, or
            the statistics are not squares.

    References:
        Osawa et al., 2019, arXiv:1906.02506, Alg. 1.
    """
    scale = scale_of(num_data, prior_precision, temperature, augmentation)
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0 <= value < 1:
            raise ValueError(f"vogn: {name} must be in [0, 1), got {value!r}.")
    if isinstance(damping, (int, float)) and not damping >= 0:
        raise ValueError(f"vogn: damping must not be negative, got {damping!r}.")
    rate, layers = optax.scale_by_learning_rate(learning_rate), tuple(layers)

    def init_fn(params: Any):
        gradient, start = averages_like(params), averages_like(params)
        numbers = [jnp.asarray(x, jnp.float32) for x in scale]
        count = jnp.zeros((), jnp.int32)
        return VOGNState(count, gradient, start, rate.init(params), *numbers)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = None,
        **extra_args: Any,
    ):
        del extra_args
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
    statistics = computed(statistics)
    found = tuple(statistics[layer.name] for layer in layers)
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
