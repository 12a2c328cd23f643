"""Training of a compiled step on images, with an item of every curve per epoch."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.tuning.trials import as_floats


class Program(NamedTuple):
    """A method, compiled once; hyper-parameters are arguments."""

    # ``(seed, values) -> carry``: parameters, model state, optimiser's state.
    start: Callable[[int, Any], Any]
    # ``(carry, values, images, labels, rows [B], number, key) -> (carry, mean loss)``;
    # the carry is donated. `rows` are the numbers of the batch's images, `number` the
    # steps taken before.
    step: Callable[..., tuple[Any, jax.Array]]


class Run(NamedTuple):
    """A finished run."""

    carry: Any
    curves: dict[str, list[float]]  # what was measured, seconds and batch losses
    steps: int
    diverged: bool
    pruned: bool


def orders(count: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Numbers of every epoch's images, ``[steps, batch]`` integers each.

    The order is the same for all methods and batch sizes of a seed; an incomplete last
    batch is left out.
    """
    steps, found = count // batch_size, []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        rows = order[: steps * batch_size].astype(np.int32)
        found.append(rows.reshape(steps, batch_size))
    return found


def train(
    program: Program,
    values: Mapping[str, Any],
    seed: int,
    data: tuple[jax.Array, jax.Array],
    epochs: list[np.ndarray],
    measure: Callable[[Any], dict[str, float]] = lambda carry: {},
    ends: Callable[[int, float], bool] = lambda epoch, accuracy: False,
) -> Run:
    """A run; it ends after an epoch whose mean loss is not finite.

    Args:
        program: the method.
        values: hyper-parameters.
        seed: of parameters, augmentation and whatever is drawn.
        data: all training images and labels.
        epochs: from `orders`.
        measure: is asked after every epoch.
        ends: epoch, from 1, and accuracy to whether the run ends there.
    """
    numbers = as_floats(values)
    carry = jax.block_until_ready(program.start(seed, numbers))
    key, taken, diverged, pruned = jax.random.key(seed + 1), 0, False, False
    curves: dict[str, list[float]] = {}
    for epoch, rows_of_epoch in enumerate(epochs, start=1):
        losses, wall, processor = [], time.perf_counter(), time.process_time()
        for rows in rows_of_epoch:
            given = *data, rows, np.int32(taken), key
            carry, loss = program.step(carry, numbers, *given)
            losses.append(loss)
            taken += 1
        jax.block_until_ready(carry)
        seen = {
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "batch_loss": float(np.mean(jax.device_get(losses))),
            **measure(carry),
        }
        for name, value in seen.items():
            curves.setdefault(name, []).append(value)
        diverged = not np.isfinite(seen["batch_loss"])
        pruned = not diverged and ends(epoch, seen.get("accuracy", 0.0))
        if diverged or pruned:
            break
    return Run(carry, curves, taken, diverged, pruned)
