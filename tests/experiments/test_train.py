"""Training runs: one step of everything, and runs that are interrupted."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import metrics
from experiments.configs import MODELS, OPTIMIZERS, KFACConfig, ScheduleConfig
from experiments.errors import ConfigError, RunFolderError
from experiments.reports import read_runs
from experiments.runfolder import locked
from experiments.train import train
from tests.experiments.curves import curve, interrupted, records_of

ONE_STEP = {"train_examples": 16, "checkpoint_every": 1}


def test_one_step(tiny, console):
    config = tiny(**ONE_STEP)
    folder, problems = train(config, console)
    assert problems == []
    runs = read_runs(folder)
    assert tuple(run.optimizer for run in runs) == OPTIMIZERS
    for run in runs:
        assert run.status == "finished"
        assert [record["step"] for record in run.train] == [1]
        assert [record["step"] for record in run.evals] == [0, 1]
        assert run.evals[0]["seconds"] == 0
        assert 0 < run.evals[1]["seconds"] < run.end["compile_seconds"]
        before, after = run.evals[0]["train_loss"], run.evals[1]["train_loss"]
        assert np.isfinite(after) and after != before
    # All of them start from the same parameters.
    assert len({run.evals[0]["train_loss"] for run in runs}) == 1


@pytest.mark.parametrize("model", [m for m in MODELS if m not in ("mlp", "lenet5")])
def test_one_step_of_every_model(tiny, console, model):
    dataset = "pydoc" if model == "lm" else "digits"
    # Without the warm-up of lm, whose first step has length 0.
    kfac = dataclasses.replace(tiny(dataset, model).kfac, schedule=ScheduleConfig())
    config = tiny(dataset, model, optimizers=("kfac",), kfac=kfac, **ONE_STEP)
    folder, problems = train(config, console)
    assert problems == []
    for run in read_runs(folder):
        assert np.isfinite(run.evals[-1]["train_loss"])
        assert run.evals[-1]["train_loss"] != run.evals[0]["train_loss"]


@pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("kfac", marks=pytest.mark.slow)]
)
def test_one_step_of_lenet5(tiny, console, optimizer):
    config = tiny("mnist5k", "lenet5", optimizers=(optimizer,), **ONE_STEP)
    folder, problems = train(config, console)
    assert problems == []
    assert read_runs(folder)[0].status == "finished"


@pytest.mark.parametrize(
    "kfac",
    [
        KFACConfig(fisher="mc", inverse="ekfac", interval="staleness"),
        KFACConfig(
            fisher="exact",
            weight_sharing="reduce",
            inverse="eigh",
            interval="adaptive",
            kl_clip=None,
            schedule=ScheduleConfig("cosine", warmup_steps=2),
            damping_schedule=ScheduleConfig("exponential"),
        ),
    ],
    ids=["mc-ekfac-staleness", "exact-eigh-adaptive"],
)
def test_options_of_kfac(tiny, console, kfac):
    config = tiny(optimizers=("kfac",), kfac=kfac)
    train(config, console)
    (layers,) = records_of(config, "kfac", "layers")
    assert len(layers["layers"]) == 2
    final = records_of(config, "kfac", "eval")[-1]
    assert np.isfinite(final["train_loss"])
    assert final["bytes_reduced"] <= final["bytes_if_every_step"]
    assert final["mean_interval"] >= 1


@pytest.mark.parametrize(
    ("optimizer", "killed_after"),
    [("kfac", 3), ("adam", 3), ("adam", 1)],
    ids=["kfac", "adam", "adam-before-a-checkpoint"],
)
def test_resume(tiny, console, tmp_path, monkeypatch, optimizer, killed_after):
    whole = tiny(
        optimizers=(optimizer,),
        evals_per_epoch=2,
        log_every=2,
        epochs=2,
        kfac=KFACConfig(fisher="mc"),
        workdir=tmp_path / "whole",
    )
    train(whole, console)

    killed = dataclasses.replace(whole, workdir=tmp_path / "killed")
    interrupted(killed, console, monkeypatch, after=killed_after)
    assert len(records_of(killed, optimizer, "end")) == 0
    train(killed, console)
    assert curve(killed, optimizer) == curve(whole, optimizer)
    resumed = records_of(killed, optimizer, "note")
    assert [note["step"] for note in resumed] == ([2] if killed_after == 3 else [])
    seconds = [r["seconds"] for r in records_of(killed, optimizer, "train")]
    assert seconds == sorted(seconds)


def test_torn_last_line_is_dropped(tiny, console):
    config = tiny(optimizers=("sgd",))
    train(config, console)
    path = config.folder() / "sgd" / metrics.FILE_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:10])
    assert len(metrics.read_records(path)) == len(lines) - 1
    train(config, console)
    assert records_of(config, "sgd", "end")[0]["status"] == "finished"


def test_finished_run_is_skipped(tiny, console):
    config = tiny(optimizers=("sgd",), **ONE_STEP)
    train(config, console)
    path = config.folder() / "sgd" / metrics.FILE_NAME
    before = path.read_bytes()
    train(config, console)
    assert path.read_bytes() == before
    assert "already finished" in console.file.getvalue()
    train(dataclasses.replace(config, fresh=True), console)
    assert path.read_bytes() != before


def test_folder_of_another_run(tiny, console):
    config = tiny(optimizers=("sgd",), **ONE_STEP)
    train(config, console)
    with pytest.raises(RunFolderError, match=r"config\.seed = 0; wanted 1"):
        train(dataclasses.replace(config, seed=1), console)


def test_folder_in_use(tiny, console):
    config = tiny(optimizers=("sgd",))
    with locked(config.folder()):
        with pytest.raises(RunFolderError, match="in use by another process"):
            train(config, console)


def test_divergence_ends_the_run(tiny, console):
    config = tiny(
        optimizers=("sgd",),
        sgd=dataclasses.replace(tiny().sgd, learning_rate=1e30),
        epochs=3,
    )
    folder, _ = train(config, console)
    (run,) = read_runs(folder)
    assert run.status == "diverged"
    assert run.end["step"] < 12
    text = (folder / "sgd" / metrics.FILE_NAME).read_text()
    assert "NaN" not in text and "Infinity" not in text
    json.loads(text.splitlines()[-1])


def test_batch_larger_than_the_data(tiny, console):
    with pytest.raises(ConfigError, match="batch-size is 65.*only 64"):
        train(tiny(batch_size=65), console)
