"""Runs the batch-size study: searches on validation images, winners on test images.

    python -m experiments.main study batch-size --data-dir <folder>

Does a properly tuned K-FAC beat a properly tuned SGD, and does its lead grow with the
batch? Each optimiser at each batch size is searched by the tree-structured Parzen
estimator with the same number of trials, for the accuracy on held-out training images
after the last epoch; test images take no part. A trial that is worse than the median of
the trials before it may end early; it counts as a trial. The winner is then trained
again from several seeds and measured on the test images: what counts is the accuracy
at the end, not the best on the way. Runs of the same seed and batch size share initial
parameters, order of the images and augmentation, whatever the optimiser. Optax has
neither SOAP nor Shampoo: Muon is the peer that works with matrices.

Every finished run is a line of its cell's file; the same command goes on after it, and
with more ``--trials`` it extends the searches. Several processes may run different
cells (``--only``) into the same folder. Seconds are those of the training steps alone.

References:
    Naganuma et al., 2018, "Hyper-parameter optimisation for large-scale parallel deep
    learning with an approximate natural gradient method" (in Japanese); Bergstra et
    al., 2011, "Algorithms for hyper-parameter optimization", NeurIPS.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress

from experiments.configs import NetConfig
from experiments.configs.tune import CurvatureConfig, TuneConfig
from experiments.datasets import Dataset, make_augmentation
from experiments.metrics import make_evaluate
from experiments.models import Task, make_task
from experiments.studies.batch_size.config import BatchStudy, Cell
from experiments.studies.images import load_split
from experiments.studies.records import Cells, Record
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


CHANCE = 0.1  # accuracy of a network that has diverged: there are ten labels


def train(
    config: BatchStudy,
    problem: Problem,
    cell: Cell,
    program: Program,
    values: dict[str, float],
    seed: int,
    measure: Measure,
    ends: Callable[[int, float], bool] = lambda epoch, accuracy: False,
) -> Record:
    """A run.

    Args:
        config: the study.
        problem: data and network.
        cell: optimiser and batch size.
        program: the same compiled.
        values: hyper-parameters.
        seed: of parameters, order of the images, augmentation and sampled labels.
        measure: is asked after every epoch.
        ends: epoch, from 1, and accuracy to whether the run ends there.

    Returns:
        Lists with an item per epoch: what was measured, the mean loss of the batches as
        `batch_loss`, and the wall-clock and processor seconds of its steps. A loss that
        is not finite ends the run.
    """
    numbers = as_floats(values)
    carry = jax.block_until_ready(program.start(seed, numbers))
    key, number = jax.random.key(seed + 1), 0
    curves: dict[str, list[float]] = {}
    diverged = pruned = False
    for epoch in range(1, config.epochs + 1):
        losses = []
        wall, processor = time.perf_counter(), time.process_time()
        for rows in order_of(config, problem, cell.batch_size, seed, epoch - 1):
            carry, loss = program.step(carry, numbers, rows, np.int32(number), key)
            losses.append(loss)
            number += 1
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
        pruned = not diverged and ends(epoch, seen["accuracy"])
        if diverged or pruned:
            break
    flags = {"diverged": diverged, "pruned": pruned}
    return {"values": values, "seed": seed, "steps": number, **flags, **curves}


def final(record: Record) -> float:
    """The accuracy at the end of a run; `CHANCE` if it has diverged."""
    return CHANCE if record["diverged"] else record["accuracy"][-1]


def winner_of(records: list[Record]) -> Record:
    """The best trial that was trained to the end, the first of equals."""
    trials = [r for r in records if r["kind"] == "trial" and not r["pruned"]]
    return max(trials, key=final)


def make_study(config: BatchStudy, space: dict, known: list[Record]) -> optuna.Study:
    """The search after some trials, which alone decide what comes next."""
    first = config.startup_trials
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=len(known), n_startup_trials=first),
        pruner=optuna.pruners.MedianPruner(first, max(0, config.prune_from - 1)),
    )
    for record in known:
        # Of a diverged run, only the value: its accuracies are not its best.
        seen = () if record["diverged"] else record["accuracy"]
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if record["pruned"] else TrialState.COMPLETE,
                params={name: record["values"][name] for name in space},
                distributions=space,
                value=final(record),
                intermediate_values=dict(enumerate(seen, start=1)),
            )
        )
    return study


def search(
    config: BatchStudy,
    cells: Cells,
    cell: Cell,
    problem: Problem,
    get_program: Callable[[], Program],
    measure: Measure,
    tell: Callable[[Record], None],
) -> None:
    """Runs the trials of a cell that are missing."""
    space = config.space(cell.optimizer)
    drawn = space.distributions()
    known = [r for r in cells.read(cell.name) if r["kind"] == "trial"]
    for number in range(len(known), config.trials):
        study = make_study(config, drawn, known)
        if number == 0:
            study.enqueue_trial(space.usual())
        trial = study.ask(drawn)

        def ends(epoch: int, accuracy: float, trial: Any = trial) -> bool:
            trial.report(accuracy, epoch)
            allowed = config.prune_from and epoch < config.epochs
            return bool(allowed and trial.should_prune())

        values = dict(trial.params)
        run = train(config, problem, cell, get_program(), values, 0, measure, ends)
        record = {"number": number, **identity(cell), **run}
        known.append(cells.append(cell.name, "trial", record.pop("steps"), **record))
        tell(known[-1])


def run_seeds(
    config: BatchStudy,
    cells: Cells,
    cell: Cell,
    problem: Problem,
    get_program: Callable[[], Program],
    measure: Measure,
    tell: Callable[[Record], None],
) -> None:
    """Trains a cell's winner from the seeds that are missing."""
    records = cells.read(cell.name)
    best = winner_of(records)
    done = seeds_of(records, best["number"])
    for seed in range(1, config.seeds + 1):
        if seed in done:
            continue
        run = train(config, problem, cell, get_program(), best["values"], seed, measure)
        record = {"number": best["number"], **identity(cell), **run}
        tell(cells.append(cell.name, "seed", record.pop("steps"), **record))


