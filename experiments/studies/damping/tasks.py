"""Adaptive against default damping on other networks, nothing else being changed.

The tasks are those of ``experiments.benchmarks.time_to_target``. Both methods are
``kfac.kfac`` with its defaults, one with ``damping=kfac.damping.adaptive()``. Each runs
with every learning rate of a grid; that with the lowest held-out loss at the end, which
these tasks are about, is run with further seeds. Runs of a seed share initial
parameters, batches and sampled labels. Training losses are recorded, too.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax

import kfac_jax_lite as kfac
from experiments import metrics
from experiments.benchmarks.time_to_target.config import SIZES
from experiments.benchmarks.time_to_target.problem import (
    Problem,
    Program,
    compiled,
    make_problem,
)
from experiments.datasets import batches
from experiments.stepping import step as one_step
from experiments.studies.damping.config import ADAPTIVE, DEFAULT, DampingStudy
from experiments.studies.records import Cells, Record

CELL = "tasks"
METHODS = (DEFAULT, ADAPTIVE)
SEARCH_SEED = 0
# Factors and inverses are made anew every so many steps; kfac's default, every step,
# is no one's choice for layers of a thousand.
EVERY = 5
LARGEST = 1e6


def make_program(problem: Problem, method: str) -> Program:
    """Compiles K-FAC for a task; the learning rate is an argument."""
    tagged, steps = problem.tagged(), problem.size.steps
    rule = kfac.damping.adaptive()
    chosen: dict[str, Any] = {"damping": rule} if method == ADAPTIVE else {}

    def make_tx(rate):
        return kfac.kfac(
            tagged.layers,
            rate,
            interval=kfac.intervals.every(EVERY),
            inverse_interval=EVERY,
            **chosen,
        )

    def step(carry, values, number, batch, key):
        params, model_state, state = carry
        tx = make_tx(values["rate"] * (1 - number / steps))
        options = {"key": key, "deferred": True}
        params, state, (_, model_state) = one_step(
            tagged, tx, params, state, (model_state, *batch), **options
        )
        return params, model_state, state

    return compiled(problem, lambda p: make_tx(1.0).init(p), step, ("rate",))


def train(problem: Problem, program: Program, rate: float, seed: int) -> Record:
    """A run.

    Args:
        problem: the task.
        program: the method.
        rate: first learning rate; it falls linearly to 0.
        seed: of the parameters, the order of the data and sampled labels.

    Returns:
        Losses on held-out and as many training examples at ten points of the run, and
        the damping there; a loss that is not finite, None, ends the run.
    """
    size, data = problem.size, problem.data
    params, model_state = jax.jit(problem.task.init)(jax.random.key(seed))
    carry = params, model_state, program.start(params, {"rate": rate})
    count, key = size.validation, jax.random.key(seed + 1)
    fitted = metrics.make_evaluate(
        problem.task, data.x_train[:count], data.y_train[:count]
    )
    every = max(1, size.steps // 10)
    steps: list[int] = []
    found: dict[str, list[Any]] = {"train_loss": [], "loss": [], "damping": []}
    for number, batch in enumerate(batches(data, size.batch, seed, 0, size.steps)):
        key, sub = jax.random.split(key)
        carry = program.step(carry, {"rate": rate}, number, batch, sub)
        if (number + 1) % every and number + 1 < size.steps:
            continue
        losses = [
            evaluate(*carry[:2])["loss"] for evaluate in (fitted, problem.evaluate)
        ]
        finite = all(math.isfinite(x) and x < LARGEST for x in losses)
        losses = losses if finite else [None, None]
        damping = kfac.report(carry[2])[0]["damping"]
        steps.append(number + 1)
        for name, value in zip(found, (*losses, damping), strict=True):
            found[name].append(value)
        if not finite:
            break
    return {"steps": steps, **found}


def final(record: Record) -> float:
    """The held-out loss at the end; infinite where it was not a number."""
    last = record["loss"][-1]
    return math.inf if last is None else last


def best_rate(records: list[Record], task: str, method: str) -> float:
    """The rate with the lowest held-out loss of the search's seed."""
    chosen = [r for r in records if (r["task"], r["method"]) == (task, method)]
    runs = [r for r in chosen if r["seed"] == SEARCH_SEED]
    return min(runs, key=final)["values"]["rate"]


def run_tasks(
    config: DampingStudy, cells: Cells, tell: Callable[[Record], None]
) -> None:
    """Runs what is missing."""
    sizes = SIZES["tiny" if config.size == "tiny" else "small"].tasks
    for task, method in itertools.product(config.tasks, METHODS):
        size = sizes[task]
        name = {"task": task, "method": method}
        name["task_fingerprint"] = size.fingerprint("ours")

        @functools.cache
        def made(size: Any = size, method: str = method) -> tuple[Problem, Program]:
            problem = make_problem(size, config.data_dir)
            return problem, make_program(problem, method)

        def finish(rate: float, seed: int, name: Any = name, made: Any = made) -> None:
            def make() -> Record:
                problem, program = made()
                run = train(problem, program, rate, seed)
                return {**run, "step": run["steps"][-1]}

            key = {**name, "values": {"rate": rate}, "seed": seed}
            record, new = cells.get(CELL, "run", make, **key)
            if new:
                tell(record)

        for rate in config.task_rates:
            finish(rate, SEARCH_SEED)
        best = best_rate(cells.read(CELL), task, method)
        for seed in range(1, config.seeds + 1):
            finish(best, seed)
        jax.clear_caches()
