"""Data-parallel runs in one process: eight host devices, and what is refused."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from experiments import datasets, metrics
from experiments.configs import KFACConfig, TrainConfig
from experiments.errors import ConfigError
from experiments.models import make_task
from experiments.parallel import place_on
from experiments.train import make_run, make_step, train
from tests.experiments.curves import close_curves, curve, interrupted, records_of

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

# Intervals of the layers differ from step to step under this threshold.
ADAPTIVE = KFACConfig(interval="adaptive", threshold=0.7, inverse_interval=2)


@pytest.fixture
def config(tiny, tmp_path):
    """Eight steps, a checkpoint after every second."""

    def make(folder, **values):
        small = {"optimizers": ("kfac",), "kfac": ADAPTIVE, "epochs": 2, "log_every": 2}
        return tiny(workdir=tmp_path / folder, **(small | values))

    return make


@pytest.mark.parametrize("devices", [2, 8])
def test_as_on_one_device(config, console, devices):
    alone, together = config("one"), config("all", devices=devices)
    train(alone, console)
    train(together, console)
    close_curves(curve(together, "kfac"), curve(alone, "kfac"))
    (first,) = records_of(together, "kfac", "config")
    assert (first["devices"], first["processes"]) == (devices, 1)
    # The adaptive rule has had something to decide.
    assert curve(alone, "kfac")[-1]["mean_interval"] > 1


def test_sampled_labels_do_not_depend_on_the_devices(config, console):
    sampled = KFACConfig(fisher="mc")
    alone = config("one", kfac=sampled)
    together = config("all", kfac=sampled, devices=0)
    train(alone, console)
    train(together, console)
    close_curves(curve(together, "kfac"), curve(alone, "kfac"))


def test_batch_statistics_are_those_of_the_whole_batch(config, console):
    values = {"model": "resnet", "optimizers": ("sgd",), "train_examples": 32}
    alone = config("one", **values)
    together = config("all", devices=4, **values)
    train(alone, console)
    train(together, console)
    close_curves(curve(together, "sgd"), curve(alone, "sgd"))


def test_a_run_on_eight_devices_continues_on_fewer(config, console, monkeypatch):
    whole = config("whole", devices=8, checkpoint_every=2)
    train(whole, console)
    for devices in (1, 2, 4):
        begun = dataclasses.replace(whole, workdir=whole.workdir.parent / f"{devices}")
        interrupted(begun, console, monkeypatch, after=5)
        assert records_of(begun, "kfac", "end") == []
        train(dataclasses.replace(begun, devices=devices), console)
        (note,) = records_of(begun, "kfac", "note")
        assert (note["step"], note["devices"]) == (4, devices)
        close_curves(curve(begun, "kfac"), curve(whole, "kfac"))


def test_state_is_on_every_device_and_the_batch_is_split():
    placement = place_on(4)
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    (split,) = placement.rows(rows)
    shards = sorted(split.addressable_shards, key=lambda shard: shard.device.id)
    assert [shard.data.shape for shard in shards] == [(2, 3)] * 4
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), rows)
    (uneven,) = placement.rows(rows[:7])
    assert uneven.is_fully_replicated
    np.testing.assert_array_equal(uneven, rows[:7])
    state = placement.everywhere({"w": jax.numpy.ones(3), "name": "w"})
    assert state["name"] == "w"
    assert state["w"].is_fully_replicated
    assert state["w"].sharding.device_set == set(placement.mesh.devices.flat)


def test_the_step_communicates_by_all_reduces_only(tiny):
    """Between CPU processes, gloo's reduce-scatter gives up on one that is slow."""
    config = tiny(devices=8, kfac=ADAPTIVE)
    data = datasets.load("digits", None)
    task = make_task(config.model, config.net, data)
    run = make_run(config, "kfac", task, data, place_on(8))
    compiled: Any = make_step(run)
    names = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-\\w+"
    seen = set(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))
    assert seen == {"all-reduce"}


def test_evaluation_counts_every_example_once(tiny, console):
    """61 examples on 8 devices: 56 are split, 5 are not."""
    values = {"train_examples": 61, "batch_size": 8, "optimizers": ("sgd",)}
    one = tiny(**values)
    eight = tiny(devices=8, workdir=one.workdir.parent / "eight", **values)
    for config in (one, eight):
        train(config, console)
    close_curves(curve(eight, "sgd"), curve(one, "sgd"))


def test_batch_that_cannot_be_dealt_out(tiny, console):
    with pytest.raises(ConfigError, match="batch-size is 12.*multiple of the 8 dev"):
        train(tiny(devices=8, batch_size=12), console)


def test_more_devices_than_there_are(tiny, console):
    with pytest.raises(
        ConfigError, match=r"devices is 64.*has only 8 \(cpu\).*device_count=64"
    ):
        train(tiny(devices=64, batch_size=64), console)
    with pytest.raises(ConfigError, match="devices is -1; wanted an integer >= 0"):
        TrainConfig(devices=-1)


def test_folder_and_fingerprint_do_not_depend_on_the_devices():
    one, eight = TrainConfig(), TrainConfig(devices=8)
    assert one.folder() == eight.folder()
    assert one.run_dict("kfac") == eight.run_dict("kfac")


def test_one_device_is_the_default(tiny, console):
    config = tiny(optimizers=("sgd",), train_examples=16)
    train(config, console)
    (first,) = records_of(config, "sgd", "config")
    assert first["devices"] == 1
    assert metrics.FILE_NAME in {p.name for p in (config.folder() / "sgd").iterdir()}
