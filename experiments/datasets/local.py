"""Data files in a folder: npz archives, JPEG archives, idx files, TFDS directories."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.datasets import digests, prepared
from experiments.datasets.arrays import Dataset, make_dataset
from experiments.errors import DataError

TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
}
IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    IndexError,
    zipfile.BadZipFile,
    zlib.error,
)


def not_found(title: str, tried: list[str], packaged: tuple[str, ...]) -> str:
    """What to say of data that is nowhere."""
    places = "\n  ".join(tried)
    instead = " or ".join(f"--dataset {name}" for name in packaged)
    return (
        f"{title} was not found. Looked at:\n  {places}\n"
        "Give a folder that holds it with --data-dir or KFAC_DATA_DIR, or use a "
        f"packaged data set: {instead}."
    )


def load_local(name: str, folder: Path) -> tuple[Dataset | None, list[str]]:
    """Looks for a data set in a folder."""
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist or is not a folder.")
    tried = []
    readers: list[tuple[Path, Callable[[str, Path], Dataset]]] = [
        (folder / f"{name}.npz", read_npz),
        (folder / f"{name}_jpegbytes.npz", read_jpeg_archive),
    ]
    if name in ("mnist", "fashion_mnist"):
        # The two sets share these file names: in a folder that is not the set's own,
        # the folder's name has to tell them apart.
        mine = ("fashion" in folder.name) == (name == "fashion_mnist")
        for base in (folder / name, folder) if mine else (folder / name,):
            for suffix in ("", ".gz"):
                path = base / (IDX_NAMES["x_train"] + suffix)
                readers.append((path, read_idx))
    for base in (folder / "tfds", folder):
        readers.append((base / name, read_tfds))
    for path, reader in readers:
        tried.append(str(path))
        if not path.exists():
            continue
        try:
            return reader(name, path), tried
        except UNREADABLE as error:
            raise DataError(
                f"{path} cannot be read as {TITLES[name]}: "
                f"{type(error).__name__}: {error}. Replace or remove it."
            ) from error
    return None, tried


def read_npz(name: str, path: Path) -> Dataset:
    """Reads an archive with x_train, y_train, x_test and y_test."""
    content = io.BytesIO(digests.verified(name, path))
    with np.load(content, allow_pickle=False) as archive:
        train = archive["x_train"], archive["y_train"]
        test = archive["x_test"], archive["y_test"]
    return make_dataset(name, TITLES[name], str(path), train, test)


def read_jpeg_archive(name: str, path: Path) -> Dataset:
    """Reads an archive of JPEG files without their common header.

    For each split: ``<split>_len`` the length of each file, ``<split>_blob`` the files
    one after the other, ``<split>_y`` the labels; ``header`` goes before every file.
    JPEG loses detail, so the data set says so in its title.
    """
    from PIL import Image

    splits = []
    content = io.BytesIO(digests.verified(name, path))
    with np.load(content, allow_pickle=False) as archive:
        header = archive["header"].tobytes()
        for part in ("train", "test"):
            blob = archive[f"{part}_blob"].tobytes()
            ends = np.cumsum(archive[f"{part}_len"].astype(np.int64))
            if not len(ends) or ends[-1] != len(blob):
                raise ValueError(f"{part}_len does not add up to {part}_blob")
            starts = ends - archive[f"{part}_len"]
            images = [
                np.asarray(Image.open(io.BytesIO(header + blob[start:end])))
                for start, end in zip(starts, ends, strict=True)
            ]
            splits.append((np.stack(images), archive[f"{part}_y"]))
    title = f"{TITLES[name]} (JPEG)"
    return make_dataset(name, title, str(path), splits[0], splits[1])


def read_idx(name: str, path: Path) -> Dataset:
    """Reads the four idx files of MNIST and Fashion-MNIST, gzipped or not."""
    suffix = ".gz" if path.suffix == ".gz" else ""
    arrays = {
        key: read_idx_file(name, path.with_name(file + suffix))
        for key, file in IDX_NAMES.items()
    }
    train = arrays["x_train"], arrays["y_train"]
    test = arrays["x_test"], arrays["y_test"]
    return make_dataset(name, TITLES[name], str(path.parent), train, test)


def read_idx_file(name: str, path: Path) -> np.ndarray:
    """Reads one idx file of unsigned bytes."""
    content = digests.verified(name, path)
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an idx file of unsigned bytes")
    rank = content[3]
    shape = tuple(np.frombuffer(content, ">i4", rank, 4))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_tfds(name: str, path: Path) -> Dataset:
    """Reads a directory prepared by TFDS."""
    train, test = prepared.read(name, path.parent)
    source = f"TFDS directory {path}"
    return make_dataset(name, TITLES[name], source, train, test)
