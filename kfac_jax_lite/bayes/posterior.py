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

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from kfac_jax_lite.core.linalg import norms_finite
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.masking import is_masked

Number = int | float | Array


class Posterior(Protocol):
    """What weights can be drawn from: an optimiser's state, or a ``Laplace``."""

    def draw(self, params: Any, key: Any) -> Any:
        """Weights, shaped like the mean ``params``."""
        ...


class Scale(NamedTuple):
    """The numbers of a posterior, from ``scale_of``.

    Attributes:
        variance: ``τ/N``.
        damping: ``δ = τ p / N``.
    """

    variance: Any
    damping: Any


def scale_of(
    num_data: Number,
    prior_precision: Number,
    temperature: Number,
    augmentation: Number,
) -> Scale:
    """``τ/N`` and ``δ``."""
    values = {
        "num_data": num_data,
        "prior_precision": prior_precision,
        "temperature": temperature,
        "augmentation": augmentation,
    }
    for name, value in values.items():
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}.")
    variance = temperature / (augmentation * num_data)
    return Scale(variance, variance * prior_precision)


def is_posterior(x: Any) -> bool:
    """Whether weights can be drawn from it."""
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


def noise_like(params: Any, key: Any) -> Any:
    """Independent standard normal numbers shaped like the parameters."""
    return optax.tree.random_like(key, params, jax.random.normal)


def visible(tree: Any, like: Any) -> Any:
    """A tree without what ``optax.masked`` hides of another."""
    return jax.tree.map(
        lambda y, x: y if is_masked(y) else x, like, tree, is_leaf=is_masked
    )


def plus(params: Any, noise: Any, scale: Array) -> Any:
    """``μ + s e`` in the dtypes of ``μ``."""

    def add(mean: Any, e: Any):
        return mean + (scale.astype(e.dtype) * e).astype(mean.dtype)

    return jax.tree.map(add, params, noise)


def diagonal_draw(params: Any, key: Any, variances: Any) -> Any:
    """Independent normal weights around ``μ``."""
    noise = noise_like(params, key)
    variances = jax.tree.map(
        lambda v, mu: jax.tree.map(jnp.zeros_like, mu) if is_masked(v) else v,
        variances,
        params,
        is_leaf=is_masked,
    )
    noise = jax.tree.map(lambda e, v: e * jnp.sqrt(v).astype(e.dtype), noise, variances)
    return plus(params, noise, jnp.ones(()))
