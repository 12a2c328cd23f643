"""Predictions of a network that is linear in its weights around their mean.

``f(x, w) ≈ f(x, μ) + J (w − μ)`` with ``J = ∂f/∂w`` at ``μ``: under ``w ~ N(μ, Σ)`` the
output is ``N(m, S)``, ``m = f(x, μ)`` and ``S = J Σ Jᵀ``, in closed form. What is left
is the mean of the likelihood's probabilities under that normal distribution, a *link*:

``"probit"``  ``softmax(m / √(1 + π/8 diag S))``, for one log-odds MacKay's formula
``"bridge"``  the mean of the Dirichlet distribution that is nearest (Laplace bridge)
``"mc"``      the mean of ``softmax(z)`` over draws ``z ~ N(m, S)``; unbiased

References:
    Immer, Korzepa & Bauer, 2021, arXiv:2008.08400 (why the linearised network is the
    one whose posterior this is); MacKay, 1992, "The evidence framework applied to
    classification networks", Neural Computation 4(5), 720-736; Hobbhahn, Kristiadi &
    Hennig, 2022, arXiv:2003.01227; Daxberger et al., 2021, arXiv:2106.14806.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from kfac_jax_lite.bayes.laplace_blocks import Leaves
from kfac_jax_lite.bayes.predictive import Normal
from kfac_jax_lite.core.linalg import eigh
from kfac_jax_lite.core.types import Array

LIKELIHOODS = ("categorical", "bernoulli", "normal")
LINKS = ("probit", "bridge", "mc")


@runtime_checkable
class Linear(Protocol):
    """What a posterior must know to be linearised."""

    @property
    def leaves(self) -> Leaves:
        """The leaves that are uncertain."""
        ...

    def output_covariance(self, jacobian: Array) -> Array:
        """``J Σ Jᵀ`` of a Jacobian over the ravelled leaves."""
        ...


@functools.partial(jax.jit, static_argnames=("apply_fn", "batch_size"))
def linearised_outputs(
    apply_fn: Callable[..., Any],
    posterior: Linear,
    params: Any,
    inputs: Any,
    batch_size: int | None = None,
) -> tuple[Array, Array]:
    """Mean and covariance of the outputs of the linearised network, input by input.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs [n, *output]``, which treats
            inputs apart from each other (a network in evaluation mode).
        posterior: From ``laplace``.
        params: ``μ``.
        inputs: Arrays with a leading axis ``n``.
        batch_size: How many Jacobians are kept at once; None: all.

    Returns:
        ``m [n, *output]`` and ``S [n, C, C]`` with ``C`` numbers in an output.
    """
    own = posterior.leaves.of(params)

    def one(x: Any):
        single = jax.tree.map(lambda leaf: leaf[None], x)

        def output(values: Any):
            return apply_fn(posterior.leaves.replaced(params, values), single)[0]

        mean = output(own)
        rows = [j.reshape(mean.size, -1) for j in jax.jacrev(output)(own)]
        return mean, posterior.output_covariance(jnp.concatenate(rows, 1))

    if batch_size is None:
        return jax.vmap(one)(inputs)
    return jax.lax.map(one, inputs, batch_size=batch_size)


def predict_glm(
    apply_fn: Callable[..., Any],
    posterior: Linear,
    params: Any,
    inputs: Any,
    key: Any = None,
    *,
    likelihood: str = "categorical",
    link: str = "probit",
    num_samples: int = 256,
    variance: Any = 1.0,
    batch_size: int | None = None,
) -> Any:
    """Probabilities under a Laplace posterior, by the linearised network.

    Args:
        apply_fn: As for ``linearised_outputs``; the output is what the loss marks:
            logits ``[n, classes]``, log-odds or means ``[n, outputs]`` or ``[n]``.
        posterior: From ``laplace``.
        params: ``μ``.
        inputs: Arrays with a leading axis ``n``.
        key: PRNG key, for ``link="mc"``.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"normal"``.
        link: ``"probit"``, ``"bridge"`` (categorical only; see there how rough it
            is) or ``"mc"``. A normal output needs none.
        num_samples: Draws of ``link="mc"``.
        variance: Of the observation noise of a normal output, broadcast to it.
        batch_size: How many Jacobians are kept at once; None: all.

    Returns:
        Probabilities, shaped like the output; for ``"normal"`` its ``Normal(mean,
        variance)``.

    Raises:
        ValueError: An unknown likelihood or link; a link that the likelihood does not
            have; no key where one is needed.
    """
    check_choice(likelihood, link, key)
    mean, s = linearised_outputs(apply_fn, posterior, params, inputs, batch_size)
    if likelihood == "normal":
        spread = jnp.diagonal(s, axis1=1, axis2=2).reshape(mean.shape)
        return Normal(mean, spread + jnp.asarray(variance, spread.dtype))
    squash = jax.nn.softmax if likelihood == "categorical" else jax.nn.sigmoid
    if link == "bridge":
        if mean.ndim != 2:
            raise ValueError(
                f"predict_glm: the Laplace bridge wants logits [n, classes], got "
                f"{mean.shape}: use link='probit' or 'mc'."
            )
        return laplace_bridge(mean, s)
    if link == "probit":
        spread = jnp.diagonal(s, axis1=1, axis2=2).reshape(mean.shape)
        return squash(mean / jnp.sqrt(1 + jnp.pi / 8 * spread))
    return sampled_mean(squash, mean, s, key, num_samples)


def check_choice(likelihood: str, link: str, key: Any) -> None:
    """The link must be known, and one of the likelihood's."""
    for name, value, known in (
        ("likelihood", likelihood, LIKELIHOODS),
        ("link", link, LINKS),
    ):
        if value not in known:
            raise ValueError(
                f"predict_glm: {name} must be one of {known}, got {value!r}."
            )
    if link == "bridge" and likelihood != "categorical":
        raise ValueError(
            f"predict_glm: the Laplace bridge is of a categorical likelihood, got "
            f"{likelihood!r}: use link='probit' or 'mc'."
        )
    if link == "mc" and likelihood != "normal" and key is None:
        raise ValueError("predict_glm: link='mc' draws: pass key=jax.random.key(…).")


