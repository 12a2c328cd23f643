"""The images of a study: averaged over squares, or ImageNet from memory maps."""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments import datasets
from experiments.datasets import Dataset, digests
from experiments.errors import ConfigError, DataError
from experiments.studies.intervals.config import IntervalStudy

SPLIT_SEED = 0
Pair = tuple[np.ndarray, np.ndarray]
NAMES = ("x_train", "y_train", "x_test", "y_test")
WANTED = (
    "The paper's size wants ImageNet (ILSVRC 2012) as the files "
    "imagenet/{x_train,y_train,x_test,y_test}.npy in the folder given by --data-dir or "
    "KFAC_DATA_DIR: images uint8 [n, 224, 224, 3], cropped and scaled (1,281,167 for "
    "training, 50,000 of the validation set: 200 GB), labels integers from 0 to 999; "
    "and accelerators with memory for a batch of 16,384. It is a configuration only: "
    "nobody has run it."
)


class Split(Protocol):
    """What a study says of its images.

    Attributes:
        train_examples: images to train with.
        validation_examples: images held out of the training set.
        pool: the side of the squares of pixels that are averaged.
        data_dir: folder of data, or None.
    """

    @property
    def train_examples(self) -> int: ...  # noqa: D102
    @property
    def validation_examples(self) -> int: ...  # noqa: D102
    @property
    def pool(self) -> int: ...  # noqa: D102
    @property
    def data_dir(self) -> Path | None: ...  # noqa: D102


def load_split(config: Split, name: str) -> tuple[Dataset, Pair]:
    """Loads images, averaged over squares, and splits the training set."""
    data = datasets.load(name, config.data_dir)
    total, wanted = len(data.x_train), config.train_examples
    if wanted + config.validation_examples > total:
        raise ConfigError(
            f"train-examples is {wanted} and validation-examples "
            f"{config.validation_examples}; {data.title} has {total} training images."
        )
    check_pool(data, config.pool)
    order = np.random.default_rng(SPLIT_SEED).permutation(total)
    rows, held = order[:wanted], order[-config.validation_examples :]
    validation = shrunk(data.x_train[held], config.pool), data.y_train[held]
    data = dataclasses.replace(
        data,
        x_train=shrunk(data.x_train[rows], config.pool),
        y_train=data.y_train[rows],
        x_test=shrunk(data.x_test, config.pool),
    )
    return data, validation


def check_pool(data: Dataset, pool: int) -> None:
    """The squares must fit into the images."""
    height, width, _ = data.image_shape
    if height % pool or width % pool:
        raise ConfigError(
            f"pool is {pool}; wanted a divisor of the images' {height} and "
            f"{width} pixels."
        )


def load_data(config: IntervalStudy) -> Dataset:
    """Loads the images of a study and averages them over squares of pixels."""
    if config.dataset == "imagenet":
        data = load_imagenet(config.data_dir)
    else:
        data = datasets.load(config.dataset, config.data_dir)
    data = data.first(config.train_examples)
    if config.batch_size > len(data.x_train):
        raise ConfigError(
            f"batch-size is {config.batch_size}; {data.title} has only "
            f"{len(data.x_train)} training images."
        )
    check_pool(data, config.pool)
    return dataclasses.replace(
        data,
        x_train=shrunk(data.x_train, config.pool),
        x_test=shrunk(data.x_test, config.pool),
    )


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Images as they are, or averaged over squares where these have several pixels."""
    return images if size == 1 else pooled(images, size)


def pooled(images: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of ``size × size`` pixels, float32.

    Args:
        images: ``[n, h, w, c]``.
        size: a divisor of h and w.

    Returns:
        Images ``[n, h / size, w / size, c]``.
    """
    n, h, w, c = images.shape
    squares = images.reshape(n, h // size, size, w // size, size, c)
    return squares.mean((2, 4), dtype=np.float32)


def load_imagenet(data_dir: Path | None) -> Dataset:
    """Opens ImageNet without reading it."""
    given = data_dir or os.environ.get("KFAC_DATA_DIR")
    if not given:
        raise DataError(f"No data folder was given. {WANTED}")
    folder = Path(given).expanduser() / "imagenet"
    missing = [f"{name}.npy" for name in NAMES if not (folder / f"{name}.npy").exists()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}. {WANTED}")
    digests.check_folder(folder)
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in NAMES
    }
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        good = x.ndim == 4 and x.dtype == np.uint8 and y.shape == x.shape[:1]
        if not good or y.dtype.kind not in "ui" or not 0 <= y.min() <= y.max() < 1000:
            raise DataError(
                f"{folder}, {split}: images {x.dtype} {x.shape}, labels {y.dtype} "
                f"{y.shape}. {WANTED}"
            )
    labels = {f"y_{s}": arrays[f"y_{s}"].astype(np.int32) for s in ("train", "test")}
    return Dataset(
        "imagenet",
        "ImageNet",
        "memory-mapped arrays",
        **(arrays | labels),
        num_classes=1000,
    )
