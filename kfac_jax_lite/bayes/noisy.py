"""Noisy K-FAC: variational inference with a matrix-normal posterior.

The natural gradient of the evidence bound in the precision of the posterior is an
exponential moving average of the curvature, the one that K-FAC keeps anyway; that in
its mean is K-FAC's step at weights drawn from the posterior.

References:
    Zhang, Sun, Duvenaud & Grosse, 2018, "Noisy natural gradient as variational
    inference", arXiv:1712.02390, Alg. 2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.bayes.posterior import Number, noise_like, plus, scale_of
from kfac_jax_lite.bayes.roots import factor_roots, root_times
from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import all_finite
from kfac_jax_lite.core.pytree import choose, find_states, leaves_by_path
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.inverses import (
    FactorInverses,
    Method,
    method_named,
)
from kfac_jax_lite.kronecker.masking import present_layers
from kfac_jax_lite.kronecker.precondition import assemble, gather
from kfac_jax_lite.kronecker.state import KFACState
from kfac_jax_lite.optimizer.damping import Damping
from kfac_jax_lite.optimizer.intervals import Interval
from kfac_jax_lite.optimizer.kfac import kfac
from kfac_jax_lite.optimizer.transform import ALL_REDUCE, EVERY_STEP


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """Layer tags inside a state: a node of the tree without leaves.

    Attributes:
        tags: The layers.
    """

    tags: tuple[LayerTag, ...]
    number: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Hashes the tags once: every call of a compiled step asks for it."""
        object.__setattr__(self, "number", hash(self.tags))

    def __hash__(self) -> int:
        """The hash of the tags."""
        return self.number

    def __eq__(self, other: object) -> bool:
        """Whether the tags are equal."""
        return isinstance(other, Layers) and self.tags == other.tags


class NoisyKFACState(NamedTuple):
    """State of ``noisy_kfac``.

    Attributes:
        inner: State of ``kfac``.
        roots: Layer name to ``L_Aᵀ`` and ``L_Gᵀ`` (see ``kfac_jax_lite.bayes.roots``),
            renewed with the layer's inverse; empty for eigenbases, which need none.
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
        names = sorted(state.factors)
        layers = self.layers.tags
        blocks = {}
        for layer in layers:
            name, factors = layer.name, state.factors[layer.name]
            e = gather(layer, noise).astype(jax.tree.leaves(factors)[0].dtype)
            inverse = self.roots.get(name, state.inverses[name])
            e = root_times(layer, e, factors, inverse, self.damping)
            seen = state.clock.refreshes[names.index(name)] > 0
            blocks[name] = jnp.where(seen, e, 0)
        moved = assemble(layers, blocks, jax.tree.map(jnp.zeros_like, params))
        return plus(params, moved, jnp.sqrt(self.variance))


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
        Zhang, Sun, Duvenaud & Grosse, 2018, arXiv:1712.02390, Alg. 2 (``λ`` there is
        ``τ``, its prior variance ``η`` is ``1/p``, ``γ_in = δ``, ``γ_ex = γ``); Bae,
        Zhang & Grosse, 2018, arXiv:1811.12019 is the eigenbasis form (EK-FAC).
    """
    scale = scale_of(num_data, prior_precision, temperature, augmentation)
    method = method_named(inverse)
    check(method, reduction)
    tx = kfac(
        layers,
        learning_rate,
        damping=total_damping(damping, scale.damping),
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
        roots = initial_roots(tags.tags, find_states(inner)[0], method)
        variance, shift = (jnp.asarray(x, jnp.float32) for x in scale)
        return NoisyKFACState(inner, roots, variance, shift, tags)

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


def check(method: Method, reduction: Reduction) -> None:
    """Raises where a device would not hold what it draws from."""
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


def initial_roots(
    layers: Sequence[LayerTag], state: KFACState, method: Method
) -> dict[str, FactorInverses]:
    """Identities where the method keeps explicit inverses."""
    factors: dict[str, Any] = state.factors
    return {
        layer.name: method.initial(layer, factors[layer.name].a.dtype)
        for layer in layers
        if layer.kronecker and method.damped and layer.name in factors
    }


def renewed(old: NoisyKFACState, new: NoisyKFACState) -> dict[str, FactorInverses]:
    """The roots of layers that were inverted in this step, and those of the others."""
    before, now = old.kfac.clock.last_inverse, new.kfac.clock.last_inverse
    every: dict[str, Any] = new.kfac.factors
    names, roots = sorted(every), {}
    for layer in new.layers.tags:
        if layer.name not in old.roots:
            continue
        i, factors = names.index(layer.name), every[layer.name]

        def renew(
            root: FactorInverses, layer: LayerTag = layer, factors: Any = factors
        ):
            found = factor_roots(layer, factors, new.damping)
            return choose(all_finite(found), found, root)

        roots[layer.name] = gated(now[i] != before[i], renew, old.roots[layer.name])
    return roots
