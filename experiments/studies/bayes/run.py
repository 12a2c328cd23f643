"""Runs the Bayesian study: searches on validation images, winners on test images.

    python -m experiments.main study bayes --data-dir <folder>

Is a posterior by natural gradients better calibrated than the best tuned Adam, at equal
accuracy? Every trained method has a grid of hyper-parameters, Adam's being no smaller
than any other's; all combinations are run with seed 0 and judged by the negative
log-likelihood of the method's own predictions on held-out training images. The best one
is trained again from several seeds and measured on test images, on the same under noise
of growing strength, and on images that belong to no class. Runs of a seed share initial
parameters and the order of the images, whatever the method.

Laplace's approximations and the ensemble train nothing: they are made of the weights of
Adam's and K-FAC's winners. Active learning and a regression example are further parts.

Every finished run is a line of its cell's file; the same command goes on after it.
Several processes may run different cells (``--only``) into the same folder.

References:
    Osawa et al., 2019, arXiv:1906.02506; Ovadia et al., 2019, arXiv:1906.02530 (shifted
    and strange images); Lakshminarayanan et al., 2017, arXiv:1612.01474 (ensembles).
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

import kfac_jax_lite as kfac
from experiments.errors import MetricsError
from experiments.studies.bayes import active, calibration, regression
from experiments.studies.bayes.config import (
    ACTIVE,
    DERIVED,
    POINTS,
    BayesStudy,
    Cell,
)
from experiments.studies.bayes.problem import (
    Images,
    Network,
    Predict,
    Record,
    Settings,
    Values,
    WithState,
    load,
    make_program,
    measure,
    network_of,
    on_device,
)
from experiments.studies.records import Cells
from experiments.studies.training import Program, Run, orders, train
from kfac_jax_lite import bayes


def path_of(config: BayesStudy, cell: Cell, seed: int) -> Path:
    """The file of a cell's weights from a seed."""
    return config.out / "weights" / f"{cell.name}_{seed}.npz"


def save(path: Path, tree: Any) -> None:
    """Writes the leaves of a tree, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, *leaves)
    os.replace(temporary, path)


def read(path: Path, like: Any) -> Any:
    if not path.exists():
        raise MetricsError(
            f"{path} does not exist: the weights are those of another cell, which has "
            "to be run first, into the same folder."
        )
    leaves, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as file:
        found = [file[f"arr_{i}"] for i in range(len(file.files))]
    if [x.shape for x in found] != [tuple(x.shape) for x in leaves]:
        raise MetricsError(f"{path} holds weights of another network.")
    return jax.tree.unflatten(structure, [jax.numpy.asarray(x) for x in found])


ENSEMBLE = "ensemble"
BASES = frozenset(base for base, _ in DERIVED.values())
# Images whose Jacobians are in memory together.
CHUNK = 250
BATCH = 1_000


def ensemble(network: Network, members: list[Any]) -> Predict:
    """The mean of the members' probabilities."""

    def probabilities(images):
        each = [
            bayes.predict(network.logits, None, member, images, batch_size=BATCH)
            for member in members
        ]
        return jnp.mean(jnp.stack(each), 0)

    return probabilities


def linearised(
    config: BayesStudy, images: Images, network: Network, trained: Any, how: str
) -> tuple[Predict, Record]:
    """Laplace's predictions around some weights."""
    params, model_state = trained
    x, y = images.data.x_train, images.data.y_train
    # Whole batches: one program, as an incomplete one would be another.
    size = min(BATCH, len(x))
    batches = [
        (model_state, x[i : i + size], y[i : i + size])
        for i in range(0, len(x) - size + 1, size)
    ]
    tagged = kfac.tag(network.loss, params, *batches[0])
    posterior = bayes.laplace(tagged, params, batches, how, num_data=len(x))
    posterior = posterior.tune_prior()

    def logits(params, images):
        return network.logits((params, model_state), images)

    def probabilities(images):
        parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        found = [bayes.predict_glm(logits, posterior, params, part) for part in parts]
        return jnp.concatenate(found)

    precision = np.asarray(posterior.prior_precision)
    evidence = float(posterior.log_marginal_likelihood())
    return probabilities, {"precision": float(precision[0]), "evidence": evidence}


