"""Predictions averaged over weights drawn from a posterior.

``p(y | x) = (1/S) Σ_s p(y | x, w_s)`` with ``w_s`` drawn once, the same for all inputs.
Only one draw is in memory at a time, and one batch of inputs goes through the network:
the loops over draws and batches are Python's, over two compiled programs (a draw; a
batch, forward and added to the mean). A `jax.lax.scan` would be one program, in which
jaxlib 0.10.2 computes convolutions on CPUs ten times more slowly.

What `predict` is given as ``state`` is whatever `kfac_jax_lite.bayes.posterior.sample`
takes: any optax state with a posterior inside, or a posterior.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.bayes.posterior import sample
from kfac_jax_lite.core.types import Array, ArrayLike

Apply = Callable[[Any, Any], Array]


class Normal(NamedTuple):
    """Normal predictions; both fields are shaped like the network's output.

    Attributes:
        mean: Mean of the outputs.
        variance: Their variance, that of the observations' noise included.
    """

    mean: Array
    variance: Array


class Moments(NamedTuple):
    """Running moments of a batch's outputs: of all draws so far.

    Attributes:
        mean: Their mean.
        squares: Sum of squared deviations from it.
    """

    mean: Array
    squares: Array


# From a network's output to what is averaged; `predict` says what each one means.
LINKS: dict[str, Callable[[Array], Array]] = {
    "categorical": jax.nn.softmax,
    "bernoulli": jax.nn.sigmoid,
    "normal": lambda outputs: outputs,
}


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
    batches = _batches(inputs, batch_size)
    moments: list[Any] = []
    draws = _draws(state, params, key, num_samples, likelihood, progress)
    for number, weights in enumerate(draws, start=1):
        if not moments:
            zeros = _zeros(apply_fn, likelihood, weights, batches[0])
            moments = [zeros] * len(batches)
        moments = [
            _add(apply_fn, likelihood, moment, weights, batch, np.float32(number))
            for moment, batch in zip(moments, batches, strict=True)
        ]
    n = _length(inputs)
    mean = jnp.concatenate([m.mean for m in moments])[:n]
    if likelihood != "normal":
        return mean
    squares = jnp.concatenate([m.squares for m in moments])[:n]
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
    """Predictions of every draw by itself, as `metrics.mutual_information` wants them.

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
    batches, n, found = _batches(inputs, batch_size), _length(inputs), []
    for weights in _draws(state, params, key, num_samples, likelihood, progress):
        rows = [_outputs(apply_fn, likelihood, weights, batch) for batch in batches]
        found.append(jnp.concatenate(rows)[:n])
    return jnp.stack(found)


def _forward(apply_fn: Apply, likelihood: str, weights: Any, batch: Any) -> Array:
    """What is averaged over draws, in float32 at least."""
    outputs = apply_fn(weights, batch)
    rows = _length(batch)
    if outputs.shape[:1] != (rows,):
        raise ValueError(
            f"apply_fn gave an output of shape {outputs.shape} for {rows} inputs; "
            f"wanted [{rows}, ...]."
        )
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return LINKS[likelihood](outputs.astype(wide))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(apply_fn: Apply, likelihood: str, weights: Any, batch: Any) -> Array:
    """`_forward`, compiled."""
    return _forward(apply_fn, likelihood, weights, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add(
    apply_fn: Apply,
    likelihood: str,
    moments: Moments,
    weights: Any,
    batch: Any,
    number: Array,
) -> Moments:
    """Moments with one more draw, the ``number``-th (Welford's recurrence)."""
    found = _forward(apply_fn, likelihood, weights, batch)
    change = found - moments.mean
    mean = moments.mean + change / number.astype(found.dtype)
    return Moments(mean, moments.squares + change * (found - mean))


def _zeros(apply_fn: Apply, likelihood: str, weights: Any, batch: Any) -> Moments:
    """Moments of no draws."""
    run = functools.partial(_forward, apply_fn, likelihood)
    like = jax.eval_shape(run, weights, batch)
    return Moments(jnp.zeros(like.shape, like.dtype), jnp.zeros(like.shape, like.dtype))


def _draws(
    state: Any,
    params: Any,
    key: Array | None,
    num_samples: int,
    likelihood: str,
    progress: bool,
) -> Iterable[Any]:
    """Draws of the weights, one after the other; without draws, the mean."""
    if likelihood not in LINKS:
        raise ValueError(
            f"likelihood is {likelihood!r}; wanted one of {', '.join(LINKS)}."
        )
    if num_samples < 0:
        raise ValueError(f"num_samples is {num_samples}; wanted at least 0.")
    if state is None or num_samples == 0:
        return [params]
    if key is None:
        raise ValueError(f"{num_samples} draws of the weights want a key, got None.")
    draws = _drawn(state, params, jax.random.split(key, num_samples))
    if not progress:
        return draws
    from rich.progress import track  # only where it is asked for

    return track(draws, "draws of the weights", num_samples, transient=True)


_sample = jax.jit(sample)


def _drawn(state: Any, params: Any, keys: Array) -> Iterator[Any]:
    """One draw for each key; compiled where the state is a tree of arrays."""
    leaves = jax.tree.leaves((state, params))
    arrays = all(isinstance(x, jax.Array | np.ndarray | np.generic) for x in leaves)
    draw = _sample if arrays else sample
    for key in keys:
        yield draw(state, params, key)


def _length(inputs: Any) -> int:
    """Number of examples in a tree of arrays that share the leading axis."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "inputs wants arrays [n, ...] with the same n > 0, got shapes "
            f"{', '.join(map(str, shapes)) or 'of no array'}."
        )
    return sizes.pop()


def _batches(inputs: Any, batch_size: int | None) -> list[Any]:
    """Batches of one size; the last repeats its last example to fill up."""
    n = _length(inputs)
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
