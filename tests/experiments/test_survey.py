"""The survey: its grid, data and networks, and whole tiny surveys that are resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import kfac_jax_lite as kfac
from experiments import datasets
from experiments.benchmarks.common import CompileCounter
from experiments.errors import ConfigError, DataError
from experiments.main import main
from experiments.survey import config as configs
from experiments.survey import problem, run

SHAPES = {
    "digits": ((8, 8, 1), 10),
    "wine": ((1, 13, 1), 3),
    "breast_cancer": ((1, 30, 1), 2),
    "mnist": ((7, 7, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((6, 6, 3), 10),
}
ARGUMENTS = ["survey", "--size", "tiny", "--datasets", "wine", "--models", "linear"]
NAMES = ["wine-linear-sgd-0.1-16-0-0", "wine-linear-kfac-0.1-16-0-0"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def quiet():
    return Console(quiet=True)


# ----------------------------------------------------------------------- configuration


@pytest.mark.parametrize("size", configs.SIZES)
def test_settings_cover_the_grid(size):
    config = configs.SIZES[size]
    settings = config.settings()
    rates = {"sgd": config.sgd_rates, "adam": config.adam_rates}
    rates["kfac"] = config.kfac_rates
    wanted = {
        (optimizer, rate, batch, decay, seed)
        for optimizer in config.optimizers
        for rate in rates[optimizer]
        for batch in config.batch_sizes
        for decay in config.weight_decays
        for seed in range(config.seeds)
    }
    assert {dataclasses.astuple(s) for s in settings} == wanted
    assert len(settings) == len(wanted) == len({s.name for s in settings})
    assert len(config.cells()) == len(config.datasets) * len(config.models)
    assert config.measured_steps()[-1] == config.steps


def test_full_size_has_all_cells():
    assert len(configs.FULL.cells()) == 60
    assert len(configs.SMALL.cells()) >= 6 * 4


def test_what_decides_nothing_is_not_in_the_fingerprint():
    parts = dataclasses.replace(
        configs.SMALL, datasets=("wine",), seeds=3, workers=2, sgd_rates=(1.0,)
    )
    assert parts.fingerprint() == configs.SMALL.fingerprint()
    assert dataclasses.replace(configs.SMALL, width=8).fingerprint() != (
        configs.SMALL.fingerprint()
    )


@pytest.mark.parametrize(
    "wrong",
    [{"width": 0}, {"damping": 0.0}, {"checkpoints": (1.5,)}, {"models": ()}],
    ids=str,
)
def test_values_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(configs.SMALL, **wrong)


# -------------------------------------------------------------------------------- data


def test_averages_are_means_of_squares_of_pixels():
    images = np.arange(2 * 5 * 7 * 1, dtype=np.uint8).reshape(2, 5, 7, 1)
    found = problem.averaged(images, 2)
    assert found.shape == (2, 2, 3, 1)
    # The fifth row and the seventh column fill no square.
    np.testing.assert_allclose(found[0, 0, 0, 0], np.mean([0, 1, 7, 8]))
    np.testing.assert_allclose(found[1, 1, 2, 0], np.mean([53, 54, 60, 61]))


@pytest.mark.parametrize("name", ["digits", "wine", "breast_cancer"])
def test_packaged_sets(name):
    found = problem.load(name, configs.SMALL)
    shape, classes = SHAPES[name]
    assert found.x_train.shape[1:] == found.x_test.shape[1:] == shape
    assert found.classes == classes == len(np.unique(found.y_train))
    assert len(found.y_train) == len(found.x_train) <= 256
    assert len(found.y_test) == len(found.x_test) <= 1000
    axes = (0, 1, 2) if shape[0] > 1 else 0
    np.testing.assert_allclose(found.x_train.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(found.x_train.std(axes), 1, atol=1e-4)
    rows = {x.tobytes() for x in found.x_train}
    assert not rows & {x.tobytes() for x in found.x_test}


def test_records_say_where_images_were_found(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    labels = np.arange(30) % 10
    given = datasets.arrays.make_dataset(
        "cifar10", "CIFAR-10 (JPEG)", "/a/b/c.npz", (images, labels), (images, labels)
    )
    monkeypatch.setattr(datasets, "load", lambda name, folder: given)
    problem.load_images.cache_clear()
    found = problem.load("cifar10", configs.SMALL)
    problem.load_images.cache_clear()
    assert (found.title, found.source) == ("CIFAR-10 (JPEG)", "c.npz")
    assert found.x_train.shape == (30, 6, 6, 3)


def test_batches_are_epochs_one_after_the_other():
    rows = problem.batch_rows(10, 4, 5, seed=0)
    assert rows.shape == (5, 4)
    for epoch in rows.reshape(2, 10):
        assert sorted(epoch) == list(range(10))
    assert problem.batch_rows(3, 5, 2, seed=0).shape == (2, 5)
    np.testing.assert_array_equal(rows, problem.batch_rows(10, 4, 5, seed=0))
    assert (rows != problem.batch_rows(10, 4, 5, seed=1)).any()


# ---------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", configs.MODELS)
def test_every_network_takes_every_set_and_is_covered(name):
    for (h, w, c), classes in SHAPES.values():
        network = problem.make_model(name, 6, 1, classes)
        x, y = jnp.zeros((4, h, w, c)), jnp.zeros(4, jnp.int32)
        params = jax.eval_shape(network.init, jax.random.key(0), x)

        def loss(params, x, y, network=network):
            logits = kfac.categorical(network.apply(params, x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        tagged = kfac.tag(loss, params, x, y, strict=True)
        assert jax.eval_shape(network.apply, params, x).shape == (4, classes)
        assert {layer.kind for layer in tagged.layers} <= {
            "dense",
            "conv",
            "scale_shift",
        }


def test_examples_do_not_mix():
    """The residual network and the transformer normalise each example alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 4, 1), np.float32)
    for name in ("norm_mlp", "residual", "attention"):
        network = problem.make_model(name, 2, 1, 3)
        params = network.init(jax.random.key(0), x)
        apart = [network.apply(params, one[None])[0] for one in x]
        np.testing.assert_allclose(network.apply(params, x), apart, atol=1e-5)