SEARCH_SEED = 0
# Of the draws for predictions, beside the seed of a run.
DRAW_KEY = 1_000
Tell = Callable[[str, Record], None]


class Context(NamedTuple):
    """What the runs of a data set and a network share."""

    config: BayesStudy
    cells: Cells
    images: Images  # of the data set
    network: Network  # on them
    tell: Tell  # is given the name of a cell and a finished run's record


def settings_of(config: BayesStudy, method: str) -> Settings:
    """What the runs of a method have in common."""
    names = Settings._fields[3:]
    own = {name: getattr(config, name) for name in names}
    return Settings(method, config.train_examples, config.steps, **own)


def predictor(context: Context, method: str, run: Run, seed: int, samples: int):
    """A method's own predictions, of its weights or of draws around them."""
    params, model_state, state = run.carry
    posterior = None if method in POINTS else WithState(state)
    key = jax.random.key(DRAW_KEY + seed)
    logits = context.network.logits

    def probabilities(images):
        given = posterior, (params, model_state), images, key, samples
        return bayes.predict(logits, *given, batch_size=BATCH)

    return probabilities


def of_trial(record: Record) -> float:
    """What a trial is judged by; infinite where it is not finite."""
    value = record["nll"]
    return math.inf if value is None or not math.isfinite(value) else value


def winner_of(trials: list[Record]) -> Record:
    """The best trial, the first of equals."""
    return min(trials, key=of_trial)


def run_trained(context: Context, cell: Cell) -> None:
    """Runs what is missing of a trained method: its trials, then the winner's seeds."""
    config, images, method = context.config, context.images, cell.method
    data, size = images.data, config.batch_size
    whole = on_device((data.x_train, data.y_train))

    @functools.cache  # a finished cell is not compiled
    def get_program() -> Program:
        example = data.x_train[:size], data.y_train[:size]
        settings = settings_of(config, method)
        return make_program(settings, context.network.task, example)

    def trained(values: Values, seed: int) -> tuple[Run, Record]:
        epochs = orders(len(whole[0]), size, config.epochs, seed)
        run = train(get_program(), values, seed, whole, epochs)
        # The first epoch may have compiled.
        walls = run.curves["wall"][1:] or run.curves["wall"]
        seconds = float(np.median(walls)) / len(epochs[0])
        loss = run.curves["batch_loss"][-1]
        return run, {"step": config.steps, "loss": loss, "seconds": seconds}

    def trial(values: Values) -> Record:
        run, facts = trained(values, SEARCH_SEED)
        held, labels = images.held
        p = predictor(context, method, run, SEARCH_SEED, config.search_samples)(held)
        nll, accuracy = calibration.nll(p, labels), calibration.accuracy(p, labels)
        return facts | {"nll": nll, "accuracy": accuracy}

    def winner(values: Values, seed: int) -> Record:
        run, facts = trained(values, seed)
        own = predictor(context, method, run, seed, config.samples)
        record = facts | measure(config, images, own)
        if method not in POINTS:
            plain = predictor(context, method, run, seed, 0)
            record["mean_weights"] = measure(config, images, plain)["test"]
        if method in BASES:
            save(path_of(config, cell, seed), run.carry[:2])
        return record

    trials = [
        finish(context, cell, "trial", lambda v=v: trial(v), v, SEARCH_SEED)
        for v in config.trials(method)
    ]
    values = winner_of(trials)["values"]
    for seed in range(1, config.seeds + 1):
        finish(context, cell, "seed", lambda s=seed: winner(values, s), values, seed)


