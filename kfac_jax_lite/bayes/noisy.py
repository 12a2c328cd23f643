"""Noisy K-FAC: variational inference with a matrix-normal posterior.

The natural gradient of the evidence bound in the precision of the posterior is an
exponential moving average of the curvature, the one that K-FAC keeps anyway; that in
its mean is K-FAC's step at weights drawn from the posterior: ``μ + √(τ/N) R e`` with
``R Rᵀ = (F + δ I)⁻¹`` and ``e`` standard normal, block by block:

* Kronecker layers with explicit inverses: the matrix normal
  ``L_A E L_Gᵀ``, ``L_A L_Aᵀ = (A + π√δ I)⁻¹``, ``L_G L_Gᵀ = (G + √δ/π I)⁻¹``;
* in eigenbases, exactly: ``Q_A ((Q_Aᵀ E Q_G) / √(s + δ)) Q_Gᵀ``, ``s`` the products of
  the factors' eigenvalues or EKFAC's second moments;
* scales and shifts unit by unit, diagonals entry by entry.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.bayes.posterior import Number, noise_like, scale_of
from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import all_finite, inverse_half, one_by_one
from kfac_jax_lite.core.pytree import choose, find_states, leaves_by_path
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
)
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import (
    Eigenbases,
    FactorInverses,
    Method,
    damped_factors,
    method_named,
)
from kfac_jax_lite.kronecker.masking import present_layers
from kfac_jax_lite.kronecker.precondition import assemble, gather, precondition
from kfac_jax_lite.kronecker.state import KFACState
from kfac_jax_lite.optimizer.damping import Damping
from kfac_jax_lite.optimizer.intervals import Interval
from kfac_jax_lite.optimizer.kfac import kfac
from kfac_jax_lite.optimizer.transform import ALL_REDUCE, EVERY_STEP


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layers:
    """Layer tags inside a state: a node of the tree without leaves."""

    tags: tuple[LayerTag, ...]

    @functools.cached_property
    def number(self) -> int:
        """The hash, once: every call of a compiled step asks for it."""
        return hash(self.tags)

    def __hash__(self) -> int:
        """The hash of the tags."""
        return self.number


class NoisyKFACState(NamedTuple):
    """State of ``noisy_kfac``.

    Attributes:
        inner: State of ``kfac``.
        roots: Layer name to ``L_Aᵀ`` and ``L_Gᵀ``, renewed with the layer's inverse;
            empty for eigenbases, which need none.
        variance: ``τ/N``.
        damping: ``δ``.
        layers: The layers that are not masked out, a node without leaves.
    """

    inner: Any
    roots: dict[str, FactorInverses]
    variance: Array
    damping: Array
    layers: Any

    @property
    def kfac(self) -> KFACState:
        """The state of ``scale_by_kfac``."""
        return find_states(self.inner)[0]

    def draw(self, params: Any, key: Any) -> Any:
        """Weights from the posterior around ``params``; see ``kfac.bayes.sample``."""
        state, noise = self.kfac, leaves_by_path(noise_like(params, key))
        names, layers, blocks = sorted(state.factors), self.layers.tags, {}
        for layer in layers:
            name, factors = layer.name, state.factors[layer.name]
            e = gather(layer, noise).astype(jax.tree.leaves(factors)[0].dtype)
            inverse = self.roots.get(name, state.inverses[name])
            e = root_times(layer, e, factors, inverse, self.damping)
            seen = state.clock.refreshes[names.index(name)] > 0
            blocks[name] = jnp.where(seen, e, 0)
        offset = assemble(layers, blocks, jax.tree.map(jnp.zeros_like, params))
        scale = jnp.sqrt(self.variance)

        def moved(mean: Any, e: Any):
            return mean + (scale.astype(e.dtype) * e).astype(mean.dtype)

        return jax.tree.map(moved, params, offset)


def noisy_kfac(
    layers: Sequence[LayerTag],
    num_data: Number,
    learning_rate: optax.ScalarOrSchedule,
    *,
    prior_precision: Number = 1.0,
    temperature: Number = 1.0,
    augmentation: Number = 1.0,
    damping: Damping = 1e-3,
    momentum: optax.ScalarOrSchedule | None = 0.9,
    kl_clip: optax.ScalarOrSchedule | None = 1e-3,
    factor_decay: float | Array = 0.95,
    interval: Interval = EVERY_STEP,
    inverse: str | Method = "cholesky",
    inverse_interval: int | Array = 1,
    axis_name: Any = None,
    reduction: Reduction = ALL_REDUCE,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC that keeps a matrix-normal posterior around the parameters.

    The parameters are the mean ``μ``. With weights ``w`` drawn from

    ``W ~ M + √(τ/N) L_A E L_Gᵀ``, ``L_A L_Aᵀ = (A + π√δ I)⁻¹``,
    ``L_G L_Gᵀ = (G + √δ/π I)⁻¹``,

    and gradient and statistics taken there, the step is that of ``kfac.kfac`` for the
    gradient ``∇L(w) + δ μ`` and the damping ``δ + γ``:

    ``value, grads, statistics = kfac.bayes.value_and_grad(tagged, params, *batch,
    opt_state=state, key=key)``, then ``update`` as always.

    Args:
        layers: ``tagged.layers``; the paper samples labels, ``fisher="mc"``.
        num_data: Number of examples in the data set: terms of the mean loss, if one
            batch held all of them.
        learning_rate: ``η``, a number or an optax schedule.
        prior_precision: ``p`` of the prior ``N(0, I/p)``; it takes the place of weight
            decay.
        temperature: ``τ``, weight of the divergence from the prior; below 1 the
            posterior is narrower than Bayes' rule says.
        augmentation: ``ρ``: by how much augmentation multiplies the examples.
        damping: ``γ``, of the steps alone, on top of ``δ = τ p / (ρ num_data)``; a
            number or a schedule.
        momentum: As for ``kfac.kfac``, as are all that follow.
        kl_clip: The trust region.
        factor_decay: Weight of the old statistics.
        interval: Refresh rule.
        inverse: ``"cholesky"``, ``"newton_schulz"``, ``"auto"`` (the matrix normal
            above), ``"eigh"`` or ``"ekfac"`` (covariance ``(A ⊗ G + δ I)⁻¹``, exactly,
            in the eigenbasis). Splitting ``δ`` over both factors adds more than ``δ``:
            where the prior counts, the posterior of the first three is too narrow.
        inverse_interval: Least number of steps between inversions.
        axis_name: Mapped axes to average statistics over.
        reduction: How statistics travel; only ``mode="all"``: every device draws.
        stagger: Spread refreshes and inversions over steps.

    Returns:
        An optax transformation; ``update`` wants ``params`` and ``statistics=``.

    Raises:
        ValueError: A value is out of range; ``inverse`` or ``reduction`` keeps factors
            that cannot be drawn from; at ``update``, ``params`` are missing.
        TypeError: A damping that is neither a number nor a schedule.

    References:
        Zhang, Sun, Duvenaud & Grosse, 2018, "Noisy natural gradient as variational
        inference", arXiv:1712.02390, Sec. 3.3 and Alg. 2 (``λ`` there is ``τ``, its
        prior variance ``η`` is ``1/p``, ``γ_in = δ``, ``γ_ex = γ``); Bae, Zhang &
        Grosse, 2018, arXiv:1811.12019 is the eigenbasis form (EK-FAC).
    """
    variance, intrinsic = scale_of(num_data, prior_precision, temperature, augmentation)
    method = method_named(inverse)
    if method.name == "low_rank":
        raise ValueError(
            'noisy_kfac: inverse="low_rank" is not drawn from; use "cholesky", "eigh" '
            'or "ekfac".'
        )
    if reduction.mode != "all":
        raise ValueError(
            f'noisy_kfac: Reduction(mode="{reduction.mode}") leaves every device a '
            'part of the factors, and each must draw all weights: use mode="all".'
        )
    tx = kfac(
        layers,
        learning_rate,
        damping=total_damping(damping, intrinsic),
        momentum=momentum,
        kl_clip=kl_clip,
        factor_decay=factor_decay,
        interval=interval,
        inverse=inverse,
        inverse_interval=inverse_interval,
        axis_name=axis_name,
        reduction=reduction,
        stagger=stagger,
    )

    def init_fn(params: Any):
        inner, tags = tx.init(params), Layers(present_layers(tuple(layers), params))
        factors = find_states(inner)[0].factors
        roots = {
            layer.name: method.initial(layer, factors[layer.name].a.dtype)
            for layer in tags.tags
            if layer.kronecker and method.damped and layer.name in factors
        }
        numbers = [jnp.asarray(x, jnp.float32) for x in (variance, intrinsic)]
        return NoisyKFACState(inner, roots, numbers[0], numbers[1], tags)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        if params is None:
            raise ValueError("noisy_kfac: update wants params, the posterior's mean.")
        grads = jax.tree.map(  # in the gradient's dtype: the momentum's must not change
            lambda g, mu: g + (state.damping * mu).astype(g.dtype), updates, params
        )
        updates, inner = tx.update(grads, state.inner, params, **extra_args)
        new = state._replace(inner=inner)
        return updates, new._replace(roots=renewed(state, new))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def total_damping(damping: Any, intrinsic: Any) -> Damping:
    """``δ + γ``, a number or a schedule."""
    if isinstance(damping, (int, float, jax.Array)):
        return intrinsic + damping
    if not callable(damping):
        raise TypeError(
            f"noisy_kfac: damping must be a number or a schedule, got {damping!r}."
        )
    schedule: Any = damping
    return lambda count: intrinsic + schedule(count)


