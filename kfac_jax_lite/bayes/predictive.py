"""Predictions averaged over the weights of a posterior: by draws, or linearised.

**Draws.** ``p(y | x) = (1/S) Σ_s p(y | x, w_s)`` with ``w_s`` drawn once, the same for
all inputs. One draw is in memory at a time, and one batch of inputs. The loops are
Python's: in a `jax.lax.scan` jaxlib 0.10.2 convolves ten times more slowly on CPUs.

**Linearised.** ``f(x, w) ≈ f(x, μ) + J (w − μ)`` with ``J = ∂f/∂w`` at ``μ``: under ``w
~ N(μ, Σ)`` the output is ``N(m, S)``, ``m = f(x, μ)`` and ``S = J Σ Jᵀ``, in closed
form. What is left is the mean of the likelihood's probabilities under that normal
distribution, a *link*:

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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_jax_lite.bayes.posterior import sample
from kfac_jax_lite.core.linalg import eigh
from kfac_jax_lite.core.types import Array, ArrayLike

Apply = Callable[[Any, Any], Array]
# Mean and sum of squared deviations of the outputs of all draws so far.
Moments = tuple[Array, Array]


class Normal(NamedTuple):
    """Normal predictions; both fields are shaped like the network's output.

    Attributes:
        mean: Mean of the outputs.
        variance: Their variance, that of the observations' noise included.
    """

    mean: Array
    variance: Array


# From a network's output to what is averaged; `predict` says what each one means.
LIKELIHOODS: dict[str, Callable[[Array], Array]] = {
    "categorical": jax.nn.softmax,
    "bernoulli": jax.nn.sigmoid,
    "normal": lambda outputs: outputs,
}
LINKS = ("probit", "bridge", "mc")


def predict(
    apply_fn: Apply,
    state: Any,
    params: Any,
    inputs: Any,
    key: Array | None = None,
    num_samples: int = 32,
    likelihood: str = "categorical",
    batch_size: int | None = None,
    progress: bool = False,
    variance: ArrayLike = 1.0,
) -> Any:
    """Predictive distribution, averaged over draws of the weights.

    Draw ``s`` is `sample` with the ``s``-th key of ``jax.random.split(key,
    num_samples)``, whatever the batches. The last batch is filled up to the size of the
    others, so that nothing is compiled for it; programs are kept for the next call with
    the same ``apply_fn`` (the same object: a fresh lambda is compiled afresh).

    For ``"normal"``, by the law of total variance,
    ``mean = (1/S) Σ_s f_s`` and ``variance + (1/S) Σ_s (f_s − mean)²``.

    Args:
        apply_fn: ``apply_fn(weights, inputs) -> outputs [B, ...]``; hashable. Rows must
            not depend on each other (no batch norm over the batch).
        state: Optax state with a posterior inside, or a posterior; None: no draws.
        params: Mean of the posterior, as trained.
        inputs: ``[n, ...]``, or a tree of arrays that share the leading axis.
        key: PRNG key of the draws; not needed without draws.
        num_samples: ``S``, number of draws; 0 predicts with ``params`` alone.
        likelihood: ``"categorical"`` (softmax over the last axis), ``"bernoulli"``
            (sigmoid) or ``"normal"``.
        batch_size: Inputs per batch, ``B``; None: all at once.
        progress: Whether to show a bar over the draws.
        variance: Variance of the observations, for ``"normal"`` alone; a scalar, or an
            array that broadcasts to the outputs.

    Returns:
        Probabilities ``[n, ...]`` in float32 at least; for ``"normal"`` a `Normal`.

    Raises:
        ValueError: Unknown likelihood, bad inputs, no key for draws, a wrong number.
    """
    batches, moments = split_batches(inputs, batch_size), []
    draws = drawn_weights(state, params, key, num_samples, likelihood, progress)
    for number, weights in enumerate(draws, start=1):
        if not moments:
            run = functools.partial(forward, apply_fn, likelihood)
            zeros = optax.tree.zeros_like(jax.eval_shape(run, weights, batches[0]))
            moments = [(zeros, zeros)] * len(batches)
        moments = [
            add_draw(apply_fn, likelihood, moment, weights, batch, np.float32(number))
            for moment, batch in zip(moments, batches, strict=True)
        ]
    n = length(inputs)
    mean, squares = (jnp.concatenate(m)[:n] for m in zip(*moments, strict=True))
    if likelihood != "normal":
        return mean
    total = squares / max(1, num_samples) + jnp.asarray(variance, mean.dtype)
    return Normal(mean, total)


def predict_each(
    apply_fn: Apply,
    state: Any,
    params: Any,
    inputs: Any,
    key: Array | None = None,
    num_samples: int = 32,
    likelihood: str = "categorical",
    batch_size: int | None = None,
    progress: bool = False,
) -> Array:
    """Predictions of every draw by itself: how much the draws disagree.

    The draws are those of `predict` with the same key.

    Args:
        apply_fn: As for `predict`.
        state: As for `predict`.
        params: Mean of the posterior.
        inputs: ``[n, ...]``, or a tree of arrays that share the leading axis.
        key: PRNG key of the draws.
        num_samples: ``S``, number of draws; 0: one prediction, with ``params``.
        likelihood: As for `predict`; ``"normal"`` gives the means.
        batch_size: Inputs per batch; None: all at once.
        progress: Whether to show a bar over the draws.

    Returns:
        ``[S, n, ...]``: probabilities, or means.

    Raises:
        ValueError: As for `predict`.
    """
    batches, n, found = split_batches(inputs, batch_size), length(inputs), []
    draws = drawn_weights(state, params, key, num_samples, likelihood, progress)
    for weights in draws:
        rows = [compiled(apply_fn, likelihood, weights, batch) for batch in batches]
        found.append(jnp.concatenate(rows)[:n])
    return jnp.stack(found)


def forward(apply_fn: Apply, likelihood: str, weights: Any, batch: Any) -> Array:
    """What is averaged over draws, in float32 at least."""
    outputs, rows = apply_fn(weights, batch), length(batch)
    if outputs.shape[:1] != (rows,):
        raise ValueError(
            f"apply_fn gave an output of shape {outputs.shape} for {rows} inputs; "
            f"wanted [{rows}, ...]."
        )
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return LIKELIHOODS[likelihood](outputs.astype(wide))


compiled = jax.jit(forward, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def add_draw(
    apply_fn: Apply,
    likelihood: str,
    moments: Moments,
    weights: Any,
    batch: Any,
    number: Array,
) -> Moments:
    """Moments with one more draw, the ``number``-th (Welford's recurrence)."""
    found, (mean, squares) = forward(apply_fn, likelihood, weights, batch), moments
    change = found - mean
    mean = mean + change / number.astype(found.dtype)
    return mean, squares + change * (found - mean)


compiled_sample = jax.jit(sample)


def drawn_weights(
    state: Any,
    params: Any,
    key: Array | None,
    num_samples: int,
    likelihood: str,
    progress: bool,
) -> Iterable[Any]:
    """Draws of the weights, one after the other; without draws, the mean."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood is {likelihood!r}; wanted one of {', '.join(LIKELIHOODS)}."
        )
    if num_samples < 0:
        raise ValueError(f"num_samples is {num_samples}; wanted at least 0.")
    if state is None or num_samples == 0:
        return [params]
    if key is None:
        raise ValueError(f"{num_samples} draws of the weights want a key, got None.")
    leaves = jax.tree.leaves((state, params))
    arrays = all(isinstance(x, jax.Array | np.ndarray | np.generic) for x in leaves)
    draw = compiled_sample if arrays else sample
    draws = (draw(state, params, k) for k in jax.random.split(key, num_samples))
    if not progress:
        return draws
    from rich.progress import track  # only where it is asked for

    return track(draws, "draws of the weights", num_samples, transient=True)


def length(inputs: Any) -> int:
    """Number of examples in a tree of arrays that share the leading axis."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "inputs wants arrays [n, ...] with the same n > 0, got shapes "
            f"{', '.join(map(str, shapes)) or 'of no array'}."
        )
    return sizes.pop()


