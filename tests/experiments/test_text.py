"""The language model: its data, its loss, and what it must not see."""

import jax
import numpy as np
import pytest

from experiments import datasets
from experiments.configs import NetConfig
from experiments.datasets import prepared
from experiments.datasets.text import make_text, python_reference
from experiments.errors import ConfigError, DataError
from experiments.main import main
from experiments.models import make_task
from experiments.models.networks import Transformer
from experiments.reports import read_runs
from tests.experiments.sums import state_digests

TEXT = "to be, or not to be: that is the question.\n" * 5
NET = NetConfig(context=8, layers=2, heads=2, features=8)


def small_text(context=8):
    return make_text("tinyshakespeare", "Tiny", "nowhere", TEXT, context)


@pytest.fixture(scope="module")
def start():
    """Task, parameters, tokens and the tokens that follow."""
    data = small_text()
    task = make_task("lm", NET, data)
    with jax.enable_x64(False):
        params, state = jax.jit(task.init)(jax.random.key(0))
    assert state == {}
    return task, params, data.x_train[:4], data.y_train[:4]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(prepared, "obstacle_to_download", lambda: "no network")


def logits_of(params, tokens):
    module = Transformer(
        vocabulary=len(set(TEXT)), context=8, layers=2, heads=2, width=8
    )
    return np.asarray(module.apply({"params": params}, tokens), np.float64)


