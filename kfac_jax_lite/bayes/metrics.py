"""Quality of predictive probabilities: error, calibration, strangeness of inputs.

Probabilities are ``[n, C]``, one row per example, each of sum one; labels are integers
``[n]``. Every function can be jitted and reckons in float32 at least. A label that is
no class (a negative one, too) makes the figures that read its probability NaN.

Calibration compares confidence, ``c_i = max_k p_ik``, with accuracy in bins of examples
of similar confidence.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.types import Array, ArrayLike

TRUE_POSITIVES = 95  # percent, of `fpr95`


class Reliability(NamedTuple):
    """A reliability diagram; all fields are ``[bins]``.

    Attributes:
        confidence: Mean confidence of a bin's examples; 0 in an empty bin.
        accuracy: Share of a bin's examples that are classified rightly; 0 if empty.
        count: Number of examples, an integer.
        lower: Lower edges: of equal widths, or the least confidence of an adaptive bin.
        upper: Upper edges, or the greatest confidence; an empty adaptive bin has 0, 0.
    """

    confidence: Array
    accuracy: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    lower: Array
    upper: Array


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """Share of the examples whose label is the most probable class.

    Among equally probable classes, the first counts as predicted.

    Args:
        probabilities: ``[n, C]``.
        labels: Integers ``[n]``.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: Wrong shapes, or labels that are no integers.
    """
    p, y = _checked("accuracy", probabilities, labels)
    return jnp.mean(jnp.argmax(p, -1) == y, dtype=p.dtype)


def nll(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """Negative log-likelihood, ``−(1/n) Σ_i log p_i,label(i)``, in nats.

    Probabilities have a floor, the smallest normal number of their type (1e-38 in
    float32, so that an example costs at most 87.3 nats): a zero, which is what a small
    one rounds to, would make the mean infinite.

    Args:
        probabilities: ``[n, C]``.
        labels: Integers ``[n]``.

    Returns:
        The mean.

    Raises:
        ValueError: Wrong shapes, or labels that are no integers.
    """
    p, y = _checked("nll", probabilities, labels)
    floor = jnp.finfo(p.dtype).tiny
    return -jnp.mean(jnp.log(jnp.maximum(_of_label(p, y), floor)))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """Brier score, ``(1/n) Σ_i Σ_k (p_ik − [k = label(i)])²``: from 0 to 2.

    Args:
        probabilities: ``[n, C]``.
        labels: Integers ``[n]``.

    Returns:
        The mean over examples of the sum over classes.

    Raises:
        ValueError: Wrong shapes, or labels that are no integers.

    References:
        Brier, 1950, "Verification of forecasts expressed in terms of probability".
    """
    p, y = _checked("brier", probabilities, labels)
    wanted = jax.nn.one_hot(y, p.shape[1], dtype=p.dtype)
    squares = jnp.sum((p - wanted) ** 2, -1)
    return jnp.mean(squares + 0 * _of_label(p, y))


def reliability(
    probabilities: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    adaptive: bool = False,
) -> Reliability:
    """Accuracy against confidence in bins.

    Bin ``b`` of ``B`` holds the examples of confidence in ``((b − 1)/B, b/B]``.
    Adaptive bins hold equally many examples (to one), in the order of their confidence;
    examples of equal confidence at an edge are divided in the order they are given in.

    Args:
        probabilities: ``[n, C]``.
        labels: Integers ``[n]``.
        num_bins: Number of bins, static under jit.
        adaptive: Whether bins have equal counts instead of equal widths.

    Returns:
        The bins in ascending order.

    Raises:
        ValueError: Wrong shapes, labels that are no integers, no bins.

    References:
        Guo et al., 2017, arXiv:1706.04599, Sec. 2; adaptive bins: Nguyen & O'Connor,
        2015, "Posterior calibration and exploratory analysis for natural language
        processing models"; Nixon et al., 2019, arXiv:1904.01685, Sec. 3.
    """
    p, y = _checked("reliability", probabilities, labels)
    if not isinstance(num_bins, numbers.Integral) or num_bins < 1:
        raise ValueError(f"reliability wants num_bins >= 1, got {num_bins!r}.")
    size, n = int(num_bins), len(p)
    confidence = jnp.max(p, -1)
    hit = (jnp.argmax(p, -1) == y).astype(p.dtype)
    edges = jnp.linspace(0, 1, size + 1, dtype=p.dtype)
    if adaptive:
        order = jnp.argsort(confidence)
        confidence, hit = confidence[order], hit[order]
        place = jnp.asarray(np.arange(n) * size // n)
    else:
        place = jnp.searchsorted(edges[1:-1], confidence)
    count = jax.ops.segment_sum(jnp.ones_like(place), place, size)
    share = 1 / jnp.maximum(count, 1).astype(p.dtype)
    lower, upper = edges[:-1], edges[1:]
    if adaptive:
        full = count > 0
        lower = jnp.where(full, jax.ops.segment_min(confidence, place, size), 0)
        upper = jnp.where(full, jax.ops.segment_max(confidence, place, size), 0)
    return Reliability(
        jax.ops.segment_sum(confidence, place, size) * share,
        jax.ops.segment_sum(hit, place, size) * share,
        count,
        lower,
        upper,
    )


def calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    adaptive: bool = False,
) -> Array:
    """Expected calibration error, ``Σ_b (n_b / n) |accuracy_b − confidence_b|``.

    It grows with the number of bins, and is greater than 0 for a calibrated classifier
    on few examples: compare figures of the same bins and the same number of examples.

    Args:
        probabilities: ``[n, C]``.
        labels: Integers ``[n]``.
        num_bins: Number of bins, static under jit.
        adaptive: Whether bins have equal counts instead of equal widths.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: As for `reliability`.

    References:
        Guo et al., 2017, arXiv:1706.04599, Sec. 2; Nixon et al., 2019,
        arXiv:1904.01685.
    """
    bins = reliability(probabilities, labels, num_bins, adaptive)
    gap = jnp.abs(bins.accuracy - bins.confidence)
    weight = bins.count.astype(gap.dtype) / jnp.sum(bins.count).astype(gap.dtype)
    return jnp.sum(weight * gap)


def confidence(probabilities: ArrayLike) -> Array:
    """Largest probability of each row, ``max_k p_k``; high for familiar inputs.

    Args:
        probabilities: ``[..., C]``.

    Returns:
        Scores ``[...]``.

    References:
        Hendrycks & Gimpel, 2017, arXiv:1610.02136.
    """
    return jnp.max(_wide(probabilities), -1)


def entropy(probabilities: ArrayLike) -> Array:
    """Predictive entropy, ``−Σ_k p_k log p_k``, in nats; high for strange inputs.

    Args:
        probabilities: ``[..., C]``.

    Returns:
        Entropies ``[...]``; their negatives are scores for `auroc` and `fpr95`.
    """
    return jnp.sum(jax.scipy.special.entr(_wide(probabilities)), -1)


def mutual_information(samples: ArrayLike) -> Array:
    """What a label would tell about the weights (BALD); high for strange inputs.

    ``H(mean_s p_s) − mean_s H(p_s)``, at least 0: the part of the predictive entropy on
    which the sampled networks disagree, without that on which all are unsure.

    Args:
        samples: Probabilities by each draw of the weights, ``[S, n, C]``, as from
            `predict_each`.

    Returns:
        ``[n]``; the negatives are scores for `auroc` and `fpr95`.

    Raises:
        ValueError: Not three axes.

    References:
        Houlsby et al., 2011, arXiv:1112.5745; Gal et al., 2017, arXiv:1703.02910.
    """
    if jnp.ndim(samples) != 3:
        raise ValueError(
            "mutual_information wants probabilities [samples, n, classes], got shape "
            f"{jnp.shape(samples)}."
        )
    p = _wide(samples)
    return jnp.maximum(entropy(jnp.mean(p, 0)) - jnp.mean(entropy(p), 0), 0)


def auroc(inside: ArrayLike, outside: ArrayLike) -> Array:
    """Area under the receiver operating characteristic, ties counting half.

    ``P(inside > outside) + P(inside = outside) / 2`` for a score of each kind drawn at
    random: the statistic of Mann and Whitney over the number of pairs.

    Args:
        inside: Scores ``[n]`` of inputs like the training data; higher is more alike.
        outside: Scores ``[m]`` of other inputs.

    Returns:
        1 where the scores separate the inputs, 0.5 where they tell nothing; NaN if a
        score is.

    Raises:
        ValueError: Scores that are no vectors, or empty.
    """
    own, other = _scores("auroc", inside, outside)
    ordered = jnp.sort(other)
    below = jnp.searchsorted(ordered, own, side="left")
    upto = jnp.searchsorted(ordered, own, side="right")
    share = (below + upto).astype(own.dtype) / (2 * len(other))
    return _nan_of(jnp.mean(share), own, other)


def fpr95(inside: ArrayLike, outside: ArrayLike) -> Array:
    """Share of outside inputs that pass a threshold which 95 % of the inside ones pass.

    The threshold is the greatest score that at least 95 % of ``inside`` reach.

    Args:
        inside: Scores ``[n]`` of inputs like the training data; higher is more alike.
        outside: Scores ``[m]`` of other inputs.

    Returns:
        A number from 0 (separated) to 1; NaN if a score is.

    Raises:
        ValueError: Scores that are no vectors, or empty.

    References:
        Hendrycks & Gimpel, 2017, arXiv:1610.02136; Liang et al., 2018,
        arXiv:1706.02690, Sec. 4.
    """
    own, other = _scores("fpr95", inside, outside)
    passing = -(-TRUE_POSITIVES * len(own) // 100)  # rounded up
    threshold = jnp.sort(own)[len(own) - passing]
    share = jnp.mean(other >= threshold, dtype=own.dtype)
    return _nan_of(share, own, other)


def _wide(values: ArrayLike) -> Array:
    """Floats of at least 32 bits."""
    return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))


def _checked(
    name: str, probabilities: ArrayLike, labels: ArrayLike
) -> tuple[Array, Array]:
    """Wide probabilities and the labels, after a look at the shapes."""
    seen, rows = jnp.shape(probabilities), jnp.shape(labels)
    if len(seen) != 2 or not all(seen) or rows != seen[:1]:
        raise ValueError(
            f"{name} wants probabilities [n, classes] and labels [n], n > 0; got "
            f"shapes {seen} and {rows}."
        )
    kind = jnp.result_type(labels)
    if not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(f"{name} wants integer labels, got {kind}.")
    return _wide(probabilities), jnp.asarray(labels)


def _of_label(p: Array, labels: Array) -> Array:
    """Each label's probability ``[n]``; NaN where the label is no class."""
    index = jnp.where(labels < 0, p.shape[1], labels)[:, None]
    return jnp.take_along_axis(p, index, 1, mode="fill", fill_value=jnp.nan)[:, 0]


def _scores(name: str, inside: ArrayLike, outside: ArrayLike) -> tuple[Array, Array]:
    """Wide scores of one type, after a look at the shapes."""
    shapes = jnp.shape(inside), jnp.shape(outside)
    if any(len(shape) != 1 or not shape[0] for shape in shapes):
        raise ValueError(
            f"{name} wants scores [n] and [m], not empty; got shapes {shapes[0]} and "
            f"{shapes[1]}."
        )
    kind = jnp.promote_types(jnp.result_type(inside), jnp.result_type(outside))
    kind = jnp.promote_types(kind, jnp.float32)
    return jnp.asarray(inside, kind), jnp.asarray(outside, kind)


def _nan_of(value: Array, *scores: Array) -> Array:
    """The value; NaN if a score is."""
    bad = jnp.any(jnp.stack([jnp.any(jnp.isnan(s)) for s in scores]))
    return jnp.where(bad, jnp.nan, value)