def renewed(old: NoisyKFACState, new: NoisyKFACState) -> dict[str, FactorInverses]:
    """The roots of layers that were inverted in this step, and those of the others."""
    inverted = new.kfac.clock.last_inverse != old.kfac.clock.last_inverse
    factors: dict[str, Any] = new.kfac.factors
    due = {name: inverted[i] for i, name in enumerate(sorted(factors))}

    def renew(layer: LayerTag, root: FactorInverses):
        found = factor_roots(layer, factors[layer.name], new.damping)
        return choose(all_finite(found), found, root)

    return {
        layer.name: gated(
            due[layer.name], functools.partial(renew, layer), old.roots[layer.name]
        )
        for layer in new.layers.tags
        if layer.name in old.roots
    }


def inverse_root(matrix: Array, form: forms.Form) -> Array:
    """``Lᵀ`` with ``L Lᵀ = M⁻¹``: the inverse of ``M``'s Cholesky factor."""
    if not form.matrix:
        return jnp.where(matrix > 0, lax.rsqrt(matrix), jnp.nan)
    return one_by_one(inverse_half, matrix, lead=matrix.ndim - 2)


def factor_roots(
    layer: LayerTag, factors: KroneckerStatistics, damping: Any
) -> FactorInverses:
    """``L_Aᵀ`` and ``L_Gᵀ`` of a layer's damped factors."""
    matrices = damped_factors(layer, factors, jnp.asarray(damping, jnp.float32))
    return FactorInverses(*map(inverse_root, matrices, forms.forms_of(layer)))


