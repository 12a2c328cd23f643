"""Runs the damping study: searches, sensitivity runs and what the winners look like.

    python -m experiments.main study damping --data-dir <folder>

Each cell is searched by the tree-structured Parzen estimator over learning rate, its
linear decay and momentum, for the lowest training loss after the last step; `tasks`
compares adaptive and default damping on other networks. Every
finished trial is a line of its cell's file; the same command goes on after it. Several
processes may run different cells (``--only``) into the same folder.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization", NeurIPS.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from rich.console import Console
from rich.progress import Progress

import kfac_jax_lite as kfac
from experiments import datasets
from experiments.stepping import step as one_step
from experiments.studies.damping import tasks
from experiments.studies.damping.config import (
    ADAPTIVE,
    FIXED,
    JUDGED,
    SGD,
    Cell,
    DampingStudy,
)
from experiments.studies.records import Cells, Record
from experiments.studies.search import ask
from experiments.tuning.spaces import Linear, Log
from kfac_jax_lite.core.pytree import find_states

FACTOR_DECAY = 0.95
Values = dict[str, Any]


class Images(NamedTuple):
    """Training images ``[n, pixels]`` in [0, 1], labels ``[n]``, and their source."""

    x: jax.Array
    y: jax.Array
    classes: int
    title: str


def load(config: DampingStudy) -> Images:
    data = datasets.load(config.dataset, config.data_dir)
    x = np.asarray(data.x_train, np.float32) / data.maximum
    flat = jnp.asarray(x.reshape(len(x), -1))
    return Images(flat, jnp.asarray(data.y_train), data.num_classes, data.title)


def make_init(config: DampingStudy, images: Images) -> Callable[[jax.Array], list]:
    """Makes initial parameters: all uniform in ``±1/√(fan-in)``, as PyTorch's."""
    hidden = [config.width] * config.hidden
    sizes = [images.x.shape[-1], *hidden, images.classes]

    def init(key):
        params = []
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            key, of_w, of_b = jax.random.split(key, 3)
            bound = n_in**-0.5
            draw = {"minval": -bound, "maxval": bound}
            w = jax.random.uniform(of_w, (n_in, n_out), **draw)
            params.append({"w": w, "b": jax.random.uniform(of_b, (n_out,), **draw)})
        return params

    return init