def laplace_bridge(mean: Array, s: Array) -> Array:
    """Mean ``α / Σ α`` of the Dirichlet distribution of normal logits.

    ``α_k = (1 − 2/C + exp(m_k)/C² Σ_l exp(−m_l)) / S_kk``, after ``m`` and ``S`` are
    centred, ``P m`` and ``P S P`` with ``P = I − 1 1ᵀ/C``: the softmax does not see
    what is taken off. It inverts the map from a Dirichlet distribution to the normal
    distribution of its logits; of other ``S`` it is rough, and as ``S`` vanishes it is
    not ``softmax(m)``.

    Args:
        mean: ``m [n, C]``.
        s: ``S [n, C, C]``.

    Returns:
        ``[n, C]``.

    References:
        Hobbhahn, Kristiadi & Hennig, 2022, arXiv:2003.01227, Eq. 8. They condition on a
        sum of zero instead of centring.
    """
    c = mean.shape[-1]
    mean = mean - mean.mean(-1, keepdims=True)
    s = s - s.mean(-1, keepdims=True)
    s = s - s.mean(-2, keepdims=True)
    variance = jnp.diagonal(s, axis1=-2, axis2=-1)
    cross = jnp.exp(mean + jax.nn.logsumexp(-mean, -1, keepdims=True))
    # Where nothing is uncertain the smallest number stands for the variance.
    tiny = jnp.finfo(variance.dtype).eps
    alpha = (1 - 2 / c + cross / c**2) / jnp.maximum(variance, tiny)
    return alpha / alpha.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 4))
def sampled_mean(
    squash: Callable[[Array], Array], mean: Array, s: Array, key: Any, num_samples: int
) -> Array:
    """Mean of ``squash(z)`` over draws ``z ~ N(m, S)`` of every input.

    Args:
        mean: ``m [n, *output]``.
        s: ``S [n, C, C]``; it may be singular.
    """
    values, vectors = eigh(s)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]

    def draw(key: Array):
        noise = jax.random.normal(key, s.shape[:2], s.dtype)
        offset = jnp.einsum("nij,nj->ni", root, noise)
        return squash(mean + offset.reshape(mean.shape).astype(mean.dtype))

    def add(total: Array, key: Array):
        return total + draw(key), None

    keys = jax.random.split(key, num_samples)
    return jax.lax.scan(add, jnp.zeros_like(mean), keys)[0] / num_samples


def mean_nll(likelihood: str, prediction: Any, labels: Any) -> Array:
    """Mean over the inputs of ``−log p(y)`` under predictions of ``predict_glm``.

    Args:
        labels: Class numbers ``[n]``, zeros and ones, or values shaped like the output.
    """
    if likelihood == "categorical":
        logs = jnp.log(jnp.maximum(prediction, jnp.finfo(prediction.dtype).tiny))
        return -jnp.take_along_axis(logs, labels[..., None], -1).mean()
    if likelihood == "bernoulli":
        p = jnp.where(labels == 1, prediction, 1 - prediction)
        terms = -jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
    else:
        mean, variance = prediction
        errors = jnp.square(labels - mean) / variance
        terms = (errors + jnp.log(2 * jnp.pi * variance)) / 2
    return terms.reshape(len(terms), -1).sum(1).mean()
