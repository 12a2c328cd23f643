"""Texts as windows of characters, and where they are taken from."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.configs.checks import check_choice
from experiments.configs.train import TEXTS
from experiments.datasets import digests, prepared
from experiments.datasets.arrays import Examples
from experiments.datasets.local import not_found
from experiments.datasets.lookup import import_package
from experiments.errors import ConfigError, DataError

TRAIN_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class TextDataset(Examples):
    """Windows of a text, one after the other, and the characters that follow.

    ``x [n, context]`` holds numbers of characters, int32; ``y[i, t]`` is the character
    after ``x[i, t]``. The first nine tenths of the text are for training; the test set
    is the rest, usually called validation set.
    """

    noun: ClassVar[str] = "windows"

    vocabulary: str  # the characters by their numbers

    @property
    def context(self) -> int:
        return self.x_train.shape[1]


def make_text(
    name: str, title: str, source: str, text: str, context: int
) -> TextDataset:
    """Numbers the characters of a text, splits it by position and cuts windows."""
    vocabulary = "".join(sorted(set(text)))
    if len(vocabulary) < 2:
        raise DataError(f"{source}: {len(vocabulary)} different characters.")
    numbers = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.fromiter((numbers[c] for c in text), np.int32, len(text))
    middle = int(TRAIN_SHARE * len(tokens))
    parts = tokens[:middle], tokens[middle:]
    shortest = min(map(len, parts))
    if shortest <= context:
        raise ConfigError(
            f"net.context is {context}; {title} has a part of only {shortest} "
            "characters, and a window needs one more than it is long."
        )
    train, test = (windows(part, context) for part in parts)
    return TextDataset(name, title, source, *train, *test, vocabulary=vocabulary)


def windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts windows that do not overlap; what is left at the end is dropped.

    Args:
        tokens: numbers of the characters, ``[n]``.
        context: characters of a window.
    """
    count = (len(tokens) - 1) // context
    shape = count, context
    return (
        tokens[: count * context].reshape(shape),
        tokens[1 : count * context + 1].reshape(shape),
    )


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