def loss(params: list, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy of the linear network."""
    for layer in params:
        x = x @ layer["w"] + layer["b"]
    logits = kfac.categorical(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Program(NamedTuple):
    """A method, compiled once; hyper-parameters are arguments."""

    start: Callable[..., Any]  # ``(seed, values) -> carry``
    # ``(carry, values, batches [k, B], keys [k]) -> carry``; the carry is donated.
    advance: Callable[..., Any]
    measure: Callable[[Any], jax.Array]  # ``carry -> training loss``
    # ``carry -> gradient of the training loss``, a tree.
    gradients: Callable[[Any], Any]


def make_program(
    config: DampingStudy, images: Images, method: str, kl_clip: float | None
) -> Program:
    init = make_init(config, images)
    shapes = jax.eval_shape(init, jax.random.key(0))
    part = images.x[: config.eval_examples], images.y[: config.eval_examples]
    batch = images.x[: config.batch_size], images.y[: config.batch_size]
    tagged = kfac.tag(loss, shapes, *batch, fisher=config.fisher)

    def make_tx(values: Values) -> optax.GradientTransformationExtraArgs:
        def rate(count):
            # Linear from the first value to its share `end`.
            return values["rate"] * (1 - (1 - values["end"]) * count / config.steps)

        if method == SGD:
            sgd = optax.sgd(rate, momentum=values["momentum"])
            return optax.with_extra_args_support(sgd)
        rules: dict[str, Any] = {ADAPTIVE: kfac.damping.adaptive}
        rules[JUDGED] = kfac.damping.levenberg_marquardt
        return kfac.kfac(
            tagged.layers,
            rate,
            damping=values["damping"] if method == FIXED else rules[method](),
            momentum=values["momentum"],
            kl_clip=kl_clip,
            factor_decay=FACTOR_DECAY,
            inverse_interval=config.inverse_interval,
        )

    def step(carry, values, picked, key):
        params, state = carry
        batch, tx = (images.x[picked], images.y[picked]), make_tx(values)
        if method != JUDGED:
            chosen: Any = loss if method == SGD else tagged
            options = {"key": key, "deferred": True}
            return one_step(chosen, tx, params, state, batch, **options)[:2]
        _, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state, key=key, deferred=True
        )
        model = kfac.quadratic_model(tagged, params, *batch)
        given = {"statistics": statistics, "model": model}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    def advance(carry, values, picked, keys):
        def turn(carry, drawn):
            return step(carry, values, *drawn), None

        return jax.lax.scan(turn, carry, (picked, keys))[0]

    def start(seed, values):
        params = init(jax.random.key(seed))
        state: Any = make_tx(values).init(params)
        if method == ADAPTIVE and "damping" in values:  # another first damping
            state = state._replace(damping=jnp.float32(values["damping"]))
        return params, state

    return Program(
        start,
        jax.jit(advance, donate_argnums=0),
        jax.jit(lambda carry: loss(carry[0], *part)),
        jax.jit(lambda carry: jax.grad(loss)(carry[0], *part)),
    )


def damping_of(carry: Any) -> float | None:
    """The damping in force; None for SGD."""
    try:
        return kfac.report(carry[1])[0]["damping"]
    except ValueError:
        return None


def batches(config: DampingStudy, images: Images, seed: int) -> np.ndarray:
    """Numbers of the images of every step, ``[steps, batch]``: epochs without rest."""
    rng, per_epoch = np.random.default_rng(seed), len(images.x) // config.batch_size
    used = per_epoch * config.batch_size
    epochs = -(-config.steps // per_epoch)
    orders = [rng.permutation(len(images.x))[:used] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, config.batch_size)[: config.steps]


SPACE = {
    "rate": Log(1e-4, 3.0).distribution(),
    "end": Linear(0.0, 1.0).distribution(),
    "momentum": Linear(0.0, 0.95).distribution(),
}
USUAL = {"rate": 0.1, "end": 0.1, "momentum": 0.9}
STARTUP_TRIALS = 8
WORST = 10.0
# The library's default trust region, and settings that nobody has tuned.
CLIP, UNTUNED = 1e-3, {"rate": 0.1, "end": 0.0, "momentum": 0.9}
EDGES = np.arange(-20.0, 3.0)


def train(
    config: DampingStudy,
    images: Images,
    program: Program,
    values: dict[str, float],
    seed: int,
    look: Callable[[Any], Record] | None = None,
) -> Record:
    """A run.

    Args:
        config: the study.
        images: the data.
        program: the method.
        values: its hyper-parameters.
        seed: of the parameters, the order of the data and sampled labels.
        look: is asked for more at every evaluation.

    Returns:
        Training losses and dampings after every ``eval_every`` steps, the first before
        any step; None where they are not finite, which ends the run.
    """
    numbers = {name: jnp.float32(value) for name, value in values.items()}
    carry = program.start(seed, numbers)
    keys = jax.random.split(jax.random.key(seed + 1), config.steps)
    order = batches(config, images, seed)
    curve, dampings, seen = [], [], []
    for at in range(0, config.steps + 1, config.eval_every):
        if at:
            part = slice(at - config.eval_every, at)
            carry = program.advance(carry, numbers, order[part], keys[part])
        found = float(program.measure(carry))
        curve.append(found if math.isfinite(found) else None)
        dampings.append(damping_of(carry))
        if curve[-1] is None:
            break
        if look and at:
            seen.append(look(carry))
    result = {"values": values, "seed": seed, "curve": curve, "dampings": dampings}
    return result | ({"seen": seen} if look else {})


def final(record: Record) -> float:
    """The training loss at the end of a run; `WORST` at most."""
    last = record["curve"][-1]
    return WORST if last is None else min(last, WORST)


def search(
    config: DampingStudy, cells: Cells, cell: Cell, images: Images, tell: Callable
) -> None:
    """Runs the missing trials of a cell, and the best one with a look at it."""
    program = make_program(config, images, cell.method, config.kl_clip)
    found = [r for r in cells.read(cell.name) if r["kind"] == "trial"]
    for number in range(len(found), config.trials):
        trial = ask(SPACE, found, final, USUAL, STARTUP_TRIALS)
        values = dict(trial.params)
        values |= {"damping": cell.damping} if cell.method == FIXED else {}
        run = train(config, images, program, values, 0)
        run |= {"number": number, "step": config.steps}
        found.append(cells.append(cell.name, "trial", **run))
        tell(found[-1])
    best = min(found, key=final)
    look = look_at(cell.method, program)

    def make() -> Record:
        run = train(config, images, program, best["values"], 0, look)
        return run | {"number": best["number"], "step": config.steps}

    cells.get(cell.name, "winner", make)


def look_at(method: str, program: Program) -> Callable[[Any], Record]:
    """Makes the function that sees gradients and factors in a winner's run."""

    def look(carry):
        squares = [np.square(jax.device_get(g["w"])) for g in program.gradients(carry)]
        with np.errstate(divide="ignore"):
            logs = [np.clip(np.log10(s), EDGES[0], EDGES[-1] - 1e-6) for s in squares]
        counts = [np.histogram(x, EDGES)[0] for x in logs]
        return {"squares": counts, "eigenvalues": eigenvalues(method, carry)}

    return look


def eigenvalues(method: str, carry: Any) -> Record:
    """Smallest and largest eigenvalue of every factor of K-FAC, by layer."""
    if method == SGD:
        return {}
    (state,) = find_states(carry[1])
    found = {}
    for name, factors in sorted(state.factors.items()):
        for side in ("a", "g"):
            matrix = np.asarray(getattr(factors, side), np.float64)
            values = np.linalg.eigvalsh(matrix)
            found[f"{name} {side}"] = [values[0], values[-1]]
    return found


def sensitivity(
    config: DampingStudy, cells: Cells, images: Images, tell: Callable
) -> None:
    """Untuned settings, from every damping: fixed there, or adapted from there."""
    for method in (FIXED, ADAPTIVE):
        program = make_program(config, images, method, CLIP)
        for damping, seed in itertools.product(config.dampings, range(config.seeds)):
            key = {"method": method, "values": UNTUNED | {"damping": damping}}
            key["seed"] = seed

            def make(key: Record = key, program: Program = program) -> Record:
                run = train(config, images, program, key["values"], key["seed"])
                return {**run, "step": config.steps}

            record, new = cells.get("sensitivity", "run", make, **key)
            if new:
                tell(record)


def run_damping(config: DampingStudy, console: Console) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    images, cells = load(config), Cells(config)
    console.print(f"Data: {images.title}, {len(images.x)} images")
    wanted = config.cells()
    total = len(wanted) * config.trials
    total += config.wants_sensitivity * 2 * len(config.dampings) * config.seeds
    each = len(tasks.METHODS) * (len(config.task_rates) + config.seeds)
    total += config.wants_tasks * len(config.tasks) * each
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=total)

        def say(record: Record, loss: float) -> None:
            bar.advance(task)
            text = ", ".join(f"{k} {v:.3g}" for k, v in record["values"].items())
            console.print(f"{text}: loss {loss:.4f}", highlight=False)

        def tell(record: Record) -> None:
            say(record, final(record))

        for cell in wanted:
            bar.update(task, description=cell.name)
            console.print(cell.name)
            bar.advance(task, len(cells.read(cell.name)))
            search(config, cells, cell, images, tell)
            jax.clear_caches()
        if config.wants_sensitivity:
            console.print("sensitivity")
            sensitivity(config, cells, images, tell)
        if config.wants_tasks:
            bar.update(task, description=tasks.CELL)
            console.print(tasks.CELL)
            tasks.run_tasks(config, cells, lambda r: say(r, tasks.final(r)))
    return config.out
