"""The survey's data sets: standardised arrays ``[n, h, w, c]``.

Features of a table lie along the width: ``[n, 1, features, 1]``. Images of the small
sizes are averaged down; all are standardised with the training set's mean and standard
deviation, of each channel of an image and of each feature of a table.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import datasets
from experiments.datasets.packaged import import_package, split
from experiments.studies.images import pooled
from experiments.survey.config import SurveyConfig

TABLES = {"wine": "Wine", "breast_cancer": "Breast cancer"}
TABLE_SOURCE = "packaged with scikit-learn"
# Side of the squares of pixels that are averaged: to 8 x 8, 7 x 7, 7 x 7 and 6 x 6.
WINDOWS = {"digits": 1, "mnist": 4, "fashion_mnist": 4, "cifar10": 5}


class Data(NamedTuple):
    """A data set."""

    title: str  # its name
    source: str  # where it was found, without folders
    classes: int  # number of labels
    x_train: np.ndarray  # ``[n, h, w, c]`` float32
    y_train: np.ndarray  # ``[n]`` int32
    x_test: np.ndarray  # as for training
    y_test: np.ndarray  # as for training


def load(name: str, config: SurveyConfig) -> Data:
    """Loads, cuts, averages and standardises a data set.

    Args:
        name: one of the survey's data sets.
        config: the survey.

    Returns:
        The data set.
    """
    raw = load_table(name) if name in TABLES else load_images(name, config.data_dir)
    train, test = slice(config.train_examples), slice(config.test_examples)
    x_train, x_test = raw.x_train[train], raw.x_test[test]
    if config.pooled and name in WINDOWS:
        x_train, x_test = (averaged(x, WINDOWS[name]) for x in (x_train, x_test))
    axes = (0,) if name in TABLES else (0, 1, 2)
    mean, deviation = x_train.mean(axes), x_train.std(axes)
    scale = np.where(deviation > 0, deviation, 1)
    return raw._replace(
        source=re.sub(r"\S*/", "", raw.source),
        x_train=((x_train - mean) / scale).astype(np.float32),
        y_train=raw.y_train[train],
        x_test=((x_test - mean) / scale).astype(np.float32),
        y_test=raw.y_test[test],
    )


@functools.lru_cache(maxsize=1)
def load_images(name: str, data_dir: Path | None) -> Data:
    """Images as they are; the last set is kept for the next cell."""
    found = datasets.load(name, data_dir)
    x = found.x_train, found.x_test
    return Data(
        found.title, found.source, found.num_classes, x[0], found.y_train, x[1],
        found.y_test,
    )  # fmt: skip


def load_table(name: str) -> Data:
    """A table: two thirds to train, a third to test, the labels in equal shares."""
    module = import_package("sklearn.datasets", "scikit-learn")
    x, y = getattr(module, f"load_{name}")(return_X_y=True)
    x, y = x.reshape(len(x), 1, -1, 1), y.astype(np.int32)
    train, test = split(x, y, num_test=len(x) // 3)
    classes = int(y.max()) + 1
    return Data(TABLES[name], TABLE_SOURCE, classes, *train, *test)


def averaged(images: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of pixels; a border that fills no square is cut off.

    Args:
        images: ``[n, h, w, c]``.
        side: of the squares.

    Returns:
        ``[n, h // side, w // side, c]``.
    """
    height, width = (size // side * side for size in images.shape[1:3])
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return pooled(images[:, top : top + height, left : left + width], side)


def batch_rows(num_train: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Numbers of every step's examples: epochs, each shuffled, one after the other.

    Returns:
        ``[steps, batch_size]`` int32.
    """
    rng, wanted = np.random.default_rng(seed), steps * batch_size
    epochs = [rng.permutation(num_train) for _ in range(-(-wanted // num_train))]
    rows = np.concatenate(epochs)[:wanted].astype(np.int32)
    return rows.reshape(steps, batch_size)