def identity(cell: Cell) -> dict[str, Any]:
    """The fields of a cell in its records."""
    return {"optimizer": cell.optimizer, "batch_size": cell.batch_size}


def seeds_of(records: list[Record], number: int) -> dict[int, Record]:
    """The runs of a trial's hyper-parameters on the test images, by seed."""
    found = {
        r["seed"]: r for r in records if r["kind"] == "seed" and r["number"] == number
    }
    return dict(sorted(found.items()))


def run_batch_size(config: BatchStudy, console: Console) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem, cells, wanted = load(config), Cells(config), config.cells()
    data, sizes = problem.data, (config.train_examples, len(problem.data.x_test))
    console.print(f"Data: {data.title}, {sizes[0]} to train, {sizes[1]} to test")
    of_trials, of_seeds = measures(problem)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(wanted) * (config.trials + config.seeds))

        def tell(record: Record) -> None:
            bar.advance(task)
            text = ", ".join(f"{k} {v:.3g}" for k, v in record["values"].items())
            end = " pruned," * record["pruned"] + " diverged," * record["diverged"]
            console.print(
                f"{record['kind']}, seed {record['seed']}: {text}:{end} accuracy "
                f"{final(record):.4f}, {sum(record['wall']):.1f} s",
                highlight=False,
                soft_wrap=True,
            )

        for position, cell in enumerate(wanted):
            bar.update(task, description=cell.name)
            console.print(cell.name)
            made: list[Program] = []

            def get_program(cell: Cell = cell, made: list[Program] = made) -> Program:
                if not made:  # a finished cell is not compiled
                    made.append(make_program(config, problem, cell))
                return made[0]

            shared = cells, cell, problem, get_program
            search(config, *shared, of_trials, tell)
            run_seeds(config, *shared, of_seeds, tell)
            bar.update(task, completed=(position + 1) * (config.trials + config.seeds))
    return config.out