# ---------------------------------------------------------------------------- training


def test_hyperparameters_are_arguments():
    """Rate and decay change the steps, not the program; the decay is decoupled."""
    config = dataclasses.replace(configs.TINY, steps=1, train_examples=16)
    found = problem.make_problem(config, "linear", problem.load("wine", config))
    program = problem.make_program(config, found, "sgd")
    ends, counter, counts = {}, CompileCounter(), []
    for rate, decay in ((0.1, 0.0), (0.2, 0.0), (0.1, 0.5)):
        setting = configs.Setting("sgd", rate, 16, decay, 0)
        (_, start), (_, end) = problem.train(config, found, program, setting)
        ends[rate, decay] = jax.tree.map(jnp.subtract, end, start)
        counts.append(counter.count)
    assert counts[0] > 0 and counts[1:] == counts[:1] * 2
    grads = jax.grad(found.loss)(start, found.data.x_train, found.data.y_train)
    for (rate, decay), moved in ends.items():
        wanted = jax.tree.map(
            lambda g, p, r=rate, d=decay: -r * (g + d * p), grads, start
        )
        for one, other in zip(*map(jax.tree.leaves, (moved, wanted)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


# ------------------------------------------------------------------------ whole surveys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("survey")
    with jax.enable_x64(False):
        assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_tiny_survey(folder):
    (file,) = folder.glob("*.jsonl")
    assert file.name == "wine-linear.jsonl"
    records = lines(file)
    assert [record["run"] for record in records] == NAMES
    first = records[0]
    facts = {"kind": "run", "dataset": "wine", "model": "linear", "num_params": 42}
    facts |= {"num_train": 64, "num_test": 59, "optimizer": "sgd", "seed": 0}
    facts |= {"learning_rate": 0.1, "batch_size": 16, "weight_decay": 0.0}
    assert facts.items() <= first.items()
    assert first["source"] == "packaged with scikit-learn"
    rows = first["rows"]
    assert [row["step"] for row in rows] == [0] * 16 + [10] * 16
    assert rows[-1]["epoch"] == 2.5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    pairs = {(row["matrix"], row["approximation"]) for row in rows}
    assert len(pairs) == 16
    for row in rows:
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        assert len(row["eigenvalues"]) == 10, row
        assert len(row["cosines"]) == len(row["overlaps"]) == 4
        assert not [name for name, value in row.items() if value is None]
        assert all(v == float(f"{v:.4g}") for v in numbers.values())


def test_survey_goes_on_after_a_killed_run(folder, tmp_path):
    """A line without its end is made again; finished runs stay as they are."""
    whole = (folder / "wine-linear.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)
    file = tmp_path / "wine-linear.jsonl"
    file.write_bytes(first + second[:100])
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert file.read_bytes().startswith(first)
    again, before = lines(file)[1], json.loads(second)
    assert again["rows"] == before["rows"]
    stamp = file.stat().st_mtime_ns
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert file.stat().st_mtime_ns == stamp


def test_other_configuration_is_refused(folder, capsys):
    assert main([*ARGUMENTS, "--out", str(folder), "--steps", "11"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def checkpoint(config, problem, params, key):
        seen.append(params)
        if len(seen) == 1:
            raise RuntimeError("no more memory")
        return [{"train_loss": 1.0}]

    seen = []
    monkeypatch.setattr(run, "checkpoint", checkpoint)
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    records = lines(tmp_path / "wine-linear.jsonl")
    assert [record["run"] for record in records] == NAMES[1:]
    told = capsys.readouterr().err
    assert "wine-linear, sgd-0.1-16-0-0: RuntimeError: no more memory" in told


def test_set_that_is_missing_does_not_stop_the_others(monkeypatch, tmp_path, quiet):
    def load(name, config):
        raise DataError(f"{name} was not found")

    monkeypatch.setattr(run, "load", load)
    config = dataclasses.replace(configs.TINY, out=tmp_path, models=("linear",))
    assert run.run_survey(config, quiet) == [
        "digits-linear: digits was not found",
        "wine-linear: wine was not found",
    ]


def test_diverged_run_ends_without_figures():
    config = dataclasses.replace(
        configs.TINY, steps=2, checkpoints=(0.5, 1.0), train_examples=16
    )
    found = problem.make_problem(config, "linear", problem.load("wine", config))
    program = problem.make_program(config, found, "sgd")
    setting = configs.Setting("sgd", 1e38, 16, 0.0, 0)
    record = run.run_one(config, found, program, setting)
    last = record["rows"][-1]
    assert last["trace"] is None and last["eigenvalues"] == []
    assert not np.isfinite(last["train_loss"])
    assert len(record["rows"]) == 16 * (last["step"])


@pytest.mark.slow
def test_workers_take_whole_cells(folder, tmp_path, capsys):
    """And one that dies is named; the other's runs are those of one process."""
    out = ["--out", str(tmp_path), "--workers", "2"]
    arguments = [*ARGUMENTS[:4], "wine", "breast_cancer", "--models", "linear"]
    assert main([*arguments, *out]) == 0
    assert len(lines(tmp_path / "breast_cancer-linear.jsonl")) == 2
    found = lines(tmp_path / "wine-linear.jsonl")
    wanted = lines(folder / "wine-linear.jsonl")
    for one, other in zip(found, wanted, strict=True):
        assert one["run"] == other["run"]
        for row, alone in zip(one["rows"], other["rows"], strict=True):
            assert row["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-2)


def die(config, cell, pipe):
    """A worker that ends without a word."""
    raise SystemExit(3)


@pytest.mark.slow
def test_worker_that_dies_is_named(monkeypatch, tmp_path, quiet):
    monkeypatch.setattr(run, "work", die)
    config = dataclasses.replace(
        configs.TINY, out=tmp_path, models=("linear",), workers=2
    )
    found = run.run_survey(config, quiet)
    assert sorted(found) == [
        "digits-linear: its process ended with status 3",
        "wine-linear: its process ended with status 3",
    ]
