"""What predictions are measured by: on test, shifted and strange images."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.studies.bayes.config import BayesStudy
from experiments.studies.bayes.problem import Images
from kfac_jax_lite.bayes import metrics

Record = dict[str, Any]
# From images to probabilities ``[n, classes]``.
Predict = Callable[[np.ndarray], Any]


def scores(config: BayesStudy, probabilities: Any, labels: Any) -> Record:
    """Accuracy, losses and calibration errors as numbers.

    Args:
        config: the study.
        probabilities: ``[n, classes]``.
        labels: ``[n]``.
    """
    given, bins = (probabilities, labels), config.bins
    found = {
        "accuracy": metrics.accuracy(*given),
        "nll": metrics.nll(*given),
        "brier": metrics.brier(*given),
        "ece": metrics.calibration_error(*given, bins),
        "adaptive_ece": metrics.calibration_error(*given, bins, adaptive=True),
    }
    return {name: float(value) for name, value in found.items()}


def diagram(config: BayesStudy, probabilities: Any, labels: Any) -> Record:
    """A reliability diagram as lists."""
    bins = metrics.reliability(probabilities, labels, config.bins)
    return {
        "confidence": np.asarray(bins.confidence).tolist(),
        "accuracy": np.asarray(bins.accuracy).tolist(),
        "count": np.asarray(bins.count).tolist(),
    }


def separation(inside: Any, outside: Any) -> Record:
    """How well the largest probability and the entropy tell strange images apart."""
    confident = metrics.confidence(inside), metrics.confidence(outside)
    certain = -metrics.entropy(inside), -metrics.entropy(outside)
    return {
        "auroc": float(metrics.auroc(*confident)),
        "fpr95": float(metrics.fpr95(*confident)),
        "auroc_entropy": float(metrics.auroc(*certain)),
    }


def measure(config: BayesStudy, images: Images, predict: Predict) -> Record:
    """All that is measured of a winner."""
    data = images.data
    inside = predict(data.x_test)
    moved: Record = {"severity": [], "accuracy": [], "nll": [], "ece": [], "auroc": []}
    for severity, (x, y) in images.shifted.items():
        outside = predict(x)
        found = scores(config, outside, y)
        found |= separation(inside, outside) | {"severity": severity}
        for name, values in moved.items():
            values.append(found[name])
    return {
        "test": scores(config, inside, data.y_test),
        "bins": diagram(config, inside, data.y_test),
        "strange": {
            name: separation(inside, predict(x)) for name, x in images.strange.items()
        },
        "shifted": moved,
    }
