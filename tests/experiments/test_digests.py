"""Data files that were changed, and archives that want more than to be read."""

import ast
import gzip
import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import digests, lookup, prepared
from experiments.errors import DataError
from experiments.studies import images
from tests.experiments.sums import state_digests

ROOT = Path(__file__).parents[2]
FOLDERS = ("kfac_jax_lite", "experiments", "notebooks", "docs")
MODULES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def mnist(folder, count=10):
    """A small archive in the form of MNIST's."""
    x, y = np.zeros((count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
    path = folder / "mnist.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


# ------------------------------------------------------------------------------ files


def test_unknown_file_is_refused_and_the_message_says_what_to_do(tmp_path):
    path = mnist(tmp_path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        datasets.load("mnist", tmp_path)
    message = str(caught.value)
    assert str(path) in message and found in message
    assert all(digest in message for digest in digests.FILES["mnist", "mnist.npz"])
    command = message[message.index("(cd") : message.rindex(")") + 1]
    subprocess.run(["sh", "-c", command], check=True)
    assert len(datasets.load("mnist", tmp_path).x_train) == 10


def test_file_without_a_known_digest(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="expected: none is known for this file"):
        datasets.load("cifar10", tmp_path)


def test_changed_file(tmp_path):
    """One bit: what was stated or is in the table is not what is there."""
    path = mnist(tmp_path)
    state_digests(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="was not read: its SHA-256 is"):
        datasets.load("mnist", tmp_path)


def test_nothing_is_parsed_before_the_digest_is_known(tmp_path, monkeypatch):
    mnist(tmp_path)
    for suffix in ("", ".gz"):
        for name in IDX:
            place = tmp_path / "fashion_mnist" / f"{name}-ubyte{suffix}"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(b"nonsense")
    (tmp_path / "cifar10_jpegbytes.npz").write_bytes(b"nonsense")
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff")

    def parsed(*args, **kwargs):
        raise AssertionError("parsed")

    monkeypatch.setattr(np, "load", parsed)
    monkeypatch.setattr(gzip, "decompress", parsed)
    for name in ("mnist", "fashion_mnist", "cifar10"):
        with pytest.raises(DataError, match="was not read"):
            datasets.load(name, tmp_path)
    with pytest.raises(DataError, match="was not read"):
        datasets.load_text("tinyshakespeare", tmp_path)


def test_what_the_folder_states_comes_before_the_table(tmp_path, monkeypatch):
    path = mnist(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(digests.FILES, ("mnist", "mnist.npz"), ("0" * 64, digest))
    assert digests.verified("mnist", path) == path.read_bytes()
    (tmp_path / digests.SUMS).write_text("1" * 64 + " *mnist.npz\n")
    with pytest.raises(DataError, match="expected: 1{64}. Fetch"):
        digests.verified("mnist", path)
    (tmp_path / digests.SUMS).write_text(digest.upper() + "  ./mnist.npz\n")
    assert digests.verified("mnist", path) == path.read_bytes()


@pytest.mark.parametrize("line", ["nonsense", "ab" * 31 + "  mnist.npz", "\xff\0"])
def test_sums_that_are_none(tmp_path, line):
    (tmp_path / digests.SUMS).write_text(line + "\n")
    with pytest.raises(DataError, match=r"SHA256SUMS, line 1: wanted 64 hexadecimal"):
        digests.stated_digests(tmp_path)


def test_every_known_digest_is_one():
    known = [d for found in digests.FILES.values() for d in found]
    known += digests.ARRAYS.values()
    assert all(len(bytes.fromhex(d)) == 32 and d == d.lower() for d in known)
    assert len(set(known)) == len(known)


def test_digests_are_those_that_tfds_downloads():
    """An independent list of the same files."""
    import tensorflow_datasets as tfds

    folder = Path(tfds.__file__).parent / "url_checksums"
    texts = {p.stem: p.read_text() for p in folder.glob("*mnist.txt")}
    for (name, file), known in digests.FILES.items():
        if file.endswith(".gz"):
            assert f"{known[0]}\t{file}" in texts[name]


# --------------------------------------------------------------- folders and packages


def test_prepared_folder_is_checked(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    version = tmp_path / "tfds" / "fashion_mnist" / "3.0.1"
    version.mkdir(parents=True)
    record = version / "fashion_mnist-train.array_record-00000-of-00001"
    record.write_bytes(b"records")
    digest = hashlib.sha256(b"records").hexdigest()
    sums = version.parent / digests.SUMS
    sums.write_text(f"{digest}  3.0.1/{record.name}\n")
    with tfds.testing.mock_data(num_examples=2):
        assert len(datasets.load("fashion_mnist", tmp_path).x_train) == 2
        record.write_bytes(b"recordz")
        with pytest.raises(DataError, match="was not read: its SHA-256"):
            datasets.load("fashion_mnist", tmp_path)
        record.unlink()
        with pytest.raises(DataError, match="which is not there"):
            prepared.read("fashion_mnist", version.parents[1])
        for outside in ("../../secret", "/etc/hostname"):
            sums.write_text(f"{digest}  {outside}\n")
            with pytest.raises(DataError, match="outside its folder"):
                prepared.read("fashion_mnist", version.parents[1])


def test_memory_maps_are_checked(tmp_path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    for split in ("train", "test"):
        np.save(folder / f"x_{split}.npy", np.zeros((2, 2, 2, 3), np.uint8))
        np.save(folder / f"y_{split}.npy", np.zeros(2, np.uint8))
    state_digests(folder)
    assert len(images.load_imagenet(tmp_path).x_train) == 2
    np.save(folder / "y_test.npy", np.ones(2, np.uint8))
    with pytest.raises(DataError, match=r"y_test\.npy was not read"):
        images.load_imagenet(tmp_path)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_package_with_other_data(monkeypatch, name):
    monkeypatch.setitem(digests.ARRAYS, name, "0" * 64)
    with pytest.raises(DataError, match="Install the package anew"):
        getattr(lookup, f"load_{name}")()


# --------------------------------------------------------------------------- archives


@pytest.mark.parametrize("member", ["../escaped", "/tmp/escaped_matrix", "a/../../b"])
def test_archive_with_members_outside(tmp_path, member):
    """Stated or not, it is read in memory: nothing of it reaches the disk."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = mnist(folder)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member + ".npy", array.getvalue())
        link = zipfile.ZipInfo("link.npy")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="was not read"):
        datasets.load("mnist", folder)
    state_digests(folder)
    before = sorted(tmp_path.rglob("*"))
    assert len(datasets.load("mnist", folder).x_train) == 10
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path(member + ".npy").exists()


def test_pickled_arrays_are_refused(tmp_path):
    """An array of objects would run code on loading."""
    path = mnist(tmp_path)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["x_train"] = np.array([{"code": 1}], object)
    np.savez(path, **arrays)
    state_digests(tmp_path)
    with pytest.raises(DataError, match="allow_pickle=False"):
        datasets.load("mnist", tmp_path)


# ----------------------------------------------------------------------- what we call

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
EXTRACTING = {"extract", "extractall", "unpack_archive"}


def faults(code):
    """What a module does that may run or write what a file says."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names}
            yield from (f"imports {name}" for name in found & PICKLES)
        elif isinstance(node, ast.ImportFrom):
            name = (node.module or "").split(".")[0]
            if name in PICKLES:
                yield f"imports {name}"
        elif isinstance(node, ast.Call):
            yield from faults_of_call(node)


def faults_of_call(node):
    called = ast.unparse(node.func)
    name = called.split(".")[-1]
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in ("np.load", "numpy.load"):
        if given.get("allow_pickle") != "False":
            yield "np.load without allow_pickle=False"
    elif given.get("allow_pickle", "False") != "False" or name == "read_pickle":
        yield f"{called} reads pickles"
    if name in EXTRACTING and "." in called:
        yield f"{called} extracts an archive"


def test_no_module_unpickles_or_extracts():
    assert len(MODULES) > 100
    for path in MODULES:
        assert not list(faults(path.read_text())), path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, joblib",
        "from cloudpickle import loads",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=unsafe)",
        "np.lib.npyio.NpzFile(file, allow_pickle=True)",
        "pd.read_pickle(path)",
        "tarfile.open(path).extractall(folder)",
        "archive.extract(member)",
        "shutil.unpack_archive(path)",
    ],
)
def test_scan_finds(code):
    assert list(faults(code))