def root_times(
    layer: LayerTag, e: Array, factors: Any, inverse: Any, damping: Any
) -> Array:
    """``R e`` for a layer's block."""
    if isinstance(factors, DiagonalStatistics):
        return e * lax.rsqrt(factors.gradient + jnp.asarray(damping, e.dtype))
    if isinstance(factors, ScaleShiftStatistics):
        return unit_root_times(factors.blocks, e, damping)
    zero = jnp.zeros((), e.dtype)
    if isinstance(inverse, Eigenbases):
        s = inverse.products if factors.s is None else factors.s
        factors = factors._replace(s=jnp.sqrt(s + jnp.asarray(damping, s.dtype)))
    return precondition(layer, e, factors, inverse, zero)


def unit_root_times(blocks: Array, e: Array, damping: Any) -> Array:
    """``R_u e_u`` for blocks ``F_u [units, k, k]``, ``k ≤ 2``, by Cholesky factors."""
    shift = jnp.asarray(damping, blocks.dtype)
    first = jnp.sqrt(blocks[..., 0, 0] + shift)
    if blocks.shape[-1] == 1:
        return e / first[..., None]
    slope = blocks[..., 0, 1] / first
    # With F_u positive semidefinite, the Schur complement is at least the damping.
    rest = blocks[..., 1, 1] + shift - jnp.square(slope)
    last = jnp.sqrt(jnp.maximum(rest, shift))
    y = e[..., 1] / last
    return jnp.stack([(e[..., 0] - slope * y) / first, y], -1)
