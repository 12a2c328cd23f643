"""What a trial trains on: data with held-out examples, network, number of steps."""

import dataclasses
from typing import Any

import numpy as np

from experiments import datasets
from experiments.configs.train import TEXTS
from experiments.configs.tune import TuneConfig
from experiments.datasets import Examples
from experiments.errors import ConfigError
from experiments.models import Task, make_task

HELD_OUT = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and network of a search."""

    config: TuneConfig  # the search
    data: Examples  # the data set; its training part has no held-out examples
    # Inputs and targets held out of the training set.
    held: tuple[np.ndarray, np.ndarray]
    task: Task  # network and loss
    every: int  # steps between evaluations

    @property
    def steps(self) -> int:
        """Steps of a trial, a multiple of `every`."""
        return self.every * self.config.evaluations

    def example(self) -> tuple[np.ndarray, np.ndarray]:
        """The first batch."""
        rows = slice(self.config.batch_size)
        return self.data.x_train[rows], self.data.y_train[rows]

    def identity(self) -> dict[str, Any]:
        """What must be the same for all trials of a study, as JSON values."""
        sizes = {"train": len(self.data.x_train), "held_out": len(self.held[0])}
        shape = list(self.data.x_train.shape[1:])
        data = {"title": self.data.title, "shape": shape, **sizes}
        return {**self.config.shared(), "data": data, "steps": self.steps}


def make_problem(config: TuneConfig) -> Problem:
    """Loads the data and holds examples out; the test set takes no part."""
    data: Examples
    if config.dataset in TEXTS:
        data = datasets.load_text(config.dataset, config.data_dir, config.net.context)
    else:
        data = datasets.load(config.dataset, config.data_dir)
    data = data.first(config.train_examples)
    total = len(data.x_train)
    count = config.validation_examples
    count = total // HELD_OUT if count is None else count
    left = total - count
    if count < 1 or left < config.batch_size:
        raise ConfigError(
            f"validation-examples is {count}; {data.title} has {total} training "
            f"{data.noun}, and a batch takes {config.batch_size}."
        )
    held = data.x_train[left:], data.y_train[left:]
    data = dataclasses.replace(
        data, x_train=data.x_train[:left], y_train=data.y_train[:left]
    )
    steps = config.epochs * (left // config.batch_size)
    if steps < config.evaluations:
        raise ConfigError(
            f"evaluations is {config.evaluations}; a trial has only {steps} steps."
        )
    task = make_task(config.model, config.net, data)  # pyright: ignore[reportArgumentType]
    return Problem(config, data, held, task, steps // config.evaluations)