def test_windows_are_the_text():
    data = small_text()
    middle = int(0.9 * len(TEXT))
    for x, y, part in (
        (data.x_train, data.y_train, TEXT[:middle]),
        (data.x_test, data.y_test, TEXT[middle:]),
    ):
        assert x.dtype == y.dtype == np.int32
        assert x.shape == y.shape == ((len(part) - 1) // 8, 8)
        read = "".join(data.vocabulary[token] for token in x.ravel())
        following = "".join(data.vocabulary[token] for token in y.ravel())
        assert (read, following) == (part[: len(read)], part[1 : len(read) + 1])


@pytest.mark.parametrize("text", ["", "aaaa"])
def test_no_text(text):
    with pytest.raises(DataError, match="different characters"):
        make_text("pydoc", "Tiny", "nowhere", text, 2)


def test_context_longer_than_the_text():
    with pytest.raises(ConfigError, match="net.context is 22; Tiny has .* only 22"):
        small_text(22)


def test_file_in_the_data_folder(tmp_path):
    path = tmp_path / "tinyshakespeare.txt"
    path.write_text(TEXT)
    state_digests(tmp_path)
    data = datasets.load_text("tinyshakespeare", tmp_path, 8)
    assert data.source == str(path)
    np.testing.assert_array_equal(data.x_train, small_text().x_train)
    path.write_bytes(b"\xff\xfe\xfa")
    state_digests(tmp_path)
    with pytest.raises(DataError, match="cannot be read as Tiny Shakespeare"):
        datasets.load_text("tinyshakespeare", tmp_path)


def test_mock_tfds(tmp_path):
    import tensorflow_datasets as tfds

    folder = tmp_path / "tfds" / "tiny_shakespeare" / "1.0.0"
    folder.mkdir(parents=True)
    with tfds.testing.mock_data(num_examples=9):
        data = datasets.load_text("tinyshakespeare", tmp_path, 2)
    assert data.source == f"TFDS directory {folder.parent}"
    assert len(data.x_train) > len(data.x_test) > 0


def test_splits_of_tfds_are_joined(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def parts(name, *, split, data_dir, download):
        assert (name, data_dir, download) == ("tiny_shakespeare", str(tmp_path), False)
        return [{"text": split.encode()}]

    monkeypatch.setattr(tfds, "data_source", parts)
    text = prepared.read_text("tiny_shakespeare", tmp_path)
    assert text == "trainvalidationtest"


def test_missing_text_tells_where_it_looked(tmp_path, offline):
    with pytest.raises(DataError) as caught:
        datasets.load_text("tinyshakespeare", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "tinyshakespeare.txt") in message
    assert str(tmp_path / "tfds" / "tiny_shakespeare") in message
    assert "prepared by TFDS" in message
    assert "TFDS download: no network" in message
    assert "--dataset pydoc" in message
    with pytest.raises(DataError, match="does not exist"):
        datasets.load_text("tinyshakespeare", tmp_path / "nowhere")


def test_pydoc_comes_with_python():
    data = datasets.load_text("pydoc")
    assert data.x_train.size > 300_000
    assert data.source.startswith("packaged with Python 3.")
    text, _ = python_reference()
    assert "lambda" in text and len(data.vocabulary) == len(set(text))


def test_loss_is_the_mean_over_all_characters(start):
    task, params, tokens, following = start
    logits = logits_of(params, tokens)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows, columns = np.indices(following.shape)
    expected = -log_p[rows, columns, following].mean()
    loss, _ = task.loss(params, {}, tokens, following)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    sums = task.evaluate(params, {}, tokens, following)
    np.testing.assert_allclose(sums["loss"] / len(tokens), expected, rtol=1e-5)
    bits = sums["bits_per_character"] / len(tokens)
    np.testing.assert_allclose(bits, expected / np.log(2), rtol=1e-5)


@pytest.mark.parametrize("position", range(8))
def test_later_characters_are_not_seen(start, position):
    _, params, tokens, _ = start
    changed = tokens.copy()
    changed[:, position] = (changed[:, position] + 1) % len(set(TEXT))
    before, after = logits_of(params, tokens), logits_of(params, changed)
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    # Everything from there on depends on it.
    assert (abs(before - after)[:, position:].max(-1) > 1e-6).all()


def test_examples_are_the_characters(start):
    """The factors of K-FAC count every character as an example."""
    import kfac_jax_lite as kfac

    task, params, tokens, following = start
    tagged = kfac.tag(task.loss, params, {}, tokens, following, has_aux=True)
    kinds = {layer.name: layer.kind for layer in tagged.layers}
    assert kinds["block_1/attention/query"] == kinds["logits"] == "dense"
    assert kinds["block_0/norm_1"] == kinds["norm"] == "scale_shift"
    opt_state = kfac.scale_by_kfac(tagged.layers).init(params)
    value_and_grad = jax.jit(tagged.value_and_grad)
    *_, statistics = value_and_grad(params, {}, tokens, following, opt_state=opt_state)
    # The last entry of the homogeneous axis is 1 for every character.
    np.testing.assert_allclose(statistics["logits"].a[-1, -1], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("dataset", "model", "message"),
    [
        ("digits", "lm", "lm wants a text; Digits .* --dataset tinyshakespeare"),
        ("pydoc", "mlp", "mlp wants images; Python reference is a text"),
    ],
)
def test_model_and_data_that_do_not_fit(capsys, dataset, model, message):
    assert main(["train", "--dataset", dataset, "--model", model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    with pytest.raises(ConfigError, match=message):
        load = datasets.load_text if dataset == "pydoc" else datasets.load
        make_task(model, NET, load(dataset))


def test_heads_divide_the_width():
    with pytest.raises(ConfigError, match="net.features is 9; wanted a multiple"):
        NetConfig(features=9)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """Every optimiser takes a step; table and plots are made."""
    (tmp_path / "tinyshakespeare.txt").write_text(TEXT)
    state_digests(tmp_path)
    options = "--dataset tinyshakespeare --model lm --epochs 1 --batch-size 12"
    options += " --evals-per-epoch 1 --net.context 8 --net.layers 1 --net.heads 2"
    options += f" --net.features 8 --data-dir {tmp_path} --workdir {tmp_path / 'run'}"
    assert main(["train", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "24 + 2 windows" in printed
    assert "test bits per character" in printed
    runs = read_runs(tmp_path / "run")
    assert [run.optimizer for run in runs] == ["kfac", "sgd", "adam", "adamw"]
    for run in runs:
        assert run.status == "finished"
        final = run.evals[-1]
        bits, nats = final["test_bits_per_character"], final["test_loss"]
        assert bits == pytest.approx(nats / np.log(2), rel=1e-5)
        assert final["train_loss"] != run.evals[0]["train_loss"]
    assert (tmp_path / "run" / "loss_vs_steps.png").stat().st_size > 0