def finish(
    context: Context,
    cell: Cell,
    kind: str,
    make: Callable[[], Record],
    values: Values,
    seed: int,
) -> Record:
    """A run of a cell, new or from its file."""
    key = {"dataset": cell.dataset, "network": cell.network, "method": cell.method}
    key |= {"values": values, "seed": seed}
    record, new = context.cells.get(cell.name, kind, make, **key)
    if new:
        context.tell(cell.name, record)
    return record


def run_cell(context: Context, cell: Cell) -> None:
    """Runs what is missing of a cell."""
    if cell.method not in DERIVED:
        run_trained(context, cell)
        return
    base, how = DERIVED[cell.method]
    config, cells, base = context.config, context.cells, cell.of(base)
    trials = [r for r in cells.read(base.name) if r["kind"] == "trial"]
    values = winner_of(trials)["values"] if trials else {}
    like = jax.eval_shape(context.network.task.init, jax.random.key(0))

    def derived(seed: int) -> Record:
        shared = config, context.images
        if how == ENSEMBLE:
            seeds = range(1, config.seeds + 1)
            members = [read(path_of(config, base, s), like) for s in seeds]
            found = measure(*shared, ensemble(context.network, members))
        else:
            trained = read(path_of(config, base, seed), like)
            own, fitted = linearised(*shared, context.network, trained, how)
            found = measure(*shared, own) | fitted
        return {"step": 0, **found}

    for seed in [0] if how == ENSEMBLE else range(1, config.seeds + 1):
        finish(context, cell, "seed", lambda s=seed: derived(s), values, seed)


def run_further(config: BayesStudy, cells: Cells, name: str, tell: Tell) -> None:
    """Runs what is missing of active learning or of the regression example."""
    part: Any = active if name in ACTIVE else regression
    done = {record["seed"] for record in cells.read(name)}
    for seed, found in part.runs(config, name, done):
        record = {"method": name, "seed": seed, **found}
        kind = "active" if part is active else "regression"
        tell(name, cells.append(name, kind, 0, **record))


def total_runs(config: BayesStudy) -> int:
    """How many records a finished study has of the wanted cells."""
    total = 0
    for cell in config.cells():
        trained = cell.method not in DERIVED
        total += len(config.trials(cell.method)) if trained else 0
        whole = not trained and DERIVED[cell.method][1] == ENSEMBLE
        total += 1 if whole else config.seeds
    for name in config.further_cells():
        total += config.active.seeds if name in ACTIVE else 1
    return total


def text_of(record: Record) -> str:
    """A finished run as a line on the screen."""
    if "test" in record:
        test = record["test"]
        return (
            f"seed {record['seed']}: accuracy {test['accuracy']:.4f}, NLL "
            f"{test['nll']:.4f}, ECE {test['ece']:.4f}"
        )
    if record["kind"] == "trial":
        values = ", ".join(f"{k} {v:g}" for k, v in record["values"].items())
        step = 1e3 * record["seconds"]
        return f"trial, {values}: NLL {of_trial(record):.4f}, {step:.1f} ms per step"
    return f"seed {record['seed']}"


def run_bayes(config: BayesStudy, console: Console) -> Path:
    cells = Cells(config)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=total_runs(config))
        names = [c.name for c in config.cells()] + config.further_cells()
        bar.advance(task, sum(len(cells.read(name)) for name in names))

        def tell(name: str, record: Record) -> None:
            bar.advance(task)
            line = f"{name}, {text_of(record)}"
            console.print(line, highlight=False, soft_wrap=True)

        problem, context = None, None
        for cell in config.cells():
            bar.update(task, description=cell.name)
            if problem != (cell.dataset, cell.network) or context is None:
                problem = cell.dataset, cell.network
                images = load(config, cell.dataset)
                network = network_of(config, cell.network, images)
                context = Context(config, cells, images, network, tell)
                jax.clear_caches()
            run_cell(context, cell)
        for name in config.further_cells():
            bar.update(task, description=name)
            run_further(config, cells, name, tell)
    return config.out
