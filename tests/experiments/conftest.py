"""Fixtures of the experiments: small configurations, and a console that is kept."""

import dataclasses
import io

import pytest
from rich.console import Console

from experiments.configs import NetConfig, TrainConfig, default_config


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch, tmp_path):
    """Hides whatever data this machine has."""
    monkeypatch.delenv("KFAC_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=110)


@pytest.fixture
def tiny(tmp_path):
    """Returns a function to configurations that run in a moment."""

    def make(dataset="digits", model="mlp", **values) -> TrainConfig:
        small = {
            "epochs": 1,
            "evals_per_epoch": 1,
            "batch_size": 16,
            "train_examples": 64,
            "eval_examples": 64,
            "log_every": 1,
            "checkpoint_every": 2,
            "workdir": tmp_path / "run",
            "net": NetConfig(
                hidden=(8,),
                blocks=(1,),
                width=4,
                code=(8, 4),
                context=8,
                layers=1,
                heads=2,
                features=8,
            ),
        }
        return dataclasses.replace(default_config(dataset, model), **(small | values))

    return make
