"""Data sets in memory, the checks of images, and seeded batches."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

import numpy as np

from experiments.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Examples:
    """What data sets of every type have; the rows of an array are the examples."""

    noun: ClassVar[str] = "examples"  # what an example is called, in the plural

    name: str  # name on the command line
    title: str  # name in tables and plots
    source: str  # where the data was found
    x_train: np.ndarray  # training inputs, ``[n, ...]``
    y_train: np.ndarray  # what is to be predicted, ``[n, ...]``, int32
    x_test: np.ndarray  # test inputs
    y_test: np.ndarray  # the same for them

    def first(self, train: int | None) -> Self:
        """Returns the data set with only its first `train` training examples."""
        if train is None:
            return self
        if train > len(self.x_train):
            raise ConfigError(
                f"train-examples is {train}; {self.title} has {len(self.x_train)}."
            )
        return dataclasses.replace(
            self, x_train=self.x_train[:train], y_train=self.y_train[:train]
        )


@dataclasses.dataclass(frozen=True)
class Dataset(Examples):
    """Images ``[n, height, width, channels]`` and labels ``[n]``, loaded once."""

    noun: ClassVar[str] = "images"

    maximum: float = 255.0  # the value of the brightest pixel
    num_classes: int = 10  # number of labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.x_train.shape[1:]


def make_dataset(
    name: str,
    title: str,
    source: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    maximum: float = 255.0,
) -> Dataset:
    """Checks arrays and builds a data set of them.

    Args:
        name: name on the command line.
        title: name in tables and plots.
        source: where the arrays come from; every error names it.
        train: images ``[n, h, w]`` or ``[n, h, w, c]``, and labels ``[n]``.
        test: the same for testing.
        maximum: the value of the brightest pixel.
    """
    x_train, y_train = check_split(f"{source}, training set", *train, maximum)
    x_test, y_test = check_split(f"{source}, test set", *test, maximum)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{source}: training images have the shape {x_train.shape[1:]}, "
            f"test images {x_test.shape[1:]}."
        )
    return Dataset(name, title, source, x_train, y_train, x_test, y_test, maximum)


def check_split(
    where: str, x: np.ndarray, y: np.ndarray, maximum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Checks one split; adds the channel axis if it is missing.

    Args:
        where: what to call the split in an error.
        x: images ``[n, h, w]`` or ``[n, h, w, c]``.
        y: labels ``[n]`` from 0 to 9.
        maximum: the value of the brightest pixel.

    Returns:
        Images ``[n, h, w, c]`` and int32 labels.
    """
    x, y = np.asarray(x), np.asarray(y)
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or 0 in x.shape or x.dtype.kind not in "uif":
        raise DataError(
            f"{where}: images have the shape {x.shape} and dtype {x.dtype}; wanted "
            "numbers [n, height, width] or [n, height, width, channels]."
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "ui":
        raise DataError(
            f"{where}: labels have the shape {y.shape} and dtype {y.dtype}; wanted "
            f"integers [{len(x)}]."
        )
    if y.min() < 0 or y.max() > 9:
        raise DataError(f"{where}: labels from {y.min()} to {y.max()}; wanted 0 to 9.")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{where}: pixels that are not finite.")
    if x.min() < 0 or x.max() > maximum:
        raise DataError(
            f"{where}: pixels from {x.min()} to {x.max()}; wanted 0 to {maximum:g}."
        )
    return x, y.astype(np.int32)


def batches(
    data: Examples, batch_size: int, seed: int, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of the steps from `start` to `stop`.

    Each epoch has its own permutation, made from the seed and the number of the epoch
    alone, so that a run continued at any step sees the batches it would have seen.
    """
    per_epoch = len(data.x_train) // batch_size
    epoch, order = -1, np.arange(0)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(len(data.x_train))
        at = step % per_epoch * batch_size
        rows = order[at : at + batch_size]
        yield data.x_train[rows], data.y_train[rows]
