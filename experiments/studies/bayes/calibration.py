"""Quality of predictive probabilities: error, calibration, strangeness of inputs.

Probabilities are ``[n, C]``, one row per example; labels are integers ``[n]``. All is
reckoned in float64. Calibration compares confidence, ``max_k p_ik``, with accuracy in
bins of examples of similar confidence.

References:
    Guo et al., 2017, arXiv:1706.04599, Sec. 2 (calibration); Nixon et al., 2019,
    arXiv:1904.01685, Sec. 3 (adaptive bins); Hendrycks & Gimpel, 2017, arXiv:1610.02136
    and Liang et al., 2018, arXiv:1706.02690, Sec. 4 (strange inputs).
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

# What a zero in float32 counts as: a wrong and certain example costs 87.3 nats.
FLOOR = float(np.finfo(np.float32).tiny)
TRUE_POSITIVES = 95  # percent, of `fpr95`


class Reliability(NamedTuple):
    """A reliability diagram; all fields are ``[bins]``, zero for an empty bin.

    Attributes:
        confidence: Mean confidence of a bin's examples.
        accuracy: Share of a bin's examples that are classified rightly.
        size: Number of examples.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    size: np.ndarray


def checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; every label must be a class."""
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or not p.size:
        raise ValueError(
            f"probabilities [n, classes] and labels [n] wanted, n > 0; got shapes "
            f"{p.shape} and {y.shape}."
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels 0 to {p.shape[1] - 1} wanted, got {y.dtype} {y}.")
    return p, y


def accuracy(probabilities: Any, labels: Any) -> float:
    """Share of the examples whose label is the first most probable class."""
    p, y = checked(probabilities, labels)
    return float(np.mean(p.argmax(1) == y))


def nll(probabilities: Any, labels: Any) -> float:
    """Negative log-likelihood, ``−(1/n) Σ_i log p_i,label(i)``, in nats."""
    p, y = checked(probabilities, labels)
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], FLOOR)).mean())


def brier(probabilities: Any, labels: Any) -> float:
    """Brier score, ``(1/n) Σ_i Σ_k (p_ik − [k = label(i)])²``: from 0 to 2."""
    p, y = checked(probabilities, labels)
    return float(np.square(p - np.eye(p.shape[1])[y]).sum(1).mean())


def reliability(
    probabilities: Any, labels: Any, num_bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Accuracy against confidence in bins, in ascending order.

    Bin ``b`` of ``B`` holds the examples of confidence in ``((b − 1)/B, b/B]``.
    Adaptive bins hold equally many examples (to one), in the order of their confidence.
    """
    p, y = checked(probabilities, labels)
    score, right = p.max(1), p.argmax(1) == y
    if adaptive:
        order = np.argsort(score, stable=True)
        score, right = score[order], right[order]
        place = np.arange(len(y)) * num_bins // len(y)
    else:
        place = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], score)
    size = np.bincount(place, minlength=num_bins)
    share = 1 / np.maximum(size, 1)
    means = [np.bincount(place, x, num_bins) * share for x in (score, right)]
    return Reliability(means[0], means[1], size)


def calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, adaptive: bool = False
) -> float:
    """Expected calibration error, ``Σ_b (n_b / n) |accuracy_b − confidence_b|``.

    It grows with the number of bins, and is greater than 0 for a calibrated classifier
    on few examples: compare figures of the same bins and the same number of examples.
    """
    bins = reliability(probabilities, labels, num_bins, adaptive)
    return float(np.average(np.abs(bins.accuracy - bins.confidence), weights=bins.size))


def confidence(probabilities: Any) -> np.ndarray:
    """Largest probability of each row; high for familiar inputs."""
    return np.asarray(probabilities, np.float64).max(-1)


def entropy(probabilities: Any) -> np.ndarray:
    """Predictive entropy ``−Σ_k p_k log p_k``, in nats; high for strange inputs."""
    return scipy.special.entr(np.asarray(probabilities, np.float64)).sum(-1)


def mutual_information(samples: Any) -> np.ndarray:
    """What a label would tell about the weights (BALD), ``[n]``.

    ``H(mean_s p_s) − mean_s H(p_s)``, at least 0: the part of the predictive entropy on
    which the networks of the draws ``[S, n, C]`` disagree.

    References:
        Houlsby et al., 2011, arXiv:1112.5745; Gal et al., 2017, arXiv:1703.02910.
    """
    p = np.asarray(samples, np.float64)
    return np.maximum(entropy(p.mean(0)) - entropy(p).mean(0), 0)


def auroc(inside: Any, outside: Any) -> float:
    """``P(inside > outside) + P(inside = outside) / 2`` of scores ``[n]`` and ``[m]``.

    The area under the receiver operating characteristic: the statistic of Mann and
    Whitney over the number of pairs. NaN if a score is.
    """
    n, m = len(inside), len(outside)
    ranks = scipy.stats.rankdata(np.concatenate([inside, outside]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fpr95(inside: Any, outside: Any) -> float:
    """Share of outside scores at or above a threshold that 95 % of the inside reach.

    The threshold is the greatest score that at least 95 % of ``inside`` reach.
    """
    passing = -(-TRUE_POSITIVES * len(inside) // 100)  # rounded up
    threshold = np.sort(inside)[len(inside) - passing]
    return float(np.mean(np.asarray(outside) >= threshold))
