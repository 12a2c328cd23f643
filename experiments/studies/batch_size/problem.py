"""The images of the batch-size study, and a cell's compiled step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import NetConfig
from experiments.configs.tune import CurvatureConfig, TuneConfig
from experiments.datasets import Dataset, make_augmentation
from experiments.metrics import make_evaluate
from experiments.models import Task, make_task
from experiments.studies.batch_size.config import BatchStudy, Cell
from experiments.studies.images import load_split
from experiments.tuning.optimisers import make_rule, rate_at
from experiments.tuning.trials import as_floats

Values = dict[str, Any]
Measure = Callable[[Any], dict[str, float]]


class Problem(NamedTuple):
    """What all cells share."""

    data: Dataset  # training and test images; the held-out ones are in neither
    held: tuple[np.ndarray, np.ndarray]  # validation images and labels
    images: jax.Array  # the training images on the device
    labels: jax.Array  # their labels
    task: Task  # network and loss


class Program(NamedTuple):
    """A cell, compiled; hyper-parameters are arguments."""

    # ``(seed, values) -> carry``, parameters first and model state second.
    start: Callable[[int, Values], Any]
    # ``(carry, values, rows [B], number, key) -> (carry, mean loss)``; the carry is
    # donated. `rows` are the numbers of the batch's images, `number` the steps taken
    # before.
    step: Callable[..., tuple[Any, jax.Array]]


def load(config: BatchStudy) -> Problem:
    """Loads the images and makes the network.

    Args:
        config: the study.

    Returns:
        The problem; `load_split` says which images are held out.
    """
    data, validation = load_split(config, config.dataset)
    task = make_task(config.model, NetConfig(hidden=config.hidden), data)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    return Problem(data, validation, x, y, task)


def make_program(config: BatchStudy, problem: Problem, cell: Cell) -> Program:
    """Builds and compiles a cell's step.

    A step is a call of its own: inside `jax.lax.scan`, jaxlib 0.10.2 computes the
    convolutions on CPUs ten times more slowly.
    """
    size, every = cell.batch_size, config.refresh_every(cell.batch_size)
    curvature = CurvatureConfig(config.fisher, every, "cholesky", every, config.kl_clip)
    chosen: Any = cell.optimizer
    tuned = TuneConfig(
        optimizer=chosen,
        dataset=config.dataset,
        model=config.model,
        curvature=curvature,
    )
    example = problem.data.x_train[:size], problem.data.y_train[:size]
    rule = make_rule(tuned, problem.task, example)
    changed = make_augmentation(config.augmentation, 0.0, problem.data)
    remembered, steps = changed.init(example), config.steps(size)

    def start(seed, values):
        params, model_state = problem.task.init(jax.random.key(seed))
        return params, model_state, rule.init(params, values)

    def step(carry, values, images, labels, rows, number, key):
        of_images, of_labels = jax.random.split(jax.random.fold_in(key, number))
        batch = images[rows], labels[rows]
        _, batch = changed.apply(remembered, batch, of_images)
        return rule.step(
            carry, values, rate_at(values, number, steps), batch, of_labels
        )

    begin = jax.jit(start)
    values = as_floats(dict.fromkeys(config.space(cell.optimizer).ranges(), 0.5))
    carry = jax.eval_shape(begin, 0, values)
    rows, number = order_of(config, problem, size, 0, 0)[0], np.int32(0)
    inputs = problem.images, problem.labels, rows, number, jax.random.key(0)
    compiled = jax.jit(step, donate_argnums=0).lower(carry, values, *inputs).compile()

    def take(carry, values, *rest):
        return compiled(carry, values, problem.images, problem.labels, *rest)

    return Program(begin, take)


def order_of(
    config: BatchStudy, problem: Problem, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Numbers of an epoch's images, the same order at every batch size.

    Returns:
        Integers ``[steps, batch]``.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(problem.data.x_train))
    steps = config.steps_per_epoch(batch_size)
    return order[: steps * batch_size].astype(np.int32).reshape(steps, batch_size)


def measures(problem: Problem) -> tuple[Measure, Measure]:
    """What a trial and what a winner's run are measured by after every epoch.

    Returns:
        Functions of the carry: the first to `accuracy` and `loss` on the validation
        images; the second to the same on the test images, and `train_accuracy` and
        `train_loss` on as many training images as are held out, not augmented.
    """
    count, data = len(problem.held[0]), problem.data
    held = make_evaluate(problem.task, *problem.held)
    test = make_evaluate(problem.task, data.x_test, data.y_test)
    part = make_evaluate(problem.task, data.x_train[:count], data.y_train[:count])

    def winner(carry):
        seen = {f"train_{k}": v for k, v in part(*carry[:2]).items()}
        return test(*carry[:2]) | seen

    return (lambda carry: held(*carry[:2])), winner
