"""Decides where images are taken from."""

import dataclasses
import os
from pathlib import Path

from experiments.configs.checks import check_choice
from experiments.configs.train import IMAGES
from experiments.datasets import local, packaged, prepared
from experiments.datasets.arrays import Dataset, make_dataset
from experiments.errors import DataError

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
        return packaged.load_digits()
    if name == "mnist5k":
        return packaged.load_mnist5k()
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
    data = packaged.load_mnist5k()
    source = f"{data.source}, because the full set was not found"
    return dataclasses.replace(data, name="mnist", source=source)
