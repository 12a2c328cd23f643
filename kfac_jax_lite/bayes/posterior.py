"""Posteriors over weights, and drawing from them, whatever the method.

Every method keeps a normal distribution around the parameters ``μ``,

``q(w) = N(μ, (τ/N) (F + δ I)⁻¹)``,    ``δ = τ p / N``,

with ``F`` a curvature of the *mean* loss, ``N`` the number of examples (times the
factor ``ρ`` by which augmentation multiplies them), ``p`` the precision of the prior
``N(0, I/p)`` and ``τ`` the temperature: it maximises
``E_q[log p(D | w)] − τ KL(q ‖ prior)``.

References:
    Zhang, Sun, Duvenaud & Grosse, 2018, arXiv:1712.02390; Osawa et al., 2019,
    arXiv:1906.02506, Sec. 3 (tempering, the augmentation factor).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.core.types import (
    Array,
    Deferred,
    DiagonalStatistics,
    computed,
)
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

Number = int | float | Array


def scale_of(
    num_data: Number,
    prior_precision: Number,
    temperature: Number,
    augmentation: Number,
) -> tuple[Any, Any]:
    """``τ/N`` and ``δ = τ p / N``, of positive numbers."""
    names = ("num_data", "prior_precision", "temperature", "augmentation")
    numbers = (num_data, prior_precision, temperature, augmentation)
    for name, value in zip(names, numbers, strict=True):
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}.")
    variance = temperature / (augmentation * num_data)
    return variance, variance * prior_precision


def is_posterior(x: Any) -> bool:
    """Whether weights can be drawn from it: an optimiser's state, or of ``laplace``."""
    return callable(getattr(x, "draw", None))


def find(state: Any) -> Any:
    """The posterior inside any optax state, or the posterior itself."""
    leaves = jax.tree.leaves(state, is_leaf=is_posterior)
    found = [leaf for leaf in leaves if is_posterior(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"{type(state).__name__} contains {len(found)} posteriors, wanted one: "
            "pass the state of an optimiser of kfac.bayes, or what "
            "kfac.bayes.laplace returns."
        )
    return found[0]


def sample(state: Any, params: Any, key: Any, num_samples: int | None = None) -> Any:
    """Draws weights.

    Args:
        state: State of an optimiser of ``kfac.bayes``, wrapped in whatever of optax, or
            a Laplace posterior.
        params: The mean ``μ``.
        key: PRNG key. Under ``pmap`` and ``shard_map``, devices that should draw
            different weights need different keys (``fold_in`` of their
            ``lax.axis_index``).
        num_samples: How many; None: one, without a leading axis.

    Returns:
        Weights shaped like ``params``, with ``num_samples`` behind a leading axis. An
        optimiser that has not seen any statistics yet returns the mean.

    Raises:
        ValueError: The state contains no posterior, or several.
    """
    posterior = find(state)
    if num_samples is None:
        return posterior.draw(params, key)
    keys = jax.random.split(key, num_samples)
    return jax.vmap(lambda k: posterior.draw(params, k))(keys)


def value_and_grad(
    tagged: TaggedLoss | Callable[..., Any],
    params: Any,
    *args: Any,
    opt_state: Any,
    key: Any,
    num_samples: int = 1,
    has_aux: bool = False,
    axis_name: Any = None,
    deferred: bool = False,
) -> tuple[Any, Any, Any]:
    """Averages over weights drawn from the posterior around ``params``.

    ``(1/S) Σ_s`` of ``L(w_s)``, ``∇L(w_s)`` and the statistics there, ``w_s`` from
    ``kfac.bayes.sample``: an estimate of ``E_q[L]`` and of its gradient in the mean.
    Call it inside ``jax.jit``.

    Args:
        tagged: The tagged loss; for ``ivon`` any loss ``(params, *args) -> mean loss``.
        params: The mean ``μ``.
        *args: Further arguments of the loss.
        opt_state: State of an optimiser of ``kfac.bayes``; K-FAC's layers that are not
            due return zeros and cost nothing.
        key: PRNG key of the weights and of sampled labels.
        num_samples: ``S``.
        has_aux: Whether a loss that is not tagged returns ``(loss, aux)``.
        axis_name: Mapped axes along which every device draws weights of its own; None:
            all devices that share the key draw the same.
        deferred: Leave K-FAC's statistics to ``update``, see
            ``TaggedLoss.value_and_grad``.

    Returns:
        ``(value, grads, statistics)``, to be used like those of
        ``TaggedLoss.value_and_grad``: gradients are to be averaged over devices,
        ``update`` averages the statistics. With ``has_aux``, ``value`` is
        ``(loss, aux)`` with the aux of the last draw.

    Raises:
        ValueError: ``num_samples`` is not positive; no posterior in the state.
        TypeError: A loss that is not tagged where statistics of layers are wanted.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    posterior = find(opt_state)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    has_aux = tagged.has_aux if isinstance(tagged, TaggedLoss) else has_aux

    def one(key: Any):
        of_weights, of_labels = jax.random.split(key)
        weights = posterior.draw(params, of_weights)
        if hasattr(posterior, "observed"):
            loss = tagged.loss_fn if isinstance(tagged, TaggedLoss) else tagged
            value, grads = jax.value_and_grad(loss, has_aux=has_aux)(weights, *args)
            return value, grads, posterior.observed(params, weights, grads)
        if not isinstance(tagged, TaggedLoss):
            raise TypeError(
                f"{type(posterior).__name__} wants statistics of layers: pass what "
                "kfac.tag returns."
            )
        options = {"opt_state": opt_state, "key": of_labels, "deferred": deferred}
        return tagged.value_and_grad(weights, *args, **options)

    # Not a scan: jaxlib 0.10.2 runs convolutions in loops ten times slower on CPUs.
    found = [one(k) for k in jax.random.split(key, num_samples)]
    if num_samples == 1:
        return found[0]
    values, grads, statistics = zip(*found, strict=True)
    losses = [v[0] for v in values] if has_aux else list(values)
    loss = tree_mean(losses)
    value = (loss, values[-1][1]) if has_aux else loss
    return value, tree_mean(grads), mean_statistics(statistics)


def tree_mean(trees: Sequence[Any]) -> Any:
    """The mean of trees."""
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]) / len(xs), *trees)


def mean_statistics(found: Sequence[Any]) -> Any:
    """The mean of draws' statistics; of deferred ones, deferred."""
    if any(isinstance(one, Deferred) for one in found):
        return Deferred(
            lambda gated: mean_statistics([computed(one, gated) for one in found])
        )

    def mean(*values: Any):
        if not isinstance(values[0], DiagonalStatistics):
            return tree_mean(values)
        # Their examples add up: the mean is that of the gradients.
        count = jnp.sum(jnp.stack([v.num_examples for v in values]))
        return DiagonalStatistics(tree_mean([v.gradient for v in values]), count)

    return jax.tree.map(
        mean, *found, is_leaf=lambda x: isinstance(x, DiagonalStatistics)
    )


def noise_like(params: Any, key: Any) -> Any:
    """Independent standard normal numbers shaped like the parameters."""
    return optax.tree.random_like(key, params, jax.random.normal)
