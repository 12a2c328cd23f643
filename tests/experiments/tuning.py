"""Small searches for the tests of tuning."""

import dataclasses
import json

from experiments.configs import NetConfig
from experiments.configs.tune import TuneConfig, default_tuning

OPTIONS = [
    *("--dataset", "digits", "--net.hidden", "8", "--train-examples", "200"),
    *("--epochs", "2", "--batch-size", "20", "--evaluations", "4"),
]


def tiny(folder, **values) -> TuneConfig:
    """A search whose trials take a moment: 16 steps, evaluated at every fourth."""
    small = {
        "net": NetConfig(hidden=(8,)),
        "train_examples": 200,
        "epochs": 2,
        "batch_size": 20,
        "evaluations": 4,
        "trials": 6,
        "batch": 3,
        "startup_trials": 2,
        "optimizer": "sgd",
        "workdir": folder,
    }
    return dataclasses.replace(default_tuning("digits"), **(small | values))


def records(folder):
    """The trials of a run folder, as they were written."""
    lines = (folder / "trials.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "trial"]


def results(folder):
    """Values and curves of the trials, in order, without numbers and times."""
    names = ("state", "values", "objective", "curve")
    return [{name: record[name] for name in names} for record in records(folder)]
