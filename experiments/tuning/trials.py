"""Trains many trials as one program.

Parameters, optimiser states and hyper-parameters of the trials are stacked, and
`jax.vmap` maps the step over them; all see the same batches. `jax.lax.scan` takes the
steps between two evaluations. An optimiser is compiled once for a number of trials.

K-FAC on a CPU trains them in a loop of the same program instead: with jaxlib 0.10.2 and
two threads the program of mapped inversions stops for ever.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets
from experiments.configs.train import TEXTS
from experiments.configs.tune import TuneConfig
from experiments.datasets import Examples, batches
from experiments.errors import ConfigError
from experiments.metrics import EVAL_BATCH
from experiments.models import Task, make_task
from experiments.tuning.optimisers import Rule, make_rule, rate_at

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


class Program:
    """Trains `count` trials at once."""

    def __init__(self, problem: Problem, count: int):
        self.problem, self.count = problem, count
        rule = make_rule(problem.config, problem.task, problem.example())
        self.key = jax.random.key(problem.config.seed + 1)
        self.begin = jax.jit(jax.vmap(make_start(problem, rule)))
        self.run = jax.jit(make_advance(problem, rule), donate_argnums=0)
        mapped = jax.vmap(problem.task.evaluate, in_axes=(0, 0, None, None))
        self.measure = jax.jit(mapped)

    def start(self, values: Mapping[str, np.ndarray], seeds: Sequence[int]) -> Any:
        """The trials before their first step.

        Args:
            values: hyper-parameters by name, ``[count]`` each.
            seeds: of the initial parameters, ``[count]``.

        Returns:
            Parameters, model states and optimiser states, ``[count, …]`` each.
        """
        return self.begin(as_floats(values), jnp.asarray(seeds, jnp.uint32))

    def advance(
        self, carry: Any, values: Mapping[str, np.ndarray], number: int
    ) -> tuple[Any, jax.Array]:
        """Takes the steps up to the next evaluation.

        Args:
            carry: from `start` or `advance`; donated.
            values: hyper-parameters by name, ``[count]`` each.
            number: steps taken.

        Returns:
            The next carry, and batch losses ``[steps, count]``.
        """
        problem, end = self.problem, number + self.problem.every
        config = problem.config
        seen = batches(problem.data, config.batch_size, config.seed, number, end)
        inputs, targets = (np.stack(part) for part in zip(*seen, strict=True))
        numbers = np.arange(number, end, dtype=np.int32)
        return self.run(carry, as_floats(values), numbers, (inputs, targets), self.key)

    def evaluate(self, carry: Any) -> dict[str, np.ndarray]:
        """Means over the held-out examples.

        Returns:
            What the task evaluates, by name, ``[count]`` each.
        """
        inputs, targets = self.problem.held
        size = max(1, EVAL_BATCH // self.count)
        totals: dict[str, np.ndarray] = {}
        for first in range(0, len(inputs), size):
            rows = slice(first, first + size)
            sums = self.measure(*carry[:2], inputs[rows], targets[rows])
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + value.astype(np.float64)
        return {name: value / len(inputs) for name, value in totals.items()}


def make_start(problem: Problem, rule: Rule) -> Any:
    """``(values, seed) -> carry`` of one trial."""

    def start(values, seed):
        params, model_state = problem.task.init(jax.random.key(seed))
        return params, model_state, rule.init(params, values)

    return start


def in_loop(config: TuneConfig) -> bool:
    """Whether trials are trained in a loop instead of side by side."""
    if config.mapping == "auto":
        return config.optimizer == "kfac" and jax.default_backend() == "cpu"
    return config.mapping == "loop"


def make_advance(problem: Problem, rule: Rule) -> Any:
    """``(carry, values, numbers, batches, key) -> (carry, losses)`` of all trials."""
    steps = problem.steps

    def one(carry, values, number, batch, key):
        return rule.step(carry, values, rate_at(values, number, steps), batch, key)

    many = jax.vmap(one, in_axes=(0, 0, None, None, None))

    def scanned(step, carry, values, numbers, seen, key):
        def turn(carry, now):
            number, batch = now
            # Labels are sampled with the same numbers in all trials.
            return step(carry, values, number, batch, jax.random.fold_in(key, number))

        return jax.lax.scan(turn, carry, (numbers, seen))

    def side_by_side(carry, values, *rest):
        return scanned(many, carry, values, *rest)

    def one_by_one(carry, values, *rest):
        carry, losses = jax.lax.map(
            lambda trial: scanned(one, *trial, *rest), (carry, values)
        )
        return carry, losses.T

    return one_by_one if in_loop(problem.config) else side_by_side


def as_floats(values: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Hyper-parameters as the program takes them."""
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def stacked(trials: Sequence[Mapping[str, float]], count: int) -> dict[str, np.ndarray]:
    """Hyper-parameters of some trials side by side, the last one's again to fill up.

    Returns:
        By name, ``[count]`` each.
    """
    filled = [*trials, *[trials[-1]] * (count - len(trials))]
    return {name: np.array([trial[name] for trial in filled]) for name in trials[0]}
