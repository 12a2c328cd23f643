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

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from rich.console import Console
from rich.progress import Progress

from experiments.studies.cells import Cells, Record
from experiments.studies.damping import tasks
from experiments.studies.damping.config import (
    ADAPTIVE,
    FIXED,
    SGD,
    Cell,
    DampingStudy,
)
from experiments.studies.damping.problem import (
    Images,
    Program,
    batches,
    damping_of,
    load,
    make_program,
)
from experiments.tuning.ranges import Linear, Log
from kfac_jax_lite.tree import find_states

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
) -> Program:
    """Runs the trials of a cell that are missing."""
    program = make_program(config, images, cell.method, config.kl_clip)
    found = [r for r in cells.read(cell.name) if r["kind"] == "trial"]
    study = optuna.create_study(direction="minimize")
    for record in found:
        known = {k: record["values"][k] for k in SPACE}
        study.add_trial(
            optuna.trial.create_trial(
                params=known, distributions=SPACE, value=final(record)
            )
        )
    for number in range(len(found), config.trials):
        # What is drawn depends on the trials before alone: a search can go on.
        study.sampler = optuna.samplers.TPESampler(
            seed=number, n_startup_trials=STARTUP_TRIALS
        )
        if number == 0:
            study.enqueue_trial(USUAL)
        trial = study.ask(SPACE)
        values = dict(trial.params)
        if cell.method == FIXED:
            values["damping"] = cell.damping
        record = train(config, images, program, values, 0)
        study.tell(trial, final(record))
        tell(cells.append(cell.name, "trial", config.steps, number=number, **record))
    return program


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


def show_winner(
    config: DampingStudy, cells: Cells, cell: Cell, images: Images, program: Program
) -> None:
    """Runs the best trial again, with histograms and eigenvalues."""
    records = cells.read(cell.name)
    if any(r["kind"] == "winner" for r in records):
        return
    best = min((r for r in records if r["kind"] == "trial"), key=final)
    look = look_at(cell.method, program)
    record = train(config, images, program, best["values"], 0, look)
    cells.append(cell.name, "winner", config.steps, number=best["number"], **record)


def sensitivity(
    config: DampingStudy, cells: Cells, images: Images, tell: Callable
) -> None:
    """Untuned settings, from every damping: fixed there, or adapted from there."""
    done = {
        (r["method"], r["values"]["damping"], r["seed"])
        for r in cells.read("sensitivity")
    }
    for method in (FIXED, ADAPTIVE):
        program = make_program(config, images, method, CLIP)
        for damping in config.dampings:
            for seed in range(config.seeds):
                if (method, damping, seed) in done:
                    continue
                values = UNTUNED | {"damping": damping}
                record = train(config, images, program, values, seed)
                record = {"method": method, **record}
                tell(cells.append("sensitivity", "run", config.steps, **record))


def run_damping(config: DampingStudy, console: Console) -> Path:
    """Runs what is missing."""
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
            program = search(config, cells, cell, images, tell)
            show_winner(config, cells, cell, images, program)
            jax.clear_caches()
        if config.wants_sensitivity:
            console.print("sensitivity")
            sensitivity(config, cells, images, tell)
        if config.wants_tasks:
            bar.update(task, description=tasks.CELL)
            console.print(tasks.CELL)
            tasks.run_tasks(config, cells, lambda r: say(r, tasks.final(r)))
    return config.out
