"""Decides where a text is taken from, in the order in which images are looked for."""

import os
import platform
from pathlib import Path

from experiments.configs.checks import check_choice
from experiments.configs.train import TEXTS
from experiments.datasets import digests, prepared
from experiments.datasets.local import not_found
from experiments.datasets.packaged import import_package
from experiments.datasets.text import TextDataset, make_text
from experiments.errors import DataError

TITLES = {"tinyshakespeare": "Tiny Shakespeare", "pydoc": "Python reference"}
TFDS_NAMES = {"tinyshakespeare": "tiny_shakespeare"}

Found = tuple[str, str]


def load_text(
    name: str, data_dir: Path | str | None = None, context: int = 64
) -> TextDataset:
    """Loads a text from the first source that has it."""
    check_choice("dataset", name, TEXTS)
    if name == "pydoc":
        text, source = python_reference()
        return make_text(name, TITLES[name], source, text, context)
    tried: list[str] = []
    for finder in (find_in_folder, find_prepared, find_download):
        found = finder(name, data_dir, tried)
        if found is not None:
            text, source = found
            return make_text(name, TITLES[name], source, text, context)
    raise DataError(not_found(TITLES[name], tried, ("pydoc",)))


def python_reference() -> Found:
    """Returns the text of Python's ``help``, half a million characters of reference.

    It differs from one version of Python to the next, so the source names the version.
    """
    module = import_package("pydoc_data.topics", "the standard library's pydoc_data")
    text = "".join(module.topics[key] for key in sorted(module.topics))
    return text, f"packaged with Python {platform.python_version()}"


def find_in_folder(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Found | None:
    """Looks in the user's folder for a text file, then for a directory of TFDS."""
    given = data_dir or os.environ.get("KFAC_DATA_DIR")
    if not given:
        tried.append("--data-dir and KFAC_DATA_DIR: not given")
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist or is not a folder.")
    path = folder / f"{name}.txt"
    tried.append(str(path))
    if path.exists():
        try:
            return digests.verified(name, path).decode("utf-8"), str(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as {TITLES[name]}: "
                f"{type(error).__name__}: {error}. Replace or remove it."
            ) from error
    for base in (folder / "tfds", folder):
        path = base / TFDS_NAMES[name]
        tried.append(str(path))
        if path.exists():
            return read_tfds(path)
    return None


def find_prepared(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Found | None:
    """Looks in the directory of TFDS."""
    del data_dir
    path = prepared.find(TFDS_NAMES[name], tried)
    return None if path is None else read_tfds(path)


def find_download(
    name: str, data_dir: Path | str | None, tried: list[str]
) -> Found | None:
    """Lets TFDS download, if nothing stands in the way."""
    del data_dir
    directory = prepared.find_download(TFDS_NAMES[name], tried)
    if directory is None:
        return None
    return prepared.read_text(TFDS_NAMES[name], directory), "TFDS download"


def read_tfds(path: Path) -> Found:
    """Reads a directory prepared by TFDS."""
    return prepared.read_text(path.name, path.parent), f"TFDS directory {path}"
