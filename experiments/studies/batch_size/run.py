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
    learning with an approximate natural gradient method" (in Japanese).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optuna
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
from experiments.studies.search import ask
from experiments.studies.training import Program, orders, train
from experiments.tuning.optimisers import make_rule, rate_at
from experiments.tuning.trials import as_floats

CHANCE = 0.1  # accuracy of a network that has diverged: there are ten labels
Measure = Callable[[Any], dict[str, float]]


class Problem(NamedTuple):
    """What all cells share."""

    data: Dataset  # training and test images; the held-out ones are in neither
    held: tuple[np.ndarray, np.ndarray]  # validation images and labels
    images: tuple[jax.Array, jax.Array]  # training images and labels on the device
    task: Task  # network and loss


def load(config: BatchStudy) -> Problem:
    """The images; `load_split` says which are held out. The network."""
    data, validation = load_split(config, config.dataset)
    task = make_task(config.model, NetConfig(hidden=config.hidden), data)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    return Problem(data, validation, (x, y), task)


def make_program(config: BatchStudy, problem: Problem, cell: Cell) -> Program:
    """Builds and compiles a cell's step.

    A step is a call of its own: inside `jax.lax.scan`, jaxlib 0.10.2 computes the
    convolutions on CPUs ten times more slowly.
    """
    size, every = cell.batch_size, config.refresh_every(cell.batch_size)
    chosen: Any = cell.optimizer
    tuned = TuneConfig(
        optimizer=chosen,
        dataset=config.dataset,
        model=config.model,
        curvature=CurvatureConfig(
            config.fisher, every, "cholesky", every, config.kl_clip
        ),
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
        rate = rate_at(values, number, steps)
        return rule.step(carry, values, rate, batch, of_labels)

    begin = jax.jit(start)
    values = as_floats(dict.fromkeys(config.space(cell.optimizer).ranges(), 0.5))
    carry = jax.eval_shape(begin, 0, values)
    inputs = *problem.images, np.zeros(size, np.int32), np.int32(0), jax.random.key(0)
    compiled = jax.jit(step, donate_argnums=0).lower(carry, values, *inputs).compile()
    return Program(begin, compiled)


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


def run_one(
    config: BatchStudy, problem: Problem, cell: Cell, program: Program, *how: Any
) -> Record:
    """A run as a record; `how` are values, seed, measure and what ends it."""
    values, seed, *rest = how
    size, count = cell.batch_size, len(problem.data.x_train)
    epochs = orders(count, size, config.epochs, seed)
    run = train(program, values, seed, problem.images, epochs, *rest)
    flags = {"diverged": run.diverged, "pruned": run.pruned}
    own = {"optimizer": cell.optimizer, "batch_size": cell.batch_size}
    known = {"step": run.steps, "values": values, "seed": seed}
    return {**known, **own, **flags, **run.curves}


def final(record: Record) -> float:
    """The accuracy at the end of a run; `CHANCE` if it has diverged."""
    return CHANCE if record["diverged"] else record["accuracy"][-1]


def winner_of(records: list[Record]) -> Record:
    """The best trial that was trained to the end, the first of equals."""
    trials = [r for r in records if r["kind"] == "trial" and not r["pruned"]]
    return max(trials, key=final)


def seeds_of(records: list[Record], number: int) -> dict[int, Record]:
    """The runs of a trial's hyper-parameters on the test images, by seed."""
    found = [r for r in records if r["kind"] == "seed" and r["number"] == number]
    return {r["seed"]: r for r in sorted(found, key=lambda r: r["seed"])}


def next_trial(config: BatchStudy, cell: Cell, known: list[Record]) -> optuna.Trial:
    """The trial after some others."""
    space, first = config.space(cell.optimizer), config.startup_trials
    pruner = optuna.pruners.MedianPruner(first, max(0, config.prune_from - 1))
    drawn, usual = space.distributions(), space.usual()
    return ask(drawn, known, final, usual, first, pruner=pruner, maximize=True)


def run_cell(
    config: BatchStudy,
    cells: Cells,
    cell: Cell,
    problem: Problem,
    by: tuple[Measure, Measure],
    tell: Callable[[Record], None],
) -> None:
    """Runs the trials of a cell that are missing, then the winner's seeds."""
    get_program = functools.cache(lambda: make_program(config, problem, cell))
    known = [r for r in cells.read(cell.name) if r["kind"] == "trial"]
    for number in range(len(known), config.trials):
        trial = next_trial(config, cell, known)

        def ends(epoch: int, accuracy: float, trial: Any = trial) -> bool:
            trial.report(accuracy, epoch)
            allowed = config.prune_from and epoch < config.epochs
            return bool(allowed and trial.should_prune())

        how = get_program(), dict(trial.params), 0, by[0], ends
        run = run_one(config, problem, cell, *how)
        known.append(cells.append(cell.name, "trial", number=number, **run))
        tell(known[-1])
    best = winner_of(known)
    done = seeds_of(cells.read(cell.name), best["number"])
    for seed in range(1, config.seeds + 1):
        if seed not in done:
            how = get_program(), best["values"], seed, by[1]
            run = run_one(config, problem, cell, *how)
            tell(cells.append(cell.name, "seed", number=best["number"], **run))


def run_batch_size(config: BatchStudy, console: Console) -> Path:
    """Runs what is missing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem, cells, wanted = load(config), Cells(config), config.cells()
    data, sizes = problem.data, (config.train_examples, len(problem.data.x_test))
    console.print(f"Data: {data.title}, {sizes[0]} to train, {sizes[1]} to test")
    by, each = measures(problem), config.trials + config.seeds
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(wanted) * each)

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

        for position, cell in enumerate(wanted, start=1):
            bar.update(task, description=cell.name)
            console.print(cell.name)
            run_cell(config, cells, cell, problem, by, tell)
            bar.update(task, completed=position * each)
    return config.out
