"""Data files are hashed before they are parsed, and refused unless the digest is known.

A digest is known from the tables below, or from a file ``SHA256SUMS`` beside the data,
in the form that ``sha256sum`` writes and ``sha256sum --check`` reads. What it says of a
file comes before the tables: so a user states a digest for files of their own.

Files that TFDS prepared on the user's machine have no digest known beforehand (images
are encoded anew by every release); they, too, are checked against a ``SHA256SUMS`` if
there is one. TFDS itself checks the SHA-256 of what it downloads.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from experiments.errors import DataError

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
# The gzipped files and the text: as TFDS lists them; the first archive: Keras.
FILES: dict[tuple[str, str], tuple[str, ...]] = {
    ("mnist", "mnist.npz"): (
        "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
        "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
    ),
    ("mnist", "train-images-idx3-ubyte"): (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    ("mnist", "train-labels-idx1-ubyte"): (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    ("mnist", "t10k-images-idx3-ubyte"): (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    ("mnist", "t10k-labels-idx1-ubyte"): (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    ("mnist", "train-images-idx3-ubyte.gz"): (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    ("mnist", "train-labels-idx1-ubyte.gz"): (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    ("mnist", "t10k-images-idx3-ubyte.gz"): (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    ("mnist", "t10k-labels-idx1-ubyte.gz"): (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    ("fashion_mnist", "train-images-idx3-ubyte.gz"): (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    ("fashion_mnist", "train-labels-idx1-ubyte.gz"): (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    ("fashion_mnist", "t10k-images-idx3-ubyte.gz"): (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    ("fashion_mnist", "t10k-labels-idx1-ubyte.gz"): (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    ("cifar10", "cifar10_jpegbytes.npz"): (
        "2034a5eb4977a5cf263297e13a9e103e25610cb03687a302cbd47dc3b92034c5",
    ),
    ("tinyshakespeare", "tinyshakespeare.txt"): (
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
# Of the pixels as bytes and the labels as int64, little endian, one after the other.
ARRAYS = {
    "digits": "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5",
    "mnist5k": "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722",
}


def verified(name: str, path: Path) -> bytes:
    """Reads a file whose SHA-256 is known.

    The bytes returned are those that were hashed: the file is read once.
    """
    content = path.read_bytes()
    stated = stated_digests(path.parent).get(path.name)
    known = (stated,) if stated else FILES.get((name, path.name), ())
    compare(path, known, hashlib.sha256(content).hexdigest())
    return content


def check_folder(folder: Path) -> None:
    """Checks every file that a folder's ``SHA256SUMS`` lists, if there is one."""
    for relative, stated in stated_digests(folder).items():
        path = folder / relative
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{folder / SUMS} lists {relative}, outside its folder.")
        if not path.is_file():
            raise DataError(f"{folder / SUMS} lists {relative}, which is not there.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        compare(path, (stated,), found)


def check_arrays(name: str, x: np.ndarray, y: np.ndarray, source: str) -> None:
    """Checks data that a package brings: another release may bring others."""
    total = hashlib.sha256(x.tobytes())
    total.update(y.astype("<i8").tobytes())
    if total.hexdigest() != ARRAYS[name]:
        raise DataError(
            f"The data set {name}, {source}, is not the one this project knows: "
            f"SHA-256 {total.hexdigest()}, expected {ARRAYS[name]}. Install the "
            "package anew, in the version that constraints.txt names."
        )


def stated_digests(folder: Path) -> dict[str, str]:
    """Reads a folder's ``SHA256SUMS``."""
    path = folder / SUMS
    if not path.exists():
        return {}
    digests = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path}, line {number}: wanted 64 hexadecimal digits, two spaces and "
                "a file name, as sha256sum writes them."
            )
        digests[match[2].removeprefix("./")] = match[1].lower()
    return digests


def compare(path: Path, known: tuple[str, ...], found: str) -> None:
    """Refuses a file whose digest is none of those known."""
    if found in known:
        return
    wanted = " or ".join(known) if known else "none is known for this file"
    raise DataError(
        f"{path} was not read: its SHA-256 is {found}; expected: {wanted}. Fetch the "
        "file anew. If it is meant to be this one, state its digest: "
        f"(cd '{path.parent}' && sha256sum '{path.name}' >> {SUMS})."
    )
