"""Marks for the network's output, and what the Fisher information needs of them.

A mark is ``jax.ad_checkpoint.checkpoint_name``: the identity for values, derivatives
and every transformation, visible in the jaxpr under a name of ours. The Fisher
information of ``p(y | z)`` with respect to the output ``z`` is ``Λ(z)``; one row of
``z`` is one term of the mean loss.

References:
    Martens, 2020, "New insights and perspectives on the natural gradient method",
    arXiv:1412.1193, Secs. 5-9.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kfac_jax_lite.core.linalg import expanded
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, accumulation_dtype

PREFIX = "kfac_jax_lite."
LIKELIHOODS = ("categorical", "bernoulli", "normal")
MASK, WEIGHT = "mask", "weight"
# Marks of what goes with the output that follows, in front of it.
BESIDE = (MASK, WEIGHT)
Weight = Array | float | None


def categorical(
    logits: Array, mask: Array | None = None, weight: Weight = None
) -> Array:
    """Marks ``logits [..., classes]`` of a categorical distribution; the identity.

    ``Λ = diag(p) − p pᵀ`` with ``p = softmax(z)``; rows are all axes but the last.

    A loss may have several terms, each with a marked output of its own, of other rows
    and with another weight: ``L = Σ_k w_k · mean over the N_k rows of mark k``.

    Args:
        logits: Unnormalised log-probabilities, ``[..., classes]``.
        mask: Which rows the loss averages over, bool ``[...]``; None: all. With a mask
            ``N`` is the number of true entries, and in every layer only rows count that
            the loss depends on: padded tokens do not enter the factors, nor do rows at
            which all units of a layer are off. (Where padding is inside the network
            only, as in a classifier of token sequences, pass a mask of ones.)
        weight: ``w``, a number, or one for every row ``[...]``, that the loss
            multiplies this term with, not differentiated. None: of the only mark 1; of
            several, measured where the loss's second derivative by its output is a
            multiple of ``Λ``, else 1.

    Returns:
        ``logits``, unchanged.

    Raises:
        TypeError: Complex logits.
        ValueError: ``logits`` is a scalar; mask or weight are not shaped like its rows;
            a negative weight.
    """
    if jnp.ndim(logits) < 1:
        raise ValueError("kfac.categorical wants logits [..., classes], got a scalar.")
    return marked(logits, "categorical", mask, weight)


def marked(output: Array, likelihood: str, mask: Array | None, weight: Weight) -> Array:
    """The output under its name, behind its mask and its weight under theirs."""
    shape = jnp.shape(output)
    if jnp.issubdtype(jnp.result_type(output), jnp.complexfloating):
        raise TypeError(
            f"kfac.{likelihood} marks real outputs, got {jnp.result_type(output)} "
            f"{shape}: mark what the loss makes of it, such as real and imaginary part "
            "side by side."
        )
    rows = row_shape(shape, likelihood)
    if mask is not None:
        if jnp.shape(mask) != rows:
            raise ValueError(
                f"kfac.{likelihood}: the mask has shape {jnp.shape(mask)}, wanted "
                f"{rows}, one entry for every row of the output {shape}."
            )
        checkpoint_name(jnp.asarray(mask, bool).astype(jnp.float32), PREFIX + MASK)
    if weight is not None:
        if jnp.shape(weight) not in ((), rows):
            raise ValueError(
                f"kfac.{likelihood}: the weight has shape {jnp.shape(weight)}, wanted "
                f"a number or {rows}, one for every row of the output {shape}."
            )
        if isinstance(weight, (int, float)) and not 0 <= weight < float("inf"):
            raise ValueError(
                f"kfac.{likelihood} wants a weight >= 0 and finite, got {weight}."
            )
        dtype = accumulation_dtype(jnp.result_type(output))
        value = jax.lax.stop_gradient(jnp.asarray(weight, dtype))
        checkpoint_name(value, PREFIX + WEIGHT)
    return checkpoint_name(output, PREFIX + likelihood)


def bernoulli(logits: Array, mask: Array | None = None, weight: Weight = None) -> Array:
    """Marks ``logits [..., outputs]`` of independent Bernoulli outputs; the identity.

    ``Λ = diag(p (1 − p))`` with ``p = sigmoid(z)``. The loss of one row is the *sum*
    over its outputs; a vector ``[B]`` is ``B`` rows of one output.

    Args:
        logits: Log-odds, ``[..., outputs]`` or ``[B]``.
        mask: Which rows count, as for ``categorical``.
        weight: Of this term or of its rows, as for ``categorical``.

    Returns:
        ``logits``, unchanged.

    Raises:
        TypeError: Complex logits.
        ValueError: Mask or weight are not shaped like the rows; a negative weight.
    """
    return marked(logits, "bernoulli", mask, weight)


def normal(
    mean: Array,
    variance: Array | float = 1.0,
    mask: Array | None = None,
    weight: Weight = None,
) -> Array:
    """Marks the ``mean [..., outputs]`` of a normal distribution; the identity.

    ``Λ = I / variance``: the loss of one row is ``Σ (y − z)² / (2 variance)``. With
    another variance than 1 the value may differ from ``mean`` in the last bit.

    Args:
        mean: Mean of the outputs, ``[..., outputs]`` or ``[B]``.
        variance: Known variance, a scalar or an array that broadcasts to ``mean``.
        mask: Which rows count, as for ``categorical``.
        weight: Of this term or of its rows, as for ``categorical``.

    Returns:
        ``mean``.

    Raises:
        TypeError: A complex mean.
        ValueError: A concrete ``variance`` is not positive; mask or weight are not
            shaped like the rows; a negative weight.
    """
    if isinstance(variance, (int, float)):
        if variance <= 0:
            raise ValueError(f"kfac.normal wants variance > 0, got {variance}.")
        if variance == 1:
            return marked(mean, "normal", mask, weight)
    deviation = jax.lax.stop_gradient(jnp.sqrt(jnp.asarray(variance, mean.dtype)))
    return marked(mean / deviation, "normal", mask, weight) * deviation


def row_shape(shape: Shape, likelihood: str) -> Shape:
    """Axes of an output that count loss terms (all but the last)."""
    return shape if likelihood != "categorical" and len(shape) == 1 else shape[:-1]


class Output(NamedTuple):
    """A marked output.

    Attributes:
        likelihood: Which.
        value: ``z``.
        mask: Which rows count; None: all.
        given: ``w``, a number or one for every row, given or measured; None: 1.
        weight: What ``Λ`` is multiplied with so that all outputs are averaged over the
            terms of the first: ``w_k N_1 / N_k``; None: 1.
    """

    likelihood: str
    value: Array
    mask: Array | None
    given: Any = None
    weight: Any = None

    @property
    def terms(self) -> Any:
        """``N_k``: how many rows count, at least 1."""
        if self.mask is None:
            return math.prod(row_shape(jnp.shape(self.value), self.likelihood))
        dtype = accumulation_dtype(self.value.dtype)
        return jnp.maximum(self.mask.sum(dtype=dtype), 1)


def outputs_of(names: Sequence[str], values: Sequence[Array]) -> list[Output]:
    """Marked outputs from all marks in program order."""
    outputs: list[Output] = []
    beside: dict[str, Array] = {}
    for name, value in zip(names, map(jnp.asarray, values), strict=True):
        if name in BESIDE:
            beside[name] = value
        else:
            outputs.append(Output(name, value, beside.get(MASK), beside.get(WEIGHT)))
            beside = {}
    return weighed(outputs, [output.given for output in outputs])


def weighed(outputs: Sequence[Output], weights: Sequence[Any]) -> list[Output]:
    """The outputs with these weights, each over its own number of terms."""
    found = []
    for output, own in zip(outputs, weights, strict=True):
        weight, first, terms = own, outputs[0].terms, output.terms
        alike = first is terms or (outputs[0].mask is output.mask is None)
        if output is not outputs[0] and not (alike and first == terms):
            weight = (1 if own is None else own) * (first / terms)
        found.append(output._replace(given=own, weight=weight))
    return found


def count_terms(outputs: Sequence[Output]) -> Array | None:
    """``N`` of the first output, where it is masked, else None."""
    return outputs[0].terms if outputs and outputs[0].mask is not None else None


def masked_rows(output: Output, rows: Array) -> Array:
    """Zeros in the rows that do not count."""
    if output.mask is None:
        return rows
    return rows * expanded(output.mask, rows.ndim).astype(rows.dtype)


def weighted_rows(output: Output, rows: Array, power: float = 1.0) -> Array:
    """Rows times a power of their weights; zeros where they do not count."""
    rows = masked_rows(output, rows)
    if output.weight is None:
        return rows
    weight = jnp.asarray(output.weight, rows.dtype) ** power
    return rows * expanded(weight, rows.ndim)


def sampled_cotangent(likelihood: str, output: Array, key: Array) -> Array:
    """Gradient of ``−log p(y | z)``, ``z [..., outputs]``, for labels ``y`` drawn."""
    z = output.astype(jnp.promote_types(output.dtype, jnp.float32))

    def noise(distribution: Callable[..., Array]):
        # Random bits in a row compile four times faster on a CPU than in a matrix; they
        # are the same bits.
        return distribution(key, (z.size,), z.dtype).reshape(z.shape)

    if likelihood == "categorical":
        labels = jnp.argmax(z + noise(jax.random.gumbel), -1)
        one_hot = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)
        draw = jax.nn.softmax(z) - one_hot
    elif likelihood == "bernoulli":
        p = jax.nn.sigmoid(z)
        draw = p - (noise(jax.random.uniform) < p).astype(z.dtype)
    else:
        draw = noise(jax.random.normal)
    return draw.astype(output.dtype)


def square_root_column(
    likelihood: str, output: Array
) -> tuple[int, Callable[[Any], Array]]:
    """A square root of ``Λ(z)``, column by column."""
    z = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    scalar = z.ndim <= 1 and likelihood != "categorical"
    columns = 1 if scalar else z.shape[-1]

    def unit(j: Any):
        here = jnp.arange(columns) == j
        return jnp.ones_like(z) if scalar else jnp.broadcast_to(here, z.shape)

    if likelihood == "categorical":
        p = jax.nn.softmax(z)

        def column(j: Any):
            root = jnp.sqrt(jnp.take(p, j, axis=-1))[..., None]
            return ((unit(j) - p) * root).astype(output.dtype)

    elif likelihood == "bernoulli":
        root = jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))

        def column(j: Any):
            return (root * unit(j)).astype(output.dtype)

    else:

        def column(j: Any):
            return (jnp.ones_like(z) * unit(j)).astype(output.dtype)

    return columns, column


def fisher_product(likelihood: str, output: Array, tangent: Array) -> Array:
    """``Λ(z) t`` row by row, of ``z [..., outputs]``."""
    z = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    t = tangent.astype(z.dtype)
    if likelihood == "categorical":
        p = jax.nn.softmax(z)
        # Not jnp.sum(p * t): jaxlib 0.10.2 fuses that, for CPUs, with the last layer's
        # product and then gets more than 32,768 entries of it wrong,
        # https://github.com/jax-ml/jax/issues/39103.
        return p * (t - jnp.vecdot(p, t)[..., None])
    if likelihood == "bernoulli":
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * t
    return t