def split_batches(inputs: Any, batch_size: int | None) -> list[Any]:
    """Batches of one size; the last repeats its last example to fill up."""
    n = length(inputs)
    size = n if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size is {batch_size}; wanted at least 1.")
    size = min(size, n)
    batches = [
        jax.tree.map(lambda x, i=start: x[i : i + size], inputs)
        for start in range(0, n - n % size, size)
    ]
    if n % size:
        rows = np.minimum(np.arange(n - n % size, n - n % size + size), n - 1)
        batches.append(jax.tree.map(lambda x: x[rows], inputs))
    return batches


@functools.partial(jax.jit, static_argnames=("apply_fn", "batch_size"))
def linearised_outputs(
    apply_fn: Callable[..., Any],
    posterior: Any,
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
    own = posterior.uncertain(params)

    def one(x: Any):
        single = jax.tree.map(lambda leaf: leaf[None], x)

        def output(values: Any):
            return apply_fn(posterior.replaced(params, values), single)[0]

        mean = output(own)
        rows = [j.reshape(mean.size, -1) for j in jax.jacrev(output)(own)]
        return mean, posterior.output_covariance(jnp.concatenate(rows, 1))

    if batch_size is None:
        return jax.vmap(one)(inputs)
    return jax.lax.map(one, inputs, batch_size=batch_size)


def predict_glm(
    apply_fn: Callable[..., Any],
    posterior: Any,
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
    for name, value, known in (
        ("likelihood", likelihood, tuple(LIKELIHOODS)),
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
    mean, s = linearised_outputs(apply_fn, posterior, params, inputs, batch_size)
    spread = jnp.diagonal(s, axis1=1, axis2=2).reshape(mean.shape)
    if likelihood == "normal":
        return Normal(mean, spread + jnp.asarray(variance, spread.dtype))
    if link == "bridge":
        if mean.ndim != 2:
            raise ValueError(
                f"predict_glm: the Laplace bridge wants logits [n, classes], got "
                f"{mean.shape}: use link='probit' or 'mc'."
            )
        return laplace_bridge(mean, s)
    squash = LIKELIHOODS[likelihood]
    if link == "probit":
        return squash(mean / jnp.sqrt(1 + jnp.pi / 8 * spread))
    return sampled_mean(squash, mean, s, key, num_samples)


def laplace_bridge(mean: Array, s: Array) -> Array:
    """Mean ``α / Σ α [n, C]`` of the Dirichlet distribution of normal logits.

    ``α_k = (1 − 2/C + exp(m_k)/C² Σ_l exp(−m_l)) / S_kk``, after ``m`` and ``S`` are
    centred, ``P m`` and ``P S P`` with ``P = I − 1 1ᵀ/C``: the softmax does not see
    what is taken off. It inverts the map from a Dirichlet distribution to the normal
    distribution of its logits; of other ``S`` it is rough, and as ``S`` vanishes it is
    not ``softmax(m)``. Hobbhahn, Kristiadi & Hennig, 2022, arXiv:2003.01227, Eq. 8
    (they condition on a sum of zero instead of centring).
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
    """Mean of ``squash(z)`` over draws ``z ~ N(m, S)``, ``S`` perhaps singular."""
    values, vectors = eigh(s)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]

    def add(total: Array, key: Array):
        noise = jax.random.normal(key, s.shape[:2], s.dtype)
        offset = jnp.einsum("nij,nj->ni", root, noise)
        z = mean + offset.reshape(mean.shape).astype(mean.dtype)
        return total + squash(z), None

    keys = jax.random.split(key, num_samples)
    return jax.lax.scan(add, jnp.zeros_like(mean), keys)[0] / num_samples


def mean_nll(likelihood: str, prediction: Any, labels: Any) -> Array:
    """Mean over the inputs of ``−log p(y)`` under predictions of ``predict_glm``.

    Labels are class numbers ``[n]``, zeros and ones, or values like the output.
    """
    if likelihood == "normal":
        mean, variance = prediction
        terms = -jax.scipy.stats.norm.logpdf(labels, mean, jnp.sqrt(variance))
        return terms.reshape(len(terms), -1).sum(1).mean()
    if likelihood == "categorical":
        p = jnp.take_along_axis(prediction, labels[..., None], -1)
        return -jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)).mean()
    p = jnp.where(labels == 1, prediction, 1 - prediction)
    terms = -jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
    return terms.reshape(len(terms), -1).sum(1).mean()
