"""TensorFlow Datasets (TFDS): prepared directories, and downloads that never hang."""

import importlib.util
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from experiments.datasets import digests
from experiments.errors import DataError

PROBE_URL = "https://storage.googleapis.com/"
PROBE_SECONDS = 5.0

Split = tuple[np.ndarray, np.ndarray]
T = TypeVar("T")


def default_directory() -> Path:
    """Returns where TFDS keeps prepared data sets: TFDS_DATA_DIR or its default."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def is_complete(path: Path) -> bool:
    """Tells whether a directory holds a version that was prepared to the end."""
    return path.is_dir() and any(path.glob("*.*.*/dataset_info.json"))


def read(name: str, directory: Path) -> tuple[Split, Split]:
    """Reads both splits of prepared images; works without TensorFlow.

    Returns:
        Training and test split, each images ``[n, h, w, c]`` and labels ``[n]``.
    """
    train, test = read_parts(name, directory, ("train", "test"), read_split)
    return train, test


def read_text(name: str, directory: Path) -> str:
    """Reads a prepared text, its splits one after the other."""

    def join(source) -> str:
        texts = (source[index]["text"] for index in range(len(source)))
        return "".join(t if isinstance(t, str) else t.decode() for t in texts)

    return "".join(read_parts(name, directory, ("train", "validation", "test"), join))


def read_parts(
    name: str, directory: Path, parts: tuple[str, ...], read_part: Callable[..., T]
) -> list[T]:
    """Reads splits of a prepared data set."""
    digests.check_folder(directory / name)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"Reading {directory / name} needs tensorflow-datasets: "
            f"pip install 'kfac_jax_lite[experiments]' ({error})."
        ) from error
    # TFDS recommends OpenCV on every start; Pillow decodes these sets in seconds.
    logging.getLogger("absl").addFilter(lambda r: "OpenCV" not in r.getMessage())
    try:
        sources = [
            tfds.data_source(name, split=part, data_dir=str(directory), download=False)
            for part in parts
        ]
        return [read_part(source) for source in sources]
    except Exception as error:  # TFDS has no common error class
        raise DataError(
            f"{directory / name} is not a data set that TFDS can read: "
            f"{type(error).__name__}: {str(error).strip()[:500]}"
        ) from error


def read_split(source) -> Split:
    images, labels = None, np.empty(len(source), np.int64)
    for index in range(len(source)):
        record = source[index]
        if images is None:  # all of one shape: filled in place, not stacked later
            images = np.empty((len(source), *record["image"].shape), np.uint8)
        images[index], labels[index] = record["image"], record["label"]
    if images is None:
        raise ValueError("a split without examples")
    return images, labels


def obstacle_to_download() -> str | None:
    """Says why TFDS could not download now.

    Without a network TFDS retries for minutes before it fails, so the network is
    probed first.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        return "tensorflow-datasets is not installed"
    if importlib.util.find_spec("tensorflow") is None:
        return "preparing a download needs TensorFlow (pip install tensorflow)"
    if not network_answers():
        return "the network does not answer"
    return None


def network_answers(url: str = PROBE_URL, seconds: float = PROBE_SECONDS) -> bool:
    """Tells whether a web server answers within a few seconds."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    # A name look-up has no time limit of its own: leave it behind in its thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def download(name: str, directory: Path) -> None:
    """Lets TFDS download and prepare a data set."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(
            name, data_dir=str(directory), file_format="array_record"
        )
        builder.download_and_prepare()
    except Exception as error:  # TFDS has no common error class
        raise DataError(
            f"TFDS could not prepare {name}: {type(error).__name__}: "
            f"{str(error).strip()[:500]}"
        ) from error


def find(name: str, tried: list[str]) -> Path | None:
    """Looks for a data set in the directory of TFDS."""
    path = default_directory() / name
    tried.append(f"{path} (prepared by TFDS)")
    return path if is_complete(path) else None


def find_download(name: str, tried: list[str]) -> Path | None:
    """Lets TFDS download a data set, if nothing stands in the way."""
    obstacle = obstacle_to_download()
    if obstacle is not None:
        tried.append(f"TFDS download: {obstacle}")
        return None
    directory = default_directory()
    download(name, directory)
    return directory
