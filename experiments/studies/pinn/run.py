"""Runs the PINN study.

    python -m experiments.main study pinn --size small --out <folder>

Every method has one hyper-parameter and as many values of it to try, on a seed of its
own; the best by the error at the end is then run with the other seeds, all for the same
processor time. Compiling and evaluations are not in it. A finished run is a line of its
method's file; the same command goes on after it.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from experiments.studies.cells import Cells, Record
from experiments.studies.pinn.config import PinnStudy
from experiments.studies.pinn.problem import STEPS, Program, make_program, tag

TUNING_SEED = 1000


def run_one(
    config: PinnStudy, program: Program, steps: int, value: float, seed: int
) -> Record:
    """A run, after two calls that compile."""
    carry = program.start(seed, value)
    # Twice: the types of a state may change in the first call.
    later = program.advance(program.advance(carry, value), value)
    jax.block_until_ready((later, program.measure(carry)))
    curve: Record = {"steps": [], "seconds": [], "losses": [], "errors": []}
    taken, spent = 0, 0.0
    while True:
        found, distance = map(float, program.measure(carry))
        for name, item in zip(curve, (taken, spent, found, distance), strict=True):
            curve[name].append(item)
        if spent >= config.seconds or not math.isfinite(found + distance):
            return {"value": value, "seed": seed, **curve}
        before = time.process_time()
        carry = jax.block_until_ready(program.advance(carry, value))
        spent += time.process_time() - before
        taken += steps


def final(record: Record) -> float:
    """The error at the end of a run; infinite where it was not finite."""
    last = record["errors"][-1]
    return math.inf if last is None or not math.isfinite(last) else last


def run_method(
    config: PinnStudy, cells: Cells, method: str, tell: Callable[[Record], None]
) -> None:
    """Runs what is missing of a method: its settings, then the seeds of the best."""
    program = make_program(config, method)

    def finish(kind: str, value: float, seed: int) -> Record:
        for record in cells.read(method):
            if (record["kind"], record["value"], record["seed"]) == (kind, value, seed):
                return record
        found = run_one(config, program, STEPS[method], value, seed)
        record = cells.append(method, kind, found["steps"][-1], **found)
        tell(record)
        return record

    settings = config.settings(method)
    trials = [finish("trial", value, TUNING_SEED) for value in settings]
    best = min(trials, key=final)["value"]
    for seed in range(config.seeds):
        finish("run", best, seed)


def run_pinn(config: PinnStudy, console: Console) -> Path:
    """Runs what is missing."""
    cells = Cells(config)
    total = sum(len(config.settings(m)) + config.seeds for m in config.only)
    with (
        jax.enable_x64(config.precision == "float64"),
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        console.print(str(tag(config)), markup=False, highlight=False)
        task = bar.add_task("runs", total=total)
        for method in config.only:
            bar.update(task, description=method)

            def tell(record: Record, method: str = method) -> None:
                bar.advance(task)
                console.print(
                    f"{method} {record['value']:g}, seed {record['seed']}: error "
                    f"{final(record):.2e} after {record['steps'][-1]} steps",
                    highlight=False,
                )

            bar.advance(task, len(cells.read(method)))
            run_method(config, cells, method, tell)
            jax.clear_caches()
    return config.out
