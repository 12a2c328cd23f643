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

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

import kfac_jax_lite as kfac
from experiments.errors import MetricsError
from experiments.studies.bayes import active, regression
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
    Program,
    Record,
    Run,
    Settings,
    Values,
    WithState,
    load,
    make_program,
    measure,
    network_of,
    on_device,
    orders,
    train,
)
from experiments.studies.records import Cells
from kfac_jax_lite import bayes
from kfac_jax_lite.bayes import metrics


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


def runs(
    config: BayesStudy,
    images: Images,
    network: Network,
    base: Cell,
    how: str,
    done: Any,
) -> Iterator[tuple[int, Record]]:
    like = jax.eval_shape(network.task.init, jax.random.key(0))

    def trained(seed):
        return read(path_of(config, base, seed), like)

    if how == ENSEMBLE:
        if 0 not in done:
            members = [trained(seed) for seed in range(1, config.seeds + 1)]
            yield 0, measure(config, images, ensemble(network, members))
        return
    for seed in range(1, config.seeds + 1):
        if seed not in done:
            own, fitted = linearised(config, images, network, trained(seed), how)
            yield seed, measure(config, images, own) | fitted


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

    config: BayesStudy  # the study
    cells: Cells  # the files
    images: Images  # of the data set
    network: Network  # on them
    tell: Tell  # is given the name of a cell and a finished run's record


def settings_of(config: BayesStudy, method: str) -> Settings:
    """What the runs of a method have in common."""
    return Settings(
        method,
        config.train_examples,
        config.steps,
        config.damping,
        config.vogn_damping,
        config.refresh_every,
        config.kl_clip,
        config.momentum,
        config.ivon_decay,
    )


def run_one(context: Context, program: Program, values: Values, seed: int) -> Run:
    config, data = context.config, context.images.data
    images, labels = on_device((data.x_train, data.y_train))
    epochs = orders(len(images), config.batch_size, config.epochs, seed)
    return train(program, values, seed, images, labels, epochs)


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


def search(
    context: Context, cell: Cell, get_program: Callable[[], Program]
) -> list[Record]:
    """Runs the trials that are missing; all of them, in the grid's order."""
    config, (held, labels) = context.config, context.images.held
    done = [r for r in context.cells.read(cell.name) if r["kind"] == "trial"]
    found = []
    for values in config.trials(cell.method):
        known = [r for r in done if r["values"] == values]
        if not known:
            run = run_one(context, get_program(), values, SEARCH_SEED)
            own = predictor(context, cell.method, run, 0, config.search_samples)
            p = own(held)
            record = {
                **identity(cell),
                "values": values,
                "seed": SEARCH_SEED,
                "nll": float(metrics.nll(p, labels)),
                "accuracy": float(metrics.accuracy(p, labels)),
                "loss": run.loss,
                "seconds": run.seconds,
            }
            known = [context.cells.append(cell.name, "trial", config.steps, **record)]
            context.tell(cell.name, known[0])
        found.append(known[0])
    return found


def of_trial(record: Record) -> float:
    """What a trial is judged by; infinite where it is not finite."""
    value = record["nll"]
    return math.inf if value is None or not math.isfinite(value) else value


def winner_of(trials: list[Record]) -> Record:
    """The best trial, the first of equals."""
    return min(trials, key=of_trial)


def identity(cell: Cell) -> Record:
    """The fields of a cell in its records."""
    return {"dataset": cell.dataset, "network": cell.network, "method": cell.method}


def seeds_of(records: list[Record], values: Values) -> dict[int, Record]:
    """The runs of some hyper-parameters on the test images, by seed, in order."""
    found = {
        r["seed"]: r for r in records if r["kind"] == "seed" and r["values"] == values
    }
    return dict(sorted(found.items()))


def run_trained(context: Context, cell: Cell) -> None:
    """Runs what is missing of a trained method: its trials, then the winner's seeds."""
    config, cells, images = context.config, context.cells, context.images
    made: list[Program] = []

    def get_program() -> Program:
        if not made:  # a finished cell is not compiled
            settings = settings_of(config, cell.method)
            size = config.batch_size
            example = images.data.x_train[:size], images.data.y_train[:size]
            made.append(make_program(settings, context.network.task, example))
        return made[0]

    values = winner_of(search(context, cell, get_program))["values"]
    done = seeds_of(cells.read(cell.name), values)
    for seed in range(1, config.seeds + 1):
        if seed in done:
            continue
        run = run_one(context, get_program(), values, seed)
        own = predictor(context, cell.method, run, seed, config.samples)
        record: Record = {**identity(cell), "values": values, "seed": seed}
        record |= measure(config, images, own)
        if cell.method not in POINTS:
            plain = predictor(context, cell.method, run, seed, 0)
            record["mean_weights"] = measure(config, images, plain)["test"]
        record |= {"loss": run.loss, "seconds": run.seconds}
        if cell.method in BASES:
            save(path_of(config, cell, seed), run.carry[:2])
        context.tell(cell.name, cells.append(cell.name, "seed", config.steps, **record))


def run_cell(context: Context, cell: Cell) -> None:
    """Runs what is missing of a cell."""
    if cell.method not in DERIVED:
        run_trained(context, cell)
        return
    base, how = DERIVED[cell.method]
    config, cells = context.config, context.cells
    trials = [r for r in cells.read(cell.of(base).name) if r["kind"] == "trial"]
    values = winner_of(trials)["values"] if trials else {}
    done = seeds_of(cells.read(cell.name), values)
    for seed, found in runs(
        config, context.images, context.network, cell.of(base), how, done
    ):
        record = {**identity(cell), "values": values, "seed": seed, **found}
        context.tell(cell.name, cells.append(cell.name, "seed", 0, **record))


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
